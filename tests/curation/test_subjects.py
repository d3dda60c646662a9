import io
import json

import numpy as np
from PIL import Image

from refalign.config import CurationConfig, apply_overrides
from refalign.config.presets import toy
from refalign.curation.quality import measure_sharpness
from refalign.curation.shots import Window, choose_detection_offsets, iter_annotated_window
from refalign.curation.sources.opens2v import parse_annotation
from refalign.curation.subjects import (
    Candidate,
    choose_classes,
    choose_subjects,
    make_subject_row,
    read_candidates,
)
from refalign.io.looks import Look
from refalign.io.video import make_center_crop

SIZE = 100
LOOK = Look(0, SIZE, SIZE, 1.0, 0, False, "sdr", "bt709", False, False)


def make_candidate(box, *, track=0, frame=0, score=0.9, sharpness=1.0):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Candidate(track, "thing", frame, box, mask, score, sharpness)


def choose(*candidates, **settings):
    return choose_subjects(candidates, (0, 0, SIZE, SIZE), CurationConfig(**settings))


def test_area_floor_and_cap():
    small, good, scene = (0, 0, 20, 20), (10, 10, 60, 60), (0, 0, 99, 99)
    chosen = choose(*(make_candidate(box, track=i) for i, box in enumerate((small, good, scene))))
    assert [subject.box_xyxy_px for subject in chosen] == [good]


def test_masks_that_agree_are_one_subject_the_surest_one():
    twice = [make_candidate((10, 10, 60, 60), track=0, score=0.7), make_candidate((10, 10, 60, 61), track=1, score=0.8)]
    assert [subject.track for subject in choose(*twice)] == [1]
    apart = [make_candidate((5, 5, 45, 45), track=0), make_candidate((50, 50, 95, 95), track=1)]
    assert len(choose(*apart)) == 2


def test_overlap_counts_only_within_a_frame():
    """Two subjects that stand at one place at different times are two."""
    first = make_candidate((10, 10, 60, 60), track=0, frame=0)
    later = make_candidate((10, 10, 60, 60), track=1, frame=3)
    assert len(choose(first, later)) == 2


def test_the_largest_stay_and_stand_from_left_to_right():
    boxes = [(0, 0, 40, 40), (50, 0, 99, 49), (0, 50, 45, 95), (50, 50, 94, 94)]
    chosen = choose(*(make_candidate(box, track=i) for i, box in enumerate(boxes)), max_references=3)
    assert [subject.track for subject in chosen] == [2, 3, 1], "the smallest, and no other, is left out"


def test_the_best_view_of_a_track_is_sharp_large_and_whole():
    blurred = make_candidate((20, 20, 60, 60), frame=0, sharpness=1.0)
    sharp = make_candidate((20, 20, 60, 60), frame=1, sharpness=5.0)
    cut_off = make_candidate((0, 20, 40, 60), frame=2, sharpness=5.0)
    assert choose(blurred, sharp, cut_off)[0].frame == 1


def test_a_box_within_the_edges_inexactness_counts_as_cut_off():
    """At 1000 px a detector's box ends a few pixels before the border that cuts its subject."""
    mask = np.zeros((1000, 1000), bool)
    boxes = [(3, 300, 403, 700), (6, 300, 406, 700)]
    views = [Candidate(0, "thing", frame, box, mask, 0.9, 1.0) for frame, box in enumerate(boxes)]
    assert choose_subjects(views, (0, 0, 1000, 1000), CurationConfig())[0].frame == 1


def test_a_reference_is_the_mask_on_nothing_or_the_whole_box():
    candidate = make_candidate((10, 20, 50, 60))
    candidate.mask[20:40] = False
    frame = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    window = Window(0, (SIZE, SIZE), LOOK, [frame], [0])
    crops = {}
    for crop in ("mask", "box"):
        config = apply_overrides(toy(), [f"curation.crop={crop}"])
        row = make_subject_row("clip-s0", candidate, window, (0, 0, SIZE, SIZE), config)
        crops[crop] = np.asarray(Image.open(io.BytesIO(row.crop_png)))
        assert crops[crop].shape == (40, 40, 4) and np.array_equal(crops[crop][..., :3], frame[20:60, 10:50])
    assert np.array_equal(crops["mask"][..., 3] == 255, candidate.mask[20:60, 10:50]) and (crops["box"][..., 3] == 255).all()


def test_the_caption_may_say_what_to_look_for():
    config = CurationConfig(classes=("dog", "red ball", "fox"), classes_in_caption=True)
    assert choose_classes("Two Dogs chase a red ball.", config) == ("dog", "red ball")
    assert choose_classes("Foxes and dogfish", config) == ("fox",)
    assert choose_classes("a cat", config) == choose_classes("", config) == config.classes
    assert choose_classes("a dog", CurationConfig(classes=("fox",))) == ("fox",)
    assert choose_classes("a dog", CurationConfig()) == ()


def test_what_lies_outside_of_the_crop_is_no_subject():
    inside, outside = make_candidate((0, 0, 45, 45), track=0), make_candidate((60, 0, 99, 40), track=1)
    chosen = choose_subjects([inside, outside], (0, 0, 62, 100), CurationConfig())
    assert [subject.track for subject in chosen] == [0]


def test_sharpness_falls_with_blur():
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    smooth = np.full((40, 40, 3), 90, np.uint8)
    assert measure_sharpness(noise) > 100 > measure_sharpness(smooth)


def test_the_real_record_gives_the_woman_once_and_not_the_park(real_data):
    config = toy().model_copy(update={"curation": CurationConfig()})
    folder = real_data / "opens2v"
    entry = next(iter(json.loads((folder / "annotations.json").read_text()).values()))
    annotation = parse_annotation(entry)
    window = next(iter_annotated_window(folder / entry["metadata"]["path"], annotation, config))
    assert isinstance(window, Window) and window.frame_size_px == (720, 1280)
    offsets = choose_detection_offsets(config.video.num_frames, config.curation.detection_frames)
    assert [index - window.start_index for index in window.samples] == offsets and len(window.frames) == 1
    candidates = read_candidates(window, annotation, config.curation)
    wide = make_center_crop((0, 0, 1280, 720), config.video.model_copy(update={"height_px": 720, "width_px": 1280}))
    chosen = choose_subjects(candidates, wide, config.curation)
    names = {candidate.class_name for candidate in candidates}
    assert "park" in names, "the whole-frame scene passes the score filter; the area cap must take it out"
    assert "grassy area" not in names, "tagged as background"
    assert [candidate.class_name for candidate in candidates].count("woman") == 2, "the same woman twice, and once as a person"
    assert [subject.class_name for subject in chosen] == ["woman"]
