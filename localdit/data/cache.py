"""Reading what `localdit encode` made: latents and text features of a source, in safetensors shards.

A cache is a folder with an `index.json`, written last, and the shards that it names. A shard's name is
`<kind>-<key>-<sha256>.safetensors`: the key stands for all that it was made from (the encoder, the
preprocessing, the pictures or captions), the SHA-256 is that of its bytes. A shard under another key is
another shard: what is out of date is never read, because nothing asks for it.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from localdit.data.samples import Samples

# C latent channels   h w latent   T text tokens   K channels of the text features

INDEX = "index.json"
FORMAT = 1  # of the index and the shards; another one is another cache
SHARD = re.compile(
    r"(?P<kind>images|text)-(?P<key>[0-9a-f]{32})-(?P<sha256>[0-9a-f]{64})(?P<gaps>-gaps)?\.safetensors"
)
OPEN_SHARDS = 64  # of each kind and process, mapped at a time


class Cache(Samples):
    """Encoded pictures with captions. Each picture is an item; all of a batch have one size.

    `cache[index, position]` is

        {"moments": (2C, h, w) float32, "text": (T, K) float32, "text_mask": (T,) bool}

    where `moments` are mean and log-variance of the autoencoder's posterior, before any scaling, and T
    differs between items; of a cache that was made without a text encoder

        {"moments": (2C, h, w) float32, "caption": str}

    One of the picture's captions is drawn, by weight, and with flips in the cache one
    of its two orientations, by generators of their own for each seed and position.

    It may be handed to the workers of a `DataLoader`, by fork or by spawn. Shards are mapped into memory when
    they are first read, `OPEN_SHARDS` of them at a time.

    Args:
        folder: Of the cache.
        index: Its index.
        seed: Of the choice of captions and flips.

    Attributes:
        groups: (items,), the bucket of each item: a number in `buckets`.
        shards: (items,), the shard that holds each item.
        buckets: (height, width) in pixels.
        empty_text: (T, K) float32, the features of no caption; None without a text encoder.
        bad: Name of each sample that could not be used, and the reason.
    """

    groups: NDArray[np.integer]
    shards: NDArray[np.integer]

    def __init__(self, folder: Path, index: "Index", seed: int = 0):
        self.folder, self.seed, self.files, self.runs = folder, seed, index.shards, index.runs
        self.buckets, self.flips, self.bad = index.buckets, index.flips, index.bad
        shard, bucket, counts = index.runs.T
        self.starts = np.cumsum(counts) - counts
        self.shards = np.repeat(shard.astype(np.int32), counts)  # small types: there may be many items
        self.groups = np.repeat(bucket.astype(np.int16), counts)
        self._map_lazily()
        self.empty_text = self._text(0).empty

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        shard, bucket, row = self._place(index)
        rng = random.Random(f"{self.seed}/{position}")
        flip = rng.random() < 0.5 and self.flips
        moments, picture = self._images(shard).read(bucket, row, flip)
        text = self._text(shard).draw(picture, rng)
        if isinstance(text, str):
            return {"moments": moments.float(), "caption": text}
        return {
            "moments": moments.float(),
            "text": text.float(),
            "text_mask": torch.ones(len(text), dtype=torch.bool),
        }

    def name(self, index: int) -> str:
        """The sample's name in the source, as it was when it was encoded."""
        shard, bucket, row = self._place(index)
        return self._images(shard).name(bucket, row)

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        """Items of one group as a batch: features of text are padded with zeros to the longest among them."""
        batch = {key: [item[key] for item in items] for key in items[0]}
        padded = {
            key: pad_sequence(batch[key], batch_first=True) for key in ("text", "text_mask") if key in batch
        }
        return batch | padded | {"moments": torch.stack(batch["moments"])}

    def __getstate__(self) -> dict[str, Any]:
        """All but the open shards, which another process opens for itself."""
        return {key: value for key, value in vars(self).items() if key not in ("_images", "_text")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map_lazily()

    def _map_lazily(self) -> None:
        folder, files = self.folder, self.files
        self._images = lru_cache(OPEN_SHARDS)(lambda shard: _Images(folder / files[shard][0].file))
        self._text = lru_cache(OPEN_SHARDS)(lambda shard: _Text(folder / files[shard][1].file))

    def _place(self, index: int) -> tuple[int, str, int]:
        """The shard of an item, the prefix of its tensors there, and its row in them."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        run = int(np.searchsorted(self.starts, index, side="right")) - 1
        shard, bucket, _ = self.runs[run]
        return int(shard), bucket_name(self.buckets[bucket]), int(index - self.starts[run])


class _Images:
    """A shard of encoded pictures."""

    def __init__(self, path: Path):
        self.path, self.file = path, open_shard(path)

    def read(self, bucket: str, row: int, flip: bool) -> tuple[Tensor, int]:
        """A picture's moments, (2C, h, w), and its position in the piece of the source that was encoded."""
        with _named(self.path):
            moments = self.file.get_slice(f"{bucket}.moments_flipped" if flip else f"{bucket}.moments")[row]
            if moments.ndim != 3:
                raise ValueError(f"the moments of a picture must be (2C, h, w), got {tuple(moments.shape)}")
            return moments, self._position(bucket, row)

    def name(self, bucket: str, row: int) -> str:
        with _named(self.path):
            names = json.loads(self.file.get_tensor("names").numpy().tobytes())
            return names[self._position(bucket, row)]

    def _position(self, bucket: str, row: int) -> int:
        return int(self.file.get_slice(f"{bucket}.positions")[row])


class _Text:
    """A shard of text features, or of texts, with the tables that find a caption in it."""

    def __init__(self, path: Path):
        self.path, file = path, open_shard(path)
        with _named(path):
            self.caption_ends = file.get_tensor("captions").cumsum(0).tolist()  # of each picture
            self.weights = file.get_tensor("weights").tolist()  # of each caption
            self.texts: list[str] | None = None
            self.empty: Tensor | None = None
            if "texts" in file.keys():  # noqa: SIM118 (not a dict)
                self.texts = json.loads(file.get_tensor("texts").numpy().tobytes())
                count = len(self.texts)
            else:
                self.features = file.get_slice("features")  # (all tokens of the shard, K)
                self.token_ends = file.get_tensor("tokens").cumsum(0).tolist()  # of each caption
                self.empty = file.get_tensor("empty").float()
                (rows, _), (_, _) = self.features.get_shape(), self.empty.shape
                count = len(self.token_ends) if rows == [0, *self.token_ends][-1] else -1
            if not [0, *self.caption_ends][-1] == len(self.weights) == count:
                raise ValueError("its tables tell of other captions than it holds")

    def draw(self, picture: int, rng: random.Random) -> Tensor | str:
        """One of a picture's captions: its features (T, K), or itself."""
        with _named(self.path):
            first = self.caption_ends[picture - 1] if picture else 0
            last = self.caption_ends[picture]
            (caption,) = rng.choices(range(first, last), self.weights[first:last])
            if self.texts is not None:
                return self.texts[caption]
            return self.features[self.token_ends[caption - 1] if caption else 0 : self.token_ends[caption]]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the shard in which something is not as it must be."""
    try:
        yield
    except Exception as error:  # safetensors and PyTorch raise nearly anything
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete it, and localdit encode makes it "
            "again"
        ) from error


def open_cache(folder: str | Path, *, expected: Mapping[str, str] | None = None, seed: int = 0) -> Cache:
    """Open what `localdit encode` made.

    That all shards are there, each with its size, is checked; their bytes are checked by `verify`.

    Args:
        folder: Of the cache.
        expected: The identities, by `localdit.training.encode.identity`, of the encoders that it must have
            been made by: any of "vae", "text_encoder" and "tokenizer".
        seed: Of the choice of captions and flips.

    Raises:
        ValueError: The cache is not finished, is damaged, or was made by another encoder.
    """
    folder = Path(folder)
    index = read_index(folder)
    if missing := next(_missing(folder, index), None):
        raise ValueError(f"the cache {folder} is not whole: {missing}; run localdit encode again")
    for part, identity in (expected or {}).items():
        name, made_by = index.encoders[part]
        if made_by != identity:
            raise ValueError(
                f"the cache {folder} was made by another {part}, {name} ({made_by[:12]}), than this run's "
                f"({identity[:12]}): encode with this run's, or train with that one"
            )
    return Cache(folder, index, seed)


def verify(folder: str | Path) -> Iterator[str]:
    """What is wrong with a finished cache: a sentence for each damaged shard, which begins with its name.

    Every shard is read whole.

    Raises:
        ValueError: There is no index, or it is damaged.
    """
    folder = Path(folder)
    index = read_index(folder)
    yield from _missing(folder, index)
    for shard in index.files():
        path = folder / shard.file
        if path.is_file() and path.stat().st_size == shard.bytes:
            with open(path, "rb") as file:
                if file_digest(file, "sha256").hexdigest() != shard.sha256:
                    yield f"{shard.file} is damaged: delete it, and localdit encode makes it again"


@dataclass(frozen=True)
class Shard:
    """A file of a cache. Its name says what it was made from and what is in it."""

    file: str
    bytes: int

    def __post_init__(self) -> None:
        if not SHARD.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not the name of a shard")

    @property
    def sha256(self) -> str:
        return SHARD.fullmatch(self.file)["sha256"]  # type: ignore[index]


@dataclass(frozen=True)
class Index:
    """What the index of a cache says, as far as reading needs it."""

    encoders: dict[str, tuple[str, str]]  # "vae", "text_encoder", "tokenizer": name and identity
    buckets: list[tuple[int, int]]  # height and width in pixels
    flips: bool
    bad: list[tuple[str, str]]  # name and reason
    shards: list[tuple[Shard, Shard]]  # of images and of text
    runs: NDArray[np.int64]  # (runs, 3): shard, bucket, and how many pictures of the one are in the other

    def files(self) -> set[Shard]:
        return {shard for pair in self.shards for shard in pair}


def read_index(folder: Path) -> Index:
    """The index of a finished cache. Nothing in it points out of the folder.

    Raises:
        ValueError: There is none, or it is damaged, or of another version.
    """
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"it has format {values['format']}, and this version reads {FORMAT}")
        entries = values["shards"]
        runs = [
            (number, int(bucket), count)
            for number, entry in enumerate(entries)
            for bucket, count in entry["counts"].items()
        ]
        index = Index(
            encoders={part: (e["name"], e["sha256"]) for part, e in values["encoders"].items()},
            buckets=[(height, width) for height, width in values["preprocessing"]["buckets"]],
            flips=values["preprocessing"]["flips"],
            bad=[(sample["name"], sample["reason"]) for sample in values["bad"]],
            shards=[(Shard(**entry["images"]), Shard(**entry["text"])) for entry in entries],
            runs=np.array(runs, dtype=np.int64).reshape(-1, 3),
        )
        if not entries or (index.runs < 0).any() or (index.runs[:, 1] >= len(index.buckets)).any():
            raise ValueError("its shards are empty or in no bucket")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no finished cache: there is no {INDEX}; run localdit encode"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}); encode again") from None
    return index


def open_shard(path: Path) -> Any:
    """A shard, mapped into memory; its tensors are read when they are asked for.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run localdit encode again") from None


def bucket_name(size: tuple[int, int]) -> str:
    """What the tensors of a bucket are called by in a shard of images, before the point."""
    return "{}x{}".format(*size)


def _missing(folder: Path, index: Index) -> Iterator[str]:
    for shard in sorted(index.files(), key=lambda shard: shard.file):
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            state = "missing" if size is None else f"{size} bytes long, and must be {shard.bytes}"
            yield f"{shard.file} is {state}"
