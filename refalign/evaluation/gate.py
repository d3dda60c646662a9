"""Whether a challenger may become champion: a rule on paired scores. ``benchmarks/gate.py`` measures its error rates.

Both models made videos of the same prompts at the same seeds. The challenger passes if it does not lose more fidelity than a
margin, and is better in at least one of fidelity, confusion and copy-paste.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np

from refalign.config import GateConfig
from refalign.evaluation.blind import Votes

ScoreName = Literal["fidelity", "confusion", "copy_paste"]
_BETTER_IS_HIGHER: dict[ScoreName, bool] = {"fidelity": True, "confusion": False, "copy_paste": False}
_RESAMPLES = 4999


class GateScores(TypedDict, total=False):
    """Of one prompt; None or absent where nothing was measured."""

    fidelity: float | None
    confusion: float | None
    copy_paste: float | None


Scores = Mapping[str, GateScores]


@dataclass(frozen=True)
class Comparison:
    """One score of both models over some prompts. A gain above zero is better.

    Attributes:
        low, high: one-sided 95% bounds of the gain.
        p_value: one-sided, of "no better", after Holm's correction over the scores.
    """

    score: str
    prompts: int
    champion: float
    challenger: float
    gain: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Decision:
    """What the gate says; ``reason`` is one sentence with the numbers."""

    passed: bool
    reason: str
    comparisons: tuple[Comparison, ...]
    votes: Votes | None = None


def decide(champion: Scores, challenger: Scores, rule: GateConfig, *, seed: int = 0, votes: Votes | None = None) -> Decision:
    """Applies the rule to the scores, and then to the votes if the rule asks for votes.

    Args:
        champion, challenger: by prompt. Only prompts that both have are compared.
        seed: of the resampling.
    """
    comparisons = _correct([each for name in _BETTER_IS_HIGHER if (each := compare(name, champion, challenger, seed))])
    passed, reason = _judge_scores({each.score: each for each in comparisons}, rule)
    if passed and rule.min_vote_share is not None:
        needed = f"evaluation.gate.min_vote_share={rule.min_vote_share}"
        if votes is None:
            passed, reason = False, f"undecided: no votes, and {needed} asks for them; {reason}"
        else:
            told = f"{votes.share:.3f} of the votes over {votes.prompts} prompts, 95% bound {votes.low:.3f}"
            passed = votes.low >= rule.min_vote_share
            reason = f"{reason}; {told}" if passed else f"people do not prefer it: {told}, {needed}"
    return Decision(passed, reason, comparisons, votes)


def _judge_scores(compared: Mapping[str, Comparison], rule: GateConfig) -> tuple[bool, str]:
    """Whether the challenger passes by its scores, and why."""
    fidelity = compared.get("fidelity")
    if fidelity is None or fidelity.prompts < rule.min_prompts:
        count = fidelity.prompts if fidelity else 0
        return False, f"undecided: {count} prompts compared, evaluation.gate.min_prompts={rule.min_prompts}"
    if fidelity.low <= -rule.max_fidelity_loss:
        bound = f"95% bound {fidelity.low:+.3f}, allowed {-rule.max_fidelity_loss:+.3f}"
        return False, f"fidelity may have fallen: {fidelity.gain:+.3f}, {bound}"
    better = [f"{name} {each.gain:+.3f} (p {each.p_value:.4f})" for name, each in compared.items() if each.p_value <= rule.alpha]
    if not better:
        tried = ", ".join(f"{name} {each.gain:+.3f} (p {each.p_value:.3f})" for name, each in compared.items())
        return False, f"not better than the champion: {tried}"
    return True, f"better in {', '.join(better)}; fidelity bound {fidelity.low:+.3f}"


def compare(name: ScoreName, champion: Scores, challenger: Scores, seed: int) -> Comparison | None:
    """One score over the prompts that both have; None if there are fewer than two. The p-value is not yet corrected.

    The bounds are quantiles of a bootstrap over prompts. The test flips signs of the differences; it is exact if the two
    models are exchangeable.
    """
    from scipy import stats

    both = [key for key in champion if key in challenger and champion[key].get(name) is not None is not challenger[key].get(name)]
    if len(both) < 2:
        return None
    old, new = (np.array([scores[key][name] for key in both], float) for scores in (champion, challenger))
    gains = new - old if _BETTER_IS_HIGHER[name] else old - new
    rng = np.random.default_rng([seed, len(name)])
    low, high = np.quantile(rng.choice(gains, (_RESAMPLES, len(gains))).mean(1), [0.05, 0.95])
    test = stats.permutation_test(
        (gains,), np.mean, permutation_type="samples", alternative="greater", n_resamples=_RESAMPLES, vectorized=True, rng=rng
    )
    values = (old.mean(), new.mean(), gains.mean(), low, high, test.pvalue)
    return Comparison(name, len(both), *(round(float(value), 6) for value in values))


def _correct(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Holm's step-down correction; the order of the comparisons is kept."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, each in enumerate(sorted(comparisons, key=lambda each: each.p_value)):
        highest = max(highest, min(1.0, each.p_value * (len(comparisons) - rank)))
        corrected[each.score] = highest
    return tuple(replace(each, p_value=round(corrected[each.score], 6)) for each in comparisons)
