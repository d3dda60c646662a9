"""The study's report as text and picture."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recording import describe_machine
from workshop.study.arms import ARMS, SMALLEST_WORTH
from workshop.study.report import analyse
from workshop.study.results import Result, average, find_clips

_SCORES = ("fidelity", "confusion", "copy_paste", "action", "text")


def write_report(results: list[Result], output: Path, command: str, not_run: dict[str, str] | None = None) -> str:
    """Writes ``report.md``, ``report.json`` and ``report.png``; returns the verdict.

    Args:
        not_run: arm -> why there is nothing of it.
    """
    from refalign.io.writing import write_bytes, write_json

    told = analyse(results)
    about = {"command": command.splitlines(), "date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}
    write_json(output / "report.json", told | about)
    write_bytes(output / "report.md", make_text(told, command, not_run or {}).encode())
    draw(results, told, output / "report.png")
    return told["verdict"]


def make_text(told: dict[str, Any], command: str, not_run: dict[str, str]) -> str:
    """Markdown: the verdict first, then what it stands on."""
    lines = [f"# Does reference alignment help?\n\n**{told['verdict']}**\n\nPrimary endpoint, written before the main runs: "]
    lines[0] += f"{told['primary']}\n"
    lines.append("| arm | references | seeds | " + " | ".join(_SCORES) + " |\n|---|---|---|" + "---|" * len(_SCORES))
    for name, arm in told["arms"].items():
        cells = [_cell(arm["means"][score], arm["against_none"].get(score)) for score in _SCORES]
        lines.append(f"| {name.replace('/', ' | ')} | {arm['seeds']} | {' | '.join(cells)} |")
    lines.append(
        "\nBelow each mean: the paired difference to `none` with its 95% interval. Arms that are not listed were not run.\n"
    )
    lines += [f"- {arm} was not run: {reason}" for arm, reason in not_run.items() if f"{arm}/cross_pair" not in told["arms"]]
    lines.append("\n## Controls\n")
    lines.append(f"- Go or no-go: {_values(told['world'])}")
    lines.append(f"- A/A (none against none with other seeds), fidelity: {_interval(told['a_a'])}")
    for score, each in told["positive_control"].items():
        lines.append(f"- Positive control, cross-pair less in-pair references, {score}: {_interval(each)}")
    stopped = told["stop_gradient_equals_none"]
    lines.append(
        f"- Stop-gradient: the Transformer equals that of none, bit for bit, in {stopped['equal']} of {stopped['pairs']} seeds"
    )
    if told["power"]:
        lines.append(f"- Power, from the pilot, for a difference of {SMALLEST_WORTH}: {_values(told['power'])}")
    lines.append("\n## Separability of subjects in the Transformer's own reference tokens (last aligned block)\n")
    lines.append("| arm | block | retrieval before, after (chance) | gap | silhouette |\n|---|---|---|---|---|")
    for name, each in told["separability"].items():
        pairs = [f"{each['before'][key]:.3f}, {each['after'][key]:.3f}" for key in ("retrieval", "gap", "silhouette")]
        lines.append(f"| {name} | {each['block']} | {pairs[0]} ({each['after']['chance']:.3f}) | {pairs[1]} | {pairs[2]} |")
    lines.append(f"\n## Settings and cost\n\nSwept: {', '.join(told['swept']) or 'nothing'}.\n")
    lines += [f"- {name}: {_values(settings)}" for name, settings in told["chosen"].items()]
    lines.append(f"- Cost: {_values(told['cost'])}\n\n```\n{command}\n```\n\n![differences, guidance, steps](report.png)")
    return "\n".join(lines) + "\n"


def draw(results: list[Result], told: dict[str, Any], path: Path) -> None:
    """Differences to none; fidelity against action over guidance; fidelity over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    forest, curve, steps = figure.subplots(1, 3)
    rows = [(name, arm["against_none"].get("fidelity")) for name, arm in told["arms"].items()]
    rows = [(name, each) for name, each in rows if each]
    for place, (_, each) in enumerate(rows):
        forest.errorbar(
            each["mean"], -place, xerr=[[each["mean"] - each["low"]], [each["high"] - each["mean"]]], fmt="o", color="C0"
        )
    forest.axvline(0, color="grey", linewidth=1)
    forest.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows], fontsize=8)
    forest.set_title("unspoken fidelity less that of none, 95%", fontsize=9)
    main = [each for each in results if (each["job"]["phase"], each["job"]["references"]) == ("main", "cross_pair")]
    for number, name in enumerate(ARMS):
        runs = [each for each in main if each["job"]["arm"] == name]
        if runs:
            colour = f"C{number}"
            curve.plot(*_guidance_curve(runs), "o-", label=name, color=colour, markersize=3)
            steps.plot(*_step_curve(runs), "o-", label=name, color=colour, markersize=3)
    curve.set_title("action followed against unspoken fidelity, by reference guidance", fontsize=9)
    curve.set_xlabel("action"), curve.set_ylabel("unspoken fidelity")
    steps.set_title("unspoken fidelity over steps", fontsize=9)
    if main:
        steps.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _guidance_curve(runs: list[Result]) -> tuple[list[float], list[float]]:
    """Action and fidelity at each guidance scale, weakest first, over the prompts that every scale has."""
    last = [each for each in runs[0]["evaluations"] if each["step"] == runs[0]["budget"]["steps"]]
    scales = sorted(each["reference_guidance"] for each in last)
    shared = set.intersection(*({clip["key"] for clip in each["records"]} for each in last))
    clips = {
        scale: [clip for run in runs for clip in find_clips(run, guidance=scale) if clip["key"] in shared] for scale in scales
    }
    return [average(clips[scale], "action") for scale in scales], [average(clips[scale], "fidelity") for scale in scales]


def _step_curve(runs: list[Result]) -> tuple[list[int], list[float]]:
    guidance = {each["reference_guidance"] for each in runs[0]["evaluations"] if each["step"] != runs[0]["budget"]["steps"]}
    steps = sorted({each["step"] for each in runs[0]["evaluations"]})
    scale = min(guidance) if guidance else None
    return steps, [float(np.mean([average(find_clips(run, step, scale), "fidelity") for run in runs])) for step in steps]


def _cell(mean: float, difference: dict[str, Any] | None) -> str:
    if not np.isfinite(mean):
        return "–"
    return f"{mean:.3f}" + (f"<br>{_interval(difference)}" if difference else "")


def _interval(each: dict[str, Any] | None) -> str:
    return (
        f"{each['mean']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]" if each else "not measured (fewer than two paired seeds)"
    )


def _values(values: dict[str, Any] | None) -> str:
    if not values:
        return "not measured"
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
