"""The shipped weights: small, in half precision, in the hub's layout, and better than what they started from."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from refalign.toy import WEIGHTS_FOLDER, measure_vision, train_vae
from refalign.toy.captions import caption_words, make_caption
from refalign.toy.initial_weights import MAX_PROMPT_TOKENS, make_vision_encoder, replace_folder
from refalign.toy.scenes import make_scene
from refalign.toy.train_vision_encoder import PLACES, choose_places, corresponding, make_view, random_geometry


@pytest.fixture(scope="module")
def vae():
    return train_vae.load_vae(WEIGHTS_FOLDER / "wan" / "vae")


def test_all_weights_are_half_precision_safetensors_and_small():
    files = [path for path in WEIGHTS_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert len(tensors) == 9
    for path in tensors:
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 (no mapping)
        assert kinds <= {torch.float16, torch.int64}, path


def test_the_folder_has_every_part_a_pipeline_opens():
    index = json.loads((WEIGHTS_FOLDER / "wan" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    for part, (library, _) in ((name, value) for name, value in index.items() if isinstance(value, list)):
        assert library is None or (WEIGHTS_FOLDER / "wan" / part).is_dir(), part


def test_the_folder_opens_as_a_stock_wan_pipeline():
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(WEIGHTS_FOLDER / "wan", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 16}
    frames = pipeline(prompt="A red round creature jumps.", **size).frames
    assert frames.shape == (1, 5, 32, 32, 3) and np.isfinite(frames).all()
    assert pipeline.scheduler.config.shift == 5.0


def test_the_tokenizer_knows_every_caption_and_ends_it_as_t5_does():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS_FOLDER / "wan" / "tokenizer")
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1 and tokenizer.model_max_length == MAX_PROMPT_TOKENS
    assert len(tokenizer) == 3 + len(caption_words())
    for number in range(40):
        ids = tokenizer(make_caption(make_scene([1, number]))).input_ids
        assert ids[-1] == 1 and tokenizer.unk_token_id not in ids
    padded = tokenizer("A zebra sleeps.", padding="max_length", max_length=12)
    assert padded.input_ids[1] == tokenizer.unk_token_id and padded.input_ids[-1] == 0 and sum(padded.attention_mask) == 5


def test_the_vae_reconstructs_heldout_clips(vae):
    figures = train_vae.evaluate(vae, 4, 8)
    assert figures["clip_psnr_db"] > VAE_CLIP_PSNR_DB and figures["reference_psnr_db"] > VAE_REFERENCE_PSNR_DB, figures


VAE_CLIP_PSNR_DB, VAE_REFERENCE_PSNR_DB = 22.0, 23.5
"""A little below the figures of the weights' README, which are over more items."""


def test_normalised_latents_have_unit_variance(vae):
    """The config's statistics are those of the weights beside it, measured here on clips they were not measured on."""
    latents = []
    with torch.no_grad():
        for number in range(6):
            frames = torch.from_numpy(train_vae.sample_clip(77, number, "heldout").frames)
            pixels = (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
            latents.append(vae.encode(pixels).latent_dist.mode()[0].flatten(1))
    mean, std = (torch.tensor(values)[:, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    normalised = (torch.cat(latents, 1) - mean) / std
    assert 0.7 < float(normalised.var(1).mean()) < 1.4 and float(normalised.mean(1).abs().max()) < 0.6


def test_decoding_without_the_clamp_is_decoding_otherwise(vae):
    latents = 2 * torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = train_vae.decode_unclamped(vae, latents)
        torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(latents).sample, rtol=1e-3, atol=1e-4)
    assert decoded.abs().max() > 1


def test_the_vision_encoder_beats_random_init_and_raw_pixels():
    from transformers import DINOv3ViTModel

    trained = measure_vision.evaluate(DINOv3ViTModel.from_pretrained(WEIGHTS_FOLDER / "dinov3", dtype=torch.float32), 60)
    others = [measure_vision.evaluate(make_vision_encoder(), 60), measure_vision.evaluate_pixels(60)]
    for other in others:
        assert trained["retrieval_top1"] > other["retrieval_top1"] + 0.15, (trained, other)
        assert trained["same_subject_auc"] > other["same_subject_auc"] + 0.03, (trained, other)


def test_views_of_a_picture_agree_at_corresponding_places():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 96)
    picture = torch.stack([ramp.expand(96, 96), ramp.expand(96, 96).T, torch.full((96, 96), 0.5)]).expand(6, -1, -1, -1)
    geometries = [random_geometry(6, generator) for _ in range(2)]
    views = [make_view(picture, geometry, generator) for geometry in geometries]
    first = choose_places(views[0], *geometries, generator)
    second = corresponding(first, *geometries)
    assert first.shape == (6, PLACES, 2) and (second.abs() < 1).float().mean() > 0.9
    torch.testing.assert_close(corresponding(second, *reversed(geometries)), first, atol=1e-4, rtol=1e-4)
    smooth = [torch.nn.functional.avg_pool2d(view, 9, 1, 4, count_include_pad=False) for view in views]
    values = [
        torch.nn.functional.grid_sample(view, place[:, None], align_corners=False)[:, :2, 0]
        for view, place in zip(smooth, (first, second), strict=True)
    ]
    # The two colours say where a place is; a shift of gain and offset between the views is all that may remain.
    shift = (values[0] - values[1]).mean(-1, keepdim=True)
    assert float((values[0] - values[1] - shift).abs().mean()) < 0.25 * float(values[0].std())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    replace_folder(target, lambda folder: (folder / "a").write_text("old"))

    def fail(folder):
        (folder / "b").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, fail)
    assert [path.name for path in target.iterdir()] == ["a"]
    replace_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert [path.name for path in target.iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1


def test_scores_are_probabilities_that_a_positive_wins():
    assert measure_vision._auc(np.array([2.0, 3.0]), np.array([1.0, 2.5])) == 0.75
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(40, 8))
    assert measure_vision.retrieval(lambda pictures: codes[: len(pictures)], 40) == 1.0
