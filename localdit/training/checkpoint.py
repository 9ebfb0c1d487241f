"""Checkpoints of a training run: safetensors and JSON, complete or absent.

A checkpoint is a folder `step-00001000`. It is written beside its place, flushed to disk and renamed: a
folder under its final name is whole.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

_STEP_FOLDER = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write `folder/step-<step>` and delete all but the newest `keep` checkpoints. Returns the new one.

    The random state is not in it: the loop derives the random numbers of each batch from the seed.
    """
    target = folder / f"step-{step:08d}"
    staged = folder / f"{target.name}.tmp-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)

    names = [name for name, _ in model.named_parameters()]
    moments = {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    save_model(model, str(staged / "model.safetensors"))
    save_file({n: p.contiguous() for n, p in zip(names, ema.shadow_params)}, staged / "ema.safetensors")
    save_file({k: v.contiguous() for k, v in moments.items()}, staged / "optimizer.safetensors")
    state = {"step": step, "ema_step": ema.optimization_step}
    (staged / "state.json").write_text(json.dumps(state, indent=2))
    for path in (*staged.iterdir(), staged):
        _flush(path)

    shutil.rmtree(target, ignore_errors=True)  # of an earlier run that went on from before this step
    staged.rename(target)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    checkpoint: Path, model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer
) -> int:
    """Put a checkpoint's tensors in place, strictly. Returns its step."""
    load_model(model, checkpoint / "model.safetensors")
    names = [name for name, _ in model.named_parameters()]
    averaged = load_file(checkpoint / "ema.safetensors")
    for name, parameter in zip(names, ema.shadow_params, strict=True):
        parameter.data.copy_(averaged[name])

    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        for full_name in file.keys():  # noqa: SIM118 (not a dict)
            key, _, name = full_name.partition(".")
            value = file.get_tensor(full_name)  # a count of steps, a scalar, stays on the CPU
            optimizer.state[parameters[name]][key] = (
                value.to(parameters[name].device) if value.ndim else value
            )

    state = json.loads((checkpoint / "state.json").read_text())
    ema.optimization_step = state["ema_step"]
    return state["step"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
