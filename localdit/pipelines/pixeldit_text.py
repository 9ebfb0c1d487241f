"""PixelDiTTextPipeline: text to image and image to image with `PixelDiTTextTransformer2DModel`."""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers import DPMSolverMultistepScheduler, ImagePipelineOutput, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.pipelines.common import (
    ImageInput,
    changed_text,
    check_prompts,
    lost_words,
    require_finite,
    tensor_inputs,
)
from localdit.pipelines.pixeldit import PixelPipeline

logger = logging.getLogger(__name__)


@cache
def instruction() -> str:
    """What stands before every prompt, for the text encoder to think of a detailed picture.

    It is the "complex human instruction" of Sana (Xie et al. 2024, arXiv 2410.10629, section 2.3), as
    diffusers' `SanaPipeline` has it, but for the quotes in the first line, which PixelDiT was trained with.
    """
    from diffusers import SanaPipeline  # takes a while to import

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join([lines[0].replace("'Enhanced prompt'", '"Enhanced prompt"'), *lines[1:]])


def published_scheduler(shift: float = 4.0) -> DPMSolverMultistepScheduler:
    """What the published text model samples with: DPM-Solver++ 2M along the flow (Lu et al. 2022, arXiv
    2211.01095). shift: 4 for pictures of 1024 x 1024, 3 for 512 x 512."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )


class PixelDiTTextPipeline(PixelPipeline):
    """Text to image, and image to image where `image` is given.

    A component may be None in calls that do without it: tokenizer and text_encoder with embeddings in place
    of text, transformer and scheduler with `encode_prompt` alone.

    Args:
        transformer: `PixelDiTTextTransformer2DModel`, or one with its interface.
        scheduler: One of flow matching; `published_scheduler()`, as published.
        text_encoder: Its first output is the last hidden state, (B, T, caption_channels): `Gemma2Model`, of
            Gemma-2-2B-it as published. (With a language model head in front, the first output is another.)
        tokenizer: Gemma's, or one like it, which puts a token before every text and none after it.
    """

    flow_direction = "noise"
    model_cpu_offload_seq = "text_encoder->transformer"
    _optional_components: ClassVar = ["transformer", "scheduler", "text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: PixelDiTTextTransformer2DModel | None = None,
        scheduler: SchedulerMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        *,
        image: ImageInput | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.75,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sigmas: list[float] | None = None,
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
        max_sequence_length: int = 300,
        use_instruction: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make pictures.

        Args:
            prompt: What to show, or a list, for a picture of each. Stripped, not lower-cased.
            negative_prompt: What to steer away from: one text for all prompts, or one each. None is the empty
                text.
            image, strength, height, width, guidance_scale, guidance_interval, sigmas, generator, latents,
            output_type, return_dict, attention_kwargs, callback_on_step_end: As of `PixelDiTPipeline`, with
                prompts in place of labels.
            num_inference_steps: Steps of the scheduler; 25 are nearly as good.
            num_images_per_prompt: Pictures of each prompt.
            prompt_embeds: Text features in place of `prompt`, (prompts, T, caption_channels).
            negative_prompt_embeds: Likewise in place of `negative_prompt`, of the same shape.
            callback_on_step_end_tensor_inputs: Which tensors the callback gets: "latents", and the two of the
                text, each as the argument of that name is.
            max_sequence_length: Tokens that text is padded or cut to. Words that are cut off are logged. The
                padding is read like text, as in training: another length is another picture.
            use_instruction: Put `instruction()` before the prompt, not the negative one, as in training.

        Raises:
            ValueError: For arguments that fit neither the components nor each other, before the transformer
                is called.
            NonFiniteError: Where a model gives NaN or infinity.
        """
        # 1. Refuse what cannot work.
        self._begin_flow(guidance_scale, guidance_interval, attention_kwargs)
        callback_on_step_end_tensor_inputs = tensor_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        images, height, width = self._read_images(image, height, width)
        config = self.transformer.config
        prompts = check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            width=config.caption_channels,
            max_sequence_length=max_sequence_length,
            guided=self.do_classifier_free_guidance,
        )
        length = max_sequence_length if prompt_embeds is None else prompt_embeds.shape[1]
        if length > config.max_text_tokens:
            name = "max_sequence_length" if prompt_embeds is None else "prompt_embeds' length"
            raise ValueError(f"{name} must be at most {config.max_text_tokens}, got {length}")
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

        # 2. The text, and the pictures it makes.
        positive, negative = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=max_sequence_length,
            use_instruction=use_instruction,
        )
        pictures = self._sample(
            {"prompt_embeds": positive, "negative_prompt_embeds": negative},
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
        max_sequence_length: int = 300,
        use_instruction: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn text into what the transformer reads. The arguments are those of `__call__`.

        Returns:
            prompt_embeds (B, T, caption_channels) and negative_prompt_embeds, which `__call__` takes under
            these names; the second is None without guidance. The pictures of one prompt stand side by side.
        """
        device = self._execution_device if device is None else device
        if prompt_embeds is None:
            texts = prompt if isinstance(prompt, list) else [prompt or ""]
            prompt_embeds = self._encode_texts(texts, device, max_sequence_length, use_instruction)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None:
            texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            negative_prompt_embeds = self._encode_texts(texts, device, max_sequence_length, False)
            if len(texts) == 1:
                negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def _encode_texts(
        self, texts: list[str], device: torch.device, length: int, use_instruction: bool
    ) -> Tensor:
        """Embeddings (len(texts), length, caption_channels): of the token before the text and of the last
        length - 1 places, padding included. Equal texts are read once."""
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "without tokenizer and text_encoder, prompt_embeds must be given and, with guidance, "
                "negative_prompt_embeds too"
            )
        texts = [text.strip() for text in texts]
        unique = list(dict.fromkeys(texts))
        before = instruction() if use_instruction else ""
        # The instruction's last token and the prompt's first place are both counted, as in training.
        whole = len(self.tokenizer.encode(before)) + length - 2 if use_instruction else length
        for text in unique:
            if lost := lost_words(self.tokenizer, text, length - 1 if use_instruction else length):
                encoder = type(self.text_encoder).__name__
                logger.warning("%s is given %d tokens, and the text is cut before: %s", encoder, length, lost)
        tokens = self.tokenizer(
            [before + text for text in unique],
            padding="max_length",
            max_length=whole,
            truncation=True,
            padding_side="right",
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device)
        embeds = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        require_finite(embeds, "the text encoder", "run it in bfloat16 or float32")
        kept = [0, *range(whole - length + 1, whole)]
        return embeds[[unique.index(text) for text in texts]][:, kept]

    def _velocity(self, x: Tensor, sigma: float, conditions: Mapping[str, Any], guided: bool) -> Tensor:
        text = conditions["prompt_embeds"]
        if guided:
            x, text = torch.cat((x, x)), torch.cat((conditions["negative_prompt_embeds"], text))
        return self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            timestep=torch.full((len(x),), 1000 * sigma, device=x.device),
            encoder_hidden_states=text.to(self.transformer.dtype),
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )[0].float()

    def _changed(
        self, conditions: dict[str, Any], changed: Mapping[str, Any], was_guided: bool
    ) -> dict[str, Any]:
        return changed_text(conditions, changed, was_guided, self.do_classifier_free_guidance)
