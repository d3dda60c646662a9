"""What is derived from an input is checked: every stored reference shows something, and missing captions are counted and said."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from refalign.curation.masks import has_content
from refalign.stages.subjects import Subjects, SubjectsManifest, SubjectsWorker
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, here  # noqa: F401
from tests.curating_here import make_config as make_tiny
from tests.curation.bad_files import vary
from tests.curation.curating import curate, make_config
from tests.curation.test_bad_input import make_entry


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_videos=3, seed=5, split="heldout")
    return folder


@pytest.fixture(scope="module")
def actor():
    return SubjectsWorker(make_config())


def encode_mask(*boxes):
    from pycocotools import mask as coco

    pixels = np.zeros((48, 80), np.uint8, order="F")
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = 1
    return coco.encode(pixels)["counts"].decode()


def make_entries():
    """Name to (an entry, the classes of the subjects that it gives, the video's reason)."""

    def entry(*, mask=None, **changes):
        new = make_entry() | changes
        if mask is not None:
            new["annotation"]["mask_annotation"]["0"]["1"]["counts"] = mask
        return new

    def with_second(mask):
        new = make_entry()
        second = {"class_name": "other", "bbox": [50.0, 5.0, 79.0, 40.0], "gme_score": None, "aes_score": 6.0}
        new["annotation"]["ann_frame_data"]["annotations"].append(second)
        new["annotation"]["mask_annotation"]["0"]["2"] = {"size": [48, 80], "counts": mask, "score": 0.9}
        return new

    return {
        "good": (entry(), ["creature"], ""),
        "zero-mask": (entry(mask=encode_mask()), [], "NO_SUBJECT"),
        "one-pixel": (entry(mask=encode_mask((30, 20, 31, 21))), [], "NO_SUBJECT"),
        "outside-box": (entry(mask=encode_mask((60, 0, 80, 8))), [], "NO_SUBJECT"),
        "second-blank": (with_second(encode_mask()), ["creature"], ""),
        "null-score": (with_second(encode_mask((52, 7, 78, 39))), ["creature", "other"], ""),
        "tags-null": (entry(word_tags=None), ["creature"], ""),
        "background-null": (entry(word_tags={"background": None}), ["creature"], ""),
        "tags-list": (entry(word_tags={"background": [["sky"]]}), [], "BAD_ANNOTATION"),
        "caption-null": (entry(metadata={**make_entry()["metadata"], "cap": [None]}), ["creature"], ""),
    }


def test_derived_values_blank_masks_are_no_references(actor, world, tmp_path):
    entries = make_entries()
    data = sorted(world.glob("*.mp4"))[0].read_bytes()
    texts = []
    (tmp_path / "in").mkdir()
    for name, (entry, _, _) in entries.items():
        (tmp_path / f"in/{name}.mp4").write_bytes(vary(data, name))
        texts.append(f"{json.dumps(name)}: {json.dumps(entry)}".replace("<own>", f"{name}.mp4"))
    (tmp_path / "in/annotations.json").write_text("{" + ", ".join(texts) + "}")
    videos, rows = curate(actor, tmp_path / "in", tmp_path / "out")
    assert {video.item: video.reason for video in videos} == {name: reason for name, (_, _, reason) in entries.items()}
    found = {row["source_group"]: [subject["class_name"] for subject in row["subjects"]] for row in rows}
    assert found == {name: classes for name, (_, classes, _) in entries.items() if classes}
    for row in rows:
        for subject in row["subjects"]:
            check_content(subject["crop_png"])


def test_cases_of_blank_masks_have_their_right_outcomes(actor, real_data, tmp_path):
    """The real odd files; the test above makes their like."""
    folder = real_data.parent / "cases" / "opens2v_blank_mask"
    if not folder.is_dir():
        pytest.skip("no cases beside REFALIGN_REAL_DATA")
    videos, rows = curate(actor, folder, tmp_path)
    assert {video.item: video.reason for video in videos} == {
        "zero-mask": "NO_SUBJECT",
        "mask-outside-box": "NO_SUBJECT",
        "tags-null": "",
    }
    assert [len(row["subjects"]) for row in rows] == [1]


def check_content(png):
    picture = np.asarray(Image.open(io.BytesIO(png)))
    opaque = picture[..., 3] == 255
    assert opaque.sum() >= 16 and opaque.mean() >= 0.02 and picture[..., :3][opaque].std() > 0.5


def test_derived_values_detected_subjects_show_something(actor, world, tmp_path):
    _, rows = curate(actor, world, tmp_path)
    subjects = [subject for row in rows for subject in row["subjects"]]
    assert len(subjects) > 3
    for subject in subjects:
        check_content(subject["crop_png"])


def test_derived_values_content_is_opaque_and_varied():
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    full, box = np.ones((40, 60), bool), (10, 10, 50, 30)
    assert has_content(noise, full, box)
    assert not has_content(np.full_like(noise, 90), full, box), "one colour"
    assert not has_content(noise, ~full, box) and not has_content(noise, full, (10, 10, 10, 30))
    for pixels, is_enough in ((15, False), (16, True)):
        mask = np.zeros((40, 60), bool)
        mask[12, 12 : 12 + pixels] = True
        assert has_content(noise, mask, box) == is_enough
    outside = full.copy()
    outside[10:30, 10:50] = False
    assert not has_content(noise, outside, box)


@pytest.mark.parametrize(("wanted", "least"), [(0.1, 0.1), (0.8, 0.25)])
def test_advice_a_low_min_confidence_has_an_effect(wanted, least):
    config = make_config()
    low = config.curation.model_copy(update={"min_confidence": wanted})
    assert SubjectsWorker(config.model_copy(update={"curation": low})).detector.min_score == least


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.usefixtures("here")
def test_missing_or_empty_captions_are_counted_and_said(world, tmp_path, said):
    for path in sorted(world.glob("*.mp4")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
        if said:
            (tmp_path / "in" / path.name).with_suffix(".txt").write_text("a creature")
    manifest = curate_here(make_tiny(), tmp_path / "in", tmp_path / "out")["subjects"].load_manifest() or {}
    assert manifest["captions"] == {"source" if said else "none": manifest["clips"]} and manifest["clips"]
    line = Subjects().describe(SubjectsManifest.model_validate(manifest))
    assert ("have no caption and would be trained on an empty prompt" in line) != said and "\n" not in line
