"""DiT's loss, against the distributions that it speaks of."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from localdit.training.dit_loss import dit_loss, posterior, variational_bound

BETAS = torch.linspace(1e-4, 2e-2, 1000)
TABLES = posterior(BETAS)


def sample(batch: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, noise, and a prediction of both kinds, (batch, 8, 3, 5)."""
    latents, noise = spread * torch.randn(batch, 4, 3, 5), torch.randn(batch, 4, 3, 5)
    predicted = torch.cat((noise + 0.3 * torch.randn_like(noise), torch.rand_like(noise) * 3 - 1.5), dim=1)
    return latents, noise, predicted


def by_distributions(latents: Tensor, noise: Tensor, predicted: Tensor, t: int) -> Tensor:
    """The bound's term in bits, (B,), in float64, from the sample, its noisy version and distributions."""
    latents, noise, predicted = (x.double() for x in (latents, noise, predicted))
    betas = BETAS.double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    a, before = alpha_bar[t], alpha_bar[t - 1] if t else torch.tensor(1.0).double()
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise

    def mean(clean: Tensor) -> Tensor:
        first = before.sqrt() * betas[t] / (1 - a) * clean
        return first + (1 - betas[t]).sqrt() * (1 - before) / (1 - a) * noisy

    def lowest(t: int) -> Tensor:
        return betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])

    low = lowest(max(t, 1))
    share = (predicted[:, 4:] + 1) / 2
    std = (share * betas[t].log() + (1 - share) * low.log()).div(2).exp()
    guess = (noisy - (1 - a).sqrt() * predicted[:, :4]) / a.sqrt()
    model = Normal(mean(guess), std)
    if t:
        nats = kl_divergence(Normal(mean(latents), low.sqrt()), model)
    else:
        upper, lower = model.cdf(latents + 1 / 255), model.cdf(latents - 1 / 255)
        upper, lower = upper.where(latents <= 0.999, 1.0), lower.where(latents >= -0.999, 0.0)
        nats = -(upper - lower).clamp(min=1e-12).log()
    return nats.flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("t", [1, 2, 17, 500, 999])
def test_the_bound_is_the_divergence_from_the_true_posterior(t):
    latents, noise, predicted = sample(3)
    timestep = torch.full((3,), t)
    bound = dit_loss(predicted, latents, noise, timestep, TABLES) - squared_error(predicted, noise)
    torch.testing.assert_close(
        bound.double(), by_distributions(latents, noise, predicted, t), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_first_timestep_is_scored_by_levels_whose_outer_ones_have_no_end(spread):
    latents, noise, predicted = sample(3, spread)
    bound = dit_loss(predicted, latents, noise, torch.zeros(3).long(), TABLES) - squared_error(
        predicted, noise
    )
    torch.testing.assert_close(
        bound.double(), by_distributions(latents, noise, predicted, 0), rtol=1e-4, atol=1e-5
    )


def squared_error(predicted: Tensor, noise: Tensor) -> Tensor:
    return (predicted[:, :4] - noise).square().flatten(1).mean(1)


def test_one_term_by_hand():
    """Two timesteps of beta 0.1 and 0.2: the posterior's variance is 0.2 * 0.1 / 0.28; halfway to beta, in
    the logarithm, the divergence is (ln 2.8 / 2 - 1 + 2.8^-0.5) / 2 nats, and 0.0811 bits."""
    tables = posterior(torch.tensor([0.1, 0.2]))
    zeros = torch.zeros(1, 1, 2, 2)
    bound = variational_bound(zeros, zeros, zeros, torch.tensor([1]), tables)
    assert bound.item() == pytest.approx((math.log(2.8) / 2 - 1 + 2.8**-0.5) / 2 / math.log(2), rel=1e-6)
    assert bound.item() == pytest.approx(0.0811, abs=1e-4)


def test_the_true_posterior_costs_nothing_and_anything_else_does():
    latents, noise, _ = sample(3)
    timestep = torch.tensor([1, 10, 100])
    exact = torch.cat((noise, torch.full_like(noise, -1)), dim=1)
    torch.testing.assert_close(dit_loss(exact, latents, noise, timestep, TABLES), torch.zeros(3))
    zeros, lowest = torch.zeros_like(noise), torch.full_like(noise, -1)
    for error, variance in ((zeros + 0.1, lowest), (zeros, lowest + 0.5)):
        assert (variational_bound(error, variance, latents, timestep, TABLES) > 1e-7).all()


@pytest.mark.parametrize("t", [1, 3, 250, 999])
def test_the_range_of_the_variance_is_the_schedulers(t):
    """That which samples with the learned range."""
    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(1000)
    for share, table in ((-1.0, TABLES.log_variance), (1.0, TABLES.log_beta)):
        theirs = scheduler._get_variance(t, predicted_variance=torch.tensor(share))
        assert table[t].item() == pytest.approx(theirs.item(), abs=2e-3)  # theirs is rounded to float32
    assert TABLES.log_variance[0] == TABLES.log_variance[1]


def test_the_bound_trains_the_variance_and_the_squared_error_the_noise():
    latents, noise, predicted = sample(4)
    timestep = torch.tensor([0, 1, 30, 999])
    predicted.requires_grad_()
    dit_loss(predicted, latents, noise, timestep, TABLES).sum().backward()
    expected = 2 * (predicted.detach()[:, :4] - noise) / noise[0].numel()
    torch.testing.assert_close(predicted.grad[:, :4], expected)
    assert predicted.grad[:, 4:].isfinite().all()
    assert predicted.grad[1:, 4:].abs().flatten(1).min() > 0


def test_a_batch_is_its_members():
    latents, noise, predicted = sample(4)
    timestep = torch.tensor([0, 1, 30, 999])
    together = dit_loss(predicted, latents, noise, timestep, TABLES)
    assert together.shape == (4,)
    for i in range(4):
        members = (x[i : i + 1] for x in (predicted, latents, noise, timestep))
        torch.testing.assert_close(dit_loss(*members, TABLES), together[i : i + 1])


def test_half_precision_is_scored_in_float32():
    latents, noise, predicted = sample(2)
    timestep = torch.tensor([5, 700])
    half = dit_loss(predicted.bfloat16(), latents, noise, timestep, TABLES)
    assert half.dtype == torch.float32
    whole = dit_loss(predicted.bfloat16().float(), latents, noise, timestep, TABLES)
    assert torch.equal(half, whole)


def test_a_prediction_without_a_variance_is_refused():
    latents, noise, predicted = sample(2)
    with pytest.raises(ValueError, match="predicted must have 8 channels, noise and variance, got 4"):
        dit_loss(predicted[:, :4], latents, noise, torch.tensor([1, 2]), TABLES)
