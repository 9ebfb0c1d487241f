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
SETTINGS = "LocalDiT-Mini in float32, 20 steps, guidance 7"  # the defaults
PROMPTS = (
    "a red circle left of a blue square",
    "a green star",
    "a large green square on a white background",
    "a pink circle above a cyan circle",
)


@experiment(
    "R20",
    "A seed makes the same bits again, in this process and in a new one",
    full=5,
    small=None,
)
def made_again(folder: Path, trials: int) -> Outcome:
    """A trial is a batch."""
    pipe, asked = load(), requests(trials)
    first, again = ([digest_of(batch(pipe, *request, BATCH)) for request in asked] for _ in range(2))
    later = in_another_process(asked)
    passed = sum(len({*digests}) == 1 for digests in zip(first, again, later, strict=True))
    return Outcome(trials, passed, f"each {BATCH} pictures; {SETTINGS}")


@experiment(
    "R20",
    "A picture of four made together is the one that its seed makes alone or in twos, within 1e-5 of the "
    "range of its values",
    full=5,
    small=None,
    holds=False,
)
def made_alone(folder: Path, trials: int) -> Outcome:
    """The matrix products of another batch size round otherwise."""
    pipe, passed, most, changed, values = load(), 0, {1: 0.0, 2: 0.0}, 0, 0
    for prompt, seed in requests(trials):
        together, found = batch(pipe, prompt, seed, BATCH), {}
        for size in most:
            parts = [batch(pipe, prompt, seed + first, size) for first in range(0, BATCH, size)]
            found[size] = (torch.cat(parts) - together).abs().max().item()
            changed += int((in_8_bits(torch.cat(parts)) != in_8_bits(together)).sum())
            values += together.numel()
        most = {size: max(most[size], found[size]) for size in most}
        passed += max(found.values()) <= TOLERANCE
    note = (
        f"{SETTINGS}, values from 0 to 1: at most {most[1]:.1e} apart made alone, {most[2]:.1e} in twos; of "
        f"the 8-bit values of the files {changed / values:.0e} differ"
    )
    return Outcome(trials, passed, note)


def requests(trials: int) -> list[tuple[str, int]]:
    """Prompts and first seeds."""
    return [(random.choice(PROMPTS), random.randrange(2**31)) for _ in range(trials)]


def load() -> LocalDiTPipeline:
    pipe = LocalDiTPipeline.from_pretrained(MINI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def batch(pipe: LocalDiTPipeline, prompt: str, seed: int, size: int) -> Tensor:
    """The pictures of so many seeds that follow each other, (B, 3, H, W) in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(size)]
    return pipe(prompt, num_images_per_prompt=size, generator=generators, output_type="pt").images


def in_8_bits(pictures: Tensor) -> Tensor:
    return (255 * pictures).round()


def digest_of(pictures: Tensor) -> str:
    return sha256(pictures.numpy().tobytes()).hexdigest()


def in_another_process(asked: list[tuple[str, int]]) -> list[str]:
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
