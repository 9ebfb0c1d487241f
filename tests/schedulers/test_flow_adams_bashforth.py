"""FlowAdamsBashforthScheduler: against a loop written out, its order of convergence, and diffusers' ways."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from localdit.schedulers.flow_adams_bashforth import FlowAdamsBashforthScheduler


def sample(
    scheduler: FlowAdamsBashforthScheduler,
    velocity: Callable[[Tensor, float], Tensor],
    start: Tensor,
    first: int = 0,
) -> Tensor:
    """Follow dx/dσ = velocity(x, σ) from the noise level of a step down to 0."""
    x = start
    for t, sigma in zip(scheduler.timesteps[first:], scheduler.sigmas[first:]):
        x = scheduler.step(velocity(x, float(sigma)), t, x).prev_sample
    return x


def field(x: Tensor, sigma: float) -> Tensor:
    return torch.sin(3 * x) * (1 + sigma) - x


@pytest.mark.parametrize("shift", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_steps_are_the_loop_written_out(steps, shift):
    """In the time t = 1 - σ of the published program, whose grid and shift look different."""
    start = torch.randn(3, 4, dtype=torch.float64)
    times = np.linspace(0, 1, steps + 1)
    times = times / (times + (1 - times) * shift)
    x, before = start, None
    for now, then in pairwise(times):
        v = -field(x, 1 - now)  # dx/dt
        x = x + (then - now) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v

    scheduler = FlowAdamsBashforthScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.from_numpy(1 - times), rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    torch.testing.assert_close(sample(scheduler, field, start), x, rtol=1e-5, atol=1e-5)


def test_a_linear_velocity_costs_the_first_steps_error_and_no_more():
    """v(t) = a + b t: Euler's first step misses b Δt² / 2, and the rule is exact for what follows."""
    a, b, steps = 0.3, -1.7, 8
    scheduler = FlowAdamsBashforthScheduler()
    scheduler.set_timesteps(steps)
    reached = sample(scheduler, lambda x, sigma: -torch.full_like(x, a + b * (1 - sigma)), torch.zeros(2))
    error = reached - (a + b / 2)
    torch.testing.assert_close(error, torch.full((2,), -b / steps**2 / 2), rtol=1e-4, atol=1e-6)


def test_it_converges_with_the_second_order():
    """dx/dσ = x has the solution x(0) = x(1) / e. Twice the steps, a quarter of the error."""
    errors = []
    for steps in (20, 40, 80):
        scheduler = FlowAdamsBashforthScheduler()
        scheduler.set_timesteps(steps)
        reached = sample(scheduler, lambda x, sigma: x, torch.ones(1, dtype=torch.float64))
        errors.append(abs(reached.item() - math.exp(-1)))
    assert 3.6 < errors[0] / errors[1] < 4.4
    assert 3.6 < errors[1] / errors[2] < 4.4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_is_eulers_and_the_grid_is_that_of_diffusers(shift):
    steps = 5
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    euler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    ours = FlowAdamsBashforthScheduler(shift=shift)
    ours.set_timesteps(steps)
    torch.testing.assert_close(ours.sigmas, euler.sigmas)
    torch.testing.assert_close(ours.timesteps, euler.timesteps)
    start, velocity = torch.randn(2, 3), torch.randn(2, 3)
    ours_next = ours.step(velocity, ours.timesteps[0], start, return_dict=False)[0]
    torch.testing.assert_close(ours_next, euler.step(velocity, euler.timesteps[0], start).prev_sample)
    ours.set_timesteps(steps, shift=1.0)
    torch.testing.assert_close(ours.sigmas, torch.linspace(1, 0, steps + 1))


def test_own_levels_are_shifted_like_equal_ones():
    scheduler = FlowAdamsBashforthScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=[0.5, 0.2])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([2 / 3, 1 / 3, 0.0]))
    assert scheduler.num_inference_steps == 2


def test_sampling_may_begin_at_a_later_step_and_begins_with_eulers():
    """Told by index, as a pipeline does, or found by the timestep."""
    start = torch.randn(4, dtype=torch.float64)
    expected, sigmas, before = start, torch.linspace(1, 0, 11, dtype=torch.float64), None
    for i in range(6, 10):
        v = field(expected, float(sigmas[i]))
        expected = expected - 0.1 * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
    for told in (True, False):
        scheduler = FlowAdamsBashforthScheduler()
        scheduler.set_timesteps(10)
        if told:
            scheduler.set_begin_index(6)
            assert scheduler.begin_index == 6
        torch.testing.assert_close(sample(scheduler, field, start, 6), expected, rtol=1e-5, atol=1e-5)
        assert scheduler.step_index == 10


def test_a_new_run_remembers_nothing():
    scheduler, start = FlowAdamsBashforthScheduler(), torch.randn(4)
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        runs.append(sample(scheduler, field, start))
    assert torch.equal(*runs)


def test_noise_is_mixed_in_by_the_level_of_each_sample():
    scheduler = FlowAdamsBashforthScheduler()
    scheduler.set_timesteps(4)
    clean, noise = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    noisy = scheduler.scale_noise(clean, scheduler.timesteps[[0, 3]], noise)
    torch.testing.assert_close(noisy[0], noise[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    scheduler.set_begin_index(2)
    same = scheduler.scale_noise(clean, scheduler.timesteps[2].expand(2), noise)
    torch.testing.assert_close(same, (clean + noise) / 2)
    scheduler.step(noise - clean, scheduler.timesteps[2], same)  # the next level is what inpainting asks for
    later = scheduler.scale_noise(clean, scheduler.timesteps[3].expand(2), noise)
    torch.testing.assert_close(later, 0.75 * clean + 0.25 * noise)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_and_the_sample_keeps_its_dtype(dtype):
    scheduler = FlowAdamsBashforthScheduler()
    scheduler.set_timesteps(2)
    start, velocity = torch.ones(3, dtype=dtype), torch.full((3,), 0.1, dtype=dtype)
    reached = sample(scheduler, lambda x, sigma: velocity, start)
    assert reached.dtype == dtype
    torch.testing.assert_close(reached.float(), torch.full((3,), 0.9), rtol=0, atol=0.005)


def test_it_saves_and_loads_as_diffusers_do(tmp_path):
    scheduler = FlowAdamsBashforthScheduler(shift=2.0)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowAdamsBashforthScheduler.from_pretrained(tmp_path)
    assert (loaded.config.shift, len(loaded)) == (2.0, 1000)
    other = FlowAdamsBashforthScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert other.config.shift == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of num_inference_steps and sigmas must be given, got None and None"),
        ({"num_inference_steps": 2, "sigmas": [1.0, 0.5]}, r"must be given, got 2 and \[1.0, 0.5\]"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a positive integer, got 2.5"),
        ({"sigmas": []}, r"sigmas must fall within \(0, 1\], got \[\]"),
        ({"sigmas": [0.5, 0.5]}, "sigmas must fall"),
        ({"sigmas": [1.5, 0.5]}, "sigmas must fall"),
        ({"sigmas": [0.5, 0.0]}, "sigmas must fall"),
    ],
)
def test_levels_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowAdamsBashforthScheduler().set_timesteps(**arguments)


def test_a_timestep_of_another_grid_is_refused():
    scheduler = FlowAdamsBashforthScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep must be one of the scheduler's timesteps, got 333"):
        scheduler.step(torch.zeros(1), 333.0, torch.zeros(1))
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        FlowAdamsBashforthScheduler(shift=0)
