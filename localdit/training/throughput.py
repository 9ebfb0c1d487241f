"""How fast a run goes: samples and floating-point operations a second, the share of the device, memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Dense bfloat16 peaks, TFLOP/s, by a part of the device's name (NVIDIA's data sheets, without sparsity).
_PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}


class Throughput:
    """Counts what was done since the last report.

    Args:
        device: What the model runs on.
        peak_tflops: Of one such device; None takes it from the name where it is known.
    """

    def __init__(self, device: torch.device, peak_tflops: float | None = None):
        self.device = device
        if peak_tflops is None and device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            peak_tflops = next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)
        self.peak_tflops = peak_tflops
        self.flops_of: dict[tuple[Any, ...], int] = {}
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.samples, self.flops, self.started = 0, 0, time.monotonic()

    @contextmanager
    def count(self, shapes: tuple[Any, ...], samples: int) -> Iterator[None]:
        """Count the work on a micro-batch. Batches of the same shapes cost the same.

        The first time the operations are counted one by one, without compiled code, which hides them: that
        step of a compiled model is rounded otherwise than the same step later would be.
        """
        if shapes in self.flops_of:
            yield
        else:
            counter = _Operations()
            with counter, torch.compiler.set_stance("force_eager"):
                yield
            self.flops_of[shapes] = counter.flops
        self.samples += samples
        self.flops += self.flops_of[shapes]

    def report(self, world: int) -> dict[str, float]:
        """samples_per_second over `world` processes, tflops_per_second of one device, mfu (the share of its
        peak, where that is known), memory_gib (peak so far, of the device, or of the process on a CPU)."""
        seconds = time.monotonic() - self.started
        rate = self.flops / seconds / 1e12
        figures = {"samples_per_second": self.samples * world / seconds, "tflops_per_second": rate}
        if self.peak_tflops:
            figures["mfu"] = rate / self.peak_tflops
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.reset()
        return figures | {"memory_gib": memory / 2**30}


class _Operations(TorchDispatchMode):
    """Counts floating-point operations, and changes nothing.

    PyTorch's own `FlopCounterMode` takes some operations apart before it runs them, which rounds otherwise:
    the first step after a resume would not be what it was in the unbroken run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out
