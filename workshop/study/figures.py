"""The study's report as text and picture."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.recording import describe_machine
from refalign.io.writing import write_bytes, write_json
from workshop.study.arms import ARMS, SMALLEST_WORTH
from workshop.study.bootstrap import Interval
from workshop.study.report import Report, Values, analyse, select
from workshop.study.results import Result, Score, average

_SCORES: tuple[Score, ...] = ("fidelity", "confusion", "copy_paste", "action", "text")


def write_report(results: list[Result], output: Path, command: str, not_run: dict[str, str]) -> str:
    """Writes ``report.md``, ``report.json`` and ``report.png``; returns the verdict.

    Args:
        not_run: arm -> why there are no results of it.
    """
    told = analyse(results)
    about = {"command": command.splitlines(), "date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}
    write_json(output / "report.json", asdict(told) | about)
    write_bytes(output / "report.md", make_text(told, command, not_run).encode())
    draw(results, told, output / "report.png")
    return told.verdict


def make_text(told: Report, command: str, not_run: dict[str, str]) -> str:
    """Markdown: the verdict first, then the numbers it stands on."""
    lines = [
        f"# Does reference alignment help?\n\n**{told.verdict}**\n",
        f"Primary endpoint, written before the main runs: {told.primary}\n",
        "| arm | references | seeds | " + " | ".join(_SCORES) + " |\n|---|---|---|" + "---|" * len(_SCORES),
    ]
    for name, arm in told.arms.items():
        cells = [_cell(arm.means[score], arm.against_none.get(score)) for score in _SCORES]
        lines.append(f"| {name.replace('/', ' | ')} | {arm.seeds} | {' | '.join(cells)} |")
    lines.append(
        "\nBelow each mean: the paired difference to `none` with its 95% interval. Arms that are not listed were not run.\n"
    )
    lines += [f"- {arm} was not run: {reason}" for arm, reason in not_run.items() if f"{arm}/cross_pair" not in told.arms]
    lines.append(f"\n## Controls\n\n- Go or no-go: {_values(told.world)}")
    lines.append(f"- A/A (none against none with other seeds), fidelity: {_interval(told.a_a)}")
    for score, each in told.positive_control.items():
        lines.append(f"- Positive control, cross-pair less in-pair references, {score}: {_interval(each)}")
    stopped = told.stop_gradient_equals_none
    lines.append(
        f"- Stop-gradient: the Transformer equals that of none, bit for bit, in {stopped['equal']} of {stopped['pairs']} seeds"
    )
    if told.power:
        lines.append(f"- Power, from the pilot, for a difference of {SMALLEST_WORTH}: {_values(told.power)}")
    lines.append("\n## Separability of subjects in the Transformer's own reference tokens (last aligned block)\n")
    lines.append("| arm | block | retrieval before, after (chance) | gap | silhouette |\n|---|---|---|---|---|")
    for name, each in told.separability.items():
        pairs = [f"{each.before[key]:.3f}, {each.after[key]:.3f}" for key in ("retrieval", "gap", "silhouette")]
        lines.append(f"| {name} | {each.block} | {pairs[0]} ({each.after['chance']:.3f}) | {pairs[1]} | {pairs[2]} |")
    lines.append(f"\n## Settings and cost\n\nSwept: {', '.join(told.swept) or 'nothing'}.\n")
    lines += [f"- {name}: {_values(asdict(settings))}" for name, settings in told.chosen.items()]
    lines.append(f"- Cost: {_values(told.cost)}\n\n```\n{command}\n```\n\n![differences, guidance, steps](report.png)")
    return "\n".join(lines) + "\n"


def draw(results: list[Result], told: Report, path: Path) -> None:
    """Differences to none; fidelity against action over guidance; fidelity over steps."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    forest, curve, steps = figure.subplots(1, 3)
    rows = {name: gain for name, arm in told.arms.items() if (gain := arm.against_none.get("fidelity"))}
    for place, gain in enumerate(rows.values()):
        forest.errorbar(gain.mean, -place, xerr=[[gain.mean - gain.low], [gain.high - gain.mean]], fmt="o", color="C0")
    forest.axvline(0, color="grey", linewidth=1)
    forest.set_yticks([-place for place in range(len(rows))], list(rows), fontsize=8)
    forest.set_title("unspoken fidelity less that of none, 95%", fontsize=9)
    main = select(results, phase="main", references="cross_pair")
    for number, name in enumerate(ARMS):
        if runs := select(main, arm=name):
            curve.plot(*_guidance_curve(runs), "o-", label=name, color=f"C{number}", markersize=3)
            steps.plot(*_step_curve(runs), "o-", label=name, color=f"C{number}", markersize=3)
    curve.set_title("action followed against unspoken fidelity, by reference guidance", fontsize=9)
    curve.set_xlabel("action"), curve.set_ylabel("unspoken fidelity")
    steps.set_title("unspoken fidelity over steps", fontsize=9)
    if main:
        steps.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _guidance_curve(runs: list[Result]) -> tuple[list[float], list[float]]:
    """Action and fidelity at each guidance scale, weakest first, over the prompts that every scale has."""
    last = [each for each in runs[0].evaluations if each.step == runs[0].budget.steps]
    shared = set.intersection(*({clip.key for clip in each.records} for each in last))
    clips = [
        [clip for run in runs for clip in run.find_clips(guidance=scale) if clip.key in shared]
        for scale in sorted(each.reference_guidance for each in last)
    ]
    return [average(each, "action") for each in clips], [average(each, "fidelity") for each in clips]


def _step_curve(runs: list[Result]) -> tuple[list[int], list[float]]:
    """Mean over the runs of their fidelity at each evaluated step, at the preset's guidance."""
    steps = sorted({each.step for each in runs[0].evaluations})
    return steps, [float(np.mean([average(run.find_clips(step), "fidelity") for run in runs])) for step in steps]


def _cell(mean: float, difference: Interval | None) -> str:
    return f"{mean:.3f}" + (f"<br>{difference}" if difference else "") if np.isfinite(mean) else "–"


def _interval(each: Interval | None) -> str:
    return str(each) if each else "not measured (fewer than two paired seeds)"


def _values(values: Values | None) -> str:
    if not values:
        return "not measured"
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
