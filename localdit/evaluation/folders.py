"""Folders of pictures that are measured: which they are, and how they are read."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from localdit.data.images import MAX_BYTES, OTHER_SUFFIXES, SUFFIXES, BadSample, decode_image

T = TypeVar("T")


def find_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and below it, in the order of their names.

    Hidden files do not count, and links to folders are not followed. Pictures in formats that are not read
    are among them, so that they are missed and not passed over.

    Raises:
        ValueError: It is no folder, or holds fewer than two: too few to measure anything by.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")

    def fail(error: OSError) -> None:
        raise error  # or what cannot be listed would be left out without a word

    found = sorted(
        path
        for parent, _, names in os.walk(folder, onerror=fail)
        for path in (Path(parent, name) for name in names if not name.startswith("."))
        if is_picture(path)
    )
    if len(found) < 2:
        raise ValueError(f"{folder} must hold 2 pictures at least ({', '.join(SUFFIXES)}), got {len(found)}")
    return found


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, going by its name."""
    return path.suffix[1:].lower() in (*SUFFIXES, *OTHER_SUFFIXES) and path.is_file()


def read_batches(
    paths: Sequence[Path], size: int, convert: Callable[[Image.Image], T], bad: dict[Path, str]
) -> Iterator[tuple[list[Path], list[T]]]:
    """Read pictures, several at a time, and give them in batches and in order.

    Args:
        paths: The pictures.
        size: Paths to a batch; what cannot be read is left out of its batch.
        convert: What is wanted of a decoded picture. Runs in the threads that read.
        bad: Takes the pictures that cannot be read, and why, in words that follow their names.
    """

    def read(path: Path) -> tuple[Path, T] | None:
        try:
            if path.stat().st_size > MAX_BYTES:
                raise BadSample(f"has more than the {MAX_BYTES:,} bytes that are read")
            return path, convert(decode_image(path.read_bytes()))
        except BadSample as error:
            bad[path] = str(error)
        except OSError as error:
            bad[path] = f"cannot be opened: {error.strerror}"
        return None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), size):
            batch = [item for item in pool.map(read, paths[start : start + size]) if item is not None]
            if batch:
                yield [path for path, _ in batch], [item for _, item in batch]
