"""Training samples of the toy's Transformers: scenes and references, drawn and encoded once, and kept in files.

The recipe's shards hold the same things. Drawing the samples directly spares videos, detection and pairing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from refalign.curation.masks import cut_out
from refalign.geometry import letterbox
from refalign.models.dinov3 import VisionEncoder
from refalign.models.vae import VideoVAE
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX, Pose
from refalign.toy.rendering import boxes_of, draw_subjects, render_references, render_scenes
from refalign.toy.scenes import HOLD, NUM_DRAWINGS, ScenePlan, make_caption, make_scene, paint_place
from workshop.weights.initial_weights import make_tokenizer
from workshop.weights.sampling import sample_pose

CAPTION_TOKENS = 40
"""The longest caption, three named walkers in a named place, has 34."""
SAME_ACTION_SHARE, CUT_OUT_SHARE = 0.3, 0.5
"""Shares of the references: those that show the clip's own action; those cut out of a frame as curation does, not drawn alone."""
_CHUNK = 64


@dataclass(frozen=True)
class Pool:
    """N encoded samples, sorted by their number M = 1, 2, 3 of subjects."""

    first: tuple[int, ...]  # index of the first sample of each M, and N
    latents: Tensor  # float16 [N, Z, T, h, w]
    reference_latents: tuple[Tensor, ...]  # per M, float16 [N_M, M, Z, h, w]
    targets: tuple[Tensor, ...]  # per M, float16 [N_M, M, P, E]
    tokens: Tensor  # of the captions, int64 [N, L]


def load_or_make_pool(folder: Path, weights: Path, counts: tuple[int, int, int], *, drawings: int, seed: int) -> Pool:
    """The pool of ``folder``, made there if it is missing.

    Args:
        counts: samples with one, two and three subjects.
        drawings: 1 for single frames, ``NUM_DRAWINGS`` for clips.
    """
    parts = []
    for size, count in enumerate(counts, 1):
        file = folder / f"{drawings}-{size}.safetensors"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_make(weights, count, size, drawings, seed), file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        parts.append(load_file(file))
    return Pool(
        tuple(np.cumsum([0, *(len(part["latents"]) for part in parts)]).tolist()),
        torch.cat([part["latents"] for part in parts]),
        tuple(part["reference_latents"] for part in parts),
        tuple(part["targets"] for part in parts),
        torch.cat([part["tokens"] for part in parts]),
    )


def encode_captions(captions: list[str]) -> Tensor:
    """Token ids [N, ``CAPTION_TOKENS``], padded."""
    tokens = make_tokenizer()(captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt").input_ids
    assert tokens.shape[1] == CAPTION_TOKENS
    return tokens


def _make(weights: Path, count: int, size: int, drawings: int, seed: int) -> dict[str, Tensor]:
    vae = VideoVAE.from_pretrained(str(weights / "wan"))
    vision = VisionEncoder.from_pretrained(str(weights / "dinov3"))
    parts: dict[str, list[Tensor]] = {name: [] for name in ("latents", "reference_latents", "targets", "tokens")}
    for start in range(0, count, _CHUNK):
        plans = [make_scene([seed, size, number], num_subjects=size) for number in range(start, min(start + _CHUNK, count))]
        frames = torch.from_numpy(np.stack([shot.frames for shot in render_scenes(plans, drawings)]))
        pictures = torch.from_numpy(draw_references(plans, np.random.default_rng([seed, size, start, 9])))
        # The frames that share a latent frame are alike, so that it is the latent of one picture.
        stills = frames[:, [0, *range(1, frames.shape[1], HOLD)]].flatten(0, 1)
        latents = vae.encode_images(stills).unflatten(0, (len(plans), drawings)).transpose(1, 2)
        parts["latents"].append(latents.half())
        parts["reference_latents"].append(vae.encode_images(pictures).unflatten(0, (len(plans), size)).half())
        parts["targets"].append(vision.encode(pictures).unflatten(0, (len(plans), size)).half())
        parts["tokens"].append(encode_captions([make_caption(plan) for plan in plans]))
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}


def draw_references(plans: list[ScenePlan], rng: np.random.Generator) -> np.ndarray:
    """One picture of each subject of each plan: uint8 [subjects of all plans, H, W, 3]."""
    subjects = [subject for plan in plans for subject in plan.subjects]
    poses = [
        subject.pose(int(rng.integers(NUM_DRAWINGS))) if rng.random() < SAME_ACTION_SHARE else sample_pose(rng)
        for subject in subjects
    ]
    pictures = render_references([subject.identity for subject in subjects], poses, rng)
    for number in np.flatnonzero(rng.random(len(subjects)) < CUT_OUT_SHARE):
        pictures[number] = _cut_out(subjects[number].identity, poses[number], rng)
    return pictures


def _cut_out(identity: int, pose: Pose, rng: np.random.Generator) -> np.ndarray:
    """The creature cut out of a frame with a slightly wrong mask, and letterboxed."""
    plan = make_scene(int(rng.integers(2**31)), cast=[identity])
    figure = draw_subjects([plan], 1, poses=[pose])
    frame = figure.over(paint_place(plan)[None])[0].round().astype(np.uint8)
    mask = figure.alpha[0] >= rng.uniform(0.3, 0.7)
    if rng.random() < 0.3:
        mask = np.roll(mask, int(rng.integers(-1, 2)), int(rng.integers(2)))
    crop = Image.fromarray(cut_out(frame, mask, boxes_of(mask).tolist(), (FRAME_HEIGHT_PX, FRAME_WIDTH_PX)))
    return letterbox(crop, FRAME_HEIGHT_PX, FRAME_WIDTH_PX)[0]
