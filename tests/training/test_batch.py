"""Draws, buckets and the dealing of a global batch to ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from make_shards import make_config, write_shards
from safetensors.torch import save_file

from refalign.shards.reader import SampleOrder, ShardIndex
from refalign.training.batch import Batch, BatchMaker, Draw, Planned, choose_references, make_draw, plan_forwards


def make_rows(batches: list[Batch]) -> dict[int, tuple]:
    """What each position of the run trains on, as comparable values."""
    rows = {}
    for batch in batches:
        for number, position in enumerate(batch.positions):
            assert position not in rows
            fields = (batch.latents, batch.noise, batch.reference_latents, batch.target_tokens, batch.prompt_embeds)
            sums = tuple(float(field[number].double().sum()) for field in fields)
            rows[position] = (batch.keys[number], int(batch.timestep_index[number]), *sums)
    return rows


def test_global_batches_are_equal_for_one_two_and_three_ranks(shards: Path) -> None:
    index = ShardIndex.open(shards, "train")
    config = make_config("none", global_batch=12, micro_batch=2)
    for step in (1, 2, 7):
        rows = []
        for num_ranks in (1, 2, 3):
            parts = [BatchMaker(index, config, rank, num_ranks).make_step(step) for rank in range(num_ranks)]
            assert len({len(part) for part in parts}) == 1  # FSDP's collectives need equally many forward passes
            assert all(len(batch.keys) <= 2 for part in parts for batch in part)
            rows.append(make_rows([batch for part in parts for batch in part]))
        assert rows[0] == rows[1] == rows[2]
        assert sorted(rows[0]) == list(range((step - 1) * 12, step * 12))


def test_steps_leave_no_gap_and_repeat_nothing(shards: Path) -> None:
    index = ShardIndex.open(shards, "train")
    config = make_config("none", global_batch=8, micro_batch=4)
    rows: dict[int, tuple] = {}
    for step in range(1, 6):
        rows |= make_rows(BatchMaker(index, config).make_step(step))
    keys = [rows[position][0] for position in sorted(rows)]
    order = SampleOrder(len(index), config.seed)
    assert keys == [index.entries[order.index_at(position)].key for position in range(40)]
    assert Counter(keys) == {entry.key: 2 for entry in index.entries}  # 40 samples are two epochs of 20


def test_a_stage_of_images_sees_the_first_latent_frame_of_the_same_samples(shards: Path) -> None:
    index = ShardIndex.open(shards, "train")
    config = make_config("none", global_batch=12, micro_batch=12)
    (clips, *rest) = config.training.stages
    stages = (clips.model_copy(update={"name": "images", "latent_frames": 1}), clips, *rest)
    maker = BatchMaker(index, config.model_copy(update={"training": config.training.model_copy(update={"stages": stages})}))
    images, videos = maker.make_step(1), BatchMaker(index, config).make_step(1)
    assert {batch.latents.shape[2] for batch in images} == {1}
    whole = {key: latents for batch in videos for key, latents in zip(batch.keys, batch.latents, strict=True)}
    assert len(whole) == 12
    for batch in images:
        assert batch.noise.shape == batch.latents.shape
        for key, latents in zip(batch.keys, batch.latents, strict=True):
            torch.testing.assert_close(latents, whole.pop(key)[:, :1], rtol=0, atol=0)
    assert not whole
    assert {batch.latents.shape[2] for batch in maker.make_step(clips.steps + 1)} == {batch.latents.shape[2] for batch in videos}


def test_a_forward_pass_has_one_shape_and_one_number_of_references(shards: Path) -> None:
    maker = BatchMaker(ShardIndex.open(shards, "train"), make_config("none", global_batch=20, micro_batch=20))
    batches = maker.make_step(1)
    assert [batch.reference_latents.shape[1] for batch in batches] == [1, 2, 3]
    for batch in batches:
        kept = batch.alignment_mask.any(1)
        assert batch.alignment_mask.all(1)[kept].all()
        assert not batch.reference_latents[~kept].any()  # the one attended zero frame
        assert not batch.target_tokens[~kept].any()
        assert batch.prompt_embeds.shape[1] == 6


def test_dropout_has_the_published_frequencies() -> None:
    training = make_config("none").training
    draws = [make_draw(0, position, training) for position in range(20_000)]
    counts = Counter((draw.keep_text, draw.keep_references) for draw in draws)
    sigma = (20_000 * 0.1 * 0.9) ** 0.5
    for dropped in ((False, True), (True, False), (False, False)):
        assert abs(counts[dropped] - 2000) < 4 * sigma
    levels = torch.tensor([draw.timestep_index for draw in draws]).float()
    assert levels.min() == 0 and levels.max() == 999
    assert abs(levels.mean() - 499.5) < 4 * 288.7 / 20_000**0.5


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    training = make_config("none").training
    assert make_draw(0, 5, training) == make_draw(0, 5, training)
    assert len({make_draw(seed, position, training).noise_seed for seed in (0, 1) for position in range(100)}) == 200


def test_cross_pairs_are_taken_with_their_chance_where_they_exist() -> None:
    references = [
        {"subject_index": 0, "kind": "in_pair"},
        {"subject_index": 0, "kind": "cross_pair"},
        {"subject_index": 1, "kind": "in_pair"},
        {"subject_index": 0, "kind": "cross_pair"},
        {"subject_index": 1, "kind": "in_pair"},
    ]
    training = make_config("none").training
    chosen = [choose_references(references, make_draw(0, p, training).choices, 0.25) for p in range(4000)]
    counts = Counter(first for first, _ in chosen)
    assert abs(counts[0] - 3000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert min(counts[1], counts[3]) > 400
    assert {second for _, second in chosen} == {2, 4}  # no cross pair for subject 1


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_get_equally_many_forward_passes_whatever_the_buckets(num_ranks: int) -> None:
    draw = Draw(0, True, True, (), 0)
    for seed in range(50):
        kinds = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        planned = [Planned(position, position, draw, (kind,)) for position, kind in enumerate(kinds)]
        ranks = plan_forwards(planned, num_ranks, micro_batch=2)
        assert len({len(groups) for groups in ranks}) == 1
        assert all(0 < len(group) <= 2 and len({item.bucket for item in group}) == 1 for groups in ranks for group in groups)
        assert sorted(item.position for groups in ranks for group in groups for item in group) == list(range(8))


def test_dropped_text_becomes_the_null_prompt(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", train=4, validation=0)
    config = make_config("none", dropout={"text": 1.0, "references": 0.0, "both": 0.0})
    batch = BatchMaker(ShardIndex.open(shards, "train"), config).make_step(1)[0]
    assert not batch.prompt_embeds.any() and batch.alignment_mask.all()
    null_prompt = torch.full((1, batch.prompt_embeds.shape[2]), 0.5)
    save_file({"prompt_embeds": null_prompt}, shards / "null_prompt.safetensors")
    batch = BatchMaker(ShardIndex.open(shards, "train"), config).make_step(1)[0]
    assert (batch.prompt_embeds[:, 0] == 0.5).all() and not batch.prompt_embeds[:, 1:].any()


def test_validation_is_fixed_and_spreads_over_noise_levels(shards: Path) -> None:
    index = ShardIndex.open(shards, "validation")
    one = make_rows(BatchMaker(index, make_config("none")).make_validation())
    two = [make_rows(BatchMaker(index, make_config("none"), rank, 2).make_validation()) for rank in range(2)]
    assert one == two[0] | two[1]
    assert sorted(row[1] for row in one.values()) == [125, 375, 625, 875]


def test_pictures_have_their_own_size_where_no_reference_is_kept(tmp_path: Path) -> None:
    index = ShardIndex.open(write_shards(tmp_path / "pictures", pictures=True), "train")
    dropped = make_config("none", global_batch=4, dropout={"references": 1.0, "text": 0.0, "both": 0.0})
    (batch,) = BatchMaker(index, dropped).make_step(1)
    assert batch.reference_pixels is not None and batch.reference_pixels.shape == (4, 1, 64, 64, 3)
    assert not batch.reference_pixels.any() and not batch.alignment_mask.any()
    kept = make_config("none", global_batch=4, dropout={"references": 0.0, "both": 0.0})
    for batch in BatchMaker(index, kept).make_step(1):
        assert batch.reference_pixels is not None and batch.reference_pixels.shape[2:] == (64, 64, 3)
        assert batch.reference_pixels.any() and batch.alignment_mask.all()
