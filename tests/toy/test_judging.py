"""The judge reads what was drawn, names what was drawn wrong, and says nothing where nothing is to be seen."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from toy_models import EXPECTED_FATES

from refalign.toy.identities import ATTRIBUTE_NAMES, HIDDEN_ATTRIBUTES, LIKENESSES, SPOKEN_ATTRIBUTES, attributes_of, split_of
from refalign.toy.judge import is_occupied, read_clip, read_reference
from refalign.toy.scenes import PLACES, SIDES, Place, paint_place
from refalign.toy.verdict import judge_video
from workshop.judging.benchmark import OPTIONS, run_benchmark, score_clip, summarise
from workshop.judging.cases import (
    FAULTS,
    Case,
    Fault,
    draw_case,
    exchange_references,
    make_benchmark,
    make_cases,
    shuffle_references,
    without_references,
)

CASES = make_benchmark(1, split="judges")
ALONE, PAIR, TRIO = (next(case for case in CASES if len(case.plan.subjects) == size) for size in (1, 2, 3))


def read(case: Case, clip: np.ndarray) -> list[dict[str, str | None] | None]:
    """The answers of each subject's slot."""
    seen = read_clip(clip, {subject.side: [subject.identity] for subject in case.plan.subjects})
    return [reading and reading.answers for reading in (seen[subject.side] for subject in case.plan.subjects)]


def truth(case: Case) -> list[dict[str, Any]]:
    return [asdict(attributes_of(subject.identity)) | {"action": subject.action} for subject in case.plan.subjects]


@pytest.mark.parametrize("case", [case for case in CASES if len(case.plan.subjects) < 3], ids=lambda case: case.key)
def test_clips_drawn_right_are_read_right_in_everything(case):
    record = score_clip(case, draw_case(case, "truth"))
    assert all(all(right.values()) and set(right) == {*ATTRIBUTE_NAMES, "action"} for right in record["right"]), record
    assert set(record["fates"]) == {"own"} and max(record["copy_paste"]) < 0 and record["extra"] == 0


@pytest.mark.parametrize(("fault", "likeness"), zip(FAULTS[1:], [*LIKENESSES, None], strict=True))
def test_clips_drawn_wrong_have_their_fault_named(fault: Fault, likeness):
    """Two exchanged, one twice, one mixed; and pasted references, which look right and do the wrong thing."""
    (case,) = make_cases(1, num_subjects=2, likeness=likeness, split="judges")
    record = score_clip(case, draw_case(case, fault))
    assert record["fates"] == EXPECTED_FATES.get(fault, ["own", "own"]), record["shown"]
    assert all(right[name] for right in record["right"] for name in SPOKEN_ATTRIBUTES)
    assert [right["action"] for right in record["right"]] == [fault != "paste"] * 2
    assert min(record["copy_paste"]) > 0 or fault != "paste"


def test_whoever_is_named_first_the_search_finds_who_is_there():
    strangers = [subject.identity for subject in TRIO.plan.subjects]
    side = ALONE.plan.subjects[0].side
    for cast in ([], strangers):
        reading = read_clip(draw_case(ALONE, "truth"), {side: cast})[side]
        assert reading and [reading.answers] == truth(ALONE)


def test_one_of_three_neighbours_is_read_too():
    side = TRIO.plan.subjects[0].side
    reading = read_clip(draw_case(TRIO, "truth"), {side: [TRIO.plan.subjects[0].identity]})[side]
    assert reading and reading.answers == truth(TRIO)[0]


def test_nobody_is_seen_in_empty_places_and_ruined_clips():
    empty = np.repeat(paint_place(ALONE.plan).round().astype(np.uint8)[None], 9, 0)
    ruined = np.random.default_rng(0).integers(0, 256, empty.shape, dtype=np.uint8)
    assert read(ALONE, empty) == read(ALONE, ruined) == [None]
    assert not any(is_occupied(empty, side) for side in SIDES)


def test_a_little_noise_or_blur_changes_nothing_and_much_of_it_is_not_guessed_at():
    rng, clip = np.random.default_rng(0), draw_case(ALONE, "truth")

    def disturb(noise: float, blur: float) -> np.ndarray:
        soft = np.stack([np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(blur))) for frame in clip])
        return (soft + rng.normal(0, noise, soft.shape)).clip(0, 255).astype(np.uint8)

    for noise, blur in ((10, 0), (0, 0.7)):
        assert read(ALONE, disturb(noise, blur)) == truth(ALONE), (noise, blur)
    for noise, blur in ((30, 0), (0, 1.5), (120, 0), (0, 4)):
        for answers, wanted in zip(read(ALONE, disturb(noise, blur)), truth(ALONE), strict=True):
            wrong = sum(value is not None and value != wanted[name] for name, value in (answers or {}).items())
            assert wrong <= 3, (noise, blur, answers)


def test_the_slots_where_somebody_stands_are_counted():
    for place, case in zip(get_args(Place), make_cases(2, num_subjects=2) + make_cases(3, num_subjects=1), strict=True):
        clip = draw_case(replace(case, plan=replace(case.plan, place=place)), "truth")
        filled = {subject.side for subject in case.plan.subjects}
        assert {side for side in SIDES if is_occupied(clip, side)} == filled, place
    assert all(is_occupied(draw_case(TRIO, "truth"), side) for side in SIDES) and set(get_args(Place)) == set(PLACES)


def test_references_are_read_without_knowing_whose_they_are():
    for case in (ALONE, PAIR):
        for subject, pose, picture in zip(case.plan.subjects, case.given, case.references, strict=True):
            reading = read_reference(picture)
            assert reading and reading.look == attributes_of(subject.identity) and reading.answers["action"] == pose.action


def test_a_verdict_on_a_perfect_clip_has_everything_as_wanted():
    verdict = judge_video(draw_case(PAIR, "truth"), PAIR.prompt, PAIR.references)
    assert verdict and [each["name"] for each in verdict] == [subject.side for subject in PAIR.plan.subjects]
    for each, wanted in zip(verdict, truth(PAIR), strict=True):
        assert each["attributes"] == {name: {"wanted": value, "shown": value} for name, value in wanted.items()}
    assert judge_video(draw_case(PAIR, "truth"), "A zebra sleeps.", PAIR.references) is None


def test_cases_ask_for_another_action_than_their_references_show():
    for case in CASES:
        assert all(given.action != subject.action for given, subject in zip(case.given, case.plan.subjects, strict=True))
        assert len(case.references) == len(case.plan.subjects)
        assert all(split_of(subject.identity) == "judges" for subject in case.plan.subjects)
    assert len({case.key for case in CASES}) == len(CASES) == 8
    for case in without_references(CASES):
        assert not case.references and all(subject.named for subject in case.plan.subjects)


@pytest.mark.parametrize("change", [shuffle_references, exchange_references])
def test_other_references_keep_what_is_spoken_and_done(change):
    cases = [case for case in CASES if len(case.plan.subjects) > 1]
    for case, other in zip(cases, change(cases), strict=True):
        assert case.prompt == other.prompt and case.given == other.given
        for mine, theirs in zip(case.plan.subjects, other.plan.subjects, strict=True):
            assert replace(theirs, identity=mine.identity) == mine
            one, two = attributes_of(mine.identity), attributes_of(theirs.identity)
            assert all(getattr(one, name) == getattr(two, name) for name in SPOKEN_ATTRIBUTES)
        assert case.plan != other.plan
    assert not exchange_references([ALONE])


def test_a_summary_is_the_mean_over_subjects():
    right = dict.fromkeys((*ATTRIBUTE_NAMES, "action"), True)
    wrong = dict.fromkeys(right, False)
    two = {
        "subjects": 2, "likeness": "unlike", "named": [True, False], "shown": [{}, None], "right": [right, wrong],
        "extra": 0, "fates": ["swap", "missing"], "copy_paste": [-1.0, None],
        "chance": [wrong, wrong],
    }  # fmt: skip
    one = {"subjects": 1, "likeness": None, "named": [True], "shown": [{"eyes": "one"}], "right": [right], "extra": 0}
    figures = summarise([two, one])
    assert figures["clips"] == 2 and figures["found"] == figures["action"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["spoken"] == figures["spoken of 2"] == 1 and figures["shape"] == 1
    assert figures["fidelity"] == figures["fidelity of 2"] == figures["fidelity, unlike"] == 0.5 and figures["chance"] == 0
    assert all(figures[f"fidelity {name}"] == 0.5 for name in HIDDEN_ATTRIBUTES) and "fidelity of 1" not in figures
    assert figures["number"] == 0.5 and figures["copy_paste"] == -1
    assert figures["confusion"] == figures["fate swap"] == figures["fate missing, unlike"] == 0.5 and figures["fate own"] == 0


class Drawer:
    """A pipeline that draws what it is asked for."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases, self.asked = {case.prompt: case for case in cases}, []

    def __call__(self, prompts, references, *, height, width, num_frames, generator, output_type, **options) -> Any:
        assert (height, width, num_frames, output_type) == (48, 80, 9, "uint8")
        assert options == OPTIONS | {"num_inference_steps": 1}
        for prompt, pictures, each in zip(prompts, references, generator, strict=True):
            case = self.cases[prompt]
            assert np.array_equal(pictures, case.references) and each.initial_seed() == case.seed
        self.asked += prompts
        return SimpleNamespace(frames=torch.from_numpy(np.stack([draw_case(self.cases[prompt], "truth") for prompt in prompts])))


def test_an_interrupted_benchmark_goes_on_after_its_last_whole_line(tmp_path: Path):
    cases = [*make_cases(2, num_subjects=1), PAIR]
    file, options = tmp_path / "made" / "clips.jsonl", {"num_inference_steps": 1}
    first, second = Drawer(cases), Drawer(cases)
    whole = run_benchmark(first, cases, file, options=options, keep=tmp_path / "strips")
    assert [record["key"] for record in whole] == [case.key for case in cases] and len(first.asked) == 3
    assert len(list((tmp_path / "strips").glob("*.png"))) == 3
    assert summarise(whole)["fidelity"] == 1 > summarise(whole)["chance"]
    text = file.read_text()
    file.write_text(text[:-20])
    assert run_benchmark(second, cases, file, options=options) == whole
    assert second.asked == [PAIR.prompt] and file.read_text() == text
