"""Files and folders that are whole or absent, and that can be checked: written beside their place, flushed to
the disk, renamed, and for folders listed with sizes and SHA-256 in a manifest.

Whatever stops the writing (an error, a kill, a power cut), what stood under the name before is there still.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

STAGED = re.compile(r".+\.tmp-\d+")  # names of what is being written, or was when its process died
MANIFEST = "MANIFEST.json"  # {"files": {"part/name": {"bytes": 12, "sha256": "..."}}}


@contextmanager
def staged_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `target`, `<name>.tmp-<pid>`, which becomes `target` when the block ends well.

    By then every file in it is on the disk and listed in its `MANIFEST.json`, which is written last. An
    exception leaves nothing behind; a kill leaves the `.tmp-` folder, which nobody takes for a `target`.

    Args:
        replace: A folder that is `target` already gives way, and is then deleted. Two renames do it. A kill
            between them leaves no `target`, but both folders, whole: the new one as `<name>.tmp-<pid>`, the
            old one as `<name>.replaced-<pid>`, which nobody clears away. An exception puts the old one back.

    Raises:
        FileExistsError: There is a `target` already that is not to be replaced, or no folder; or another
            process has made one in the meantime.
    """
    if not (replace and target.is_dir() and not target.is_symlink()):
        _refuse_existing(target)
    _make_folder(target.parent)
    staged = _staged(target)
    shutil.rmtree(staged, ignore_errors=True)  # of a killed process that had the same number
    staged.mkdir()
    try:
        yield staged
        mode = staged.stat().st_mode & 0o666  # as any new file here; safetensors makes its own private
        paths = sorted(staged.rglob("*"))
        for path in paths:
            if path.is_file():
                path.chmod(mode)
            flush(path)
        (staged / MANIFEST).write_text(json.dumps({"files": _describe(staged)}, indent=1), encoding="utf-8")
        flush(staged / MANIFEST)
        flush(staged)
        with _out_of_the_way(target) if replace else nullcontext():
            try:
                staged.rename(target)
            except OSError:
                _refuse_existing(target)
                raise
            flush(target.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A file beside `target`, `.<name>.tmp-<pid>`, to fill. It replaces `target` when the block ends well.

    An exception leaves `target` as it was and nothing else behind. A kill leaves the file: hidden, since
    programs that go through a folder may look at how a name begins (`12.png`) and not at how it ends.
    """
    _make_folder(target.parent)
    staged = _staged(target.with_name(f".{target.name}"))
    try:
        staged.touch()
        mode = staged.stat().st_mode & 0o666  # as any new file here; safetensors makes its own private
        yield staged
        staged.chmod(mode)
        flush(staged)
        staged.replace(target)
        flush(target.parent)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one process that writes to a folder, and begin by clearing away what killed ones left in it.

    The lock is free again when the block ends or the process does, in whatever way.

    Raises:
        BlockingIOError: Another process holds it.
    """
    _make_folder(folder)
    with open(folder / ".lock", "a+b") as file:
        try:
            if sys.platform == "win32":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                # Not inherited, unlike flock's: the workers that a killed process leaves do not hold it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            message = "is in use by another process, which must end first"
            raise BlockingIOError(errno.EAGAIN, message, str(folder)) from None
        for path in folder.iterdir():
            if STAGED.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def flush(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on the disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows keeps folders by itself
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problems(folder: Path) -> list[str]:
    """What is not as the folder's manifest says: a sentence each, which begins with the name of the file."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the folder was never finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} is damaged ({type(error).__name__}: {error})"]

    def flaw(name: str) -> str | None:
        if name not in files:
            return "is missing"
        if name not in wanted:
            return "is not in the manifest"
        size, digest = wanted[name]
        try:
            if (found := files[name].stat().st_size) != size:
                return f"has {found} bytes, must have {size}"
            return None if _sha256(files[name]) == digest else "is damaged: its SHA-256 is another"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    files = files_in(folder)
    names = sorted(files.keys() | wanted.keys())
    with ThreadPoolExecutor() as pool:
        return [f"{name} {found}" for name, found in zip(names, pool.map(flaw, names)) if found]


def files_in(folder: Path) -> dict[str, Path]:
    """All files in a folder and the folders in it, by name. Not its manifest, nor hidden files, which file
    managers and network file systems leave."""
    paths = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = files_in(folder)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_sha256, files.values())
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(files.items(), digests)
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _staged(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{os.getpid()}")


@contextmanager
def _out_of_the_way(target: Path) -> Iterator[None]:
    """Move a folder aside, if it is there, while another takes its place; delete it, or put it back."""
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)  # by a killed process of the same number; superseded
        target.rename(old)
    try:
        yield
    finally:
        if old.is_dir() and not target.exists():
            old.rename(target)
        elif old.is_dir():  # under a name that is cleared away if this is killed
            shutil.rmtree(old.rename(_staged(old)), ignore_errors=True)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "is there already and is never overwritten", str(target))


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that a power cut does not unmake them."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(exist_ok=True)
        flush(missing.parent)
