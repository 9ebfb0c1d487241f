"""The consistency distillation objective: a student learns to do in few steps what its teacher does in many.

A consistency function f(x, t) takes every point of one trajectory of the teacher's ODE to where that
trajectory ends (Song et al. 2023, arXiv 2303.01469). It is trained on two neighbours of a trajectory: a noisy
sample, and where a step of the teacher, with classifier-free guidance, takes it (latent consistency
distillation, Luo et al. 2023, arXiv 2310.04378). So the student draws what the teacher draws with guidance,
and needs none itself: half the work of a step, besides the fewer steps.

The trajectory may be cut into segments, with a function for each, which ends where its segment ends
(multistep consistency models, Heek et al. 2024, arXiv 2403.06807). With one segment it ends in the picture:
the sampler, LCM, guesses that and adds fresh noise to it, again and again. With as many segments as steps the
sampler is DDIM, and a step is what the teacher does in several of its own: much easier to learn.

Two things differ from Luo et al. The guidance is one fixed scale, where they draw it and have the student
read it. And the neighbour is judged by the student as it is, not by an average of it: Song & Dhariwal 2023
(arXiv 2310.14189, section 3.2) do better without, and it would be a third model in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler
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
    """Consistency distillation. Levels of noise are the timesteps at which the teacher's steps begin."""

    teacher: str  # folder of a pipeline, whose transformer is of the student's class; or "mini"
    teacher_guidance_scale: float  # of the teacher's steps, and so of what the student draws without
    teacher_steps: int = 50  # of DDIM, from noise to the picture
    segments: int = 1  # 1: for LCMScheduler; more: for so many steps, or a multiple, of DDIMScheduler
    huber_width: float = 1e-3  # differences below it count by their square, larger ones by their size
    caption_dropout: float = 0.0
    default_guidance_scale: float | None = 1.0
    preview_guidance_scale: float = 1.0
    preview_steps: int = 4

    def use_scheduler(self, scheduler: Any) -> None:
        self._check_steps(scheduler)
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"objective.scheduler.prediction_type must be epsilon or v_prediction, got {kind!r}"
            )
        if not (self._teacher_folder / "model_index.json").is_file():
            raise ValueError(
                f"objective.teacher must be the folder of a pipeline, or 'mini', got {self.teacher!r}"
            )
        known = type(scheduler).load_config(self._teacher_folder, subfolder="scheduler")
        for name in _SCHEDULE:
            own = scheduler.config[name]
            if own != (value := known.get(name, own)):
                raise ValueError(f"objective.scheduler.{name} must be the teacher's, {value!r}, got {own!r}")
        self.schedule = scheduler

    def _check_steps(self, scheduler: Any) -> None:
        """Refuse a scheduler that would not step as the student learns to."""
        wanted = LCMScheduler if self.segments == 1 else DDIMScheduler
        if not isinstance(scheduler, wanted):
            raise ValueError(
                f"objective.scheduler must be a {wanted.__name__} where objective.segments is "
                f"{self.segments}, got {type(scheduler).__name__}"
            )
        timesteps = scheduler.config.num_train_timesteps
        if not 1 <= self.teacher_steps < timesteps or timesteps % self.teacher_steps:
            raise ValueError(
                f"objective.teacher_steps must divide the {timesteps} timesteps and be fewer, "
                f"got {self.teacher_steps}"
            )
        if self.segments < 1 or self.teacher_steps % self.segments:
            raise ValueError(
                f"objective.segments must divide the {self.teacher_steps} steps of the teacher, "
                f"got {self.segments}"
            )
        needed: dict[str, Any] = (
            {"original_inference_steps": self.teacher_steps}
            if self.segments == 1
            else {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
        )
        for name, value in needed.items():
            if scheduler.config[name] != value:
                raise ValueError(
                    f"objective.scheduler.{name} must be {value!r}, got {scheduler.config[name]!r}"
                )

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        """Load the teacher too."""
        samples = super().prepare(model, folder, accelerator, stop)
        teacher = type(model).from_pretrained(self._teacher_folder, subfolder="transformer")
        self.teacher_model: nn.Module = teacher.to(accelerator.device).eval().requires_grad_(False)
        self.precision = accelerator.autocast
        return samples

    @property
    def interval(self) -> int:
        """Timesteps between neighbours, the k of Luo et al. (section 4.3)."""
        return self.schedule.config.num_train_timesteps // self.teacher_steps

    def levels(self, draws: Draws) -> Tensor:
        """Timesteps, (B,), each of the teacher's as often as another."""
        step = (draws.uniform() * self.teacher_steps).long().clamp(max=self.teacher_steps - 1)
        return (step + 1) * self.interval - 1

    def ends(self, level: Tensor) -> Tensor:
        """The timesteps, (B,), at which the segments of these levels end: 0 is where the picture is."""
        length = self.schedule.config.num_train_timesteps // self.segments
        return (level // length * length - 1).clamp(min=0)

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
        """Huber distances between the clean sample that the student sees in a noisy one, and the one with
        which it would get to where its step from the neighbour with less noise ends (Heek et al.,
        algorithm 1)."""
        noisy = self.schedule.add_noise(clean, noise, level)
        earlier, end = (level - self.interval).clamp(min=0), self.ends(level)
        with torch.no_grad():
            neighbour = self.solve(noisy, level, earlier, **condition)
            found = self.split(self.predict(model, neighbour, earlier, **condition), neighbour, earlier)
            target = self.aim(noisy, level, self.schedule.add_noise(*found, end), end)
        seen, _ = self.split(self.predict(model, noisy, level, **condition), noisy, level)
        width = self.huber_width
        return (((seen - target).square() + width**2).sqrt() - width).flatten(1).mean(1)

    def solve(self, noisy: Tensor, timestep: Tensor, earlier: Tensor, **condition: Tensor) -> Tensor:
        """A step of DDIM from one timestep, (B,), to an earlier one, by the guided teacher (Luo et al.,
        eq. 14): (B, C, H, W)."""
        both = self.without_caption(condition)
        both = {name: torch.cat((both[name], given)) for name, given in condition.items()}
        with self.precision():
            predicted = self.predict(self.teacher_model, noisy.repeat(2, 1, 1, 1), timestep.repeat(2), **both)
        negative, positive = predicted.float().chunk(2)
        guided = torch.lerp(negative, positive, self.teacher_guidance_scale)
        return self.schedule.add_noise(*self.split(guided, noisy, timestep), earlier)

    def aim(self, noisy: Tensor, timestep: Tensor, later: Tensor, end: Tensor) -> Tensor:
        """The clean sample, (B, C, H, W), with which a step of DDIM leads from `noisy` to `later`, at the
        timestep `end`."""
        (alpha, sigma), (end_alpha, end_sigma) = self.signal_and_noise(timestep), self.signal_and_noise(end)
        kept = end_sigma / sigma  # of the noise
        return (later - kept * noisy) / (end_alpha - kept * alpha)

    @staticmethod
    def predict(model: nn.Module, noisy: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        """What a model predicts, (B, C', H, W), of noisy samples, (B, C, H, W), at timesteps, (B,)."""
        return model(hidden_states=noisy, timestep=timestep, **condition, return_dict=False)[0]

    def split(self, predicted: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise that a noisy one is made of, as a prediction has it; float32."""
        predicted = predicted[:, : noisy.shape[1]].float()  # a learned variance would follow
        alpha, sigma = self.signal_and_noise(timestep)
        if self.schedule.config.prediction_type == "v_prediction":
            return alpha * noisy - sigma * predicted, sigma * noisy + alpha * predicted
        return (noisy - sigma * predicted) / alpha, predicted

    def signal_and_noise(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the clean sample and of the noise there is at timesteps, (B,): two of (B, 1, 1, 1)."""
        signal = self.schedule.alphas_cumprod.to(timestep.device)[timestep].view(-1, 1, 1, 1)
        return signal.sqrt(), (1 - signal).sqrt()

    @property
    def _teacher_folder(self) -> Path:
        return Path(MINI if self.teacher == "mini" else self.teacher)
