"""The loss of EDM (Karras et al. 2022, arXiv 2206.00364, eq. 8) on tokens that the model kept."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# B batch   C latent channels   H W latent   p patch   N = H*W/p² tokens


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
        A scalar, float32.
    """
    level = sigma[:, None, None, None]
    variance = level**2 + sigma_data**2
    noisy = latents + level * noise
    output = model(
        noisy / variance.sqrt(),
        timestep=sigma.log() / 4,
        mask_ratio=mask_ratio,
        mask_noise=mask_noise,
        **condition,
    )
    denoised = sigma_data**2 / variance * noisy + level * sigma_data / variance.sqrt() * output.sample.float()
    error = variance / (level * sigma_data) ** 2 * (denoised - latents).square()
    return kept_mean(error, output.mask)


def kept_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the kept tokens of each sample, then over the batch: a scalar.

    Args:
        error: (B, C, H, W).
        mask: (B, N), 1 where a token was dropped and 0 where it was kept, in raster order; None keeps all.
    """
    if mask is None:
        return error.mean()
    patch = math.isqrt(error.shape[2] * error.shape[3] // mask.shape[1])
    tokens = F.avg_pool2d(error.mean(1, keepdim=True), patch).flatten(1)  # (B, N)
    kept = 1 - mask
    return ((tokens * kept).sum(1) / kept.sum(1)).mean()
