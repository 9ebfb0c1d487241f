"""LocalDiTPipeline: text to image, image to image and inpainting with `LocalDiTTransformer2DModel`."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from localdit.models.local_dit import LocalDiTTransformer2DModel, TextContext
from localdit.pipelines.common import (
    ImageInput,
    LatentsMixin,
    SafetensorsMixin,
    TransformerLoraMixin,
    changed_text,
    check_eta,
    check_prompts,
    check_text_mask,
    enlarge_images,
    image_size,
    is_picture,
    lost_words,
    read_images,
    require_finite,
    resize_images,
    set_timesteps,
    tensor_inputs,
)
from localdit.pipelines.inpainting import check_masks, read_masks, resize_masks

logger = logging.getLogger(__name__)

# B pictures (prompts x pictures of each)   C latent channels   H W latent   T text tokens

MAX_SIDE = 16384  # pixels of an enlarged picture: more is a slip, found before memory is taken for it

TEXT_TENSORS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


class LocalDiTPipeline(SafetensorsMixin, DiffusionPipeline, TransformerLoraMixin, LatentsMixin):
    """Text to image, image to image where `image` is given, and a part of it alone where `mask` is.

    A component may be None in calls that do without it: tokenizer and text_encoder with embeddings in place
    of text, vae with latents in and out, vae, transformer and scheduler with `encode_prompt` alone.

    Args:
        tokenizer: T5's, or one like it.
        text_encoder: Its first output is (B, T, caption_channels), as of `T5EncoderModel`.
        vae: `AutoencoderKL`, or one with its interface. Without it a latent is taken for 8 x 8 pixels.
        transformer: `LocalDiTTransformer2DModel`, or one with its interface.
        scheduler: Any of diffusers' for noise, v or flow prediction; its config says which.
        default_guidance_scale: Guidance of calls that name none: what suits the weights.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]
    _callback_tensor_inputs: ClassVar = ["latents", *TEXT_TENSORS]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        vae: AutoencoderKL | None = None,
        transformer: LocalDiTTransformer2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        default_guidance_scale: float = 7.0,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.register_to_config(default_guidance_scale=default_guidance_scale)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        *,
        image: ImageInput | None = None,
        strength: float = 0.8,
        mask: ImageInput | None = None,
        mask_halo: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 120,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args:
            prompt: What to show, or a list, for a picture of each. Lower-cased and stripped, as in training.
            negative_prompt: What to steer away from: one text for all prompts, or one each. None is the empty
                text.
            image: The picture to start from: one for all prompts, or one each, of any kind that `read_images`
                takes, or its latents as `output_type="latent"` gives them. It is stretched to `height` x
                `width`, by default its own size, rounded down to a multiple of the VAE's factor times the
                patch size (16 as published).
            strength: How much of the noise schedule the picture goes through, 0 to 1: the last
                int(num_inference_steps * strength) steps. No step at all gives the picture back through the
                VAE. 1 starts from noise alone, and takes the picture's size only, or what a mask keeps of it.
            mask: What of `image` to paint anew: where it is at least half white. All else stays: in each step
                it is the picture with the noise of that step, and in the end it has the pixels of the
                picture, to the bit (its latents, where `image` holds latents or `output_type` is "latent").
                One mask for all or one for each prompt, of any kind that an image may be, and of the image's
                size. The transformer computes no more than what the masked parts of all pictures depend on:
                its `plan_region` says how much that is.
            mask_halo: Compute so many windows (of 64 pixels, as published) around the mask at most: an
                approximation, for a transformer with `global_context` or full attention, where everything
                depends on everything. None: all that the mask depends on is computed.
            height: In pixels, such a multiple. Default: that of `image`, else what the transformer was made
                for.
            width: Likewise.
            num_inference_steps: Steps of the scheduler. Those of order 2 call the transformer twice in a
                step.
            guidance_scale: Weight of classifier-free guidance; None for the pipeline's own,
                `default_guidance_scale`. At 1 or less there is none, and all that is negative goes unused.
            guidance_interval: Times between which there is guidance (Kynkäänniemi et al. 2024, arXiv
                2404.07724), where 0 is noise and 1 is the picture, themselves without: 1 - t / 1000, or 1 - σ
                of flow matching. Elsewhere the transformer runs on the prompts alone, half the work of a
                step. None guides at every step.
            timesteps: Own times, falling, for schedulers that take them.
            sigmas: Own noise levels, falling, for schedulers that take them.
            num_images_per_prompt: Pictures of each prompt.
            eta: Share of noise that DDIM adds, 0 to 1; must be 0 with schedulers that do not know it.
            generator: Source of all noise: one, or a list of one for each picture, with which picture i is
                the one that generator i makes alone.
            latents: Unit noise to take in place of drawn noise, (B, C, H, W).
            prompt_embeds: Text features in place of `prompt`, (prompts, T, caption_channels).
            prompt_attention_mask: Their mask, (prompts, T): 1 = keep, 0 = padding.
            negative_prompt_embeds: Likewise in place of `negative_prompt`, of the same shape.
            negative_prompt_attention_mask: Their mask.
            output_type: "pil"; "np" (B, height, width, 3) or "pt" (B, 3, height, width), float32 in [0, 1];
                or "latent" (B, C, H, W), float32.
            return_dict: Return an `ImagePipelineOutput`, else a tuple of its `images`.
            attention_kwargs: For the transformer; `scale` is that of a LoRA.
            callback_on_step_end: A function or one of diffusers' callback objects, called after each call of
                the transformer with (pipe, index, timestep, tensors). It returns the tensors, changed as it
                likes.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", and the four of the text,
                each as the argument of that name is (prompt_embeds has no negative half).
            max_sequence_length: Tokens that text is padded or cut to. Words that are cut off are logged.

        Raises:
            ValueError: For arguments that fit neither the components nor each other, before the transformer
                is called.
            NonFiniteError: Where a model gives NaN or infinity.
        """
        # 1. Refuse what cannot work.
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        self._begin(guidance_scale, attention_kwargs, guidance_interval)
        callback_on_step_end_tensor_inputs = tensor_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        images, height, width = self._read_images(image, height, width)
        masks = [] if mask is None else read_masks(mask)
        text: dict[str, Any] = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        batch = self.check_inputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            **text,
            max_sequence_length=max_sequence_length,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            height=height,
            width=width,
            images=images,
            masks=masks,
            mask_halo=mask_halo,
            strength=strength,
            latents=latents,
            num_inference_steps=num_inference_steps,
            eta=eta,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device

        # 2. The times to visit.
        tokens = height * width // self._size_multiple**2
        steps = set_timesteps(self.scheduler, num_inference_steps, tokens, device, timesteps, sigmas)
        times, steps = self.get_timesteps(steps, strength if images else 1.0)
        self._num_timesteps = len(times)

        # 3. The text, and with it all that the transformer is told at every step.
        encoded = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            num_images_per_prompt,
            device,
            max_sequence_length=max_sequence_length,
            **text,
        )
        text = dict(zip(TEXT_TENSORS, encoded))

        # 4. The latents to start from, and the part of them that a mask leaves to be painted.
        image_latents: Any = None
        if images and (strength < 1 or masks):
            image_latents = self.encode_image(images, batch, height, width, device, generator)
        noise = self.prepare_noise(batch, height, width, device, generator, latents)
        start = image_latents if strength < 1 else None
        latents = self.prepare_latents(
            batch, height, width, times, device, latents=noise, image_latents=start
        )
        region: dict[str, Any] = {}
        if masks:
            masked = resize_masks(masks, height, width).to(device)
            masked = masked.repeat_interleave(batch // len(masks), dim=0)  # (B, 1, height, width)
            painted = F.max_pool2d(masked.float(), self.vae_scale_factor) > 0  # (B, 1, H, W)
            latents = torch.where(painted, latents, self.add_noise(image_latents, noise, times))
            patches = F.max_pool2d(painted.any(dim=0).float(), self.transformer.config.patch_size)[0] > 0
            planned = self.transformer.plan_region(patches, mask_halo)
            region = {} if planned is None else {"region": planned}

        # 5. Denoise. Outside the transformer everything is float32.
        was_guided = self.do_classifier_free_guidance
        captions = self._captions(text)
        contexts = self.transformer.encode_timesteps(
            times.float(), self._sizes(height, width, device), attention_kwargs=attention_kwargs
        )
        noisiest = self.scheduler.config.num_train_timesteps
        inside = [self._inside_interval(1 - t / noisiest) for t in times.tolist()]
        order = getattr(self.scheduler, "order", 1)
        step_kwargs = self._step_kwargs(eta=eta, generator=generator)
        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(times):
                if self.interrupt:
                    break
                self._current_timestep = t
                guided = was_guided and inside[i]
                x = self.scale_model_input(latents, t)  # (B, C, H, W)
                with self.transformer.cache_context("cond_uncond" if guided else "cond"):
                    predicted = self.transformer(
                        hidden_states=x.to(self.transformer.dtype),
                        encoder_hidden_states=captions[guided],
                        timestep=contexts[i],
                        attention_kwargs=attention_kwargs,
                        return_dict=False,
                        **region,
                    )[0].float()  # (2B, C, H, W) if guided, negative first
                predicted = predicted[:, : latents.shape[1]]  # a learned variance would follow
                if guided:
                    negative, positive = predicted.chunk(2)
                    predicted = torch.lerp(negative, positive, self.guidance_scale)
                latents = self.scheduler.step(predicted, t, latents, **step_kwargs, return_dict=False)[0]
                if masks:
                    kept = self.add_noise(image_latents, noise, times[i + 1 :])
                    latents = torch.where(painted, latents, kept)

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, **text}
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    # A tensor may also be changed in place: text that was given is read anew.
                    read_anew = not text.keys().isdisjoint(given)
                    changed = callback_on_step_end(self, i, t, given) or {}
                    latents = changed.pop("latents", latents)
                    if changed or read_anew or was_guided != self.do_classifier_free_guidance:
                        text = changed_text(text, changed, was_guided, self.do_classifier_free_guidance)
                        was_guided = self.do_classifier_free_guidance
                        captions = self._captions(text)
                if (i + 1) % order == 0 or i + 1 == len(times):
                    bar.update()
        self._current_timestep = None
        require_finite(latents, "denoising", "run the transformer in bfloat16 or float32")

        # 6. Decode.
        pictures: Any = latents
        if output_type != "latent":
            if masks and is_picture(images[0]):  # what is not masked is the picture's own
                pictures = self.decode_pictures(latents, "pt")  # in [0, 1]
                originals = resize_images(images, height, width).to(device)
                originals = originals.repeat_interleave(batch // len(images), dim=0)
                pictures = torch.where(masked, pictures, originals)
                pictures = self.image_processor.postprocess(
                    pictures, output_type, do_denormalize=[False] * batch
                )
            else:
                pictures = self.decode_pictures(latents, output_type)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def upscale(
        self, image: ImageInput, scale: float = 2, strength: float = 0.3, **kwargs: Any
    ) -> ImagePipelineOutput | tuple[Any]:
        """Enlarge pictures, and draw their detail anew: Lanczos, then image to image at the large size, at
        which the transformer must be able to draw.

        The transformer and the VAE are streamed, `enable_streaming` and `enable_vae_streaming`, so that the
        size is bounded by time: there are no tiles, and no seams. Whoever enabled either before, or the VAE's
        tiling, finds it as it was set; else they are streamed for this call alone.

        Args:
            image: The picture, or a list of pictures of one size, for `__call__`.
            scale: Of the sides, above 1, up to 8. Sizes are rounded down as those of an image are.
            strength: How much of the noise schedule the enlarged picture goes through, 0 to 1.
            kwargs: Other arguments of `__call__`, such as `prompt`; height and width follow from the above.

        Returns:
            As `__call__`.

        Raises:
            ValueError: As `__call__`; or the picture would be larger than 16384 pixels a side; or transformer
                or VAE are none that can be streamed: such a VAE may tile, by `pipe.vae.enable_tiling()`.
            NonFiniteError: As `__call__`.
        """
        for name in ("vae", "transformer"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be loaded to enlarge a picture, got None")
        for name in ("height", "width"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must be left to scale when a picture is enlarged, got {kwargs[name]}"
                )
        if not 1 < scale <= 8:
            raise ValueError(f"scale must be above 1 and at most 8, got {scale}")
        images = read_images(image, self.transformer.config.in_channels)
        if not is_picture(images[0]):
            raise ValueError("image must be pictures to be enlarged, got latents")
        multiple = self._size_multiple
        height, width = (int(side * scale) // multiple * multiple for side in image_size(images, 1))
        for name, side in (("height", height), ("width", width)):
            if not multiple <= side <= MAX_SIDE:
                raise ValueError(f"{name} must be from {multiple} to {MAX_SIDE} when enlarged, got {side}")

        streaming, vae_streaming = self.transformer.is_streaming, self._vae_streaming
        try:
            if not streaming:
                self.transformer.enable_streaming()
            if vae_streaming is None and not getattr(self.vae, "use_tiling", False):
                self.enable_vae_streaming()
            return self(image=enlarge_images(images, height, width), strength=strength, **kwargs)
        finally:
            self._vae_streaming = vae_streaming
            if not streaming:
                self.transformer.disable_streaming()

    def check_inputs(
        self,
        *,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        prompt_attention_mask: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_prompt_attention_mask: Tensor | None,
        max_sequence_length: int,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        height: int,
        width: int,
        images: list[Tensor],
        masks: list[Tensor],
        mask_halo: int | None,
        strength: float,
        latents: Tensor | None,
        num_inference_steps: int,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> int:
        """Raise ValueError for arguments of `__call__` that cannot work; `images` as `read_images` gives
        them, `masks` as `read_masks` does.

        Returns how many pictures there will be.
        """
        prompts = check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            width=self.transformer.config.caption_channels,
            max_sequence_length=max_sequence_length,
            guided=self.do_classifier_free_guidance,
        )
        check_text_mask("prompt", prompt_embeds, prompt_attention_mask)
        check_text_mask("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask)
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
            shares={"strength": strength, "eta": eta},
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        check_masks(masks, images, prompts, mask_halo, height, width)
        check_eta(eta, self.scheduler)
        self._check_vae(images, output_type)
        return batch

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 120,
    ) -> tuple[Tensor | None, ...]:
        """Turn text into what the transformer reads. The arguments are those of `__call__`.

        Returns:
            prompt_embeds (B, T, caption_channels), prompt_attention_mask (B, T), negative_prompt_embeds and
            negative_prompt_attention_mask, which `__call__` takes under these names; the last two are None
            without guidance. The pictures of one prompt stand side by side in B.
        """
        device = self._execution_device if device is None else device
        texts: list[str] = []
        negatives: list[str] = []
        if prompt_embeds is None:
            texts = prompt if isinstance(prompt, list) else [prompt or ""]
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            count = len(texts) if prompt_embeds is None else len(prompt_embeds)
            negatives = (
                negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * count
            )

        if texts or negatives:  # the text encoder runs once for both
            embeds, mask = self._encode_texts(texts + negatives, device, max_sequence_length)
        if texts:
            prompt_embeds, prompt_attention_mask = embeds[: len(texts)], mask[: len(texts)]
        if negatives:
            negative_prompt_embeds, negative_prompt_attention_mask = embeds[len(texts) :], mask[len(texts) :]
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        tensors = prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
        return tuple(
            None if x is None else x.to(device).repeat_interleave(num_images_per_prompt, dim=0)
            for x in tensors
        )

    def _encode_texts(self, texts: list[str], device: torch.device, length: int) -> tuple[Tensor, Tensor]:
        """Embeddings (len(texts), length, caption_channels) and their mask; equal texts are read once."""
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "without tokenizer and text_encoder, prompt_embeds must be given and, with guidance, "
                "negative_prompt_embeds too"
            )
        texts = [text.lower().strip() for text in texts]
        unique = list(dict.fromkeys(texts))
        for text in unique:
            if lost := lost_words(self.tokenizer, text, length):
                encoder = type(self.text_encoder).__name__
                logger.warning("%s is given %d tokens, and the text is cut before: %s", encoder, length, lost)
        tokens = self.tokenizer(
            unique, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(device)
        embeds = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        require_finite(
            embeds,
            "the text encoder",
            "run it in bfloat16 or float32, or load it with from_pretrained(..., dtype=torch.float16), which "
            "keeps T5's wo layers in float32, where .to(torch.float16) does not",
        )
        rows = [unique.index(text) for text in texts]
        return embeds[rows], mask[rows]

    def _captions(self, text: dict[str, Any]) -> dict[bool, TextContext]:
        """What the transformer is told of the text: by True at steps with guidance, negative half first, and
        by False at steps without; of the two those that there are."""
        guided = self.do_classifier_free_guidance
        kinds = {guided} if self.guidance_interval is None else {guided, False}
        return {
            kind: self._caption(text, ("negative_prompt", "prompt") if kind else ("prompt",))
            for kind in kinds
        }

    def _caption(self, text: dict[str, Any], halves: tuple[str, ...]) -> TextContext:
        embeds = torch.cat([text[f"{half}_embeds"] for half in halves])  # (B or 2B, T, caption_channels)
        mask = torch.cat([text[f"{half}_attention_mask"] for half in halves])
        return self.transformer.encode_text(
            embeds.to(self.transformer.dtype), mask, attention_kwargs=self.attention_kwargs
        )

    def _sizes(self, height: int, width: int, device: torch.device) -> dict[str, Tensor] | None:
        """What the transformer is told of the picture's size, for any batch; None if it takes nothing."""
        if not self.transformer.config.use_additional_conditions:
            return None
        return {
            "resolution": torch.tensor([(height, width)], dtype=torch.float32, device=device),
            # Width by height, as published. PixArt's is height by width.
            "aspect_ratio": torch.tensor([width / height], dtype=torch.float32, device=device),
        }
