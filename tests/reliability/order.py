"""In which order a save reaches the disk, by watching the calls that it makes."""

import hashlib
import json
import os
from pathlib import Path
from unittest.mock import patch

from localdit.files import MANIFEST

from . import Outcome, experiment
from .toys import save_step


@experiment(
    "R2",
    "Every file is on the disk before the manifest, the manifest before the renaming, the renaming before "
    "`latest`, and `latest` before an old checkpoint goes",
    full=20,
    small=1,
)
def order_of_syncs(folder: Path, trials: int) -> Outcome:
    passed, last = 0, ""
    for step in range(trials + 2):  # from the third on, one is pruned
        calls = watch(folder, step)
        wrong = misplaced(folder, f"step-{step:08d}", f"step-{step - 2:08d}", calls)
        last = wrong or last
        passed += step >= 2 and not wrong
    return Outcome(
        trials, passed, last or "`fsync` of each file, `MANIFEST.json`, the folder, and its parent"
    )


def watch(folder: Path, step: int) -> list[tuple[str, ...]]:
    """Save, and record each `fsync` (with the SHA-256 of what is in the file by then) and each renaming."""
    calls: list[tuple[str, ...]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        calls.append(("sync", short(path), content))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        calls.append(("rename", short(source), short(target)))
        rename(source, target)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(("replace", short(source), short(target)))
        replace(source, target)

    def short(path: Path) -> str:
        return Path(path).relative_to(folder.parent).as_posix().replace(f".tmp-{os.getpid()}", ".tmp")

    with patch.multiple(os, fsync=note_sync, rename=note_rename, replace=note_replace):
        save_step(folder, step)
    return calls


def misplaced(folder: Path, name: str, pruned: str, calls: list[tuple[str, ...]]) -> str:
    """What is not in its place, or nothing."""
    run = folder.name
    listed = json.loads((folder / name / MANIFEST).read_text())["files"]
    manifest = hashlib.sha256((folder / name / MANIFEST).read_bytes()).hexdigest()
    latest = hashlib.sha256(f"{name}\n".encode()).hexdigest()
    order: list[tuple[str, ...]] = [
        *(("sync", f"{run}/{name}.tmp/{file}", entry["sha256"]) for file, entry in sorted(listed.items())),
        ("sync", f"{run}/{name}.tmp/{MANIFEST}", manifest),
        ("sync", f"{run}/{name}.tmp", "folder"),
        ("rename", f"{run}/{name}.tmp", f"{run}/{name}"),
        ("sync", run, "folder"),
        ("sync", f"{run}/.latest.tmp", latest),
        ("replace", f"{run}/.latest.tmp", f"{run}/latest"),
        ("sync", run, "folder"),
    ]
    if int(pruned.removeprefix("step-")) >= 0:
        order.append(("rename", f"{run}/{pruned}", f"{run}/{pruned}.tmp"))
    return next((f"{got} where {must} must be" for got, must in zip(calls, order) if got != must), "") or (
        "" if len(calls) == len(order) else f"{len(calls)} calls, must be {len(order)}"
    )
