"""Seeds: the picture of one, alone or among others, now or in a process that comes later."""

import json
import random
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from localdit import MINI, LocalDiTPipeline

from . import Outcome, experiment

BATCH = 4
TOLERANCE = 1e-5
PROMPTS = (
    "a red circle left of a blue square",
    "a green star",
    "a large green square on a white background",
    "a pink circle above a cyan circle",
)


@experiment(
    "R20",
    "A picture of four made together is, within 1e-5 of the range of its values, the one that its seed makes "
    "alone or in twos; a new process makes the same bits",
    full=6,
    small=None,
)
def same_pictures(folder: Path, trials: int) -> Outcome:
    """LocalDiT-Mini in float32, at its defaults. A trial is a batch."""
    pipe = load()
    asked = [[random.choice(PROMPTS), random.randrange(2**31)] for _ in range(trials)]
    together = [batch(pipe, prompt, seed, BATCH) for prompt, seed in asked]
    again = batch(pipe, *asked[0], BATCH)
    later = in_another_process(asked)
    passed, apart = 0, {1: 0.0, 2: 0.0}
    for (prompt, seed), pictures, digest in zip(asked, together, later, strict=True):
        found = {}
        for size in apart:
            parts = [batch(pipe, prompt, seed + first, size) for first in range(0, BATCH, size)]
            found[size] = (torch.cat(parts) - pictures).abs().max().item()
        apart = {size: max(apart[size], found[size]) for size in apart}
        passed += digest == digest_of(pictures) and max(found.values()) <= TOLERANCE
    repeated = "the same bits" if torch.equal(again, together[0]) else "**other bits**"
    note = (
        f"LocalDiT-Mini, float32, 20 steps, guidance 7, values from 0 to 1: at most {apart[1]:.1e} apart "
        f"made alone, {apart[2]:.1e} in twos; {repeated} when made again in one process"
    )
    return Outcome(trials, passed, note)


def load() -> LocalDiTPipeline:
    pipe = LocalDiTPipeline.from_pretrained(MINI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def batch(pipe: LocalDiTPipeline, prompt: str, seed: int, size: int) -> Tensor:
    """The pictures of so many seeds that follow each other, (B, 3, H, W) in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(size)]
    return pipe(prompt, num_images_per_prompt=size, generator=generators, output_type="pt").images


def digest_of(pictures: Tensor) -> str:
    return sha256(pictures.numpy().tobytes()).hexdigest()


def in_another_process(asked: list[list[object]]) -> list[str]:
    """The digests of batches, made by a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.seeds", json.dumps(asked)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


if __name__ == "__main__":
    pipeline = load()
    for prompt, seed in json.loads(sys.argv[1]):
        print(digest_of(batch(pipeline, prompt, seed, BATCH)))
