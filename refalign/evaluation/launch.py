"""The evaluate step: a video per held-out prompt from the base model and from the trained one, scored and kept.

Every video is a part of the step: a killed evaluation goes on with the next one. Models are loaded only in the actors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.evaluation.fidelity import MEASURED, average_scores, best_match, make_windows, measure_copy_paste, score_video
from refalign.evaluation.judging import load_judge, share_right
from refalign.evaluation.making import VideoMaker
from refalign.evaluation.samples import ChosenSample, choose_samples
from refalign.io.images import decode_image, read_image, write_mp4
from refalign.pipeline.ray_data import run_parts
from refalign.pipeline.steps import Step

LABELS = ("before", "after")
"""The base model and the trained one, at the same seeds."""
_EMBED_BATCH = 32
_PICTURES_PER_SUBJECT = 3  # at the most, for separability
_PICTURES = ("own", "other", "targets")
"""Of a video: its references, strangers', and its references' subjects as its own clip shows them (None where it gave them)."""


def run_evaluation(config: RunConfig, *, step: Step, steps: Mapping[str, Step]) -> dict[str, Any]:
    """Runs the step and returns its manifest.

    Raises:
        ArtifactError: a step before this one is missing or damaged.
    """
    train = steps["train"].load_manifest()
    assert train is not None, "evaluation comes after training"
    samples, split = choose_samples(
        steps["shards"].folder, steps["subjects"].folder, count=config.evaluation.num_samples, seed=config.seed
    )
    pictures = {sample.key: write_references(step, sample) for sample in samples}
    trained = str(steps["train"].folder / train["export"])
    sources = {"before": (config.models.base, config.models.base_revision), "after": (trained, None)}
    plan = plan_videos(samples, pictures, sources)
    if config.evaluation.separability_subjects:
        plan |= plan_separability(sources, steps["shards"].folder, split)
    records = run_parts(step, plan, EvaluationActor, config, label="evaluate")
    return step.commit(make_manifest(step, samples, split, plan, records, train))


def plan_videos(
    samples: Sequence[ChosenSample], pictures: Mapping[str, list[str]], sources: Mapping[str, tuple[str, str | None]]
) -> dict[str, dict[str, Any]]:
    """Part name to the work behind it, all videos of one model before those of the next, so that an actor loads each once.

    Args:
        pictures: names of the reference parts by sample key.
        sources: folder or hub id of the model, and the revision of a hub id, by label.
    """
    return {
        _video_name(label, sample): {
            "label": label,
            "source": source,
            "revision": revision,
            "prompt": sample.prompt,
            "seed": sample.seed,
            "own": pictures[sample.key],
            "targets": [
                _target_name(sample, number) if reference.target_png else None
                for number, reference in enumerate(sample.references)
            ],
            # Clips of one source may show one subject: they are no strangers to each other.
            "other": [name for each in samples if each.source_group != sample.source_group for name in pictures[each.key]],
        }
        for label, (source, revision) in sources.items()
        for sample in samples
    }


def plan_separability(sources: Mapping[str, tuple[str, str | None]], shards: Path, split: str) -> dict[str, dict[str, Any]]:
    """A part per model: how far it tells the split's subjects apart."""
    return {
        _separability_name(label): {"label": label, "source": source, "revision": revision, "shards": str(shards), "split": split}
        for label, (source, revision) in sources.items()
    }


class EvaluationActor:
    """One pipeline at a time and the vision encoder; makes and scores one video per call, or measures a Transformer."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.models.dinov3 import VisionEncoder

        torch.set_num_threads(config.cluster.threads)
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vision = VisionEncoder.from_pretrained(
            config.models.vision_encoder,
            revision=config.models.vision_encoder_revision,
            device=self.device,
            dtype=getattr(torch, config.models.encoder_dtype),
        )
        self.maker = VideoMaker(config, self.device)
        self.judge = load_judge(config.evaluation.judge) if config.evaluation.judge else None
        self.embeddings: dict[str, Any] = {}

    def make_part(self, step: Step, name: str, work: dict[str, Any]) -> dict[str, Any]:
        """Generates, scores and writes one video, or writes the separability of one model."""
        import numpy as np

        if "shards" in work:
            return self._measure_separability(step, name, work)
        pictures = [read_image(step.parts_folder / picture) for picture in work["own"]]
        frames = self.maker.make(work["source"], work["prompt"], pictures, work["seed"], revision=work["revision"])
        windows = self._embed(make_windows(frames, self.config.curation.embedding_px))
        embed = {name: self._embed_reference(step.parts_folder / name) for whose in _PICTURES for name in work[whose] if name}
        matches = {
            whose: best_match(np.stack([embed[name] for name in work[whose]]), windows).tolist() if work[whose] else []
            for whose in ("own", "other")
        }
        pairs = zip(work["own"], work["targets"], strict=True)
        pasted = [measure_copy_paste(windows, embed[given], embed[target]) for given, target in pairs if target]
        scores = score_video(matches["own"], matches["other"], pasted)
        verdict = self.judge(frames, work["prompt"], pictures) if self.judge else None
        record = {"label": work["label"], "scores": {"judged": share_right(verdict)} | scores, "verdict": verdict}

        def write(path: Path) -> dict[str, Any]:
            write_mp4(path, frames, self.config.video.fps)
            return record

        return step.write_part(name, write)

    def _measure_separability(self, step: Step, name: str, work: dict[str, Any]) -> dict[str, Any]:
        from refalign.evaluation.separability import collect_references, describe
        from refalign.shards.reader import ShardIndex

        index = ShardIndex.open(Path(work["shards"]), work["split"])
        references = collect_references(index, self.config.evaluation.separability_subjects, _PICTURES_PER_SUBJECT)
        measured = None
        if references is not None:
            transformer = self.maker.open(work["source"], work["revision"]).transformer
            block = min(self.config.objective.alignment_blocks, len(transformer.blocks)) - 1
            options = {"max_text_tokens": self.config.models.max_text_tokens, "picture_block": block}
            measured = describe(transformer, references, index, **options)

        def write(path: Path) -> dict[str, Any]:
            path.write_text(json.dumps(measured))
            return {"label": work["label"], "separability": measured}

        return step.write_part(name, write)

    def _embed(self, images: Any) -> Any:
        import numpy as np
        import torch

        starts = range(0, len(images), _EMBED_BATCH)
        chunks = [self.vision.embed(torch.from_numpy(images[start : start + _EMBED_BATCH])) for start in starts]
        return np.concatenate([chunk.float().cpu().numpy() for chunk in chunks])

    def _embed_reference(self, path: Path) -> Any:
        from refalign.geometry import letterbox

        if path.name not in self.embeddings:
            side_px = self.config.curation.embedding_px
            self.embeddings[path.name] = self._embed(letterbox(read_image(path), side_px, side_px)[0][None])[0]
        return self.embeddings[path.name]


def write_references(step: Step, sample: ChosenSample) -> list[str]:
    """Keeps the reference pictures, and what they are to be told from, as parts; returns the names of the references."""
    names = []
    for number, reference in enumerate(sample.references):
        names.append(f"reference-{sample.key}-{number}.png")
        decode_image(reference.crop_png, reference.subject_id)  # a damaged crop is found before hours of generation
        _write_picture(step, names[-1], reference.crop_png)
        if reference.target_png:
            _write_picture(step, _target_name(sample, number), reference.target_png)
    return names


def _write_picture(step: Step, name: str, data: bytes) -> None:
    def write(path: Path) -> dict[str, Any]:
        path.write_bytes(data)
        return {}

    if step.load_part(name) is None:
        step.write_part(name, write)


def _target_name(sample: ChosenSample, number: int) -> str:
    return f"target-{sample.key}-{number}.png"


def _separability_name(label: str) -> str:
    return f"separability-{label}.json"


def _video_name(label: str, sample: ChosenSample) -> str:
    return f"{label}-{sample.key}.mp4"


def make_manifest(
    step: Step,
    samples: list[ChosenSample],
    split: str,
    plan: Mapping[str, dict[str, Any]],
    records: list[dict[str, Any]],
    train: Mapping[str, Any],
) -> dict[str, Any]:
    """What the step recorded: per sample its prompt, files (relative to the step's folder) and scores, and their averages."""
    scores_of = {record["part"]: record["scores"] for record in records if "scores" in record}
    verdicts = {record["part"]: record.get("verdict") for record in records}
    separability = {record["label"]: record["separability"] for record in records if record.get("separability")}
    entries: list[dict[str, Any]] = []
    for sample in samples:
        references = [
            {**{name: getattr(reference, name) for name in ("subject_id", "class_name", "kind")}, "file": f"parts/{picture}"}
            for reference, picture in zip(sample.references, plan[_video_name("after", sample)]["own"], strict=True)
        ]
        names = {label: _video_name(label, sample) for label in LABELS}
        entries.append(
            {
                "key": sample.key,
                "prompt": sample.prompt,
                "seed": sample.seed,
                "references": references,
                "videos": {label: f"parts/{name}" for label, name in names.items()},
                "scores": {label: scores_of[name] for label, name in names.items()},
                "verdicts": {label: verdicts[name] for label, name in names.items()},
                "pictures": {whose: plan[names["after"]][whose] for whose in _PICTURES},
            }
        )
    return {
        "folder": str(step.parts_folder),
        "num_samples": len(samples),
        "split": split,
        "held_out": split == "validation",
        "samples": entries,
        "scores": {label: average_scores([entry["scores"][label] for entry in entries]) for label in LABELS},
        "validation": train.get("validation", {}),
        "separability": separability,
        "measured": MEASURED,
    }
