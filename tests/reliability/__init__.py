"""Experiments that measure what `docs/reliability.md` promises.

    python -m tests.reliability [--only R1,R8] [--out docs/reliability.md]

runs them at full size and writes the figures; `test_small_sizes.py` runs each with a few trials. An
experiment is a function of a fresh folder and a number of trials, in any module of this package:

    @experiment("R8", "One flipped bit in a checkpoint is found, and its file named", full=1000, small=20)
    def flipped_bits(folder: Path, trials: int) -> Outcome:
        ...
        return Outcome(trials, passed, "by the manifest's SHA-256")

A trial that fails is counted, not raised, and the note says what went wrong: what does not hold is published
as not holding.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

# For the hostile files and the toy pipeline of the tests.
sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("data", "pipelines")]


@dataclass(frozen=True)
class Outcome:
    """What an experiment came to."""

    trials: int
    passed: int
    note: str = ""  # what was measured besides, what failed: Markdown, one line


@dataclass(frozen=True)
class Experiment:
    """A claim and the function that puts it to the test.

    Attributes:
        id: Of the claim in the list of tests, "R8".
        claim: What holds if every trial passes, as a sentence.
        run: Takes an empty folder and the number of trials.
        full: Trials for the published figure.
        small: Trials in the tests; None where one alone takes too long for them.
        holds: False where it is known not to, which the tests then expect.
    """

    id: str
    claim: str
    run: Callable[[Path, int], Outcome]
    full: int
    small: int | None
    holds: bool


_found: list[Experiment] = []


def experiment(
    id: str, claim: str, *, full: int, small: int | None, holds: bool = True
) -> Callable[[Callable[[Path, int], Outcome]], Callable[[Path, int], Outcome]]:
    """Enter a function among the experiments."""

    def enter(run: Callable[[Path, int], Outcome]) -> Callable[[Path, int], Outcome]:
        _found.append(Experiment(id, claim, run, full, small, holds))
        return run

    return enter


def all_experiments() -> list[Experiment]:
    """Those of every module in this package, by number."""
    for module in iter_modules(__path__):
        if not module.name.startswith(("test_", "__")):
            import_module(f"{__name__}.{module.name}")
    return sorted(_found, key=lambda one: int(one.id[1:]))


def measure(one: Experiment) -> tuple[Experiment, Outcome, float]:
    """Run one at full size: with what it came to and how many seconds it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = one.run(Path(folder), one.full)
    return one, outcome, time.monotonic() - started
