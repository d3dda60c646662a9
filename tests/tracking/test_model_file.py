"""The registered model as anyone loads it: by its alias, through MLflow, from rows of text to mp4."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import av
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from refalign.config.presets import toy_tiny
from refalign.errors import DataError
from refalign.io.images import encode_jpeg, encode_png
from refalign.tracking.model_file import MAX_REQUESTS, decode_references
from refalign.tracking.registry import register_model
from refalign.tracking.run import TrackedRun


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The toy base itself, registered and loaded by alias."""
    config = toy_tiny()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"num_inference_steps": 2})})
    tracked = TrackedRun.open(config, output=tmp_path_factory.mktemp("served"), fingerprint="a" * 12)
    registered = register_model(tracked, config, key="toy", export_folder=config.models.base, card="card", tags={})
    mlflow.set_tracking_uri(tracked.uri)
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


def test_nothing_is_pickled_and_the_signature_says_what_may_be_set(model):
    assert {param.name for param in model.metadata.signature.params.params} == {
        "num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale", "reference_guidance_scale",
        "negative_prompt",
    }  # fmt: skip
    flavor = model.metadata.flavors["python_function"]
    assert flavor["loader_module"].endswith("code_model") and "python_model" not in flavor


def test_rows_of_which_only_some_have_a_value_are_answered(model):
    rows = [{"prompt": "a ball", "seed": 5, "num_frames": 5}, {"prompt": "a ball"}]
    alone = [model.predict(pd.DataFrame([row]))["video"][0] for row in rows]
    assert model.predict(pd.DataFrame(rows))["video"].tolist() == model.predict(rows)["video"].tolist() == alone


@pytest.mark.parametrize(
    ("rows", "params", "message"),
    [
        ([{"prompt": "a", "sed": 1}], {}, "row 0: sed: no such setting of generation; choose from"),
        ([{"prompt": "a"}, {"prompt": None}], {}, "row 1: prompt: expected text"),
        ([{"references": []}], {}, "row 0: prompt: expected text"),
        ([{"prompt": "a", "seed": -1}], {}, "row 0: seed=-1: expected a whole number from 0 to 4294967295"),
        ([{"prompt": "a", "seed": 2**70}], {}, "row 0: seed="),
        ([{"prompt": "a", "seed": 1.5}], {}, "row 0: seed=1.5"),
        ([{"prompt": "a", "height": "tall"}], {}, "row 0: height: Input should be a valid integer"),
        ([{"prompt": "a", "height": 36}], {}, "nearest"),
        ([{"prompt": "a", "shift": 2}], {}, "row 0: shift: no such setting"),
        ([{"prompt": "a", "references": 3}], {}, "row 0: references: expected a list of base64 pictures, got int"),
        ([{"prompt": "a"}], {"guidance_scale": float("inf")}, "guidance_scale: .*finite"),
        ([{"prompt": "a"}], {"num_inference_steps": 0}, "num_inference_steps: Input should be greater than or equal to 1"),
        ([{"prompt": "a"}] * 17, {}, "17 rows; expected 1 to 16"),
        ([], {}, "0 rows; expected 1 to 16"),
        (["a"], {}, "row 0: expected an object with a prompt, got str"),
    ],
)
def test_a_bad_request_is_refused_in_one_line(model, rows, params, message):
    with pytest.raises(MlflowException, match=message) as refused:
        model.predict(rows, params=params)
    assert refused.value.error_code == "INVALID_PARAMETER_VALUE" and "\n" not in str(refused.value).strip()


def test_many_references_are_refused_before_any_is_encoded(model):
    picture = base64.b64encode(encode_png(_disc())).decode()
    with pytest.raises(MlflowException, match="60 references; the model was trained with up to 3. Give at most 6"):
        model.predict([{"prompt": "a", "references": [picture] * 60}])


def test_simultaneous_requests_are_answered_as_alone_or_refused(model):
    picture = base64.b64encode(encode_png(_disc())).decode()
    rows = [
        {"prompt": f"a creature {word}", "references": [picture] * (seed % 3), "seed": seed, "num_inference_steps": 1 + seed % 2}
        for seed, word in enumerate(("jumps", "waves", "stands", "walks left") * 3)
    ]
    alone = [model.predict([row])["video"][0] for row in rows]

    def ask(row):
        try:
            return model.predict([row])["video"][0]
        except MlflowException as refusal:
            assert refusal.error_code == "REQUEST_LIMIT_EXCEEDED" and "try again later" in str(refusal)
            return None

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, rows))
    assert all(answer in (None, right) for answer, right in zip(answers, alone, strict=True))
    assert sum(answer is not None for answer in answers) >= MAX_REQUESTS


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
