"""The judge's verdict on an evaluated video: the attributes that each creature should have, and those it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from PIL import Image

from refalign.geometry import letterbox
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.identities import ATTRIBUTE_NAMES, identity_of
from refalign.toy.judge import read_clip, read_reference
from refalign.toy.scenes import Side, parse_caption


class CreatureVerdict(TypedDict):
    """``{"name": "on the left", "attributes": {"pattern": {"wanted": "belt", "shown": "belly"}, ...}}``"""

    name: Side
    attributes: dict[str, dict[str, str | None]]


def judge_video(frames: np.ndarray, prompt: str, references: Sequence[Image.Image | np.ndarray]) -> list[CreatureVerdict] | None:
    """One entry per creature of the prompt: its side, and per attribute what is wanted and what is shown.

    Args:
        frames: uint8 [F, H, W, 3].
        references: in the order of the prompt's creatures, from left to right.

    Returns:
        None if the prompt or the frame size is not the toy world's, or references are missing or show no creature.
    """
    asked = parse_caption(prompt)
    given = [read_reference(letterbox(reference, FRAME_HEIGHT_PX, FRAME_WIDTH_PX)[0]) for reference in references]
    looks = [each.look for each in given if each]
    if not asked or not len(asked) == len(given) == len(looks) or frames.shape[1:3] != (FRAME_HEIGHT_PX, FRAME_WIDTH_PX):
        return None
    cast = [identity_of(look) for look in looks]
    seen = read_clip(frames, {each.side: [own, *cast] for each, own in zip(asked, cast, strict=True)})
    verdict: list[CreatureVerdict] = []
    for each, look in zip(asked, looks, strict=True):
        wanted = {name: getattr(look, name) for name in ATTRIBUTE_NAMES} | {"action": each.action}
        reading = seen[each.side]
        shown = {name: reading.answers[name] if reading else None for name in wanted}
        attributes = {name: {"wanted": value, "shown": shown[name]} for name, value in wanted.items()}
        verdict.append({"name": each.side, "attributes": attributes})
    return verdict
