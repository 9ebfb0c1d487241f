"""The denoising objective: a text-to-image transformer learns the noise in latents of captioned pictures.

Latents and text features are made once, ahead of training, and kept in a file beside the run. The text
features come from the pipeline's own `encode_prompt`, so that training and sampling cannot disagree.
"""

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_density_for_timestep_sampling
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

from localdit.data.scenes import captions, render, scene
from localdit.pipelines.local_dit import LocalDiTPipeline
from localdit.training.autoencoder import to_tensor
from localdit.training.layout import LayoutHead, layout_of
from localdit.training.text_encoder import as_users_write

# B batch   C latent channels   h w latent   T text tokens   K channels of the text features

# The fields that the training set depends on.
_MAKES_THE_SET = (
    "scenes",
    "captions_per_scene",
    "free_wording_rate",
    "seed",
    "picture_size",
    "max_sequence_length",
)


@dataclass
class Denoising:
    """Denoising of the synthetic scenes' latents, by the noise or the velocity in them."""

    vae: str  # folder or hub name of an AutoencoderKL
    text_encoder: str  # folder or hub name of a T5 encoder
    tokenizer: str  # of its tokenizer
    scheduler: dict[str, Any]  # what the finished pipeline samples with; its schedule is trained on
    scenes: int = 50_000  # pictures in the training set
    captions_per_scene: int = 2  # wordings kept for each, drawn at random
    free_wording_rate: float = 0.2  # share of captions as users might write them
    seed: int = 0  # of the scenes and wordings
    picture_size: int = 128  # pixels
    max_sequence_length: int = 120  # tokens that a caption may have
    caption_dropout: float = 0.1  # share of captions replaced by the empty one
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = field(
        default=0.0, metadata={"signed": True}
    )  # of logit_normal: below 0 for less noise
    logit_std: float = 1.0  # of logit_normal
    layout_weight: float = 0.0  # of the side task in `localdit.training.layout`
    layout_block: int = 3  # the block that the side task reads
    preview_prompts: tuple[str, ...] = ("a red circle left of a blue square", "a green star")
    preview_guidance_scale: float = 4.0

    def prepare(self, model: Any, folder: Path, device: torch.device) -> "EncodedScenes":
        """Load the frozen parts; make the training set in `folder` unless one made from the same is there."""
        self.pipeline = LocalDiTPipeline(
            tokenizer=AutoTokenizer.from_pretrained(self.tokenizer),
            text_encoder=T5EncoderModel.from_pretrained(self.text_encoder, dtype=torch.float32).to(device),
            vae=AutoencoderKL.from_pretrained(self.vae).to(device),
            transformer=None,
            scheduler=getattr(diffusers, self.scheduler["_class_name"]).from_config(self.scheduler),
        )
        if self.pipeline.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                "objective.scheduler.prediction_type must be epsilon or v_prediction, "
                f"got {self.pipeline.scheduler.config.prediction_type!r}"
            )
        self.noise_schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        path, identity = folder / "encoded_scenes.safetensors", self._identity()
        if not (path.exists() and safe_open(path, "pt").metadata().get("identity") == identity):
            staged = path.with_suffix(f".tmp-{os.getpid()}")
            save_file(self._encode(), staged, metadata={"identity": identity})
            staged.replace(path)
        layouts = None
        if self.layout_weight:
            blocks = model.transformer_blocks
            if self.layout_block >= len(blocks):
                raise ValueError(
                    f"objective.layout_block must be below {len(blocks)}, got {self.layout_block}"
                )
            dim = model.config.num_attention_heads * model.config.attention_head_dim
            model.layout_head = self.layout_head = LayoutHead(dim, blocks[self.layout_block])
            grid = model.config.sample_size // model.config.patch_size
            drawn = (layout_of(scene(i, seed=self.seed), grid) for i in range(self.scenes))
            layouts = [torch.stack(part) for part in zip(*drawn)]
        data = EncodedScenes(load_file(path), layouts)
        self.empty_text = data.empty_text.to(device)
        return data

    def loss(
        self,
        model: nn.Module,
        moments: Tensor,
        text: Tensor,
        text_mask: Tensor,
        labels: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error at random timesteps, plus the side task's.

        The target is the noise (Ho et al. 2020, eq. 14), or the velocity (Salimans & Ho 2022, appendix D)
        where the scheduler's `prediction_type` is "v_prediction".

        Args:
            model: A LocalDiT transformer.
            moments: Mean and log-variance of the autoencoder's posterior, (B, 2C, h, w).
            text: Text features, (B, T, K).
            text_mask: (B, T), True = keep.
            labels, places: What `layout_of` gives, batched, where there is a side task.

        Returns a scalar, float32.
        """
        latents = scale_latents(DiagonalGaussianDistribution(moments).sample(), self.pipeline.vae)
        dropped = torch.rand(len(text), device=text.device) < self.caption_dropout  # (B,)
        text, text_mask = text.clone(), text_mask.clone()
        text[dropped, : len(self.empty_text)] = self.empty_text.to(text.dtype)
        text_mask[dropped] = torch.arange(text.shape[1], device=text.device) < len(self.empty_text)

        noise = torch.randn_like(latents)
        steps = self.noise_schedule.config.num_train_timesteps
        density = compute_density_for_timestep_sampling(  # uniform, unless a weighting is named
            self.timestep_sampling, len(latents), self.logit_mean, self.logit_std, device=latents.device
        )
        timestep = (density * steps).long().clamp(max=steps - 1)  # (B,)
        noisy = self.noise_schedule.add_noise(latents, noise, timestep)
        predicted = model(noisy, text, timestep, text_mask, return_dict=False)[0]
        target = noise
        if self.noise_schedule.config.prediction_type == "v_prediction":
            target = self.noise_schedule.get_velocity(latents, noise, timestep)
        loss = F.mse_loss(predicted.float(), target.float())
        if labels is None:
            return loss
        assert places is not None
        return loss + self.layout_weight * self.layout_head.loss(labels, places)

    def assemble(self, model: Any) -> LocalDiTPipeline:
        """The pipeline around a transformer."""
        return LocalDiTPipeline(**{**self.pipeline.components, "transformer": model})

    def preview(self, model: nn.Module) -> Image.Image:
        """Fixed prompts and seeds, as one picture: a row for each prompt."""
        pipeline = self.assemble(model)
        pipeline.set_progress_bar_config(disable=True)
        rows = len(self.preview_prompts)
        (images,) = pipeline(
            list(self.preview_prompts),
            num_images_per_prompt=4,
            guidance_scale=self.preview_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _ in range(rows) for seed in range(4)],
            return_dict=False,
        )
        return make_image_grid(images, rows=rows, cols=4)

    def export(self, model: Any, folder: Path) -> None:
        """Write the finished pipeline."""
        head = model.__dict__["_modules"].pop("layout_head", None)
        try:
            self.assemble(model).save_pretrained(folder)
        finally:
            if head is not None:
                model.layout_head = head

    def _identity(self) -> str:
        """What the training set depends on: the encoders' weights and the choice of scenes and wordings."""
        digest = hashlib.sha256()
        for part in (self.pipeline.vae, self.pipeline.text_encoder):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        choice = {name: getattr(self, name) for name in _MAKES_THE_SET}
        digest.update(json.dumps([choice, self.pipeline.tokenizer.get_vocab()], sort_keys=True).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def _encode(self) -> dict[str, Tensor]:
        moments, text, lengths, device = [], [], [], self.pipeline.vae.device
        progress = tqdm(total=self.scenes, desc="encoding scenes", unit="scene")
        for indices in _batched(range(self.scenes), 64):
            drawn = [scene(i, seed=self.seed) for i in indices]
            images = torch.stack([to_tensor(render(s, self.picture_size)) for s in drawn]).to(
                device
            )  # (B, 3, H, W)
            moments.append(self.pipeline.vae.encode(images).latent_dist.parameters.half().cpu())
            wordings = []
            for i, s in zip(indices, drawn):
                choose = random.Random(f"{self.seed}/{i}/wording")
                for caption in choose.choices(captions(s), k=self.captions_per_scene):
                    freely = choose.random() < self.free_wording_rate
                    sizes = [caption.names_size] * len(s.objects)
                    wordings.append(
                        as_users_write(caption.text, s, sizes, choose)[0] if freely else caption.text
                    )
            for features in self._encode_text(wordings):
                text.append(features)
                lengths.append(len(features))
            progress.update(len(indices))
        return {
            "moments": torch.cat(moments),  # (scenes, 2C, h, w)
            "text": torch.cat(text),  # the kept tokens of all captions, one after the other
            "lengths": torch.tensor(lengths),
            "empty_text": next(self._encode_text([""])),
        }

    def _encode_text(self, texts: list[str]) -> Iterator[Tensor]:
        """The features of each text's own tokens, (length, K)."""
        encoded: tuple[Any, ...] = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        embeds, mask, *_ = encoded
        for features, keep in zip(embeds, mask.bool()):
            yield features[keep].half().cpu()


class EncodedScenes(Dataset[dict[str, Tensor]]):
    """Latents and text features of captioned scenes: every wording of every scene is an item."""

    def __init__(self, tensors: dict[str, Tensor], layouts: list[Tensor] | None = None):
        self.moments, self.text, self.empty_text = (
            tensors["moments"],
            tensors["text"],
            tensors["empty_text"].float(),
        )
        self.ends = tensors["lengths"].cumsum(0)
        self.lengths = tensors["lengths"]
        self.length = int(self.lengths.max())
        self.layouts = layouts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """moments (2C, h, w), text (T, K), text_mask (T,), the text padded to the longest of the set."""
        end, length = int(self.ends[index]), int(self.lengths[index])
        text = self.text.new_zeros(self.length, self.text.shape[1], dtype=torch.float32)
        text[:length] = self.text[end - length : end]
        picture = index * len(self.moments) // len(self)
        item = {
            "moments": self.moments[picture].float(),
            "text": text,
            "text_mask": torch.arange(self.length) < length,
        }
        if self.layouts is not None:
            item["labels"], item["places"] = (part[picture] for part in self.layouts)
        return item


def scale_latents(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Latents as the autoencoder gives them, to the unit scale that the transformer works in."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def _batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
