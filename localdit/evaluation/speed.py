"""How fast the LocalDiT transformer is beside diffusers' PixArt, the model it descends from, in one run.

The published sizes are compared: LocalDiT's 18 blocks, with and without global context, against the 28 of
PixArt-XL/2 with full attention. Both are 1152 wide and project 120 text tokens anew in each forward; weights
are random. A time means little on another machine or in another run, a ratio within a run a lot: so the
contestants take turns in rounds, in alternating order, and each round gives a ratio.

On a CPU a slice of 3 blocks stands for the model. The slice is timed without its blocks too: what that takes
is there once, at any depth, and the rest belongs to the blocks:

    whole = empty + (slice - empty) * depth / 3

On CUDA the whole models run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from localdit.models.local_dit import LocalDiTTransformer2DModel

WIDTH: dict[str, Any] = {"num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096}
LOCAL_DIT_BLOCKS, PIXART_BLOCKS = 18, 28
SLICE = 3  # blocks that stand for a model on a CPU
TEXT_TOKENS = 120
EMPTY_RUNS = 5  # of the slice without its blocks: a small part of the whole, so that few will do
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """One LocalDiT against PixArt. `ratio` above 1: LocalDiT is that many times faster."""

    device: str
    dtype: str
    size: int  # side of the picture in pixels
    batch: int
    threads: int  # of PyTorch on the CPU
    pairs: int
    global_context: bool
    seconds: float  # one forward of LocalDiT's 18 blocks, median
    pixart_seconds: float  # one forward of PixArt's 28, median
    ratio: float  # median of the ratios of the pairs
    ratio_low: float  # lower quartile
    ratio_high: float  # upper quartile


class Contestant:
    """A model's slice, what it is run on, and the depth that it stands for."""

    def __init__(self, model: Any, inputs: dict[str, Any], depth: int):
        self.model, self.inputs, self.depth = model, inputs, depth
        self.seconds: list[float] = []  # of a whole forward, one a round
        self.empty_seconds = self._time_without_blocks()

    def run(self) -> None:
        """Time one forward of the slice and note what it means for the whole model."""
        scale = self.depth / len(self.model.transformer_blocks)
        self.seconds.append(self.empty_seconds + scale * (self._time() - self.empty_seconds))

    def _time_without_blocks(self) -> float:
        """What of a forward does not grow with the depth: the median of a few, after one that warms up."""
        blocks = self.model.transformer_blocks
        self.model.transformer_blocks = nn.ModuleList()
        times = [self._time() for _ in range(1 + EMPTY_RUNS)]
        self.model.transformer_blocks = blocks
        return float(np.median(times[1:]))

    @torch.no_grad()
    def _time(self) -> float:
        return seconds(lambda: self.model(**self.inputs), self.inputs["hidden_states"].device)


def benchmark(
    size: int = 1024,
    pairs: int = 8,
    batch: int = 1,
    dtype: str = "float32",
    threads: int | None = None,
    device: str | None = None,
) -> list[Result]:
    """Time the transformer without and with global context against PixArt-XL/2.

    Args:
        size: Side of the square picture in pixels, a multiple of 16.
        pairs: Rounds that are measured, after one that warms up.
        batch: Pictures per forward; 2 is one picture with guidance.
        dtype: "float32", "bfloat16" or "float16", of weights and inputs.
        threads: PyTorch's threads on the CPU; None leaves them as they are.
        device: "cpu" or "cuda"; None for "cpu", and "cuda" too where there is one.

    Returns:
        Two results for each device: without global context, then with it.

    Raises:
        ValueError: for a size, number or dtype outside these.
    """
    with measuring(size, pairs, batch, dtype, threads, device) as devices:
        return [result for at in devices for result in _compare(size, pairs, batch, dtype, at)]


@contextmanager
def measuring(
    size: int, pairs: int, batch: int, dtype: str, threads: int | None, device: str | None
) -> Iterator[list[torch.device]]:
    """Check the arguments of `benchmark`, and hold PyTorch to that many threads. Gives the devices."""
    if size < 16 or size % 16:
        raise ValueError(f"size must be a positive multiple of 16, got {size}")
    for name, value in (("pairs", pairs), ("batch", batch), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device is not None and device not in devices:
        raise ValueError(f"device must be one of {', '.join(devices)} here, got {device!r}")

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        yield [torch.device(name) for name in ([device] if device else devices)]
    finally:
        torch.set_num_threads(threads_before)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the device has done it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def draw_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Draw every parameter anew: some start at zero, which may cost less time."""
    for parameter in model.parameters():
        parameter.data = 0.02 * torch.randn_like(parameter, dtype=dtype)


def _compare(size: int, pairs: int, batch: int, dtype: str, device: torch.device) -> list[Result]:
    local, mixed, pixart = contestants = _contestants(size, batch, DTYPES[dtype], device)
    for round_ in range(1 + pairs):
        order = (local, pixart, mixed)  # PixArt in the middle is next to both of the others
        for contestant in order if round_ % 2 else order[::-1]:
            contestant.run()
    for contestant in contestants:
        del contestant.seconds[0]  # that round warmed up

    def result(ours: Contestant, global_context: bool) -> Result:
        low, ratio, high = np.quantile(np.divide(pixart.seconds, ours.seconds), (0.25, 0.5, 0.75)).tolist()
        return Result(
            device=device.type,
            dtype=dtype,
            size=size,
            batch=batch,
            threads=torch.get_num_threads(),
            pairs=pairs,
            global_context=global_context,
            seconds=float(np.median(ours.seconds)),
            pixart_seconds=float(np.median(pixart.seconds)),
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
        )

    return [result(local, False), result(mixed, True)]


def _contestants(size: int, batch: int, dtype: torch.dtype, device: torch.device) -> list[Contestant]:
    """LocalDiT without and with global context, and PixArt, on the same latents and text."""
    latent = size // 8
    mask = torch.ones(batch, TEXT_TOKENS, device=device)
    mask[:, TEXT_TOKENS // 2 :] = 0  # a prompt that fills half of the text tokens
    inputs = {
        "hidden_states": torch.randn(batch, 4, latent, latent, dtype=dtype, device=device),
        "encoder_hidden_states": torch.randn(
            batch, TEXT_TOKENS, WIDTH["caption_channels"], dtype=dtype, device=device
        ),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 500, device=device),
        "added_cond_kwargs": {
            "resolution": torch.full((batch, 2), float(size), dtype=dtype, device=device),
            "aspect_ratio": torch.ones(batch, dtype=dtype, device=device),
        },
    }

    def build(model_class: Callable[..., nn.Module], depth: int, **config: Any) -> Contestant:
        blocks = SLICE if device.type == "cpu" else depth
        with device:
            model = model_class(**WIDTH, **config, num_layers=blocks, sample_size=latent)
        draw_weights(model, dtype)
        return Contestant(model.eval(), inputs, depth)

    dim = WIDTH["num_attention_heads"] * WIDTH["attention_head_dim"]
    return [
        build(LocalDiTTransformer2DModel, LOCAL_DIT_BLOCKS, global_context=False),
        build(LocalDiTTransformer2DModel, LOCAL_DIT_BLOCKS, global_context=True),
        build(
            PixArtTransformer2DModel, PIXART_BLOCKS, cross_attention_dim=dim, use_additional_conditions=True
        ),
    ]
