"""The sections of the report, each from the summary and the step folders; a section without material is empty."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign.errors import DataError
from refalign.evaluation.report import html
from refalign.evaluation.report.charts import Line, make_chart, smooth
from refalign.evaluation.report.verdicts import make_verdicts
from refalign.io.images import decode_image, encode_png, make_contact_sheet
from refalign.pipeline.steps import Step
from refalign.tracking.run import flatten
from refalign.tracking.story import iter_contact_sheets
from refalign.training.records import FILE_NAME, read_records

Summary = Mapping[str, Any]
Steps = Mapping[str, Step]

_MAX_VIDEOS = 12
_MAX_SHEET_SHARDS, _SHEETS_PER_SHARD = 4, 3
_MAX_OUTCOMES = 50
_THUMBNAIL_PX = 224
_TERMS = {
    "flow_matching": "Flow matching: error of the predicted velocity, weighted by noise level",
    "pull": "Pull: cosine distance of reference tokens to the vision encoder's tokens of the same picture",
    "push": "Push: similarity to tokens of other subjects",
    "alignment": "Alignment term as it enters the loss, after gate and weight",
    "total": "Total: what is differentiated",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
}
_LEVELS = {
    "subjects.video": "videos",
    "subjects.clip": "clips found in them",
    "pairs.clip": "clips wanted",
    "shards.clip": "clips encoded",
}
_CURVES_WITH_FEW_POINTS = 30
_QUARTERS = ("q1", "q2", "q3", "q4")


def make_tiles(summary: Summary) -> str:
    """The run in numbers."""
    samples, train, model = (summary.get(name) or {} for name in ("samples", "train", "model"))
    numbers = {
        "videos": summary.get("videos"),
        "clips": summary.get("clips"),
        "subjects": summary.get("subjects"),
        "training samples": samples.get("train"),
        "held-out samples": samples.get("validation"),
        "optimizer steps": train.get("steps"),
        "model version": model.get("version"),
    }
    judged = [
        ((summary.get("evaluation") or {}).get("scores", {}).get(label) or {}).get("judged") for label in ("before", "after")
    ]
    if None not in judged:
        numbers["attributes right, base and trained"] = "{:.0%} \u2192 {:.0%}".format(*judged)
    tiles = [
        f'<div class="tile"><b>{html.count(value)}</b><span>{html.text(name)}</span></div>'
        for name, value in numbers.items()
        if value is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def make_samples(summary: Summary, steps: Steps) -> str:
    """References, the base model's video and ours, side by side, with prompt and scores."""
    evaluation = summary.get("evaluation") or {}
    samples = evaluation.get("samples", [])
    if not samples or "evaluate" not in steps:
        return ""
    held_out = (
        "Prompts and references are held out: no clip of their source was trained on."
        if evaluation.get("held_out")
        else "There was no held-out split, so these prompts were trained on: the videos show what was memorised."
    )
    cards = [_make_sample_card(sample, steps["evaluate"].folder) for sample in samples[:_MAX_VIDEOS]]
    rest = (
        f'<p class="soft">{len(samples) - _MAX_VIDEOS} more videos are in the evaluate step\'s folder.</p>'
        if len(samples) > _MAX_VIDEOS
        else ""
    )
    intro = f'<p class="soft">Left: references. Then the base model and the trained one, same seed. {held_out}</p>'
    return html.section("Sample videos", intro, *cards, rest)


def make_scores(summary: Summary) -> str:
    """Averages before and after training, with what they mean."""
    evaluation = summary.get("evaluation") or {}
    scores = evaluation.get("scores") or {}
    if not any(scores.values()):
        return ""
    names = {
        "judged": "Attributes right",
        "fidelity": "Fidelity (cosine)",
        "chance": "Chance of it",
        "own_above_other": "Own above other",
        "copy_paste": "Copy-paste",
    }
    names = {name: label for name, label in names.items() if any(name in (each or {}) for each in scores.values())}
    samples = evaluation.get("samples", [])
    rows = [
        (
            html.text(label),
            *(html.number((scores.get(side) or {}).get(name)) for side in ("before", "after")),
            _make_difference(samples, name),
        )
        for name, label in names.items()
    ]
    few = (
        f"Videos on each side: {len(samples)}. The difference is of pairs at one prompt and seed, with the 95% interval of a "
        "paired t test over prompts: what covers zero may be luck."
    )
    return html.section(
        "Scores",
        html.table(("", "base model", "trained", "difference"), rows),
        f'<p class="soft">{html.text(evaluation.get("measured", ""))} {html.text(few)}</p>',
    )


def _make_difference(samples: list[Mapping[str, Any]], name: str) -> str:
    """Trained less base over the prompts where both were scored; a dash for fewer than two."""
    from scipy import stats

    pairs = [[(sample.get("scores", {}).get(side) or {}).get(name) for side in ("before", "after")] for sample in samples]
    gains = [after - before for before, after in pairs if before is not None and after is not None]
    if len(gains) < 2:
        return html.number(None)
    mean, reach = sum(gains) / len(gains), stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"


def make_training(summary: Summary, steps: Steps) -> str:
    """Every loss term over the steps, and the held-out loss at fixed noise."""
    if "train" not in steps:
        return ""
    records = read_records(steps["train"].folder / FILE_NAME)
    stages = _stage_marks(records)
    charts = []
    for name, label in _TERMS.items():
        raw = [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]
        held_out = [
            (record["step"], record[key])
            for record in records
            if isinstance(record.get(key := f"validation/{name}"), int | float)
        ]
        plain = name == "learning_rate" or len(raw) <= _CURVES_WITH_FEW_POINTS
        lines = [Line(raw)] if plain else [Line(raw, "raw"), Line(smooth(raw))]
        svg = make_chart([*lines, Line(held_out, "held-out", dots=True)], marks=stages, label=label)
        charts.append(html.figure(svg, label) if svg else "")
    if not any(charts):
        return ""
    charts.append(_make_levels(records))
    validation = (summary.get("train") or {}).get("validation") or {}
    rows = [(html.text(name), html.number(ends["first"]), html.number(ends["last"])) for name, ends in validation.items()]
    intro = (
        '<p class="soft">Blue: training, one noise level drawn per sample, hence the scatter. Orange: held-out samples at fixed '
        "noise and noise levels. A falling pull alone proves little: the projectors can lower it without the Transformer.</p>"
    )
    held_out_table = "<h3>Held out, first and last</h3>" + html.table(("term", "before training", "after"), rows) if rows else ""
    return html.section("Training", intro, f'<div class="charts">{"".join(charts)}</div>', held_out_table)


def make_data_flow(summary: Summary) -> str:
    """From videos to samples, and what was left out for which reason."""
    samples = summary.get("samples") or {}
    names = ("videos", "clips", "subjects", "references", "pairs")
    flow = [(name, summary[name]) for name in names if isinstance(summary.get(name), int)]
    if samples:
        flow.append(("samples", sum(samples.values())))
    if not flow:
        return ""
    items = "".join(f"<li><b>{html.count(value)}</b> {html.text(name)}</li>" for name, value in flow)
    planned = [
        (
            html.text(_LEVELS.get(level, level)),
            html.count(counts["planned"]),
            html.count(counts["written"]),
            html.count(sum(counts["filtered"].values())),
            html.count(sum(counts["quarantined"].values())),
        )
        for level, counts in sorted((summary.get("counts") or {}).items(), key=lambda item: [*_LEVELS, item[0]].index(item[0]))
    ]
    balance = html.table(("", "planned", "written", "filtered", "quarantined"), planned) if planned else ""
    reasons = [
        (html.text(kind), html.text(reason), html.count(how_many))
        for kind in ("filtered", "quarantined")
        for reason, how_many in (summary.get(kind) or {}).items()
    ]
    left_out = "<h3>Left out</h3>" + html.table(("", "reason", "count"), reasons, numbers_from=2) if reasons else ""
    return html.section(
        "Data flow",
        f'<ul class="flow">{items}</ul>',
        balance,
        '<p class="soft">Filtered: not wanted (no subject, too short). Quarantined: a fault (unreadable, corrupt).</p>'
        if planned
        else "",
        left_out,
        _make_outcomes(summary.get("outcomes") or []),
    )


def make_sheets(steps: Steps) -> str:
    """The first samples of some shards: frames above, references below."""
    if "shards" not in steps or (manifest := steps["shards"].load_manifest()) is None:
        return ""
    parts = sorted(manifest["parts"], key=lambda part: not part.startswith("validation"))
    content = []
    for part in parts[:_MAX_SHEET_SHARDS]:
        sheets = iter_contact_sheets(steps["shards"], {"parts": [part]}, _SHEETS_PER_SHARD)
        figures = "".join(html.figure(html.image(jpeg, "image/jpeg", f"sample {key}"), key) for key, jpeg in sheets)
        content.append(f'<h3>{html.text(part)}</h3><div class="sheets">{figures}</div>')
    rest = f'<p class="soft">{len(parts)} shards in all.</p>' if len(parts) > _MAX_SHEET_SHARDS else ""
    return html.section("Contact sheets", *content, rest)


def make_model(summary: Summary) -> str:
    """The registered version and the command that uses it."""
    model = summary.get("model") or {}
    if not model:
        return ""
    unknown: Mapping[str, Any] = {"references": ["a.png"], "prompt": "..."}
    example = model.get("example") or unknown
    references = " ".join(f"--reference {shlex.quote(path)}" for path in example["references"])
    tracking = f" --tracking {shlex.quote(model['tracking_uri'])}" if "tracking_uri" in model else ""
    command = (
        f"uv run pipelines/generate.py --model {shlex.quote(model['uri'])}{tracking} {references} "
        f"--prompt {shlex.quote(str(example['prompt']))} --output out.mp4"
    )
    card = html.folded("Model card", f"<pre>{html.text(model['card'])}</pre>") if model.get("card") else ""
    name, version, alias = (html.text(model[part]) for part in ("name", "version", "alias"))
    line = f"<p><b>{name}</b> version {version}, alias <code>{alias}</code></p>"
    return html.section("Model", line, f"<pre>{html.text(command)}</pre>", card)


def make_provenance(summary: Summary, steps: Steps) -> str:
    """What to type to get here again, and what it was made from."""
    model = summary.get("model") or {}
    facts = {
        "story": summary.get("story"),
        "code": model.get("code"),
        "shards": summary.get("digest"),
        "weights": model.get("weights"),
        "licences of the data": _join(model.get("licenses")),
        "consent": _join(model.get("consents")),
        "output": summary.get("output"),
    }
    rows = [(html.text(name), f"<code>{html.text(value)}</code>") for name, value in facts.items() if value]
    seconds = summary.get("seconds") or {}
    took = [
        (html.text(name), f"<code>{html.text(steps[name].folder.name if name in steps else '')}</code>", f"{value:,.1f}")
        for name, value in seconds.items()
    ]
    command = summary.get("command")
    return html.section(
        "How to reproduce",
        f"<pre>{html.text(command)}</pre>" if command else "",
        html.table(("", ""), rows, numbers_from=2) if rows else "",
        "<h3>Steps</h3>" + html.table(("step", "folder", "seconds"), took, numbers_from=2) if took else "",
        html.folded("All settings", html.settings_table(flatten(summary["config"]))) if summary.get("config") else "",
    )


def _make_levels(records: list[dict[str, Any]]) -> str:
    """The flow matching term by noise level: an average over all levels moves with which of them were drawn."""
    lines = []
    for name in _QUARTERS:
        key = f"flow_matching/{name}"
        points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
        lines.append(Line(smooth(points) if points else points, name))
    label = "Flow matching by timestep: quarters of [0, 1000], from the lightest (least noise) to the darkest (most)"
    svg = make_chart(lines, label=label)
    return html.figure(svg, label) if svg else ""


def _make_sample_card(sample: Mapping[str, Any], folder: Path) -> str:
    thumbnails = []
    for reference in sample["references"]:
        try:
            picture = decode_image((folder / reference["file"]).read_bytes())
        except (OSError, DataError):
            continue
        small = make_contact_sheet([[picture]], min(_THUMBNAIL_PX, picture.shape[0]), gap_px=0)
        thumbnails.append(
            html.figure(html.image(encode_png(small), "image/png", reference["class_name"]), reference["class_name"])
        )
    videos = []
    for label, caption in (("before", "base model"), ("after", "trained")):
        file = folder / sample["videos"].get(label, "")
        if file.is_file():
            judged = (sample.get("scores", {}).get(label) or {}).get("judged")
            said = caption if judged is None else f"{caption}: {judged:.0%} of the attributes right"
            videos.append(html.figure(html.video(file.read_bytes(), f"{caption}: {sample['prompt']}"), said))
    prompt = html.text(sample["prompt"] or "(no prompt)")
    return (
        f'<div class="sample"><p>{prompt}</p><div class="row"><div class="references">{"".join(thumbnails)}</div>'
        f'<div class="videos">{"".join(videos)}</div></div>{make_verdicts(sample.get("verdicts") or {})}'
        f'<p class="soft">{html.text(sample["key"])}, seed {html.text(sample["seed"])}</p></div>'
    )


def _make_outcomes(outcomes: list[Mapping[str, Any]]) -> str:
    if not outcomes:
        return ""
    rows = [
        tuple(html.text(outcome.get(name, "")) for name in ("item", "reason", "message")) for outcome in outcomes[:_MAX_OUTCOMES]
    ]
    title = (
        f"Each of them ({len(outcomes)})" if len(outcomes) <= _MAX_OUTCOMES else f"The first {_MAX_OUTCOMES} of {len(outcomes)}"
    )
    return html.folded(title, html.table(("item", "reason", "what was found"), rows, numbers_from=3))


def _stage_marks(records: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """First step of each stage but the first."""
    first: dict[str, float] = {}
    for record in records:
        if record["step"] > 0 and "stage" in record:
            first.setdefault(str(record["stage"]), record["step"])
    return [(step, stage) for stage, step in first.items()][1:]


def _join(counts: Mapping[str, int] | None) -> str:
    return ", ".join(f"{name} ({number} clips)" for name, number in (counts or {}).items())
