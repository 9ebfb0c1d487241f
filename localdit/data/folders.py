"""A folder of pictures, with captions in a text file beside each or in one table for all."""

import csv
import json
import os
import posixpath
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from localdit.data.images import MAX_BYTES, OTHER_SUFFIXES, SUFFIXES, BadSample
from localdit.data.index import Place, Row, Unit, row_of
from localdit.data.records import (
    MAX_CAPTION_BYTES,
    Captions,
    captions_by_key,
    captions_in,
    captions_in_text,
)

TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")  # a file and its captions in each line
FILE_KEYS = ("file_name", "file")
_PICTURES = tuple(f".{suffix}" for suffix in SUFFIXES + OTHER_SUFFIXES)
_Files: TypeAlias = Mapping[str, os.stat_result | str]  # by its name: a file's stat, or why it is not read
_Table: TypeAlias = Mapping[str, Captions | str]  # by the file's name: its captions, or why there are none


@dataclass(frozen=True)
class Folder:
    """The pictures in a folder and in those below it. What is hidden is left out, and no link leads out.

    Captions stand in one of `TABLES` in the folder itself, or else in a `.txt` beside each picture.

    Args:
        path: Of the folder.
        classes: Take for a picture's caption the name of the folder below `path` that it is in, as those of
            ImageNet are laid out.

    Raises:
        ValueError: There is no such folder.
    """

    path: str
    classes: bool = False

    kind: ClassVar[str] = "folder"
    noun: ClassVar[str] = "pictures"
    sharded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not os.path.isdir(self.path):
            raise ValueError(f"there is no folder {self.path}")

    def identity(self) -> dict[str, Any]:
        return {"path": os.path.realpath(self.path), "classes": self.classes}

    def units(self) -> Iterator[Unit]:
        files = dict(_files(self.path))
        tables = [] if self.classes else [name for name in TABLES if name in files]
        if len(tables) > 1:
            raise ValueError(f"{self.path} must hold one table of captions, got {' and '.join(tables)}")
        if tables and isinstance(reason := files[tables[0]], str):
            raise ValueError(f"{os.path.join(self.path, tables[0])} {reason}")
        table = _read_table(Path(self.path, tables[0])) if tables else None
        names = {name for name in files if name.lower().endswith(_PICTURES) or name.endswith("/")}
        root = os.path.realpath(self.path)
        for name in sorted(names | (table or {}).keys()):
            captions: Captions | str | None  # None: in the text beside
            try:
                if self.classes:
                    stamp, captions = _stamp(files, name), _class_of(name)
                elif table is None:
                    stamp, captions = _stamp(files, name) + _stamp_of_text(files, name), None
                else:
                    captions = _look_up(table, name, tables[0])
                    stamp = _stamp(files, name)
            except BadSample as error:
                stamp, captions = [], str(error)
            yield Unit((root, name, stamp, captions), (name, captions))

    def scan(self, what: tuple[str, Captions | str | None]) -> list[Row]:
        name, captions = what
        try:
            if isinstance(captions, str):
                raise BadSample(captions)
            data = read_file(Path(self.path, name), MAX_BYTES)
            if captions is None:
                captions = captions_in_text(self._text(name))
            return [row_of(name, data, captions)]
        except BadSample as error:
            return [Row.bad(name, error)]

    def read(self, place: Place) -> bytes:
        return read_file(Path(self.path, place.name), MAX_BYTES)

    def _text(self, name: str) -> bytes:
        try:
            return read_file(Path(self.path, _text_of(name)), MAX_CAPTION_BYTES)
        except BadSample as error:
            raise BadSample(f"has a caption that {error}") from None


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file that has at most `limit` of them.

    Raises:
        BadSample: It has more, is no file (a pipe may have no end), or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadSample("is no regular file")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise BadSample(f"has more than {limit:,} bytes")
    return data


def _files(folder: str, prefix: str = "", root: str = "") -> Iterator[tuple[str, os.stat_result | str]]:
    """Every file below a folder, and every link to a folder, whose name ends in a slash.

    Raises:
        OSError: A folder cannot be listed: what it holds would be missing without a word.
    """
    root = root or os.path.join(os.path.realpath(folder), "")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{name}/", root)
            elif entry.is_dir():
                yield f"{name}/", "is a link to a folder, which is not followed"
            else:
                yield name, _inspect(entry, root)


def _inspect(entry: os.DirEntry[str], root: str) -> os.stat_result | str:
    if entry.is_symlink() and not os.path.realpath(entry.path).startswith(root):
        return "is a link that leads out of the folder"
    try:
        info = entry.stat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return info if stat.S_ISREG(info.st_mode) else "is no regular file"


def _stamp(files: _Files, name: str) -> list[int]:
    """What changes when a file does. Raises `BadSample` for one that is not to be read."""
    file = files.get(name, "is named among the captions, but is not in the folder")
    if isinstance(file, str):
        raise BadSample(file)
    return [file.st_size, file.st_mtime_ns, file.st_ctime_ns]


def _stamp_of_text(files: _Files, name: str) -> list[int]:
    if _text_of(name) not in files:
        raise BadSample("has no caption")
    try:
        return _stamp(files, _text_of(name))
    except BadSample as error:
        raise BadSample(f"has a caption that {error}") from None


def _text_of(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"


def _class_of(name: str) -> Captions:
    folder, slash, _ = name.partition("/")
    if not slash:
        raise BadSample("is in no folder of a class")
    return captions_in(folder)


def _look_up(table: _Table, name: str, table_name: str) -> Captions:
    captions = table.get(name, f"is not named in {table_name}")
    if isinstance(captions, str):
        raise BadSample(captions)
    return captions


def _read_table(path: Path) -> _Table:
    """A file that several lines name has the captions of all; one bad line spoils it."""
    captions: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for number, line in _lines(path):
        name = f"{path.name}, line {number}"
        try:
            values = _parse(line)
            named = next((values[key] for key in FILE_KEYS if values.get(key)), None)
            if not isinstance(named, str):
                raise BadSample(f"names no file: {' or '.join(FILE_KEYS)} must be its path")
            name = posixpath.normpath(named)
            captions[name] += [
                {"text": text, "weight": weight} for text, weight in zip(*captions_by_key(values))
            ]
        except BadSample as error:
            reasons[name] = str(error)
    return {name: captions_in(items) for name, items in captions.items() if items} | reasons


def _lines(path: Path) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """The lines of a table, from 1, those of a CSV file by its columns.

    Raises:
        ValueError: The table as such cannot be read.
    """
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_CAPTION_BYTES + 1), b""), 1):
                if len(line) > MAX_CAPTION_BYTES:
                    raise ValueError(f"{path}, line {number} is longer than {MAX_CAPTION_BYTES:,} bytes")
                if line.strip():
                    yield number, line
        return
    # What is no UTF-8 is kept so that it spoils its own line alone.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.DictReader(text)
        try:
            if not set(FILE_KEYS) & set(rows.fieldnames or ()):
                raise ValueError(f"{path} must have a column {' or '.join(FILE_KEYS)}, got {rows.fieldnames}")
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def _parse(line: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(line, dict):
        return line
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadSample("is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadSample("is not JSON") from None
    if not isinstance(values, dict):
        raise BadSample("is not a JSON object")
    return values
