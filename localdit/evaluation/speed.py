"""How fast the LocalDiT transformer is beside its peers, in one run.

Published sizes are compared, of LocalDiT and of the transformers that `contestants` lists, with random
weights. They take turns in rounds, in alternating order, and each round gives a ratio. Beside the times is
the least that a forward can take (`floors`) at this machine's own speeds of copying and multiplying, measured
first.

On a CPU a slice of 3 blocks stands for a model. The slice is timed without its blocks too: what that takes is
there once, at any depth, and the rest belongs to the blocks:

    whole = empty + (slice - empty) * depth / 3

On CUDA whole models run.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from localdit.evaluation import contestants as known
from localdit.evaluation import floors
from localdit.evaluation.contestants import Contestant, Picture
from localdit.evaluation.counting import count
from localdit.evaluation.timing import DTYPES, Measured, Setup, Spread, check_picture, spread

SLICE = 3  # blocks that stand for a model on a CPU
EMPTY_RUNS = 5  # of the slice without its blocks: a small part of the whole, so that few will do
FEWEST_ROUNDS = 3  # that are measured, if the time for a comparison runs out
DEFAULT_MODELS = {
    "cpu": ("local", "global", "pixart-alpha"),
    "cuda": (
        *("local:torch", "local", "local:compiled", "local:compiled+graph"),
        *("global:torch", "global", "global:compiled", "global:compiled+graph"),
        *("pixart-alpha", "pixart-alpha:cudnn+compiled"),
        *("pixart-sigma", "pixart-sigma:cudnn", "pixart-sigma:compiled"),
        *("pixart-sigma:cudnn+compiled", "pixart-sigma:cudnn+compiled+graph"),
        *("sana-0.6b", "sana-0.6b:compiled", "sana-1.6b", "sana-1.6b:compiled"),
    ),
}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**31}  # of the copies that measure memory
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices that measure arithmetic
CEILING_RUNS = 10
NOTHING = Spread(0, 0, 0)


@dataclass(frozen=True)
class Result(Measured):
    """One contestant at one size."""

    guided: bool  # each picture predicted with and without its prompt
    model: str  # its name, as `--models` takes it
    title: str
    blocks: int  # of the published model
    text_tokens: int
    error: str = ""  # why it did not run; all below is then as here
    seconds: Spread = NOTHING  # one forward of the whole model
    first_seconds: float = 0  # the first call, which compiles; on a CPU, of the slice
    # To each peer: how many times as long that takes. Above 1, this one is faster.
    ratios: dict[str, Spread] = field(default_factory=dict)
    parameters: int = 0
    # Above weights and inputs. On CUDA allocated; on a CPU counted for eager PyTorch, likewise the kernels.
    peak_bytes: int = 0
    kernels: int = 0
    moved_bytes: int = 0  # read and written by the kernels of eager PyTorch, counted
    copy_speed: float = 0  # this machine's, measured: bytes a second, read and written
    product_speed: float = 0  # likewise: operations a second
    floor_seconds: float = 0  # the least at these two speeds
    over_floor: float = 0  # median seconds / floor_seconds
    bytes_per_second: float = 0  # what the floor has to move, in the median time; likewise operations
    flops_per_second: float = 0


class Runner:
    """A contestant's slice, its forward, and the depth that it stands for."""

    def __init__(self, model: Any, forward: Callable[[], object], depth: int, clock: Callable[..., float]):
        self.model, self.forward, self.depth, self.clock = model, forward, depth, clock
        self.costs: dict[str, Any] = {}  # fields of a result
        self.seconds: list[float] = []  # of a whole forward, one a round
        self.first_seconds = clock(forward)
        is_whole = len(model.transformer_blocks) == depth
        self.empty_seconds = 0.0 if is_whole else self._time_without_blocks()

    def run(self) -> None:
        """Time one forward of the slice and note what it means for the whole model."""
        scale = self.depth / len(self.model.transformer_blocks)
        self.seconds.append(self.empty_seconds + scale * (self.clock(self.forward) - self.empty_seconds))

    def _time_without_blocks(self) -> float:
        """What of a forward does not grow with the depth: the median of a few, after one that warms up."""
        times = without_blocks(self.model, lambda: [self.clock(self.forward) for _ in range(1 + EMPTY_RUNS)])
        return float(np.median(times[1:]))


def without_blocks(model: Any, call: Callable[[], Any]) -> Any:
    """What a call returns while the model has no blocks."""
    blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
    try:
        return call()
    finally:
        model.transformer_blocks = blocks


def benchmark(
    setup: Setup,
    sizes: Sequence[int] = (1024,),
    batches: Sequence[int] = (1,),
    guidance: Sequence[bool] = (False,),
    models: Sequence[str] | None = None,
    reference: Path | None = None,
    limit: float | None = None,
) -> Iterator[list[Result]]:
    """Time transformers side by side.

    Args:
        setup: How to measure.
        sizes: Sides of the square pictures in pixels, multiples of 16, or of 32 with Sana.
        batches: Pictures per forward.
        guidance: Whether each is predicted with and without its prompt in that forward.
        models: Contestants, as `contestants.parse` reads them; None for `DEFAULT_MODELS` of the device, and
            with a reference `contestants.PUBLISHED`.
        reference: A checkout of the published LocalDiT. Its code is run.
        limit: Seconds for the rounds of one comparison, after which at least 3 were measured; None for all.

    Yields:
        The results of one device, size, batch and guidance, in the order of `models`.

    Raises:
        ValueError: for arguments outside these, before anything is measured.
    """
    for size, batch in product(sizes, batches):
        check_picture(size, batch)
    with setup.devices() as devices:
        published = () if reference is None else known.PUBLISHED
        teams = {
            device: known.parse(models or (*DEFAULT_MODELS[device.type], *published), reference, device.type)
            for device in devices
        }
        for device, team in teams.items():
            for contestant, size in product(team, sizes):
                pixels = contestant.family.pixels
                if size % pixels:
                    raise ValueError(f"size must be a multiple of {pixels} for {contestant.name}, got {size}")
            speeds = measure_ceilings(device, DTYPES[setup.dtype], setup)
            for size, batch, guided in product(sizes, batches, guidance):
                picture = Picture(size, batch, guided, DTYPES[setup.dtype], device)
                yield _compare(team, picture, setup, reference, limit, speeds)


def measure_ceilings(device: torch.device, dtype: torch.dtype, setup: Setup) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes, and operations a second of a large matrix product."""

    def least(call: Callable[[], object]) -> float:  # a ceiling is what the machine can do, not what it did
        return min(setup.seconds(call, device) for _ in range(1 + CEILING_RUNS))

    source, target = torch.randn(2, COPY_BYTES[device.type] // dtype.itemsize, dtype=dtype, device=device)
    copying = least(lambda: target.copy_(source))
    side = PRODUCT_SIDE[device.type]
    left, right = torch.randn(2, side, side, dtype=dtype, device=device)
    return 2 * source.nbytes / copying, 2 * side**3 / least(lambda: left @ right)


def _compare(
    team: Sequence[Contestant],
    picture: Picture,
    setup: Setup,
    reference: Path | None,
    limit: float | None,
    speeds: tuple[float, float],
) -> list[Result]:
    # Compiled code of another size counts against the few recompilations after which a block runs eager.
    torch._dynamo.reset()
    costs: dict[str, dict[str, Any]] = {}  # of each model, whatever its options
    runners: dict[Contestant, Runner] = {}
    errors: dict[Contestant, str] = {}
    for contestant in team:
        try:
            if contestant.model not in costs:
                costs[contestant.model] = _count(contestant.model, picture, reference)
            runners[contestant] = _enter(contestant, picture, setup, reference, costs[contestant.model])
        except Exception as error:
            if isinstance(error, ValueError) or picture.device.type == "cpu":
                raise
            # Out of memory, or a kernel that this GPU lacks: the others run nevertheless.
            errors[contestant] = (str(error).splitlines() or [type(error).__name__])[0]
        gc.collect()  # what failed, and what building left behind
    _take_turns(list(runners.values()), setup.pairs, limit)
    return [
        _result(contestant, runners, errors.get(contestant, ""), picture, setup, speeds)
        for contestant in team
    ]


def _enter(
    contestant: Contestant, picture: Picture, setup: Setup, reference: Path | None, costs: dict[str, Any]
) -> Runner:
    """Build a contestant and run it for the first times. Adds to its costs what CUDA tells of them."""
    device, depth = picture.device, contestant.family.depth
    model, forward = contestant.build(picture, SLICE if device.type == "cpu" else depth, reference)
    runner = Runner(model, forward, depth, lambda call: setup.seconds(call, device))
    runner.costs = costs | (_seen_on_gpu(forward) if device.type == "cuda" else {})
    return runner


def _take_turns(runners: Sequence[Runner], pairs: int, limit: float | None) -> None:
    """Run the rounds, in alternating order, and forget the first, which warms up."""
    start = time.monotonic()
    for round_ in range(1 + pairs):
        if limit is not None and round_ > FEWEST_ROUNDS and time.monotonic() - start > limit:
            break
        for runner in runners if round_ % 2 else runners[::-1]:
            runner.run()
    for runner in runners:
        del runner.seconds[0]


def _result(
    contestant: Contestant,
    runners: dict[Contestant, Runner],
    error: str,
    picture: Picture,
    setup: Setup,
    speeds: tuple[float, float],
) -> Result:
    family = contestant.family
    about: dict[str, Any] = {
        "device": picture.device.type,
        "dtype": setup.dtype,
        "size": picture.size,
        "batch": picture.batch,
        "guided": picture.guided,
        "threads": torch.get_num_threads(),
        "model": contestant.name,
        "title": ", ".join((family.title, *contestant.options)),
        "blocks": family.depth,
        "text_tokens": family.text_tokens,
        "copy_speed": speeds[0],
        "product_speed": speeds[1],
    }
    if error:
        return Result(**about, pairs=0, error=error)
    runner, floor = runners[contestant], contestant.floor(picture)
    took, least = spread(runner.seconds), floors.seconds(floor, speeds[1], speeds[0])
    peers = (peer for peer in runners if family.ours and not peer.family.ours)
    return Result(
        **about,
        pairs=len(runner.seconds),
        seconds=took,
        first_seconds=runner.first_seconds,
        ratios={peer.name: spread(np.divide(runners[peer].seconds, runner.seconds)) for peer in peers},
        **runner.costs,
        floor_seconds=least,
        over_floor=took.median / least,
        bytes_per_second=sum(work.bytes for work in floor) / took.median,
        flops_per_second=sum(work.flops for work in floor) / took.median,
    )


def _seen_on_gpu(forward: Callable[[], object]) -> dict[str, int]:
    """Memory that a forward allocates above what is there, and kernels that it launches."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward()
    peak = torch.cuda.max_memory_allocated() - before
    if isinstance(forward, known.Graphed):
        peak = forward.peak_bytes
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        forward()
        torch.cuda.synchronize()
    on_gpu = (event.name for event in seen.events() if event.device_type == DeviceType.CUDA)
    kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)
    return {"peak_bytes": peak, "kernels": kernels}


def _count(name: str, picture: Picture, reference: Path | None) -> dict[str, int]:
    """What a model has and costs in eager PyTorch without custom kernels, from a slice on the meta device."""
    contestant = Contestant(name)
    model, forward = contestant.build(replace(picture, device=torch.device("meta")), SLICE, reference)
    forward()  # makes what is kept
    one = count(forward)
    rest = without_blocks(model, lambda: count(forward))

    def whole(with_blocks: int, without: int) -> int:
        return without + (with_blocks - without) * contestant.family.depth // SLICE

    blocks = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": whole(parameters, parameters - blocks),
        "peak_bytes": one.peak_bytes,
        "kernels": whole(len(one.kernels), len(rest.kernels)),
        "moved_bytes": whole(one.bytes, rest.bytes),
    }
