"""Scenes and their ground truth: deterministic, and in agreement with the pixels."""

from dataclasses import replace

import numpy as np
import pytest

from refalign.errors import ConfigError
from refalign.toy.captions import POSE_VERBS, caption_tier, caption_words, make_caption, subject_phrase
from refalign.toy.drawing import POSES
from refalign.toy.identities import HIDDEN_ATTRIBUTES, LIKENESSES, attributes_of, likeness_of, split_of
from refalign.toy.rendering import boxes_of, render_scene
from refalign.toy.sampling import sample_frame
from refalign.toy.scenes import FRAME_SIZE_PX, HEIGHTS_PX, MAX_SUBJECTS, NUM_FRAMES, make_scene

SCENES = [make_scene([7, number]) for number in range(60)]


def test_the_same_seed_gives_the_same_scene_and_pixels():
    first, second = (render_scene(make_scene(123)) for _ in range(2))
    assert first.plan == second.plan
    np.testing.assert_array_equal(first.frames, second.frames)
    np.testing.assert_array_equal(first.masks, second.masks)
    assert make_scene(124) != first.plan


def test_frames_have_the_stated_size():
    shot = render_scene(SCENES[0])
    assert shot.frames.shape == (NUM_FRAMES, FRAME_SIZE_PX, FRAME_SIZE_PX, 3) and shot.frames.dtype == np.uint8
    assert shot.masks.shape == (len(SCENES[0].subjects), NUM_FRAMES, FRAME_SIZE_PX, FRAME_SIZE_PX)


def test_masks_are_where_the_pixels_change():
    """Without a subject, only pixels of its mask change (the anti-aliased edge aside), and nearly all of them do."""
    for plan in SCENES[:6]:
        shot = render_scene(plan)
        for number in range(len(plan.subjects)):
            others = plan.subjects[:number] + plan.subjects[number + 1 :]
            change = np.abs(shot.frames.astype(int) - render_scene(replace(plan, subjects=others)).frames).max(-1)
            mask = shot.masks[number]
            # Not quite none: through the soft edge of whoever stands in front, what is behind shines a little.
            assert (change[~_grown(mask)] > 60).sum() < 0.01 * mask.sum(), "pixels change away from the mask"
            # Not quite all: a white eye on snow is painted, and looks as before.
            assert (change[mask] > 0).mean() > 0.97, "the mask covers pixels that the subject does not paint"


def _grown(masks: np.ndarray) -> np.ndarray:
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    height, width = masks.shape[1:]
    shifts = [(row, column) for row in range(3) for column in range(3)]
    return np.any([padded[:, row : row + height, column : column + width] for row, column in shifts], axis=0)


def test_boxes_are_tight_and_half_open():
    for plan in SCENES[:6]:
        shot = render_scene(plan)
        for mask, box in zip(shot.masks.reshape(-1, 96, 96), shot.boxes_xyxy_px.reshape(-1, 4), strict=True):
            left, top, right, bottom = box
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()


def test_an_empty_mask_has_an_empty_box():
    assert boxes_of(np.zeros((2, 8, 8), bool)).tolist() == [[0, 0, 0, 0]] * 2


def test_who_stands_lower_occludes_and_masks_never_overlap():
    occluded = 0
    for plan in SCENES:
        grounds = [subject.ground_px for subject in plan.subjects]
        assert grounds == sorted(grounds)
        if len(plan.subjects) < 2:
            continue
        shot = render_scene(plan)
        assert shot.masks.sum(0).max() <= 1
        assert np.all(shot.visible_fraction[-1] == 1), "the nearest subject is never occluded"
        occluded += bool(shot.visible_fraction.min() < 0.9)
    assert occluded >= 5, "occlusion should happen in a fair share of the scenes"


def test_creatures_are_large_enough_to_read():
    heights = {count: [] for count in HEIGHTS_PX}
    for plan in SCENES[:40]:
        shot = render_scene(plan)
        upright = [number for number, subject in enumerate(plan.subjects) if subject.pose != "sleeping"]
        boxes = shot.boxes_xyxy_px[upright][shot.visible_fraction[upright] > 0.99]
        heights[len(plan.subjects)] += (boxes[:, 3] - boxes[:, 1]).tolist()
    assert all(np.quantile(values, 0.02) >= 30 for values in heights.values())
    for count, aim in {1: 0.65, 2: 0.54, 3: 0.45}.items():
        assert float(np.median(heights[count])) / FRAME_SIZE_PX == pytest.approx(aim, abs=0.05)


def test_number_pose_and_likeness_of_subjects_vary():
    assert {len(plan.subjects) for plan in SCENES} == {1, 2, 3}
    assert {subject.pose for plan in SCENES for subject in plan.subjects} == set(POSES)
    assert {plan.likeness for plan in SCENES} == {None, *LIKENESSES}
    for likeness in LIKENESSES:
        cast = [subject.identity for subject in make_scene(9, num_subjects=2, likeness=likeness).subjects]
        assert likeness_of(*cast) == likeness


def test_heldout_scenes_show_heldout_identities_only():
    for number in range(20):
        plan = make_scene([8, number], split="heldout")
        assert all(split_of(subject.identity) == "heldout" for subject in plan.subjects)


def test_a_scene_needs_a_cast_of_one_to_three():
    with pytest.raises(ConfigError, match="4 subjects"):
        make_scene(0, cast=[1, 2, 3, 4])
    assert len(make_scene(0, cast=[1, 2, 3]).subjects) == MAX_SUBJECTS


def test_captions_speak_poses_and_never_hidden_attributes():
    for plan in SCENES:
        caption = make_caption(plan).lower()
        words = caption.replace(",", " ").replace(".", " ").split()
        assert set(words) <= set(caption_words())
        for subject in plan.subjects:
            attributes = attributes_of(subject.identity)
            assert POSE_VERBS[subject.pose] in words
            assert not subject.named or f"{attributes.main_colour} {attributes.shape} creature" in caption
            for name in HIDDEN_ATTRIBUTES:
                spoken_by_someone = any(
                    getattr(attributes, name) == attributes_of(other.identity).main_colour
                    for other in plan.subjects
                    if other.named
                )
                assert spoken_by_someone or getattr(attributes, name) not in words, (name, caption)


def test_captions_say_who_stands_on_which_side():
    for plan in SCENES:
        caption = make_caption(plan).lower()
        for subject in plan.subjects:
            beyond = [other.x_px[0] > subject.x_px[0] for other in plan.subjects if other is not subject]
            place = subject.x_px[0] / FRAME_SIZE_PX if not beyond else 0.0 if all(beyond) else 0.5 if any(beyond) else 1.0
            side = "on the left" if place < 0.375 else "on the right" if place > 0.625 else "in the middle"
            clause = caption[caption.index(side) :]
            phrase = subject_phrase(subject.identity, named=subject.named).split(" ", 1)[1]
            assert clause.startswith(tuple(f"{side} {one} {phrase} {POSE_VERBS[subject.pose]}" for one in ("a", "an", "another")))
    alone = [make_caption(make_scene([3, number], num_subjects=1)) for number in range(30)]
    assert {caption.split(" a")[0] for caption in alone} == {"On the left", "In the middle", "On the right"}


def test_captions_come_in_tiers():
    tiers = [caption_tier(plan) for plan in SCENES]
    assert all(tiers.count(tier) >= 6 for tier in ("named", "mixed", "plain"))
    plain = next(plan for plan in SCENES if caption_tier(plan) == "plain" and len(plan.subjects) == 2)
    assert make_caption(plain).lower().count("a creature") == 1 and "another creature" in make_caption(plain)


def test_single_frames_agree_with_their_truth():
    for number in range(10):
        truth = sample_frame(3, number)
        assert truth.frame.shape == (96, 96, 3) and len(truth.masks) == len(truth.boxes_xyxy_px)
        np.testing.assert_array_equal(boxes_of(truth.masks), truth.boxes_xyxy_px)
    np.testing.assert_array_equal(sample_frame(3, 0).frame, sample_frame(3, 0).frame)
