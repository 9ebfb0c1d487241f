"""Pickles that run code when they are opened, put before everything that reads files."""

import io
import itertools
import json
import os
import pickle
import random
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from diffusers.utils import logging
from PIL import Image

import localdit.inference
from localdit import MINI, LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.cli.verify import examine
from localdit.conversion import convert
from localdit.data.cache import open_cache
from localdit.data.sources import open_source
from localdit.files import MANIFEST
from localdit.models.single_file import read_state_dict
from localdit.pictures import read_picture, read_settings
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import load_config

from . import Outcome, experiment
from .toys import index_cache, save_step, write_cache


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, nest: Path):
        self.nest = nest

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.nest),)


@experiment(
    "R9",
    "A pickle that would run code runs none, wherever it is put: weights, optimizer, cache, pictures, "
    "captions, datasets, configuration",
    full=1000,
    small=8,
)
def canary_stays_silent(folder: Path, trials: int) -> Outcome:
    cases, passed, sang = attempt_all(folder, trials), 0, set()
    count = 0
    for entry, payload, silent, _ in cases:
        count += 1
        passed += silent
        if not silent:
            sang.add(f"{entry} ({payload})")
    note = f"{len(ENTRIES)} ways in, {len(PAYLOADS)} kinds of file"
    return Outcome(count, passed, note + "".join(f"; code ran: {one}" for one in sorted(sang)))


@experiment(
    "R9",
    "Where weights of an older make are refused, it is said how to convert them; of a damaged file, to fetch "
    "it again",
    full=1000,
    small=6,
)
def refusal_helps(folder: Path, trials: int) -> Outcome:
    return helpful(folder, trials, OURS)


@experiment(
    "R9",
    "So it is where `from_pretrained` reads a folder, of a transformer or a pipeline",
    full=1000,
    small=3,
)
def refusal_of_a_folder_helps(folder: Path, trials: int) -> Outcome:
    return helpful(folder, trials, FOLDERS)


def helpful(folder: Path, trials: int, entries: tuple[str, ...]) -> Outcome:
    messages = [message for _, _, _, message in attempt_all(folder, trials, entries)]
    helps = ["save" in message or "again" in message for message in messages]
    return Outcome(len(helps), sum(helps), "; ".join(entries))


def attempt_all(
    folder: Path, trials: int, only: tuple[str, ...] | None = None
) -> Iterator[tuple[str, str, bool, str]]:
    """Each entry with each payload, or some of them: both, whether the canary was silent, the error."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    pairs = [pair for pair in itertools.product(ENTRIES, PAYLOADS) if only is None or pair[0] in only]
    for number, (entry, payload) in enumerate(random.sample(pairs, min(trials, len(pairs)))):
        place, nest = folder / str(number), folder / f"nest-{number}"
        place.mkdir()
        message = ""
        try:
            with warnings.catch_warnings(action="ignore"):
                ENTRIES[entry](place, PAYLOADS[payload](nest))
        except Exception as error:  # whatever it is: only what it says counts
            message = str(error)
        yield entry, payload, not nest.exists(), message
        shutil.rmtree(place)


# --- Payloads -----------------------------------------------------------------------------------------------


def saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def numpy_objects(nest: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(nest)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "plain": lambda nest: pickle.dumps({"weight": Canary(nest)}),
    "PyTorch's": lambda nest: saved({"weight": Canary(nest)}),
    "PyTorch's old one": lambda nest: saved({"weight": Canary(nest)}, _use_new_zipfile_serialization=False),
    "in a state dict": lambda nest: saved(
        {"state_dict": {"w": torch.zeros(1), "x": Canary(nest)}, "step": 1}
    ),
    "cut": lambda nest: saved({"weight": Canary(nest), "more": torch.zeros(100)})[:-200],
    "NumPy's": numpy_objects,
    "YAML's": lambda nest: f"!!python/object/apply:os.mkdir [{nest}]".encode(),
}

# --- Entries ------------------------------------------------------------------------------------------------


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def enter(folder: Path, payload: bytes) -> object:
        (folder / name).write_bytes(payload)
        return read(folder / name)

    return enter


def in_folder(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Read the folder that the file stands in."""
    return in_file(name, lambda path: read(path.parent))


def checkpoint_with(
    name: str, listed: bool, read: Callable[[Path], object]
) -> Callable[[Path, bytes], object]:
    """A checkpoint with one more file, or another one in place of a file, listed in the manifest or not."""

    def enter(folder: Path, payload: bytes) -> object:
        path = save_step(folder, 1)
        (path / name).write_bytes(payload)
        if listed:
            manifest = json.loads((path / MANIFEST).read_text())
            manifest["files"][name] = {"bytes": len(payload), "sha256": sha256(payload).hexdigest()}
            (path / MANIFEST).write_text(json.dumps(manifest))
        return read(path)

    return enter


def transformer_with(name: str) -> Callable[[Path, bytes], object]:
    def enter(folder: Path, payload: bytes) -> object:
        shutil.copy(Path(MINI, "transformer", "config.json"), folder)
        (folder / name).write_bytes(payload)
        return LocalDiTTransformer2DModel.from_pretrained(folder)

    return enter


def pipeline_with(part: str, name: str) -> Callable[[Path, bytes], object]:
    """The mini, whose part has this file in place of its weights."""

    def enter(folder: Path, payload: bytes) -> object:
        shutil.copytree(MINI, folder, dirs_exist_ok=True)
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
        (folder / part / name).write_bytes(payload)
        return LocalDiTPipeline.from_pretrained(folder)

    return enter


def cache_with(which: int) -> Callable[[Path, bytes], object]:
    """A cache that has the file in place of a shard, and says so."""

    def enter(folder: Path, payload: bytes) -> object:
        shards = write_cache(folder)
        shards[which].write_bytes(payload)
        index_cache(folder, *shards)
        return open_cache(folder)[0, 0]

    return enter


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def source(folder: Path, spec: str) -> None:
    opened = open_source(spec, index=folder / "index", max_bad_fraction=0.9)
    for i in range(len(opened)):
        opened.record(i)
        opened.read(i)


def pictures_with(name: str) -> Callable[[Path, bytes], object]:
    """A folder of pictures with captions, one of which is the file."""

    def enter(folder: Path, payload: bytes) -> None:
        pictures = folder / "pictures"
        pictures.mkdir()
        for stem in ("a", Path(name).stem):
            (pictures / f"{stem}.png").write_bytes(picture())
            (pictures / f"{stem}.txt").write_text("a star")
        (pictures / name).write_bytes(payload)
        source(folder, str(pictures))

    return enter


def shard_with(name: str, prefix: str = "") -> Callable[[Path, bytes], object]:
    """A tar file with a good sample and one with the file in it, as our own shards or for `datasets`."""

    def enter(folder: Path, payload: bytes) -> None:
        files = {
            "a.png": picture(),
            "a.txt": b"a star",
            "b.png": picture(),
            "b.txt": b"a ring",
            name: payload,
        }
        shards = folder / "shards"
        shards.mkdir()
        with tarfile.open(shards / "train-0.tar", "w") as tar:
            for file, content in files.items():
                info = tarfile.TarInfo(file)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        source(folder, f"hf:{shards}" if prefix else str(shards / "train-0.tar"))

    return enter


def column(name: str) -> Callable[[Path, bytes], object]:
    """A dataset that was saved with the payload in a column."""

    def enter(folder: Path, payload: bytes) -> None:
        row = {"image": {"bytes": picture(), "path": None}, "text": "a star", "extra": b""}
        bad = row | {name: {"bytes": payload, "path": None} if name == "image" else payload}
        datasets.Dataset.from_list([row, bad]).save_to_disk(folder / "set")
        source(folder, f"hf:{folder / 'set'}")

    return enter


def data_file(name: str) -> Callable[[Path, bytes], object]:
    """A folder for `datasets` with the file as data."""
    return in_file(name, lambda path: source(path.parent, f"hf:{path.parent}"))


def read_by_config(path: Path) -> object:
    return localdit.inference.load_model(localdit.inference.Config(ckpt_path=str(path)), device="cpu")


ENTRIES: dict[str, Callable[[Path, bytes], object]] = {
    **{
        f"read_state_dict, {suffix}": in_file(f"weights{suffix}", read_state_dict)
        for suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    },
    "from_single_file": in_file("weights.pt", LocalDiTTransformer2DModel.from_single_file),
    "localdit convert": in_file("weights.ckpt", lambda path: convert(path, path.with_name("out"))),
    "inference.load_model": in_file("weights.pt", read_by_config),
    "from_pretrained, .bin": transformer_with("diffusion_pytorch_model.bin"),
    "from_pretrained, .safetensors": transformer_with("diffusion_pytorch_model.safetensors"),
    "pipeline, transformer": pipeline_with("transformer", "diffusion_pytorch_model.bin"),
    "pipeline, VAE": pipeline_with("vae", "diffusion_pytorch_model.bin"),
    "pipeline, text encoder": pipeline_with("text_encoder", "pytorch_model.bin"),
    "checkpoint, optimizer.pt beside": checkpoint_with("optimizer.pt", False, load_checkpoint),
    "checkpoint, optimizer.bin listed": checkpoint_with("optimizer.bin", True, load_checkpoint),
    "checkpoint, RNG state listed": checkpoint_with("random_states_0.pkl", True, load_checkpoint),
    "checkpoint, as optimizer.safetensors": checkpoint_with("optimizer.safetensors", True, load_checkpoint),
    "checkpoint, as state.json": checkpoint_with("state.json", True, load_checkpoint),
    "resume": checkpoint_with("optimizer.pt", True, lambda path: find_checkpoint(path.parent, str(path))),
    "localdit verify, checkpoint": checkpoint_with("scheduler.bin", True, examine),
    "localdit verify, file": in_file("weights.pt", examine),
    "cache, its index": in_folder("index.json", open_cache),
    "cache, a shard of images": cache_with(0),
    "cache, a shard of text": cache_with(1),
    "config": in_file("run.yaml", load_config),
    "picture": in_file("picture.png", lambda path: read_picture(str(path))),
    "picture with settings": in_file("picture.png", lambda path: read_settings(str(path))),
    "folder, a picture": pictures_with("b.png"),
    "folder, a caption": pictures_with("b.txt"),
    "folder, a table": pictures_with("captions.jsonl"),
    "shard, a picture": shard_with("c.jpg"),
    **{f"shard, .{part}": shard_with(f"b.{part}") for part in ("pyd", "pkl", "pickle", "pth", "npy", "json")},
    **{f"datasets, .{part} in tar": shard_with(f"b.{part}", "hf") for part in ("pyd", "pkl", "pth", "npy")},
    **{f"datasets, .{kind}": data_file(f"train.{kind}") for kind in ("pkl", "pt", "npy", "arrow", "parquet")},
    "dataset, image column": column("image"),
    "dataset, another column": column("extra"),
}

# Where a person may bring weights of an older make.
OURS = (
    "from_single_file",
    "localdit convert",
    "inference.load_model",
    "resume",
    "checkpoint, optimizer.bin listed",
)
FOLDERS = ("from_pretrained, .bin", "pipeline, transformer", "pipeline, VAE", "pipeline, text encoder")
