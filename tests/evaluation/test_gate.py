"""The gate's rule: non-inferior in fidelity, better in something, corrected for looking thrice."""

import numpy as np
import pytest

from refalign.config import GateConfig
from refalign.evaluation.gate import compare, decide


def make(rng, effects, prompts=200, noise=0.1):
    means = {"fidelity": 0.6, "confusion": 0.3, "copy_paste": -0.2}
    easy = rng.normal(0, 0.2, prompts)
    return {
        str(number): {name: mean + effects.get(name, 0.0) + easy[number] + rng.normal(0, noise) for name, mean in means.items()}
        for number in range(prompts)
    }


def pair(effects, **options):
    champion = make(np.random.default_rng(1), {}, **options)
    challenger = make(np.random.default_rng(1), effects, **options)
    rng = np.random.default_rng(2)
    noisy = {key: {name: value + rng.normal(0, 0.1) for name, value in scores.items()} for key, scores in challenger.items()}
    return champion, noisy


@pytest.mark.parametrize(
    ("effects", "passed", "said"),
    [
        ({"fidelity": 0.1}, True, "fidelity"),
        ({"confusion": -0.1}, True, "confusion"),
        ({"copy_paste": -0.1}, True, "copy_paste"),
        ({}, False, "not better"),
        ({"confusion": 0.1}, False, "not better"),
        ({"fidelity": -0.1, "confusion": -0.2}, False, "may have fallen"),
    ],
)
def test_the_rule(effects, passed, said):
    decision = decide(*pair(effects), GateConfig())
    assert decision.passed is passed and said in decision.reason, decision.reason


def test_too_few_prompts_decide_nothing_and_only_common_ones_count():
    champion, challenger = pair({"fidelity": 0.3}, prompts=40)
    few = {key: challenger[key] for key in list(challenger)[:10]}
    decision = decide(champion, few, GateConfig())
    assert not decision.passed and decision.reason.startswith("undecided: 10 prompts")
    assert decide(champion, {}, GateConfig()).reason.startswith("undecided: 0 prompts")
    assert decide(champion, challenger, GateConfig()).comparisons[0].prompts == 40


def test_a_score_that_was_not_measured_is_left_out():
    champion, challenger = pair({"fidelity": 0.2})
    for scores in (*champion.values(), *challenger.values()):
        scores["copy_paste"] = None
    assert [each.score for each in decide(champion, challenger, GateConfig()).comparisons] == ["fidelity", "confusion"]


def test_holm_multiplies_the_smallest_p_by_the_number_of_scores():
    champion, challenger = pair({"fidelity": 0.012, "confusion": 0.05, "copy_paste": 0.05})
    corrected = {each.score: each.p_value for each in decide(champion, challenger, GateConfig()).comparisons}
    raw = compare("fidelity", champion, challenger, 0)
    assert 0.0 < raw.p_value < 0.3
    assert corrected["fidelity"] == pytest.approx(min(1, 3 * raw.p_value), abs=1e-6)
    assert corrected["confusion"] == corrected["copy_paste"] == 1.0


def test_a_decision_is_repeatable_and_its_interval_holds_the_gain():
    champion, challenger = pair({"fidelity": 0.05})
    first, again = (decide(champion, challenger, GateConfig()) for _ in range(2))
    assert first == again
    assert first.comparisons[0].low < first.comparisons[0].gain < first.comparisons[0].high
    assert first.comparisons[0].gain == pytest.approx(0.05, abs=0.03)
