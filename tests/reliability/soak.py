"""Long work: whether memory and caches stay what they are."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from hostile_files import picture
from toy_pipeline import toy_pipeline

from localdit.models.local_dit import cached_geometry
from localdit.training.journal import Journal
from localdit.training.loop import train

from . import Outcome, experiment
from .toys import apart, denoising_run, save_encoders

GROWTH = 0.01
CALLS, SIZES = 200, 16  # of the pipeline
WARM = 0.2  # the share of the work that warms up


@experiment(
    "R27",
    "After a warm-up, memory grows by less than 1 % over the steps of a training whose pictures change in "
    "size",
    full=10_000,
    small=None,
)
def long_training(folder: Path, trials: int) -> Outcome:
    return outcome(next(apart(train_long, [(folder, trials)], seconds=7200)), trials, "steps")


@experiment(
    "R27",
    "So it does over calls of a pipeline whose pictures change between sixteen sizes",
    full=CALLS,
    small=None,
)
def many_calls(folder: Path, trials: int) -> Outcome:
    return outcome(next(apart(call_often, [(trials, SIZES)], seconds=7200)), trials, "calls")


@experiment(
    "R27",
    "So it does where sizes are new again and again",
    full=CALLS,
    small=None,
    holds=False,
)
def many_sizes(folder: Path, trials: int) -> Outcome:
    """oneDNN keeps what it compiled for up to 1024 operations of a shape each, which is not reached here."""
    return outcome(next(apart(call_often, [(trials, trials)], seconds=7200)), trials, "calls")


def train_long(folder: Path, steps: int) -> list[tuple[int, float, int]]:
    """Train from a cache of pictures of many sizes. What `measured` gives, a hundred times."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(60):
        width, height = random.randint(20, 90), random.randint(20, 90)
        (pictures / f"{i}.png").write_bytes(picture(width, height))
        (pictures / f"{i}.txt").write_text(f"a circle left of {i}")
    found: list[tuple[int, float, int]] = []

    def note(journal: Journal, step: int, *args: Any) -> None:
        found.append(measured(step))
        steps_of(journal, step, *args)

    steps_of = Journal.steps
    config = denoising_run(
        folder / "run",
        str(pictures),
        save_encoders(folder / "encoders"),
        {},
        max_steps=steps,
        batch_size=2,
        log_every=max(steps // 100, 1),
        save_every=max(steps // 10, 1),
    )
    with patch.object(Journal, "steps", note):
        train(config)
    return found


def call_often(calls: int, count: int) -> list[tuple[int, float, int]]:
    """Call a pipeline at so many sizes in turn. What `measured` gives after each call."""
    pipe, found = toy_pipeline(), []
    sides = range(2, 2 + math.isqrt(count - 1) + 1)  # in 16 pixels, the smallest step
    sizes = random.sample([(16 * height, 16 * width) for height in sides for width in sides], count)
    for call in range(1, calls + 1):
        height, width = sizes[call % count]
        generator = torch.Generator().manual_seed(call)
        pipe("a red circle", height=height, width=width, num_inference_steps=2, generator=generator)
        found.append(measured(call))
    return found


def measured(number: int) -> tuple[int, float, int]:
    """The number, the memory of this process in MiB, and the tables of geometry that are kept."""
    return number, psutil.Process().memory_info().rss / 2**20, cached_geometry.cache_info().currsize


def outcome(found: list[tuple[int, float, int]] | None, trials: int, unit: str) -> Outcome:
    """A trial passes if memory after it is less than 1 % above the most that the warm-up took."""
    if found is None:
        return Outcome(trials, 0, "the process died")
    warm = max(memory for number, memory, _ in found if number <= WARM * trials)
    most, last = max(memory for _, memory, _ in found), found[-1][1]
    kept, bound = max(tables for _, _, tables in found), cached_geometry.cache_info().maxsize
    passed = sum(held(found, warm, bound))
    note = (
        f"{warm:.0f} MiB at most in the first {WARM:.0%} of the {unit}, {most:.0f} MiB after them "
        f"({most / warm - 1:+.1%}), {last:.0f} MiB at the end; at most {kept} tables of geometry are kept"
    )
    return Outcome(trials, passed, note)


def held(found: list[tuple[int, float, int]], warm: float, bound: int | None) -> Iterator[int]:
    """How many trials each measurement speaks for, where it is as it should be."""
    before = 0
    for number, memory, tables in found:
        if memory < warm * (1 + GROWTH) and tables <= (bound or 0):
            yield number - before
        before = number
