"""Writes the toy world to files: H.264 videos, each with a JSON that holds caption, licence and ground truth.

Videos come in channels, as on a video site. A channel's cast recurs over its videos in other poses, places and company, so that
pairs can be found across clips. No identity belongs to two channels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from refalign.errors import ConfigError
from refalign.io.images import write_mp4
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.identities import Split, attributes_of, sample_companion, sample_identity
from refalign.toy.rendering import RenderedScene, render_scenes
from refalign.toy.scenes import FPS, NUM_FRAMES, PLACES, ScenePlan, caption_tier, make_caption, make_scene, subject_phrase

VIDEOS_PER_CHANNEL = 6
TWO_SHOT_SHARE = 1 / 6
"""Share of videos with a hard cut to a second scene."""
_QUALITY_CRF = 12
LICENSE = "CC0-1.0"
CONSENT = "synthetic"


@dataclass(frozen=True)
class VideoPlan:
    """One video."""

    name: str  # without suffix
    source_group: str  # its channel
    shots: tuple[ScenePlan, ...]  # one or two


def plan_world(num_videos: int, seed: int, split: Split = "train") -> list[VideoPlan]:
    """Plans ``num_videos`` videos; a longer world begins with the shorter one of the same seed."""
    if num_videos < 1:
        raise ConfigError(f"num_videos = {num_videos}; expected at least 1.")
    plans: list[VideoPlan] = []
    taken: set[int] = set()
    casts: list[list[int]] = []
    for index in range(num_videos):
        channel, number = divmod(index, VIDEOS_PER_CHANNEL)
        if number == 0:
            casts.append(_channel_cast(np.random.default_rng([seed, channel, 0]), split, taken))
        rng = np.random.default_rng([seed, channel, 1 + number])
        shots = 2 if rng.random() < TWO_SHOT_SHARE else 1
        scenes = [_channel_scene(rng, casts[channel], number + shot) for shot in range(shots)]
        if shots == 2 and scenes[1].place == scenes[0].place:  # a cut is seen by its change of place
            places = list(PLACES)
            scenes[1] = replace(scenes[1], place=places[(places.index(scenes[0].place) + 1) % len(places)])
        group = f"{split}-{seed}-{channel:03d}"
        plans.append(VideoPlan(f"{group}-{number}", group, tuple(scenes)))
    return plans


def _channel_cast(rng: np.random.Generator, split: Split, taken: set[int]) -> list[int]:
    """Three or four identities: the second unlike the first, the third of its shape and colour, a fourth of its shape."""
    first = sample_identity(rng, split, taken=taken)
    cast = [first]
    for likeness in ("unlike", "same shape and colour", "same shape")[: int(rng.integers(2, 4))]:
        cast.append(sample_companion(rng, first, likeness, split, taken={*taken, *cast}))
    taken.update(cast)
    return cast


def _channel_scene(rng: np.random.Generator, cast: list[int], turn: int) -> ScenePlan:
    """A scene with some of the cast; member ``turn`` (modulo its size) is always there, so that everyone recurs."""
    size = int(rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2]))
    lead = turn % len(cast)
    others = rng.permutation([member for member in range(len(cast)) if member != lead])[: size - 1]
    members = [cast[lead], *(cast[int(other)] for other in others)]
    return make_scene(int(rng.integers(2**31)), cast=members)


def write_world(folder: str | Path, *, num_videos: int, seed: int, split: Split = "train") -> None:
    """Writes ``<name>.mp4`` and ``<name>.json`` for every planned video; the same arguments give the same bytes."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for plan in plan_world(num_videos, seed, split):
        shots = render_scenes(plan.shots)
        frames = np.concatenate([shot.frames for shot in shots])
        write_mp4(target / f"{plan.name}.mp4", frames, FPS, quality_crf=_QUALITY_CRF)
        captions = [make_caption(shot) for shot in plan.shots]
        length_s = NUM_FRAMES / FPS
        sidecar = {
            "caption": " ".join(captions),
            "shots": [
                {"start_s": number * length_s, "end_s": (number + 1) * length_s, "caption": caption}
                for number, caption in enumerate(captions)
            ],
            "license": LICENSE,
            "consent": CONSENT,
            "source_group": plan.source_group,
            "ground_truth": _ground_truth(shots, split),
        }
        (target / f"{plan.name}.json").write_text(json.dumps(sidecar, separators=(",", ":")) + "\n")


def _ground_truth(shots: list[RenderedScene], split: Split) -> dict[str, object]:
    """Everything known about a video, as JSON values; boxes xyxy half-open px."""
    records = [
        {
            "first_frame": number * NUM_FRAMES,
            "num_frames": NUM_FRAMES,
            "caption": make_caption(shot.plan),
            "caption_tier": caption_tier(shot.plan),
            "place": shot.plan.place,
            "likeness": shot.plan.likeness,
            "subjects": [_subject_truth(shot, subject) for subject in range(len(shot.plan.subjects))],
        }
        for number, shot in enumerate(shots)
    ]
    return {"split": split, "height_px": FRAME_HEIGHT_PX, "width_px": FRAME_WIDTH_PX, "fps": FPS, "shots": records}


def _subject_truth(shot: RenderedScene, number: int) -> dict[str, object]:
    subject = shot.plan.subjects[number]
    return {
        "identity": subject.identity,
        "attributes": asdict(attributes_of(subject.identity)),
        "side": subject.side,
        "action": subject.action,
        "named": subject.named,
        "phrase": subject_phrase(subject.identity, named=subject.named),
        "boxes_xyxy_px": shot.boxes_xyxy_px[number].tolist(),
        "visible_fraction": [round(float(value), 3) for value in shot.visible_fraction[number]],
    }
