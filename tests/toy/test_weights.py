"""The shipped weights: small, in half precision, in the hub's layout, and good at the toy world; and how they are made."""

import re

import numpy as np
import pytest
import torch
import toy_models
from safetensors import safe_open

from refalign.models.vae import VideoVAE
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.rendering import render_scenes
from refalign.toy.scenes import HOLD, caption_words, make_caption, make_scene
from workshop.judging import vision as toy_vision
from workshop.judging.benchmark import score_clip
from workshop.judging.cases import draw_case, make_cases
from workshop.weights import train_vae
from workshop.weights.initial_weights import MAX_PROMPT_TOKENS, make_vae, make_vision_encoder, replace_folder
from workshop.weights.train_vision_encoder import PLACES, choose_places, corresponding, make_view, random_geometry


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return VideoVAE.from_pretrained(str(WEIGHTS_FOLDER / "wan"))


@pytest.fixture(scope="module")
def untrained_vae() -> VideoVAE:
    vae = make_vae()
    train_vae.prepare(vae)
    return VideoVAE(vae)


def test_all_weights_are_half_precision_safetensors_and_small():
    files = [path for path in WEIGHTS_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert len(tensors) >= 7
    for path in tensors:
        with safe_open(path, "pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 (no mapping)
        assert kinds <= {torch.float16, torch.int64}, path


def test_every_folder_that_the_readme_names_exists():
    named = re.findall(r"`([\w/]+)/`", (WEIGHTS_FOLDER / "README.md").read_text())
    assert len(named) >= 6 and not [name for name in named if not (WEIGHTS_FOLDER / name).is_dir()]


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
    padded = tokenizer("A zebra waves.", padding="max_length", max_length=12)
    assert padded.input_ids[1] == tokenizer.unk_token_id and padded.input_ids[-1] == 0 and sum(padded.attention_mask) == 5


def test_the_vae_reconstructs_heldout_clips(vae):
    figures = toy_models.measure_vae(vae, 16)
    assert figures["clip_psnr_db"] >= 30, figures


def test_the_judge_reads_what_passed_through_the_vae(vae):
    right = []
    for case in make_cases(8, num_subjects=1, split="judges"):
        clip = vae.decode(vae.encode(torch.from_numpy(draw_case(case, "truth"))[None]))[0].numpy()
        right += score_clip(case, clip)["right"][0].values()
    assert np.mean(right) >= 0.95, right


def test_normalised_latents_have_unit_variance(vae):
    """The config's statistics are those of the weights beside it, measured here on clips they were not measured on."""
    shots = render_scenes([make_scene([77, number], split="heldout") for number in range(6)])
    latents = vae.encode(torch.from_numpy(np.stack([shot.frames for shot in shots]))).transpose(0, 1).flatten(1)
    floored = torch.tensor(vae.model.config["latents_std"]) <= train_vae.MIN_STD
    assert 0.6 < float(latents[~floored].var(1).mean()) < 1.4 and float(latents.mean(1).abs().max()) < 0.6


def test_each_latent_frame_is_the_picture_of_its_own_drawing(untrained_vae):
    """What the samples of `workshop.weights.pool` rely on, whatever the weights, as long as only the last slices are trained."""
    frames = torch.from_numpy(np.stack([shot.frames for shot in render_scenes([make_scene(3), make_scene(4)])]))
    latents = untrained_vae.encode(frames)
    stills = untrained_vae.encode_images(frames[:, [0, *range(1, frames.shape[1], HOLD)]].flatten(0, 1))
    assert latents.std() > 0.01
    torch.testing.assert_close(latents, stills.unflatten(0, (2, 3)).transpose(1, 2), rtol=1e-3, atol=1e-4)
    decoded = untrained_vae.decode(latents).int()
    assert (decoded[:, 1:5] - decoded[:, 1:2]).abs().max() <= 1 and (decoded[:, 1] - decoded[:, 5]).abs().max() > 1


def test_the_vision_encoder_beats_random_init_and_raw_pixels():
    from transformers import DINOv3ViTModel

    trained = toy_vision.evaluate(DINOv3ViTModel.from_pretrained(WEIGHTS_FOLDER / "dinov3", dtype=torch.float32), 100)
    for other in (toy_vision.evaluate(make_vision_encoder(), 100), toy_vision.evaluate_pixels(100)):
        assert trained["retrieval_top1"] > other["retrieval_top1"] + 0.1, (trained, other)
    assert trained["same_subject_auc"] > 0.75, trained


def test_the_detector_finds_heldout_subjects():
    figures = toy_models.measure_detector(WEIGHTS_FOLDER / "detector", 100)
    assert figures["box_recall_at_50"] >= 0.95 and figures["mask_iou"] >= 0.88, figures


def test_views_of_a_picture_agree_at_corresponding_places():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 48)
    picture = torch.stack([ramp.expand(48, 48), ramp.expand(48, 48).T, torch.full((48, 48), 0.5)]).expand(6, -1, -1, -1)
    geometries = [random_geometry(6, generator) for _ in range(2)]
    views = [make_view(picture, geometry, generator) for geometry in geometries]
    first = choose_places(views[0], *geometries, generator)
    second = corresponding(first, *geometries)
    assert first.shape == (6, PLACES, 2) and (second.abs() < 1).float().mean() > 0.9
    torch.testing.assert_close(corresponding(second, *reversed(geometries)), first, atol=1e-4, rtol=1e-4)
    smooth = [torch.nn.functional.avg_pool2d(view, 5, 1, 2, count_include_pad=False) for view in views]
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


def test_every_crop_of_one_code_finds_its_own_subject():
    codes = np.random.default_rng(0).normal(size=(40, 8))
    assert toy_vision.retrieval(lambda pictures: codes[: len(pictures)], 40) == 1.0
