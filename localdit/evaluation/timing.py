"""How the comparisons measure: contestants take turns, and every round gives a ratio.

A time means little on another machine or in another run, a ratio within a run a lot: nothing is timed alone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Any) -> Spread:
    """Of a sequence or array of numbers."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, low, high)


@dataclass(frozen=True)
class Setup:
    """What holds for a whole comparison.

    Raises:
        ValueError: for a number or dtype outside these.
    """

    pairs: int = 8  # rounds that are measured, after one that warms up
    dtype: str = "float32"  # "float32", "bfloat16" or "float16", of weights and inputs
    threads: int | None = None  # of PyTorch on the CPU; None leaves them as they are
    device: str | None = None  # "cpu" or "cuda"; None for "cpu", and "cuda" too where there is one
    cpu_time: bool = False  # on a CPU, the time that its cores worked instead of the time that passed

    def __post_init__(self) -> None:
        for name in ("pairs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.cpu_time and self.device == "cuda":
            raise ValueError("cpu_time must be False on cuda: it is the time that the cores of a CPU worked")

    @contextmanager
    def devices(self) -> Iterator[list[torch.device]]:
        """Hold PyTorch to the threads. Gives the devices.

        Raises:
            ValueError: for a device that is not here.
        """
        here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        if self.device is not None and self.device not in here:
            raise ValueError(f"device must be one of {', '.join(here)} here, got {self.device!r}")
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads or threads_before)
        try:
            yield [torch.device(name) for name in ([self.device] if self.device else here)]
        finally:
            torch.set_num_threads(threads_before)

    def seconds(self, call: Callable[[], object], device: torch.device) -> float:
        """How long a call takes, until the device has done it."""
        clock = time.process_time if self.cpu_time and device.type == "cpu" else time.perf_counter
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        synchronize()
        start = clock()
        call()
        synchronize()
        return clock() - start


@dataclass(frozen=True)
class Measured:
    """What a result was measured on."""

    device: str
    dtype: str
    size: int  # side of the picture in pixels
    batch: int
    threads: int  # of PyTorch on the CPU
    pairs: int


def check_picture(size: int, batch: int) -> None:
    """A size and a batch that transformers can take."""
    if size < 16 or size % 16:
        raise ValueError(f"size must be a positive multiple of 16, got {size}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def draw_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Draw every parameter anew: some start at zero, which may cost less time."""
    for parameter in model.parameters():
        parameter.data = 0.02 * torch.randn_like(parameter, dtype=dtype)
