"""What the study's JSONs say: settings chosen on the pilot, power, go or no-go, paired differences with intervals, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from workshop.study.arms import (
    ARMS,
    CENTRE,
    CONFUSION_BETWEEN,
    FIDELITY_ABOVE_CHANCE,
    FIDELITY_BELOW,
    PRIMARY,
    SMALLEST_WORTH,
    Settings,
)
from workshop.study.bootstrap import Interval, count_seeds, hierarchical_bootstrap, smallest_seen
from workshop.study.results import SCORES, Result, average, find_clips


def settings_of(result: Result) -> Settings:
    return Settings(**result["job"]["settings"])


def choose_settings(results: Iterable[Result]) -> dict[str, Settings]:
    """For every arm of the pilot the centre, or what lies furthest above it: by more than the standard error of the difference.

    Paired by seed and prompt, on cross-pair references, which the primary endpoint is about. What is better by less is chance,
    and arms would be compared at settings that chance dealt them.
    """
    by_arm: dict[str, dict[Settings, list[Result]]] = {}
    for result in _select_pilot(results):
        by_arm.setdefault(result["job"]["arm"], {}).setdefault(settings_of(result), []).append(result)
    chosen = {}
    for arm, runs in by_arm.items():
        gains = {settings: compare(each, runs.get(CENTRE, []), "fidelity") for settings, each in runs.items()}
        better = {settings: gain.mean for settings, gain in gains.items() if gain and gain.mean > gain.standard_error}
        chosen[arm] = max(better, key=lambda settings: better[settings], default=CENTRE)
    return chosen


def _select_pilot(results: Iterable[Result]) -> list[Result]:
    return [each for each in results if (each["job"]["phase"], each["job"]["references"]) == ("pilot", "cross_pair")]


def pair(treated: Sequence[Result], control: Sequence[Result], score: str) -> np.ndarray | None:
    """Treated less control, [S, P], over the seeds and prompts that both have; None for fewer than two seeds."""
    by_seed = [{each["job"]["seed"]: find_clips(each) for each in side} for side in (treated, control)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if len(seeds) < 2:
        return None
    rows = []
    for seed in seeds:
        first, second = ({clip["key"]: clip[score] for clip in side[seed]} for side in by_seed)
        rows.append({key: first[key] - second[key] for key in first if first[key] is not None and second.get(key) is not None})
    keys = sorted(set().union(*rows))
    return np.array([[row.get(key, np.nan) for key in keys] for row in rows])


def compare(treated: Sequence[Result], control: Sequence[Result], score: str) -> Interval | None:
    """Interval of a paired difference; None where too little is there."""
    gains = pair(treated, control, score)
    try:
        return None if gains is None else hierarchical_bootstrap(gains)
    except ValueError:
        return None


def check_world(none: Sequence[Result]) -> dict[str, Any]:
    """Go or no-go, on the arm without alignment."""
    clips = [clip for result in none for clip in find_clips(result)]
    fidelity, chance, confusion = (average(clips, name) for name in ("fidelity", "chance", "confusion"))
    goes = (
        FIDELITY_ABOVE_CHANCE * chance <= fidelity <= FIDELITY_BELOW and CONFUSION_BETWEEN[0] <= confusion <= CONFUSION_BETWEEN[1]
    )
    return {"go": bool(goes), "fidelity": fidelity, "chance": chance, "confusion": confusion, "runs": len(none)}


def estimate_power(results: Sequence[Result]) -> dict[str, Any] | None:
    """Seeds that the primary comparison needs for `SMALLEST_WORTH`, with as many prompts as the pilot has.

    More prompts make the deviation of one seed smaller, down to ``deviation_between_seeds`` at best.
    """
    sides = {arm: [each for each in results if each["job"]["arm"] == arm] for arm in ("ra", "none")}
    common = {settings_of(each) for each in sides["ra"]} & {settings_of(each) for each in sides["none"]}
    intervals = [
        compare(*([each for each in sides[arm] if settings_of(each) == settings] for arm in ("ra", "none")), "fidelity")
        for settings in sorted(common, key=lambda each: each.name)
    ]
    known = [each for each in intervals if each is not None]
    if not known:
        return None
    deviation = float(np.sqrt(np.mean([_deviation_of_one_seed(each) ** 2 for each in known])))
    return {
        "deviation_of_one_seed": deviation,
        "deviation_between_seeds": float(np.sqrt(np.mean([each.between_seeds**2 for each in known]))),
        "prompts": known[0].prompts,
        "effect": SMALLEST_WORTH,
        "seeds_wanted": count_seeds(SMALLEST_WORTH, deviation),
        "seen_by_8_seeds": smallest_seen(8) * deviation,
    }


def _deviation_of_one_seed(interval: Interval) -> float:
    """What the interval's standard error amounts to for one seed: seeds differ, and so do prompts and clips."""
    return interval.standard_error * interval.seeds**0.5


def analyse(results: Sequence[Result]) -> dict[str, Any]:
    """All that the report says, as plain values."""
    main = [result for result in results if result["job"]["phase"] == "main"]

    def arm(name: str, references: str = "cross_pair") -> list[Result]:
        return [each for each in main if (each["job"]["arm"], each["job"]["references"]) == (name, references)]

    arms = {}
    for references in ("cross_pair", "in_pair"):
        for name in ARMS:
            if runs := arm(name, references):
                clips = [clip for run in runs for clip in find_clips(run)]
                arms[f"{name}/{references}"] = {
                    "seeds": len(runs),
                    "means": {score: average(clips, score) for score in SCORES},
                    "against_none": {
                        score: _plain(compare(runs, arm("none", references), score)) for score in SCORES if name != "none"
                    },
                }
    seeds = {each["job"]["seed"]: each["transformer_sha256"] for each in arm("none")}
    stopped = [
        each["transformer_sha256"] == seeds[each["job"]["seed"]] for each in arm("stop_gradient") if each["job"]["seed"] in seeds
    ]
    primary = compare(arm("ra"), arm("none"), "fidelity")
    world = check_world(arm("none")) if arm("none") else None
    return {
        "primary": PRIMARY,
        "verdict": give_verdict(primary, world),
        "difference": _plain(primary),
        "world": world,
        "positive_control": {
            name: _plain(compare(arm("none"), arm("none", "in_pair"), name)) for name in ("fidelity", "copy_paste")
        },
        "a_a": _plain(compare(arm("none_again"), arm("none"), "fidelity")),
        "stop_gradient_equals_none": {"pairs": len(stopped), "equal": sum(stopped)},
        "arms": arms,
        "chosen": {name: asdict(settings) for name, settings in choose_settings(results).items()},
        "swept": sorted({settings_of(each).name for each in results if each["job"]["phase"] == "pilot"}),
        "power": estimate_power(_select_pilot(results)),
        "separability": measure_separability(main),
        "cost": count_cost(results),
    }


def give_verdict(primary: Interval | None, world: dict[str, Any] | None) -> str:
    """One sentence that a reader can rely on, whatever it says."""
    if primary is None or world is None:
        return "Nothing is decided: fewer than two paired seeds of RA and none."
    told = (
        f"{primary.mean:+.3f} [{primary.low:+.3f}, {primary.high:+.3f}] over {primary.seeds} seeds and {primary.prompts} prompts"
    )
    if not world["go"]:
        return (
            f"No-go: without alignment fidelity is {world['fidelity']:.3f} (chance {world['chance']:.3f}) and confusion "
            f"{world['confusion']:.3f}, so the world or the budget is wrong and the difference {told} says nothing. It takes a "
            f"start or a budget with which none reaches fidelity {FIDELITY_ABOVE_CHANCE * world['chance']:.2f} to "
            f"{FIDELITY_BELOW} at confusion {CONFUSION_BETWEEN[0]} to {CONFUSION_BETWEEN[1]}."
        )
    if primary.covers_zero:
        wanted = count_seeds(SMALLEST_WORTH, _deviation_of_one_seed(primary))
        takes = f"{wanted} seeds of as many prompts" if wanted else "more prompts, and more seeds than two hundred,"
        return (
            f"Undecided: the difference in unspoken fidelity is {told}, which covers zero. To see one of {SMALLEST_WORTH}, "
            f"{takes} would be needed."
        )
    return f"RA {'helps' if primary.mean > 0 else 'harms'}: the difference in unspoken fidelity is {told}."


def measure_separability(results: Sequence[Result]) -> dict[str, Any]:
    """Mean over runs of each arm of what the last aligned block tells apart, before and after."""
    told: dict[str, Any] = {}
    for name in ARMS:
        runs = [each for each in results if each["job"]["arm"] == name and each.get("separability")]
        if runs:
            block = runs[0]["objective"]["alignment_blocks"] - 1
            sides = {side: [run["separability"][side][block] for run in runs] for side in ("before", "after")}
            told[name] = {"block": block} | {
                side: {key: float(np.mean([each[key] for each in blocks])) for key in blocks[0]} for side, blocks in sides.items()
            }
    return told


def count_cost(results: Sequence[Result]) -> dict[str, float]:
    """Hours spent, and seconds per step and clip."""
    if not results:
        return {}
    costs = [result["costs"] for result in results]
    return {
        "runs": len(results),
        "hours": sum(cost["train_s"] + cost["evaluate_s"] for cost in costs) / 3600,
        "step_s": float(np.median([result["step_s"] for result in results])),
        "clip_s": sum(cost["evaluate_s"] for cost in costs) / max(1, sum(cost["clips"] for cost in costs)),
    }


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else {name: round(value, 5) for name, value in asdict(interval).items()}
