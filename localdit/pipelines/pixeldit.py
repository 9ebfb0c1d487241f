"""PixelDiTPipeline: class labels to images and image to image with `PixelDiTTransformer2DModel`.

Here too is what the text pipeline, in `pixeldit_text.py`, shares with it: both work on pixels, so there is no
autoencoder, and both follow a flow, in which the sample at noise level σ is (1 - σ) data + σ noise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.pipelines.common import (
    DenoisingMixin,
    ImageInput,
    SafetensorsMixin,
    TransformerLoraMixin,
    label_names,
    read_labels,
    require_finite,
    resize_images,
    set_timesteps,
    tensor_inputs,
)

# B pictures   C channels, 3   H W picture   T text tokens


class PixelPipeline(SafetensorsMixin, DiffusionPipeline, TransformerLoraMixin, DenoisingMixin):
    """What PixelDiT's two pipelines share: pixels in and out, noise, and the steps.

    A subclass reads its conditions, and says what velocity its transformer predicts under them.

    Attributes:
        flow_direction: Where time and velocity of its transformers point. "data": time is 1 - σ, and they
            predict data - noise. "noise": time is 1000 σ, and they predict noise - data. Training goes by it.
    """

    flow_direction: ClassVar[Literal["data", "noise"]]
    _optional_components: ClassVar = ["transformer", "scheduler"]

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        sigma: float,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """What to begin with, (batch_size, C, H, W), float32: noise alone, or `images`, (N, C, H, W) in
        [-1, 1], each for batch_size / N samples, with noise of the level `sigma`."""
        shape = (batch_size, self.transformer.config.in_channels, height, width)
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            noise = latents.to(device, torch.float32)
        if images is None:
            return noise
        images = images.to(device).repeat_interleave(batch_size // len(images), dim=0)
        return torch.lerp(images, noise, sigma)

    def _velocity(self, x: Tensor, sigma: float, conditions: Mapping[str, Any], guided: bool) -> Tensor:
        """noise - data in x, (B, C, H, W) at the level `sigma`; if `guided`, (2B, C, H, W), first without the
        condition."""
        raise NotImplementedError

    def _begin_flow(
        self,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        """`_begin`, with a scheduler of flow matching."""
        self._begin(guidance_scale, attention_kwargs, guidance_interval)
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        if kind != "flow_prediction" or not hasattr(self.scheduler, "sigmas"):
            raise ValueError(
                f"scheduler must be one of flow matching, got {type(self.scheduler).__name__} "
                f"with prediction_type {kind!r}"
            )

    def _sample(
        self,
        conditions: dict[str, Any],
        *,
        batch: int,
        height: int,
        width: int,
        images: list[Tensor],
        strength: float,
        num_inference_steps: int,
        sigmas: list[float] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback: Callable[..., dict[str, Any] | None] | None,
        callback_tensors: Sequence[str],
    ) -> Any:
        """Go from noise to pictures. conditions: by argument; what callbacks may see and change."""
        device = self._execution_device

        # 1. The noise levels to visit. The times of schedulers may be rounded to integers; these are not.
        tokens = height * width // self._size_multiple**2
        steps = set_timesteps(self.scheduler, num_inference_steps, tokens, device, sigmas=sigmas)
        times, steps = self.get_timesteps(steps, strength if images else 1.0)
        levels: list[float] = self.scheduler.sigmas.tolist()
        levels = levels[len(self.scheduler.timesteps) - len(times) :]
        self._num_timesteps = len(times)

        # 2. What to begin with. Outside the transformer everything is float32.
        pixels = None
        if images and strength < 1:
            pixels = 2 * resize_images(images, height, width) - 1
        x = self.prepare_latents(
            batch, height, width, levels[0] if len(times) else 0.0, device, generator, latents, pixels
        )

        # 3. Denoise.
        order = getattr(self.scheduler, "order", 1)
        step_kwargs = self._step_kwargs(generator=generator)
        was_guided = self.do_classifier_free_guidance
        with self.progress_bar(total=steps) as bar:
            for i, (t, sigma) in enumerate(zip(times, levels)):
                if self.interrupt:
                    break
                self._current_timestep = t
                guided = self.do_classifier_free_guidance and self._inside_interval(1 - sigma)
                with self.transformer.cache_context("cond_uncond" if guided else "cond"):
                    velocity = self._velocity(x, sigma, conditions, guided)
                if guided:
                    negative, positive = velocity.chunk(2)
                    velocity = torch.lerp(negative, positive, self.guidance_scale)
                x = self.scheduler.step(velocity, t, x, **step_kwargs, return_dict=False)[0]

                if callback is not None:
                    tensors = {"latents": x, **conditions}
                    changed = callback(self, i, t, {name: tensors[name] for name in callback_tensors}) or {}
                    x = changed.pop("latents", x)
                    conditions = self._changed(conditions, changed, was_guided)
                    was_guided = self.do_classifier_free_guidance
                if (i + 1) % order == 0 or i + 1 == len(times):
                    bar.update()
        self._current_timestep = None
        require_finite(x, "denoising", "run the transformer in bfloat16 or float32")

        # 4. Pixels are what there is.
        return x if output_type == "latent" else VaeImageProcessor().postprocess(x, output_type)

    def _changed(
        self, conditions: dict[str, Any], changed: Mapping[str, Any], was_guided: bool
    ) -> dict[str, Any]:
        """The conditions after a callback changed them, or the guidance."""
        return conditions | dict(changed)


class PixelDiTPipeline(PixelPipeline):
    """Class labels to images, and image to image where `image` is given.

    Args:
        transformer: `PixelDiTTransformer2DModel`, or one with its interface.
        scheduler: One of flow matching: `FlowAdamsBashforthScheduler`, as published, or one of diffusers'.
        id2label: Names by label, an integer or, as JSON has it, its text; commas stand between several names.
    """

    flow_direction = "data"
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar = ["latents", "class_labels"]

    def __init__(
        self,
        transformer: PixelDiTTransformer2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        id2label: dict[Any, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

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
        num_inference_steps: int = 100,
        guidance_scale: float = 2.75,
        guidance_interval: tuple[float, float] = (0.1, 0.9),
        sigmas: list[float] | None = None,
        num_images_per_label: int = 1,
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
                takes. It is stretched to `height` x `width`, by default its own size, rounded down to a
                multiple of the patch size.
            strength: How much of the noise schedule the picture goes through, 0 to 1: the last
                int(num_inference_steps * strength) steps. No step at all gives the picture back. 1 starts
                from noise alone, and takes the picture's size only.
            height: In pixels, a multiple of the patch size. Default: that of `image`, else what the
                transformer was made for.
            width: Likewise.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Weight of classifier-free guidance. At 1 or less there is none.
            guidance_interval: Times between which there is guidance (Kynkäänniemi et al. 2024, arXiv
                2404.07724), where 0 is noise and 1 is the picture, themselves without. Elsewhere the
                transformer runs on the labels alone.
            sigmas: Own noise levels, falling, for schedulers that take them.
            num_images_per_label: Pictures of each label.
            generator: Source of all noise: one, or a list of one for each picture, with which picture i is
                the one that generator i makes alone.
            latents: Unit noise to take in place of drawn noise, (B, C, height, width).
            output_type: "pil"; "np" (B, height, width, 3) or "pt" (B, 3, height, width), float32 in [0, 1];
                or "latent" (B, 3, height, width), float32, black -1 and white 1, and not clipped.
            return_dict: Return an `ImagePipelineOutput`, else a tuple of its `images`.
            attention_kwargs: For the transformer; `scale` is that of a LoRA.
            callback_on_step_end: A function or one of diffusers' callback objects, called after each call of
                the transformer with (pipe, index, timestep, tensors). It returns the tensors, changed as it
                likes.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", "class_labels" (B,).

        Raises:
            ValueError: For arguments that fit neither the components nor each other, before the transformer
                is called.
            NonFiniteError: Where the transformer gives NaN or infinity.
        """
        # 1. Refuse what cannot work.
        self._begin_flow(guidance_scale, guidance_interval, attention_kwargs)
        callback_on_step_end_tensor_inputs = tensor_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        images, height, width = self._read_images(image, height, width)
        labels = read_labels(class_labels, self.labels, self.transformer.config.num_classes)
        batch = len(labels) * num_images_per_label
        self._check_call(
            conditions=len(labels),
            batch=batch,
            height=height,
            width=width,
            images=images,
            counts={"num_inference_steps": num_inference_steps, "num_images_per_label": num_images_per_label},
            shares={"strength": strength},
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 2. The labels, and the pictures they make.
        rows = torch.tensor(labels, device=self._execution_device).repeat_interleave(num_images_per_label)
        pictures = self._sample(
            {"class_labels": rows},
            batch=batch,
            height=height,
            width=width,
            images=images,
            strength=strength,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _velocity(self, x: Tensor, sigma: float, conditions: Mapping[str, Any], guided: bool) -> Tensor:
        labels = conditions["class_labels"]  # (B,)
        if guided:
            none = torch.full_like(labels, self.transformer.config.num_classes)
            x, labels = torch.cat((x, x)), torch.cat((none, labels))
        predicted = self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            # The model's time runs from noise to data, and so does the velocity that it predicts.
            timestep=torch.full((len(x),), 1 - sigma, device=x.device),
            class_labels=labels,
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )[0]
        return -predicted.float()
