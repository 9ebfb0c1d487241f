"""The denoising objective: a text-to-image transformer learns the noise in latents of captioned pictures.

The latents and text features are encoded ahead of training into a cache (`localdit.training.encode`), or as
training goes. Text features come from the pipeline's own `encode_prompt` either way, so that training and
sampling cannot disagree.
"""

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, T5EncoderModel

from localdit.data.cache import open_cache
from localdit.data.pixels import Pixels
from localdit.data.samples import Samples, split
from localdit.pipelines.local_dit import LocalDiTPipeline
from localdit.training.encode import (
    EncodeConfig,
    encode,
    find_encoder,
    identities,
    load_encoder,
    open_config_source,
)
from localdit.training.layout import LayoutHead, WithLayouts
from localdit.training.order import Draws
from localdit.training.stopping import StopRequest

# B batch   C latent channels   h w latent   T text tokens   K channels of the text features

_VALIDATION_SEED = 1


@dataclass
class Denoising:
    """Denoising of the latents of captioned pictures, by the noise or the velocity in them."""

    # The pictures, the encoders and the cache; see `localdit.training.encode.EncodeConfig`.
    data: EncodeConfig = field(metadata={"nested": EncodeConfig})
    scheduler: dict[str, Any]  # what the finished pipeline samples with; its schedule is trained on
    on_the_fly: bool = False  # encode each batch anew, without a cache
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = field(default=0.0, metadata={"signed": True})  # of logit_normal; < 0 for less noise
    logit_std: float = 1.0  # of logit_normal
    timestep_shift: float = 1.0  # above 1 for more noise, as larger pictures want (Esser et al. 2024, eq. 23)
    min_snr_gamma: float | None = None  # bound of the signal-to-noise weighting; None: all timesteps alike
    layout_weight: float = 0.0  # of the side task in `localdit.training.layout`, for scenes
    layout_block: int = 3  # the block that the side task reads
    validation_samples: int = 0  # kept out of training and measured every train.validate_every steps
    preview_prompts: tuple[str, ...] = ("a red circle left of a blue square", "a green star")
    preview_guidance_scale: float = 4.0
    preview_steps: int = 20
    export_encoders: bool = True  # write the frozen parts into the finished pipeline too

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        """Load the frozen parts and the training set, which is encoded first where it is not yet."""
        scheduler = getattr(diffusers, self.scheduler["_class_name"]).from_config(self.scheduler)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                "objective.scheduler.prediction_type must be epsilon or v_prediction, "
                f"got {scheduler.config.prediction_type!r}"
            )
        self.noise_schedule = DDPMScheduler.from_config(scheduler.config)
        samples: Samples
        if self.on_the_fly:
            with accelerator.main_process_first():
                source = open_config_source(self.data, progress=accelerator.is_main_process)
            samples = Pixels(source, self.data.resolution, self.data.flips, self.data.seed)
        else:
            encode(self.data, accelerator, stop)
            expected = {part: encoder["sha256"] for part, encoder in identities(self.data).items()}
            samples = open_cache(self.data.cache, expected=expected, seed=self.data.seed)
        if self.layout_weight:
            samples = self._add_layouts(model, samples)

        self.pipeline = LocalDiTPipeline(
            tokenizer=AutoTokenizer.from_pretrained(find_encoder(self.data.tokenizer, "tokenizer")),
            text_encoder=self._text_encoder().to(accelerator.device),
            vae=load_encoder(AutoencoderKL, self.data.vae, "vae", self.data.vae_dtype).to(accelerator.device),
            scheduler=scheduler,
        )
        self.empty_text, _ = self._encode_text([""])
        self.preview_text = self.pipeline.encode_prompt(
            list(self.preview_prompts), max_sequence_length=self.data.max_sequence_length
        )
        if not self.on_the_fly:  # it may be larger than all else, and its work is done
            self.pipeline.text_encoder = None
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
        rest, self.kept_apart = split(samples, self.validation_samples)
        return rest

    def loss(
        self,
        model: nn.Module,
        draws: Draws,
        *,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        **sample: Any,
    ) -> Tensor:
        """Mean squared error at random timesteps, plus the side task's.

        The target is the noise (Ho et al. 2020, eq. 14), or the velocity (Salimans & Ho 2022, appendix D)
        where the scheduler's `prediction_type` is "v_prediction".

        Args:
            model: A LocalDiT transformer.
            draws: Noise, timesteps and which captions are dropped.
            labels, places: What `layout_of` gives, batched, where there is a side task.
            sample: What a `Cache` or `Pixels` gives, batched.

        Returns a scalar, float32.
        """
        moments, text, text_mask = self.encoded(**sample)
        posterior = DiagonalGaussianDistribution(moments)
        shape = posterior.mean.shape[1:]
        latents = scale_latents(posterior.mean + posterior.std * draws.normal(*shape), self.pipeline.vae)
        dropped = draws.uniform() < self.caption_dropout  # (B,)
        text, text_mask = text.clone(), text_mask.clone()
        length = self.empty_text.shape[1]
        text[dropped, :length] = self.empty_text.to(text.dtype)
        text_mask[dropped] = torch.arange(text.shape[1], device=text.device) < length

        timestep, noise = self.timesteps(draws), draws.normal(*shape)
        noisy = self.noise_schedule.add_noise(latents, noise, timestep)
        predicted = model(noisy, text, timestep, text_mask, return_dict=False)[0]
        error = (
            (predicted.float() - self.target(latents, noise, timestep)).square().flatten(1).mean(1)
        )  # (B,)
        if self.min_snr_gamma is not None:
            error = error * self.min_snr_weight(timestep)
        loss = error.mean()
        if labels is None or places is None:
            return loss
        return loss + self.layout_weight * self.layout_head.loss(labels, places)

    @torch.no_grad()
    def encoded(
        self,
        moments: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        pixels: Tensor | None = None,
        caption: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moments (B, 2C, h, w), text (B, T, K) and its mask (B, T): those of the cache, or made now."""
        if pixels is None or caption is None:
            assert moments is not None
            assert text is not None
            assert text_mask is not None
            return moments, text, text_mask
        vae = self.pipeline.vae
        images = (pixels / 127.5 - 1).to(vae.dtype)
        return vae.encode(images).latent_dist.parameters.float(), *self._encode_text(caption)

    def timesteps(self, draws: Draws) -> Tensor:
        """The timesteps of a batch, (B,), by `timestep_sampling`."""
        if self.timestep_sampling == "logit_normal":  # Esser et al. 2024, section 3.1
            time = torch.sigmoid(self.logit_mean + self.logit_std * draws.normal())
        else:
            time = draws.uniform()
        time = self.timestep_shift * time / (1 + (self.timestep_shift - 1) * time)
        steps = self.noise_schedule.config.num_train_timesteps
        return (time * steps).long().clamp(max=steps - 1)

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the model has to say, in float32, of the shape of the latents."""
        if self.noise_schedule.config.prediction_type == "v_prediction":
            return self.noise_schedule.get_velocity(latents, noise, timestep).float()
        return noise.float()

    def min_snr_weight(self, timestep: Tensor) -> Tensor:
        """Weights (B,) of the squared errors, which bound how much a timestep counts in terms of the clean
        picture (Hang et al. 2023, section 3.4)."""
        snr = compute_snr(self.noise_schedule, timestep)
        per_velocity = self.noise_schedule.config.prediction_type == "v_prediction"
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1 if per_velocity else snr)

    @torch.no_grad()
    def validate(self, model: Any, accelerator: Accelerator, stop: StopRequest) -> dict[str, float]:
        """Mean squared errors in ten ranges of timesteps, on samples kept out of training, and their mean.

        A sample's noise and timesteps are the same each time, so that curves can be compared.
        """
        steps = self.noise_schedule.config.num_train_timesteps
        edges = torch.arange(11) * steps // 10
        timestep = ((edges[:-1] + edges[1:]) // 2).to(accelerator.device)  # the middle of each range
        errors = torch.zeros(11, device=accelerator.device)  # the sum for each range, and the count
        for number in range(accelerator.process_index, len(self.kept_apart), accelerator.num_processes):
            if stop:
                break
            sample = self.kept_apart[number, number]
            same = self.kept_apart.collate([dict(sample) for _ in timestep])
            same = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in same.items()}
            moments, text, mask = self.encoded(**{k: same[k] for k in same.keys() - {"labels", "places"}})
            latents = scale_latents(DiagonalGaussianDistribution(moments).mean, self.pipeline.vae)
            draws = Draws(_VALIDATION_SEED, range(10 * number, 10 * number + 10), accelerator.device)
            noise = draws.normal(*latents.shape[1:])
            noisy = self.noise_schedule.add_noise(latents, noise, timestep)
            predicted = model(noisy, text, timestep, mask, return_dict=False)[0]
            errors[:10] += (predicted - self.target(latents, noise, timestep)).square().flatten(1).mean(1)
            errors[10] += 1
        errors = accelerator.reduce(errors, "sum")
        if stop or not errors[10]:
            return {}
        means = (errors[:10] / errors[10]).tolist()
        ranges = zip(edges[:-1].tolist(), edges[1:].tolist())
        return {
            "validation_loss": sum(means) / 10,
            **{f"validation_loss/{low}-{high - 1}": mean for (low, high), mean in zip(ranges, means)},
        }

    def assemble(self, model: Any, **parts: Any) -> LocalDiTPipeline:
        """The pipeline around a transformer, with other parts where they are given."""
        return LocalDiTPipeline(**{**self.pipeline.components, "transformer": model, **parts})

    def preview(self, model: Any, stop: StopRequest) -> Image.Image | None:
        """Fixed prompts and seeds, as one picture: a row for each prompt."""
        pipeline = self.assemble(model)

        def ask(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = bool(stop)
            return tensors

        pipeline.set_progress_bar_config(disable=True)
        rows = len(self.preview_prompts)
        embeds, mask, negative_embeds, negative_mask = self.preview_text
        (images,) = pipeline(
            prompt_embeds=embeds,
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative_embeds,
            negative_prompt_attention_mask=negative_mask,
            num_images_per_prompt=4,
            num_inference_steps=self.preview_steps,
            guidance_scale=self.preview_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _ in range(rows) for seed in range(4)],
            callback_on_step_end=ask,
            return_dict=False,
        )
        return None if stop else make_image_grid(images, rows=rows, cols=4)

    def export(self, model: Any, folder: Path) -> None:
        """Write the finished pipeline; of a trained LoRA, the LoRA alone, with its rank and alpha."""
        if getattr(model, "peft_config", None):
            from peft.utils import get_peft_model_state_dict

            LocalDiTPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(model),
                transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
            )
            return
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "vae": None}
        if self.export_encoders:
            parts = {"text_encoder": self._text_encoder()}
        self.assemble(model, **parts).save_pretrained(folder)

    def _text_encoder(self) -> Any:
        return load_encoder(
            T5EncoderModel, self.data.text_encoder, "text_encoder", self.data.text_encoder_dtype
        )

    @torch.no_grad()
    def _encode_text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features (B, T, K) of texts, padded to the longest, and which are kept (B, T)."""
        encoded: tuple[Any, ...] = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.data.max_sequence_length
        )
        embeds, mask = encoded[0].float(), encoded[1].bool()
        longest = int(mask.sum(1).max())
        return embeds[:, :longest], mask[:, :longest]

    def _add_layouts(self, model: Any, samples: Samples) -> Samples:
        """Put the head of the side task into the model, and its targets into the samples."""
        blocks = model.transformer_blocks
        if self.layout_block >= len(blocks):
            raise ValueError(f"objective.layout_block must be below {len(blocks)}, got {self.layout_block}")
        source = self.data.source
        seed = source.get("seed", 0) if isinstance(source, dict) else 0
        layouts = WithLayouts(samples, seed, model.config.sample_size // model.config.patch_size)
        dim = model.config.num_attention_heads * model.config.attention_head_dim
        model.layout_head = self.layout_head = LayoutHead(dim, blocks[self.layout_block])
        return layouts


def scale_latents(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Latents as the autoencoder gives them, to the unit scale that the transformer works in."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
