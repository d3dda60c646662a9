"""Captions from frames: any vision-language model that transformers opens as image-text-to-text (Qwen2.5-VL and its kin)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from refalign.errors import ArtifactError
from refalign.models.loading import identify_model, load_pretrained


class Captioner:
    """A frozen vision-language model that describes clips greedily, so that equal clips get equal captions.

    ``name``, ``<id>@<digest>``, is recorded as a caption's origin.
    """

    def __init__(self, processor: Any, model: Any, name: str) -> None:
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        self.name = name

    @classmethod
    def from_pretrained(
        cls, source: str, *, revision: str | None = None, device: torch.device | str = "cpu", dtype: str = "float32"
    ) -> Captioner:
        """Loads a folder or a hub id; an `ArtifactError` if it is incomplete, or its processor has no chat template."""
        processor = load_pretrained(AutoProcessor, source, revision=revision)
        if not getattr(processor, "chat_template", None):
            raise ArtifactError(f"{source}: has no chat template, so it cannot be asked; give an instruction-tuned model.")
        model = load_pretrained(AutoModelForImageTextToText, source, revision=revision, dtype=getattr(torch, dtype))
        path = Path(source).expanduser()
        name = f"{path.resolve().name}@{identify_model(source)}" if path.exists() else f"{source}@{revision or 'main'}"
        return cls(processor, model.to(device), name)

    @torch.no_grad()
    def caption(self, frames: UInt8[np.ndarray, "F H W 3"], prompt: str, max_tokens: int = 96) -> str:
        """What the model answers to ``prompt`` about frames in order of time; white space collapsed, no control characters."""
        pictures = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        # The folder may bring settings of sampling, which greedy search would warn about.
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        answer = self.model.generate(**inputs, max_new_tokens=max_tokens, **greedy)
        (text,) = self.processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
