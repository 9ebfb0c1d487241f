"""Masks: which part of a picture is painted anew, and which is kept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from localdit.pipelines.common import ImageInput, is_picture, read_images


def read_masks(mask: ImageInput) -> list[Tensor]:
    """Masks, (1, H, W) bool each, of pictures of any kind that `read_images` takes: True where they are at
    least half white."""
    return [x.mean(dim=0, keepdim=True) >= 0.5 for x in read_images(mask, latent_channels=1, name="mask")]


def check_masks(
    masks: list[Tensor], images: list[Tensor], prompts: int, halo: int | None, height: int, width: int
) -> None:
    """Raise ValueError unless masks from `read_masks` fit so many prompts and the images of `read_images`.

    Args:
        masks: None of them is empty.
        images: Pictures, or latents of height x width pixels.
        prompts: There is one mask, or one for each.
        halo: Windows around them, for which there must be masks, or None.
        height, width: In pixels.
    """
    if not masks:
        if halo is not None:
            raise ValueError(f"mask_halo must be None without a mask, got {halo}")
        return
    if not images:
        raise ValueError("mask must come with image, the picture that it is for")
    if len(masks) not in (1, prompts):
        raise ValueError(f"mask must be one or {prompts}, one for each prompt, got {len(masks)}")
    sizes = [tuple(x.shape[1:]) for x in images] if is_picture(images[0]) else [(height, width)]
    for i in range(max(len(masks), len(sizes))):
        size, of_mask = sizes[i % len(sizes)], tuple(masks[i % len(masks)].shape[1:])
        if of_mask != size:
            raise ValueError(f"mask must have the image's height and width, {size}, got {of_mask}")
    for x in masks:
        if not x.any():
            raise ValueError("mask must have a white pixel, half of white at least, got none")
    if halo is not None and (type(halo) is not int or halo < 0):
        raise ValueError(f"mask_halo must be a number of windows from 0, or None, got {halo!r}")


def resize_masks(masks: list[Tensor], height: int, width: int) -> Tensor:
    """Masks (1, H, W) stretched to (N, 1, height, width), bool: True wherever there is anything to paint."""
    return torch.stack([F.adaptive_max_pool2d(x.float(), (height, width)) > 0 for x in masks])
