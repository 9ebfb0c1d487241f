"""DiT's training objective: the noise by its squared error, its variance by the variational bound.

Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), section 3.1,
as DiT (Peebles & Xie 2022, arXiv 2212.09748, section 3.1) and LEDiT use it: functions of tensors, and the
objective that trains with them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from localdit.data.samples import Samples
from localdit.training.denoising import Denoising
from localdit.training.order import Draws
from localdit.training.stopping import StopRequest

# B batch   C latent channels   H W latent   T timesteps


@dataclass
class LearnedVariance(Denoising):
    """Denoising by a model that predicts the noise, and in as many further channels its variance.

    Of a model with a locality convolution (LEDiT) the dilation is drawn here, once for each step, so that it
    follows from the seed and the step, whatever processes share it.
    """

    def use_scheduler(self, scheduler: Any) -> None:
        super().use_scheduler(scheduler)
        kind = scheduler.config.prediction_type
        if kind != "epsilon":
            raise ValueError(f"objective.scheduler.prediction_type must be epsilon, got {kind!r}")
        self.tables = posterior(self.noise_schedule.betas)

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        config = model.config
        if config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"model.out_channels must be {2 * config.in_channels}, noise and variance, "
                f"got {config.out_channels}"
            )
        self.dilation = config.get("multi_dilation")
        self.dilation_prob = config.get("multi_dilation_prob", 0.0)
        return super().prepare(model, folder, accelerator, stop)

    def errors(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        level: Tensor,
        draws: Draws,
        **condition: Any,
    ) -> Tensor:
        """`dit_loss` of each sample."""
        if model.training and self.dilation_prob:
            condition["dilation"] = self.dilation if draws.of_step() < self.dilation_prob else 1
        predicted = self.predict(model, clean, noise, level, **condition)
        return dit_loss(predicted, clean, noise, level, self.tables)


class Posterior(NamedTuple):
    """What the distribution of x_{t-1}, given x_t and the clean sample, depends on: (T,) each, float32."""

    log_variance: Tensor  # its own: the lower end of what the model may predict (Ho et al. 2020, eq. 7)
    log_beta: Tensor  # the upper end
    mean_scale: Tensor  # by which an error of the noise is an error of the mean


def posterior(betas: Tensor) -> Posterior:
    """The tables of a noise schedule.

    Args:
        betas: (T,), as of diffusers' schedulers.
    """
    betas = betas.double()  # 1 - alpha_bar is near 0 for the first timesteps
    alpha_bar = torch.cumprod(1 - betas, 0)
    before = torch.cat((torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]))
    variance = betas * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1]  # the first is 0: x_0 given x_0
    mean_scale = betas / ((1 - betas) * (1 - alpha_bar)).sqrt()
    return Posterior(variance.log().float(), betas.log().float(), mean_scale.float())


def dit_loss(
    predicted: Tensor, latents: Tensor, noise: Tensor, timestep: Tensor, tables: Posterior
) -> Tensor:
    """The squared error of the noise, plus the variational bound of the variance.

    The bound of one timestep counts as much as its squared error, which is a weight of 0.001 of the whole
    bound with 1000 timesteps. It trains the variance alone: the noise in it is detached.

    Args:
        predicted: What the transformer gave for the noisy sample, (B, 2C, H, W): noise, then variance, where
            -1 stands for the lower end of its range and 1 for the upper one.
        latents: The clean sample, (B, C, H, W).
        noise: Likewise.
        timestep: (B,), integers in [0, T).
        tables: `posterior` of the schedule.

    Returns:
        (B,), float32.

    Raises:
        ValueError: `predicted` has other channels than twice those of the latents.
    """
    if predicted.shape[1] != 2 * latents.shape[1]:
        raise ValueError(
            f"predicted must have {2 * latents.shape[1]} channels, noise and variance, "
            f"got {predicted.shape[1]}"
        )
    predicted, latents, noise = predicted.float(), latents.float(), noise.float()
    predicted_noise, variance = predicted.chunk(2, dim=1)
    squared_error = (predicted_noise - noise).square().flatten(1).mean(1)
    bound = variational_bound(predicted_noise.detach() - noise, variance, latents, timestep, tables)
    return squared_error + bound


def variational_bound(
    noise_error: Tensor, variance: Tensor, latents: Tensor, timestep: Tensor, tables: Posterior
) -> Tensor:
    """One term of the variational bound, in bits for each number of the sample (Ho et al. 2020, eq. 5).

    Args:
        noise_error: Predicted noise less the true one, (B, C, H, W).
        variance: As predicted: -1 for the lower end of its range, 1 for the upper one (Nichol & Dhariwal
            2021, eq. 15). (B, C, H, W).
        latents: The clean sample, which the term of timestep 0 scores as one of 256 levels in [-1, 1].
        timestep: (B,), integers in [0, T).
        tables: `posterior` of the schedule.

    Returns:
        (B,), of the dtype of `variance`.
    """
    low, high, mean_scale = (
        table.to(timestep.device)[timestep].view(-1, *[1] * (latents.ndim - 1)) for table in tables
    )
    log_variance = torch.lerp(low, high, (variance + 1) / 2)
    mean_error = mean_scale * noise_error  # true mean less predicted one
    divergence = _divergence(mean_error, low, log_variance)
    likelihood = _discrete_log_likelihood(latents, mean_error, log_variance)
    nats = torch.where(timestep.view_as(low) == 0, -likelihood, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _divergence(mean_error: Tensor, log_variance1: Tensor, log_variance2: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of one normal distribution from another, in nats."""
    difference = log_variance1 - log_variance2
    return (difference.expm1() - difference + mean_error.square() * (-log_variance2).exp()) / 2


def _discrete_log_likelihood(x: Tensor, error: Tensor, log_variance: Tensor) -> Tensor:
    """The log likelihood, in nats, of x as one of 256 levels in [-1, 1] (Ho et al. 2020, eq. 13).

    Args:
        x: The sample.
        error: x less the mean of the normal distribution.
        log_variance: Of that distribution.
    """
    precision, half = (-log_variance / 2).exp(), 1 / 255
    upper, lower = (error + half) * precision, (error - half) * precision
    inside = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    below, above = torch.special.ndtr(upper), torch.special.ndtr(-lower)  # the outer levels have no end
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside)).clamp(min=1e-12).log()
