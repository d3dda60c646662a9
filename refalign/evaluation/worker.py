"""The worker of an evaluation: makes and scores videos, one part each, and measures how a model tells subjects apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refalign.config import RunConfig
from refalign.evaluation.fidelity import best_match, make_windows, measure_copy_paste, score_video
from refalign.evaluation.judging import load_judge, parse_verdict, share_right
from refalign.evaluation.results import Pictures, Separability, VideoScores
from refalign.evaluation.samples import ChosenSample
from refalign.generation.settings import make_generation_settings
from refalign.geometry import letterbox
from refalign.io.images import decode_image, read_image, write_mp4
from refalign.pipeline.steps import Step

if TYPE_CHECKING:
    from refalign.generation.pipeline import RefAlignPipeline

_EMBED_BATCH = 32
_PICTURES_PER_SUBJECT = 3  # at most, for separability


class Model(NamedTuple):
    """What makes videos.

    Attributes:
        source: folder or hub id of a pipeline.
        revision: of a hub id.
        transformer: folder with another ``transformer/`` for it.
    """

    source: str
    revision: str | None = None
    transformer: str | None = None


@dataclass(frozen=True)
class VideoWork:
    """One video to make, and the pictures to compare it with."""

    label: str
    model: Model
    prompt: str
    seed: int
    pictures: Pictures


@dataclass(frozen=True)
class SeparabilityWork:
    """How well one model tells the subjects of a split apart; ``shards`` is the folder of the shards stage."""

    label: str
    model: Model
    shards: str
    split: str


class VideoMaker:
    """Makes videos with the settings of the run; holds the pipeline of the last model."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        torch.set_num_threads(config.cluster.threads)
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._opened: tuple[Model, RefAlignPipeline] | None = None

    def make(self, model: Model, prompt: str, references: Sequence[np.ndarray], seed: int) -> np.ndarray:
        """uint8 frames [F, H, W, 3] of one video; references are RGB pictures uint8 [H, W, 3]."""
        import torch

        options = make_generation_settings(self.config).list_options()
        generator = torch.Generator().manual_seed(seed)
        videos = self.open(model)(prompt, references, generator=generator, output_type="uint8", **options)
        return videos.frames[0].numpy()

    def open(self, model: Model) -> RefAlignPipeline:
        """The pipeline. On a GPU its parts are moved there in turn, so that only the largest must fit."""
        import torch

        from refalign.generation.pipeline import RefAlignPipeline
        from refalign.models.wan import load_transformer

        if self._opened is None or self._opened[0] != model:
            self._opened = None  # frees the memory of the other model
            dtype = getattr(torch, self.config.training.precision)
            other = load_transformer(model.transformer, dtype=dtype).eval() if model.transformer else None
            pipeline = RefAlignPipeline.from_pretrained(
                model.source, revision=model.revision, torch_dtype=dtype, transformer=other
            )
            pipeline.max_sequence_length = self.config.models.max_text_tokens
            pipeline.set_progress_bar_config(disable=True)
            if self.device == "cuda":
                pipeline.enable_model_cpu_offload()
            self._opened = model, pipeline
        return self._opened[1]


class EvaluateWorker:
    """One pipeline at a time, the vision encoder, and the judge if the settings name one."""

    def __init__(self, config: RunConfig) -> None:
        from refalign.models.dinov3 import VisionEncoder

        self.config = config
        self.maker = VideoMaker(config)
        self.vision = VisionEncoder.from_config(config.models, self.maker.device)
        self.judge = load_judge(config.evaluation.judge) if config.evaluation.judge else None
        self._embeddings: dict[str, np.ndarray] = {}

    def make_part(self, step: Step, name: str, work: VideoWork | SeparabilityWork) -> dict[str, Any]:
        """Makes, scores and writes one video, or writes the separability of one model."""
        if isinstance(work, SeparabilityWork):
            found = self._measure_separability(work)
            measured = found and found.model_dump(mode="json")
            commit = {"label": work.label, "separability": measured}
            return commit_part(step, name, lambda path: path.write_text(json.dumps(measured)), commit)
        references = [read_image(step.parts_folder / picture) for picture in work.pictures.own]
        frames = self.maker.make(work.model, work.prompt, references, work.seed)
        verdict = parse_verdict(self.judge(frames, work.prompt, references)) if self.judge else None
        scores = self._score(frames, step.parts_folder, work.pictures, share_right(verdict))
        commit = {
            "label": work.label,
            "scores": scores.model_dump(),
            "verdict": verdict and [each.model_dump() for each in verdict],
        }
        return commit_part(step, name, lambda path: write_mp4(path, frames, self.config.video.fps), commit)

    def _score(self, frames: np.ndarray, folder: Path, pictures: Pictures, judged: float | None) -> VideoScores:
        windows = self._embed(make_windows(frames, self.config.curation.embedding_px))
        own, other = ([self._embed_picture(folder / name) for name in names] for names in (pictures.own, pictures.other))
        pasted = [
            measure_copy_paste(windows, given, self._embed_picture(folder / target))
            for given, target in zip(own, pictures.targets, strict=True)
            if target
        ]
        return score_video(best_match(own, windows), best_match(other, windows), pasted, judged)

    def _measure_separability(self, work: SeparabilityWork) -> Separability | None:
        from refalign.evaluation.separability import collect_references, describe
        from refalign.shards.reader import ShardIndex

        index = ShardIndex.open(Path(work.shards), work.split)
        references = collect_references(index, self.config.evaluation.separability_subjects, _PICTURES_PER_SUBJECT)
        if references is None:
            return None
        transformer = self.maker.open(work.model).transformer
        block = min(self.config.objective.alignment_blocks, len(transformer.blocks)) - 1
        max_text_tokens = self.config.models.max_text_tokens
        return describe(transformer, references, index, max_text_tokens=max_text_tokens, picture_block=block)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), _EMBED_BATCH)
        return np.concatenate([self.vision.embed(images[start : start + _EMBED_BATCH]).cpu().numpy() for start in starts])

    def _embed_picture(self, path: Path) -> np.ndarray:
        if path.name not in self._embeddings:
            side_px = self.config.curation.embedding_px
            self._embeddings[path.name] = self._embed(letterbox(read_image(path), side_px, side_px)[0][None])[0]
        return self._embeddings[path.name]


def plan_videos(samples: Sequence[ChosenSample], models: Mapping[str, Model]) -> dict[str, VideoWork]:
    """Work by part name; ``models`` are by label. All videos of one model come together, so that a worker loads it once."""
    own = {sample.key: [Path(reference.file).name for reference in sample.references] for sample in samples}
    plan = {}
    for label, model in models.items():
        for sample in samples:
            # Clips of one source may show one subject.
            other = [name for each in samples if each.source_group != sample.source_group for name in own[each.key]]
            pictures = Pictures(own=own[sample.key], other=other, targets=sample.targets)
            plan[name_video(label, sample.key)] = VideoWork(label, model, sample.prompt, sample.seed, pictures)
    return plan


def write_pictures(step: Step, sample: ChosenSample) -> None:
    """Writes the pictures of a sample as parts."""
    for name, data in sample.pngs.items():
        decode_image(data, name)  # a damaged picture is found before hours of generation
        if step.load_part(name) is None:
            commit_part(step, name, lambda path, data=data: path.write_bytes(data), {})


def name_video(label: str, key: str) -> str:
    return f"{label}-{key}.mp4"


def commit_part(step: Step, name: str, write: Callable[[Path], object], commit: dict[str, Any]) -> dict[str, Any]:
    """Writes a part with ``write`` and commits it with ``commit``; returns the whole commit."""

    def write_and_tell(path: Path) -> dict[str, Any]:
        write(path)
        return commit

    return step.write_part(name, write_and_tell)
