"""The capacity plan: a hand-worked example, what makes it grow, and what it refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from refalign.config import apply_overrides
from refalign.config.presets import load_preset
from refalign.errors import ConfigError
from refalign.estimates.compute import ModelSizes, PassSizes, count_flops
from refalign.estimates.plan import _PUBLISHED, _WAN, Assumptions, Plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = "wan2_1_1_3b", "wan2_1_14b"
GIVEN = {"clips": 1000, "subjects": 2, "kept": 0.5, "references": 3}
GIVEN |= {"gpu": "A100", "mfu": 0.5, "detector_fps": 100, "vae_megapixels": 10, "gpus": 4, "price": 2.0}


def plan_with(preset=SMALL, *overrides, **given) -> Plan:
    return make_plan(apply_overrides(load_preset(preset), overrides), Assumptions.of(**given))


def test_a_plan_worked_out_by_hand():
    """DINOv3 ViT-L: 24 x (4 x 1024^2 + 2 x 1024 x 4096) + 3 x 256 x 1024 = 302,776,320 parameters."""
    config = load_preset(SMALL)
    plan = plan_with(**GIVEN)
    crop = 2 * 201 * 302_776_320 + 4 * 24 * 201**2 * 1024  # 14 x 14 patches, CLS and 4 registers
    reference = 2 * 1565 * 302_776_320 + 4 * 24 * 1565**2 * 1024  # 30 x 52 patches
    speed = 0.5 * 312e12
    curation_s = 1000 * (9 / 100 + 2 * crop / speed)
    encode_s = 500 * (480 * 832 * (81 + 6) / 1e6 / 10 + 6 * reference / speed)
    assert plan.gpu_hours["curation"] == pytest.approx(curation_s / 3600)
    assert plan.gpu_hours["encode"] == pytest.approx(encode_s / 3600)
    transformer = _WAN | _PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    sample = count_flops(ModelSizes.of(transformer, config, 1024), PassSizes(1, 21 * 1560, 2, 1560, 512))
    assert plan.gpu_hours["train"] == pytest.approx(25_000 * 8 * sample / speed / 3600)
    assert plan.hours["total"] == pytest.approx(sum(plan.gpu_hours[step] for step in ("curation", "encode", "train")) / 4)
    assert plan.cost == pytest.approx(plan.gpu_hours["total"] * 2)
    assert (plan.samples, plan.passes_over_the_data, plan.gpus_at_least) == (500, 400, 1)


def test_storage_is_what_the_shards_step_foretells():
    """The README's 5 million published clips with three references: 69 TiB, and 30 with computed targets."""
    data = {"clips": 5e6, "subjects": 3, "references": 1, "caption_tokens": 99}
    assert plan_with(**data).storage_bytes / 2**40 == pytest.approx(69, abs=0.6)
    assert plan_with(SMALL, "shards.targets=computed", **data).storage_bytes / 2**40 == pytest.approx(30, abs=0.6)


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
    plan = plan_with("toy", clips=57, subjects=1.5)
    assert plan.gpus == plan.gpus_at_least == 1 and 0 < plan.memory_bytes < 2**30


MORE = {
    "clips": ({"clips": 2000}, {"storage_bytes", "curation", "encode"}),
    "kept": ({"kept": 1.0}, {"storage_bytes", "encode"}),
    "references": ({"references": 4}, {"storage_bytes", "encode"}),
    "subjects": ({"subjects": 3}, {"storage_bytes", "curation", "encode", "train"}),
    "caption tokens": ({"caption_tokens": 200}, {"storage_bytes"}),
    "a slower detector": ({"detector_fps": 50}, {"curation"}),
    "a slower VAE": ({"vae_megapixels": 5}, {"encode"}),
    "a lower share of the peak": ({"mfu": 0.25}, {"curation", "encode", "train"}),
}


@pytest.mark.parametrize("name", MORE)
def test_what_grows_with_what(name):
    changed, growing = MORE[name]
    plans = (plan_with(**GIVEN), plan_with(**GIVEN | changed))
    before, after = (plan.gpu_hours | {"storage_bytes": plan.storage_bytes} for plan in plans)
    assert {key for key in after if after[key] > before[key]} == growing | ({"total"} if growing != {"storage_bytes"} else set())
    assert all(after[key] >= before[key] for key in after)


def test_more_gpus_take_less_time_and_the_same_money():
    few, many = (plan_with(LARGE, **GIVEN | {"gpu": "H100", "gpus": gpus}) for gpus in (8, 64))
    assert many.hours["total"] == pytest.approx(few.hours["total"] / 8) and many.cost == few.cost
    assert many.memory_bytes < few.memory_bytes


def test_larger_gpus_are_needed_in_no_larger_number():
    counts = [plan_with(LARGE, clips=1000, gpu_memory_gib=size).gpus_at_least for size in (60, 80, 141, 180)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert plan_with(LARGE, "training.lora.rank=32", clips=1000).gpus_at_least <= counts[1]


POSITIVE = "Input should be greater than 0"
REFUSED = {
    "no clip": ({"clips": 0}, rf"--clips: {POSITIVE} \(got 0\)"),
    "clips below none": ({"clips": -5}, f"--clips: {POSITIVE}"),
    "endless clips": ({"clips": math.inf}, "--clips: Input should be a finite number"),
    "no number": ({"clips": math.nan}, "--clips: Input should be a finite number"),
    "more subjects than are kept": ({"subjects": 9}, "curation.max_references=3"),
    "more kept than there is": ({"kept": 1.5}, "--kept: Input should be less than or equal to 1"),
    "an unknown GPU": ({"gpu": "abacus"}, "--gpu abacus: unknown; known are H200"),
    "more than the peak": ({"mfu": 30}, "--mfu: Input should be less than or equal to 1"),
    "a detector that stands": ({"detector_fps": 0}, f"--detector-fps: {POSITIVE}"),
    "no memory": ({"gpu_memory_gib": 0}, f"--gpu-memory-gib: {POSITIVE}"),
    "a price below nothing": ({"price": -1}, "--price: Input should be greater than or equal to 0"),
    "GPUs that do not divide the batch": ({"gpus": 3}, "--gpus 3: .*possible are 1, 2, 4, 8"),
    "GPUs that are too small": ({"gpu_memory_gib": 8}, r"a rank needs .* Try .*lora\.rank"),
    "clips twice": ({"hours": 1}, "give --clips or --hours"),
    "no clips": ({"clips": None}, "give --clips or --hours"),
    "clips of no length": ({"clips": None, "hours": 1, "clip_seconds": 0}, f"--clip-seconds: {POSITIVE}"),
    "an unknown name": ({"clocks": 1}, "clocks: Extra inputs are not permitted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused(name):
    changed, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        plan_with(**GIVEN | changed)


def test_a_data_set_is_clips_or_hours():
    assert plan_with(hours=2, clip_seconds=3).clips == 2400 and plan_with(clips=7).clips == 7


def test_the_command_prints_its_assumptions():
    command = [sys.executable, "pipelines/plan.py", "--hours", "100", "--mfu", "0.25", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=True)
    plan = Plan(**json.loads(done.stdout))
    assert plan.clips == math.floor(100 * 3600 / (81 / 25)) and "25% of the 989 TFLOP/s" in " ".join(plan.assumptions)
    said = plan.describe()
    assert "assumed, not measured:" in said and "H100" in said and "cost" not in said
