"""A small training state, a pure function of its step; and processes to save it in and to kill."""

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from hostile_files import picture
from safetensors.torch import save
from torch import Tensor
from toy_pipeline import toy_text_encoder, toy_tokenizer, toy_vae

from localdit.training.checkpoint import load_checkpoint, save_checkpoint
from localdit.training.config import Config, TrainConfig

SHAPES = {
    "blocks.0.weight": (300, 200),
    "blocks.0.bias": (200,),
    "out.weight": (200, 200),
}  # 0.1 M parameters


# By the process that all others are forked from.
PRELOADED = ["localdit.pipelines", "localdit.training.loop", "localdit.data.folders", "localdit.data.shards"]


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
    context.set_forkserver_preload(PRELOADED)
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


def apart(work: Callable[..., Any], items: Iterable[tuple[Any, ...]], seconds: float = 600) -> Iterator[Any]:
    """What `work(*item)` gives for each item, one after the other in a process beside this one.

    None where that process dies or takes longer than so; another one then goes on.
    """
    process = None
    try:
        for item in items:
            if process is None:
                process, connection = start(serve, work)
            connection.send(item)
            try:
                answer = connection.recv() if connection.poll(seconds) else None
            except EOFError:
                answer = None
            if answer is None:
                process.kill()
                process = None
            yield answer
    finally:
        if process is not None:
            connection.close()  # which ends it
            process.join()


def serve(work: Callable[..., Any], connection: Connection) -> None:
    with suppress(EOFError):
        while True:
            connection.send(work(*connection.recv()))


def captioned(folder: Path, sizes: Iterable[tuple[int, int]]) -> str:
    """A folder of pictures of noise of these sizes, all with one caption, as a source."""
    folder.mkdir()
    for number, (width, height) in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(picture(width, height))
        (folder / f"{number}.txt").write_text("a red circle")
    return str(folder)


def save_encoders(folder: Path) -> dict[str, str]:
    """The toy pipeline's encoders on disk: the folder of each part, as `EncodeConfig` names them."""
    parts = {"vae": toy_vae(), "text_encoder": toy_text_encoder(), "tokenizer": toy_tokenizer()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return {name: str(folder / name) for name in parts}


def denoising_run(
    folder: Path, source: Any, encoders: Mapping[str, str], objective: Mapping[str, Any], **options: Any
) -> Config:
    """A run of a transformer with one block over pictures of 64 pixels squared, in the size nearest to each.

    Args:
        folder: Of the run; the cache lies beside it.
        source: Of captioned pictures.
        encoders: What `save_encoders` gives, with more fields of `EncodeConfig`.
        objective: More fields of the objective.
        options: Those of `TrainConfig`.
    """
    model = {
        **{"_class_name": "LocalDiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 12},
        **{"num_layers": 1, "caption_channels": 16, "sample_size": 8, "window_size": 2},
    }
    data = {"source": source, "cache": str(folder.parent / "cache"), "resolution": 64, **encoders}
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"}
    return Config(
        str(folder),
        model,
        {"name": "denoising", "data": data, "scheduler": scheduler, "export_encoders": False, **objective},
        TrainConfig(**{"warmup_steps": 2, "log_every": 1, "save_every": 10**9, **options}),
    )
