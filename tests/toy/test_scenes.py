"""Scenes and their ground truth: deterministic, and in agreement with captions and pixels."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from refalign.errors import ConfigError
from refalign.toy.drawing import ACTIONS, FRAME_HEIGHT_PX, FRAME_WIDTH_PX, HEIGHT, draw
from refalign.toy.identities import HIDDEN_ATTRIBUTES, LIKENESSES, attributes_of, identity_of, likeness_of, split_of
from refalign.toy.rendering import boxes_of, draw_subjects, render_references, render_scenes
from refalign.toy.scenes import (
    NUM_FRAMES,
    PLACES,
    SIDES,
    VERBS,
    caption_tier,
    caption_words,
    make_caption,
    make_scene,
    paint_place,
    parse_caption,
    subject_phrase,
)
from workshop.weights.initial_weights import make_tokenizer
from workshop.weights.pool import CAPTION_TOKENS
from workshop.weights.sampling import sample_clutter, sample_frames

PLANS = [make_scene([7, number]) for number in range(100)]
FIRST_FRAMES = (0, 1, 5)
"""Of the three drawings."""
RED_ROUND = identity_of(replace(attributes_of(0), shape="round", main_colour="red", second_colour="blue", third_colour="blue"))


@pytest.fixture(scope="module")
def shots():
    return render_scenes(PLANS)


def test_the_same_seed_gives_the_same_scene_and_pixels():
    first, second = (render_scenes([make_scene(123)])[0] for _ in range(2))
    assert first.plan == second.plan != make_scene(124)
    assert first.frames.tobytes() == second.frames.tobytes() and first.masks.tobytes() == second.masks.tobytes()
    assert first.frames.shape == (NUM_FRAMES, FRAME_HEIGHT_PX, FRAME_WIDTH_PX, 3) and first.frames.dtype == np.uint8
    assert first.masks.shape == (len(first.plan.subjects), *first.frames.shape[:3])


def test_subjects_stand_where_their_number_puts_them():
    left, middle, right = SIDES
    seen = {tuple(subject.side for subject in plan.subjects) for plan in PLANS}
    assert seen == {(left,), (middle,), (right,), (left, right), (left, middle, right)}


def test_actions_and_likenesses_all_have_their_share():
    actions = Counter(subject.action for plan in PLANS for subject in plan.subjects)
    assert set(actions) == set(ACTIONS) and min(actions.values()) > 0.12 * actions.total()
    assert {plan.likeness for plan in PLANS} == {None, *LIKENESSES}
    for likeness in LIKENESSES:
        cast = [subject.identity for subject in make_scene(9, num_subjects=2, likeness=likeness).subjects]
        assert likeness_of(*cast) == likeness


def test_heldout_scenes_show_heldout_identities_only():
    plans = [make_scene([8, number], split="heldout") for number in range(20)]
    assert all(split_of(subject.identity) == "heldout" for plan in plans for subject in plan.subjects)


def test_a_scene_needs_a_cast_of_one_to_three():
    for cast in ([], [1, 2, 3, 4]):
        with pytest.raises(ConfigError, match=f"{len(cast)} subjects"):
            make_scene(0, cast=cast)


def test_a_caption_goes_from_left_to_right():
    plan = make_scene(0, cast=[RED_ROUND, RED_ROUND])
    left, right = (replace(subject, action="walking left", named=True) for subject in plan.subjects)

    def say(*subjects):
        return make_caption(replace(plan, subjects=subjects, place="night", place_named=True))

    start = "On the left a red round creature walks left and on the right"
    assert say(left, right) == f"{start} another red round creature walks left at night."
    assert say(left, replace(right, named=False)) == f"{start} a creature walks left at night."


def test_captions_speak_sides_and_actions_and_never_hidden_attributes():
    words, tokenizer = set(caption_words()), make_tokenizer()
    trio = make_scene(0, num_subjects=3, likeness="unlike")
    subjects = tuple(replace(subject, named=True, action="walking right") for subject in trio.subjects)
    longest = [replace(trio, subjects=subjects, place=place, place_named=True) for place in PLACES]
    for plan in (*PLANS, *longest):
        caption = make_caption(plan)
        asked = [(each.side, each.action, each.shape is not None) for each in parse_caption(caption)]
        assert asked == [(subject.side, subject.action, subject.named) for subject in plan.subjects]
        ids = tokenizer(caption).input_ids
        assert len(ids) <= CAPTION_TOKENS and tokenizer.unk_token_id not in ids
        said = caption.lower().replace(",", " ,").replace(".", " .").split()
        assert set(said) <= words
        named = [attributes_of(subject.identity).main_colour for subject in plan.subjects if subject.named]
        for subject in plan.subjects:
            phrase = subject_phrase(subject.identity, named=subject.named).split(" ", 1)[1]
            clauses = {f"{subject.side} {one} {phrase} {VERBS[subject.action]}" for one in ("a", "an", "another")}
            assert any(clause in caption.lower() for clause in clauses), caption
            hidden = {getattr(attributes_of(subject.identity), name) for name in HIDDEN_ATTRIBUTES}
            assert not hidden & (set(said) - set(named)), caption


def test_captions_come_in_tiers():
    tiers = Counter(caption_tier(plan) for plan in PLANS)
    assert set(tiers) == {"named", "mixed", "plain"} and min(tiers.values()) >= 10
    pair = next(plan for plan in PLANS if caption_tier(plan) == "plain" and len(plan.subjects) == 2)
    assert make_caption(pair).lower().count("a creature") == 1 and "another creature" in make_caption(pair)


def test_nobody_leaves_the_frame_at_top_or_bottom():
    """Of who jumps highest, the tip of a party hat may be cut off: one pixel."""
    moments = [(subject, number) for plan in PLANS for subject in plan.subjects for number in range(3)]
    alpha = draw(
        [subject.identity for subject, _ in moments],
        [subject.pose(number) for subject, number in moments],
        [subject.column_px(number) for subject, number in moments],
        [subject.ground_px + 8 for subject, _ in moments],
        [subject.height_px for subject, _ in moments],
        (FRAME_HEIGHT_PX + 16, FRAME_WIDTH_PX),
    ).alpha
    outside = (np.concatenate([alpha[:, :8], alpha[:, -8:]], 1) >= 0.5).sum((1, 2))
    assert outside.max() <= 1 and (outside > 0).mean() < 0.01


def test_masks_and_boxes_are_where_the_figures_were_painted(shots):
    """Frames are the empty place where no figure is, and a figure's own colours where its mask and nobody else's edge is."""
    for shot in shots[:30]:
        count = len(shot.plan.subjects)
        figures = draw_subjects([shot.plan])
        alpha = figures.alpha.reshape(count, 3, FRAME_HEIGHT_PX, FRAME_WIDTH_PX)
        colour = figures.colour.reshape(*alpha.shape, 3).round()
        frames, masks = shot.frames[list(FIRST_FRAMES)], shot.masks[:, FIRST_FRAMES]
        place = np.broadcast_to(paint_place(shot.plan).round(), frames.shape)
        nobody = (alpha == 0).all(0)
        np.testing.assert_array_equal(frames[nobody], place[nobody])
        for number in range(count):
            alone = masks[number] & (np.delete(alpha, number, 0) == 0).all(0) & (alpha[number] > 0.999)
            np.testing.assert_allclose(frames[alone], colour[number][alone], atol=1)
            assert (np.abs(frames - place).max(-1)[masks[number]] > 8).mean() > 0.99
        left, top, right, bottom = shot.boxes_xyxy_px.reshape(-1, 4).T
        for number, mask in enumerate(shot.masks.reshape(-1, FRAME_HEIGHT_PX, FRAME_WIDTH_PX)):
            inside = mask[top[number] : bottom[number], left[number] : right[number]]
            assert inside.sum() == mask.sum() and all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_who_stands_lower_is_whole_and_masks_never_overlap(shots):
    for shot in shots:
        nearest = int(np.argmax([subject.ground_px for subject in shot.plan.subjects]))
        assert shot.masks.sum(0).max() <= 1 and (shot.visible_fraction[nearest] == 1).all()
    assert sum(shot.visible_fraction.min() < 1 for shot in shots) >= 5, "some scenes should show occlusion"


def test_frames_of_a_drawing_are_equal_and_drawings_differ_when_somebody_moves(shots):
    for shot in shots:
        for first, last in ((1, 4), (5, 8)):
            assert (shot.frames[first : last + 1] == shot.frames[first]).all()
        moves = any(subject.action != "standing" or subject.blinks for subject in shot.plan.subjects)
        assert (shot.frames[0] != shot.frames[1]).any() == moves
        for subject, boxes in zip(shot.plan.subjects, shot.boxes_xyxy_px, strict=True):
            if subject.action.startswith("walking"):
                middle = boxes[list(FIRST_FRAMES)][:, [0, 2]].sum(1)
                assert (np.diff(middle) > 0).all() == (subject.action == "walking right"), boxes


def test_a_reference_shows_its_subject_upright_on_white_about_as_large_as_in_clips(shots):
    for shot in [shot for shot in shots if len(shot.plan.subjects) == 1]:
        subject, box, mask = shot.plan.subjects[0], shot.boxes_xyxy_px[0, 0], shot.masks[0, 0]
        pose = subject.pose(0)
        picture = render_references([subject.identity], [pose])[0]
        assert (picture[:, :12] == 255).all() and (picture[:, -12:] == 255).all()
        figure = draw([subject.identity], [pose], [40], [47 + 46 / HEIGHT * pose.lift], [46])
        given = figure.alpha[0] >= 0.5
        assert (picture[~given].min(-1) > 127).mean() > 0.98 and (picture[given].min(-1) < 200).mean() > 0.8
        left, top, right, bottom = boxes_of(given)
        assert 1.1 <= (bottom - top) / (box[3] - box[1]) <= 1.3
        if box[0] > 0 and box[2] < FRAME_WIDTH_PX:
            crop = Image.fromarray(given[top:bottom, left:right]).resize((int(box[2] - box[0]), int(box[3] - box[1])))
            shown = mask[box[1] : box[3], box[0] : box[2]]
            assert (np.asarray(crop) & shown).sum() > 0.85 * (np.asarray(crop) | shown).sum()


def test_single_frames_agree_with_their_truth():
    truths = sample_frames(3, range(10))
    for truth in truths:
        assert truth.frame.shape == (FRAME_HEIGHT_PX, FRAME_WIDTH_PX, 3) and len(truth.masks) == len(truth.boxes_xyxy_px)
        np.testing.assert_array_equal(boxes_of(truth.masks), truth.boxes_xyxy_px)
    np.testing.assert_array_equal(sample_frames(3, range(4, 5))[0].frame, truths[4].frame)
    clutter = sample_clutter(3, 0)
    assert clutter.frame.shape == truths[0].frame.shape and not len(clutter.masks)
    assert boxes_of(np.zeros((2, 8, 8), bool)).tolist() == [[0, 0, 0, 0]] * 2
