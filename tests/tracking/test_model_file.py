"""The registered model as anyone loads it: by its alias, through MLflow, from rows of text to mp4."""

import base64
import io

import av
import mlflow
import numpy as np
import pandas as pd
import pytest

from refalign.errors import DataError
from refalign.pictures import encode_jpeg, encode_png
from refalign.presets import toy_tiny
from refalign.tracking.model_file import decode_references
from refalign.tracking.registry import register_model
from refalign.tracking.run import StoryRun


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The toy base itself, registered and loaded by alias."""
    config = toy_tiny()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_inference_steps": 2})})
    story = StoryRun.open(config, output=tmp_path_factory.mktemp("served"), fingerprint="a" * 12)
    registered = register_model(story, config, key="toy", export_folder=config.models.base, card="card", tags={})
    mlflow.set_tracking_uri(story.uri)
    return mlflow.pyfunc.load_model(registered.uri)


def test_rows_become_videos_and_equal_seeds_equal_videos(model):
    picture = base64.b64encode(encode_png(_disc())).decode()
    rows = [
        {"prompt": "a red ball", "references": [picture, picture], "seed": 1},
        {"prompt": "a red ball", "references": [picture, picture], "seed": 1},
        {"prompt": "a red ball", "references": picture, "seed": 2},
        {"prompt": "a red ball", "references": None, "seed": 2},
    ]
    videos = model.predict(pd.DataFrame(rows), params={"guidance_scale": 2.0})["video"].tolist()
    assert videos[0] == videos[1] and len(set(videos)) == 3
    with av.open(io.BytesIO(base64.b64decode(videos[0]))) as file:
        assert file.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert (len(frames), *frames[0].shape) == (9, 48, 80, 3)


def test_what_a_row_asks_for_wins_over_the_defaults(model):
    (video,) = model.predict(pd.DataFrame([{"prompt": "a ball", "num_frames": 5, "height": 64, "width": 48}]))["video"]
    with av.open(io.BytesIO(base64.b64decode(video))) as file:
        stream = file.streams.video[0]
        assert (stream.height, stream.width, sum(1 for _ in file.decode(video=0))) == (64, 48, 5)


def test_nothing_is_pickled_and_the_signature_says_what_goes_in(model):
    assert {column.name: column.required for column in model.metadata.signature.inputs.inputs} == {
        "prompt": True, "references": False, "seed": False, "num_frames": False, "height": False, "width": False,
    }  # fmt: skip
    flavor = model.metadata.flavors["python_function"]
    assert flavor["loader_module"].endswith("code_model") and "python_model" not in flavor


def test_references_are_base64_pictures_or_one_line():
    picture = _disc()
    for encoded in (encode_png(picture), encode_jpeg(picture)):
        text = base64.b64encode(encoded).decode()
        assert len(decode_references(text)) == len(decode_references([f"data:image/png;base64,{text}"])) == 1
    for bad in ("%%%", base64.b64encode(b"no picture").decode()):
        with pytest.raises(DataError, match=r"references\[0\]"):
            decode_references([bad])


def _disc():
    y, x = np.mgrid[:64, :64]
    return np.where(((y - 32) ** 2 + (x - 32) ** 2 < 600)[..., None], (220, 40, 40), 255).astype(np.uint8)
