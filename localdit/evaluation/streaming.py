"""Memory and time of one denoising step against the size of the picture, in bands and whole.

The published size of LocalDiT, 1152 wide, with random weights, one picture and no guidance. Each measurement
has a process of its own: memory that one leaves behind would help the next. On a CPU the peak is the
high-water mark of the process above what it held just before the step, weights included; on CUDA that of the
allocator.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from localdit.evaluation.contestants import LOCAL_DIT_BLOCKS, WIDTH
from localdit.evaluation.timing import DTYPES, draw_weights
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.plots import new_figure

TEXT_TOKENS = 120
SIZES = (512, 1024, 2048, 4096, 8192)
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    size: int  # side of the picture in pixels, a multiple of 16
    blocks: int = LOCAL_DIT_BLOCKS
    global_context: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    max_tokens: int | None = 8192  # of a band; None: the whole image at once
    offload: bool = False  # keep the token map on the host
    threads: int | None = None  # of PyTorch on the CPU; None: its choice

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 16:
            raise ValueError(f"size must be a positive multiple of 16, got {self.size}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class Result:
    """What one step took."""

    case: Case
    tokens: int
    weight_bytes: int
    peak_bytes: int  # above what was held before the step
    seconds: float
    cpu_seconds: float  # of all threads: where others share the cores, the steadier figure


def benchmark(cases: Sequence[Case]) -> Iterator[Result]:
    """Measure one case after the other, each in a process of its own.

    Raises:
        RuntimeError: a process fails, as one does for which the memory is too small.
    """
    for case in cases:
        command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} ended with {done.returncode}: {done.stderr[-2000:]}")
        yield Result(**json.loads(done.stdout.splitlines()[-1]) | {"case": case})


@torch.no_grad()
def measure(case: Case) -> Result:
    """Measure in this process, of which nothing else may take memory meanwhile."""
    torch.set_num_threads(case.threads or torch.get_num_threads())
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    latent = case.size // 8
    torch.manual_seed(0)
    with torch.device("meta"):  # weights of another type, freed again, would hide what the step takes
        model = LocalDiTTransformer2DModel(
            **WIDTH, num_layers=case.blocks, global_context=case.global_context, sample_size=latent
        )
    model.requires_grad_(False).to(dtype).to_empty(device=device)
    with device:
        draw_weights(model.eval(), dtype)
        sample = torch.randn(1, 4, latent, latent).to(dtype)
        text = torch.randn(1, TEXT_TOKENS, WIDTH["caption_channels"]).to(dtype)
    if case.max_tokens is not None:
        model.enable_streaming(case.max_tokens, case.offload)

    before = _reset_peak(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    predicted = model(sample, text, torch.tensor(500, device=device)).sample
    if not predicted.isfinite().all():  # waits for the device, too
        raise RuntimeError("the step gave numbers that are not finite")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Result(
        case=case,
        tokens=(case.size // 16) ** 2,
        weight_bytes=sum(x.nbytes for x in model.parameters()),
        peak_bytes=_peak(device) - before,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def _reset_peak(device: torch.device) -> int:
    """Begin a new high-water mark; return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _CLEAR.exists():
        raise RuntimeError("the peak of a process on the CPU is read from /proc, which Linux alone has")
    _CLEAR.write_text("5")  # resets the mark of the resident set
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


_COLUMNS = ("px", "tokens", "blocks", "global context", "dtype", "band", "peak", "seconds", "CPU seconds")
HEAD = f"| {' | '.join(_COLUMNS)} |\n|" + " --- |" * len(_COLUMNS)  # of a table in Markdown


def row(result: Result) -> str:
    """A result as a line of the table; the peak is above the weights."""
    case = result.case
    cells = (
        case.size,
        f"{result.tokens:,}",
        case.blocks,
        "with" if case.global_context else "without",
        case.dtype,
        "whole" if case.max_tokens is None else f"{case.max_tokens:,}",
        f"{result.peak_bytes / 1e9:.2f} GB",
        f"{result.seconds:.1f}",
        f"{result.cpu_seconds:.1f}",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with two panels: peak memory and time against the side of the picture.

    The time is that of the cores, on a CPU, where others may use them too.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9, 3.6)
    from matplotlib.ticker import LogLocator

    memory, time_taken = figure.subplots(1, 2)
    cases = {dataclasses.replace(result.case, size=16) for result in results}
    on_cpu = all(case.device == "cpu" for case in cases)
    for case in sorted(cases, key=lambda case: case.global_context):
        line = [result for result in results if dataclasses.replace(result.case, size=16) == case]
        context = "with" if case.global_context else "without"
        label = f"{case.blocks} blocks, {context} global context, {case.dtype}"
        sides = [result.case.size for result in line]
        memory.plot(sides, [result.peak_bytes / 1e9 for result in line], marker="o", label=label)
        seconds = [result.cpu_seconds if on_cpu else result.seconds for result in line]
        time_taken.plot(sides, seconds, marker="o")
    memory.set_title("GB above the weights, at most", fontsize=10, loc="left")
    time_taken.set_title(f"{'CPU ' if on_cpu else ''}seconds of a step", fontsize=10, loc="left")
    memory.legend(fontsize=8)
    sides = sorted({result.case.size for result in results})
    for axes in (memory, time_taken):
        axes.set(xscale="log", yscale="log", xlabel="side of the picture in pixels")
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, linewidth=0.5)
    figure.savefig(path, format="png", dpi=150)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(Case(**json.loads(sys.argv[1]))))))
