"""Decompression bombs: small files of huge pictures, put before everything that reads pictures."""

import random
import resource
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

from hostile_files import BOMBS, jpeg_of, picture, png, tar, webp_of
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.WebPImagePlugin import WebPImageFile

from localdit.data.images import MAX_PIXELS
from localdit.data.sources import open_source
from localdit.evaluation.folders import read_batches
from localdit.pictures import read_picture, read_settings

from . import Outcome, experiment
from .toys import apart

SECONDS, MEBIBYTES = 2, 50


@experiment(
    "R16",
    "A picture of too many pixels is refused by its header, before a pixel is decoded, in less than two "
    "seconds and 50 MB, wherever it is put",
    full=300,
    small=4,
)
def bombs(folder: Path, trials: int) -> Outcome:
    """Of a few kilobytes; one of them is whole, and would decode to what it says."""
    tried = [(random.choice([*BOMBS, *MADE]), random.choice(list(ENTRIES))) for _ in range(trials)]
    items = ((entry, folder / str(i), (BOMBS | MADE)[kind]()) for i, (kind, entry) in enumerate(tried))
    passed, grown, slowest, largest, failed = 0, 0.0, 0.0, 0, set()
    for (kind, entry), answer in zip(tried, apart(refusal, items)):
        if answer is None:
            failed.add(f"{kind}, {entry}: the process died")
            continue
        reason, size, mebibytes, seconds, decoded = answer
        told = "pixels" in reason or (kind == "fits" and "is not a picture" in reason)
        grown += mebibytes
        if told and not decoded and grown < MEBIBYTES and seconds < SECONDS:
            passed += 1
        else:
            failed.add(f"{kind}, {entry}: {reason or 'accepted'} ({mebibytes:.0f} MiB, {seconds:.1f} s)")
        slowest, largest = max(slowest, seconds), max(largest, size)
    note = (
        f"PNG, JPEG, WEBP and FITS of at most {largest // 1000} kB; in {', '.join(ENTRIES)}; the peak of the "
        f"process grew by {grown:.1f} MiB over all; slowest {slowest:.2f} s of the CPU"
    )
    return Outcome(trials, passed, "; ".join([note, *sorted(failed)]))


def refusal(entry: str, place: Path, bomb: bytes) -> tuple[str, int, float, float, bool]:
    """Why a bomb is refused, its bytes, by how many MiB the peak of this process grew meanwhile, seconds of
    the CPU, and whether pixels were read."""
    ENTRIES[entry](place / "good", picture())  # takes what is loaded and allocated once
    before, started = peak(), time.process_time()
    with patch.object(ImageFile, "load") as one, patch.object(WebPImageFile, "load") as other:
        reason = ENTRIES[entry](place / "bomb", bomb)
    return (
        reason,
        len(bomb),
        peak() - before,
        time.process_time() - started,
        one.called or other.called,
    )


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- Bombs --------------------------------------------------------------------------------------------------


def sides(most: int) -> tuple[int, int]:
    """Width and height, each at most so many, of more pixels than are read."""
    while True:
        width, height = (round(most ** random.uniform(0.3, 1)) for _ in range(2))
        if width * height > MAX_PIXELS:
            return width, height


@cache
def whole_png() -> bytes:
    """A PNG of 50,000 x 50,000 pixels of one bit, all of them there."""
    return png(50_000, 50_000, bytes(50_000 * (1 + 50_000 // 8)), depth=1, color=0)


MADE: dict[str, Callable[[], bytes]] = {
    "random PNG": lambda: png(*sides(2**31 - 1), bytes(10**6)),
    "random JPEG": lambda: jpeg_of(*sides(65_500)),
    "random WEBP": lambda: webp_of(*sides(2**16 - 1)),
    "whole PNG": whole_png,
}


# --- Ways in: each puts a picture there, and gives the reason why it is refused -----------------------------


def in_folder(place: Path, data: bytes) -> str:
    put(place / "pictures", data)
    return in_source(place, str(place / "pictures"))


def in_shard(place: Path, data: bytes) -> str:
    place.mkdir(parents=True)
    (place / "0.tar").write_bytes(
        tar(("a.png", data), ("a.txt", b"a"), ("b.png", picture()), ("b.txt", b"b"))
    )
    return in_source(place, str(place / "0.tar"))


def in_source(place: Path, spec: str) -> str:
    source = open_source(spec, index=place / "index", max_bad_fraction=1)
    return "".join(bad.reason for bad in source.bad)


def to_start_from(place: Path, data: bytes) -> str:
    return told(read_picture, put(place, data))


def with_settings(place: Path, data: bytes) -> str:
    return told(read_settings, put(place, data))


def to_measure(place: Path, data: bytes) -> str:
    bad: dict[Path, str] = {}
    list(read_batches([put(place, data)], 1, Image.Image.copy, bad))
    return "".join(bad.values())


def put(place: Path, data: bytes) -> Path:
    """The path of the picture; a good one stands beside it."""
    place.mkdir(parents=True)
    for name, content in (("a.png", data), ("b.png", picture()), ("a.txt", b"a"), ("b.txt", b"b")):
        (place / name).write_bytes(content)
    return place / "a.png"


def told(read: Callable[[str], object], path: Path) -> str:
    try:
        read(str(path))
    except ValueError as error:
        return str(error)
    return ""


ENTRIES: dict[str, Callable[[Path, bytes], str]] = {
    "a folder": in_folder,
    "a shard": in_shard,
    "`generate --image`": to_start_from,
    "`generate --from-png`": with_settings,
    "`evaluate`": to_measure,
}
