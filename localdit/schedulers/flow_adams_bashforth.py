"""The sampler of the published class-conditional PixelDiT: two-step Adams-Bashforth on a flow's velocity."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class FlowAdamsBashforthSchedulerOutput(BaseOutput):
    """What a step returns."""

    prev_sample: Tensor  # the sample at the next, lower noise level


class FlowAdamsBashforthScheduler(SchedulerMixin, ConfigMixin):
    """Second order at the price of one model call per step, for flow matching.

    The sample at noise level σ is (1 - σ) data + σ noise, and the model predicts noise - data. The first step
    is Euler's; each further one follows 1.5 times the velocity less 0.5 times the one before. These are the
    weights of equal steps, and PixelDiT's program takes them on shifted, unequal ones too: so does this.

    Args:
        num_train_timesteps: What a noise level of 1 is called as a timestep.
        shift: Above 1 puts more of the steps where there is much noise, as larger pictures want (Esser et al.
            2024, arXiv 2403.03206, eq. 23).
    """

    order = 1  # timesteps to a step
    init_noise_sigma = 1.0
    _compatibles: list[str] = []  # noqa: RUF012  (diffusers' own annotation)

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0):
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self._begin_index: int | None = None
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """The step to be taken next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step to begin with, where `set_begin_index` says it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step in place of the first, as image to image does."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        shift: float | None = None,
    ) -> None:
        """Set the noise levels to visit, and forget what was sampled before.

        Args:
            num_inference_steps: Equal steps from 1 to 0, before the shift.
            device: Of `timesteps`.
            sigmas: Own levels in place of equal ones, falling, in (0, 1]; the shift applies to them too, and
                0 follows the last.
            shift: In place of the config's.

        Raises:
            ValueError: Not exactly one of `num_inference_steps` and `sigmas` is given, or not as said here.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError(
                "one of num_inference_steps and sigmas must be given, "
                f"got {num_inference_steps!r} and {sigmas!r}"
            )
        if sigmas is None:
            n = num_inference_steps
            if not (isinstance(n, int) and n > 0):
                raise ValueError(f"num_inference_steps must be a positive integer, got {n!r}")
            levels = torch.linspace(1, 1 / n, n, dtype=torch.float64)
        else:
            levels = torch.as_tensor(sigmas, dtype=torch.float64)
        falling = levels.numel() > 0 and bool((levels.diff() < 0).all())
        if not (falling and levels[-1] > 0 and levels[0] <= 1):
            raise ValueError(f"sigmas must fall within (0, 1], got {sigmas!r}")
        shift = self.config.shift if shift is None else shift
        levels = shift * levels / (1 + (shift - 1) * levels)

        self.num_inference_steps = len(levels)
        self.sigmas = torch.cat((levels, levels.new_zeros(1))).float()
        self.timesteps = (levels * self.config.num_train_timesteps).float().to(device)
        self._step_index: int | None = None
        self._begin_index = None
        self._velocity: Tensor | None = None

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The step that begins at a timestep.

        Raises:
            ValueError: None does.
        """
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep must be one of the scheduler's timesteps, got {timestep}")
        return int(found[0])

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Clean samples (B, ...) with the noise of their timesteps, (B,). After `set_begin_index`, as in
        diffusers, it is that of the step which comes next."""
        next_step = self.begin_index if self._step_index is None else self._step_index
        steps = [self.index_for_timestep(t) if self.begin_index is None else next_step for t in timestep]
        sigma = self.sigmas[steps].to(sample).view(-1, *[1] * (sample.ndim - 1))
        return torch.lerp(sample, noise, sigma)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> FlowAdamsBashforthSchedulerOutput | tuple[Tensor]:
        """Go to the next noise level.

        Args:
            model_output: The velocity noise - data that the model predicts at `sample`.
            timestep: One of `timesteps`; looked up in the first step, counted on from there.
            sample: The sample at the current noise level.
            return_dict: Return a `FlowAdamsBashforthSchedulerOutput`, else a tuple.
        """
        if self._step_index is None:
            first = self.begin_index
            self._step_index = self.index_for_timestep(timestep) if first is None else first
        velocity = model_output.float()
        direction = velocity
        if self._velocity is not None:
            direction = 1.5 * velocity - 0.5 * self._velocity
        width = self.sigmas[self._step_index + 1] - self.sigmas[self._step_index]
        prev_sample = (sample.float() + width.to(sample.device) * direction).to(sample.dtype)
        self._velocity = velocity
        self._step_index += 1
        return FlowAdamsBashforthSchedulerOutput(prev_sample) if return_dict else (prev_sample,)
