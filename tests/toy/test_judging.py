"""The judges' arithmetic: cutting crops, pairing readings with what was asked for, chance, likeness without networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from refalign.errors import ArtifactError
from refalign.generation import RefAlignPipeline
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.benchmark import run_benchmark
from refalign.toy.cases import (
    Fault,
    draw_case,
    make_benchmark,
    make_cases,
    recast_for,
    shuffle_references,
    without_references,
)
from refalign.toy.drawing import render_reference
from refalign.toy.identities import HIDDEN_ATTRIBUTES, SPOKEN_ATTRIBUTES
from refalign.toy.judges import CROP_PX, MARGIN, VOCABULARIES, Judge, Reader, Reading, cut_crops, encode_truth, measure_travel
from refalign.toy.measures import colour_likeness, edge_likeness
from refalign.toy.scoring import score_clip, summarise
from refalign.toy.seeing import Seen, assign
from refalign.toy.train_judges import make_batch

QUESTIONS = (*SPOKEN_ATTRIBUTES, *HIDDEN_ATTRIBUTES, "pose")


def make_reading(truth: dict[str, int]) -> Reading:
    """A reader that is sure, and right."""
    probabilities = {name: np.eye(len(words) + 1)[truth[name]] for name, words in VOCABULARIES.items()}
    return Reading({name: VOCABULARIES[name][index] for name, index in truth.items()}, probabilities)


def test_a_crop_is_the_square_around_the_box_with_its_margin() -> None:
    frames = np.zeros((2, 96, 96, 3), np.uint8)
    frames[:, 30:50, 20:40] = 200
    boxes = np.array([[20, 30, 40, 50], [24, 30, 36, 50]])
    crops = cut_crops(frames, boxes)
    inside = (crops[..., 0] > 100).sum((1, 2)) / CROP_PX**2
    assert crops.shape == (2, CROP_PX, CROP_PX, 3)
    np.testing.assert_allclose(inside, 1 / MARGIN**2, rtol=0.05)  # the second box is narrow: its height decides


def test_crops_at_the_edge_continue_it() -> None:
    frames = np.full((1, 96, 96, 3), 77, np.uint8)
    assert (cut_crops(frames, np.array([[-10, -10, 20, 20]])) == 77).all()


def test_travel_is_measured_in_tenths_of_the_subject() -> None:
    boxes = np.array([[20, 30, 40, 70], [24, 30, 44, 70], [20, 40, 40, 80], [24, 40, 44, 80]])
    np.testing.assert_allclose(measure_travel(boxes), [2 / 40 * 10, 5 / 40 * 10], rtol=1e-6)
    assert not measure_travel(boxes[:1]).any()


def make_seen(identity: int, pose: str, picture: np.ndarray | None = None, x_px: float = 48) -> Seen:
    """A subject found in every frame, read right, standing as in ``picture``."""
    mask = np.ones((96, 96), bool) if picture is None else picture.min(2) < 250
    boxes = np.tile([x_px - 10, 20.0, x_px + 10, 80.0], (9, 1))
    return Seen(np.arange(9), boxes, np.repeat(mask[None], 9, 0), make_reading(encode_truth(identity, pose)))


def test_subjects_are_paired_with_those_they_fit_best() -> None:
    wanted = ((5, "walking"), (70_000, "sleeping"), (123, "waving"))
    truths, seen = [encode_truth(*each) for each in wanted], [make_seen(*each) for each in wanted]
    questions = [QUESTIONS] * 3
    assert assign(list(reversed(seen)), truths, questions) == seen
    assert assign([seen[2]], truths, questions) == [None, None, seen[2]]
    assert assign([], truths, questions) == [None, None, None]


def test_twins_are_told_apart_by_the_order_that_the_caption_gives() -> None:
    truth = encode_truth(0, "walking")
    left, right = make_seen(0, "walking", x_px=20), make_seen(0, "walking", x_px=70)
    for seen in ([left, right], [right, left]):
        assert assign(seen, [truth, truth], [("pose",)] * 2, x_px=[60, 30]) == [right, left]
    other = make_seen(0, "sleeping", x_px=10)
    assert assign([other, right], [truth], [("pose",)], x_px=[30]) == [right], "what is asked for counts more"


@pytest.mark.parametrize("num_subjects", [1, 2, 3])
def test_perfect_clips_score_one_and_shuffled_references_chance(num_subjects: int) -> None:
    cases = make_cases(30, num_subjects=num_subjects)
    clip = np.zeros((9, 96, 96, 3), np.uint8)

    seen = [[make_seen(s.identity, s.pose, x_px=s.x_px[0]) for s in case.plan.subjects] for case in cases]
    others = shuffle_references(cases)
    perfect = summarise([score_clip(case, clip, *each) for case, *each in zip(cases, seen, others, strict=True)])
    assert perfect["fidelity"] == perfect[f"fidelity_of_{num_subjects}"] == perfect["text"] == perfect["pose"] == 1
    assert all(perfect[f"fidelity_{name}"] == 1 > perfect[f"chance_{name}"] for name in HIDDEN_ATTRIBUTES)
    assert perfect["chance"] == pytest.approx(np.mean([perfect[f"chance_{name}"] for name in HIDDEN_ATTRIBUTES]), abs=1e-3)
    shuffled = summarise([score_clip(other, clip, each) for other, each in zip(others, seen, strict=True)])
    assert shuffled["fidelity"] == perfect["chance"] < 0.5
    nothing = summarise([score_clip(case, clip, []) for case in cases])
    assert nothing["fidelity"] == nothing["text"] == nothing["pose"] == 0 and "colour" not in nothing
    if num_subjects > 1:
        assert perfect["confusion"] == 0 and perfect["fate_own"] == 1 and nothing["fate_missing"] == 1


def test_text_alone_is_asked_only_for_what_it_says() -> None:
    cases = [case for case in without_references(make_cases(30, num_subjects=1)) if not case.plan.subjects[0].named]
    record = score_clip(cases[0], np.zeros((9, 96, 96, 3), np.uint8), [])
    assert record["text"] is None and record["pose"] == 0 and "fidelity" not in record


FATES = {"swap": {"swap"}, "dominance": {"own", "dominance"}, "blending": {"own", "blending"}}


@pytest.mark.parametrize("fault", ["swap", "dominance", "blending"])
def test_faults_drawn_on_purpose_have_their_name(fault: Fault) -> None:
    """With a reader that is always right: what remains is the drawing and the arithmetic."""
    cases = make_cases(12, num_subjects=2, likeness="same shape and colour")
    told_apart = [case for case in cases if len({subject.pose for subject in case.plan.subjects}) == 2]
    assert len(told_apart) > 6
    for case in told_apart:
        seen = [make_seen(subject.identity, subject.pose) for subject in recast_for(case, fault).plan.subjects]
        assert set(score_clip(case, draw_case(case, fault), seen)["fates"]) == FATES[fault]


def test_copies_of_the_picture_are_told_from_the_pose_that_was_asked_for() -> None:
    pasted, right = [], []
    for case in make_cases(12, num_subjects=1):
        subject, (picture,) = case.plan.subjects[0], case.references
        asked = render_reference(subject.identity, subject.pose, phase=0.4, yaw=subject.yaw[0])
        for shown, values in ((picture, pasted), (asked, right)):
            seen = make_seen(subject.identity, subject.pose, shown)
            values.append(score_clip(case, np.repeat(shown[None], 9, 0), [seen])["copy_paste"])
    assert min(pasted) > 0.5 and max(right) < -0.1


def test_an_interrupted_benchmark_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = make_benchmark(1)[:3]
    pipeline = RefAlignPipeline.from_pretrained(str(WEIGHTS_FOLDER / "wan"))
    pipeline.set_progress_bar_config(disable=True)
    file, options = tmp_path / "clips.jsonl", {"num_inference_steps": 1}
    judges = WEIGHTS_FOLDER / "judges"
    whole = run_benchmark(pipeline, judges, cases, file, options=options, keep=tmp_path / "strips")
    assert [record["key"] for record in whole] == [case.key for case in cases]
    assert len(list((tmp_path / "strips").glob("*.png"))) == 3
    text = file.read_text()
    file.write_text(text[:-20])
    assert run_benchmark(pipeline, judges, cases, file, options=options) == whole
    assert file.read_text() == text


def test_references_show_another_pose_than_the_scene() -> None:
    for case in make_cases(5, num_subjects=2):
        assert len(case.references) == 2 and all(picture.shape == (96, 96, 3) for picture in case.references)
        left, right = sorted(zip(case.plan.subjects, case.references, strict=True), key=lambda pair: pair[0].x_px[0])
        assert all((shown == pair[1]).all() for shown, pair in zip(case.named_references, (left, right), strict=True))
        assert all(given.pose != subject.pose for given, subject in zip(case.given, case.plan.subjects, strict=True))


def test_training_batches_are_a_function_of_the_step_and_hold_something_to_abstain_from() -> None:
    crops, travel, answers = make_batch(3, None)
    again, travel_again, same = make_batch(3, None)
    assert torch.equal(crops, again) and torch.equal(travel, travel_again)
    assert all(torch.equal(answers[name], same[name]) for name in answers)
    assert travel.shape == (len(crops), 2)
    assert crops.shape[1:] == (4, 3, CROP_PX, CROP_PX) and set(answers) == set(VOCABULARIES)
    for name, words in VOCABULARIES.items():
        assert answers[name][-1] == len(words), "the last subject is made unreadable"


def test_reader_answers_every_question_and_reads_clips_of_one_frame() -> None:
    torch.manual_seed(0)
    judge = Judge(Reader())
    readings = judge.read(np.zeros((2, 1, CROP_PX, CROP_PX, 3), np.uint8), np.zeros((2, 2), np.float32))
    assert len(readings) == 2 and set(readings[0].answers) == set(VOCABULARIES)
    for name, words in VOCABULARIES.items():
        assert readings[0].probabilities[name].shape == (len(words) + 1,)
        assert readings[0].probabilities[name].sum() == pytest.approx(1, abs=1e-5)


def test_a_missing_or_foreign_reader_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(ArtifactError, match=r"model\.safetensors: not found; python -m refalign\.toy\.train_judges"):
        Judge.load(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="not a reader of this version"):
        Judge.load(tmp_path)


def test_likeness_without_networks() -> None:
    one, turned, other = (
        render_reference(identity, pose) for identity, pose in ((11, "standing"), (11, "dancing"), (99_000, "standing"))
    )
    masks = [(picture < 250).any(2) for picture in (one, turned, other)]
    for likeness in (colour_likeness, edge_likeness):
        assert likeness(one, masks[0], one, masks[0]) == pytest.approx(1)
    assert colour_likeness(one, masks[0], turned, masks[1]) > colour_likeness(one, masks[0], other, masks[2])
