"""Folders and shards in which much is bad: what is left out, what is said of it, and what stays as it was."""

import io
import json
import os
import random
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from accelerate.state import AcceleratorState
from diffusers.utils import logging
from hostile_files import BOMBS, TRUNCATED, UNREADABLE, picture, raw_header, sample, tar

from localdit.data.cache import open_cache
from localdit.data.records import MAX_CAPTION_BYTES
from localdit.data.sources import open_source
from localdit.training.checkpoint import find_checkpoint
from localdit.training.config import Config
from localdit.training.encode import EncodeConfig
from localdit.training.loop import train

from . import Outcome, experiment
from .bombs import peak
from .caches import fill
from .toys import apart, denoising_run, save_encoders

Reasons = dict[str, str]  # of bad samples by their name: words that the reason must hold

# --- A folder -----------------------------------------------------------------------------------------------

FILES = 100
BATCH = 4
CAPTIONS: dict[str, tuple[bytes | None, str]] = {  # None: there is no file
    "latin1": (b"caf\xe9", "has a caption that is not UTF-8"),
    "blank": (b" \n\t\n", "has no caption"),
    "no-text": (b"", "has no caption"),
    "missing": (None, "has no caption"),
    "long": (b"a" * (MAX_CAPTION_BYTES + 1), "has a caption that has more than 1,048,576 bytes"),
}


@experiment(
    "R17",
    "Of a folder of which 1 % each is bad in many ways, encoding and training use the rest in its order and "
    "list exactly the bad ones, with the reason; above `max_bad_fraction` they stop; no file changes",
    full=10,
    small=None,
)
def bad_samples(folder: Path, trials: int) -> Outcome:
    logging.set_verbosity_error()
    encoders, passed, failed = save_encoders(folder / "encoders"), 0, set()
    for trial in range(trials):
        pictures = folder / f"{trial}" / "pictures"
        good, bad, cut = fill_folder(pictures)
        before = snapshot(pictures)
        wrong = {
            *wrong_in_source(pictures, good, bad, cut),
            *wrong_in_cache(pictures, good, bad | cut, encoders),
            *wrong_in_training(pictures, bad, cut, encoders),
        }
        if snapshot(pictures) != before:
            wrong.add("a file changed")
        failed |= wrong
        passed += not wrong
    note = f"{len(bad) + len(cut)} of {FILES} files bad, each in another way"
    return Outcome(trials, passed, "; ".join([note, *sorted(failed)]))


def fill_folder(folder: Path) -> tuple[list[str], Reasons, Reasons]:
    """A hundred captioned pictures. Returns the names of the good ones, in order; the bad ones that can be
    told without decoding; those that cannot."""
    folder.mkdir(parents=True)
    secret = folder.parent / "secret.png"
    secret.write_bytes(picture())
    names = random.sample([f"{i:03d}.png" for i in range(FILES)], FILES)
    left, bad, cut = iter(names), dict[str, str](), dict[str, str]()

    def put(data: bytes, caption: bytes | None = b"a red circle") -> str:
        name = next(left)
        (folder / name).write_bytes(data)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
        return name

    for make, reason in UNREADABLE.values():
        bad[put(make())] = reason
    for kind, make in BOMBS.items():
        bad[put(make())] = "is not a picture" if kind == "fits" else "pixels"
    for caption, reason in CAPTIONS.values():
        bad[put(picture(), caption)] = reason
    for make_special, reason in (
        (lambda path: path.symlink_to(secret), "is a link that leads out of the folder"),
        (os.mkfifo, "is no regular file"),
    ):
        name = put(b"")
        (folder / name).unlink()
        make_special(folder / name)
        bad[name] = reason
    for make in TRUNCATED.values():
        cut[put(make())] = "is damaged"
    kinds = random.choices(("PNG", "JPEG", "WEBP"), k=FILES - len(bad) - len(cut))
    good = sorted(put(picture(random.randint(20, 90), random.randint(20, 90), kind)) for kind in kinds)
    return good, bad, cut


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Of each file in a folder when it was changed, and the SHA-256 of what is in it."""
    return {
        path.name: (
            path.lstat().st_mtime_ns,
            sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in folder.iterdir()
    }


def wrong_in_source(pictures: Path, good: list[str], bad: Reasons, cut: Reasons) -> Iterator[str]:
    """What is cut off is among the good samples: that is seen when it is decoded."""
    spec, index = str(pictures), pictures.parent / "index"
    source = open_source(spec, index=index, max_bad_fraction=len(bad) / FILES)
    names = [source.record(i).name for i in range(len(source))]
    unchanged = all(source.read(i) == (pictures / name).read_bytes() for i, name in enumerate(names))
    if names != sorted([*good, *cut]) or not unchanged:
        yield "a source: not the good samples in their order"
    if not agree(((one.name, one.reason) for one in source.bad), bad):
        yield "a source: not the bad samples"
    too_few = (len(bad) - 1) / FILES
    if not stops(lambda: open_source(spec, index=index, max_bad_fraction=too_few), "are bad"):
        yield "a source: does not stop"


def wrong_in_cache(pictures: Path, good: list[str], bad: Reasons, encoders: dict[str, str]) -> Iterator[str]:
    config = EncodeConfig(
        source=str(pictures),
        cache=str(pictures.parent / "cache"),
        **encoders,  # type: ignore[arg-type]
        resolution=64,
        samples_per_shard=16,
        num_workers=2,
        max_bad_fraction=len(bad) / FILES,
    )
    too_few = replace(config, max_bad_fraction=(len(bad) - 1) / FILES)
    if not stops(lambda: fill(too_few), "cannot be used"):
        yield "encoding: does not stop"
    fill(config)
    cache = open_cache(config.cache)
    if not agree(cache.bad, bad):
        yield "encoding: not the bad samples"
    # Within a shard, pictures of one size stand together.
    places = [(cache.shards[i], cache.groups[i], cache.name(i)) for i in range(len(cache))]
    names = [name for _, _, name in sorted(places, key=lambda place: (place[0], place[2]))]
    if places != sorted(places) or names != good:
        yield "encoding: not the good samples in their order"


def wrong_in_training(pictures: Path, bad: Reasons, cut: Reasons, encoders: dict[str, str]) -> Iterator[str]:
    """Two passes, encoded as they go. What is cut off is passed over when it comes."""
    run, data = pictures.parent / "run", {**encoders, "max_bad_fraction": len(bad) / FILES}
    steps = 2 * (FILES - len(bad)) // BATCH + 1
    config = denoising_run(
        run,
        str(pictures),
        data,
        {"on_the_fly": True},
        max_steps=steps,
        batch_size=BATCH,
        max_bad_fraction=0.1,
    )
    strict = replace(config, train=replace(config.train, max_bad_fraction=0.0))
    if not stops(lambda: train_quietly(strict), "samples are unusable"):
        yield "training: does not stop"
    shutil.rmtree(run)
    train_quietly(config)
    found = find_checkpoint(run, "auto")
    if found is None or found.name != f"step-{steps:08d}":
        yield "training: does not end"
    lines = [json.loads(line) for line in (run / "unusable-0.jsonl").read_text().splitlines()]
    if not agree({(line["name"], line["reason"]) for line in lines}, cut):
        yield "training: not the bad samples"


def train_quietly(config: Config) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        train(config)


def agree(found: Iterable[tuple[str, str]], expected: Reasons) -> bool:
    """Whether these samples are listed, each once, for these reasons."""
    pairs = sorted(found)
    return [name for name, _ in pairs] == sorted(expected) and all(
        expected[name] in reason for name, reason in pairs
    )


def stops(work: Callable[[], object], words: str) -> bool:
    try:
        work()
    except ValueError as error:
        return words in str(error)
    return False


# --- Shards -------------------------------------------------------------------------------------------------

SECONDS, MEBIBYTES, GIGABYTES = 10, 50, 2**31
Pictures = dict[str, bytes]  # of a shard, by their keys
# The good samples that a shard still has, and words on each of the others; None stands for the shard itself.
Expected = tuple[Iterable[str], dict[str | None, str]]


@experiment(
    "R18",
    "A shard that is cut off, empty or damaged, or a sample in it that is incomplete, there twice or of 2 GB "
    "is named with the reason, in less than 50 MB; all other samples and shards are used",
    full=300,
    small=10,
)
def bad_shards(folder: Path, trials: int) -> Outcome:
    (folder / "first").mkdir()
    (folder / "first" / "0.tar").write_bytes(tar(*members({"a": picture()})))
    drawn = [fill_shards(folder / f"{trial}") for trial in range(trials)]
    answers = apart(read_shards, [(folder / f"{place}",) for place in ("first", *range(trials))], seconds=120)
    next(answers)  # takes what is loaded and allocated once
    passed, grown, slowest, failed = 0, 0.0, 0.0, Counter[str]()
    for (kind, good, bad), answer in zip(drawn, answers, strict=True):
        if answer is None:
            failed[f"{kind}: died or hung"] += 1
            continue
        read, listed, refused, mebibytes, seconds = answer
        grown, slowest = grown + mebibytes, max(slowest, seconds)
        if read == good and agree(listed, bad) and refused and grown < MEBIBYTES and seconds < SECONDS:
            passed += 1
        else:
            failed[kind] += 1
    note = (
        f"{len(DAMAGES)} kinds of damage, beside one to three whole shards; the peak of the process grew by "
        f"{grown:.1f} MiB over all; slowest {slowest:.2f} s of the CPU"
    )
    return Outcome(trials, passed, "; ".join([note, *sorted(f"{kind} ({n})" for kind, n in failed.items())]))


def fill_shards(place: Path) -> tuple[str, list[tuple[str, str, str]], Reasons]:
    """Some shards, of which one is damaged. Returns the kind of damage; of each good sample its name, the
    SHA-256 of its picture and its caption, in order; the bad ones."""
    place.mkdir()
    count, kind = random.randint(2, 4), random.choice(list(DAMAGES))
    spoiled = random.randrange(count)
    good, bad = [], dict[str, str]()
    for number in range(count):
        name = f"{number}.tar"
        pictures = {key: picture() for key in "abc"[: 3 if number == spoiled else random.randint(1, 3)]}
        keys: Iterable[str] = pictures
        if number == spoiled:
            keys, reasons = DAMAGES[kind](place / name, pictures)
            bad = {f"{name}/{key}" if key else name: words for key, words in reasons.items()}
        else:
            (place / name).write_bytes(tar(*members(pictures)))
        good += [(f"{name}/{key}", sha256(pictures[key]).hexdigest(), f"of {key}") for key in keys]
    return kind, good, bad


def members(pictures: Pictures) -> list[tuple[str, bytes]]:
    """The members of a shard: of each sample the picture, then the caption."""
    parts = (((f"{key}.png", data), (f"{key}.txt", f"of {key}".encode())) for key, data in pictures.items())
    return [member for pair in parts for member in pair]


def read_shards(place: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]], bool, float, float]:
    """Of each sample its name, the SHA-256 of its picture and its caption; the bad ones; whether there is an
    error that names the first of these where none may be. By how many MiB the peak of this process grew
    meanwhile, and the seconds of the CPU."""
    before, started = peak(), time.process_time()
    spec, index = f"{place}/*.tar", place / "index"
    source = open_source(spec, index=index, max_bad_fraction=1)
    read = []
    for i in range(len(source)):
        record = source.record(i)
        read.append((record.name, sha256(source.read(i)).hexdigest(), *record.captions))
    listed = [(one.name, one.reason) for one in source.bad]
    refused = not listed or stops(lambda: open_source(spec, index=index, max_bad_fraction=0), listed[0][0])
    return read, listed, refused, peak() - before, time.process_time() - started


def cut_off(path: Path, pictures: Pictures) -> Expected:
    """Anywhere before its end."""
    data = tar(*members(pictures), end=False)
    length = random.randrange(1, len(data))
    path.write_bytes(data[:length])
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        spans = {one.name: (one.offset_data, one.offset_data + one.size) for one in file}
    good, bad = [], dict[str | None, str]()
    for key in pictures:
        (picture_at, picture_end), (text_at, text_end) = spans[f"{key}.png"], spans[f"{key}.txt"]
        if text_end <= length:
            good.append(key)
        elif picture_at <= length:  # its header is there
            bad[key] = "has no caption" if length < text_at else "has a caption that is cut off"
            bad[key] = "is cut off" if length < picture_end else bad[key]
    return good, bad | {None: "is damaged or cut off"}


def empty(path: Path, pictures: Pictures) -> Expected:
    path.touch()
    return (), {None: "is empty"}


def end_missing(path: Path, pictures: Pictures) -> Expected:
    path.write_bytes(tar(*members(pictures), end=False))
    return pictures, {None: "is damaged or cut off after"}


def header_overwritten(path: Path, pictures: Pictures) -> Expected:
    data = bytearray(tar(*members(pictures)))
    start = len(tar(*members(pictures)[:4], end=False))
    data[start : start + 512] = random.randbytes(512)
    path.write_bytes(data)
    return "ab", {None: "is damaged or cut off"}


def part_missing(path: Path, pictures: Pictures) -> Expected:
    part, words = random.choice((("png", "has no picture"), ("txt", "has no caption")))
    path.write_bytes(tar(*(member for member in members(pictures) if member[0] != f"b.{part}")))
    return "ac", {"b": words}


def caption_not_utf8(path: Path, pictures: Pictures) -> Expected:
    parts = dict(members(pictures)) | {"b.txt": b"caf\xe9 " + random.randbytes(3)}
    path.write_bytes(tar(*parts.items()))
    return "ac", {"b": "has a caption that is not UTF-8"}


def key_twice(path: Path, pictures: Pictures) -> Expected:
    path.write_bytes(tar(*members(pictures), *sample("b")))
    return "ac", {"b": "stands in its shard more than once"}


def header_of_gigabytes(path: Path, pictures: Pictures) -> Expected:
    """A member of 2 GB of which there is nothing but the header."""
    kind = random.choice((tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE))
    path.write_bytes(tar(*members(pictures), end=False) + raw_header("d.png", GIGABYTES, kind) + bytes(2048))
    if kind == tarfile.REGTYPE:
        return pictures, {"d": f"has {GIGABYTES:,} bytes", None: "is damaged or cut off"}
    return pictures, {None: f"is damaged or cut off: a header of {GIGABYTES:,} bytes"}


def member_of_gigabytes(path: Path, pictures: Pictures) -> Expected:
    """A picture or a caption of 2 GB that is there, as a hole in the file."""
    part, words = random.choice((("png", "has"), ("txt", "has a caption that has")))
    parts = members(pictures)
    with open(path, "wb") as file:
        file.write(tar(*(member for member in parts if member[0] != f"b.{part}"), end=False))
        file.write(raw_header(f"b.{part}", GIGABYTES))
        file.seek(GIGABYTES, os.SEEK_CUR)
        file.write(tar())
    return "ac", {"b": f"{words} {GIGABYTES:,} bytes"}


DAMAGES: dict[str, Callable[[Path, Pictures], Expected]] = {
    "cut off": cut_off,
    "empty": empty,
    "end missing": end_missing,
    "header overwritten": header_overwritten,
    "part missing": part_missing,
    "caption not UTF-8": caption_not_utf8,
    "key twice": key_twice,
    "header of 2 GB": header_of_gigabytes,
    "member of 2 GB": member_of_gigabytes,
}
