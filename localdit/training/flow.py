"""Rectified flow, as the published PixelDiT models are trained: noise levels, noisy samples, the velocity,
and the alignment of a model's tokens with those of another network. Functions of tensors; chance comes in.

The sample at noise level σ is (1 - σ) data + σ noise (Liu et al. 2022, arXiv 2209.03003, eq. 1). A model's
time and velocity point one way or the other: to the data, as the class model's do, or to the noise, as the
text model's.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch   C channels   H W picture   N = h*w tokens of the model   M tokens of the other network, F wide

Direction: TypeAlias = Literal["data", "noise"]


# --- Time ---------------------------------------------------------------------------------------------------


def shift_levels(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels moved up by a `shift` above 1, which larger pictures want (Esser et al. 2024, arXiv
    2403.03206, eq. 23). In the time t = 1 - σ this is t / (t + (1 - t) shift)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_levels(
    normal: Tensor, shift: float = 1.0, mean: float = 0.0, std: float = 1.0, levels: int | None = None
) -> Tensor:
    """Logit-normal noise levels in [0, 1), shifted (Esser et al. 2024, section 3.1).

    Args:
        normal: Standard normal numbers, (B,).
        shift: Of `shift_levels`.
        mean, std: Of the levels' logit.
        levels: Round down to so many equal steps, before the shift. The published text model has 1000.

    Returns:
        (B,), float32.
    """
    sigma = torch.sigmoid(mean + std * normal.float())
    if levels is not None:
        sigma = (sigma * levels).floor().clamp(max=levels - 1) / levels  # the sigmoid may round to 1
    return shift_levels(sigma, shift)


def model_time(sigma: Tensor, direction: Direction) -> Tensor:
    """What a model is told of the noise level: 1 - σ on the way to the data, 1000 σ on the way to noise."""
    return 1 - sigma if direction == "data" else 1000 * sigma


# --- Samples and targets ------------------------------------------------------------------------------------


def noisy_sample(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - σ) data + σ noise. data, noise: (B, ...); sigma: (B,)."""
    return torch.lerp(data, noise, sigma.to(data).view(-1, *[1] * (data.ndim - 1)))


def velocity(data: Tensor, noise: Tensor, direction: Direction) -> Tensor:
    """What a model has to predict: data - noise on the way to the data, else noise - data."""
    return data - noise if direction == "data" else noise - data


@dataclass
class Alignment:
    """What the tokens of a block shall say: the features of a picture (REPA, Yu et al. 2024, arXiv
    2410.06940, eq. 8). The published models take DINOv2's, with weight 0.5, in the first part of training.

    Attributes:
        head: Makes features (B, N, F) of tokens (B, N, D).
        block: Patch block that is read, counted from 1: 8 in the published class model, 6 in the text model.
        features: Of the clean pictures, (B, M, F).
        feature_grid: Their rows and columns, M = rows · columns.
        weight: Of this loss beside the velocity's.
    """

    head: nn.Module
    block: int
    features: Tensor
    feature_grid: tuple[int, int]
    weight: float = 0.5


def flow_loss(
    model: nn.Module,
    data: Tensor,
    noise: Tensor,
    sigma: Tensor,
    direction: Direction,
    alignment: Alignment | None = None,
    **condition: Any,
) -> Tensor:
    """Mean squared error of the velocity, plus the alignment's.

    Args:
        model: A PixelDiT, or one with its interface.
        data: Clean pictures in [-1, 1], (B, C, H, W).
        noise: Standard normal numbers of that shape.
        sigma: Noise levels, (B,).
        direction: Where the model's time and velocity point.
        condition: Of the model, by argument.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: `direction` is neither of the two.
    """
    if direction not in ("data", "noise"):
        raise ValueError(f"direction must be 'data' or 'noise', got {direction!r}")
    predicted, *states = model(
        noisy_sample(data, noise, sigma),
        timestep=model_time(sigma, direction),
        return_hidden_state_of=None if alignment is None else alignment.block,
        return_dict=False,
        **condition,
    )
    loss = F.mse_loss(predicted.float(), velocity(data, noise, direction).float())
    if alignment is None:
        return loss
    # Squares of pixels in patches: the tokens' grid has the picture's shape.
    (tokens,) = states
    patch = (data.shape[2] * data.shape[3] // tokens.shape[1]) ** 0.5
    grid = (round(data.shape[2] / patch), round(data.shape[3] / patch))
    return loss + alignment.weight * alignment_loss(
        alignment.head(tokens), grid, alignment.features, alignment.feature_grid
    )


# --- Alignment ----------------------------------------------------------------------------------------------


class AlignmentHead(nn.Sequential):
    """The perceptron of three layers that turns a model's tokens into another network's features. It serves
    training alone.

    Args:
        dim: Width of the tokens.
        hidden: Width between the layers: `dim` in the published class model, 2048 in the text model.
        features: Width of the features, 768 of DINOv2 ViT-B/14.
    """

    def __init__(self, dim: int, hidden: int, features: int = 768):
        super().__init__(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, features),
        )


def alignment_loss(
    projected: Tensor, grid: tuple[int, int], features: Tensor, feature_grid: tuple[int, int]
) -> Tensor:
    """1 - cosine between tokens and features at the same place, in the mean over places and pictures.

    Args:
        projected: (B, N, F), laid out on `grid`. Where the features' grid is coarser they are pooled to it,
            where it is finer they are interpolated.
        features: (B, M, F), laid out on `feature_grid`.

    Returns:
        A scalar from 0 to 2, float32.

    Raises:
        ValueError: A shape does not fit its grid, or the two do not fit each other.
    """
    for name, x, (rows, columns) in (("projected", projected, grid), ("features", features, feature_grid)):
        if x.ndim != 3 or x.shape[1] != rows * columns:
            raise ValueError(
                f"{name} must be (batch, {rows} * {columns}, channels) on a grid of {rows} x {columns}, "
                f"got {tuple(x.shape)}"
            )
    if projected.shape[::2] != features.shape[::2]:
        raise ValueError(
            f"projected and features must agree in batch and channels, got {tuple(projected.shape)} and "
            f"{tuple(features.shape)}"
        )
    x = projected.float()
    if grid != feature_grid:
        x = x.transpose(1, 2).unflatten(2, grid)  # (B, F, h, w)
        if feature_grid[0] * feature_grid[1] < grid[0] * grid[1]:
            x = F.adaptive_avg_pool2d(x, feature_grid)
        else:
            x = F.interpolate(x, feature_grid, mode="bilinear")
        x = x.flatten(2).transpose(1, 2)
    return 1 - F.cosine_similarity(x, features.float(), dim=-1).mean()
