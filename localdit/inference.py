"""The published repository's three names, on top of the pipeline: `Config`, `load_model` and `inference`.

A script written for that repository runs when it imports them from here:

    from localdit.inference import Config, inference, load_model

    config = Config(ckpt_path="LocalDiT-1024.safetensors")
    pipe = load_model(config)
    images = inference(pipe, ["a lighthouse at dusk"], ["blurry"], config)

So does one that brings its own `Config`: fields that it lacks have the values given here, and those that only
training reads are of no account. What a script does inside the published attention processors is not carried
over, nor needed. New scripts do better with `LocalDiTPipeline` itself.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from localdit.assets import MINI
from localdit.conversion import TEXT_ENCODER, VAE, load_parts
from localdit.models.single_file import PICKLE_SUFFIXES
from localdit.pipelines.local_dit import LocalDiTPipeline

PUBLISHED_SIZE = 768, 1024  # height and width in pixels


class Config:
    """What to load and how to draw, under the published names where there are such.

    Values come from a subclass's attributes, from keywords, or are set later; fields have no annotation, as
    published, so a subclass may or may not be a dataclass. Keywords that name no field raise ValueError.
    """

    # What to load.
    ckpt_path = (
        None  # published checkpoint, or a pipeline's folder or hub name. None: the embedded small model
    )
    device = None  # None: a GPU if there is one, else the CPU
    dtype = None  # "float32", "bfloat16", "float16" or torch's own. None: float32 on the CPU, else bfloat16

    # What a published checkpoint does not say, or lacks.
    window_size = None  # in tokens. None: what its tensors or its header tell, else 4
    do_rope = None  # None: what its header tells, else True
    eps = None  # of the norms of queries and keys. None: what its header tells, else 1e-10
    global_context = "auto"  # or "fold", "random", "none": LocalDiTTransformer2DModel.from_single_file
    global_context_seed = None  # of "random"
    vae = VAE
    text_encoder = TEXT_ENCODER
    tokenizer = None  # None: the text encoder's
    scheduler = None  # None: the published one

    # How to draw.
    height = None  # in pixels. None: 768 from a published checkpoint, else what the pipeline was made for
    width = None  # likewise; 1024 from a published checkpoint
    denoising_steps = 20
    denoising_strength = 0.8  # how far to leave `image`: 0 keeps it, 1 takes its size alone
    guidance_scale = 7.0
    max_length = 120  # tokens of a prompt
    seed = None  # picture i is drawn from seed + i. None: other pictures each time, as published
    batch_size = 1  # for scripts that repeat their prompts by it

    def __init__(self, **values: Any):
        fields = {name for name in dir(type(self)) if not name.startswith("_")}
        if unknown := sorted(values.keys() - fields):
            raise ValueError(
                f"Config must be given its own fields, got {unknown}; there are {sorted(fields)}"
            )
        for name, value in values.items():
            setattr(self, name, value)


def load_model(
    config: Any, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> LocalDiTPipeline:
    """The pipeline that a config asks for, on its device.

    Args:
        config: A `Config`, or an object with some of its fields.
        device: In place of the config's.
        dtype: In place of the config's.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The checkpoint or another part cannot be loaded, as `localdit.conversion.load_parts` says.
    """
    device = torch.device(device or _value(config, "device") or _best_device())
    dtype = _as_dtype(dtype or _value(config, "dtype") or ("float32" if device.type == "cpu" else "bfloat16"))
    path = _value(config, "ckpt_path")
    if _is_checkpoint(path):
        untold = {"window_size": "window_size", "do_rope": "rope", "eps": "qk_norm_eps"}
        told = {ours: _value(config, name) for name, ours in untold.items()}
        pipe, _ = load_parts(
            path,
            **{part: _value(config, part) for part in ("vae", "text_encoder", "tokenizer", "scheduler")},
            global_context=_value(config, "global_context"),
            seed=_value(config, "global_context_seed"),
            dtype=dtype,
            **{name: value for name, value in told.items() if value is not None},
        )
    else:
        pipe = LocalDiTPipeline.from_pretrained(MINI if path is None else path, dtype=dtype)
    return pipe.to(device)


def inference(
    pipe: LocalDiTPipeline,
    prompts: str | Sequence[str],
    neg_prompts: str | Sequence[str] | None,
    config: Any,
    image: Any = None,
) -> list[Image.Image]:
    """Draw one picture of each prompt.

    Args:
        pipe: What `load_model` gives.
        prompts: One, or several.
        neg_prompts: What to steer away from: one for all, or one each. None means the empty text.
        config: A `Config`, or an object with some of its fields.
        image: A picture to start from, or one for each prompt. The result then has its size, whatever the
            config's is, as published.

    Raises:
        ValueError: As `LocalDiTPipeline.__call__`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    height = width = None
    if image is None:
        published = PUBLISHED_SIZE if _is_checkpoint(_value(config, "ckpt_path")) else (None, None)
        height, width = (_value(config, "height") or published[0], _value(config, "width") or published[1])
    generators = None
    if (seed := _value(config, "seed")) is not None:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    (images,) = pipe(
        prompts,
        neg_prompts if neg_prompts is None or isinstance(neg_prompts, str) else list(neg_prompts),
        image=image,
        strength=_value(config, "denoising_strength"),
        height=height,
        width=width,
        num_inference_steps=_value(config, "denoising_steps"),
        guidance_scale=_value(config, "guidance_scale"),
        max_sequence_length=_value(config, "max_length"),
        generator=generators,
        return_dict=False,
    )
    return images


def _value(config: Any, name: str) -> Any:
    return getattr(config, name, getattr(Config, name))


def _is_checkpoint(path: str | os.PathLike[str] | None) -> bool:
    return path is not None and Path(path).suffix in (".safetensors", *PICKLE_SUFFIXES)


def _best_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be a floating type such as float32, bfloat16 or float16, got {dtype!r}")
    return found
