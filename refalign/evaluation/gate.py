"""Whether a challenger may become champion: a rule on paired scores, with its error rates measured in ``benchmarks/gate.py``.

Both models made videos of the same prompts at the same seeds. The challenger passes if it does not lose fidelity by more than a
margin, and is better in at least one of fidelity, confusion and copy-paste.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from refalign.config import GateConfig
from refalign.evaluation.blind import Votes

BETTER_IS_HIGHER = {"fidelity": True, "confusion": False, "copy_paste": False}
"""Score -> direction. A score that neither model has is left out."""
_RESAMPLES = 4999

Scores = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Comparison:
    """One score, challenger less champion, signed so that above zero is better.

    Attributes:
        prompts: compared.
        p_value: of "no better", one-sided, after Holm's correction over the scores.
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
    """What the gate says.

    Attributes:
        reason: one sentence with the numbers behind it.
    """

    passed: bool
    reason: str
    comparisons: tuple[Comparison, ...]
    votes: Votes | None = None

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def decide(champion: Scores, challenger: Scores, rule: GateConfig, *, seed: int = 0, votes: Votes | None = None) -> Decision:
    """Applies the rule to the scores, and then to the votes where it asks for any.

    Args:
        champion: prompt -> scores; several seeds of one prompt are averaged before.
        challenger: likewise. Prompts that only one of the two has are not compared.
        seed: of the resampling.
        votes: what people chose, if they were asked.
    """
    decision = replace(_decide_by_scores(champion, challenger, rule, seed), votes=votes)
    if not decision.passed or rule.min_vote_share is None:
        return decision
    needed = f"evaluation.gate.min_vote_share={rule.min_vote_share}"
    if votes is None:
        return replace(decision, passed=False, reason=f"undecided: no votes, and {needed} asks for them; {decision.reason}")
    told = f"{votes.share:.3f} of the votes over {votes.prompts} prompts, 95% bound {votes.low:.3f}"
    if votes.low < rule.min_vote_share:
        return replace(decision, passed=False, reason=f"people do not prefer it: {told}, {needed}")
    return replace(decision, reason=f"{decision.reason}; {told}")


def _decide_by_scores(champion: Scores, challenger: Scores, rule: GateConfig, seed: int) -> Decision:
    comparisons = _correct([each for name in BETTER_IS_HIGHER if (each := compare(name, champion, challenger, rule, seed))])
    fidelity = next((each for each in comparisons if each.score == "fidelity"), None)
    if fidelity is None or fidelity.prompts < rule.min_prompts:
        count = fidelity.prompts if fidelity else 0
        return Decision(
            False, f"undecided: {count} prompts compared, evaluation.gate.min_prompts={rule.min_prompts}", comparisons
        )
    if fidelity.low <= -rule.max_fidelity_loss:
        bound = f"95% bound {fidelity.low:+.3f}, allowed {-rule.max_fidelity_loss:+.3f}"
        return Decision(False, f"fidelity may have fallen: {fidelity.gain:+.3f}, {bound}", comparisons)
    better = [each for each in comparisons if each.p_value <= rule.alpha]
    if not better:
        tried = ", ".join(f"{each.score} {each.gain:+.3f} (p {each.p_value:.3f})" for each in comparisons)
        return Decision(False, f"not better than the champion: {tried}", comparisons)
    gains = ", ".join(f"{each.score} {each.gain:+.3f} (p {each.p_value:.4f})" for each in better)
    return Decision(True, f"better in {gains}; fidelity bound {fidelity.low:+.3f}", comparisons)


def compare(name: str, champion: Scores, challenger: Scores, rule: GateConfig, seed: int) -> Comparison | None:
    """One score over the prompts that both have; None if there are fewer than two. The p-value is not yet corrected.

    The interval is a percentile bootstrap over prompts; ``low`` is the one-sided 95% bound, ``high`` the other. The test flips
    signs of the differences (it is exact if the two models are exchangeable).
    """
    from scipy import stats

    both = [key for key in champion if key in challenger and champion[key].get(name) is not None is not challenger[key].get(name)]
    if len(both) < 2:
        return None
    old, new = (np.array([scores[key][name] for key in both], float) for scores in (champion, challenger))
    gains = new - old if BETTER_IS_HIGHER[name] else old - new
    rng = np.random.default_rng([seed, len(name)])
    means = rng.choice(gains, (_RESAMPLES, len(gains))).mean(1)
    low, high = np.quantile(means, [0.05, 0.95])
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
