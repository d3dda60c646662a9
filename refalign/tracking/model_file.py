"""The registered model's code (MLflow "models from code"): rows of prompts and references in, H.264 videos out.

MLflow copies this file beside the exported weights and runs it again wherever the model is loaded or served; nothing is
pickled. A row has ``prompt`` and may have ``references`` (base64 PNG or JPEG: a list, or one string), ``seed``,
``num_frames``, ``height`` and ``width``; params may change the guidance. The answer has ``video``: base64 mp4.
"""

from __future__ import annotations

import base64
import binascii
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from refalign.errors import DataError
from refalign.pictures import decode_image, write_mp4

EXPORT = "export"
"""Name of the artifact that holds the diffusers folder."""
_MAX_TIMES_LARGER = 4
"""A row may ask for so many times the pixels that the model was exported for: attention grows with their square."""
_MAX_STEPS = 1000


class ReferenceToVideoModel(PythonModel):
    """`refalign.generation.RefAlignPipeline` behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Loads the exported folder; needs neither projectors nor a vision encoder."""
        from refalign.generation import RefAlignPipeline

        self.defaults = dict(context.model_config)
        self.pipeline = RefAlignPipeline.from_pretrained(context.artifacts[EXPORT])
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One video per row; equal rows with equal seeds give equal videos.

        Raises:
            DataError: a reference is no base64 picture, or a row asks for far more than the model was made for.
        """
        settings = {**self.defaults, **{name: value for name, value in (params or {}).items() if value is not None}}
        rows = model_input.to_dict("records")
        return pd.DataFrame({"video": [self._make_video(row, settings) for row in rows]})

    def _make_video(self, row: dict[str, Any], settings: dict[str, Any]) -> str:
        import torch

        given = {name: value for name, value in row.items() if not _is_missing(value)}
        size = {name: int(given.get(name, self.defaults[name])) for name in ("num_frames", "height", "width")}
        steps = int(settings["num_inference_steps"])
        _check_size(size, {name: self.defaults[name] for name in size}, steps)
        frames = self.pipeline(
            prompt=given["prompt"],
            references=decode_references(given.get("references", [])),
            num_frames=size["num_frames"],
            height=size["height"],
            width=size["width"],
            num_inference_steps=steps,
            guidance_scale=float(settings["guidance_scale"]),
            reference_guidance_scale=float(settings["reference_guidance_scale"]),
            negative_prompt=settings["negative_prompt"],
            generator=torch.Generator().manual_seed(int(given.get("seed", 0))),
            output_type="uint8",
        ).frames[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            write_mp4(path, frames.numpy(), float(settings["fps"]))
            return base64.b64encode(path.read_bytes()).decode()


def decode_references(references: str | list[str] | np.ndarray) -> list[np.ndarray]:
    """Pictures of base64 text: a list of them, or one string.

    Raises:
        DataError: the text is not base64, or not a picture.
    """
    texts = [references] if isinstance(references, str) else list(references)
    pictures = []
    for number, text in enumerate(texts):
        where = f"references[{number}]"
        try:
            data = base64.b64decode(str(text).rpartition(",")[2], validate=True)  # a data URI's header ends with a comma
        except binascii.Error as error:
            raise DataError("UNREADABLE", f"{where}: not base64 ({error}); send the bytes of a PNG or JPEG as base64.") from error
        pictures.append(decode_image(data, where))
    return pictures


def _check_size(asked: dict[str, int], usual: dict[str, int], steps: int) -> None:
    if math.prod(asked.values()) > _MAX_TIMES_LARGER * math.prod(usual.values()) or min(asked.values()) < 1:
        raise DataError("TOO_LARGE", f"{asked}: expected at the most {_MAX_TIMES_LARGER} times the pixels of {usual}.")
    if not 0 < steps <= _MAX_STEPS:
        raise DataError("TOO_LARGE", f"num_inference_steps={steps}: expected 1 to {_MAX_STEPS}.")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


set_model(ReferenceToVideoModel())
