"""Captions by the real Qwen2.5-VL classes, untrained: greedy, the same every time, and signed with what wrote them."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest

from refalign.config import apply_overrides
from refalign.config.presets import toy
from refalign.curation.curator import choose_caption, load_captioner
from refalign.errors import ArtifactError, ConfigError
from refalign.models.captioner import Captioner
from tests.models.make_tiny import save_captioner, save_clip


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return Captioner.from_pretrained(save_captioner(tmp_path_factory.mktemp("vl")))


FRAMES = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


def test_it_is_qwen_and_its_captions_are_deterministic_and_short(captioner):
    assert type(captioner.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(captioner.processor).__name__ == "Qwen2_5_VLProcessor"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = captioner.caption(FRAMES, "Describe this.", 12)
    assert first and first == captioner.caption(FRAMES, "Describe this.", 12) == " ".join(first.split())
    assert len(captioner.processor.tokenizer(first)["input_ids"]) < 40


def test_it_looks_at_every_frame_and_reads_the_prompt(captioner):
    asked = []
    generate = captioner.model.generate
    captioner.model.generate = lambda **inputs: asked.append(inputs) or generate(**inputs)
    try:
        captioner.caption(FRAMES, "What is it?", 2)
        captioner.caption(FRAMES[:1], "Who?", 2)
    finally:
        captioner.model.generate = generate
    assert [len(inputs["image_grid_thw"]) for inputs in asked] == [3, 1]
    texts = [captioner.processor.tokenizer.decode(inputs["input_ids"][0]) for inputs in asked]
    assert "What is it?" in texts[0] and "Who?" in texts[1]


def test_a_model_that_cannot_be_asked_or_is_missing_is_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no chat template"):
        Captioner.from_pretrained(save_clip(tmp_path / "clip"))
    with pytest.raises(ArtifactError, match="no such model folder"):
        Captioner.from_pretrained(str(tmp_path / "gone"))


@dataclass
class Stub:
    name: str = "tiny@0123"
    calls: int = 0

    def caption(self, frames, prompt, max_tokens):
        self.calls += 1
        return f"{len(frames)} frames"


@pytest.mark.parametrize(
    ("mode", "said", "expected"),
    [
        ("source", "a cat", ("a cat", "source")),
        ("source", "", ("", "none")),
        ("missing", " a cat ", ("a cat", "source")),
        ("missing", " ", ("3 frames", "model:tiny@0123")),
        ("all", "a cat", ("3 frames", "model:tiny@0123")),
    ],
)
def test_captions_come_from_the_source_or_from_the_model(mode, said, expected):
    config = apply_overrides(toy(), [f"curation.caption={mode}", "models.captioner=org/name"])
    stub = Stub()
    assert choose_caption(said, list(FRAMES), lambda: stub, config) == expected
    assert stub.calls == (expected[1] != "source" and expected[1] != "none")


def test_the_name_holds_id_and_digest(tmp_path, captioner):
    folder, _, digest = captioner.name.partition("@")
    assert folder.startswith("vl") and len(digest) == 12
    models = apply_overrides(toy(), [f"models.captioner={save_captioner(tmp_path / 'vl')}"]).models
    assert load_captioner(models, "cpu").name == f"vl@{digest}", "equal weights, equal digest"


def test_a_caption_model_must_be_named():
    with pytest.raises(ConfigError, match=r"curation.caption needs models.captioner"):
        apply_overrides(toy(), ["curation.caption=all"])
