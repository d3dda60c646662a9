"""The shipped Transformers: the base hears which words belong together, stage 1 looks at its references and at whose they are."""

import binding
import numpy as np
import pytest
import torch
from transformers import UMT5EncoderModel

from refalign.models.text import TextEncoder, pad_prompt_embeds
from refalign.models.vae import VideoVAE
from refalign.models.wan import load_transformer
from refalign.presets import load_preset
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.captions import make_caption
from refalign.toy.cases import make_cases
from refalign.toy.initial_weights import make_text_encoder, make_tokenizer
from refalign.toy.rendering import render_scene
from refalign.toy.scenes import make_scene
from refalign.toy.train_transformer import make_stages

BASE = str(WEIGHTS_FOLDER / "wan")
SIGMA = 0.75


def test_the_base_puts_what_a_prompt_says_of_each_creature_where_it_says():
    figures = binding.measure(load_transformer(BASE).eval(), TextEncoder.from_pretrained(BASE), 16)
    assert figures["places_over_colours"] > 0.6 and figures["correlation_of_halves"] < -0.6, figures


def test_no_caption_is_cut_off():
    tokenizer, longest = make_tokenizer(), load_preset("toy").models.max_text_tokens
    captions = [make_caption(make_scene([4, number], num_subjects=3)) for number in range(300)]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= longest


@pytest.mark.parametrize("trained", [False, True])
def test_a_colour_is_embedded_with_its_side(trained):
    tokenizer = make_tokenizer()
    text = make_text_encoder(len(tokenizer))
    if trained:
        text = UMT5EncoderModel.from_pretrained(WEIGHTS_FOLDER / "wan" / "text_encoder")
    colours = [("red", "blue"), ("blue", "red")]
    prompts = [f"On the left a {left} creature walks and on the right a {right} creature walks." for left, right in colours]
    tokens = tokenizer(prompts, return_tensors="pt")
    with torch.no_grad():
        embedded = text.eval().float()(**tokens).last_hidden_state
    there = tokens.input_ids == tokenizer.convert_tokens_to_ids("red")
    left, right = embedded[there]
    assert (left - right).norm() > 0.3 * left.norm()


def test_stage_1_knows_its_references_from_others_and_which_is_whose():
    """By the flow matching error at a noise level that hides what creatures look like but not where they are."""
    cases = make_cases(16, num_subjects=2, likeness="unlike")
    vae = VideoVAE.from_pretrained(BASE)
    latents = vae.encode(torch.from_numpy(np.stack([render_scene(case.plan).frames for case in cases])))
    references = torch.stack([vae.encode_images(torch.from_numpy(np.stack(case.named_references))) for case in cases])
    prompts = TextEncoder.from_pretrained(BASE).encode([case.prompt for case in cases])
    embeds = pad_prompt_embeds(prompts, load_preset("toy").models.max_text_tokens)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    stage1 = load_transformer(str(WEIGHTS_FOLDER / "stage1" / "export")).eval()

    @torch.no_grad()
    def measure_error(given):
        noisy = (1 - SIGMA) * latents + SIGMA * noise
        output = stage1(noisy, torch.full((len(cases),), 1000 * SIGMA), embeds, reference_latents=given)
        return float((output.velocity - (noise - latents)).square().mean())

    own, swapped, others = (measure_error(given) for given in (references, references.flip(1), references.roll(1, 0)))
    assert own < 0.97 * others and own < 0.98 * swapped, (own, swapped, others)


@pytest.mark.parametrize(("image_share", "steps"), [(0.0, [10]), (0.7, [7, 3]), (1.0, [10])])
def test_a_training_is_on_images_on_clips_or_on_both(image_share, steps):
    stages = make_stages("base", 10, 1e-3, image_share)
    assert [stage.steps for stage in stages] == steps
    assert sum(stage.steps for stage in stages if stage.latent_frames == 1) == round(10 * image_share)
