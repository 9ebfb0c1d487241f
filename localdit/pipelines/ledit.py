"""LEDiTPipeline: class labels to pictures of any size, and image to image, with `LEDiTTransformer2DModel`."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.pipelines.common import (
    ImageInput,
    LatentsMixin,
    SafetensorsMixin,
    TransformerLoraMixin,
    check_eta,
    label_names,
    read_labels,
    require_finite,
    set_timesteps,
    tensor_inputs,
)

# B pictures (labels x pictures of each)   C latent channels   H W latent


class LEDiTPipeline(SafetensorsMixin, DiffusionPipeline, TransformerLoraMixin, LatentsMixin):
    """Class labels to pictures, and image to image where `image` is given.

    The vae may be None in calls with latents in and out.

    Args:
        vae: `AutoencoderKL`, or one with its interface. Without it a latent is taken for 8 x 8 pixels.
        transformer: `LEDiTTransformer2DModel`, or one with its interface.
        scheduler: Any of diffusers' for noise, v or flow prediction; its config says which. A `DDPMScheduler`
            with `variance_type="learned_range"` uses the variance that the transformer predicts, as
            published; all others use the first channels alone.
        id2label: Names by label, an integer or, as JSON has it, its text; commas stand between several names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar = ["vae", "transformer", "scheduler"]
    _callback_tensor_inputs: ClassVar = ["latents", "class_labels"]

    def __init__(
        self,
        vae: AutoencoderKL | None = None,
        transformer: LEDiTTransformer2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        id2label: dict[Any, str] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor()

    @property
    def labels(self) -> dict[str, int]:
        """The label of each name."""
        return label_names(self.config.id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        *,
        image: ImageInput | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        num_images_per_label: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args:
            class_labels: A label or a name, or a list, for a picture of each. The label after the last class
                is no class.
            image: The picture to start from: one for all labels, or one each, of any kind that `read_images`
                takes, or its latents as `output_type="latent"` gives them. It is stretched to `height` x
                `width`, by default its own size, rounded down to a multiple of the VAE's factor times the
                patch size (16 as published).
            strength: How much of the noise schedule the picture goes through, 0 to 1: the last
                int(num_inference_steps * strength) steps. No step at all gives the picture back through the
                VAE. 1 starts from noise alone, and takes the picture's size only.
            height: In pixels, such a multiple. Default: that of `image`, else what the transformer was made
                for. Larger and smaller pictures are what it is for.
            width: Likewise.
            num_inference_steps: Steps of the scheduler. 250 are the published ones of DDPM; DPM-Solver++
                does with 20.
            guidance_scale: Weight of classifier-free guidance: 1.5 for the published figures, 4 for pictures.
                At 1 or less there is none.
            guidance_channels: How many channels of the noise are guided; None for all. DiT's own sampler
                guides the first 3 of 4. The variance is never guided.
            timesteps: Own times, falling, for schedulers that take them.
            sigmas: Own noise levels, falling, for schedulers that take them.
            num_images_per_label: Pictures of each label.
            eta: Share of noise that DDIM adds, 0 to 1; must be 0 with schedulers that do not know it.
            generator: Source of all noise: one, or a list of one for each picture, with which picture i is
                the one that generator i makes alone.
            latents: Unit noise to take in place of drawn noise, (B, C, H, W).
            output_type: "pil"; "np" (B, height, width, 3) or "pt" (B, 3, height, width), float32 in [0, 1];
                or "latent" (B, C, H, W), float32.
            return_dict: Return an `ImagePipelineOutput`, else a tuple of its `images`.
            attention_kwargs: For the transformer; `scale` is that of a LoRA.
            callback_on_step_end: A function or one of diffusers' callback objects, called after each call of
                the transformer with (pipe, index, timestep, tensors). It returns the tensors, changed as it
                likes.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", "class_labels" (B,).

        Raises:
            ValueError: For arguments that fit neither the components nor each other, before the transformer
                is called.
            NonFiniteError: Where a model gives NaN or infinity.
        """
        # 1. Refuse what cannot work.
        self._begin(guidance_scale, attention_kwargs)
        callback_on_step_end_tensor_inputs = tensor_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        images, height, width = self._read_images(image, height, width)
        config, device = self.transformer.config, self._execution_device
        listed = read_labels(class_labels, self.labels, config.num_classes)
        batch = self.check_inputs(
            labels=len(listed),
            num_images_per_label=num_images_per_label,
            height=height,
            width=width,
            images=images,
            strength=strength,
            num_inference_steps=num_inference_steps,
            guidance_channels=guidance_channels,
            eta=eta,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        guided_channels = config.in_channels if guidance_channels is None else guidance_channels
        used_channels = config.in_channels * (2 if self._uses_variance() else 1)

        # 2. The times to visit.
        tokens = height * width // self._size_multiple**2
        steps = set_timesteps(self.scheduler, num_inference_steps, tokens, device, timesteps, sigmas)
        times, steps = self.get_timesteps(steps, strength if images else 1.0)
        self._num_timesteps = len(times)

        # 3. The labels, and the latents to start from.
        labels = torch.tensor(listed, device=device).repeat_interleave(num_images_per_label)  # (B,)
        image_latents = None
        if images and strength < 1:
            image_latents = self.encode_image(images, batch, height, width, device, generator)
        latents = self.prepare_latents(batch, height, width, times, device, generator, latents, image_latents)

        # 4. Denoise. Outside the transformer everything is float32.
        order = getattr(self.scheduler, "order", 1)
        step_kwargs = self._step_kwargs(eta=eta, generator=generator)
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(times):
                if self.interrupt:
                    break
                self._current_timestep = t
                guided = self.do_classifier_free_guidance
                x, rows = self.scale_model_input(latents, t), labels
                if guided:  # (2B, C, H, W), without the label first
                    x, rows = torch.cat((x, x)), torch.cat((torch.full_like(rows, config.num_classes), rows))
                with self.transformer.cache_context("cond_uncond" if guided else "cond"):
                    predicted = self.transformer(
                        hidden_states=x.to(self.transformer.dtype),
                        timestep=t.float().expand(len(x)),
                        class_labels=rows,
                        attention_kwargs=attention_kwargs,
                        return_dict=False,
                    )[0].float()
                predicted = predicted[:, :used_channels]
                if guided:
                    without, predicted = predicted.chunk(2)
                    noise, rest = predicted.tensor_split((guided_channels,), dim=1)
                    noise = torch.lerp(without[:, :guided_channels], noise, self.guidance_scale)
                    predicted = torch.cat((noise, rest), dim=1)
                latents = self.scheduler.step(predicted, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_labels": labels}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, given) or {}
                    latents, labels = tensors["latents"], tensors["class_labels"]
                if (i + 1) % order == 0 or i + 1 == len(times):
                    bar.update()
        self._current_timestep = None
        require_finite(latents, "denoising", "run the transformer in bfloat16 or float32")

        # 5. Decode.
        pictures: Any = latents
        if output_type != "latent":
            pictures = self.decode_pictures(latents, output_type)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def check_inputs(
        self,
        *,
        labels: int,
        num_images_per_label: int,
        height: int,
        width: int,
        images: list[Tensor],
        strength: float,
        num_inference_steps: int,
        guidance_channels: int | None,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> int:
        """Raise ValueError for arguments of `__call__` that cannot work; `labels` is how many there are, and
        `images` are as `read_images` gives them.

        Returns how many pictures there will be.
        """
        channels = self.transformer.config.in_channels
        batch = labels * num_images_per_label
        self._check_call(
            conditions=labels,
            batch=batch,
            height=height,
            width=width,
            images=images,
            counts={"num_inference_steps": num_inference_steps, "num_images_per_label": num_images_per_label},
            shares={"strength": strength, "eta": eta},
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._check_vae(images, output_type)
        if guidance_channels is not None and guidance_channels not in range(1, channels + 1):
            raise ValueError(f"guidance_channels must be 1 to {channels} or None, got {guidance_channels}")
        check_eta(eta, self.scheduler)
        return batch

    def _uses_variance(self) -> bool:
        """Whether the scheduler takes the variance that the transformer predicts beside the noise."""
        config, name = self.transformer.config, type(self.scheduler).__name__
        kind = self.scheduler.config.get("variance_type")
        if kind not in ("learned", "learned_range"):
            return False
        if not isinstance(self.scheduler, DDPMScheduler):
            # Diffusers' solvers cut such a prediction to its first three channels.
            raise ValueError(
                f"scheduler's variance_type must be None with {name}, got {kind!r}: make it by "
                f"{name}.from_config(pipe.scheduler.config, variance_type=None)"
            )
        if config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"scheduler's variance_type must be a fixed one for a transformer of {config.out_channels} "
                f"out_channels, which predicts no variance, got {kind!r}"
            )
        return True
