"""Pictures made to be measured: by one rule for every evaluation, kept as files, gone on with after a kill.

Picture i has the seed SEED + i and a generator of its own on the CPU, as with `localdit generate`. The files
carry their settings and a fingerprint of the weights; one that is there already only counts if both are what
it would be made with now.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from PIL import Image
from torch import nn
from tqdm import tqdm

from localdit.evaluation.folders import is_picture
from localdit.pictures import KEY, Settings, call_options, read_settings, write_png


def draw(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Image.Image]:
    """One batch of pictures, of prompts or names of labels. Each is the one that is made alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pictures: list[Image.Image] = pipeline(list(prompts), generator=generators, **options).images
    return pictures


def generate(
    pipeline: Any,
    wanted: Mapping[Path, Settings],
    made_with: Mapping[str, str],
    *,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make the pictures that are wanted and not there yet.

    Args:
        pipeline: Takes prompts, or labels by name, and generators, and what `call_options` gives.
        wanted: The settings of each file. They differ in prompt or label and seed alone.
        made_with: What else the files tell: `scheduler`, `weights` (see `fingerprint`), versions.
        batch_size: Pictures at a time. What a picture shows does not depend on it.
        rank: The number of this process, which makes the pictures rank, rank + world, ...
        world: How many processes there are.
    """
    share = list(wanted)[rank::world]
    missing = [path for path in share if not path.exists()]
    pipeline.set_progress_bar_config(disable=True)
    # Disabled by None, the bar is there on a terminal alone.
    bar = tqdm(
        total=len(share),
        initial=len(share) - len(missing),
        desc="pictures" if world == 1 else f"pictures of process {rank}",
        unit="picture",
        disable=rank > 0 or None,
    )
    with bar:
        for start in range(0, len(missing), batch_size):
            paths = missing[start : start + batch_size]
            batch = [wanted[path] for path in paths]
            shown = [s.prompt if s.label is None else s.label for s in batch]
            pictures = draw(pipeline, shown, [s.seed for s in batch], **call_options(batch[0]))
            for path, settings, picture in zip(paths, batch, pictures):
                write_png(picture, path, settings, dict(made_with))
            bar.update(len(paths))


def check_kept(folder: Path, wanted: Mapping[Path, Settings], weights: str) -> int:
    """Count the wanted pictures that `folder` holds already.

    Args:
        folder: Where the pictures are, and below.
        wanted: The settings that each of them has to have.
        weights: The `fingerprint` of the pipeline that makes them.

    Raises:
        ValueError: A picture in it is not among the wanted, or was made with other settings or weights.
    """
    kept = sorted(path for path in folder.rglob("*") if is_picture(path))
    for path in kept:
        if path not in wanted:
            raise ValueError(f"{path} is not of this evaluation: choose another folder for this one")
        found = read_settings(str(path))
        for field in fields(Settings):
            made, now = getattr(found, field.name), getattr(wanted[path], field.name)
            if made != now:
                raise ValueError(
                    f"{path} was made with {field.name} {made!r}, and this evaluation has {now!r}: choose "
                    "another folder for this evaluation"
                )
        if _weights(path) != weights:
            raise ValueError(
                f"{path} was made when {found.model} had other weights or another configuration: choose "
                "another folder for this evaluation"
            )
    return len(kept)


def _weights(path: Path) -> str | None:
    """The fingerprint in a picture whose settings were read before."""
    with Image.open(path, formats=("PNG",)) as picture:
        made_with = json.loads(picture.info[KEY])["made_with"]
    return made_with.get("weights") if isinstance(made_with, dict) else None


def fingerprint(pipeline: Any) -> str:
    """SHA-256 over the weights of a pipeline and the configs of its parts. The device does not matter."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, ConfigMixin):
            public = {key: value for key, value in part.config.items() if not key.startswith("_")}
            digest.update(f"{name} {sorted(public.items())}".encode())
        if isinstance(part, nn.Module):
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
