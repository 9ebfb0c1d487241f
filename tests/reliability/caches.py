"""Caches of latents and text features: killed while they are filled, and read after something changed."""

import hashlib
import json
import os
import random
import shutil
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from localdit.assets import MINI
from localdit.data.cache import INDEX, SHARD
from localdit.training.encode import ENCODER_FILES, EncodeConfig, encode
from localdit.training.stopping import StopRequest

from . import Outcome, experiment
from .toys import start

PICTURES = 40
PER_SHARD = 4


@experiment(
    "R23",
    "After `kill -9` at a random moment of encoding no half-written shard stands under its name, and the "
    "next run makes the rest alone, to the same bytes as a run that nobody killed",
    full=50,
    small=2,
)
def kills_while_encoding(folder: Path, trials: int) -> Outcome:
    """Runs that follow each other on one cache, until it is whole; then on a fresh one."""
    config = toy_config(folder)
    started = time.monotonic()
    fill(config)
    seconds, wanted = time.monotonic() - started, contents(config)

    passed = whole = interrupted = 0
    for trial in range(trials):
        config = replace(config, cache=str(folder / f"cache-{whole}"))
        before = shards(config)
        process, connection = start(fill_in_child, config)
        connection.recv()
        time.sleep(random.uniform(0, seconds))
        process.kill()
        process.join()
        after = shards(config)
        interrupted += len(after) < len(wanted) - 1
        held = before.items() <= after.items()  # the same files: none was written again
        held &= contents(config).items() <= wanted.items()  # the very bytes
        if trial + 1 == trials or (Path(config.cache) / INDEX).exists():
            fill(config)
            held &= contents(config) == wanted and after.items() <= shards(config).items()
            whole += 1
        passed += held
    return Outcome(trials, passed, f"{interrupted} kills left shards to be made; {whole} caches completed")


@experiment(
    "R23",
    "After a bit of an encoder changed, or a caption was edited, no shard made with what was there before is "
    "used, and no other is made again",
    full=50,
    small=2,
)
def changes_between_runs(folder: Path, trials: int) -> Outcome:
    """What the cache then names is compared with what a run into an empty folder makes."""
    config = toy_config(folder)
    fill(config)
    passed, made = 0, 0
    for trial in range(trials):
        before, used = shards(config), in_use(config)
        change = random.choice(("caption", *ENCODER_FILES))
        if change == "caption":
            path = folder / "pictures" / f"{random.randrange(PICTURES):02d}.txt"
            path.write_text(f"story {trial} of {path.stem}")
        else:
            copy = folder / f"{change}-{trial}"
            shutil.copytree(getattr(config, change), copy)
            path = random.choice([file for file in copy.iterdir() if file.suffix in ENCODER_FILES[change]])
            change_slightly(path)
            config = replace(config, **{change: str(copy)})
        fill(config)
        anew = replace(config, cache=str(folder / f"anew-{trial}"))
        fill(anew)
        fresh = in_use(config) - used
        made += len(fresh)
        few = len(fresh) == 1 if change == "caption" else len(fresh) == len(used) / 2
        kept = before.items() <= shards(config).items()
        passed += few and kept and in_use(config) == in_use(anew)
    return Outcome(trials, passed, f"{made} shards made after {trials} changes")


def toy_config(folder: Path) -> EncodeConfig:
    """Small pictures in shards of about four, and the embedded pipeline's encoders."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(PICTURES):
        width, height = random.randint(20, 90), random.randint(20, 90)
        Image.frombytes("RGB", (width, height), random.randbytes(3 * width * height)).save(
            pictures / f"{i:02d}.png"
        )
        (pictures / f"{i:02d}.txt").write_text(f"picture {i}")
    return EncodeConfig(
        source=str(pictures),
        cache=str(folder / "cache"),
        **{part: str(Path(MINI, part)) for part in ENCODER_FILES},
        resolution=64,
        flips=True,
        samples_per_shard=PER_SHARD,
        num_workers=1,
    )


def change_slightly(path: Path) -> None:
    """Flip the last bit of a weight, or add a blank to a text, which must stay JSON."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        data[-4] ^= 1
    else:
        data += b" "
    path.write_bytes(data)


def fill(config: EncodeConfig) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        encode(config, Accelerator(), StopRequest())


def fill_in_child(config: EncodeConfig, connection: Connection) -> None:
    connection.send("imported")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it ends with the process)
    encode(config, Accelerator(), StopRequest())


def shards(config: EncodeConfig) -> dict[str, tuple[int, int]]:
    """The files under the names of shards, each with its place on the disk and the time it was written."""
    folder = Path(config.cache)
    paths = [path for path in folder.iterdir() if SHARD.fullmatch(path.name)] if folder.is_dir() else []
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def contents(config: EncodeConfig) -> dict[str, str]:
    """SHA-256 of each shard and of the index."""
    paths = [Path(config.cache, name) for name in (*shards(config), INDEX)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def in_use(config: EncodeConfig) -> set[str]:
    """The shards that the index names."""
    index = json.loads(Path(config.cache, INDEX).read_text())
    return {shard[kind]["file"] for shard in index["shards"] for kind in ("images", "text")}
