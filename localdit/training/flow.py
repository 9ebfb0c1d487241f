"""Rectified flow, as the published PixelDiT models are trained: noise levels, noisy samples, the velocity,
and the objective that puts them together. The functions are of tensors; chance comes in.

The sample at noise level σ is (1 - σ) data + σ noise (Liu et al. 2022, arXiv 2209.03003, eq. 1). A model's
time and velocity point one way or the other: to the data, as the class model's do, or to the noise, as the
text model's.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from localdit.data.samples import Samples
from localdit.pipelines import find_pipeline
from localdit.training.alignment import (
    Alignment,
    AlignmentConfig,
    AlignmentHead,
    FeatureNetwork,
    alignment_errors,
)
from localdit.training.diffusion import Diffusion
from localdit.training.order import Draws
from localdit.training.stopping import StopRequest

# B batch   C channels   H W sides of a sample   N tokens

Direction: TypeAlias = Literal["data", "noise"]

_VALIDATION_LEVELS = 10


# --- The objective ------------------------------------------------------------------------------------------


@dataclass
class RectifiedFlow(Diffusion):
    """The velocity of a sample between data and noise. Levels are shares σ of noise, logit-normal.

    Where time and velocity of the model point is told by the pipeline, which samples with it.
    """

    logit_mean: float = field(default=0.0, metadata={"signed": True})  # < 0 for less noise
    logit_std: float = 1.0
    shift: float = 1.0  # above 1 for more noise, as larger pictures want: of `shift_levels`
    discrete_levels: int | None = None  # round down to so many, before the shift: 1000 in the text model
    # Of the tokens with the features of another network, where the samples are pictures; None: without.
    alignment: AlignmentConfig | None = field(default=None, metadata={"nested": AlignmentConfig})

    def use_scheduler(self, scheduler: Any) -> None:
        if scheduler.config.get("prediction_type", "flow_prediction") != "flow_prediction" or not hasattr(
            scheduler, "sigmas"
        ):
            raise ValueError(
                "objective.scheduler must be one of flow matching, got "
                f"{type(scheduler).__name__} with prediction_type {scheduler.config.get('prediction_type')!r}"
            )

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        direction = getattr(find_pipeline(self.data.pipeline), "flow_direction", None)
        if direction is None:
            raise ValueError(
                "objective.data.pipeline must say where its flow points (flow_direction), as "
                f"PixelDiTPipeline and PixelDiTTextPipeline do, got {self.data.pipeline}"
            )
        self.direction: Direction = direction
        if self.alignment:
            self._add_alignment(self.alignment, model, accelerator.device)
        return super().prepare(model, folder, accelerator, stop)

    def levels(self, draws: Draws) -> Tensor:
        return noise_levels(draws.normal(), self.shift, self.logit_mean, self.logit_std, self.discrete_levels)

    def validation_levels(self) -> dict[str, float]:
        """The middles of ten equal ranges."""
        middles = [(i + 0.5) / _VALIDATION_LEVELS for i in range(_VALIDATION_LEVELS)]
        return {f"noise {middle:.2f}": middle for middle in middles}

    def errors(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        level: Tensor,
        draws: Draws,
        **condition: Tensor,
    ) -> Tensor:
        """As `flow_errors`; aligned in training, for as many steps as the configuration says."""
        alignment, config = None, self.alignment
        if config and model.training and (config.steps is None or draws.step < config.steps):
            alignment = Alignment(config.block, *self.features(clean), config.weight)
        return flow_errors(model, clean, noise, level, self.direction, alignment, **condition)

    def _add_alignment(self, config: AlignmentConfig, model: Any, device: torch.device) -> None:
        """Load the network that gives the features, and put the head that makes them into the model."""
        if self.data.vae is not None:
            raise ValueError(f"objective.alignment is for pipelines of pixels, got {self.data.pipeline}")
        if not 1 <= config.block <= len(model.transformer_blocks):
            raise ValueError(
                f"objective.alignment.block must be from 1 to {len(model.transformer_blocks)}, "
                f"got {config.block}"
            )
        self.features = FeatureNetwork(config, model.config.patch_size, device)
        dim = model.config.num_attention_heads * model.config.attention_head_dim
        AlignmentHead(dim, config.hidden or dim, self.features.width).attach(model)
        if config.steps is not None:
            model.has_unread_parameters = True  # the head's, after these steps


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


def flow_errors(
    model: nn.Module,
    data: Tensor,
    noise: Tensor,
    sigma: Tensor,
    direction: Direction,
    alignment: Alignment | None = None,
    **condition: Any,
) -> Tensor:
    """Mean squared errors of the velocity, plus the alignment's.

    Args:
        model: A PixelDiT, or one with its interface.
        data: Clean pictures in [-1, 1], (B, C, H, W).
        noise: Standard normal numbers of that shape.
        sigma: Noise levels, (B,).
        direction: Where the model's time and velocity point.
        alignment: What the tokens of a block shall say, for a model with an `AlignmentHead`.
        condition: Of the model, by argument.

    Returns:
        One error for each sample, (B,), float32.

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
    errors = (predicted.float() - velocity(data, noise, direction).float()).square().flatten(1).mean(1)
    if alignment is None:
        return errors
    # Squares of pixels in patches: the tokens' grid has the picture's shape.
    (projected,) = states
    patch = (data.shape[2] * data.shape[3] // projected.shape[1]) ** 0.5
    grid = (round(data.shape[2] / patch), round(data.shape[3] / patch))
    return errors + alignment.weight * alignment_errors(projected, grid, alignment.features, alignment.grid)
