"""EDMHeunScheduler against algorithm 2 written out, and against recorded numbers."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor
from toy_sparse import pseudo_random, recorded_model

from localdit.schedulers.edm_heun import EDMHeunScheduler

Network = Callable[[Tensor, Tensor], Tensor]


def network(x: Tensor, t: Tensor) -> Tensor:
    """Some smooth F(c_in x, c_noise), of any precision."""
    return (x + 0.3 * t).sin() - 0.4 * x.roll(1, -1) + 0.2 * t


def sample(
    scheduler: Any, noise: Tensor, steps: int | None, model: Network = network, **kwargs: Any
) -> Tensor:
    """The loop of a pipeline."""
    scheduler.set_timesteps(steps, **{k: v for k, v in kwargs.items() if k == "sigmas"})
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        step = {"generator": kwargs["generator"]} if "generator" in kwargs else {}
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **step).prev_sample
    return x


def algorithm_2(noise: Tensor, steps: int, config: Any, generator: torch.Generator | None = None) -> Tensor:
    """Karras et al. 2022, algorithm 2 with table 1's preconditioning and schedule, in float64."""
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    levels = [(high + i / (steps - 1) * (low - high)) ** config.rho for i in range(steps)] + [0.0]
    data = config.sigma_data

    def slope(x: Tensor, sigma: float) -> Tensor:
        total = sigma**2 + data**2
        c_noise = torch.tensor(sigma, dtype=torch.float64).log() / 4
        f = network(x / total**0.5, c_noise)
        clean = data**2 / total * x + sigma * data / total**0.5 * f
        return (x - clean) / sigma

    x = noise.double() * levels[0]
    for sigma, after in pairwise(levels):
        gamma = 0.0
        if config.s_tmin <= sigma <= (config.s_tmax or float("inf")):
            gamma = min(config.s_churn / steps, 2**0.5 - 1)
        hat = sigma * (1 + gamma)
        if gamma > 0:
            fresh = torch.randn(x.shape, generator=generator)
            x = x + config.s_noise * (hat**2 - sigma**2) ** 0.5 * fresh
        first = slope(x, hat)
        there = x + (after - hat) * first
        x = there if after == 0 else x + (after - hat) * (first + slope(there, after)) / 2
    return x


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("steps", [2, 5, 18])
@pytest.mark.parametrize(
    "config", [{}, {"sigma_data": 0.9}, {"sigma_max": 20.0, "sigma_min": 0.1, "rho": 3.0}], ids=str
)
def test_the_ode_is_followed_as_algorithm_2_does(config, steps):
    scheduler = EDMHeunScheduler(**config, state_dtype="float64")
    noise = torch.randn(3, 2, 5, 4)
    expected = algorithm_2(noise, steps, scheduler.config)
    # Float64 but for the timesteps, which are float32 as diffusers has them.
    assert relative_error(sample(scheduler, noise.double(), steps), expected) < 1e-6
    assert relative_error(sample(EDMHeunScheduler(**config), noise, steps), expected) < 1e-4


@pytest.mark.parametrize("churn", [{"s_churn": 4.0}, {"s_churn": 30.0, "s_noise": 1.003}], ids=str)
def test_churn_adds_the_noise_that_algorithm_2_adds(churn):
    """Between the limits, with the random numbers in the same order."""
    scheduler = EDMHeunScheduler(**churn, s_tmin=0.05, s_tmax=50.0, state_dtype="float64")
    noise = torch.randn(2, 2, 5, 4)
    expected = algorithm_2(noise, 9, scheduler.config, torch.Generator().manual_seed(3))
    found = sample(scheduler, noise.double(), 9, generator=torch.Generator().manual_seed(3))
    assert relative_error(found, expected) < 1e-6
    still = sample(EDMHeunScheduler(), noise, 9)
    assert relative_error(found, still.double()) > 1e-2


def test_churn_of_the_first_step_is_in_the_scale_of_the_start():
    """Two independent noises are one of their summed variance."""
    scheduler = EDMHeunScheduler(s_churn=3.0, s_noise=1.1)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0].item() == pytest.approx(80 * 1.3)
    assert scheduler.init_noise_sigma == pytest.approx((80**2 + 1.1**2 * (104**2 - 80**2)) ** 0.5)


def test_a_list_of_generators_adds_to_each_picture_its_own_noise():
    noise = torch.randn(2, 2, 5, 4)
    scheduler = EDMHeunScheduler(s_churn=10.0)
    both = sample(scheduler, noise, 6, generator=[torch.Generator().manual_seed(i) for i in (1, 2)])
    for i in (0, 1):
        alone = sample(scheduler, noise[i : i + 1], 6, generator=torch.Generator().manual_seed(i + 1))
        torch.testing.assert_close(both[i : i + 1], alone)


def test_the_levels_and_times_are_the_recorded_ones():
    scheduler = EDMHeunScheduler(sigma_data=0.9)
    scheduler.set_timesteps(6)
    expected = [80, 24.40834, 5.838948, 0.965417, 0.085087, 0.002]
    assert scheduler.sigmas[::2].tolist() == pytest.approx(expected, rel=1e-5)
    assert scheduler.sigmas[1::2].tolist() == pytest.approx([*expected[1:], 0], rel=1e-5)
    assert scheduler.timesteps.shape == (11,)
    assert scheduler.timesteps[[0, -1]].tolist() == pytest.approx([1.095507, -1.553652], abs=1e-6)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.init_noise_sigma == pytest.approx(80)


@pytest.mark.parametrize(
    ("scheduler", "guidance", "total", "length", "calls"),
    [
        (EDMHeunScheduler(sigma_data=0.9), 1.0, 15.0062, 41.6608, 11),
        (EDMHeunScheduler(sigma_data=0.9), 5.0, 131.963, 122.173, 11),
        (EDMHeunScheduler(sigma_data=0.9, state_dtype="float64"), 5.0, 131.963, 122.173, 11),
        (EDMEulerScheduler(sigma_data=0.9), 1.0, 17.4116, 19.3622, 6),
        (EDMEulerScheduler(sigma_data=0.9), 5.0, 115.255, 72.3661, 6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, EDMEulerScheduler) else None,
)
@torch.no_grad()
def test_the_recorded_samples_come_out(scheduler, guidance, total, length, calls):
    model = recorded_model()
    text = 2 * pseudo_random(1002, (2, 1, 5, 24))[:, 0].float()
    texts = torch.cat((torch.zeros_like(text), text))
    called = []

    def guided(x: Tensor, t: Tensor) -> Tensor:
        called.append(t)
        null, cond = model(torch.cat((x, x)).float(), texts, t).sample.chunk(2)
        return null + guidance * (cond - null)

    scheduler.set_timesteps(6)
    z = 80 * 12**0.5 * pseudo_random(1004, (2, 4, 8, 8))
    for t in scheduler.timesteps:
        z = scheduler.step(guided(scheduler.scale_model_input(z, t), t), t, z).prev_sample
    assert len(called) == calls
    assert z.sum().item() == pytest.approx(total, rel=1e-3)
    assert z.norm().item() == pytest.approx(length, rel=1e-3)


def test_halving_the_step_quarters_the_error_and_halves_eulers():
    # Few octaves of noise, so that the steps are small.
    config = {"sigma_min": 0.5, "sigma_max": 5.0, "final_sigmas_type": "sigma_min", "rho": 1.0}
    start = 5 * torch.randn(2, 5, dtype=torch.float64)

    def end(scheduler: Any, steps: int) -> Tensor:
        return sample(scheduler, start / scheduler.init_noise_sigma, steps)

    truth = end(EDMHeunScheduler(**config, state_dtype="float64"), 161)
    for cls, steps, low, high in (
        (EDMHeunScheduler, (11, 21, 41), 3.3, 4.7),
        (EDMEulerScheduler, (21, 41), 1.7, 2.3),
    ):
        errors = [relative_error(end(cls(**config), count), truth) for count in steps]
        assert all(low < coarse / fine < high for coarse, fine in pairwise(errors)), errors


# --- As diffusers' schedulers are used


def test_own_levels_are_visited():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(sigmas=[30.0, 4.0, 0.2])
    assert scheduler.sigmas.tolist() == pytest.approx([30, 4, 4, 0.2, 0.2, 0])
    assert scheduler.init_noise_sigma == pytest.approx(30)
    assert scheduler.timesteps.tolist() == pytest.approx([math.log(s) / 4 for s in (30, 4, 4, 0.2, 0.2)])


def test_one_step_is_one_call():
    noise = torch.randn(2, 5)
    scheduler = EDMHeunScheduler(sigma_data=0.9)
    scheduler.set_timesteps(1)
    assert len(scheduler.timesteps) == 1
    x = 80 * noise
    t = scheduler.timesteps[0]
    output = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x)
    torch.testing.assert_close(output.prev_sample, output.pred_original_sample)  # straight to zero noise
    total = 80**2 + 0.9**2
    clean = 0.9**2 / total * x + 72 / total**0.5 * network(x / total**0.5, t)
    torch.testing.assert_close(output.prev_sample, clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_state_is_never_less_than_float32(dtype):
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(3)
    x, t = torch.randn(2, 5), scheduler.timesteps[0]
    (previous, clean) = scheduler.step(torch.randn(2, 5).to(dtype), t, x.to(dtype), return_dict=False)
    assert previous.dtype == clean.dtype == torch.float32


def test_noise_is_added_at_the_level_of_a_time():
    """What image to image begins with, at a step in the middle, with churn and without."""
    for churn in (0.0, 2.0):
        scheduler = EDMHeunScheduler(s_churn=churn)
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(4)  # the first call of the third step
        clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[4:5].expand(2))
        sigma = scheduler.sigmas[4].item()
        torch.testing.assert_close(noisy, clean + sigma * noise)
        assert sigma == pytest.approx(scheduler.sigmas[3].item() * (1 + churn / 5))


def test_a_time_of_two_calls_means_the_first_call_of_the_later_step():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(4)
    scheduler.scale_model_input(torch.randn(2, 3), scheduler.timesteps[3])
    assert scheduler.step_index == 4


def test_a_run_may_be_repeated():
    scheduler, noise = EDMHeunScheduler(), torch.randn(2, 5)
    assert torch.equal(sample(scheduler, noise, 4), sample(scheduler, noise, 4))


def test_a_saved_scheduler_loads_with_the_same_config(tmp_path):
    scheduler = EDMHeunScheduler(sigma_data=0.9, s_churn=4.0, s_tmax=50.0, state_dtype="float64")
    scheduler.save_pretrained(tmp_path)
    loaded = EDMHeunScheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "EDMHeunScheduler"
    assert saved["s_tmax"] == 50.0


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_it_takes_the_place_of_diffusers_edm_schedulers_and_they_of_it(cls):
    theirs = cls(sigma_data=0.9, sigma_max=60.0, rho=5.0)
    ours = EDMHeunScheduler.from_config(theirs.config)
    back = cls.from_config(ours.config)
    for name in ("sigma_data", "sigma_max", "sigma_min", "rho", "prediction_type"):
        assert ours.config[name] == back.config[name] == theirs.config[name]
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps[::2], theirs.timesteps)
    torch.testing.assert_close(ours.sigmas[::2].float(), theirs.sigmas[:-1])


def test_the_exponential_schedule_is_diffusers():
    ours, theirs = (
        cls(sigma_schedule="exponential", sigma_max=50.0) for cls in (EDMHeunScheduler, EDMEulerScheduler)
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    torch.testing.assert_close(ours.sigmas[::2].float(), theirs.sigmas[:-1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sigma_min": 0.0}, "sigma_min must be above 0 and at most sigma_max 80.0, got 0.0"),
        ({"sigma_min": 90.0}, "got 90.0"),
        ({"s_churn": -1.0}, "s_churn must not be negative, got -1.0"),
        ({"s_noise": float("nan")}, "s_noise must not be negative, got nan"),
        ({"state_dtype": "float16"}, "state_dtype must be 'float32' or 'float64', got 'float16'"),
    ],
)
def test_a_wrong_config_is_named_with_its_value(config, message):
    with pytest.raises(ValueError, match=message):
        EDMHeunScheduler(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({}, "num_inference_steps must be at least 1, got None"),
        ({"sigmas": [1.0, 2.0]}, r"sigmas must be falling numbers above 0, got \[1.0, 2.0\]"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must be falling numbers above 0"),
    ],
)
def test_wrong_steps_are_named_with_their_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDMHeunScheduler().set_timesteps(**arguments)


def test_an_index_in_place_of_a_time_is_refused():
    scheduler, x = EDMHeunScheduler(), torch.randn(2, 5)
    scheduler.set_timesteps(3)
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match=r"timestep must be one of scheduler\.timesteps"):
            scheduler.step(x, index, x)


def test_a_run_cannot_begin_between_the_calls_of_a_step():
    scheduler, x = EDMHeunScheduler(), torch.randn(2, 5)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="must begin with the first call of a step"):
        scheduler.step(x, scheduler.timesteps[1], x)
