"""What a source knows of a sample, and captions as people write them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from localdit.data.images import BadSample

Captions: TypeAlias = tuple[tuple[str, ...], tuple[float, ...]]  # and their weights

CAPTION_KEYS = ("captions", "caption", "text")  # the first that is there counts
MAX_CAPTION_BYTES = 2**20  # of the file, or the line of a table, with the captions of a sample
MAX_WEIGHT = 1_000_000
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """A usable sample, as the index knows it."""

    name: str  # unique and printable: "cats/1.jpg", "shard-0001.tar/000123"
    width: int  # pixels, EXIF orientation applied
    height: int
    captions: tuple[str, ...]  # one or more, none empty
    weights: tuple[float, ...]  # of the captions, positive
    digest: str  # SHA-256 of the encoded picture, hexadecimal


@dataclass(frozen=True)
class Bad:
    """What cannot be used: a sample, a line of a table, a shard."""

    name: str
    reason: str  # words that follow the name: "has no caption"


def check_name(name: str) -> None:
    """Raise `BadSample` for a name that cannot be printed in one line."""
    if _UNPRINTABLE.search(name):
        raise BadSample("has a name with control characters, or that is not UTF-8")


def printable(name: str) -> str:
    """A name with what `check_name` refuses written out."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def captions_in_text(data: bytes) -> Captions:
    """The captions of a text file: one a line, in UTF-8, all of weight 1; empty lines do not count.

    Raises:
        BadSample: It is no UTF-8, or empty.
    """
    return captions_in(_text(data).splitlines())


def captions_in_json(data: bytes) -> Captions:
    """The captions of a JSON object, by its key "captions", "caption" or "text"; see `captions_in`.

    Raises:
        BadSample: It is no JSON object in UTF-8, or holds no caption.
    """
    try:
        values = json.loads(_text(data))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("has captions that are not JSON") from None
    if not isinstance(values, dict):
        raise BadSample(f"has captions in a JSON {type(values).__name__}, not an object")
    return captions_by_key(values)


def captions_by_key(values: Mapping[str, Any]) -> Captions:
    """The captions under the first of `CAPTION_KEYS` that is there; see `captions_in`."""
    return captions_in(next((values[key] for key in CAPTION_KEYS if values.get(key) is not None), None))


def captions_in(value: Any) -> Captions:
    """Captions and their weights.

    Args:
        value: A text, or a list of texts and of {"text": ..., "weight": ...}; the weight is 1 by default.

    Raises:
        BadSample: It is something else, a weight is not positive, or all texts are empty.
    """
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    weighted: dict[str, float] = {}
    for item in items:
        text, weight = (item.get("text"), item.get("weight", 1)) if isinstance(item, dict) else (item, 1)
        if not isinstance(text, str):
            raise BadSample(f"has a caption that is not a text but {type(text).__name__}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
            raise BadSample(f"has a caption whose weight is not above 0 and at most {MAX_WEIGHT:,}")
        try:
            text.encode()
        except UnicodeEncodeError:  # half a pair of UTF-16, which JSON can hold, or what was no UTF-8
            raise BadSample("has a caption that is not UTF-8") from None
        if text := text.strip():
            weighted[text] = min(weighted.get(text, 0.0) + weight, MAX_WEIGHT)
    if not weighted:
        raise BadSample("has no caption")
    return tuple(weighted), tuple(weighted.values())


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("has a caption that is not UTF-8") from None
