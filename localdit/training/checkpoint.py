"""Checkpoints of a training run: safetensors and JSON, complete or absent.

A run's folder holds `step-00001000`, `step-00002000`, ..., and `latest`, a text file that names the one saved
last. In each stand `model.safetensors`, `ema.safetensors`, `optimizer.safetensors`, `state.json`, and the
manifest that `localdit.files` writes last: what has the name of a step was whole on the disk, and what has
happened to it since shows.
"""

import errno
import itertools
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from localdit._version import __version__
from localdit.files import MANIFEST, problems, staged_file, staged_folder

logger = logging.getLogger(__name__)

STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-<step>`, point `latest` at it, and delete all but the newest `keep` checkpoints.

    No checkpoint is overwritten. Where the folder holds this step already, or later ones, the run was resumed
    from before them: they are renamed to `step-<step>.old-<n>`, which nobody deletes and nobody resumes from
    without being told to.

    Readers see whole checkpoints at any time. Whoever writes holds `localdit.files.locked(folder)`, since two
    runs in one folder would take each other's later steps for left behind.

    Args:
        folder: Of the run.
        step: Optimizer steps done.
        tensors: What goes into each file, by name: {"model": {...}, "ema": {...}, "optimizer": {...}}.
        state: Plain values for `state.json`, to which the step and the versions of libraries are added.
        keep: At least 1.

    Returns:
        The new checkpoint.

    Raises:
        FloatingPointError: A tensor holds infinities or NaN. Nothing is written.
        OSError: It cannot be written, for a full disk say. The checkpoints before it are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for part, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(f"{name} of the {part} is not finite at step {step}: not saved")

    target = folder / f"step-{step:08d}"
    state = {**state, "step": step, "versions": _versions()}
    try:
        for left_behind in checkpoints(folder):
            if _step_of(left_behind) >= step:
                _set_aside(left_behind)
        with staged_folder(target) as staged:
            for part, named in tensors.items():
                save_file(_separate(named), staged / f"{part}.safetensors")
            (staged / STATE).write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
        with staged_file(folder / "latest") as staged:
            staged.write_text(f"{target.name}\n", encoding="utf-8")
        for old in checkpoints(folder)[:-keep]:
            # Out of sight at once, then deleted: nobody finds half a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f"{old.name}.tmp-{os.getpid()}")))
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(number, f"the checkpoint was not saved: {error}", str(target)) from error
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint, once it is found to be as its manifest says.

    Returns:
        The tensors by file and name, on the CPU, and the values of `state.json`.

    Raises:
        ValueError: It is damaged, or holds something else than safetensors and JSON. Names the file.
    """
    _refuse_damaged(path)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / STATE} must be a JSON object with the step ({error})") from error
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors[file.stem] = load_file(file)
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: deleted in the meantime
            raise ValueError(f"{file} is damaged: {error}") from error
    return tensors, state


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, found to be as its manifest says.

    Args:
        folder: Of the run.
        resume: "auto" is the newest whole one of the run, None where it has saved none; newer ones that are
            damaged are passed over with a warning. "never" is None. A path is the checkpoint there, or the
            newest whole one of the run there.

    Raises:
        ValueError: No checkpoint that there is is whole, or the path is of none.
    """
    if resume == "never":
        return None
    if resume != "auto":
        folder = Path(resume)
        if not checkpoints(folder):
            if not (folder / STATE).is_file():
                raise ValueError(f"resume must be auto, never or the path of a checkpoint, got {resume!r}")
            _refuse_damaged(folder)
            return folder
    saved = checkpoints(folder)
    for path in reversed(saved):
        found = problems(path)
        if not found:
            return path
        logger.warning(f"{path} is damaged and passed over: {found[0]}")
    if saved:
        raise ValueError(f"every checkpoint in {folder} is damaged: a run can start anew with resume=never")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run, oldest step first, whole or damaged."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path) -> None:
    names = (path.with_name(f"{path.name}.old-{n}") for n in itertools.count(1))
    aside = path.rename(next(name for name in names if not name.exists()))
    logger.warning(f"the run goes on from before {path}, which is kept as {aside.name}")


def _refuse_damaged(path: Path) -> None:
    for file in path.glob("[!.]*"):
        if file.suffix != ".safetensors" and file.name not in (STATE, MANIFEST):
            raise ValueError(
                f"{file} does not belong in a checkpoint, which is safetensors and JSON. It was not opened, "
                "since pickles can run code. If it holds tensors and you trust its origin, convert them with "
                "safetensors.torch.save_file, where nothing can be harmed"
            )
    if found := problems(path):
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{path} is no whole checkpoint: {'; '.join(found[:3])}{more}")


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, each in memory of its own."""
    storages: set[int] = set()
    separate = {}
    for name, tensor in named.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        # 8-bit optimizers share one table between all parameters.
        separate[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    return separate


def _versions() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), "localdit": __version__, **versions}
