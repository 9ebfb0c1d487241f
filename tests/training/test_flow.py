"""Rectified flow in both directions of time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.schedulers.flow_adams_bashforth import FlowAdamsBashforthScheduler
from localdit.training.flow import (
    Direction,
    flow_errors,
    model_time,
    noise_levels,
    noisy_sample,
    shift_levels,
    velocity,
)

both = pytest.mark.parametrize("direction", ["data", "noise"])


# --- Time


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_shift_is_one_in_both_directions_of_time(shift):
    """The class model's program shifts t = 1 - σ, by t / (t + (1 - t) α), and the text model's shifts σ."""
    t = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(shift_levels(1 - t, shift), 1 - t / (t + (1 - t) * shift))


def test_the_shift_has_the_published_numbers():
    shifted = shift_levels(torch.tensor([0.999, 0.4995, 0.0]), 4.0)
    torch.testing.assert_close(shifted, torch.tensor([0.99975, 0.79968, 0.0]), rtol=0, atol=1e-5)


def test_noise_levels_are_logit_normal():
    """Their logit has the mean and the deviation that were asked for; half of them lie below one half."""
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sigma = noise_levels(normal)
    torch.testing.assert_close(sigma.logit(), normal, rtol=0, atol=1e-3)
    assert abs((sigma < 0.5).float().mean() - 0.5) < 0.01
    moved = noise_levels(normal, mean=-1.0, std=0.5).logit()
    assert abs(moved.mean() + 1) < 0.02
    assert abs(moved.std() - 0.5) < 0.02
    torch.testing.assert_close(
        noise_levels(normal, shift=3.0).logit(), normal + math.log(3), rtol=0, atol=2e-3
    )


def test_the_text_models_levels_are_rounded_down_to_a_thousand_before_the_shift():
    normal = torch.tensor([0.0, 1.0, 30.0, -30.0])
    torch.testing.assert_close(noise_levels(normal, levels=1000), torch.tensor([0.5, 0.731, 0.999, 0.0]))
    shifted = noise_levels(normal, shift=4.0, levels=1000)
    torch.testing.assert_close(shifted[2:], torch.tensor([0.99975, 0.0]), rtol=0, atol=1e-6)


def test_a_level_is_told_by_each_model_in_its_own_way():
    sigma = torch.tensor([0.0, 0.25, 1.0])
    assert model_time(sigma, "data").tolist() == [1.0, 0.75, 0.0]
    assert model_time(sigma, "noise").tolist() == [0.0, 250.0, 1000.0]


# --- Samples and targets


def test_samples_lie_between_data_and_noise():
    data, noise = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    sample = noisy_sample(data, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(sample[0], data[0])
    torch.testing.assert_close(sample[1], 0.75 * data[1] + 0.25 * noise[1])
    torch.testing.assert_close(sample[2], noise[2])


@both
def test_the_velocity_is_the_samples_derivative_in_the_models_time(direction):
    data, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    sigma, step = torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-4
    ahead = sigma - step if direction == "data" else sigma + step
    change = (noisy_sample(data, noise, ahead) - noisy_sample(data, noise, sigma)) / step
    torch.testing.assert_close(velocity(data, noise, direction), change, rtol=1e-6, atol=1e-6)


class Oracle(nn.Module):
    """Knows the pictures, and from them and a noisy sample the velocity."""

    def __init__(self, data: Tensor, direction: Direction):
        super().__init__()
        self.data, self.direction = data, direction
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        self.calls.append(kwargs)
        sigma = 1 - timestep if self.direction == "data" else timestep / 1000
        to_noise = (hidden_states - self.data) / sigma.view(-1, 1, 1, 1)
        return (-to_noise if self.direction == "data" else to_noise,)


@both
def test_an_oracle_has_no_loss_and_a_model_of_the_other_direction_has(direction):
    data, noise, sigma = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    oracle = Oracle(data, direction)
    assert flow_errors(oracle, data, noise, sigma, direction, class_labels="seen").max() < 1e-9
    assert oracle.calls == [{"class_labels": "seen", "return_hidden_state_of": None, "return_dict": False}]
    other = Oracle(data, "noise" if direction == "data" else "data")
    assert flow_errors(other, data, noise, sigma, direction).min() > 1


def test_the_errors_are_mean_squares_written_out():
    torch.manual_seed(0)
    model = PixelDiTTransformer2DModel(
        patch_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_pixel_layers=1,
        pixel_dim=4, num_classes=5,
    )  # fmt: skip
    nn.init.normal_(model.proj_out.weight)
    data, noise, labels = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), torch.tensor([1, 5])
    times = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        errors = flow_errors(model, data, noise, 1 - times, "data", class_labels=labels)
        for i in range(2):
            sample = times[i] * data[i] + (1 - times[i]) * noise[i]
            predicted = model(sample[None], times[i], labels[i : i + 1]).sample[0]
            by_hand = (predicted - (data[i] - noise[i])).square().mean()
            torch.testing.assert_close(errors[i], by_hand, rtol=1e-5, atol=0)
        in_16_bits = flow_errors(model.bfloat16(), data.bfloat16(), noise.bfloat16(), 1 - times, "data",
                                 class_labels=labels)  # fmt: skip
    assert errors.dtype == in_16_bits.dtype == torch.float32
    with pytest.raises(ValueError, match="direction must be 'data' or 'noise', got 'up'"):
        flow_errors(model, data, noise, 1 - times, "up", class_labels=labels)  # type: ignore[arg-type]


def test_what_a_model_learns_its_sampler_follows():
    """A few steps of training towards one picture, and the scheduler arrives near it."""
    torch.manual_seed(0)
    picture = torch.tensor([0.8, -0.5, 0.1])[:, None, None].expand(3, 8, 8)

    class Constant(nn.Module):
        """Predicts the clean picture, and from that the velocity to the data."""

        def __init__(self) -> None:
            super().__init__()
            self.picture = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            return ((self.picture - x) / (1 - timestep).clamp(min=0.05).view(-1, 1, 1, 1),)

    model = Constant()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(100):
        sigma = noise_levels(torch.randn(8)).clamp(min=0.05)
        errors = flow_errors(model, picture.expand(8, 3, 8, 8), torch.randn(8, 3, 8, 8), sigma, "data")
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
    scheduler = FlowAdamsBashforthScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for t, level in zip(scheduler.timesteps, scheduler.sigmas):
            x = scheduler.step(-model(x, 1 - level[None])[0], t, x).prev_sample
    assert (x - picture).abs().max() < 0.1
