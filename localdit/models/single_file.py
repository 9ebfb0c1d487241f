"""A whole model in one file: what the published checkpoints of every architecture are read and written with.

Reading goes in this order; what differs between architectures is how tensors are named and what they tell:

1. `read_single_file`: the tensors, without running anything, and what the header says of them.
2. The architecture renames them, and infers the config fields that they tell: `tensor_shape`, `count_blocks`.
3. `check_fields` and `check_agreement`: overrides name fields that there are, and neither they nor the header
   contradict the tensors.
4. `empty_model`, `check_fixed_fields` and `check_tensors`: the file holds the tensors of the model that the
   config describes, all of them, and no other.
5. `fill_model`, then a `SingleFileReport`, which `log_report` writes to the log.

Writing is `write_single_file`, which is given the renaming.
"""

import json
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from localdit.files import staged_file

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model")  # as in {"state_dict": {...}, "step": 7}
_PREFIXES = ("module.", "model.")  # left by DistributedDataParallel, and by a class that holds the network


class SingleFile(NamedTuple):
    """What one file holds."""

    tensors: dict[str, Tensor]  # on the CPU, memory-mapped where the format allows
    config: dict[str, Any]  # the config fields in its header; none, but in files that we wrote
    recorded: dict[str, Any]  # what its header says of recorded test cases


@dataclass(frozen=True)
class SingleFileReport:
    """What reading one file came to.

    Attributes:
        parameters: Parameters of the model that was built.
        found: What the file holds, as a phrase.
        dropped: Names of the tensors that were left aside, by reason.
        chosen: What was decided where the file leaves it open, a sentence.
    """

    parameters: int
    found: str
    dropped: Mapping[str, tuple[str, ...]]
    chosen: str


# --- Reading ------------------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, without running anything in it.

    A pickle is read by PyTorch's `weights_only` reader, never by another. `{"state_dict": ...}` and
    `{"model": ...}` are opened, and a `module.` or `model.` before every name is taken off; both are logged.

    A `.safetensors` file with recorded test cases says so in its header, by JSON under "meta" that has a list
    "cases". The tensors `case<k>.*` of as many cases are left aside, and no other tensor is.

    Args:
        path: `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt`.

    Returns:
        The tensors by name, on the CPU, memory-mapped where the format allows.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: `path` is a folder or has another ending; the file is empty, cut, corrupt or holds more
            than tensors. Names the file.
    """
    return read_single_file(path).tensors


def read_single_file(path: str | os.PathLike[str]) -> SingleFile:
    """`read_state_dict`, which documents it, with what the header says beside the tensors."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path must be a checkpoint file, but {path} does not exist")
    if path.is_dir():
        raise ValueError(f"path must be one file, but {path} is a folder: load it by from_pretrained")
    if path.suffix != ".safetensors" and path.suffix not in PICKLE_SUFFIXES:
        raise ValueError(f"path must end in .safetensors or {', '.join(PICKLE_SUFFIXES)}, got {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): fetch or copy it again")

    try:
        content, metadata = (
            _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
        )
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, error)) from None  # PyTorch's own message advises to run it
    except Exception as error:  # the readers raise nearly anything for a cut or corrupt file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} is cut, corrupt or no {path.suffix} file: fetch or copy it again ({reason})"
        ) from error

    config, recorded = _read_header(metadata, path)
    cases = tuple(f"case{k}." for k in range(len(recorded.get("cases", ()))))
    tensors = _unwrap({k: v for k, v in content.items() if not str(k).startswith(cases)}, path)
    return SingleFile(tensors, config, recorded)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_pickle(path: Path) -> dict[Any, Any]:
    with warnings.catch_warnings():
        # A plain pickle that turns out to be all right is nothing to warn about.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    culprit = re.search(r"GLOBAL (\S+)", str(error))
    what = f"more than tensors ({culprit[1]})" if culprit else "more than tensors, or damage"
    return (
        f"{path} holds {what}. It was refused, and nothing in it was run. If you trust its origin, convert "
        "it elsewhere, where nothing can be harmed: "
        'tensors = torch.load(path, weights_only=False)["state_dict"]; '
        'safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, "weights.safetensors")'
    )


def _read_header(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config fields, and what is said of recorded test cases."""
    try:
        config, recorded = (json.loads(metadata.get(key, "{}")) for key in ("config", "meta"))
        len(recorded.get("cases", ()))  # a list, where there is one
        return {name: value for name, value in config.items() if not name.startswith("_")}, recorded
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'"config" and "meta" in the header of {path} must be JSON objects ({error})'
        ) from error


def _unwrap(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The state dict within what training programs save."""
    wrappers = [name for name in _WRAPPERS if isinstance(content.get(name), dict)]
    if len(wrappers) > 1:
        raise ValueError(f"{path} must hold one state dict, it holds {wrappers}: save the one you mean alone")
    if wrappers:
        others = [str(name) for name in content if name not in wrappers]
        logger.info(f"{path}: took {wrappers[0]!r}, left aside {others}")
        content = content[wrappers[0]]
    if not content:
        raise ValueError(f"{path} must hold tensors, it holds none")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} must hold named tensors alone, but {name!r} is a {type(value).__name__}"
            )

    state_dict = {name: tensor.detach() for name, tensor in content.items()}
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state_dict)), None):
        logger.info(f"{path}: took {prefix!r} off every name")
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return state_dict


# --- Config -------------------------------------------------------------------------------------------------


def tensor_shape(state_dict: Mapping[str, Tensor], name: str, *dims: str) -> tuple[int, ...]:
    """The shape of a tensor that tells sizes.

    Args:
        dims: What each dimension is, for the message.

    Raises:
        ValueError: It is missing, has another number of dimensions, or is empty.
    """
    if name not in state_dict:
        raise ValueError(
            f"the checkpoint must hold {name} ({', '.join(dims)}), but there are "
            f"{', '.join(sorted(state_dict)[:3])}, ... ({len(state_dict)} tensors)"
        )
    shape = tuple(state_dict[name].shape)
    if len(shape) != len(dims) or 0 in shape:
        raise ValueError(f"{name} must be ({', '.join(dims)}), the file has {shape}")
    return shape


def count_blocks(state_dict: Iterable[str], name: str) -> int:
    """How many blocks there are whose tensors are named `<name>.<number>.<tensor>`.

    Raises:
        ValueError: The numbers do not run from 0 without gaps.
    """
    matches = (re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in state_dict)
    blocks = {int(match[1]) for match in matches if match}
    if blocks != set(range(len(blocks))):
        raise ValueError(f"blocks must be numbered from 0 without gaps, the file has {sorted(blocks)}")
    return len(blocks)


def config_fields(model_class: Any) -> set[str]:
    """The config fields that a class takes; a subclass may have fixed others."""
    return model_class._get_init_keys(model_class) - {"self", "kwargs"}


def known_fields(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that a class takes."""
    return {name: value for name, value in config.items() if name in config_fields(model_class)}


def check_fields(given: Iterable[str], fields: Collection[str], source: str) -> None:
    """Raise ValueError if something that `source` names is no config field."""
    if unknown := sorted(set(given) - set(fields)):
        raise ValueError(f"{source} must name config fields, got {unknown}; there are {sorted(fields)}")


def check_agreement(inferred: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if a field that `source` gives is another than the tensors tell.

    None, which leaves a field to the others, agrees with everything here: `check_tensors` has the last word.
    """
    for name in inferred.keys() & given.keys():
        if given[name] is not None and given[name] != inferred[name]:
            raise ValueError(f"{source} says {name}={given[name]!r}, but the tensors tell {inferred[name]!r}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError if weights cannot be of this type. None is the file's own."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating type such as torch.float16, or None, got {dtype!r}")


# --- Model --------------------------------------------------------------------------------------------------


def empty_model(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A model without memory for its tensors. `config`: fields that its class takes, see `known_fields`."""
    with init_empty_weights():
        return model_class.from_config(config)


def check_fixed_fields(model: Any, given: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if `source` gives a field that the model's class does not take, unless it says what
    the class has fixed it to."""
    fields = config_fields(type(model))
    fixed = {name: value for name, value in given.items() if name not in fields}
    check_fields(
        (name for name, value in fixed.items() if _as_json(model.config.get(name)) != value), fields, source
    )


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, hint: str | None = None
) -> None:
    """Raise ValueError, with one readable list of all that does not fit, in the names that are given.

    Args:
        expected: The tensors that the model must have, with or without memory.
        found: Those of the file.
        hint: A last line, for whoever reads the list.
    """
    common = [name for name in expected if name in found]
    groups = {
        "missing": [f"{name} {tuple(expected[name].shape)}" for name in expected if name not in found],
        "surplus": [f"{name} {tuple(found[name].shape)}" for name in found if name not in expected],
        "misshapen": [
            f"{name} is {tuple(found[name].shape)}, must be {tuple(expected[name].shape)}"
            for name in common
            if found[name].shape != expected[name].shape
        ],
        "of a type that no weight has": [
            f"{name} is {found[name].dtype}" for name in common if not found[name].is_floating_point()
        ],
    }
    refuse_misfits(path, groups, hint)


def refuse_misfits(source: Any, groups: Mapping[str, list[str]], hint: str | None) -> None:
    """Raise ValueError, with one readable list, if any tensor of `source` does not fit.

    Args:
        groups: Tensors by what is wrong with them, a line each.
        hint: A last line, for whoever reads the list.
    """
    lines = [
        line
        for group, names in groups.items()
        if names
        for line in (f"  {group} ({len(names)}):", *(f"    {name}" for name in by_block(names)))
    ]
    if lines:
        lines += [] if hint is None else [f"  {hint}"]
        raise ValueError(
            "\n".join((f"the tensors of {source} must be those of the model, but some are", *lines))
        )


def by_block(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the first number of the name they begin with, `<name>.<number>.`, as one."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        match = re.fullmatch(r"([\w.]*?\.)(\d+)(\..*)", line, re.DOTALL)
        head, number, tail = match.groups() if match else (line, "", "")
        numbers.setdefault((head, tail), []).append(number)
    return [
        head + (found[0] if len(found) == 1 else f"{{{','.join(found)}}}") + tail
        for (head, tail), found in numbers.items()
    ]


def fill_model(model: Any, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Give an empty model its tensors, under its own names, and leave it in evaluation mode.

    Args:
        dtype: Of the model. None keeps each tensor's.
    """
    state_dict = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state_dict.items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.eval()


def log_report(report: SingleFileReport, path: Path, changes_model: bool = False) -> None:
    """Log a report under "localdit" as information; what was chosen as a warning, if it `changes_model`."""
    logger.info(f"{path} holds {report.found}")
    for reason, names in report.dropped.items():
        logger.info(f"{path}: left aside {len(names)} tensors ({reason}): {'; '.join(by_block(names))}")
    logger.log(logging.WARNING if changes_model else logging.INFO, f"{path}: {report.chosen}")


# --- Writing ------------------------------------------------------------------------------------------------


def write_single_file(
    model: Any,
    path: str | os.PathLike[str],
    to_published: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Write a model to one file, with its config in the header. The file appears whole or not at all.

    Args:
        path: Must end in `.safetensors`. Missing folders above it are made.
        to_published: Makes the file's tensors out of the model's state dict.

    Raises:
        ValueError: Another ending; or the model has other tensors than its config says (adapters, fused
            projections), or has them elsewhere (offloaded to disk).
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    state_dict = model.state_dict()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    expected = empty_model(type(model), known_fields(type(model), config)).state_dict()
    if foreign := sorted(state_dict.keys() ^ expected.keys()):
        raise ValueError(
            f"the model must have the tensors of its config and no other, but {len(foreign)} differ, such as "
            f"{foreign[:4]}: unload the adapters, or undo fuse_qkv_projections"
        )
    if offloaded := [name for name, tensor in state_dict.items() if tensor.is_meta]:
        raise ValueError(
            f"every tensor must be in memory, but {offloaded[0]} is offloaded: undo the offloading"
        )

    metadata = {"format": "pt", "config": json.dumps({"_class_name": type(model).__name__, **config})}
    tensors = {name: tensor.contiguous() for name, tensor in to_published(state_dict).items()}
    with staged_file(path) as staged:
        save_file(tensors, staged, metadata=metadata)
