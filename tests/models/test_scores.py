"""Text-image and aesthetic scores with the real classes, untrained; heads of LAION's kind, and what is refused of them."""

import numpy as np
import pytest
import torch
from torch import nn

from refalign.config.presets import toy
from refalign.curation.quality import load_scorer, match_caption
from refalign.errors import ArtifactError
from refalign.models.scores import TextImageScorer, convert_aesthetic_head, load_aesthetic_head
from tests.models.make_tiny import save_clip


@pytest.fixture(scope="module", params=["clip", "siglip"])
def scorer(request, tmp_path_factory):
    return TextImageScorer.from_pretrained(save_clip(tmp_path_factory.mktemp(request.param), request.param))


def make_images(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 40, 64, 3), dtype=np.uint8)


def make_published_head(width=32):
    """Layer names and order as in LAION's file: linear layers with dropout between some of them."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(width, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1),
        nn.Linear(4, 2), nn.Linear(2, 1),
    )  # fmt: skip
    return nn.ModuleDict({"layers": layers}).eval()


def test_embeddings_are_the_models_own_and_of_unit_length(scorer):
    images = make_images()
    embeddings = scorer.embed_images(images)
    text = scorer.embed_text("a red ball")
    assert embeddings.shape == (3, scorer.width) and text.shape == (scorer.width,)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(), torch.tensor(1.0))
    inputs = scorer._tokenizer(["a red ball"], return_tensors="pt", **scorer._text_length)
    pixels = scorer._image_processor(list(images), return_tensors="pt")["pixel_values"]
    known = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    with torch.no_grad():
        whole = scorer.model(pixel_values=pixels, **known)
    torch.testing.assert_close(embeddings, whole.image_embeds)
    torch.testing.assert_close(text[None], whole.text_embeds)


def test_texts_longer_than_the_model_takes_are_cut(scorer):
    assert torch.isfinite(scorer.embed_text("a red ball rolls " * 100)).all()


def test_scores_are_means_over_the_frames_and_nan_without_a_model_or_caption(scorer):
    images = list(make_images())
    scorer.head = None
    match, aesthetic = match_caption(images, "a red ball", scorer)
    cosines = scorer.embed_images(np.stack(images)) @ scorer.embed_text("a red ball")
    assert match == pytest.approx(float(cosines.mean())) and np.isnan(aesthetic)
    assert match == match_caption(images, "a red ball", scorer)[0]
    assert np.isnan(match_caption(images, "", scorer)[0])
    assert np.isnan(match_caption(images, "a red ball", None)).all()


def test_a_published_head_is_converted_once_and_scores_alike(tmp_path):
    head = make_published_head()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    with pytest.raises(ArtifactError, match=r"convert it once: .*convert.py .*head.pth .*head.safetensors --aesthetic"):
        load_aesthetic_head(tmp_path / "head.pth", 32)
    convert_aesthetic_head(tmp_path / "head.pth", tmp_path / "head.safetensors")
    embeddings = torch.randn(5, 32)
    torch.testing.assert_close(
        load_aesthetic_head(tmp_path / "head.safetensors", 32)(embeddings), head["layers"](embeddings)[:, 0]
    )
    with pytest.raises(ArtifactError, match="width 32, models.text_image gives 768"):
        load_aesthetic_head(tmp_path / "head.safetensors", 768)


def test_the_single_layer_head_works_too(tmp_path):
    torch.save(nn.Linear(32, 1).state_dict(), tmp_path / "linear.pth")
    convert_aesthetic_head(tmp_path / "linear.pth", tmp_path / "linear.safetensors")
    assert load_aesthetic_head(tmp_path / "linear.safetensors", 32)(torch.randn(3, 32)).shape == (3,)


def test_heads_with_activations_and_pickles_with_code_are_refused(tmp_path):
    layers = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    torch.save(nn.ModuleDict({"layers": layers}).state_dict(), tmp_path / "relu.pth")
    with pytest.raises(ArtifactError, match="activations between the layers"):
        convert_aesthetic_head(tmp_path / "relu.pth", tmp_path / "out.safetensors")
    torch.save(make_published_head(), tmp_path / "module.pth")
    with pytest.raises(ArtifactError, match="not a file of weights"):
        convert_aesthetic_head(tmp_path / "module.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ArtifactError, match="no such file"):
        load_aesthetic_head(tmp_path / "gone.safetensors", 32)


def test_the_settings_choose_the_models(tmp_path):
    models = toy().models
    assert load_scorer(models, "cpu") is None
    torch.save(make_published_head().state_dict(), tmp_path / "head.pth")
    convert_aesthetic_head(tmp_path / "head.pth", tmp_path / "head.safetensors")
    chosen = {"text_image": save_clip(tmp_path / "clip"), "aesthetic": str(tmp_path / "head.safetensors")}
    scores = match_caption(list(make_images()), "a ball", load_scorer(models.model_copy(update=chosen), "cpu"))
    assert np.isfinite(scores).all()


def test_a_model_without_texts_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="embeds no texts and pictures"):
        TextImageScorer.from_pretrained(toy().models.vision_encoder)
