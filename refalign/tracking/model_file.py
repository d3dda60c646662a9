"""The registered model's code (MLflow "models from code"): rows of prompts and references in, H.264 videos out.

MLflow copies this file beside the exported weights and runs it wherever the model is loaded or served; nothing is pickled. A row
has ``prompt``. It may have ``references`` (base64 pictures: a list, or one string), ``seed``, and the settings of
`refalign.generation.settings`; ``params`` may hold settings for all rows. The answer has ``video``: base64 mp4.
"""

from __future__ import annotations

import base64
import binascii
import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import REQUEST_LIMIT_EXCEEDED
from mlflow.pyfunc import PythonModel, PythonModelContext

from refalign.errors import ConfigError, DataError, RefAlignError
from refalign.generation.settings import FACTS, GenerationSettings, check_seed
from refalign.io.images import decode_image, write_mp4

EXPORT = "export"
"""Name of the artifact that holds the diffusers folder."""
MAX_ROWS, MAX_REQUESTS = 16, 8
"""Rows of one request; requests in work or waiting at one time."""
_MAX_TIMES_LARGER = 4
"""A row may ask for this many times the pixels that the model was exported for: attention grows with their square."""


Rows = pd.DataFrame | Mapping[str, object] | Sequence[object]


class Request(NamedTuple):
    """One video to make; references are ``uint8 [H, W, 3]``."""

    prompt: str
    references: list[np.ndarray]
    seed: int
    settings: GenerationSettings


class ReferenceToVideoModel(PythonModel):
    """`refalign.generation.pipeline.RefAlignPipeline` behind MLflow's interface."""

    def __init__(self) -> None:
        self.places = threading.BoundedSemaphore(MAX_REQUESTS)

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the exported folder; needs neither projectors nor a vision encoder."""
        from refalign.generation.pipeline import RefAlignPipeline

        self.defaults = GenerationSettings.model_validate(dict(context.model_config))
        self.pipeline = RefAlignPipeline.from_pretrained(context.artifacts[EXPORT])
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, context, model_input, params=None):  # MLflow would read a schema from annotations
        """One video per row; equal rows with equal seeds give equal videos. All rows are checked before the first video.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE for a bad row or parameter; REQUEST_LIMIT_EXCEEDED for too many requests.
        """
        if not self.places.acquire(blocking=False):
            raise MlflowException(f"{MAX_REQUESTS} requests are in work or wait; try again later.", REQUEST_LIMIT_EXCEEDED)
        try:
            requests = parse_rows(model_input, params or {}, self.defaults)
            return pd.DataFrame({"video": [self._make_video(request) for request in requests]})
        except RefAlignError as error:  # a server answers an error of MLflow without a traceback
            raise MlflowException.invalid_parameter_value(str(error)) from None
        finally:
            self.places.release()

    def _make_video(self, request: Request) -> str:
        import torch

        frames = self.pipeline(
            prompt=request.prompt,
            references=request.references,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="uint8",
            **request.settings.model_dump(exclude={"fps", *FACTS}),
        ).frames[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            write_mp4(path, frames.numpy(), request.settings.fps)
            return base64.b64encode(path.read_bytes()).decode()


def parse_rows(model_input: Rows, params: Mapping[str, object], defaults: GenerationSettings) -> list[Request]:
    """One request per row of a data frame, a list of mappings, or one mapping. A missing value is None or NaN.

    Raises:
        ConfigError, DataError: what is wrong with the first row that has a fault.
    """
    rows = model_input.to_dict("records") if isinstance(model_input, pd.DataFrame) else model_input
    rows = [rows] if isinstance(rows, Mapping) else list(rows)
    if not 1 <= len(rows) <= MAX_ROWS:
        raise ConfigError(f"{len(rows)} rows; expected 1 to {MAX_ROWS} in one request.")
    shared = defaults.change({name: value for name, value in params.items() if not _is_missing(value)})
    requests = []
    for number, row in enumerate(rows):
        try:
            requests.append(_parse_row(row, shared, defaults))
        except RefAlignError as error:
            raise ConfigError(f"row {number}: {error}") from error
    return requests


def _parse_row(row: object, shared: GenerationSettings, defaults: GenerationSettings) -> Request:
    if not isinstance(row, Mapping):
        raise ConfigError(f"expected an object with a prompt, got {type(row).__name__}.")
    given = {str(name): value for name, value in row.items() if not _is_missing(value)}
    prompt, seed = given.pop("prompt", None), given.pop("seed", 0)
    if not isinstance(prompt, str):
        raise ConfigError("prompt: expected text.")
    references = decode_references(given.pop("references", []))
    settings = shared.change(given)
    asked, usual = ({name: getattr(each, name) for name in ("num_frames", "height", "width")} for each in (settings, defaults))
    if math.prod(asked.values()) > _MAX_TIMES_LARGER * math.prod(usual.values()):
        raise DataError("TOO_LARGE", f"{asked}: expected at the most {_MAX_TIMES_LARGER} times the pixels of {usual}.")
    seed = int(seed) if isinstance(seed, float) and seed.is_integer() else seed  # a column with gaps holds floats
    return Request(prompt, references, check_seed(seed), settings)


def decode_references(references: str | list[str] | np.ndarray) -> list[np.ndarray]:
    """Pictures of base64 texts. Raises `DataError`: a text is not base64, or not a picture."""
    if not isinstance(references, str | list | tuple | np.ndarray):
        raise DataError("UNREADABLE", f"references: expected a list of base64 pictures, got {type(references).__name__}.")
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


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


set_model(ReferenceToVideoModel())
