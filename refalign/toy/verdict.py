"""The judge's verdict on an evaluated video: which attributes of each creature are as its reference and the prompt ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from refalign.geometry import letterbox
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.identities import ATTRIBUTE_NAMES, identity_of
from refalign.toy.judge import read_clip, read_reference
from refalign.toy.scenes import parse_caption


def judge_video(frames: np.ndarray, prompt: str, references: Sequence[Image.Image | np.ndarray]) -> list[dict[str, Any]] | None:
    """One entry per creature of the prompt: its name, and per attribute what is wanted and what is shown.

    Args:
        frames: uint8 [F, H, W, 3].
        references: from left to right, as the prompt goes through its creatures.

    Returns:
        ``[{"name": "on the left", "attributes": {"pattern": {"wanted": "belt", "shown": "belly"}, ...}}, ...]``; None where the
        prompt is not one of the toy world's, or references are missing or show no creature.
    """
    asked = parse_caption(prompt)
    pictures = [letterbox(reference, FRAME_HEIGHT_PX, FRAME_WIDTH_PX)[0] for reference in references]
    given = [read_reference(picture) for picture in pictures]
    if not asked or len(asked) != len(given) or any(each is None for each in given):
        return None
    if frames.shape[1:3] != (FRAME_HEIGHT_PX, FRAME_WIDTH_PX):
        return None
    looks = [each.look for each in given if each]
    cast = [identity_of(look) for look in looks]
    seen = read_clip(frames, {each.side: [own, *cast] for each, own in zip(asked, cast, strict=True)})
    verdict = []
    for each, look in zip(asked, looks, strict=True):
        wanted = {name: getattr(look, name) for name in ATTRIBUTE_NAMES} | {"action": each.action}
        reading = seen[each.side]
        shown = {name: reading.answers[name] if reading else None for name in wanted}
        attributes = {name: {"wanted": wanted[name], "shown": shown[name]} for name in wanted}
        verdict.append({"name": each.side, "attributes": attributes})
    return verdict
