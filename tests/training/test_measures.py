"""Statistics of a step, and the formula for its floating point operations against torch's own count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_shards import VISION_WIDTH, make_config
from torch.utils.flop_counter import FlopCounterMode

from refalign.estimates.compute import ModelSizes, count_flops, peak_flops
from refalign.objective.flow_matching import make_training_schedule
from refalign.shards.reader import ShardIndex
from refalign.training.batch import BatchMaker
from refalign.training.loop import start_run, take_step
from refalign.training.measures import SUMS, Meter, bin_of, pass_of
from refalign.training.models import build_models
from refalign.training.step import train_step

KEEP_ALL = {"dropout": {"text": 0.0, "references": 0.0, "both": 0.0}}


@pytest.mark.parametrize("alignment", ["none", "reference_alignment"])
def test_the_flop_formula_is_torchs_count(alignment: str, base: Path, shards: Path) -> None:
    config = make_config(base, global_batch=8, micro_batch=8, **KEEP_ALL)
    config = config.model_copy(update={"objective": config.objective.model_copy(update={"alignment": alignment})})
    models = build_models(config, VISION_WIDTH)
    sizes = ModelSizes.of(models.transformer.config, config, VISION_WIDTH)
    for batch in BatchMaker(ShardIndex.open(shards, "train"), config).make_step(1):
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            options = {"objective": config.objective, "global_batch_size": 8}
            train_step(models, batch, make_training_schedule(), **options).terms.total.backward()
        assert count_flops(sizes, pass_of(batch, sizes)) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_devices_are_known_by_their_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some other device") is None and peak_flops(None) is None


def test_loss_by_quarter_and_histogram_are_of_the_samples_drawn(base: Path, shards: Path, tmp_path: Path) -> None:
    config = make_config(base, global_batch=20, micro_batch=4, optimizer={"ema_decay": 0.5})
    run = start_run(config, shards, tmp_path)
    batches = run.maker.make_step(1)
    index = torch.cat([batch.timestep_index for batch in batches])
    record = take_step(run, 1, batches)
    counts = [record[f"timesteps/{start:03d}"] for start in range(0, 1000, 100)]
    timesteps = run.schedule.timesteps[index]
    assert counts == [int(((timesteps >= low) & (timesteps < low + 100 + (low == 900))).sum()) for low in range(0, 1000, 100)]
    shares = [int((index // 250 == 4 - quarter).sum()) for quarter in (1, 2, 3, 4)]
    assert sum(shares) == sum(counts) == 20
    mean = sum(share * record.get(f"flow_matching/q{n}", 0.0) for n, share in enumerate(shares, 1)) / 20
    assert mean == pytest.approx(record["flow_matching"], rel=1e-5)
    assert record["tokens_per_s"] > 0 and record["tflops_per_rank"] > 0 and record["peak_memory_bytes"] > 2**20
    assert "mfu" not in record  # of a CPU no peak is known


def test_a_quarter_nobody_drew_is_left_out() -> None:
    meter = Meter(None, torch.linspace(1000, 1, 1000), torch.device("cpu"))  # type: ignore[arg-type]
    sums = [6.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 1.0, *[0.0] * 10, 300.0, 5.0]
    assert len(sums) == SUMS
    record = meter.describe(sums, step_s=2.0, num_ranks=1)
    assert [record.get(f"flow_matching/q{n}") for n in (1, 2, 3, 4)] == [1.0, None, None, 3.0]
    assert record["tokens_per_s"] == 150.0
    assert bin_of(torch.tensor([0.0, 99.9, 100.0, 1000.0])).tolist() == [0, 0, 1, 9]


def test_each_terms_gradient_is_measured_and_the_step_stays_the_same(base: Path, shards: Path, tmp_path: Path) -> None:
    results = []
    for every in (0, 2):
        run = start_run(
            make_config(base, validation={"gradient_norms_every": every}, global_batch=8), shards, tmp_path / str(every)
        )
        records = [take_step(run, step, run.maker.make_step(step)) for step in (1, 2)]
        results.append((records, [parameter.detach().clone() for parameter in run.models.parameters()]))
    (plain, weights), (measured, same_weights) = results
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
    assert [record["grad_norm"] for record in plain] == [record["grad_norm"] for record in measured]
    assert "grad_norm/alignment" not in measured[0] and "grad_norm/alignment" not in plain[1]
    flow, alignment = measured[1]["grad_norm/flow_matching"], measured[1]["grad_norm/alignment"]
    assert alignment > 0 and abs(flow - alignment) <= measured[1]["grad_norm"] * (1 + 1e-5) <= (flow + alignment) * (1 + 1e-5)
