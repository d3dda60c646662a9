"""The detector: arrays in source pixels, tracks without memory, one-line errors; and the shipped weights' held-out figures."""

import os
import shutil

import numpy as np
import pytest
import toy_models

from refalign.errors import ArtifactError, GeometryError
from refalign.models.detector_files import check_detector
from refalign.models.yolo import Detections, load_detector
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.rendering import render_scenes
from refalign.toy.scenes import make_scene

SIZE = FRAME_HEIGHT_PX, FRAME_WIDTH_PX
DETECTOR_FOLDER = WEIGHTS_FOLDER / "detector"


@pytest.fixture(scope="module")
def detector():
    return load_detector(DETECTOR_FOLDER)


@pytest.fixture(scope="module")
def clip():
    return render_scenes([make_scene(11, split="heldout", num_subjects=2, likeness="same shape and colour")])[0]


def test_shipped_weights_find_heldout_creatures():
    """The figures of the weights' README, with room for chance: 1.00 recall and 0.94 mask IoU over 500 frames."""
    figures = toy_models.measure_detector(DETECTOR_FOLDER, 100)
    assert figures["box_recall_at_50"] >= 0.95 and figures["mask_iou"] >= 0.85 and figures["false_share"] <= 0.06, figures


def test_detections_are_in_source_pixels_and_ordered(detector, clip):
    for found in detector.detect(clip.frames):
        assert found.boxes_xyxy_px.dtype == np.float32 and found.boxes_xyxy_px.shape == (len(found), 4)
        assert found.masks.shape == (len(found), *SIZE) and found.masks.dtype == bool
        assert found.class_names == ("creature",) * len(found) and found.track_ids is None
        assert np.all(np.diff(found.scores) <= 0) and np.all(found.scores >= detector.min_score)
        for box, mask in zip(found.boxes_xyxy_px, found.masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert (
                box[0] - 1 <= columns.min()
                and columns.max() < box[2] + 1
                and box[1] - 1 <= rows.min()
                and rows.max() < box[3] + 1
            )


def test_other_frame_sizes_keep_their_pixels(detector, clip):
    """Enlarged twice and set into a wider and taller frame, boxes follow."""
    small = detector.detect(clip.frames[:1])[0]
    large = np.full((1, 140, 180, 3), 128, np.uint8)
    large[0, 20:116, 10:170] = clip.frames[0].repeat(2, 0).repeat(2, 1)
    found = detector.detect(large)[0]
    assert found.masks.shape[1:] == (140, 180)
    expected = small.boxes_xyxy_px * 2 + [10, 20, 10, 20]
    best = np.abs(found.boxes_xyxy_px[:, None] - expected[None]).max(-1).min(0)
    assert len(small) >= 1 and best.max() < 8


def test_detection_is_deterministic(detector, clip):
    first, second = detector.detect(clip.frames), detector.detect(clip.frames)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.boxes_xyxy_px, other.boxes_xyxy_px)
        np.testing.assert_array_equal(one.masks, other.masks)


def test_tracks_have_no_memory_between_calls(detector, clip):
    first, second = detector.track(clip.frames), detector.track(clip.frames)
    assert [found.track_ids.tolist() for found in first] == [found.track_ids.tolist() for found in second]
    assert min(found.track_ids.min() for found in first if len(found)) == 1


def test_tracks_follow_subjects(detector):
    """Through 12 clips: nearly always found, and seldom mistaken for another where two pass each other."""
    found, frames, subjects, switched = 0, 0, 0, 0
    for number in range(12):
        scene = render_scenes([make_scene([11, number], split="heldout")])[0]
        tracks = detector.track(scene.frames)
        for boxes in scene.boxes_xyxy_px:
            ids = [id_ for tracked, box in zip(tracks, boxes, strict=True) if (id_ := _track_at(tracked, box)) is not None]
            found, frames = found + len(ids), frames + len(boxes)
            subjects, switched = subjects + 1, switched + (len(set(ids)) > 1)
    assert found / frames > 0.96
    assert switched / subjects < 0.2


def _track_at(found: Detections, box: np.ndarray) -> int | None:
    for candidate, track in zip(found.boxes_xyxy_px, found.track_ids, strict=True):
        inner = np.maximum(np.minimum(candidate[2:], box[2:]) - np.maximum(candidate[:2], box[:2]), 0).prod()
        outer = (candidate[2:] - candidate[:2]).prod() + (box[2:] - box[:2]).prod() - inner
        if inner > 0.5 * outer:
            return int(track)
    return None


def test_frames_without_subjects_give_empty_detections(detector):
    frames = np.full((2, *SIZE, 3), 200, np.uint8)
    for found in [*detector.detect(frames), *detector.track(frames)]:
        assert len(found) == 0 and found.boxes_xyxy_px.shape == (0, 4) and found.masks.shape == (0, *SIZE)
    assert detector.detect(frames[:0]) == []


def test_float_frames_are_refused(detector):
    with pytest.raises(GeometryError, match="float64"):
        detector.detect(np.zeros((1, *SIZE, 3)))


def test_matching_gives_each_subject_one_detection():
    scene = render_scenes([make_scene(3, num_subjects=2)])[0]
    truth = _truth(scene)
    double = Detections(
        np.repeat(truth.boxes_xyxy_px, 2, 0).astype(np.float32),
        np.ones(4, np.float32),
        ("creature",) * 4,
        np.repeat(truth.masks, 2, 0),
    )
    assert toy_models.match_frame(truth, double) == [1.0, 1.0]


def _truth(scene):
    from workshop.weights.sampling import FrameTruth

    return FrameTruth(scene.frames[0], scene.boxes_xyxy_px[:, 0], scene.masks[:, 0])


def test_missing_and_damaged_weights_are_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no such detector folder"):
        load_detector(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="no such file"):
        load_detector(tmp_path / "nothing.pt")
    shutil.copy(DETECTOR_FOLDER / "model.yaml", tmp_path)
    with pytest.raises(ArtifactError, match="model.safetensors is missing"):
        load_detector(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_detector(tmp_path)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("ultralytics.utils.downloads.attempt_download_asset", refuse)
    with pytest.raises(ArtifactError, match="yolo11n-seg.pt.*could not be opened or fetched.*no route"):
        load_detector("yolo11n-seg.pt")


def test_a_local_pt_file_opens_and_other_tasks_are_refused(tmp_path, detector, clip):
    """Stands in for published weights: the same file format, written by ultralytics itself."""
    from ultralytics import YOLO

    detector._yolo.save(tmp_path / "creatures-seg.pt")
    again = load_detector(tmp_path / "creatures-seg.pt", image_size_px=detector.image_size_px)
    assert again.class_names == ("creature",) and len(again.detect(clip.frames[:1])[0]) == len(
        detector.detect(clip.frames[:1])[0]
    )
    assert load_detector(tmp_path / "creatures-seg.pt").image_size_px == 640
    YOLO("yolo11n.yaml", task="detect").save(tmp_path / "boxes.pt")
    with pytest.raises(ArtifactError, match="'detect'; masks are needed"):
        load_detector(tmp_path / "boxes.pt")


def test_advice_boxes_are_enough_where_masks_are_not_needed(tmp_path, detector, clip):
    """The shipped weights without their masks: the same boxes, each of which is its own mask."""
    import yaml
    from safetensors.torch import load_file, save_file
    from ultralytics import YOLO

    description = yaml.safe_load((DETECTOR_FOLDER / "model.yaml").read_text())
    inputs, repeats, _, (number, *_) = description["head"][-1]
    description["head"][-1] = [inputs, repeats, "Detect", [number]]
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    known = YOLO(str(tmp_path / "model.yaml"), task="detect").model.state_dict()
    tensors = load_file(DETECTOR_FOLDER / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name in known}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="'detect'; masks are needed"):
        load_detector(tmp_path)
    boxes = load_detector(tmp_path, needs_masks=False)
    for found, expected in zip(boxes.track(clip.frames), detector.track(clip.frames), strict=True):
        np.testing.assert_allclose(found.boxes_xyxy_px, expected.boxes_xyxy_px, atol=1e-3)
        assert found.masks.shape == expected.masks.shape and len(found)
        for mask, box in zip(found.masks, np.rint(found.boxes_xyxy_px).astype(int).clip(0), strict=True):
            rows, columns = np.nonzero(mask)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist() and mask[rows[0] :].any()
            assert len(rows) == (box[3] - box[1]) * (box[2] - box[0])


def test_advice_weights_are_told_apart_before_anything_starts(tmp_path, open_vocabulary):
    import torch
    from ultralytics import YOLO

    YOLO("yolo11n.yaml", task="detect").save(tmp_path / "boxes.pt")
    YOLO("yolo11n-seg.yaml", task="segment").save(tmp_path / "masks.pt")
    YOLO("yolo11n-cls.yaml", task="classify").save(tmp_path / "classes.pt")
    torch.save({"model.0.weight": torch.zeros(3)}, tmp_path / "state.pt")
    shutil.copy(tmp_path / "masks.pt", tmp_path / "masks.PT")
    for name in ("model.onnx", "words.pt", "model.bin"):
        (tmp_path / name).write_bytes(b"something")
    refused = {
        "boxes.pt": "'detect'; masks are needed.*curation.crop=box",
        "classes.pt": "'ClassificationModel'.*expected 'segment'",
        "state.pt": "the file is there, but holds no model of ultralytics .a state dict",
        "masks.PT": "the file is there, but its name does not end with .pt.*small letters",
        "model.onnx": "the file is there, but is a model exported",
        "model.bin": "the file is there, but its name does not end with .pt",
        "words.pt": "the file is there, but torch did not write it",
        "gone.pt": "no such file",
        "gone": "no such detector folder",
    }
    for name, message in refused.items():
        for look in (check_detector, load_detector):
            with pytest.raises(ArtifactError, match=message) as caught:
                look(tmp_path / name, needs_masks=True)
            assert "\n" not in str(caught.value)
    for source in (tmp_path / "masks.pt", open_vocabulary, DETECTOR_FOLDER, "yolo11n-seg.pt"):
        check_detector(source, needs_masks=True)
    check_detector(tmp_path / "boxes.pt", needs_masks=False)


@pytest.fixture(scope="module")
def open_vocabulary(tmp_path_factory):
    """YOLOE as published weights come: the real class at its smallest, untrained, in ultralytics' own file format."""
    import torch
    from ultralytics import YOLOE

    folder = tmp_path_factory.mktemp("yoloe")
    torch.manual_seed(0)
    YOLOE("yoloe-11n-seg.yaml", task="segment").save(folder / "yoloe-11n-seg.pt")
    return folder / "yoloe-11n-seg.pt"


def write_embeddings(path, names):
    vectors = np.random.default_rng(0).normal(size=(1, len(names), 512)).astype(np.float32)
    np.savez(path, names=np.array(names), embeddings=vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), model="yoloe")


def test_an_open_vocabulary_detector_takes_any_words(open_vocabulary, tmp_path, clip):
    shutil.copy(open_vocabulary, tmp_path)
    write_embeddings(tmp_path / "yoloe-11n-seg.npz", ["dog", "red ball", "cat"])
    detector = load_detector(tmp_path / "yoloe-11n-seg.pt", classes=("red ball", "dog"), min_score=1e-6, image_size_px=96)
    assert detector.class_names == ("red ball", "dog")
    (found,) = detector.detect(clip.frames[:1])
    assert len(found) and set(found.class_names) <= {"red ball", "dog"} and found.masks.shape == (len(found), *SIZE)
    for name in detector.class_names:
        (tracked,) = detector.track(clip.frames[:1], [name])
        assert set(tracked.class_names) <= {name}
    with pytest.raises(ArtifactError, match="no embedding of horse"):
        load_detector(tmp_path / "yoloe-11n-seg.pt", classes=("horse",))


def test_an_open_vocabulary_detector_may_be_a_folder(open_vocabulary, tmp_path):
    import yaml
    from safetensors.torch import save_file
    from ultralytics import YOLOE

    yolo = YOLOE(str(open_vocabulary))
    save_file({name: tensor.contiguous() for name, tensor in yolo.model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(
        yaml.safe_dump(yolo.model.yaml | {"names": [str(n) for n in range(80)]}, sort_keys=False)
    )
    write_embeddings(tmp_path / "classes.npz", ["dog"])
    assert load_detector(tmp_path, classes=("dog",)).class_names == ("dog",)


def test_words_without_a_text_encoder_say_what_to_get(open_vocabulary, monkeypatch):
    def refuse(*_, **__):
        raise ModuleNotFoundError("No module named 'clip'")

    monkeypatch.setattr("ultralytics.nn.tasks.YOLOEModel.get_text_pe", refuse)
    with pytest.raises(ArtifactError, match=r"text encoder.*ultralytics/CLIP.*mobileclip_blt.ts.*yoloe-11n-seg.npz") as caught:
        load_detector(open_vocabulary, classes=("dog",))
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="name it in curation.classes"):
        load_detector(open_vocabulary)


def test_a_closed_vocabulary_is_filtered_and_other_words_are_refused(clip):
    assert load_detector(DETECTOR_FOLDER, classes=("creature",)).detect(clip.frames[:1])[0].class_names
    with pytest.raises(ArtifactError, match="does not know the classes dog.*creature.*yoloe-11l-seg.pt"):
        load_detector(DETECTOR_FOLDER, classes=("dog", "creature"))


def test_ultralytics_neither_looks_for_the_network_nor_writes_at_home(detector):
    from ultralytics import utils

    assert os.environ["YOLO_OFFLINE"] == "true" and not utils.ONLINE and not utils.AUTOINSTALL
    assert str(utils.USER_CONFIG_DIR).startswith(os.environ["YOLO_CONFIG_DIR"])
