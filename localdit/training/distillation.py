"""The consistency distillation objective: a student learns to do in few steps what its teacher does in many.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), after Song et al. 2023 (arXiv
2303.01469). A consistency function f(x, t) takes every point of one trajectory of the teacher's ODE to where
that trajectory ends, the clean sample. It is trained on two neighbours of a trajectory: a noisy sample, and
where a step of the teacher, with classifier-free guidance, takes it. So the student draws what the teacher
draws with guidance, and needs none itself: half the work of a step, besides the fewer steps.

Two things differ from the paper. The guidance is one fixed scale, where the paper draws it and has the
student read it. And the neighbour is judged by the student as it is, not by an average of it: Song & Dhariwal
2023 (arXiv 2310.14189, section 3.2) do better without, and it would be a third model in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler
from torch import Tensor, nn

from localdit.assets import MINI
from localdit.data.samples import Samples
from localdit.training.diffusion import Diffusion
from localdit.training.order import Draws
from localdit.training.stopping import StopRequest

# B batch   C channels and H W sides of a sample

# What of a scheduler's config says how much noise there is at a timestep, and what is predicted there.
_SCHEDULE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


@dataclass(kw_only=True)
class ConsistencyDistillation(Diffusion):
    """Consistency distillation. Levels of noise are those timesteps of `LCMScheduler` that its
    `original_inference_steps` stand for; the teacher steps from one to the next."""

    teacher: str  # folder of a pipeline, whose transformer is of the student's class; or "mini"
    teacher_guidance_scale: float  # of the teacher's steps, and so of what the student draws without
    huber_width: float = 1e-3  # differences below it count by their square, larger ones by their size
    caption_dropout: float = 0.0
    default_guidance_scale: float | None = 1.0
    preview_guidance_scale: float = 1.0
    preview_steps: int = 4

    def use_scheduler(self, scheduler: Any) -> None:
        if not isinstance(scheduler, LCMScheduler):
            raise ValueError(f"objective.scheduler must be an LCMScheduler, got {type(scheduler).__name__}")
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"objective.scheduler.prediction_type must be epsilon or v_prediction, got {kind!r}"
            )
        if not (self._teacher_folder / "model_index.json").is_file():
            raise ValueError(
                f"objective.teacher must be the folder of a pipeline, or 'mini', got {self.teacher!r}"
            )
        known = LCMScheduler.load_config(self._teacher_folder, subfolder="scheduler")
        for name in _SCHEDULE:
            own = scheduler.config[name]
            if own != (value := known.get(name, own)):
                raise ValueError(f"objective.scheduler.{name} must be the teacher's, {value!r}, got {own!r}")
        self.schedule = scheduler

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        """Load the teacher too."""
        samples = super().prepare(model, folder, accelerator, stop)
        teacher = type(model).from_pretrained(self._teacher_folder, subfolder="transformer")
        self.teacher_model: nn.Module = teacher.to(accelerator.device).eval().requires_grad_(False)
        self.precision = accelerator.autocast
        return samples

    @property
    def interval(self) -> int:
        """Timesteps between neighbours, the paper's k (section 4.3)."""
        return self.schedule.config.num_train_timesteps // self.schedule.config.original_inference_steps

    def levels(self, draws: Draws) -> Tensor:
        """Timesteps, (B,), each of the schedule's as often as another."""
        steps = self.schedule.config.original_inference_steps
        return (draws.uniform() * steps).long().clamp(max=steps - 1) * self.interval + self.interval - 1

    def validation_levels(self) -> dict[str, float]:
        """The timesteps that previews visit."""
        self.schedule.set_timesteps(self.preview_steps)
        return {str(t): t for t in self.schedule.timesteps.tolist()}

    def errors(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        level: Tensor,
        draws: Draws,
        **condition: Tensor,
    ) -> Tensor:
        """Huber distances between what the student makes of a sample and of its neighbour with less noise
        (algorithm 1)."""
        noisy = self.schedule.add_noise(clean, noise, level)
        earlier = (level - self.interval).clamp(min=0)
        with torch.no_grad():
            target = self.consistency(
                model, self.solve(noisy, level, earlier, **condition), earlier, **condition
            )
        found = self.consistency(model, noisy, level, **condition)
        width = self.huber_width
        return (((found - target).square() + width**2).sqrt() - width).flatten(1).mean(1)

    def consistency(self, model: nn.Module, noisy: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """f(x, t), (B, C, H, W): what `LCMScheduler` makes of the model's prediction. f(x, 0) = x, whatever
        the model says (section 4.1)."""
        predicted = model(hidden_states=noisy, timestep=timestep, **condition, return_dict=False)[0]
        clean, _ = self.split(predicted, noisy, timestep)
        c_skip, c_out = self.schedule.get_scalings_for_boundary_condition_discrete(timestep)
        return c_skip.view(-1, 1, 1, 1) * noisy + c_out.view(-1, 1, 1, 1) * clean

    def solve(self, noisy: Tensor, timestep: Tensor, earlier: Tensor, **condition: Tensor) -> Tensor:
        """A step of DDIM from one timestep, (B,), to an earlier one, by the guided teacher (eq. 14)."""
        both = self.without_caption(condition)
        both = {name: torch.cat((both[name], given)) for name, given in condition.items()}
        with self.precision():
            predicted = self.teacher_model(
                hidden_states=noisy.repeat(2, 1, 1, 1), timestep=timestep.repeat(2), **both, return_dict=False
            )[0]
        negative, positive = predicted.float().chunk(2)
        guided = torch.lerp(negative, positive, self.teacher_guidance_scale)
        clean, noise = self.split(guided, noisy, timestep)
        return self.schedule.add_noise(clean, noise, earlier)

    def split(self, predicted: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that a noisy one is made of, as a prediction has it; float32."""
        predicted = predicted[:, : noisy.shape[1]].float()  # a learned variance would follow
        signal = self.schedule.alphas_cumprod.to(noisy.device)[timestep].view(-1, 1, 1, 1)
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        if self.schedule.config.prediction_type == "v_prediction":
            return alpha * noisy - sigma * predicted, sigma * noisy + alpha * predicted
        return (noisy - sigma * predicted) / alpha, predicted

    @property
    def _teacher_folder(self) -> Path:
        return Path(MINI if self.teacher == "mini" else self.teacher)
