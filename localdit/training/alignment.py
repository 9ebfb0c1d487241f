"""Representation alignment: the tokens of a block shall say what another network sees in the clean picture
(REPA, Yu et al. 2024, "Representation Alignment for Generation", arXiv 2410.06940).

The published PixelDiT models are aligned with DINOv2, frozen, in the first part of their training. The head
that turns tokens into features is trained with the model and left out of what training gives.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from localdit.training.encode import Dtype, find_encoder, load_encoder

# B batch   H W picture   p patch   D width   N = h*w tokens of the model   M tokens of the network, F wide

_NAME = "objective.alignment.features"


@dataclass(frozen=True)
class AlignmentConfig:
    """With what the tokens are aligned, and how much."""

    features: str  # a vision transformer such as DINOv2: its folder, or OWNER/NAME on the hub
    block: (
        int  # patch block that is read, counted from 1: 8 in the published class model, 6 in the text model
    )
    weight: float = 0.5  # of this error beside the velocity's
    hidden: int | None = None  # width of the head between its layers; None: the model's
    # Side of the square that the network is shown, in pixels; None: it gets as many patches as the model.
    picture_size: int | None = None
    steps: int | None = None  # optimizer steps that are aligned, from the first; None: all
    dtype: Dtype = "float32"  # that the network computes in


@dataclass
class Alignment:
    """What the tokens of a block shall say.

    Attributes:
        block: Patch block that is read, counted from 1.
        features: Of the clean pictures, (B, M, F).
        grid: Their rows and columns, M = rows · columns.
        weight: Of this error beside the velocity's.
    """

    block: int
    features: Tensor
    grid: tuple[int, int]
    weight: float = 0.5


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

    def attach(self, model: nn.Module) -> None:
        """Make this a part of the model, whose forward then returns features in place of tokens.

        Called from outside it would be no part of what `DistributedDataParallel` sees of a forward pass.
        """
        model.alignment_head = self

        def project(model: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if len(output) == 1:
                return output
            sample, tokens = output
            return sample, self(tokens.to(next(self.parameters()).dtype))

        model.register_forward_hook(project)


class FeatureNetwork:
    """A frozen vision transformer, for the features of its patches.

    Args:
        config: Which one, and what it is shown.
        patch_size: Of the model, in pixels.
        device: Where it computes.

    Raises:
        ValueError: It is no such network, not whole, or has code of its own.
    """

    def __init__(self, config: AlignmentConfig, patch_size: int, device: torch.device):
        settings = AutoConfig.from_pretrained(find_encoder(config.features, _NAME), trust_remote_code=False)
        if not isinstance(getattr(settings, "patch_size", None), int):
            raise ValueError(
                f"{_NAME} must be a vision transformer with a patch_size, got {settings.model_type}"
            )
        self.patch_size, self.model_patch_size = settings.patch_size, patch_size
        self.width: int = settings.hidden_size
        if config.picture_size is not None and config.picture_size % self.patch_size:
            raise ValueError(
                f"objective.alignment.picture_size must be a multiple of {self.patch_size}, the network's "
                f"patches, got {config.picture_size}"
            )
        self.picture_size = config.picture_size
        self.network = load_encoder(AutoModel, config.features, _NAME, config.dtype).to(device)
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features (B, M, F) of pictures (B, 3, H, W) in [-1, 1], and their rows and columns."""
        if self.picture_size is None:
            rows, columns = (side // self.model_patch_size for side in pictures.shape[2:])
        else:
            rows = columns = self.picture_size // self.patch_size
        size = (rows * self.patch_size, columns * self.patch_size)
        resized = F.interpolate(pictures.float(), size, mode="bicubic")
        normalised = ((resized + 1) / 2 - self.mean) / self.std
        states = self.network(normalised.to(self.network.dtype)).last_hidden_state
        # Before the patches' there are the tokens of the class and, in some networks, of registers.
        return states[:, -rows * columns :].float(), (rows, columns)


def alignment_errors(
    projected: Tensor, grid: tuple[int, int], features: Tensor, feature_grid: tuple[int, int]
) -> Tensor:
    """1 - cosine between tokens and features at the same place, in the mean over places.

    Args:
        projected: (B, N, F), laid out on `grid`. Where the features' grid is coarser they are pooled to it,
            where it is finer they are interpolated.
        features: (B, M, F), laid out on `feature_grid`.

    Returns:
        (B,), from 0 to 2, float32.

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
    return 1 - F.cosine_similarity(x, features.float(), dim=-1).mean(1)
