"""The capacity plan: a hand-worked example, what makes it grow, and what it refuses."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from refalign.config import apply_overrides
from refalign.config.presets import load_preset, toy
from refalign.errors import ConfigError
from refalign.estimates.compute import ModelSizes, PassSizes, count_flops
from refalign.estimates.plan import _PUBLISHED, _WAN, DataSet, Machines, count_clips, describe_plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = "wan2_1_1_3b", "wan2_1_14b"
DATA = DataSet(clips=1000, subjects=2, kept=0.5, references=3)
A100 = Machines(gpu="A100", mfu=0.5, detector_fps=100, vae_megapixels=10, gpus=4, price=2.0)


def test_a_plan_worked_out_by_hand():
    """DINOv3 ViT-L: 24 x (4 x 1024^2 + 2 x 1024 x 4096) + 3 x 256 x 1024 = 302,776,320 parameters."""
    config = load_preset(SMALL)
    plan = make_plan(config, DATA, A100)
    crop = 2 * 201 * 302_776_320 + 4 * 24 * 201**2 * 1024  # 14 x 14 patches, CLS and 4 registers
    reference = 2 * 1565 * 302_776_320 + 4 * 24 * 1565**2 * 1024  # 30 x 52 patches
    speed = 0.5 * 312e12
    curation_s = 1000 * (9 / 100 + 2 * crop / speed)
    encode_s = 500 * (480 * 832 * (81 + 6) / 1e6 / 10 + 6 * reference / speed)
    assert plan["gpu_hours"]["curation"] == pytest.approx(curation_s / 3600)
    assert plan["gpu_hours"]["encode"] == pytest.approx(encode_s / 3600)
    transformer = _WAN | _PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    sample = count_flops(ModelSizes.of(transformer, config, 1024), PassSizes(1, 21 * 1560, 2, 1560, 512))
    assert plan["gpu_hours"]["train"] == pytest.approx(25_000 * 8 * sample / speed / 3600)
    assert plan["hours"]["total"] == pytest.approx(sum(plan["gpu_hours"][step] for step in ("curation", "encode", "train")) / 4)
    assert plan["cost"] == pytest.approx(plan["gpu_hours"]["total"] * 2)
    assert (plan["samples"], plan["passes_over_the_data"], plan["gpus_at_least"]) == (500, 400, 1)


def test_storage_is_what_the_shards_step_foretells():
    """The README's 5 million published clips with three references: 69 TiB, and 30 with computed targets."""
    data = DataSet(clips=5e6, subjects=3, references=1, caption_tokens=99)
    assert make_plan(load_preset(SMALL), data, Machines())["storage_bytes"] / 2**40 == pytest.approx(69, abs=0.6)
    computed = apply_overrides(load_preset(SMALL), ["shards.targets=computed"])
    assert make_plan(computed, data, Machines())["storage_bytes"] / 2**40 == pytest.approx(30, abs=0.6)


def test_the_sizes_of_published_models_are_those_of_their_classes():
    from diffusers import WanTransformer3DModel
    from torch import device

    for name, billions in (("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.42), ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.29)):
        sizes = _WAN | _PUBLISHED[name]
        with device("meta"):
            model = WanTransformer3DModel(**sizes)
        found = ModelSizes.of(sizes, load_preset(SMALL), 1024)
        parameters = sum(each.numel() for each in model.parameters())
        assert found.layers * found.block_parameters + found.outer_parameters == parameters
        assert parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_toy_models_are_planned_from_their_own_files():
    plan = make_plan(toy(), DataSet(clips=57, subjects=1.5), Machines())
    assert plan["gpus"] == plan["gpus_at_least"] == 1 and 0 < plan["memory_bytes"] < 2**30


MORE = {
    "clips": (replace(DATA, clips=2000), A100, {"storage_bytes", "curation", "encode"}),
    "kept": (replace(DATA, kept=1.0), A100, {"storage_bytes", "encode"}),
    "references": (replace(DATA, references=4), A100, {"storage_bytes", "encode"}),
    "subjects": (replace(DATA, subjects=3), A100, {"storage_bytes", "curation", "encode", "train"}),
    "caption tokens": (replace(DATA, caption_tokens=200), A100, {"storage_bytes"}),
    "a slower detector": (DATA, replace(A100, detector_fps=50), {"curation"}),
    "a slower VAE": (DATA, replace(A100, vae_megapixels=5), {"encode"}),
    "a lower share of the peak": (DATA, replace(A100, mfu=0.25), {"curation", "encode", "train"}),
}


@pytest.mark.parametrize("name", MORE)
def test_what_grows_with_what(name):
    data, machines, growing = MORE[name]
    before, after = (
        plan["gpu_hours"] | {"storage_bytes": plan["storage_bytes"]}
        for plan in (make_plan(load_preset(SMALL), DATA, A100), make_plan(load_preset(SMALL), data, machines))
    )
    assert {key for key in after if after[key] > before[key]} == growing | ({"total"} if growing != {"storage_bytes"} else set())
    assert all(after[key] >= before[key] for key in after)


def test_more_gpus_take_less_time_and_the_same_money():
    few, many = (make_plan(load_preset(LARGE), DATA, Machines(gpus=gpus, price=1.0)) for gpus in (8, 64))
    assert many["hours"]["total"] == pytest.approx(few["hours"]["total"] / 8) and many["cost"] == few["cost"]
    assert many["memory_bytes"] < few["memory_bytes"]


def test_larger_gpus_are_needed_in_no_larger_number():
    config = load_preset(LARGE)
    counts = [make_plan(config, DATA, Machines(memory_gib=size))["gpus_at_least"] for size in (60, 80, 141, 180)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    adapters = apply_overrides(config, ["training.lora.rank=32"])
    assert make_plan(adapters, DATA, Machines())["gpus_at_least"] <= counts[1]


REFUSED = {
    "no clip": (DATA.__class__(clips=0), A100, "--clips 0: expected a number above 0"),
    "clips below none": (replace(DATA, clips=-5), A100, "--clips -5"),
    "endless clips": (replace(DATA, clips=math.inf), A100, "--clips inf"),
    "no number": (replace(DATA, clips=math.nan), A100, "--clips nan"),
    "more subjects than are kept": (replace(DATA, subjects=9), A100, "curation.max_references=3"),
    "more kept than there is": (replace(DATA, kept=1.5), A100, "--kept 1.5: expected a share"),
    "an unknown GPU": (DATA, replace(A100, gpu="abacus"), "--gpu abacus: unknown; known are H200"),
    "more than the peak": (DATA, replace(A100, mfu=30), "--mfu 30: expected a share"),
    "a detector that stands": (DATA, replace(A100, detector_fps=0), "--detector-fps 0"),
    "no memory": (DATA, replace(A100, memory_gib=0), "--gpu-memory-gib 0"),
    "a price below nothing": (DATA, replace(A100, price=-1), "--price -1"),
    "GPUs that do not divide the batch": (DATA, replace(A100, gpus=3), "--gpus 3: .*possible are 1, 2, 4, 8"),
    "GPUs that are too small": (DATA, replace(A100, memory_gib=8), r"a rank needs .* Try .*lora\.rank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused(name):
    data, machines, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        make_plan(load_preset(SMALL), data, machines)


def test_a_data_set_is_clips_or_hours():
    assert count_clips(clips=None, hours=2, clip_seconds=3) == 2400 and count_clips(clips=7, hours=None, clip_seconds=3) == 7
    for wrong in ({"clips": 1, "hours": 1}, {"clips": None, "hours": None}):
        with pytest.raises(ConfigError, match="--clips or --hours"):
            count_clips(**wrong, clip_seconds=3)
    with pytest.raises(ConfigError, match="--clip-seconds 0"):
        count_clips(clips=None, hours=1, clip_seconds=0)


def test_the_command_prints_its_assumptions():
    command = [sys.executable, "pipelines/plan.py", "--hours", "100", "--mfu", "0.25", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=True)
    plan = json.loads(done.stdout)
    assert plan["clips"] == math.floor(100 * 3600 / (81 / 25)) and "25% of the 989 TFLOP/s" in " ".join(plan["assumptions"])
    said = describe_plan(plan)
    assert "assumed, not measured:" in said and "H100" in said and "cost" not in said
