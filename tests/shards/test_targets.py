"""Targets stored, halved or computed in training: bytes foretold and written, the same losses; real runs of a small world."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from refalign.config import RunConfig, apply_overrides
from refalign.config.presets import load_preset
from refalign.errors import ArtifactError
from refalign.estimates.storage import ShardSize, announce_size, estimate_parts
from refalign.models.loading import load_grid
from refalign.pipeline.steps import Step
from refalign.shards.encode import make_reference
from refalign.shards.plan import plan_shards
from refalign.shards.reader import ShardIndex
from refalign.shards.sample import has_targets, pack_pictures, unpack_pictures
from refalign.toy.videos import write_world
from tests.curating_here import curate_here, do_without_ray, make_config

SETTINGS = {
    "stored": (),
    "computed": ("shards.targets=computed",),
    "small": ("shards.target_dtype=int8", "shards.augmented_references=2", "shards.frame_tokens=true"),
}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, dict[str, Step]]]:
    """One input under three settings of shards; subjects and pairs are made once."""
    root = tmp_path_factory.mktemp("targets")
    write_world(root / "videos", num_videos=8, seed=3, split="heldout")
    with pytest.MonkeyPatch.context() as patch:
        do_without_ray(patch)
        configs = {name: make_config(*settings) for name, settings in SETTINGS.items()}
        return {name: (config, curate_here(config, root / "videos", root / "out")) for name, config in configs.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_are_foretold_from_the_plan(name: str, curated) -> None:
    config, steps = curated[name]
    plan = plan_shards(config.shards, steps["subjects"], steps["pairs"])
    foretold = estimate_parts({name: work.size for name, work in plan.items()}, config)
    written = {part: (steps["shards"].load_commit(part) or {})["size_bytes"] for part in plan}
    # Contact sheets show these frames enlarged; soft pictures take less than the rate that counts for sharp ones, never more.
    assert len(written) > 2 and 1 <= sum(foretold.values()) / sum(written.values()) < 1.25
    manifest = steps["shards"].load_manifest() or {}
    assert sum(work.references for work in plan.values()) == manifest["references"]


def test_the_size_is_said_before_the_start_and_a_small_disk_refused(curated, tmp_path: Path, monkeypatch, capsys) -> None:
    config, steps = curated["stored"]
    works = plan_shards(config.shards, steps["subjects"], steps["pairs"])
    plan = {name: work.size for name, work in works.items()}
    announce_size(Step.make(tmp_path, "shards", 1), plan, config)
    assert re.fullmatch(r"shards: \d+ samples to store, about [\d.]+ MiB \([\d.]+ KiB each\)\n", capsys.readouterr().out)
    monkeypatch.setattr("refalign.estimates.storage._LARGE_BYTES", 2**20)
    announce_size(Step.make(tmp_path, "shards", 1), plan, config)
    assert re.search(r"shards: very much to store; .*shards.target_dtype=int8 would take about", capsys.readouterr().out)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**19}))
    with pytest.raises(ArtifactError, match=r"512\.0 KiB free, about .* needed; .*shards\.target_dtype=int8 would take about"):
        announce_size(Step.make(tmp_path, "shards", 1), plan, config)
    announce_size(steps["shards"], plan, config)  # all parts are there already
    announce_size(Step.make(tmp_path, "shards", 1, store="s3://bucket/prefix"), plan, config)


@pytest.mark.parametrize("token_weight", ["none", "foreground"])
def test_computed_targets_give_the_losses_of_stored_ones(token_weight: str, curated, tmp_path: Path) -> None:
    from refalign.training.loop import start_run, take_step, validate

    losses, batches = {}, {}
    for name in ("stored", "computed"):
        config, steps = curated[name]
        config = config.model_copy(update={"objective": config.objective.model_copy(update={"token_weight": token_weight})})
        run = start_run(config, steps["shards"].folder, tmp_path / name)
        assert (run.vision is None) == (name == "stored")
        batches[name] = run.maker.make_step(1)
        losses[name] = [validate(run), take_step(run, 1, batches[name]), take_step(run, 2, run.maker.make_step(2))]
    for ours, expected in zip(losses["computed"], losses["stored"], strict=True):
        for term in ("flow_matching", "pull", "push", "push_floor", "total"):
            keys = [key for key in expected if key.removeprefix("validation/") == term]
            assert len(keys) == 1 and ours[keys[0]] == pytest.approx(expected[keys[0]], rel=1e-3, abs=1e-5)
    pixels = [batch.reference_pixels for batch in batches["computed"]]
    assert all(each is not None and each.dtype == torch.uint8 for each in pixels)
    assert all(batch.target_tokens is None for batch in batches["computed"])


def test_what_published_sizes_take(monkeypatch, capsys) -> None:
    """Against the samples of `benchmarks/reader.py`: 14.53 MiB, with int8 targets 9.98 MiB, three references each."""
    widths = {"in_channels": 16, "text_dim": 4096, "hidden_size": 1024}
    monkeypatch.setattr("refalign.estimates.storage.load_model_config", lambda *_, **__: widths)
    count = 5_000_000
    plan = {"train-000000.tar": ShardSize(count, 3 * count, 396 * count)}

    def estimate(*settings: str) -> float:
        config = apply_overrides(load_preset("wan2_1_1_3b"), settings)
        return sum(estimate_parts(plan, config).values()) / count / 2**20

    assert estimate() == pytest.approx(14.53, rel=0.03)
    assert estimate("shards.target_dtype=int8") == pytest.approx(9.98, rel=0.03)
    assert estimate("shards.targets=computed") < 7
    announce_size(Step.make(Path("/nowhere"), "shards", store="s3://bucket/prefix"), plan, load_preset("wan2_1_1_3b"))
    said = capsys.readouterr().out
    assert (
        "5000000 samples to store, about 69" in said
        and "very much to store; shards.targets=computed would take about 29.9 TiB" in said
    )


def test_stored_pictures_are_the_pixels_that_targets_are_made_of(curated) -> None:
    from refalign.io.images import decode_image
    from tests.test_takedown import rows_of

    config, steps = curated["computed"]
    crops = {each["subject_id"]: each["crop_png"] for row in rows_of(steps["subjects"]) for each in row["subjects"]}
    index = ShardIndex.open(steps["shards"].folder, "train")
    sample = index.read(0)
    assert not has_targets(sample.tensors)
    references = sample.info["references"]
    files = unpack_pictures(sample.tensors, range(len(references)))
    sizes = config.video.height_px, config.video.width_px, load_grid(config.models).token_px
    for reference, file in zip(references, files, strict=True):
        expected = make_reference(crops[reference["subject_id"]], *sizes)
        np.testing.assert_array_equal(decode_image(file), expected.pixels)


def test_packed_pictures_are_found_by_number() -> None:
    packed = pack_pictures([b"one", b"", b"three"])
    assert unpack_pictures(packed, [2, 0, 1]) == [b"three", b"one", b""] and unpack_pictures(packed, []) == []
    none = pack_pictures([])
    assert len(none["pictures"]) == len(none["picture_sizes"]) == 0
