"""The EDM objective (Karras et al. 2022, arXiv 2206.00364, eqs. 7 and 8), on all tokens or on those that a
model keeps in training (MicroDiT, arXiv 2407.15811, section 3.1)."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from localdit.data.samples import Samples
from localdit.training.diffusion import Diffusion
from localdit.training.order import Draws
from localdit.training.routing import RoutingStatistics
from localdit.training.stopping import StopRequest

# B batch   C latent channels   H W latent   p patch   N = H*W/p² tokens

_VALIDATION_LEVELS = 10


@dataclass
class EDM(Diffusion):
    """A transformer learns EDM's F. Levels of noise are sigmas, log-normal."""

    sigma_mean: float = field(default=-0.6, metadata={"signed": True})  # of ln sigma
    sigma_std: float = 1.2  # of ln sigma
    sigma_data: float = 0.9  # standard deviation of the samples, which the scheduler has to agree with
    mask_ratio: float = 0.0  # share of the tokens that training keeps from the backbone and does not count

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"objective.sigma_data must be positive, got {self.sigma_data}")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"objective.mask_ratio must be at least 0 and below 1, got {self.mask_ratio}")

    def use_scheduler(self, scheduler: Any) -> None:
        config = scheduler.config
        if "sigma_data" not in config or config.prediction_type != "epsilon":
            raise ValueError(
                "objective.scheduler must be an EDM scheduler with the prediction_type epsilon, "
                f"got {type(scheduler).__name__} with {config.get('prediction_type')!r}"
            )
        if config.sigma_data != self.sigma_data:
            raise ValueError(
                f"objective.scheduler.sigma_data must be objective.sigma_data, {self.sigma_data}, "
                f"got {config.sigma_data}"
            )

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        self.patch_size = model.config.patch_size
        self.routing = RoutingStatistics(model, accelerator.device)
        return super().prepare(model, folder, accelerator, stop)

    def report(self, model: Any) -> dict[str, float]:
        """What the experts took; see `RoutingStatistics.report`."""
        return self.routing.report()

    def layout_blocks(self, model: Any) -> tuple[nn.ModuleList, int]:
        """The mixer's: they see every token."""
        return model.mixer_blocks, model.config.mixer_hidden_size

    def levels(self, draws: Draws) -> Tensor:
        return edm_sigma(draws.normal(), self.sigma_mean, self.sigma_std)

    def validation_levels(self) -> dict[str, float]:
        """The medians of ten equally likely ranges of sigma."""
        log_sigma = NormalDist(self.sigma_mean, self.sigma_std)
        shares = ((i + 0.5) / _VALIDATION_LEVELS for i in range(_VALIDATION_LEVELS))
        sigmas = (math.exp(log_sigma.inv_cdf(share)) for share in shares)
        return {f"sigma {sigma:.3g}": sigma for sigma in sigmas}

    def errors(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        level: Tensor,
        draws: Draws,
        **condition: Tensor,
    ) -> Tensor:
        """As `edm_loss`; in training, of the tokens that are kept."""
        options: dict[str, Any] = dict(condition)
        if self.mask_ratio and model.training:
            tokens = clean.shape[2] * clean.shape[3] // self.patch_size**2
            options |= {"mask_ratio": self.mask_ratio, "mask_noise": draws.uniform(tokens)}
        return edm_loss(model, clean, level, noise, sigma_data=self.sigma_data, **options)


def edm_sigma(normal: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels, (B,), from standard normal numbers: ln sigma has this mean and standard deviation."""
    return (mean + std * normal).exp()


def edm_loss(
    model: nn.Module,
    latents: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    sigma_data: float = 0.9,
    mask_ratio: float = 0.0,
    mask_noise: Tensor | None = None,
    **condition: Any,
) -> Tensor:
    """Squared error of the denoised latents, weighted so that every noise level counts alike at the start.

    A model that predicts zero scores 1 on latents of standard deviation `sigma_data`, at any noise level.

    Args:
        model: Predicts F of latents scaled by c_in, given `timestep` = c_noise, as
            `SparseDiTTransformer2DModel` does.
        latents: Clean, (B, C, H, W), float32.
        sigma: Noise levels, (B,), above 0.
        noise: Standard normal, (B, C, H, W).
        sigma_data: Standard deviation of the latents; 0.9 for MicroDiT, with 16 channels too.
        mask_ratio: Share of the tokens that the model drops. They do not count.
        mask_noise: (B, N), which tokens: as the model takes it.
        condition: Passed to the model by name, as `encoder_hidden_states`.

    Returns:
        One error for each sample, (B,), float32.
    """
    level = sigma[:, None, None, None]
    variance = level**2 + sigma_data**2
    noisy = latents + level * noise
    # A tuple, since accelerate rebuilds what a model returns, and cannot rebuild diffusers' outputs.
    output, *mask = model(
        noisy / variance.sqrt(),
        timestep=sigma.log() / 4,
        mask_ratio=mask_ratio,
        mask_noise=mask_noise,
        **condition,
        return_dict=False,
    )
    denoised = sigma_data**2 / variance * noisy + level * sigma_data / variance.sqrt() * output.float()
    error = variance / (level * sigma_data) ** 2 * (denoised - latents).square()
    return kept_mean(error, mask[0] if mask else None)


def kept_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the kept tokens of each sample, (B,).

    Args:
        error: (B, C, H, W).
        mask: (B, N), 1 where a token was dropped and 0 where it was kept, in raster order; None keeps all.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    patch = math.isqrt(error.shape[2] * error.shape[3] // mask.shape[1])
    tokens = F.avg_pool2d(error.mean(1, keepdim=True), patch).flatten(1)  # (B, N)
    kept = 1 - mask
    return (tokens * kept).sum(1) / kept.sum(1)
