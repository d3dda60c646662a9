import pytest
import torch
from safetensors.torch import load_file

from refalign.objective.flow_matching import (
    add_noise,
    alignment_gate,
    flow_matching_loss,
    make_inference_sigmas,
    make_training_schedule,
    velocity_target,
)
from tests.oracles import losses
from tests.oracles.parity import PARITY


@pytest.fixture(scope="module")
def published():
    return load_file(PARITY / "schedule.safetensors")


def test_training_schedule_matches_published_numbers(published):
    schedule = make_training_schedule()
    torch.testing.assert_close(schedule.timesteps, published["train_timesteps"], rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.weights, published["train_weights"], rtol=0, atol=1e-6)
    torch.testing.assert_close(alignment_gate(schedule.timesteps), published["train_gate"], rtol=0, atol=1e-6)


def test_inference_sigmas_match_published_numbers(published):
    sigmas = make_inference_sigmas(50)
    torch.testing.assert_close(sigmas, published["infer_sigmas"], rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * sigmas, published["infer_timesteps"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_schedule_equals_loops_at_other_shifts(shift):
    schedule = make_training_schedule(shift)
    sigmas, timesteps, weights = torch.tensor(losses.training_schedule(shift), dtype=torch.float64).T
    torch.testing.assert_close(schedule.sigmas.double(), sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(schedule.timesteps.double(), timesteps, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(schedule.weights.double(), weights, rtol=1e-4, atol=1e-5)
    assert float(schedule.weights.mean()) == pytest.approx(1, abs=1e-5)


def test_velocity_is_the_slope_of_the_noising_path():
    latents, noise = torch.randn(2, 3, 16, 2, 4, 4, dtype=torch.float64)
    low, high = torch.tensor([[0.2, 0.5, 0.9], [0.3, 0.6, 1.0]], dtype=torch.float64)
    slope = (add_noise(latents, noise, high) - add_noise(latents, noise, low)) / 0.1
    torch.testing.assert_close(slope, velocity_target(latents, noise))
    assert torch.equal(add_noise(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(3)), noise)


def test_flow_matching_equals_loops_and_reduces_each_sample_alone():
    velocity, target, weight = torch.randn(3, 2, 2, 3, 3), torch.randn(3, 2, 2, 3, 3), torch.tensor([0.0, 1.0, 2.0])
    loss = flow_matching_loss(velocity, target, weight)
    torch.testing.assert_close(loss.tolist(), losses.flow_matching(velocity, target, weight), rtol=1e-5, atol=1e-7)
    assert torch.equal(loss[1:], flow_matching_loss(velocity[1:], target[1:], weight[1:]))


def test_flow_matching_is_float32_for_bfloat16_predictions():
    velocity, target = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    assert flow_matching_loss(velocity.bfloat16(), target, torch.ones(2)).dtype == torch.float32


def test_without_the_bell_all_levels_count_alike() -> None:
    bell, uniform = make_training_schedule(3.0), make_training_schedule(3.0, bell=False)
    assert torch.equal(bell.sigmas, uniform.sigmas) and torch.equal(bell.timesteps, uniform.timesteps)
    assert torch.equal(uniform.weights, torch.ones(1000)) and float(bell.weights[0]) == 0.0
