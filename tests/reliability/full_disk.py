"""Disks that are full, and files that must not grow."""

import ctypes
import os
import random
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from localdit.training.checkpoint import checkpoints, find_checkpoint

from . import Outcome, experiment
from .toys import save_step, sent, start, step_in

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x00020000, 16384, 1 << 18


@experiment(
    "R3",
    "A limit on the size of files stops a save with an error that names the path; the checkpoint before it "
    "loads, nothing half-written is left, and the next save succeeds",
    full=100,
    small=2,
)
def file_size_limit(folder: Path, trials: int) -> Outcome:
    before = save_step(folder, 0)
    size = sum(file.stat().st_size for file in before.iterdir()) // 3
    passed = 0
    for step in range(1, trials + 1):
        limit = random.choice([0, 1, random.randrange(300), random.randrange(size)])
        process, connection = start(save_under_limit, folder, step, limit)
        (message,) = sent(connection)
        process.join()
        stands = survived(folder, step - 1, message, f"step-{step:08d}")
        save_step(folder, step)
        passed += stands and step_in(folder / f"step-{step:08d}") == step
    return Outcome(trials, passed, "`RLIMIT_FSIZE` from 0 bytes to the size of the largest file")


def save_under_limit(folder: Path, step: int, limit: int, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    connection.send(message_of(folder, step))


@experiment(
    "R3",
    "So does a full file system",
    full=100,
    small=2,
)
def full_file_system(folder: Path, trials: int) -> Outcome:
    process, connection = start(save_on_full_disk, folder, trials)
    results = sent(connection)
    process.join()
    if results == ["not permitted"]:
        return Outcome(0, 0, "mounting a small tmpfs is not permitted here")
    return Outcome(trials, sum(results), "a tmpfs with room for a part of the checkpoint")


def save_on_full_disk(folder: Path, trials: int, connection: Connection) -> None:
    """In a mount namespace of this process's own, which goes with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    private = (
        libc.unshare(_CLONE_NEWNS) == 0 and libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    )
    if not private or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=8m"):
        connection.send("not permitted")
        return
    run, ballast = folder / "run", folder / "ballast"
    size = sum(file.stat().st_size for file in save_step(run, 0).iterdir())
    for step in range(1, trials + 1):
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        ballast.write_bytes(bytes(free - random.randrange(size)))
        message = message_of(run, step)
        stands = survived(run, step - 1, message, f"step-{step:08d}")
        ballast.unlink()
        save_step(run, step)
        connection.send(bool(stands and step_in(run / f"step-{step:08d}") == step))


def message_of(folder: Path, step: int) -> str:
    """What a save that must fail says, or nothing."""
    try:
        save_step(folder, step)
    except OSError as error:
        return str(error)
    return ""


def survived(folder: Path, before: int, message: str, name: str) -> bool:
    """Whether a failed save said where it failed and left all as it was."""
    found = find_checkpoint(folder, "auto")
    rest = {path.name for path in folder.iterdir()} - {path.name for path in checkpoints(folder)}
    return bool(name in message and found and step_in(found) == before and rest <= {"latest", ".lock"})
