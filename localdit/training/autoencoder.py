"""The autoencoder's objective: faithful pictures, sharp edges, latents that a diffusion model can learn."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn

from localdit.data.samples import Samples
from localdit.data.scenes import render, scene
from localdit.training.order import Draws


def autoencoder_loss(
    model: AutoencoderKL, images: Tensor, noise: Tensor, *, kl_weight: float, edge_weight: float
) -> Tensor:
    """The loss of a variational autoencoder (Kingma & Welling 2014, eq. 7), with absolute and edge errors.

    Every term is a mean over elements, so the weights hold at any size. The pictures are decoded from sampled
    latents: `kl_weight` sets how much noise the encoder adds to them, hence how smooth the latent space is.

    Args:
        images: Pictures in [-1, 1], (B, 3, H, W).
        noise: What latents are sampled with, standard normal, (B, C, h, w).
        kl_weight: Weight of the posterior's divergence from the standard normal, in nats per latent number.
        edge_weight: Weight of `edge_error`; without it the absolute error leaves edges blurred.

    Returns a scalar, float32.
    """
    posterior = model.encode(images).latent_dist
    latents = posterior.mean + posterior.std * noise
    decoded, images = model.decode(latents).sample.float(), images.float()
    divergence = posterior.kl().float().sum() / posterior.mean.numel()
    return F.l1_loss(decoded, images) + edge_weight * edge_error(decoded, images) + kl_weight * divergence


def edge_error(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours, at full, half and quarter size.

    decoded, images: (B, C, H, W), sides at least 8. Returns a scalar.
    """
    error = decoded - images  # differences are linear: those of the error are the errors of the differences
    total = error.new_zeros(())
    for _ in range(3):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / 6


@dataclass
class Autoencoding:
    """The objective: an `AutoencoderKL` of the synthetic scenes, trained on crops around their objects."""

    scenes: int = 50_000  # pictures in the training set, a crop of each
    seed: int = 0  # of the scenes and crops
    picture_size: int = 128  # pixels
    crop_size: int = 64  # pixels
    kl_weight: float = 1e-3
    edge_weight: float = 1.0

    def prepare(self, model: Any, folder: Path, accelerator: Any, stop: Any) -> "SceneCrops":
        """Begin close to a linear map with little noise: from there the colours are learned sooner."""
        for name, parameter in model.named_parameters():
            if "resnets" in name and ".conv2." in name:
                nn.init.zeros_(parameter)
        log_variances = model.quant_conv.bias.data.chunk(2)[1]
        log_variances -= 4
        return SceneCrops(self.scenes, self.seed, self.picture_size, self.crop_size)

    def loss(self, model: AutoencoderKL, draws: Draws, images: Tensor) -> Tensor:
        """`autoencoder_loss`."""
        channels, factor = model.config.latent_channels, 2 ** (len(model.config.block_out_channels) - 1)
        noise = draws.normal(channels, images.shape[-2] // factor, images.shape[-1] // factor)
        return autoencoder_loss(model, images, noise, kl_weight=self.kl_weight, edge_weight=self.edge_weight)

    def validate(self, model: AutoencoderKL, accelerator: Any, stop: Any) -> dict[str, float]:
        """Nothing is measured."""
        return {}

    def report(self, model: Any) -> dict[str, float]:
        """Nothing more than the loss."""
        return {}

    @torch.no_grad()
    def preview(self, model: AutoencoderKL, stop: Any) -> Image.Image:
        """Six scenes that training never shows, and below each what is left of it."""
        pictures = [render(scene(i, seed=self.seed, held_out=True), self.picture_size) for i in range(6)]
        images = torch.stack([to_tensor(picture) for picture in pictures]).to(model.device)
        decoded = model.decode(model.encode(images).latent_dist.sample()).sample
        decoded = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return make_image_grid(pictures + [Image.fromarray(d) for d in decoded], rows=2, cols=6)

    @torch.no_grad()
    def export(self, model: AutoencoderKL, folder: Path) -> None:
        """Write the autoencoder, with the scale and shift that give its latents mean 0 and variance 1."""
        pictures = (render(scene(i, seed=self.seed), self.picture_size) for i in range(512))
        latents = torch.cat(
            [model.encode(to_tensor(p)[None].to(model.device)).latent_dist.sample() for p in pictures]
        )
        model.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        model.save_pretrained(folder)


class SceneCrops(Samples):
    """A square crop of each scene, around one of its objects. Item i depends on the arguments and i alone."""

    def __init__(self, size: int, seed: int, picture_size: int, crop_size: int):
        self.size, self.seed, self.picture_size, self.crop_size = size, seed, picture_size, crop_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """images (3, crop, crop) in [-1, 1]."""
        index, _ = key
        described, rng = scene(index, seed=self.seed), random.Random(f"crop/{self.seed}/{index}")
        chosen, room = rng.choice(described.objects), self.picture_size - self.crop_size

        def corner(centre: float) -> int:
            wanted = centre * self.picture_size + self.crop_size * (rng.uniform(-0.375, 0.375) - 0.5)
            return round(min(max(wanted, 0), room))

        left, top = corner(chosen.x), corner(chosen.y)
        picture = render(described, self.picture_size)
        return {"images": to_tensor(picture.crop((left, top, left + self.crop_size, top + self.crop_size)))}


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
