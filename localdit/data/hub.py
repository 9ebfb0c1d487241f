"""Datasets of Hugging Face's `datasets`, from the hub or a folder.

They are data alone here: no code of a dataset runs, and a picture is the bytes in its row, or a file that
`datasets` itself has downloaded or that lies in the folder given.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import datasets
from huggingface_hub.constants import HF_HUB_CACHE

from localdit.data.folders import read_file
from localdit.data.images import MAX_BYTES, BadSample
from localdit.data.index import Place, Row, Unit, row_of
from localdit.data.records import CAPTION_KEYS, captions_in
from localdit.data.shards import ShardCache, Tars

_ROWS = 256  # that are scanned at once


def open_dataset(
    path: str,
    cache: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    image_column: str = "image",
    caption_columns: str | Sequence[str] | None = None,
    streaming: bool = False,
    cache_gb: float = 50,
) -> "Rows | Stream":
    """A dataset as a layout.

    Args:
        path: OWNER/NAME on the hub, or a folder of Parquet files, pictures, ... or of `save_to_disk`.
        cache: Folder for what is streamed.
        name: Which of several configurations.
        split: Which split, or part of one: "train[:10%]".
        revision: Branch, tag or commit on the hub.
        image_column: The pictures.
        caption_columns: The captions, of one column or several, each with a text or a list as
            `localdit.data.records.captions_in` takes it. By default "captions", "caption" or "text".
        streaming: Download the dataset's files one by one as they are needed, not all of them first.
        cache_gb: How much room streamed files may take.

    Raises:
        ValueError: There is no such split or column.
        OSError: There is no such dataset.
    """
    identity = {
        "path": os.path.realpath(path) if os.path.isdir(path) else path,
        "name": name,
        "split": split,
        "revision": revision,
        "columns": [image_column, caption_columns],
        "streaming": streaming,
    }
    if os.path.isfile(os.path.join(path, "state.json")):
        if (name, split, revision, streaming) != (None, "train", None, False):
            raise ValueError(
                f"{path} is a folder of save_to_disk, which is one split: give no name, split, revision "
                "or streaming"
            )
        dataset: Any = datasets.load_from_disk(path)
    else:
        dataset = datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    there = dataset.column_names or []
    if caption_columns is None:
        caption_columns = [key for key in CAPTION_KEYS if key in there][:1]
    captions = [caption_columns] if isinstance(caption_columns, str) else list(caption_columns)
    if missing := {image_column, *captions} - set(there):
        raise ValueError(
            f"{path} must have a column {min(missing)}, got {', '.join(there)}: name its columns"
        )
    if not captions:
        raise ValueError(f"caption_columns must name columns of {path}: {', '.join(there)}")
    dataset = dataset.select_columns([image_column, *captions])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if streaming:
        return Stream(dataset, identity, image_column, captions, ShardCache(cache, cache_gb))
    return Rows(dataset, identity, image_column, captions)


class Rows:
    """A dataset at hand, whose rows are read by number."""

    kind: ClassVar[str] = "hf"
    noun: ClassVar[str] = "pieces"
    sharded: ClassVar[bool] = False

    def __init__(
        self, dataset: datasets.Dataset, identity: dict[str, Any], image: str, captions: Sequence[str]
    ):
        self.dataset, self.image, self.captions = dataset, image, captions
        self._identity = identity
        # Where the files that rows name may lie: a row of a stranger's could name any file of this machine.
        folders = (identity["path"], HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
        self._folders = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def units(self) -> Iterator[Unit]:
        stamps = []
        for file in self.dataset.cache_files:
            info = os.stat(file["filename"])
            stamps.append((file["filename"], info.st_size, info.st_mtime_ns))
        for start in range(0, len(self.dataset), _ROWS):
            rows = start, min(start + _ROWS, len(self.dataset))
            yield Unit((self._identity, stamps, rows), rows)

    def scan(self, rows: tuple[int, int]) -> list[Row]:
        return [
            self._scan_row(number, row)
            for number, row in enumerate(self.dataset.select(range(*rows)), rows[0])
        ]

    def read(self, place: Place) -> bytes:
        return self._bytes(self.dataset[place.offset][self.image])

    def _scan_row(self, number: int, row: dict[str, Any]) -> Row:
        name = f"{self._identity['split']}/{number:08d}"
        try:
            captions = captions_in(_flat(row[column] for column in self.captions))
            return row_of(name, self._bytes(row[self.image]), captions, number)
        except BadSample as error:
            return Row.bad(name, error)

    def _bytes(self, picture: dict[str, Any] | None) -> bytes:
        if not picture:
            raise BadSample("has no picture")
        if picture["bytes"]:
            return picture["bytes"]
        path = picture["path"] or ""
        if not os.path.realpath(path).startswith(self._folders):
            raise BadSample("names a picture outside the dataset")
        return read_file(Path(path), MAX_BYTES)


class Stream(Tars):
    """A dataset that is streamed: each of its files becomes a shard in the cache when it is needed."""

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        identity: dict[str, Any],
        image: str,
        captions: Sequence[str],
        cache: ShardCache,
    ):
        self.dataset, self.image, self.captions, self.cache = dataset, image, captions, cache
        self._identity = identity
        self.names = [f"{identity['split']}-{number:05d}" for number in range(dataset.num_shards)]

    def identity(self) -> dict[str, Any]:
        return self._identity

    def units(self) -> Iterator[Unit]:
        for shard in range(len(self.names)):
            yield Unit((self._identity, len(self.names), shard), shard, shard)

    def open(self, shard: int) -> BinaryIO:
        key = json.dumps([self._identity, len(self.names), shard])
        return self.cache.open(key, partial(self._fetch, shard))

    def _fetch(self, shard: int, path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(self._rows(shard)):
                picture = row[self.image] or {}
                if picture.get("path") and not picture.get("bytes"):
                    raise ValueError(
                        f"{self._identity['path']} holds paths of pictures: give streaming: false"
                    )
                captions = _flat(row[column] for column in self.captions)
                # Only the suffix says which member is the picture; its format is found in its bytes.
                _add(tar, f"{number:08d}.jpg", picture.get("bytes") or b"")
                _add(tar, f"{number:08d}.json", json.dumps({"captions": captions}, default=str).encode())

    def _rows(self, shard: int) -> Iterator[dict[str, Any]]:
        try:
            yield from self.dataset.shard(num_shards=len(self.names), index=shard)
        except Exception as error:  # the errors of a network are of many types, not all of them OSError
            raise OSError(f"{self._identity['path']} could not be streamed: {error}") from error


def _flat(values: Any) -> list[Any]:
    """The captions of several columns, each with one or a list."""
    return [
        item
        for value in values
        for item in (value if isinstance(value, list) else [value])
        if item is not None
    ]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
