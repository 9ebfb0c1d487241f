"""RowDiTPipeline: class labels to pictures."""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from localdit.pipelines.common import (
    LatentsMixin,
    SafetensorsMixin,
    TransformerLoraMixin,
    label_names,
    read_labels,
    require_finite,
    set_timesteps,
)


class RowDiTPipeline(SafetensorsMixin, DiffusionPipeline, TransformerLoraMixin, LatentsMixin):
    """Class labels to pictures."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar = ["vae", "transformer", "scheduler"]
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(self, vae: Any = None, transformer: Any = None, scheduler: Any = None, id2label: Any = None):
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
        class_labels: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures of labels or names."""
        # 1. Refuse what cannot work.
        self._begin(guidance_scale, None)
        _, height, width = self._read_images(None, height, width)
        none, device = self.transformer.config.num_classes, self._execution_device
        listed = read_labels(class_labels, self.labels, none)
        batch = len(listed)
        self._check_call(
            conditions=batch,
            batch=batch,
            height=height,
            width=width,
            images=[],
            counts={"num_inference_steps": num_inference_steps},
            shares={},
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_tensor_inputs=[],
        )

        # 2. Times and noise.
        set_timesteps(self.scheduler, num_inference_steps, height * width // self._size_multiple**2, device)
        times = self.scheduler.timesteps
        latents = self.prepare_latents(batch, height, width, times, device, generator, latents)

        # 3. Denoise, without the label first.
        labels = torch.tensor([none] * batch + listed, device=device)  # (2B,)
        for i, t in enumerate(self.progress_bar(times)):
            if self.interrupt:
                break
            x = self.scale_model_input(latents, t).to(self.transformer.dtype)
            noise = self.transformer(torch.cat((x, x)), t.expand(2 * batch), labels).sample.float()
            noise = torch.lerp(*noise.chunk(2), self.guidance_scale)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {})
        require_finite(latents, "denoising", "run the transformer in float32")

        # 4. Decode.
        pictures: Any = latents
        if output_type != "latent":
            pictures = self.decode_pictures(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)
