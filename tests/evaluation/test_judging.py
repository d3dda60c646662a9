"""Judges: named in the settings, loaded by that name, and what their verdicts come to."""

import numpy as np
import pytest

from refalign.config import apply_overrides
from refalign.config.presets import PRESETS, toy
from refalign.errors import ConfigError
from refalign.evaluation.judging import load_judge, parse_verdict, share_right
from refalign.stages.evaluate import Evaluate, EvaluateManifest
from refalign.toy.verdict import judge_video


def make_verdict(*subjects):
    """One entry per subject; a subject is attribute -> (wanted, shown)."""
    verdict = []
    for place, answers in enumerate(subjects):
        attributes = {name: {"wanted": wanted, "shown": shown} for name, (wanted, shown) in answers.items()}
        verdict.append({"name": f"number {place}", "attributes": attributes})
    return parse_verdict(verdict)


VERDICT = make_verdict({"shape": ("round", "round"), "eyes": ("one", "two")}, {"shape": ("square", None), "eyes": ("two", "two")})


def test_every_answer_is_right_or_wrong_and_what_cannot_be_told_is_wrong():
    alone = [
        share_right([subject.model_copy(update={"attributes": {name: answer}})])
        for subject in VERDICT
        for name, answer in subject.attributes.items()
    ]
    assert alone == [True, False, False, True]


@pytest.mark.parametrize("returned", ["all fine", [{"name": "a"}], [{"name": "a", "attributes": {"eyes": {"wanted": "one"}}}]])
def test_what_is_no_verdict_is_one_line(returned):
    with pytest.raises(ConfigError, match=r"^evaluation\.judge: the function returned no verdict") as caught:
        parse_verdict(returned)
    assert "\n" not in str(caught.value)


def test_the_share_right_is_over_all_attributes_of_all_subjects():
    assert share_right(VERDICT) == 0.5
    assert share_right(make_verdict({"shape": ("round", "round")}, {"shape": ("a", "b"), "eyes": ("a", "b")})) == 0.333333
    assert share_right(make_verdict({"shape": ("round", "round")})) == 1
    assert share_right(make_verdict({"shape": ("round", None)})) == 0


@pytest.mark.parametrize("verdict", [None, [], make_verdict({})])
def test_where_nothing_was_asked_there_is_no_share(verdict):
    assert share_right(verdict) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("refalign.no_such_module:judge", "No module named 'refalign.no_such_module'"),
        ("refalign.toy.verdict:no_such_judge", "no attribute 'no_such_judge'"),
    ],
)
def test_a_judge_that_is_not_there_is_one_line_with_its_name(name, reason):
    with pytest.raises(ConfigError, match=f"^evaluation.judge={name}: .*{reason}; .*module:function") as caught:
        load_judge(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["judge_video", "refalign.toy.verdict:", ":judge_video", "os.system(1):f", "a:b:c", "a/b.py:f"])
def test_a_name_that_is_no_module_and_function_is_refused_in_the_settings(name):
    with pytest.raises(ConfigError, match="evaluation.judge"):
        apply_overrides(toy(), [f"evaluation.judge={name}"])


def test_a_run_may_have_no_judge():
    assert apply_overrides(toy(), ["evaluation.judge=null"]).evaluation.judge is None


@pytest.mark.parametrize("name", PRESETS)
def test_the_toy_presets_name_their_worlds_judge_and_others_none(name):
    judge = PRESETS[name]().evaluation.judge
    if not name.startswith("toy"):
        assert judge is None
        return
    assert judge and load_judge(judge) is judge_video
    nothing = np.zeros((9, 48, 80, 3), np.uint8)
    assert load_judge(judge)(nothing, "a red ball", [nothing[0]]) is None, "not its world"


def test_the_steps_line_says_how_much_is_right_where_both_models_were_judged():
    def say(before, after):
        return Evaluate().describe(EvaluateManifest.model_construct(num_samples=8, scores={"before": before, "after": after}))

    assert say({"judged": 0.456}, {"judged": 0.784}) == "8 sample videos; attributes right: 46% before training, 78% after"
    for before, after in (({"fidelity": 0.5}, {"fidelity": 0.6}), ({"judged": 0.5}, {}), ({}, {"judged": 0.5}), ({}, {})):
        assert say(before, after) == "8 sample videos"
