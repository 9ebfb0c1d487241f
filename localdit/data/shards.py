"""WebDataset shards: tar files in which the parts of a sample share their name up to the first dot.

They are read by offset, so that any sample can be had at any time. Shards that lie elsewhere are fetched
whole into a bounded cache.
"""

import hashlib
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from braceexpand import braceexpand
from filelock import FileLock

from localdit.data.images import MAX_BYTES, OTHER_SUFFIXES, SUFFIXES, BadSample
from localdit.data.index import Place, Row, Unit, row_of
from localdit.data.records import MAX_CAPTION_BYTES, Captions, captions_in_json, captions_in_text
from localdit.files import staged_file

REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://")
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # of the sample, and which part of it a member is
_EXIT = re.compile(r"exit -?\d+")  # in what webdataset says of a command
_PICTURES = (*SUFFIXES, *OTHER_SUFFIXES)
_BLOCK = 512  # bytes, of which a tar file is made
# Bytes that a header may have, a long name included: some versions of tarfile take a time quadratic in them.
_MAX_HEADER = 2**14


class ShardCache:
    """Shards that lie elsewhere, as files in a folder; those not used for longest make room for others.

    Args:
        folder: Where the files are.
        gigabytes: How much room they may take.
    """

    def __init__(self, folder: str, gigabytes: float):
        if isinstance(gigabytes, bool) or not isinstance(gigabytes, int | float) or not gigabytes > 0:
            raise ValueError(f"cache_gb must be a positive number of gigabytes, got {gigabytes!r}")
        self.folder, self.limit = Path(folder), int(gigabytes * 1e9)

    def open(self, identity: str, fetch: Callable[[Path], None]) -> BinaryIO:
        """A shard, which `fetch` writes to a path if it is not here. Raises `OSError`."""
        digest = hashlib.sha256(identity.encode()).hexdigest()
        path = self.folder / f"{digest[:32]}.tar"
        with suppress(FileNotFoundError):
            return self._open(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{digest[:2]}.lock"):  # few files, though two shards may share one
            with suppress(FileNotFoundError):
                return self._open(path)
            for leftover in self.folder.glob(f".{digest[:2]}*.tar.tmp-*"):
                leftover.unlink()  # of a killed process: a living one would hold the lock
            with ExitStack() as room:
                with staged_file(path) as staged:
                    fetch(staged)
                    # Nobody makes room between a shard's appearance under its name and its being open.
                    room.enter_context(FileLock(self.folder / "room.lock"))
                file = self._open(path)
                self._make_room(path)
                return file

    def _open(self, path: Path) -> BinaryIO:
        file = path.open("rb")  # another process may remove it from now on: what is open stays
        with suppress(FileNotFoundError):
            now = time.time_ns()  # finer than the file system's own clock
            os.utime(path, ns=(now, now))
        return file

    def _make_room(self, newest: Path) -> None:
        found = []
        for path in self.folder.glob("*.tar*"):  # those on their way take room too
            try:
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:
                continue  # removed by another process
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > self.limit and path.suffix == ".tar" and path != newest:
                path.unlink(missing_ok=True)
                total -= size


class Tars:
    """Tar files as a layout, wherever they are had from."""

    kind: ClassVar[str] = "shards"
    noun: ClassVar[str] = "shards"
    sharded: ClassVar[bool] = True

    names: Sequence[str]  # of the shards, as part of the samples' names

    def open(self, shard: int) -> BinaryIO:
        """A shard to read from. Raises `OSError`."""
        raise NotImplementedError

    def scan(self, shard: int) -> list[Row]:
        with self.open(shard) as file:
            return scan_tar(file, self.names[shard])

    def read(self, place: Place) -> bytes:
        with self.open(place.shard) as file:
            return _slice(file, place.offset, place.size)


class Shards(Tars):
    """Shards by path or URL.

    Args:
        urls: One or several: a path, where `*` stands for anything; a URL that `webdataset` opens; a command
            after "pipe:" that prints a shard. Braces stand for several: "train-{0000..0009}.tar".
        cache: Folder for shards that lie elsewhere.
        cache_gb: How much room they may take there.

    Raises:
        ValueError: There is none, or one twice.
    """

    def __init__(self, urls: str | Sequence[str], cache: str, cache_gb: float = 50):
        self.urls = [
            url for pattern in ([urls] if isinstance(urls, str) else urls) for url in _expand(pattern)
        ]
        if not self.urls:
            raise ValueError("urls must name a shard, got none")
        url, count = Counter(self.urls).most_common(1)[0]
        if count > 1:
            raise ValueError(f"each shard must be given once, got {url} {count} times")
        bare = [os.path.basename(url) for url in self.urls]
        self.names = bare if len(set(bare)) == len(bare) else self.urls
        self.cache = ShardCache(cache, cache_gb)

    def identity(self) -> dict[str, Any]:
        return {"urls": self.urls}

    def units(self) -> Iterator[Unit]:
        for shard, (url, name) in enumerate(zip(self.urls, self.names)):
            stamp = []
            if not REMOTE.match(url):
                try:
                    info = os.stat(url)
                except OSError as error:
                    raise ValueError(f"there is no shard {url}: {error.strerror}") from None
                stamp = [info.st_size, info.st_mtime_ns, info.st_ctime_ns]
            yield Unit((url, name, stamp), shard, shard)

    def open(self, shard: int) -> BinaryIO:
        url = self.urls[shard]
        if not REMOTE.match(url):
            return open(url, "rb")
        return self.cache.open(url, lambda path: _download(url, path, self.cache.limit))


def scan_tar(file: BinaryIO, shard: str) -> list[Row]:
    """The samples of a tar file, good and bad; and a bad one in the shard's name where it is damaged.

    Args:
        file: An uncompressed tar file.
        shard: Its name, with which the samples' names begin.
    """
    samples: dict[str, dict[str, list[tarfile.TarInfo]]] = {}
    damage = None
    try:
        for member in _members(file):
            if match := _KEY.fullmatch(member.name):
                samples.setdefault(match[1], {}).setdefault(match[2].lower(), []).append(member)
    except BadSample as error:
        damage = str(error)
    rows = [
        _scan_sample(file, shard, key, parts)
        for key, parts in samples.items()
        if parts.keys() & {"txt", "json", *_PICTURES}
    ]
    if damage or not rows:
        rows.append(Row.bad(shard, damage or "holds no picture"))
    return rows


def _scan_sample(file: BinaryIO, shard: str, key: str, parts: dict[str, list[tarfile.TarInfo]]) -> Row:
    name = f"{shard}/{key}"
    try:
        if key.startswith("/") or ".." in key.split("/"):
            raise BadSample("has a path that leads out of the shard")
        pictures = [part for part in _PICTURES if part in parts]
        if len(pictures) != 1:
            raise BadSample(f"has several pictures: {', '.join(pictures)}" if pictures else "has no picture")
        offset, data = _content(file, parts[pictures[0]], MAX_BYTES)
        return row_of(name, data, _captions(file, parts), offset)
    except BadSample as error:
        return Row.bad(name, error)


def _captions(file: BinaryIO, parts: dict[str, list[tarfile.TarInfo]]) -> Captions:
    part = next((part for part in ("txt", "json") if part in parts), None)
    if part is None:
        raise BadSample("has no caption")
    try:
        _, data = _content(file, parts[part], MAX_CAPTION_BYTES)
    except BadSample as error:
        raise BadSample(f"has a caption that {error}") from None
    return captions_in_text(data) if part == "txt" else captions_in_json(data)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, whose headers alone are read. Raises `BadSample` where it is damaged."""
    magic = file.read(2)
    if not magic:
        raise BadSample("is empty")
    if magic == b"\x1f\x8b":
        raise BadSample("is compressed, and cannot be read from the middle: unpack it with gunzip")
    file.seek(0)
    try:
        headers: Any = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # where some versions of tarfile go round in circles
                    raise tarfile.ReadError(f"a size of {member.size} bytes")
                yield member
            end = tar.offset
    except Exception as error:  # a hostile header can raise anything
        raise BadSample(f"is damaged or cut off: {error or type(error).__name__}") from None
    # tarfile ends without a word at a header that is none. The end of a whole file is a block of zeros.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise BadSample(f"is damaged or cut off after {end:,} bytes")


class _Headers:
    """A file of which only short pieces are read: a hostile header can announce a name of gigabytes."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _content(file: BinaryIO, members: list[tarfile.TarInfo], limit: int) -> tuple[int, bytes]:
    """Where the one member's bytes begin, and the bytes."""
    if len(members) > 1:
        raise BadSample("stands in its shard more than once")
    (member,) = members
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise BadSample("is no regular file in its shard")
    if member.size > limit:
        raise BadSample(f"has {member.size:,} bytes, more than the {limit:,} that are read")
    return member.offset_data, _slice(file, member.offset_data, member.size)


def _slice(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise BadSample("is cut off")
    return data


def _expand(pattern: str) -> list[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"urls must be texts, got {pattern!r}")
    urls = list(braceexpand(pattern))
    if REMOTE.match(pattern):
        return urls
    return [path for url in urls for path in sorted(glob(url)) or [url]]


def _download(url: str, path: Path, limit: int) -> None:
    from webdataset.gopen import gopen  # imports PyTorch

    size = 0
    try:
        with gopen(url) as stream, open(path, "wb") as file:
            while chunk := stream.read(2**20):
                size += len(chunk)
                if size > limit:
                    raise OSError(f"is larger than the cache of {limit:,} bytes")
                file.write(chunk)
    except OSError as error:
        reason = error.strerror or str(error)
        if ended := _EXIT.search(reason):  # webdataset shows how it called Popen
            reason = f"the command that fetches it (curl for a URL) ended with {ended[0]}"
        raise OSError(f"{url}: {reason}") from None
