import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file

from refalign.errors import ArtifactError, ConfigError, GeometryError
from refalign.generation.generate import generate_file
from refalign.generation.pipeline import RefAlignPipeline, _set_timesteps, combine_guidance, make_scheduler
from refalign.geometry import letterbox
from refalign.models.text import TextEncoder, pad_prompt_embeds
from refalign.models.vae import VideoVAE
from refalign.models.wan import RefAlignTransformer
from refalign.toy import WEIGHTS_FOLDER
from tests.oracles.parity import PARITY

WAN = str(WEIGHTS_FOLDER / "wan")
SIZE = {"height": 32, "width": 48, "num_frames": 5}


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> str:
    """The toy folder without what it says of its own training: the published defaults count."""
    return str(shutil.copytree(WAN, tmp_path_factory.mktemp("stock") / "wan", ignore=shutil.ignore_patterns("refalign.json")))


@pytest.fixture(scope="module")
def pipeline(stock) -> RefAlignPipeline:
    """The toy text encoder and VAE with an untrained two-block Transformer of the same interface."""
    torch.manual_seed(0)
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16, "rope_max_seq_len": 32}
    text_dim = TextEncoder.from_pretrained(WAN).model.config.d_model
    pipeline = RefAlignPipeline.from_pretrained(stock, transformer=RefAlignTransformer(**width, num_layers=2, text_dim=text_dim))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def references() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (20, 30 + 20 * n, 3), dtype=np.uint8)) for n in range(2)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_latents(pipeline, references, prompt="a red fox", steps=2, **options) -> torch.Tensor:
    options = {"generator": seeded(), "output_type": "latent", "num_inference_steps": steps, **SIZE} | options
    return pipeline(prompt, references, **options).frames


def test_steps_are_the_three_pass_formula_and_euler(pipeline, references):
    """The whole loop once more, from the method's text, for one prompt and two references."""
    made = make_latents(pipeline, references, steps=3, negative_prompt="grey")
    sigmas = [1 - n / 3 for n in range(3)]
    sigmas = [5 * sigma / (1 + 4 * sigma) for sigma in sigmas] + [0.0]
    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    null, prompt = (pad_prompt_embeds(text.encode([each])) for each in ("grey", "a red fox"))
    images = torch.stack([torch.from_numpy(letterbox(image, 32, 48)[0]) for image in references])
    given = VideoVAE(pipeline.vae).encode_images(images)[None]
    latents = torch.randn(1, 16, 2, 8, 12, generator=seeded())
    with torch.no_grad():
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
            timestep = torch.tensor([1000 * sigma])
            v_null = pipeline.transformer(latents, timestep, null).velocity
            v_references = pipeline.transformer(latents, timestep, null, given).velocity
            v_text = pipeline.transformer(latents, timestep, prompt, given).velocity
            velocity = v_null + 5.0 * (v_references - v_null) + 7.5 * (v_text - v_references)
            latents = latents + (next_sigma - sigma) * velocity
    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4)


def test_guidance_scales_of_one_leave_only_the_last_pass():
    v_null, v_references, v_text = torch.randn(3, 2, 4)
    torch.testing.assert_close(combine_guidance(v_null, v_references, v_text, 1.0, 1.0), v_text)
    torch.testing.assert_close(combine_guidance(v_null, v_references, v_text, 0.0, 0.0), v_null)


def test_scheduler_levels_match_published_numbers():
    numbers = load_file(PARITY / "schedule.safetensors")
    scheduler = make_scheduler()
    timesteps = _set_timesteps(scheduler, 50, torch.device("cpu"))
    torch.testing.assert_close(scheduler.sigmas[:-1], numbers["infer_sigmas"], rtol=0, atol=1e-6)
    torch.testing.assert_close(timesteps, numbers["infer_timesteps"], rtol=0, atol=1e-4)  # one float32 step at 1000


def test_same_seed_same_video_other_seed_another(pipeline, references):
    first = make_latents(pipeline, references, output_type="uint8")
    assert first.shape == (1, 5, 32, 48, 3) and first.dtype == torch.uint8
    assert torch.equal(first, make_latents(pipeline, references, output_type="uint8"))
    assert not torch.equal(first, make_latents(pipeline, references, output_type="uint8", generator=seeded(1)))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_batched_passes_equal_serial_passes(pipeline, references, count):
    serial, batched = (make_latents(pipeline, references[:count], batch_passes=each) for each in (False, True))
    torch.testing.assert_close(serial, batched, rtol=1e-4, atol=1e-4)


def test_several_prompts_equal_one_call_each(pipeline, references):
    prompts, given = ["a red fox", "a blue ball"], [references, references[::-1]]
    together = make_latents(pipeline, given, prompts, generator=[seeded(0), seeded(1)])
    for index in range(2):
        alone = make_latents(pipeline, given[index], prompts[index], generator=seeded(index))
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-4)


def test_references_and_prompt_decide_the_video(pipeline, references):
    base = make_latents(pipeline, references)
    assert not torch.equal(base, make_latents(pipeline, references[::-1]))
    assert not torch.equal(base, make_latents(pipeline, references, prompt="a blue ball"))


def test_output_types(pipeline, references):
    as_array = make_latents(pipeline, references, steps=1, output_type="np")
    as_images = make_latents(pipeline, references, steps=1, output_type="pil")
    assert as_array.shape == (1, 5, 32, 48, 3) and as_array.dtype == np.float32 and 0 <= as_array.min() <= as_array.max() <= 1
    assert len(as_images[0]) == 5 and as_images[0][0].size == (48, 32)
    assert np.array_equal(np.asarray(as_images[0][2]), (as_array[0, 2] * 255).round().astype(np.uint8))


def test_unipc_can_be_chosen(pipeline, references, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler("unipc"))
    assert make_latents(pipeline, references).isfinite().all()
    with pytest.raises(ConfigError, match="choose euler or unipc"):
        make_scheduler("ddim")


def test_callback_sees_every_step_and_may_change_latents(pipeline, references):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    names = ("latents", "prompt_embeds")
    made = make_latents(pipeline, references, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [each[0] for each in seen] == [0, 1] and seen[0][1] == 1000 and seen[0][2] == list(names)
    assert not made.any()


def test_offload_and_tiling_work_as_in_diffusers(references):
    pipeline = RefAlignPipeline.from_pretrained(WAN)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()
    plain = make_latents(pipeline, references, steps=1, output_type="uint8")
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(plain, make_latents(pipeline, references, steps=1, output_type="uint8"))


def test_saved_pipeline_opens_here_and_in_stock_diffusers(pipeline, references, tmp_path):
    pipeline.save_pretrained(tmp_path)
    stock = WanPipeline.from_pretrained(tmp_path)
    assert stock.transformer.state_dict().keys() == pipeline.transformer.state_dict().keys()
    again = RefAlignPipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(make_latents(again, references), make_latents(pipeline, references), rtol=1e-4, atol=1e-4)


def test_exported_folder_may_refer_to_its_base(pipeline, tmp_path):
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ArtifactError, match="no such model folder"):
        RefAlignPipeline.from_pretrained(str(tmp_path))
    assert RefAlignPipeline.from_pretrained(str(tmp_path), base=WAN).vae is not None
    (tmp_path / "refalign.json").write_text(json.dumps({"base": WAN, "base_revision": None}))
    assert RefAlignPipeline.from_pretrained(str(tmp_path)).vae is not None


def test_nothing_of_the_alignment_is_loaded(tmp_path):
    shutil.copytree(WAN, tmp_path / "model")
    (tmp_path / "model" / "projectors.safetensors").write_bytes(b"would fail if it were opened")
    pipeline = RefAlignPipeline.from_pretrained(str(tmp_path / "model"))
    assert sorted(pipeline.components) == ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
    assert not hasattr(sys.modules["refalign.generation.pipeline"], "Projectors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"height": 36}, GeometryError, "nearest: 32 or 40"),
        ({"references": [np.zeros((8, 8, 3), np.uint8)] * 7}, ConfigError, "7 references; the model was trained with up to 3"),
        ({"output_type": "gif"}, ConfigError, "choose np, pil, uint8 or latent"),
        ({"prompt": ["a", "b"], "references": [[]]}, ConfigError, "2 prompts but 1 sequences of references"),
        ({"prompt": ["a", "b"], "references": [[], [np.zeros((8, 8, 3), np.uint8)]]}, ConfigError, r"have \[0, 1\] references"),
    ],
)
def test_wrong_arguments_are_named(pipeline, change, error, message):
    with pytest.raises(error, match=message):
        pipeline(**({"prompt": "a red fox", "references": (), "num_inference_steps": 1, **SIZE} | change))


def test_calls_from_many_threads_are_those_made_alone(pipeline, references):
    asked = [
        (prompt, references[:count], seed) for seed, (prompt, count) in enumerate([("a fox", 2), ("a hat", 1), ("a sea", 0)] * 4)
    ]

    def make(each):
        prompt, given, seed = each
        return make_latents(pipeline, given, prompt, steps=2 + seed % 3, generator=seeded(seed))

    alone = [make(each) for each in asked]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(make, asked))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_more_references_than_the_model_knows_are_warned_of(pipeline, references, caplog):
    make_latents(pipeline, references * 2, steps=1)
    assert "4 references; the model was trained with up to 3" in caplog.text


def test_what_the_text_encoder_does_not_see_is_told(pipeline, caplog):
    make_latents(pipeline, [], "a zebra and a creature play Football", steps=1)
    assert "the text encoder does not know 'zebra', 'play', 'Football'." in caplog.text
    caplog.clear()
    make_latents(pipeline, [], "a creature " * 300, steps=1)
    assert "its last 89 tokens are ignored, shorten it" in caplog.text
    caplog.clear()
    make_latents(pipeline, [], "On the left a creature jumps.", steps=1)
    assert not caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output": "FOLDER/video.avi"}, "expected a name that ends in .mp4"),
        ({"output": "FOLDER"}, "expected a name that ends in .mp4"),
        ({"output": "FOLDER/taken.mp4"}, "this is a folder"),
        ({"output": "FOLDER/file/a.mp4"}, "cannot be written"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"settings": ["fps=-1"]}, "fps: Input should be greater than 0"),
        ({"settings": ["fps=nan"]}, "fps: .*finite"),
        ({"settings": ["guidance_scale=inf"]}, "guidance_scale: .*finite"),
        ({"settings": ["num_inference_steps=0"]}, "num_inference_steps: Input should be greater than or equal to 1"),
        ({"settings": ["shift=3"]}, "shift: no such setting of generation; choose from num_inference_steps"),
        ({"settings": ["num_frames"]}, "expected name=value"),
    ],
)
def test_what_is_cheap_to_check_is_checked_before_the_model_is_looked_for(tmp_path, flags, message):
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "file").write_text("")
    output = Path(flags.pop("output", "FOLDER/a.mp4").replace("FOLDER", str(tmp_path)))
    with pytest.raises(ConfigError, match=message):
        generate_file("nowhere", prompt="a fox", references=[], output=output, **flags)


def test_a_file_is_made_from_the_folder_of_a_training_too(tmp_path, references):
    (tmp_path / "train-1").mkdir()
    shutil.copytree(WAN, tmp_path / "train-1" / "export")
    references[0].save(tmp_path / "a.png")
    settings = [f"{name}={value}" for name, value in SIZE.items()] + ["num_inference_steps=1"]
    made = [
        generate_file(
            str(tmp_path / folder),
            prompt="a creature",
            references=[tmp_path / "a.png"],
            output=tmp_path / name,
            settings=settings,
        ).read_bytes()
        for folder, name in (("train-1", "a.MP4"), ("train-1/export", "b.mp4"))
    ]
    assert made[0] == made[1] and len(made[0]) > 500
