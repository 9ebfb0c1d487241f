"""Captioned pictures by number, wherever they lie: a folder, shards, a dataset of Hugging Face, drawn scenes.

A source is indexed once; from then on sample i is the same for every process, and can be had at any time.
"""

import hashlib
import inspect
import io
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from localdit.data.records import Bad, Record
from localdit.data.scenes import Scene, as_users_write, captions, class_name, render, scene

__all__ = ["Bad", "Record", "Scenes", "Source", "open_source"]


class Source(Protocol):
    """Captioned pictures by number. Can be pickled, for the workers of a data loader."""

    bad: Sequence[Bad]  # what is there, but is no sample
    sizes: NDArray[np.int32]  # width and height of each sample, (n, 2)
    # The shard that holds each sample, (n,), where reading from few at a time is faster. None: no matter.
    shards: NDArray[np.int32] | None

    def __len__(self) -> int: ...

    def record(self, i: int) -> Record:
        """What is known of sample `i`."""

    def read(self, i: int) -> bytes:
        """The encoded picture of sample `i`.

        Raises:
            BadSample: It cannot be had any more, or has changed since it was indexed.
        """


class Scenes:
    """The first `count` synthetic scenes, each with all its wordings. Pictures are drawn when they are read.

    The digest is that of a scene's description: the bytes of a PNG depend on the library that writes it.

    Args:
        count: How many.
        seed: Another seed, other scenes.
        size: Side of the pictures in pixels.
        held_out: Scenes of the combinations that training does not show.
        free_wording_rate: Share, by weight, of captions as users might write them, beside the grammar's.
    """

    bad: Sequence[Bad] = ()
    shards = None

    def __init__(
        self,
        count: int,
        seed: int = 0,
        size: int = 128,
        held_out: bool = False,
        free_wording_rate: float = 0.0,
    ):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a whole number above 0, got {count!r}")
        if not 0 <= free_wording_rate <= 1:
            raise ValueError(f"free_wording_rate must be from 0 to 1, got {free_wording_rate!r}")
        self.seed, self.size, self.held_out = seed, size, held_out
        self.free_wording_rate = free_wording_rate
        self.sizes = np.full((count, 2), size, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, i: int) -> Record:
        i = range(len(self))[i]
        drawn = self.scene(i)
        wordings = captions(drawn)
        texts, weights = [caption.text for caption in wordings], [1.0] * len(wordings)
        if self.free_wording_rate:
            rng = random.Random(f"{self.seed}/{i}/wording")
            for caption in wordings:
                sizes = [caption.names_size] * len(drawn.objects)
                texts.append(as_users_write(caption.text, drawn, sizes, rng)[0])
            free = self.free_wording_rate
            weights = [1 - free] * len(wordings) + [free] * len(wordings)
        used_texts, used_weights = zip(*(pair for pair in zip(texts, weights) if pair[1]))
        return self._record(i, drawn, used_texts, used_weights)

    def read(self, i: int) -> bytes:
        buffer = io.BytesIO()
        drawn = self.scene(range(len(self))[i])
        render(drawn, self.size).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def scene(self, i: int) -> Scene:
        """What picture `i` shows."""
        return scene(i, seed=self.seed, held_out=self.held_out)

    def _record(self, i: int, drawn: Scene, texts: tuple[str, ...], weights: tuple[float, ...]) -> Record:
        digest = hashlib.sha256(f"{drawn} {self.size}".encode()).hexdigest()
        return Record(f"scene-{i:08d}", self.size, self.size, texts, weights, digest)


class SceneClasses(Scenes):
    """The first `count` scenes of one object, each captioned by its class alone, as "red circle": one of 48
    colours and shapes, for models that are told a class.

    Args:
        count: How many.
        seed: Another seed, other scenes.
        size: Side of the pictures in pixels.
    """

    def __init__(self, count: int, seed: int = 0, size: int = 128):
        super().__init__(count, seed, size)

    def record(self, i: int) -> Record:
        i = range(len(self))[i]
        drawn = self.scene(i)
        return self._record(i, drawn, (class_name(drawn),), (1.0,))

    def scene(self, i: int) -> Scene:
        return scene(i, seed=self.seed, objects=1)


def open_source(
    spec: str | Path | Mapping[str, Any],
    *,
    index: Path | None = None,
    max_bad_fraction: float = 0.01,
    progress: bool = False,
) -> Source:
    """Open a source, which is indexed first where it is not yet.

    Args:
        spec: "pictures/", "shards/train-{0000..0009}.tar", "https://host/{00..19}.tar", "pipe:COMMAND",
            "urls.txt" (one shard a line), "hf:OWNER/NAME" or "scenes:20000"; or a mapping with `kind`
            ("folder", "shards", "hf", "scenes", "scene_classes") and the arguments of that kind: `Folder`,
            `Shards`, `open_dataset`, `Scenes`, `SceneClasses`.
        index: Folder for the index, and for shards that are fetched. By default in the user's cache.
        max_bad_fraction: The share of samples that may be bad.
        progress: Show a bar while indexing.

    Raises:
        ValueError: There is no such source, it has no usable sample, or too many are bad.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction must be from 0 to 1, got {max_bad_fraction}")
    fields = dict(spec) if isinstance(spec, Mapping) else _parse(str(spec))
    kind = fields.pop("kind", None)
    if kind in ("scenes", "scene_classes"):
        return _call(Scenes if kind == "scenes" else SceneClasses, kind, fields)
    try:
        from localdit.data import folders, shards
        from localdit.data.index import indexed

        kinds: dict[str, Callable[..., Any]] = {"folder": folders.Folder, "shards": shards.Shards}
        if kind == "hf":
            from localdit.data.hub import open_dataset

            kinds["hf"] = open_dataset
    except ModuleNotFoundError as error:
        raise ImportError(
            f"sources need {error.name}, of the extra 'train': pip install 'localdit[train]'"
        ) from error
    if kind not in kinds:
        raise ValueError(f"kind must be folder, shards, hf, scenes or scene_classes, got {kind!r}")
    folder = index or _default_index()
    if kind != "folder":
        fields.setdefault("cache", str(folder / "shards"))
    source = indexed(_call(kinds[kind], kind, fields), folder, progress)
    bad, total = len(source.bad), len(source) + len(source.bad)
    first = "".join(f"\n  {one.name} {one.reason}" for one in source.bad[:5])
    if not len(source):
        raise ValueError(
            f"{spec} holds no captioned picture" + (f"; {bad} are bad, first:{first}" if bad else "")
        )
    if bad > max_bad_fraction * total:
        raise ValueError(
            f"{bad} of {total} samples of {spec} are bad, and max_bad_fraction is {max_bad_fraction}; "
            f"`localdit data check` lists them all, the first are:{first}"
        )
    return source


def _parse(spec: str) -> dict[str, Any]:
    """The mapping that a short text stands for."""
    if match := re.fullmatch(r"scenes:(\d+)", spec):
        return {"kind": "scenes", "count": int(match[1])}
    if spec.startswith("hf:") and not spec.startswith("hf://"):
        return {"kind": "hf", "path": spec.removeprefix("hf:")}
    if spec.endswith(".txt") and os.path.isfile(spec):
        lines = Path(spec).read_text(encoding="utf-8").splitlines()
        return {"kind": "shards", "urls": [line.strip() for line in lines if line.strip()]}
    if not os.path.isdir(spec) and (".tar" in spec or re.match(r"pipe:|\w+://", spec)):
        return {"kind": "shards", "urls": spec}
    return {"kind": "folder", "path": spec}


def _call(make: Callable[..., Any], kind: str, fields: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(make).bind(**fields)
    except TypeError as error:
        raise ValueError(f"a source of kind {kind}: {error}") from None
    return make(**fields)


def _default_index() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "localdit", "sources")
