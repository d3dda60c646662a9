"""A clip's caption, and who wrote it: the source that it came from, or a vision-language model that looked at its frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refalign.config import ModelsConfig, RunConfig

_CAPTION_NEEDED: dict[str, Callable[[str], bool]] = {
    "source": lambda said: False,
    "missing": lambda said: not said,
    "all": lambda said: True,
}


def choose_caption(said: str, frames: Sequence[np.ndarray], load: Callable[[], Any], config: RunConfig) -> tuple[str, str]:
    """The caption and its origin: ``source``, ``model:<id>@<digest>``, or ``none`` where the caption is empty.

    Args:
        said: what the source says of the clip; may be empty.
        frames: uint8 [H, W, 3] each, in order of time.
        load: gives the captioner; called only when one is needed.
    """
    said = said.strip()
    if not _CAPTION_NEEDED[config.curation.caption](said):
        return said, "source" if said else "none"
    captioner = load()
    written = captioner.caption(np.stack(frames), config.curation.caption_prompt, config.curation.max_caption_tokens)
    return written, f"model:{captioner.name}" if written else "none"


def load_captioner(models: ModelsConfig, device: str) -> Any:
    """The captioner that the settings name."""
    from refalign.models.captioner import Captioner

    assert models.captioner is not None, "the config refuses a run that needs a captioner and names none"
    return Captioner.from_pretrained(
        models.captioner, revision=models.captioner_revision, device=device, dtype=models.encoder_dtype
    )
