"""What the results say: settings chosen on the pilot, power, go or no-go, paired differences with intervals, a verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workshop.study import arms
from workshop.study.arms import ARMS, CENTRE, SMALLEST_WORTH, References, Settings
from workshop.study.bootstrap import Interval, count_seeds, hierarchical_bootstrap, smallest_seen
from workshop.study.results import SCORES, Result, Score, average

Values = dict[str, Any]
"""Named numbers, as the report lists them."""


@dataclass(frozen=True)
class ArmReport:
    seeds: int
    means: dict[Score, float]
    against_none: dict[Score, Interval | None]


@dataclass(frozen=True)
class Separability:
    """What the last aligned block of an arm tells apart, means over its runs."""

    block: int
    before: dict[str, float]
    after: dict[str, float]


@dataclass(frozen=True)
class Report:
    """All that the study says; ``report.json`` holds it. An interval is None with fewer than two paired seeds."""

    primary: str
    verdict: str
    difference: Interval | None
    world: Values | None
    positive_control: dict[Score, Interval | None]
    a_a: Interval | None
    stop_gradient_equals_none: dict[str, int]
    arms: dict[str, ArmReport]
    chosen: dict[str, Settings]
    swept: list[str]
    power: Values | None
    separability: dict[str, Separability]
    cost: Values


def select(results: Iterable[Result], **wanted: object) -> list[Result]:
    """The results whose job has these values."""
    return [each for each in results if all(getattr(each.job, name) == value for name, value in wanted.items())]


def choose_settings(results: Iterable[Result]) -> dict[str, Settings]:
    """For every arm of the pilot the centre, or the best setting if it is better by more than its difference's standard error.

    Differences are paired by seed and prompt, on cross-pair references, as in the primary endpoint. A smaller gain is chance.
    """
    by_arm: dict[str, dict[Settings, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in select(results, phase="pilot", references="cross_pair"):
        by_arm[result.job.arm][result.job.settings].append(result)
    chosen = {}
    for arm, runs in by_arm.items():
        gains = {settings: compare(each, runs.get(CENTRE, []), "fidelity") for settings, each in runs.items()}
        better = {settings: gain.mean for settings, gain in gains.items() if gain and gain.mean > gain.standard_error}
        chosen[arm] = max(better, key=lambda settings: better[settings], default=CENTRE)
    return chosen


def compare(treated: Sequence[Result], control: Sequence[Result], score: Score) -> Interval | None:
    """Interval of treated less control, paired by seed and prompt; None with fewer than two seeds or prompts."""
    first, second = (
        {each.job.seed: {clip.key: getattr(clip, score) for clip in each.find_clips()} for each in side}
        for side in (treated, control)
    )
    rows = [
        {
            key: value - second[seed][key]
            for key, value in first[seed].items()
            if value is not None and second[seed].get(key) is not None
        }
        for seed in sorted(first.keys() & second.keys())
    ]
    keys = sorted(set().union(*rows))
    try:
        return hierarchical_bootstrap(np.array([[row.get(key, np.nan) for key in keys] for row in rows], ndmin=2))
    except ValueError:
        return None


def check_world(none: Sequence[Result]) -> Values:
    """Go or no-go: whether the arm without alignment leaves room for a difference."""
    clips = [clip for result in none for clip in result.find_clips()]
    fidelity, chance, confusion = (average(clips, name) for name in ("fidelity", "chance", "confusion"))
    least, most = arms.CONFUSION_BETWEEN
    goes = arms.FIDELITY_ABOVE_CHANCE * chance <= fidelity <= arms.FIDELITY_BELOW and least <= confusion <= most
    return {"go": goes, "fidelity": fidelity, "chance": chance, "confusion": confusion, "runs": len(none)}


def estimate_power(pilot: Sequence[Result]) -> Values | None:
    """Seeds that the primary comparison needs to see `SMALLEST_WORTH`, with as many prompts as the pilot has.

    More prompts make the deviation of one seed smaller, down to ``deviation_between_seeds`` at best.
    """
    settings = {each.job.settings for each in pilot}
    intervals = [
        compare(*(select(pilot, arm=arm, settings=each) for arm in ("ra", "none")), "fidelity")
        for each in sorted(settings, key=lambda each: each.name)
    ]
    known = [each for each in intervals if each is not None]
    if not known:
        return None
    deviation = float(np.sqrt(np.mean([each.deviation_of_one_seed**2 for each in known])))
    return {
        "deviation_of_one_seed": deviation,
        "deviation_between_seeds": float(np.sqrt(np.mean([each.between_seeds**2 for each in known]))),
        "prompts": known[0].prompts,
        "effect": SMALLEST_WORTH,
        "seeds_wanted": count_seeds(SMALLEST_WORTH, deviation),
        "seen_by_8_seeds": smallest_seen(8) * deviation,
    }


def analyse(results: Sequence[Result]) -> Report:
    """All that the report says."""
    main, pilot = select(results, phase="main"), select(results, phase="pilot")

    def arm(name: str, references: References = "cross_pair") -> list[Result]:
        return select(main, arm=name, references=references)

    def told(treated: list[Result], control: list[Result], score: Score = "fidelity") -> Interval | None:
        interval = compare(treated, control, score)
        return Interval(**{name: round(value, 5) for name, value in asdict(interval).items()}) if interval else None

    reports = {}
    for references in ("cross_pair", "in_pair"):
        for name in ARMS:
            if runs := arm(name, references):
                clips = [clip for run in runs for clip in run.find_clips()]
                none = arm("none", references)
                against = {} if name == "none" else {score: told(runs, none, score) for score in SCORES}
                means = {score: average(clips, score) for score in SCORES}
                reports[f"{name}/{references}"] = ArmReport(len(runs), means, against)
    none = arm("none")
    digests = {each.job.seed: each.transformer_sha256 for each in none}
    stopped = [each.transformer_sha256 == digests[each.job.seed] for each in arm("stop_gradient") if each.job.seed in digests]
    primary, world = compare(arm("ra"), none, "fidelity"), check_world(none) if none else None
    return Report(
        primary=arms.PRIMARY,
        verdict=give_verdict(primary, world),
        difference=told(arm("ra"), none),
        world=world,
        positive_control={name: told(none, arm("none", "in_pair"), name) for name in ("fidelity", "copy_paste")},
        a_a=told(arm("none_again"), none),
        stop_gradient_equals_none={"pairs": len(stopped), "equal": sum(stopped)},
        arms=reports,
        chosen=choose_settings(results),
        swept=sorted({each.job.settings.name for each in pilot}),
        power=estimate_power(select(pilot, references="cross_pair")),
        separability=measure_separability(main),
        cost=count_cost(results),
    )


def give_verdict(primary: Interval | None, world: Values | None) -> str:
    """One sentence with the numbers it stands on."""
    if primary is None or world is None:
        return "Nothing is decided: fewer than two paired seeds of RA and none."
    told = f"{primary} over {primary.seeds} seeds and {primary.prompts} prompts"
    if not world["go"]:
        return (
            f"No-go: without alignment fidelity is {world['fidelity']:.3f} (chance {world['chance']:.3f}) and confusion "
            f"{world['confusion']:.3f}, so the world or the budget is wrong and the difference {told} says nothing. It takes a "
            f"start or a budget with which none reaches fidelity {arms.FIDELITY_ABOVE_CHANCE * world['chance']:.2f} to "
            f"{arms.FIDELITY_BELOW} at confusion {arms.CONFUSION_BETWEEN[0]} to {arms.CONFUSION_BETWEEN[1]}."
        )
    if primary.covers_zero:
        wanted = count_seeds(SMALLEST_WORTH, primary.deviation_of_one_seed)
        takes = f"{wanted} seeds of as many prompts" if wanted else "more prompts, and more seeds than two hundred,"
        return (
            f"Undecided: the difference in unspoken fidelity is {told}, which covers zero. To see one of {SMALLEST_WORTH}, "
            f"{takes} would be needed."
        )
    return f"RA {'helps' if primary.mean > 0 else 'harms'}: the difference in unspoken fidelity is {told}."


def measure_separability(results: Sequence[Result]) -> dict[str, Separability]:
    """Arm -> what its last aligned block tells apart."""
    told = {}
    for name in ARMS:
        if runs := [each for each in select(results, arm=name) if each.separability]:
            block = runs[0].objective["alignment_blocks"] - 1
            sides = ([run.separability[side][block] for run in runs] for side in ("before", "after"))
            means = ({key: float(np.mean([each[key] for each in blocks])) for key in blocks[0]} for blocks in sides)
            told[name] = Separability(block, *means)
    return told


def count_cost(results: Sequence[Result]) -> Values:
    """Hours spent, and seconds per step and clip."""
    if not results:
        return {}
    costs = [result.costs for result in results]
    return {
        "runs": len(results),
        "hours": sum(cost["train_s"] + cost["evaluate_s"] for cost in costs) / 3600,
        "step_s": float(np.median([result.step_s for result in results])),
        "clip_s": sum(cost["evaluate_s"] for cost in costs) / max(1, sum(cost["clips"] for cost in costs)),
    }
