"""The denoising objective: a transformer learns the noise in a sample, or the velocity, at a timestep."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from localdit.training.diffusion import Diffusion
from localdit.training.order import Draws

# B batch   C channels and H W sides of a sample


@dataclass
class Denoising(Diffusion):
    """Denoising, on the schedule of the scheduler. Levels of noise are its timesteps."""

    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = field(default=0.0, metadata={"signed": True})  # of logit_normal; < 0 for less noise
    logit_std: float = 1.0  # of logit_normal
    timestep_shift: float = 1.0  # above 1 for more noise, as larger pictures want (Esser et al. 2024, eq. 23)
    min_snr_gamma: float | None = None  # bound of the signal-to-noise weighting; None: all timesteps alike

    def use_scheduler(self, scheduler: Any) -> None:
        kind = scheduler.config.get("prediction_type")
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"objective.scheduler.prediction_type must be epsilon or v_prediction, got {kind!r}"
            )
        self.noise_schedule = DDPMScheduler.from_config(scheduler.config)

    def levels(self, draws: Draws) -> Tensor:
        """Timesteps, (B,), by `timestep_sampling`."""
        if self.timestep_sampling == "logit_normal":  # Esser et al. 2024, section 3.1
            time = torch.sigmoid(self.logit_mean + self.logit_std * draws.normal())
        else:
            time = draws.uniform()
        time = self.timestep_shift * time / (1 + (self.timestep_shift - 1) * time)
        steps = self.noise_schedule.config.num_train_timesteps
        return (time * steps).long().clamp(max=steps - 1)

    def validation_levels(self) -> dict[str, float]:
        """The middles of ten ranges of timesteps."""
        steps = self.noise_schedule.config.num_train_timesteps
        edges = [i * steps // 10 for i in range(11)]
        return {f"{low}-{high - 1}": (low + high) // 2 for low, high in pairwise(edges)}

    def errors(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        level: Tensor,
        draws: Draws,
        **condition: Tensor,
    ) -> Tensor:
        """Mean squared errors of the noise (Ho et al. 2020, eq. 14), or of the velocity (Salimans & Ho 2022,
        appendix D) where the scheduler's `prediction_type` is "v_prediction"."""
        predicted = self.predict(model, clean, noise, level, **condition)
        return (predicted.float() - self.target(clean, noise, level)).square().flatten(1).mean(1)

    def predict(
        self, model: nn.Module, clean: Tensor, noise: Tensor, timestep: Tensor, **condition: Any
    ) -> Tensor:
        """What the model says of the noisy samples."""
        noisy = self.noise_schedule.add_noise(clean, noise, timestep)
        return model(hidden_states=noisy, timestep=timestep, **condition, return_dict=False)[0]

    def target(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the model has to say, in float32, of the shape of the samples."""
        if self.noise_schedule.config.prediction_type == "v_prediction":
            return self.noise_schedule.get_velocity(clean, noise, timestep).float()
        return noise.float()

    def weights(self, level: Tensor) -> Tensor:
        """Weights (B,) of the squared errors, which bound how much a timestep counts in terms of the clean
        picture (Hang et al. 2023, section 3.4)."""
        if self.min_snr_gamma is None:
            return super().weights(level)
        snr = compute_snr(self.noise_schedule, level)
        per_velocity = self.noise_schedule.config.prediction_type == "v_prediction"
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1 if per_velocity else snr)
