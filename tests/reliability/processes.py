"""Processes that die while they save, and processes that share a folder."""

import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

from localdit.files import STAGED, locked
from localdit.training.checkpoint import find_checkpoint

from . import Outcome, experiment
from .toys import save_step, sent, start, step_in


def save_forever(folder: Path, step: int, connection: Connection) -> None:
    """Save one step after the other, and say when each is done."""
    with locked(folder):
        while True:
            save_step(folder, step)
            connection.send(step)
            step += 1


@experiment(
    "R1",
    "After `kill -9` at a random moment, a restart finds the last committed checkpoint, bit for bit, "
    "and needs no clean-up",
    full=200,
    small=3,
)
def kills_during_save(folder: Path, trials: int) -> Outcome:
    """Every restart goes on in the same folder. What `save_checkpoint` has returned is committed."""
    step, passed, interrupted = 0, 0, 0
    for _ in range(trials):
        process, connection = start(save_forever, folder, step)
        committed = connection.recv()
        time.sleep(random.uniform(0, 0.1))  # a save takes about a fifth of that
        process.kill()
        process.join()
        committed = max([committed, *sent(connection)])
        interrupted += any(STAGED.fullmatch(path.name) for path in folder.iterdir())

        with locked(folder):  # as the next run does
            cleared = not any(STAGED.fullmatch(path.name) for path in folder.iterdir())
            found = find_checkpoint(folder, "auto")
            restored = step_in(found) if found else None
        passed += cleared and restored is not None and restored >= committed
        step = max(restored or 0, committed) + 1
    return Outcome(trials, passed, f"{interrupted} kills left a half-written folder or file behind")


@experiment(
    "R24",
    "A second process that would write to a run's folder is refused, until the first ends or is killed",
    full=50,
    small=1,
)
def two_writers(folder: Path, trials: int) -> Outcome:
    passed = 0
    for step in range(trials):
        process, connection = start(save_forever, folder, 1000 * step)
        connection.recv()
        refused = False
        try:
            with locked(folder):
                pass
        except BlockingIOError as error:
            refused = str(folder) in str(error)
        process.kill()
        process.join()
        with locked(folder):
            passed += refused
    return Outcome(trials, passed)


@experiment(
    "R24",
    "A process that reads while another saves and prunes sees whole checkpoints alone",
    full=1000,
    small=5,
)
def reader_during_save(folder: Path, trials: int) -> Outcome:
    process, connection = start(save_forever, folder, 0)
    connection.recv()
    passed, gone, steps = 0, 0, set()
    for _ in range(trials):
        found = None
        try:
            found = find_checkpoint(folder, "auto")
            step = step_in(found) if found else None
            passed += step is not None
            steps.add(step)
        except ValueError:
            if found and not found.exists():  # pruned while it was read: refused, which is all one can do
                gone += 1
                passed += 1
    process.kill()
    process.join()
    return Outcome(
        trials, passed, f"{len(steps)} different steps read; {gone} were pruned under the reader and refused"
    )
