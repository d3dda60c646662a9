"""What the toy's Transformers are trained on and how: samples by number, batches by step, runs that stop and go on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from refalign.config.presets import load_preset
from refalign.toy.scenes import NUM_DRAWINGS, make_caption, make_scene
from workshop.weights import train_transformer
from workshop.weights.initial_weights import make_text_encoder, make_tokenizer, make_transformer, write_initial_weights
from workshop.weights.pool import CAPTION_TOKENS, Pool, draw_references, encode_captions, load_or_make_pool
from workshop.weights.train_transformer import (
    RECIPES,
    SIZE_SHARES,
    TEXT_DROPPED,
    WARMUP,
    Course,
    Phase,
    Recipe,
    ToyModels,
    build,
    export,
    make_batch,
    prepare,
)
from workshop.weights.training import TrainingState, train

PER_SIZE, BATCH = 5, 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_initial_weights(folder)
    return folder


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Samples that carry their number: sample n has latents, references and targets of n."""
    numbers = torch.arange(3 * PER_SIZE).half()
    parts = [numbers[size * PER_SIZE :][:PER_SIZE, None, None, None, None] for size in range(3)]
    plans = [make_scene([2, number], num_subjects=1 + number // PER_SIZE) for number in range(len(numbers))]
    return Pool(
        tuple(range(0, 4 * PER_SIZE, PER_SIZE)),
        numbers[:, None, None, None, None].expand(-1, 4, 1, 2, 3),
        tuple(part.expand(-1, size, 4, 2, 3) for size, part in enumerate(parts, 1)),
        tuple(part[..., 0].expand(-1, size, 6, 8) for size, part in enumerate(parts, 1)),
        encode_captions([make_caption(plan) for plan in plans]),
    )


def test_references_are_one_picture_a_subject_and_the_same_for_the_same_draws():
    plans = [make_scene([1, number]) for number in range(12)]
    first, again, other = (draw_references(plans, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (sum(len(plan.subjects) for plan in plans), 48, 80, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any((1, 2, 3)).all()
    assert np.median(first[:, [0, -1]][:, :, [0, -1]]) == 255 and (first.min(-1) < 200).any((1, 2)).all()


def test_a_pool_is_made_once_and_holds_what_its_files_hold(weights, tmp_path):
    pool, again = (load_or_make_pool(tmp_path, weights, (2, 1, 1), drawings=NUM_DRAWINGS, seed=3) for _ in range(2))
    assert pool.first == again.first == (0, 2, 3, 4)
    assert pool.latents.shape == (4, 16, NUM_DRAWINGS, 12, 20) and pool.latents.dtype == torch.float16
    assert [tuple(part.shape) for part in pool.reference_latents] == [(2, 1, 16, 12, 20), (1, 2, 16, 12, 20), (1, 3, 16, 12, 20)]
    assert [tuple(part.shape) for part in pool.targets] == [(2, 1, 60, 96), (1, 2, 60, 96), (1, 3, 60, 96)]
    assert torch.equal(pool.tokens[2:3], encode_captions([make_caption(make_scene([3, 2, 0], num_subjects=2))]))
    assert torch.equal(pool.latents, again.latents) and len(list(tmp_path.iterdir())) == 3


def test_a_batch_is_a_function_of_its_step_alone(pool):
    phase = Phase(1, 10, BATCH, (PER_SIZE,) * 3)
    for step in range(1, 9):
        aligned, again, twin = (make_batch(pool, phase, RECIPES[name], step) for name in ("stage1", "stage1", "twin"))
        for name in (field.name for field in fields(aligned) if isinstance(getattr(aligned, field.name), torch.Tensor)):
            first, *others = (getattr(batch, name) for batch in (aligned, again, twin))
            assert all(torch.equal(first, other) for other in others), name
        size = aligned.reference_latents.shape[1]
        assert aligned.alignment_mask.shape == aligned.subject_index.shape == (BATCH, size)
        if aligned.alignment_mask.all():
            numbers = aligned.latents[:, 0, 0, 0, 0]
            assert torch.equal(aligned.reference_latents[:, -1, 0, 0, 0], numbers), "its own references"
            assert torch.equal(aligned.target_tokens[:, -1, 0, 0], numbers) and (numbers // PER_SIZE == size - 1).all()
    assert not torch.equal(aligned.noise, make_batch(pool, phase, RECIPES["stage1"], 1).noise)


def test_text_and_references_are_dropped_as_often_as_stated(pool):
    phase, nothing = Phase(1, 10, BATCH, (PER_SIZE,) * 3), encode_captions([""])
    batches = [make_batch(pool, phase, RECIPES["stage1"], step) for step in range(1, 401)]
    silent = torch.cat([(batch.prompt_embeds == nothing).all(1) for batch in batches]).float().mean()
    alone = [batch for batch in batches if not batch.alignment_mask.any()]
    assert float(silent) == pytest.approx(TEXT_DROPPED, abs=0.02)
    assert len(alone) / len(batches) == pytest.approx(phase.without, abs=0.05)
    assert all(batch.reference_latents.shape[1] == 1 and not batch.reference_latents.any() for batch in alone)
    sizes = torch.cat([batch.latents[:, 0, 0, 0, 0] // PER_SIZE for batch in batches]).long().bincount() / (400 * BATCH)
    assert sizes.tolist() == pytest.approx(SIZE_SHARES, abs=0.08)
    base = [make_batch(pool, phase, RECIPES["base"], step) for step in range(1, 101)]
    assert not any(batch.alignment_mask.any() or batch.reference_latents.any() for batch in base)
    zero_frames = [batch.reference_latents.shape[1] for batch in base]
    assert set(zero_frames) == {0, 1} and np.mean(zero_frames) == pytest.approx(phase.without, abs=0.1)


def test_the_learning_rate_warms_up_stays_and_falls_to_its_floor_in_each_phase(weights, tmp_path):
    first, second = Phase(1, 100, 1, (1, 1, 1)), Phase(1, 1000, 1, (1, 1, 1), peak=0.5, floor=0.2)
    recipe = Recipe((first, second), with_references=True)
    objective = load_preset("toy_from_base").objective
    course = Course(recipe, build(recipe, weights, 96, objective), objective, tmp_path, weights)
    rates = {number: course.factor_at(99 + number) / 0.5 for number in (1, WARMUP, 500, 750, 1000)}
    assert rates == pytest.approx({1: 1 / WARMUP, WARMUP: 1, 500: 1, 750: 0.6, 1000: 0.2})
    assert recipe.locate(99) == (first, 100) and recipe.locate(100) == (second, 1) and recipe.steps == 1100
    with pytest.raises(IndexError):
        recipe.locate(1100)


def test_text_is_zero_beyond_each_prompt():
    models = ToyModels(make_transformer(), None, make_text_encoder(len(make_tokenizer())).eval(), frozen=True)
    captions = ["A creature waves.", "On the left a red round creature stands and on the right a creature jumps at night.", ""]
    tokens = encode_captions(captions)
    embedded = models.embed_text(tokens)
    assert embedded.shape[:2] == (3, CAPTION_TOKENS)
    assert torch.equal(embedded.abs().sum(-1) > 0, tokens != 0) and int((tokens[2] != 0).sum()) == 1
    torch.testing.assert_close(models.embed_text(tokens[:1, :8])[:, :5], embedded[:1, :5], atol=1e-5, rtol=1e-4)


def test_an_untrained_text_encoder_already_embeds_a_colour_with_its_side():
    tokenizer = make_tokenizer()
    prompt = "On the left a {} round creature waves and on the right a {} round creature waves."
    prompts = [prompt.format("red", "blue"), prompt.format("blue", "red")]
    tokens = tokenizer(prompts, return_tensors="pt")
    with torch.no_grad():
        embedded = make_text_encoder(len(tokenizer)).eval()(**tokens).last_hidden_state
    left, right = embedded[tokens.input_ids == tokenizer.convert_tokens_to_ids("red")]
    assert (left - right).norm() > 0.3 * left.norm()


def test_no_caption_is_cut_off():
    assert load_preset("toy").models.max_text_tokens >= CAPTION_TOKENS


def test_only_the_aligned_recipe_has_projectors_and_only_the_base_trains_its_text_encoder(weights):
    objective = load_preset("toy_from_base").objective
    models = {name: build(recipe, weights, 96, objective) for name, recipe in RECIPES.items()}
    assert {name for name, each in models.items() if each.projectors is not None} == {"stage1", "early"}
    trained = {name for name, each in models.items() if any(parameter.requires_grad for parameter in each.text.parameters())}
    assert trained == {"base"} and all(parameter.requires_grad for parameter in models["stage1"].transformer.parameters())
    twin = models["twin"].transformer.state_dict()
    assert all(torch.equal(tensor, twin[name]) for name, tensor in models["stage1"].transformer.state_dict().items())


@pytest.mark.parametrize("name", ["base", "stage1"])
def test_a_run_that_stops_and_goes_on_has_the_weights_of_an_uninterrupted_one(name, weights, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    phases = Phase(1, 2, 2, (2, 2, 2)), Phase(NUM_DRAWINGS, 2, 2, (2, 2, 2), peak=0.5)

    def run(work: Path, *some: Phase) -> TrainingState:
        recipe = Recipe(some, RECIPES[name].with_references, RECIPES[name].aligned)
        with monkeypatch.context() as patch:
            patch.setitem(train_transformer.RECIPES, name, recipe)
            state, course = prepare(name, work, weights)
        train(
            state, course.make_loss, course.factor_at, lambda averaged: export(name, averaged, work / "out"),
            steps=recipe.steps, checkpoint=work / "state.pt", clip_norm=1.0,
        )  # fmt: skip
        return state

    whole = run(tmp_path / "whole", *phases)
    run(tmp_path / "parts", phases[0])
    parts = run(tmp_path / "parts", *phases)
    assert whole.step == parts.step == 4
    trained = whole.model.state_dict()
    for first, second in ((trained, parts.model.state_dict()), (whole.averaged.state_dict(), parts.averaged.state_dict())):
        assert first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    untrained = prepare(name, tmp_path, weights)[0].model.state_dict()
    changed = {key.split(".")[0] for key, tensor in untrained.items() if not torch.equal(tensor, trained[key])}
    assert changed == ({"transformer", "text"} if name == "base" else {"transformer", "projectors"})
    out = tmp_path / "whole" / "out"
    exported = {path.parent.relative_to(out).as_posix() for path in out.rglob("*.safetensors")}
    assert exported == ({"wan/transformer", "wan/text_encoder"} if name == "base" else {"stage1/export/transformer", "stage1"})
