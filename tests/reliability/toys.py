"""A small training state, a pure function of its step; and processes to save it in and to kill."""

import json
import multiprocessing
from collections.abc import Callable, Mapping
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from localdit.training.checkpoint import load_checkpoint, save_checkpoint

SHAPES = {
    "blocks.0.weight": (300, 200),
    "blocks.0.bias": (200,),
    "out.weight": (200, 200),
}  # 0.1 M parameters


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    """The tensors of a step: no two steps share one."""
    rng = torch.Generator().manual_seed(step)

    def draw() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}

    counts = {f"step.{name}": torch.tensor(float(step)) for name in SHAPES}
    return {"model": draw(), "ema": draw(), "optimizer": draw() | counts}


def save_step(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, tensors_of(step), {"sample": 8 * step}, keep)


def step_in(path: Path) -> int | None:
    """The step of a checkpoint that is, bit for bit, what `save_step` wrote; None of any other."""
    tensors, state = load_checkpoint(path)
    step = state["step"]
    return step if same(tensors, tensors_of(step)) and state["sample"] == 8 * step else None


def same(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(one[part][name], other[part][name]) for name in one[part])
        for part in one
    )


def write_cache(folder: Path) -> tuple[Path, Path]:
    """A cache of one picture, as `localdit encode` lays it out. Returns its two shards, images and text."""
    names = torch.tensor(list(b'["a.png"]'), dtype=torch.uint8)
    images = {"names": names, "64x64.positions": torch.tensor([0]), "64x64.moments": torch.randn(1, 8, 8, 8)}
    text = {
        "features": torch.randn(3, 5),
        "tokens": torch.tensor([3]),
        "weights": torch.ones(1),
        "captions": torch.tensor([1]),
        "empty": torch.randn(1, 5),
    }
    paths = []
    for kind, tensors in (("images", images), ("text", text)):
        content = save(tensors)
        paths.append(folder / f"{kind}-{'0' * 32}-{sha256(content).hexdigest()}.safetensors")
        paths[-1].write_bytes(content)
    index_cache(folder, *paths)
    return paths[0], paths[1]


def index_cache(folder: Path, images: Path, text: Path) -> None:
    """Write an index that agrees with the sizes of the two shards."""
    shards = {
        kind: {"file": path.name, "bytes": path.stat().st_size}
        for kind, path in (("images", images), ("text", text))
    }
    index = {
        "format": 1,
        "encoders": {
            part: {"name": part, "sha256": "0" * 64} for part in ("vae", "text_encoder", "tokenizer")
        },
        "preprocessing": {"buckets": [[64, 64]], "flips": False},
        "bad": [],
        "shards": [{"counts": {"0": 1}, **shards}],
    }
    (folder / "index.json").write_text(json.dumps(index))


def start(work: Callable[..., Any], *args: Any) -> tuple[ForkServerProcess, Connection]:
    """Do `work(*args, connection)` in a process of its own. Returns it, and our end of the pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["localdit.pipelines", "localdit.training.checkpoint"])
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def sent(connection: Connection) -> list[Any]:
    """All that a process sent until it ended."""
    messages = []
    try:
        while True:
            messages.append(connection.recv())
    except EOFError:
        return messages
