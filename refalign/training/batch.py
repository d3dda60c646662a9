"""From positions in the run to batches: what is drawn for each sample, which samples share a forward pass, the tensors.

Everything random about a sample (dropout, noise level, noise, choice of references) is a function of (seed, position), so
that neither resuming nor another number of ranks changes it. Dropout comes before bucketing: a bucket holds samples of one
latent shape and one number of attended reference frames, so that no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, groupby

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from refalign.config import ObjectiveConfig, RunConfig, StageConfig, TrainingConfig
from refalign.errors import SchemaError
from refalign.io.images import decode_image
from refalign.models.text import pad_prompt_embeds
from refalign.shards.mixture import Mixture, make_order
from refalign.shards.reader import SampleOrder, ShardIndex, random_words
from refalign.shards.sample import (
    FRAME_TOKENS,
    PICTURE_SIZES,
    TARGETS,
    ReferenceInfo,
    Sample,
    has_targets,
    unpack_pictures,
    unpack_tokens,
)
from refalign.training.optim import locate_step

NUM_TIMESTEPS = 1000
"""Noise levels of the training schedule; one is drawn per sample."""
TOKEN_WEIGHTS = {"padding": "content", "foreground": "foreground"}
"""``objective.token_weight`` -> the tensor of a sample that holds it."""
_MAX_SUBJECTS = 8  # words set aside per sample for the choice of references


@dataclass(frozen=True)
class Batch:
    """One forward pass: samples of equal shape with equally many attended reference frames.

    A sample without references attends to one zero frame, as published, which is not scored: its ``alignment_mask`` is False.
    """

    latents: Float[Tensor, "B Z T h w"]
    noise: Float[Tensor, "B Z T h w"]
    timestep_index: Int[Tensor, "B"]
    prompt_embeds: Float[Tensor, "B L D"]
    reference_latents: Float[Tensor, "B K Z h w"]
    alignment_mask: Bool[Tensor, "B K"]
    subject_index: Int[Tensor, "B K"]
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    target_tokens: Float[Tensor, "B K P E"] | None = None  # None: none in the shards
    reference_pixels: UInt8[Tensor, "B K H W 3"] | None = None  # what targets are computed from, where they are
    token_weight: Float[Tensor, "B K P"] | None = None  # None: all tokens alike
    frame_tokens: Float[Tensor, "B T P E"] | None = None  # under REPA only

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Draw:
    """Everything random about one sample at one position."""

    timestep_index: int
    keep_text: bool
    keep_references: bool
    choices: tuple[tuple[float, float], ...]  # per subject, in [0, 1): cross pair or in pair; which of them
    noise_seed: int


@dataclass(frozen=True)
class Planned:
    """A sample of a step before it is read: where it is and what was drawn for it."""

    position: int
    index: int
    draw: Draw
    bucket: tuple[int, ...]  # Z T h w and the number of attended reference frames


@dataclass(frozen=True)
class BatchMaker:
    """Makes the batches of one rank; equal on every rank but for ``rank``."""

    index: ShardIndex
    config: RunConfig
    rank: int = 0
    num_ranks: int = 1

    @cached_property
    def null_prompt(self) -> Tensor | None:
        """What a dropped text becomes; None: no tokens."""
        return self.index.load_null_prompt()

    @cached_property
    def order(self) -> SampleOrder | Mixture:
        return make_order(self.index, self.config.training.mixture, self.config.seed)

    def make_step(self, step: int) -> list[Batch]:
        """This rank's batches of optimizer step ``step`` (from 1); every rank has the same number of them."""
        training = self.config.training
        places = self.order.global_batch((step - 1) * training.global_batch, training.global_batch)
        draws = [make_draw(self.config.seed, position, training) for position, _ in places]
        return self._make(places, draws, locate_step(training, step).stage)

    def make_validation(self) -> list[Batch]:
        """This rank's part of the fixed validation batch: the first samples, noise levels spread over the schedule."""
        training = self.config.training
        samples = count_validation_samples(self.index, training, self.num_ranks)
        places = [(number, number % len(self.index)) for number in range(samples)]
        draws = [make_validation_draw(self.config.seed, number, samples, training) for number in range(samples)]
        stage = training.stages[-1].model_copy(update={"cross_pair_fraction": 0.0})
        return self._make(places, draws, stage)

    def _make(self, places: list[tuple[int, int]], draws: list[Draw], stage: StageConfig) -> list[Batch]:
        planned = [
            Planned(position, index, draw, _bucket_of(self.index, index, draw, stage))
            for (position, index), draw in zip(places, draws, strict=True)
        ]
        groups = plan_forwards(planned, self.num_ranks, self.config.training.micro_batch)[self.rank]
        return [self._read(group, stage) for group in groups]

    def _read(self, group: Sequence[Planned], stage: StageConfig) -> Batch:
        parts, prompts = [], []
        objective, max_text_tokens = self.config.objective, self.config.models.max_text_tokens
        samples = self.index.read_many([item.index for item in group])
        for item, sample in zip(group, samples, strict=True):
            prompt_embeds = sample.tensors["prompt_embeds"]
            if not item.draw.keep_text:
                prompt_embeds = prompt_embeds[:0] if self.null_prompt is None else self.null_prompt
            prompts.append(prompt_embeds[:max_text_tokens].float())
            video = _video_part(sample, item.draw, objective, stage.latent_frames)
            parts.append(video | _reference_part(sample, item.draw, stage, objective))
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return Batch(
            **stacked,
            prompt_embeds=pad_prompt_embeds(prompts, max_text_tokens),  # zeros are what Wan attends to where a prompt is short
            keys=tuple(self.index.entries[item.index].key for item in group),
            positions=tuple(item.position for item in group),
        )


def count_validation_samples(index: ShardIndex, training: TrainingConfig, num_ranks: int) -> int:
    """Samples of a validation: as configured, at most all, then rounded up to a multiple of the ranks by repeating some."""
    if not len(index):
        return 0
    wanted = min(training.validation.samples, len(index))
    return -(-wanted // num_ranks) * num_ranks


def make_draw(seed: int, position: int, training: TrainingConfig) -> Draw:
    """What is drawn for the sample at ``position``.

    One uniform r decides the dropout: text below ``dropout.text``, references in the next ``drop_references``, both in the
    next ``dropout.both``.
    """
    words = random_words(seed, "draw", position, 3 + 2 * _MAX_SUBJECTS)
    r, level, *choices = ((int(word) >> 11) * 2.0**-53 for word in words[1:])
    dropout = training.dropout
    text_end, references_end, both_end = accumulate((dropout.text, dropout.references, dropout.both))
    return Draw(
        timestep_index=int(level * NUM_TIMESTEPS),
        keep_text=not (r < text_end or references_end <= r < both_end),
        keep_references=not text_end <= r < both_end,
        choices=tuple(zip(choices[0::2], choices[1::2], strict=True)),
        noise_seed=int(words[0]) >> 1,
    )


def make_validation_draw(seed: int, number: int, count: int, training: TrainingConfig) -> Draw:
    """Nothing dropped, first reference of each subject, noise level at the middle of the ``number``-th of ``count`` parts.

    References are dropped if training always drops them.
    """
    return Draw(
        timestep_index=int((number + 0.5) / count * NUM_TIMESTEPS),
        keep_text=True,
        keep_references=training.dropout.references + training.dropout.both < 1,
        choices=((1.0, 0.0),) * _MAX_SUBJECTS,
        noise_seed=int(random_words(seed, "validate", number, 1)[0]) >> 1,
    )


def plan_forwards(planned: Sequence[Planned], num_ranks: int, micro_batch: int) -> list[list[list[Planned]]]:
    """Deals a global batch to ranks and cuts each share into forward passes of one bucket.

    Samples are sorted by bucket before each rank takes its slice, so that a slice has few buckets. FSDP's collectives need
    equally many forward passes on every rank: a rank with fewer splits its largest one, which is possible because all ranks
    have equally many samples.

    Returns:
        per rank, the forward passes, each a list of at most ``micro_batch`` samples.
    """
    ordered = sorted(planned, key=lambda item: (item.bucket, item.position))
    share = len(ordered) // num_ranks
    ranks = []
    for rank in range(num_ranks):
        groups: list[list[Planned]] = []
        for _, members in groupby(ordered[rank * share : (rank + 1) * share], key=lambda item: item.bucket):
            same = list(members)
            groups += [same[start : start + micro_batch] for start in range(0, len(same), micro_batch)]
        ranks.append(groups)
    rounds = max(len(groups) for groups in ranks)
    for groups in ranks:
        while len(groups) < rounds:
            largest = max(range(len(groups)), key=lambda number: len(groups[number]))
            whole = groups[largest]
            groups[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return ranks


def choose_references(
    references: Sequence[ReferenceInfo], choices: Sequence[tuple[float, float]], cross_pair_fraction: float
) -> list[int]:
    """One reference per subject, in the order of the subjects.

    Args:
        references: the sample's JSON entries, aligned with its R axis.
        choices: per subject two numbers in [0, 1]: the first, if below ``cross_pair_fraction``, asks for a reference from
            another clip; the second picks one of that kind.
        cross_pair_fraction: chance of a cross pair where one exists.

    Returns:
        positions on the R axis.
    """
    chosen = []
    for subject in sorted({reference["subject_index"] for reference in references}):
        by_kind: dict[str, list[int]] = {"cross_pair": [], "in_pair": []}
        for number, reference in enumerate(references):
            if reference["subject_index"] == subject:
                by_kind[reference["kind"]].append(number)
        wants_cross, which = choices[subject]
        first, second = ("cross_pair", "in_pair") if wants_cross < cross_pair_fraction else ("in_pair", "cross_pair")
        candidates = by_kind[first] or by_kind[second]
        chosen.append(candidates[int(which * len(candidates))])
    return chosen


def _bucket_of(index: ShardIndex, number: int, draw: Draw, stage: StageConfig) -> tuple[int, ...]:
    entry = index.entries[number]
    channels, frames, height, width = entry.shape
    subjects = max(1, entry.subjects) if draw.keep_references else 1
    return channels, min(frames, stage.latent_frames or frames), height, width, subjects


def _video_part(sample: Sample, draw: Draw, objective: ObjectiveConfig, latent_frames: int | None) -> dict[str, Tensor]:
    latents = sample.tensors["latents"][:, :latent_frames].float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(draw.noise_seed))
    part = {"latents": latents, "noise": noise, "timestep_index": torch.tensor(draw.timestep_index)}
    if objective.alignment == "repa":
        part[FRAME_TOKENS] = unpack_tokens(sample.tensors, FRAME_TOKENS)[:latent_frames]
    return part


def _reference_part(sample: Sample, draw: Draw, stage: StageConfig, objective: ObjectiveConfig) -> dict[str, Tensor]:
    tensors = sample.tensors
    chosen = []
    if draw.keep_references:
        chosen = choose_references(sample.info["references"], draw.choices, stage.cross_pair_fraction)
    part = {
        "reference_latents": tensors["reference_latents"][chosen].float(),
        "alignment_mask": torch.ones(len(chosen), dtype=torch.bool),
        "subject_index": torch.tensor([sample.info["references"][number]["subject_index"] for number in chosen]).long(),
    }
    if has_targets(tensors):
        part[TARGETS] = unpack_tokens(tensors, TARGETS, chosen)
    elif objective.alignment == "reference_alignment":
        part["reference_pixels"] = _decode_pictures(sample, chosen)
    if weight := TOKEN_WEIGHTS.get(objective.token_weight):
        part["token_weight"] = tensors[weight][chosen].float()
    if chosen:
        return part
    return {name: tensor.new_zeros(1, *tensor.shape[1:]) for name, tensor in part.items()}


def _decode_pictures(sample: Sample, chosen: list[int]) -> UInt8[Tensor, "K H W 3"]:
    """Pictures of the ``chosen`` references; with none chosen, an empty array of the size of the sample's first one."""
    if not len(sample.tensors[PICTURE_SIZES]):
        raise SchemaError(f"sample {sample.key}: no reference to tell the size of pictures; run the shards step again.")
    files = unpack_pictures(sample.tensors, chosen or [0])
    pictures = [decode_image(file, f"a reference of sample {sample.key}") for file in files]
    return torch.from_numpy(np.stack(pictures))[: len(chosen)]
