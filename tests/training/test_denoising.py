"""The denoising objective: which timesteps it draws, what it predicts, and how errors are weighted."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from localdit.training.denoising import Denoising
from localdit.training.order import Draws

BETAS = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
# Shares of signal and noise at each timestep, by the definition.
KEPT = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
SIGNAL, NOISE = (torch.tensor(np.sqrt(share), dtype=torch.float32) for share in (KEPT, 1 - KEPT))


def denoising(kind="epsilon", **fields) -> Denoising:
    objective = Denoising(data=None, scheduler={}, **fields)
    objective.use_scheduler(DDPMScheduler(**BETAS, prediction_type=kind))
    return objective


def draws(count: int) -> Draws:
    return Draws(3, range(count), torch.device("cpu"))


def sigmoid(value: float) -> float:
    return 1 / (1 + np.exp(-value))


class Says(nn.Module):
    """A model that says what it was told to, whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states, timestep, return_dict):
        return (self.answer,)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_uniform_or_shifted_to_more_noise(shift):
    """Of uniform times u the share below t is t / (s - (s - 1) t), eq. 23 of Esser et al. solved for u."""
    times = denoising(timestep_shift=shift).levels(draws(4000)).double() / 1000
    assert times.min() >= 0
    assert times.max() < 1
    for time in (0.1, 0.25, 0.5, 0.75, 0.9):
        share = time / (shift - (shift - 1) * time)
        assert (times < time).double().mean() == pytest.approx(share, abs=0.04)


def test_timesteps_are_logit_normal_on_request():
    fields = {"timestep_sampling": "logit_normal", "logit_mean": -0.7, "logit_std": 1.5}
    times = denoising(**fields).levels(draws(4000)).double() / 1000
    for deviations, share in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):
        time = sigmoid(-0.7 + 1.5 * deviations)
        assert (times < time).double().mean() == pytest.approx(share, abs=0.04)


def test_timesteps_depend_on_each_samples_position_alone():
    objective = denoising(timestep_sampling="logit_normal", timestep_shift=2.0)
    together = objective.levels(draws(9))
    assert torch.equal(objective.levels(Draws(3, [7, 2], torch.device("cpu"))), together[[7, 2]])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_an_error_is_of_the_prediction_and_min_snr_bounds_its_weight_in_the_clean_picture(kind, gamma):
    """Whatever is predicted, a min-SNR weighted error is min(SNR, gamma) times that of the clean picture that
    is implied (Hang et al. 2023, section 3.4)."""
    level = torch.tensor([3, 120, 400, 700, 960])
    signal, noisy = (share[level].view(-1, 1, 1, 1) for share in (SIGNAL, NOISE))
    clean, noise, off = (torch.randn(5, 4, 6, 3) for _ in range(3))
    right = noise if kind == "epsilon" else signal * noise - noisy * clean
    objective = denoising(kind, min_snr_gamma=gamma)
    assert objective.errors(Says(right), clean, noise, level, draws(5)).abs().max() < 1e-9

    errors = objective.errors(Says(right + off), clean, noise, level, draws(5))
    torch.testing.assert_close(errors, off.square().mean((1, 2, 3)))
    weights = objective.weights(level)
    if gamma is None:
        assert torch.equal(weights, torch.ones(5))
        return
    implied = off * noisy / signal if kind == "epsilon" else off * noisy
    snr = (SIGNAL / NOISE)[level] ** 2
    expected = snr.clamp(max=gamma) * implied.square().mean((1, 2, 3))
    torch.testing.assert_close(weights * errors, expected, rtol=2e-4, atol=0)


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, got 'sample'"):
        denoising("sample")
