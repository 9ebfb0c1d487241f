"""SparseDiTPipeline: text to image and image to image with `SparseDiTTransformer2DModel`, in one class."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
)
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from localdit.models.sparse_dit import SparseDiTTransformer2DModel
from localdit.pipelines.common import (
    ImageInput,
    LatentsMixin,
    SafetensorsMixin,
    TransformerLoraMixin,
    changed_text,
    check_prompts,
    check_text,
    lost_words,
    require_finite,
    set_timesteps,
    tensor_inputs,
)
from localdit.schedulers.edm_heun import EDMHeunScheduler

logger = logging.getLogger(__name__)

# B pictures (prompts x pictures of each)   C latent channels   H W latent   L text tokens

# Of open_clip, and of T5. Tokenizers of CLIP often say 49407, with which the weights were not trained.
PADDING_ID = 0


class SparseDiTPipeline(SafetensorsMixin, DiffusionPipeline, TransformerLoraMixin, LatentsMixin):
    """Text to image, and image to image where `image` is given.

    A component may be None in calls that do without it: tokenizer and text_encoder with embeddings in place
    of text, vae with latents in and out, vae, transformer and scheduler with `encode_prompt` alone.

    Args:
        tokenizer: CLIP's, or one like it. What it says of padding is ignored: texts are padded with 0.
        text_encoder: Its first output is (B, L, caption_channels). `CLIPTextModel`, as published that of
            DFN5B-CLIP-ViT-H-14-378: its last states after the final norm are read, those of the padding too.
            Another, such as `T5EncoderModel`, is told which tokens are padding.
        vae: `AutoencoderKL`, or one with its interface. Without it a latent is taken for 8 x 8 pixels.
        transformer: `SparseDiTTransformer2DModel`, or one with its interface.
        scheduler: `EDMHeunScheduler(sigma_data=0.9)`, as published, or one of diffusers' EDM schedulers.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        vae: AutoencoderKL | None = None,
        transformer: SparseDiTTransformer2DModel | None = None,
        scheduler: EDMHeunScheduler | EDMEulerScheduler | EDMDPMSolverMultistepScheduler | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        image: ImageInput | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 77,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args:
            prompt: What to show, or a list, for a picture of each. Lower-cased and stripped, as in training.
            negative_prompt: What to steer away from: one text for all prompts, or one each. None steers away
                from no text at all, as published; with a text the model does what it was not trained for.
            image: The picture to start from: one for all prompts, or one each, of any kind that `read_images`
                takes, or its latents as `output_type="latent"` gives them. It is stretched to `height` x
                `width`, by default its own size, rounded down to a multiple of the VAE's factor times the
                patch size (16 as published).
            strength: How much of the noise schedule the picture goes through, 0 to 1: the last
                int(num_inference_steps * strength) steps. No step at all gives the picture back through the
                VAE. 1 starts from noise alone, and takes the picture's size only.
            height: In pixels, such a multiple. Default: that of `image`, else what the transformer was made
                for. Other sizes than that squared were not trained.
            width: Likewise.
            num_inference_steps: Steps of the scheduler. `EDMHeunScheduler` calls the transformer twice in
                each but the last.
            guidance_scale: Weight of classifier-free guidance. At 1 or less there is none, and all that is
                negative goes unused.
            num_images_per_prompt: Pictures of each prompt.
            generator: Source of all noise: one, or a list of one for each picture, with which picture i is
                the one that generator i makes alone.
            latents: Unit noise to take in place of drawn noise, (B, C, H, W).
            prompt_embeds: Text features in place of `prompt`, (prompts, L, caption_channels).
            negative_prompt_embeds: Likewise in place of `negative_prompt`, of the same shape.
            output_type: "pil"; "np" (B, height, width, 3) or "pt" (B, 3, height, width), float32 in [0, 1];
                or "latent" (B, C, H, W), float32.
            return_dict: Return an `ImagePipelineOutput`, else a tuple of its `images`.
            attention_kwargs: For the transformer; `scale` is that of a LoRA.
            callback_on_step_end: A function or one of diffusers' callback objects, called after each call of
                the transformer with (pipe, index, timestep, tensors). It returns the tensors, changed as it
                likes.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", "prompt_embeds" and
                "negative_prompt_embeds" (prompt_embeds has no negative half).
            max_sequence_length: Tokens that text is padded or cut to. Words that are cut off are logged.

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
        batch = self.check_inputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            height=height,
            width=width,
            images=images,
            strength=strength,
            latents=latents,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device

        # 2. The times to visit.
        tokens = height * width // self._size_multiple**2
        steps = set_timesteps(self.scheduler, num_inference_steps, tokens, device)
        times, steps = self.get_timesteps(steps, strength if images else 1.0)
        self._num_timesteps = len(times)

        # 3. The text, and with it all that the transformer is told at every step.
        embeds, negative_embeds = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            num_images_per_prompt,
            device,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}

        # 4. The latents to start from.
        image_latents = None
        if images and strength < 1:
            image_latents = self.encode_image(images, batch, height, width, device, generator)
        latents = self.prepare_latents(batch, height, width, times, device, generator, latents, image_latents)

        # 5. Denoise. Outside the transformer everything is float32, or what the scheduler makes of it.
        guided = self.do_classifier_free_guidance
        context = self._text_context(text)
        order = self.scheduler.order
        step_kwargs = self._step_kwargs(generator=generator)
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(times):
                if self.interrupt:
                    break
                self._current_timestep = t
                x = self.scale_model_input(latents, t)
                x = torch.cat((x, x)) if guided else x  # (2B, C, H, W), negative first
                with self.transformer.cache_context("cond_uncond" if guided else "cond"):
                    predicted = self.transformer(
                        hidden_states=x.to(self.transformer.dtype),
                        encoder_hidden_states=context,
                        timestep=t.float().expand(len(x)),
                        attention_kwargs=attention_kwargs,
                        return_dict=False,
                    )[0].float()
                if guided:
                    negative, positive = predicted.chunk(2)
                    predicted = torch.lerp(negative, positive, self.guidance_scale)
                latents = self.scheduler.step(predicted, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, **text}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    # A tensor may also be changed in place: text that was given is read anew.
                    read_anew = not text.keys().isdisjoint(given)
                    changed = callback_on_step_end(self, i, t, given) or {}
                    latents = changed.pop("latents", latents)
                    if changed or read_anew or guided != self.do_classifier_free_guidance:
                        text = changed_text(text, changed, guided, self.do_classifier_free_guidance)
                        guided = self.do_classifier_free_guidance
                        context = self._text_context(text)
                if (i + 1) % order == 0 or i + 1 == len(times):
                    bar.update()
        self._current_timestep = None
        latents = latents.float()
        require_finite(latents, "denoising", "run the transformer in bfloat16 or float32")

        # 6. Decode.
        pictures: Any = latents
        if output_type != "latent":
            pictures = self.decode_pictures(latents, output_type)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def check_inputs(
        self,
        *,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        max_sequence_length: int,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        height: int,
        width: int,
        images: list[Tensor],
        strength: float,
        latents: Tensor | None,
        num_inference_steps: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> int:
        """Raise ValueError for arguments of `__call__` that cannot work; `images` as `read_images` gives
        them.

        Returns how many pictures there will be.
        """
        # Ours is a kind of Euler's.
        if not isinstance(self.scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler):
            raise ValueError(
                "scheduler must be EDMHeunScheduler, EDMEulerScheduler or EDMDPMSolverMultistepScheduler, "
                f"got {type(self.scheduler).__name__}"
            )
        width_of_text = self.transformer.config.caption_channels
        if negative_prompt is None and negative_prompt_embeds is None:
            prompts = check_text("prompt", prompt, prompt_embeds, width_of_text)
        else:
            prompts = check_prompts(
                prompt,
                negative_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                width=width_of_text,
                max_sequence_length=max_sequence_length,
                guided=self.do_classifier_free_guidance,
            )
        places = getattr(getattr(self.text_encoder, "config", None), "max_position_embeddings", None)
        if places is not None and max_sequence_length > places:
            raise ValueError(
                f"max_sequence_length must be at most {places}, the places of the text encoder, "
                f"got {max_sequence_length}"
            )
        batch = prompts * num_images_per_prompt
        self._check_call(
            conditions=prompts,
            batch=batch,
            height=height,
            width=width,
            images=images,
            counts={
                "num_inference_steps": num_inference_steps,
                "num_images_per_prompt": num_images_per_prompt,
                "max_sequence_length": max_sequence_length,
            },
            shares={"strength": strength},
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._check_vae(images, output_type)
        return batch

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 77,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn text into what the transformer reads. The arguments are those of `__call__`.

        Returns:
            prompt_embeds (B, L, caption_channels) and negative_prompt_embeds, which `__call__` takes under
            these names; the second is None without guidance. The pictures of one prompt stand side by side
            in B.
        """
        device = self._execution_device if device is None else device
        texts: list[str] = []
        negatives: list[str] = []
        if prompt_embeds is None:
            texts = prompt if isinstance(prompt, list) else [prompt or ""]
        if do_classifier_free_guidance and negative_prompt is not None:
            count = len(texts) if prompt_embeds is None else len(prompt_embeds)
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * count

        embeds: Any = prompt_embeds
        negative_embeds: Any = negative_prompt_embeds
        if texts or negatives:  # the text encoder runs once for both
            encoded = self._encode_texts(texts + negatives, device, max_sequence_length)
            embeds = encoded[: len(texts)] if texts else embeds
            negative_embeds = encoded[len(texts) :] if negatives else negative_embeds
        embeds = embeds.to(device)
        if not do_classifier_free_guidance:
            negative_embeds = None
        elif negative_embeds is None:
            negative_embeds = torch.zeros_like(embeds)  # what dropped captions were in training
        if negative_embeds is not None:
            negative_embeds = negative_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        return embeds.repeat_interleave(num_images_per_prompt, dim=0), negative_embeds

    def _encode_texts(self, texts: list[str], device: torch.device, length: int) -> Tensor:
        """Embeddings (len(texts), length, caption_channels); equal texts are read once."""
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "without tokenizer and text_encoder, prompt_embeds must be given, and negative_prompt_embeds "
                "in place of a negative_prompt"
            )
        texts = [text.lower().strip() for text in texts]
        unique = list(dict.fromkeys(texts))
        for text in unique:
            if lost := lost_words(self.tokenizer, text, length):
                encoder = type(self.text_encoder).__name__
                logger.warning("%s is given %d tokens, and the text is cut before: %s", encoder, length, lost)
        tokens = self.tokenizer(unique, max_length=length, truncation=True).input_ids
        padded = torch.tensor([row + [PADDING_ID] * (length - len(row)) for row in tokens], device=device)
        mask: dict[str, Tensor] = {}
        # CLIP looks back alone: a mask would change nothing but the states of the padding, which are read.
        if self.text_encoder.config.model_type != "clip_text_model":
            lengths = torch.tensor([len(row) for row in tokens], device=device)
            mask["attention_mask"] = (torch.arange(length, device=device) < lengths[:, None]).long()
        embeds = self.text_encoder(padded, **mask)[0]
        require_finite(embeds, "the text encoder", "run it in bfloat16 or float32")
        return embeds[[unique.index(text) for text in texts]]

    def _text_context(self, text: dict[str, Any]) -> Any:
        """What the transformer makes of the text, negative half first."""
        names = ("negative_prompt_embeds", "prompt_embeds")
        embeds = torch.cat([text[name] for name in names[not self.do_classifier_free_guidance :]])
        return self.transformer.encode_text(
            embeds.to(self.transformer.dtype), attention_kwargs=self.attention_kwargs
        )
