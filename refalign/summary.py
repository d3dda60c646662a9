"""The summary of a story, as a plain dict, as `summary.json` and as the lines a person reads at the end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.texts import parse_json_object

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
        return made + (f" ({lost})" if lost else "") + (f"; unusual videos: {unusual}" if unusual else "")
    if name == "pairs":
        left_out = ", ".join(f"{n} {reason}" for reason, n in manifest["counts"]["clip"]["filtered"].items())
        made = f"{manifest['pairs']} pairs for {manifest['subjects_with_pair']} subjects"
        return f"{made} ({left_out})" if left_out else made
    if name == "shards":
        train, held_out = manifest["samples"]["train"], manifest["samples"]["validation"]
        return f"{train} training and {held_out} held-out samples with {manifest['references']} references"
    if name == "train":
        measured = manifest["validation"] or manifest["loss"]
        terms = ", ".join(f"{term} {measured[term]['first']:.3f} -> {measured[term]['last']:.3f}" for term in _SHOWN_TERMS)
        return f"{manifest['steps']} steps; {'held-out' if manifest['validation'] else 'training'} {terms}"
    if name == "evaluate":
        judged = [(manifest["scores"].get(label) or {}).get("judged") for label in ("before", "after")]
        made = f"{manifest['num_samples']} sample videos"
        return made if None in judged else f"{made}; attributes right: base {judged[0]:.0%}, trained {judged[1]:.0%}"
    return f"{manifest['name']} version {manifest['version']}, alias {manifest['alias']}"


def print_ending(summary: dict[str, Any]) -> None:
    """Where everything is, and what to do next."""
    output = summary["output"]
    print(f"\nsummary   {output}/summary.json")
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
        print(f"runs      uv run mlflow ui --backend-store-uri {shlex.quote(model['tracking_uri'])}")
    if untrained := summary.get("untrained"):
        print(f"note      {untrained}")
