"""Who makes and scores videos: one per part, from the base model, the trained one, or any other. Models are loaded only here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refalign.config import RunConfig
from refalign.evaluation.fidelity import best_match, make_windows, measure_copy_paste, score_video
from refalign.evaluation.judging import load_judge, share_right
from refalign.evaluation.making import VideoMaker
from refalign.evaluation.samples import ChosenSample
from refalign.io.images import decode_image, read_image, write_mp4
from refalign.pipeline.steps import Step

_EMBED_BATCH = 32
_PICTURES_PER_SUBJECT = 3  # at the most, for separability
PICTURES = ("own", "other", "targets")
"""Of a video: its references, strangers', and its references' subjects as its own clip shows them (None where it gave them)."""


@dataclass(frozen=True)
class VideoWork:
    """One video.

    Attributes:
        source, revision: folder or hub id of the model, and the revision of a hub id.
        own, other, targets: names of pictures among the parts, or absolute paths; see `PICTURES`.
    """

    label: str
    source: str
    revision: str | None
    prompt: str
    seed: int
    own: list[str]
    targets: list[str | None]
    other: list[str]


@dataclass(frozen=True)
class SeparabilityWork:
    """How far one model tells the subjects of a split apart.

    Attributes:
        shards: folder of the shards stage.
    """

    label: str
    source: str
    revision: str | None
    shards: str
    split: str


class EvaluateWorker:
    """One pipeline at a time and the vision encoder; makes and scores one video per call, or measures a Transformer."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        from refalign.models.dinov3 import VisionEncoder

        torch.set_num_threads(config.cluster.threads)
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vision = VisionEncoder.from_config(config.models, self.device)
        self.maker = VideoMaker(config, self.device)
        self.judge = load_judge(config.evaluation.judge) if config.evaluation.judge else None
        self.embeddings: dict[str, Any] = {}

    def make_part(self, step: Step, name: str, work: VideoWork | SeparabilityWork) -> dict[str, Any]:
        """Generates, scores and writes one video, or writes the separability of one model."""
        if isinstance(work, SeparabilityWork):
            return self._measure_separability(step, name, work)
        return self._make_video(step, name, work)

    def _make_video(self, step: Step, name: str, work: VideoWork) -> dict[str, Any]:
        import numpy as np

        pictures = [read_image(step.parts_folder / picture) for picture in work.own]
        frames = self.maker.make(work.source, work.prompt, pictures, work.seed, revision=work.revision)
        windows = self._embed(make_windows(frames, self.config.curation.embedding_px))
        shown = {name for whose in (work.own, work.other, work.targets) for name in whose if name}
        embed = {name: self._embed_reference(step.parts_folder / name) for name in sorted(shown)}
        matches = {
            whose: best_match(np.stack([embed[name] for name in names]), windows).tolist() if names else []
            for whose, names in (("own", work.own), ("other", work.other))
        }
        pairs = zip(work.own, work.targets, strict=True)
        pasted = [measure_copy_paste(windows, embed[given], embed[target]) for given, target in pairs if target]
        scores = score_video(matches["own"], matches["other"], pasted)
        verdict = self.judge(frames, work.prompt, pictures) if self.judge else None
        record = {"label": work.label, "scores": {"judged": share_right(verdict)} | scores, "verdict": verdict}

        def write(path: Path) -> dict[str, Any]:
            write_mp4(path, frames, self.config.video.fps)
            return record

        return step.write_part(name, write)

    def _measure_separability(self, step: Step, name: str, work: SeparabilityWork) -> dict[str, Any]:
        from refalign.evaluation.separability import collect_references, describe
        from refalign.shards.reader import ShardIndex

        index = ShardIndex.open(Path(work.shards), work.split)
        references = collect_references(index, self.config.evaluation.separability_subjects, _PICTURES_PER_SUBJECT)
        measured = None
        if references is not None:
            transformer = self.maker.open(work.source, work.revision).transformer
            block = min(self.config.objective.alignment_blocks, len(transformer.blocks)) - 1
            options = {"max_text_tokens": self.config.models.max_text_tokens, "picture_block": block}
            measured = describe(transformer, references, index, **options)

        def write(path: Path) -> dict[str, Any]:
            path.write_text(json.dumps(measured))
            return {"label": work.label, "separability": measured}

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


def plan_videos(
    samples: Sequence[ChosenSample], pictures: Mapping[str, list[str]], sources: Mapping[str, tuple[str, str | None]]
) -> dict[str, VideoWork]:
    """Part name to the work behind it, all videos of one model before those of the next, so that an actor loads each once.

    Args:
        pictures: names of the reference parts by sample key.
        sources: folder or hub id of the model, and the revision of a hub id, by label.
    """
    return {
        name_video(label, sample): VideoWork(
            label=label,
            source=source,
            revision=revision,
            prompt=sample.prompt,
            seed=sample.seed,
            own=pictures[sample.key],
            targets=[
                name_target(sample, number) if reference.target_png else None
                for number, reference in enumerate(sample.references)
            ],
            # Clips of one source may show one subject: they are no strangers to each other.
            other=[name for each in samples if each.source_group != sample.source_group for name in pictures[each.key]],
        )
        for label, (source, revision) in sources.items()
        for sample in samples
    }


def plan_separability(sources: Mapping[str, tuple[str, str | None]], shards: Path, split: str) -> dict[str, SeparabilityWork]:
    """A part per model: how far it tells the split's subjects apart."""
    return {
        name_separability(label): SeparabilityWork(label, source, revision, str(shards), split)
        for label, (source, revision) in sources.items()
    }


def write_references(step: Step, sample: ChosenSample) -> list[str]:
    """Keeps the reference pictures, and what they are to be told from, as parts; returns the names of the references."""
    names = []
    for number, reference in enumerate(sample.references):
        names.append(f"reference-{sample.key}-{number}.png")
        decode_image(reference.crop_png, reference.subject_id)  # a damaged crop is found before hours of generation
        _write_picture(step, names[-1], reference.crop_png)
        if reference.target_png:
            _write_picture(step, name_target(sample, number), reference.target_png)
    return names


def _write_picture(step: Step, name: str, data: bytes) -> None:
    def write(path: Path) -> dict[str, Any]:
        path.write_bytes(data)
        return {}

    if step.load_part(name) is None:
        step.write_part(name, write)


def name_target(sample: ChosenSample, number: int) -> str:
    return f"target-{sample.key}-{number}.png"


def name_separability(label: str) -> str:
    return f"separability-{label}.json"


def name_video(label: str, sample: ChosenSample) -> str:
    return f"{label}-{sample.key}.mp4"
