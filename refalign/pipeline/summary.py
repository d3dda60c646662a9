"""The summary of a story, as a plain dict, as `summary.json` and as the lines a person reads at the end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.config.presets import EMBEDDED_DETECTOR
from refalign.io.untrusted import parse_json_object

_SHOWN_TERMS = ("flow_matching", "pull")
REPORTS = ("report.html", "curation_report.html")
"""Names of the pages of an output folder."""
Manifests = dict[str, dict[str, Any]]


def make_summary(config: RunConfig, output: Path, manifests: Manifests, seconds: dict[str, float]) -> dict[str, Any]:
    """What came of every step so far. Steps that did not run are absent.

    Asserts that planned = written + filtered + quarantined at every level.
    """
    summary: dict[str, Any] = {"output": str(output), "config": config.model_dump(mode="json"), "seconds": seconds}
    summary["counts"] = _merge_counts(manifests)
    if subjects := manifests.get("subjects"):
        summary["videos"] = subjects["counts"]["video"]["planned"]
        summary["clips"] = subjects["clips"]
        summary["subjects"] = subjects["subjects"]
        summary["captions"] = subjects.get("captions", {})
        summary["unusual"] = subjects.get("unusual", {})
        later = [manifests.get(step, {}) for step in ("pairs", "shards")]
        summary["outcomes"] = [*subjects["outcomes"], *(outcome for each in later for outcome in each.get("outcomes", []))]
        for kind in ("filtered", "quarantined"):
            levels = [subjects["counts"]["video"], *(each.get("counts", {}).get("clip", {}) for each in later)]
            reasons: dict[str, int] = {}
            for level in levels:
                for reason, count in level.get(kind, {}).items():
                    reasons[reason] = reasons.get(reason, 0) + count
            summary[kind] = reasons
    if pairs := manifests.get("pairs"):
        summary["pairs"] = pairs["pairs"]
    if shards := manifests.get("shards"):
        summary |= {"references": shards["references"], "shards": len(shards["parts"]), "samples": shards["samples"]}
        summary["digest"] = shards["digest"]
    for step, key in (("train", "train"), ("evaluate", "evaluation"), ("register", "model")):
        if step in manifests:
            summary[key] = manifests[step]
    return summary


def _merge_counts(manifests: Manifests) -> dict[str, Any]:
    counts = {}
    for step in ("subjects", "pairs", "shards"):
        for level, count in manifests.get(step, {}).get("counts", {}).items():
            lost = count["planned"] - count["written"] - sum(count["filtered"].values()) - sum(count["quarantined"].values())
            assert lost == 0, f"{step}: {lost} {level}s are unaccounted for"
            counts[f"{step}.{level}"] = count
    return counts


def load_summary(output: Path) -> dict[str, Any] | None:
    """The last summary written to an output folder."""
    try:
        return parse_json_object((output / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def describe_step(name: str, manifest: dict[str, Any]) -> str:
    """One line of what a step made."""
    if name == "world":
        return f"drew {manifest['videos']} videos"
    if name == "subjects":
        count = manifest["counts"]["video"]
        lost = ", ".join(f"{n} {reason}" for kind in ("filtered", "quarantined") for reason, n in count[kind].items())
        made = f"{count['planned']} videos -> {manifest['clips']} clips, {manifest['subjects']} subjects"
        unusual = ", ".join(f"{n} {kind}" for kind, n in manifest.get("unusual", {}).items())
        made += (f" ({lost})" if lost else "") + (f"; unusual videos: {unusual}" if unusual else "")
        missing = manifest.get("captions", {}).get("none", 0)
        return f"{made}; {_explain_captions(missing, manifest['clips'])}" if 2 * missing > manifest["clips"] else made
    if name == "pairs":
        left_out = ", ".join(f"{n} {reason}" for reason, n in manifest["counts"]["clip"]["filtered"].items())
        made = f"{manifest['pairs']} pairs for {manifest['subjects_with_pair']} subjects"
        return f"{made} ({left_out})" if left_out else made
    if name == "shards":
        train, held_out = manifest["samples"]["train"], manifest["samples"]["validation"]
        made = f"{train} training and {held_out} held-out samples with {manifest['references']} references"
        lost = {"cut": manifest.get("cut_prompts"), "with unknown words": manifest.get("prompts_with_unknown_words")}
        told = ", ".join(f"{count} prompts {what}" for what, count in lost.items() if count)
        return f"{made} ({told})" if told else made
    if name == "train":
        measured = manifest["validation"] or manifest["loss"]
        terms = ", ".join(f"{term} {measured[term]['first']:.3f} -> {measured[term]['last']:.3f}" for term in _SHOWN_TERMS)
        return f"{manifest['steps']} steps; {'held-out' if manifest['validation'] else 'training'} {terms}"
    if name == "evaluate":
        judged = [(manifest["scores"].get(label) or {}).get("judged") for label in ("before", "after")]
        made = f"{manifest['num_samples']} sample videos"
        return made if None in judged else f"{made}; attributes right: base {judged[0]:.0%}, trained {judged[1]:.0%}"
    return f"{manifest['name']} version {manifest['version']}, alias {manifest['alias']}"


def _explain_captions(missing: int, clips: int) -> str:
    return (
        f"{missing} of {clips} clips have no caption and would be trained on an empty prompt: give sidecars (.txt, .json), a "
        "table with a column caption, text or prompt, or curation.caption=missing with models.captioner"
    )


def explain_no_clip(manifest: dict[str, Any], config: RunConfig, *, needs_detector: bool) -> str:
    """Why there is none, by what has happened: advice on a detector helps only where it has looked at something."""
    videos = manifest["counts"]["video"]
    came_of_them = "The summary and the report of this run say what came of each file."
    looked_at = manifest["counts"].get("clip", {}).get("filtered", {}).get("NO_SUBJECT", 0)
    if not looked_at:
        reasons = ", ".join(f"{reason} {n}" for kind in ("quarantined", "filtered") for reason, n in videos[kind].items())
        return f"no clip in {videos['planned']} files ({reasons}), so no subject was looked for. {came_of_them}"
    if not needs_detector:
        advice = "curation.min_aesthetic, min_text_image, min_area_fraction and max_area_fraction leave none that is annotated"
    elif Path(config.models.detector).expanduser().resolve() == EMBEDDED_DETECTOR.resolve():
        advice = (
            "the embedded detector knows only the creatures of the drawn world; --set models.detector=yolo11n-seg.pt takes a "
            "real one (or a folder or .pt file of your own)"
        )
    else:
        advice = (
            f"{config.models.detector} found none above curation.min_confidence={config.curation.min_confidence:g}, between "
            f"curation.min_area_fraction={config.curation.min_area_fraction:g} and max_area_fraction="
            f"{config.curation.max_area_fraction:g} of the frame; change these, curation.classes or the detector"
        )
    return f"no subject in {looked_at} clips of {videos['planned']} files: {advice}. {came_of_them}"


def print_ending(summary: dict[str, Any]) -> None:
    """Where everything is, and what to do next."""
    print(f"\nsummary   {summary['summary']}")
    if report := summary.get("report"):
        print(f"report    {report}   (open it in a browser: pictures, curves, sample videos)")
    if evaluation := summary.get("evaluation"):
        print(f"videos    {evaluation['folder']}")
    if model := summary.get("model"):
        uri = f"models:/{model['name']}@{model['alias']}"
        print(f"model     {uri} (version {model['version']})")
        references = " ".join(f"--reference {shlex.quote(path)}" for path in model["example"]["references"])
        prompt = shlex.quote(model["example"]["prompt"])
        where = f"--tracking {shlex.quote(model['tracking_uri'])}"
        print(f"generate  uv run pipelines/generate.py --model {uri} {where} {references} --prompt {prompt} --output out.mp4")
        # MLflow's job runners, some twenty processes, are of no use here.
        mlflow_ui = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false uv run mlflow ui --workers 1"
        print(f"runs      {mlflow_ui} --backend-store-uri {shlex.quote(model['tracking_uri'])}")
    if untrained := summary.get("untrained"):
        print(f"note      {untrained}")
