"""The index of a source: each picture looked at once, what was found kept in a memory-mapped Arrow file.

A source is scanned in units, a file or a shard at a time. A unit is scanned again only when its key changes,
which stands for where it lies, its size and its time of change. A scan that was stopped left `.part-` files
behind, and the next one goes on from them. The index appears under its name when it is whole.
"""

import hashlib
import json
import os
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from localdit.data.images import BadSample, open_image, upright_size
from localdit.data.records import Bad, Captions, Record, check_name, printable
from localdit.files import flush

_VERSION = 1  # of what is stored, and of what counts as bad: another one, and everything is scanned anew
_BATCH = 1024  # rows, at least, that are written together
_SCHEMA = pa.schema(
    [
        ("unit", pa.binary(16)),  # the key of the unit
        ("name", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # of the picture's bytes in its shard
        ("size", pa.int64()),  # their number
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float64())),
        ("digest", pa.binary(32)),
        ("reason", pa.string()),  # of a bad sample, whose later columns are empty; else null
    ]
)


class Row(NamedTuple):
    """What a scan finds of a sample. A bad one has a reason."""

    name: str
    offset: int = 0
    size: int = 0
    width: int = 0
    height: int = 0
    captions: Sequence[str] = ()
    weights: Sequence[float] = ()
    digest: bytes | None = None
    reason: str | None = None

    @classmethod
    def bad(cls, name: str, reason: object) -> "Row":
        """Of a sample, or of a shard or line, that cannot be used."""
        return cls(printable(name), reason=printable(str(reason)))


class Unit(NamedTuple):
    """What is scanned at once."""

    key: tuple[Any, ...]  # JSON: where it lies, and what changes when its content does
    what: Any  # what `Layout.scan` wants to know
    shard: int = 0


@dataclass(frozen=True)
class Place:
    """Where the bytes of a picture lie."""

    name: str
    shard: int
    offset: int
    size: int


class Layout(Protocol):
    """How one kind of source lies on the disk, or elsewhere."""

    kind: str
    noun: str  # for several units
    sharded: bool  # whether reading from few shards at a time is faster

    def identity(self) -> dict[str, Any]:
        """JSON, which tells the source from others of its kind."""

    def units(self) -> Iterable[Unit]:
        """All there is to scan, in the order that the samples are to have. Opens no picture."""

    def scan(self, what: Any) -> list[Row]:
        """The samples of a unit, good and bad, at least one. Runs in several threads.

        Raises:
            OSError: The unit cannot be had, for now.
        """

    def read(self, place: Place) -> bytes:
        """The bytes of a picture. Raises `BadSample` or `OSError`."""


class IndexedSource:
    """A source whose samples are known by an index; see `localdit.data.sources.Source`."""

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout = path, layout
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self._columns = {name: table.column(name) for name in table.column_names}
        self._starts = [0]
        for chunk in table.column("name").chunks:
            self._starts.append(self._starts[-1] + len(chunk))
        reasons = table.column("reason")
        bad = np.flatnonzero(reasons.is_valid().to_numpy())
        self.bad: Sequence[Bad] = [
            Bad(self._at("name", row), self._at("reason", row)) for row in bad.tolist()
        ]
        # Before good sample i stand the bad rows whose number, less the bad ones before them, is at most i.
        self._bad_before = (bad - np.arange(len(bad))).tolist()
        self.sizes: NDArray[np.int32] = np.stack(
            [self._good(bad, "width"), self._good(bad, "height")], axis=1
        )
        self.shards: NDArray[np.int32] | None = self._good(bad, "shard") if layout.sharded else None

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedSource, (self.path, self.layout)  # a process maps the file anew

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, i: int) -> Record:
        """What is known of sample `i`."""
        row = self._row(i)
        return Record(
            self._at("name", row),
            self._at("width", row),
            self._at("height", row),
            tuple(self._at("captions", row)),
            tuple(self._at("weights", row)),
            self._at("digest", row).hex(),
        )

    def read(self, i: int) -> bytes:
        """The encoded picture of sample `i`.

        Raises:
            BadSample: It cannot be had any more, or is not what was indexed.
        """
        row = self._row(i)
        place = Place(*(self._at(column, row) for column in ("name", "shard", "offset", "size")))
        try:
            data = self.layout.read(place)
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(data).digest() != self._at("digest", row):
            raise BadSample("has changed since it was indexed")
        return data

    def _row(self, i: int) -> int:
        i = range(len(self))[i]  # or IndexError
        return i + bisect_right(self._bad_before, i)

    def _at(self, column: str, row: int) -> Any:
        batch = bisect_right(self._starts, row) - 1
        return self._columns[column].chunk(batch)[row - self._starts[batch]].as_py()

    def _good(self, bad: NDArray[np.integer], column: str) -> NDArray[np.int32]:
        return np.delete(self._columns[column].to_numpy(), bad)


def indexed(layout: Layout, folder: Path, progress: bool) -> IndexedSource:
    """A source with its index, which is made or brought up to date where need be.

    Of several processes that ask for the same index one makes it, and the others wait.

    Args:
        layout: Of the source.
        folder: Where indexes are kept.
        progress: Show a bar.

    Raises:
        ValueError: Units could not be had.
    """
    units = list(layout.units())
    keys = [_digest([_VERSION, unit.key]) for unit in units]
    stamp = hashlib.sha256(b"".join(keys)).hexdigest()
    path = folder / f"{layout.kind}-{_digest(layout.identity()).hex()[:16]}.arrow"
    if not _fits(path, stamp):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _fits(path, stamp):
                _write(path, stamp, layout, dict(zip(keys, units)), progress)
    return IndexedSource(path, layout)


def row_of(name: str, data: bytes, captions: Captions, offset: int = 0) -> Row:
    """The row of a picture, of which the header is read. Raises `BadSample`."""
    check_name(name)
    width, height = upright_size(open_image(data))
    return Row(name, offset, len(data), width, height, *captions, hashlib.sha256(data).digest())


def _write(path: Path, stamp: str, layout: Layout, units: dict[bytes, Unit], progress: bool) -> None:
    parts = sorted(path.parent.glob(f"{path.stem}.part-*"))
    known = _Known([*parts, *path.parent.glob(f"{layout.kind}-*.arrow")])
    number = 1 + max((int(old.name.rpartition("-")[2]) for old in parts), default=0)
    part = path.with_name(f"{path.stem}.part-{number:04d}")
    schema = _SCHEMA.with_metadata({"stamp": stamp, "source": json.dumps(layout.identity())})
    failed: list[str] = []
    with (
        warnings.catch_warnings(),
        pa.OSFile(str(part), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF data, without a file's name
        rows: list[dict[str, Any]] = []
        for key, unit, found in _scan(layout, units, known, progress):
            if isinstance(found, OSError):
                failed.append(str(found))
                continue
            rows += [{"unit": key, "shard": unit.shard, **row._asdict()} for row in found]
            if len(rows) >= _BATCH:  # a unit is never split, so that a part holds whole ones
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    flush(part)
    if not failed:
        os.replace(part, path)
        flush(path.parent)
    for old in parts:  # the new one holds what they did
        old.unlink()
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(units)} {layout.noun} could not be had (the others are indexed, and will "
            f"not be read again), the first: {failed[0]}"
        )


def _scan(
    layout: Layout, units: dict[bytes, Unit], known: "_Known", progress: bool
) -> Iterator[tuple[bytes, Unit, list[Row] | OSError]]:
    """The rows of each unit in order, those of some units ahead being read meanwhile."""
    threads = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[bytes, Unit, Future[list[Row]] | None]] = deque()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=len(units), desc="indexing", unit=f" {layout.noun}", disable=None if progress else True
        ) as bar,
    ):

        def take() -> tuple[bytes, Unit, list[Row] | OSError]:
            key, unit, future = waiting.popleft()
            bar.update()
            try:
                return key, unit, future.result() if future else known.rows(key)
            except OSError as error:
                return key, unit, error

        try:
            for key, unit in units.items():
                waiting.append((key, unit, None if key in known else pool.submit(layout.scan, unit.what)))
                if len(waiting) > 4 * threads:
                    yield take()
            while waiting:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)  # whoever stops waits for what has begun alone


class _Known:
    """The rows of earlier scans, finished or not, by the key of their unit."""

    def __init__(self, paths: Iterable[Path]):
        self._places: dict[bytes, tuple[pa.RecordBatch, int, int]] = {}
        for path in paths:
            for batch in _batches(path):
                keys = batch.column("unit").to_pylist()
                start = 0
                for stop in range(1, len(keys) + 1):
                    if stop == len(keys) or keys[stop] != keys[start]:
                        self._places[keys[start]] = (batch, start, stop)
                        start = stop
        self._decoded: tuple[pa.RecordBatch | None, list[Row]] = (None, [])

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def rows(self, key: bytes) -> list[Row]:
        batch, start, stop = self._places[key]
        if self._decoded[0] is not batch:  # units come in about the order that they were written in
            columns = [batch.column(name).to_pylist() for name in Row._fields]
            self._decoded = batch, [Row(*values) for values in zip(*columns)]
        return self._decoded[1][start:stop]


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """What can be read of an index, whole or not: the file format is a stream with eight bytes before it."""
    try:
        file = pa.memory_map(str(path))
        file.seek(8)
        reader = pa.ipc.open_stream(file)
        if reader.schema.equals(_SCHEMA):
            yield from reader
    except (pa.ArrowInvalid, OSError, EOFError):
        return  # it ends here


def _fits(path: Path, stamp: str) -> bool:
    try:
        with pa.memory_map(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
    except (pa.ArrowInvalid, OSError):
        return False  # there is none, or it is damaged
    return schema.equals(_SCHEMA) and (schema.metadata or {}).get(b"stamp") == stamp.encode()


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:16]
