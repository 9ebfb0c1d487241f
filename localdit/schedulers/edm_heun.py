"""Heun's second-order sampler for EDM models (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler, EDMEulerSchedulerOutput

# Diffusers looks for its base class in a component's own module when it loads a pipeline.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class EDMHeunScheduler(EDMEulerScheduler):
    """Two calls of the network in each step but the last: 2N - 1 for N steps.

    A step goes from one noise level to the next along the slope at its start, looks at the slope there, and
    goes again along the mean of both. The last step ends at zero, where there is no slope to look at.
    `timesteps` and `sigmas` list what the network is called with, call after call; `sigmas` ends with the
    zero that follows.

    With churn, noise is added before each step. Here it is added at the end of the step before, so that the
    sample that a pipeline holds is always the one that the network is shown; before the first step it is part
    of `init_noise_sigma`. Its random numbers come in the order of algorithm 2.

    Args:
        sigma_min: Noise level of the last step.
        sigma_max: Noise level of the first step.
        sigma_data: Standard deviation of the data: 0.9 for MicroDiT, 0.5 in the paper.
        sigma_schedule: "karras" for the paper's levels, or "exponential".
        num_train_timesteps: Levels listed before `set_timesteps` is called; nothing else depends on it.
        prediction_type: "epsilon" for the paper's F, "v_prediction" for its negative.
        rho: Bends the levels: at 1 they are evenly spaced, and a higher rho has more of them at little noise.
        final_sigmas_type: "zero", or "sigma_min" to stop at the last level.
        s_churn: Noise added in the whole run; 0 follows the ODE.
        s_tmin: Noise is added at levels from this one ...
        s_tmax: ... to this one; None is no limit.
        s_noise: Scale of the added noise.
        state_dtype: "float32", or "float64" to keep the sample so between the calls.

    Raises:
        ValueError: for a value out of range.
    """

    order = 2
    _step_index: Any
    _compatibles: ClassVar = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        state_dtype: str = "float32",
    ):
        if not 0 < sigma_min <= sigma_max:
            raise ValueError(f"sigma_min must be above 0 and at most sigma_max {sigma_max}, got {sigma_min}")
        for name, value in (("s_churn", s_churn), ("s_noise", s_noise)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if state_dtype not in ("float32", "float64"):
            raise ValueError(f"state_dtype must be 'float32' or 'float64', got {state_dtype!r}")
        super().__init__(
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            sigma_schedule=sigma_schedule,
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,
            rho=rho,
            final_sigmas_type=final_sigmas_type,
        )
        self._first_sigma = sigma_max
        self._under_way: tuple[Tensor, Tensor] | None = None  # where the step began, and the slope there

    @property
    def init_noise_sigma(self) -> float:
        """What unit noise is multiplied by to start from: the first noise level, as published."""
        return self._first_sigma

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the noise levels of a run.

        Args:
            num_inference_steps: Steps, where `sigmas` is None.
            device: Where `timesteps` are put. The levels stay on the CPU, in float64.
            sigmas: Own levels, falling and above zero, one for each step. (`EDMEulerScheduler` takes under
                this name places on its schedule, from 0 to 1.)
        """
        config = self.config
        if sigmas is not None:
            levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
            if levels.ndim != 1 or not (levels > 0).all() or not (levels.diff() < 0).all():
                raise ValueError(f"sigmas must be falling numbers above 0, got {sigmas}")
        elif num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        else:
            ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
            karras = config.sigma_schedule == "karras"
            levels = (self._compute_karras_sigmas if karras else self._compute_exponential_sigmas)(
                ramp
            ).double()

        growth = 1 + min(config.s_churn / len(levels), 2**0.5 - 1)
        churns = (levels >= config.s_tmin) & (
            levels <= (torch.inf if config.s_tmax is None else config.s_tmax)
        )
        churned = torch.where(churns, levels * growth, levels)
        # Each level is met twice, by the second call of a step and, with churn, by the first of the next.
        calls = torch.stack((levels, churned), dim=1).flatten()[1:]  # (2N - 1,)
        final = levels[-1:] if config.final_sigmas_type == "sigma_min" else torch.zeros_like(levels[-1:])
        self.sigmas = torch.cat((calls, final))
        self.timesteps = self.precondition_noise(calls).to(device, torch.float32)
        self.num_inference_steps = len(levels)
        first, churned_first = levels[0].item(), churned[0].item()
        self._first_sigma = (first**2 + config.s_noise**2 * (churned_first**2 - first**2)) ** 0.5
        self._step_index = self._begin_index = self._under_way = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """Go on by one call of the network.

        Args:
            model_output: What the network gave for `scale_model_input(sample, timestep)`.
            timestep: Of `timesteps`, in their order.
            sample: What the last `step` gave.
            generator: Source of the added noise, drawn in float32.
            return_dict: Return an `EDMEulerSchedulerOutput`, else a tuple.

        Returns:
            `prev_sample`, in `state_dtype`, and `pred_original_sample`, the clean sample as seen from here.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep must be one of scheduler.timesteps, not an index, got {timestep}")
        if self.step_index is None:
            self._init_step_index(timestep)
        dtype: Any = getattr(torch, self.config.state_dtype)
        index = self.step_index
        sigma, next_sigma = self.sigmas[index], self.sigmas[index + 1]
        x = sample.to(dtype)
        clean = self.precondition_outputs(x, model_output.to(dtype), sigma)
        slope = (x - clean) / sigma

        if index % 2 == 0:
            self._under_way = (x, slope)
            x = x + (next_sigma - sigma) * slope
        else:
            if self._under_way is None:
                raise ValueError(f"a run must begin with the first call of a step, got timestep {timestep}")
            start, first_slope = self._under_way
            x = start + (sigma - self.sigmas[index - 1]) * (first_slope + slope) / 2
            if next_sigma > sigma:
                noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
                x = x + self.config.s_noise * (next_sigma**2 - sigma**2).sqrt() * noise.to(dtype)
        self._step_index = index + 1
        return EDMEulerSchedulerOutput(x, clean) if return_dict else (x, clean)
