"""Published LocalDiT checkpoints: one file that holds the whole transformer, read and written strictly.

`LocalDiTTransformer2DModel.from_single_file` and `save_single_file` are made of what stands here. The
published layout differs from the module tree in three ways:

- self-attention's projections are fused, as `attn1.to_qkv`, and beside them lie stale initial copies in
  `attn1.to_{q,k,v}`; `attn2.to_kv` is a stale copy too. Reading a stale copy gives noise without any error;
- the global-context tensors stand under `attn1.processor.`, where a file holds them at all: the published
  program drew them afresh at each start and never saved them;
- the configuration is missing. Sizes are read from the tensors, the rest from the header of our own files.
"""

import json
import logging
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

GLOBAL_CONTEXT_CHOICES = ("auto", "fold", "random", "none")

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model")  # as in {"state_dict": {...}, "step": 7}
_PREFIXES = ("module.", "model.")  # left by DistributedDataParallel, and by a class that holds the network

# Names under `transformer_blocks.<i>.attn1.` that differ: the published one, and ours.
_TABLE = "relative_position_bias"
_BRANCH = "global_context."
_OUR_NAMES = {
    "processor.local_rel_pos_bias": _TABLE,
    "processor.global_rel_pos_bias": f"{_BRANCH}relative_position_bias",
    "processor.to_global_kv.weight": f"{_BRANCH}to_kv.weight",
    "processor.to_global_kv.bias": f"{_BRANCH}to_kv.bias",
} | {
    f"processor.query_feat_extract.{i}.conv.{published}.weight": f"{_BRANCH}query_features.{i}.{ours}.weight"
    for i in (0, 1)
    for published, ours in (
        ("0", "depthwise"),
        ("2.fc.0", "squeeze"),
        ("2.fc.2", "excite"),
        ("3", "pointwise"),
    )
}
_PUBLISHED_NAMES = {ours: published for published, ours in _OUR_NAMES.items()}
_STALE = re.compile(r"(transformer_blocks\.\d+\.)(attn1\.to_[qkv]|attn2\.to_kv)\.(weight|bias)")

# What the header of a file with recorded test cases calls the config fields.
_RECORDED_NAMES = {
    "num_attention_heads": "num_attention_heads",
    "attention_head_dim": "attention_head_dim",
    "num_layers": "num_layers",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "caption_channels": "caption_channels",
    "patch_size": "patch_size",
    "window_size": "window_size",
    "sample_size": "sample_size",
    "qk_norm_eps": "qk_norm_eps",
    "do_rope": "rope",
    "use_global": "global_context",
}


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


class SingleFileMixin:
    """`from_single_file` and `save_single_file`, for a model whose tensors have LocalDiT's names."""

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        *,
        global_context: str = "auto",
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Build the model from one file in the published layout.

        Sizes are read from the tensors: blocks, heads and their width, channels, patch, caption width,
        conditions on the picture's size, and the window where bias tables tell it. What tensors cannot tell
        (`sample_size`, `rope`, the window of a file without tables, ...) comes from `config_overrides`, else
        from the header of a file that `save_single_file` wrote, else it is the default of the class, which is
        the published value.

        What was found, dropped and chosen is logged under "localdit" as information; a choice that makes the
        model another than the file's, as a warning.

        Args:
            path: `.safetensors`; or `.pt`, `.pth`, `.bin`, `.ckpt`, read without running what they hold.
            global_context: What becomes of the global-context branch. Published checkpoints lack its tensors,
                since the published program drew random ones at each start.

                - `"auto"`: loaded if the file holds it, left out if the file's header says that the model has
                  none, and else as `"fold"`.
                - `"fold"`: built without it, and self-attention's output weights (not their bias) halved. A
                  random branch has zero mean, so this is the published model's expected value.
                - `"random"`: built with it, its tensors drawn from `seed` by the model's own initialisation.
                - `"none"`: built without it, and nothing folded.
            seed: Of `"random"`, which needs it; the other choices draw nothing and refuse it.
            dtype: Of the model. None keeps the file's.
            config_overrides: Config fields of this class, those that a subclass adds included.

        Returns:
            The model, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: `path` does not exist.
            ValueError: The file is empty, cut, corrupt, or holds more than tensors. A tensor is missing,
                surplus or misshapen. A config field is unknown, or contradicts the tensors. `seed` and
                `global_context` do not go together.
        """
        model, _ = load_single_file(
            cls, path, global_context=global_context, seed=seed, dtype=dtype, **config_overrides
        )
        return model

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write the published layout, with the config in the header: `from_single_file` gives an equal model.

        The stale copies are not written, as nothing reads them. The file appears whole or not at all; what
        stood at `path` stays until then.

        Args:
            path: Must end in `.safetensors`. Missing folders above it are made.

        Raises:
            ValueError: Another ending; or the model has tensors that the layout has no place for (adapters,
                fused projections), or has them elsewhere (offloaded to disk).
        """
        save_single_file(self, path)


def load_single_file(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    global_context: str = "auto",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> tuple[Any, SingleFileReport]:
    """`SingleFileMixin.from_single_file`, which documents the arguments; returns its report too."""
    _check_arguments(global_context, seed, dtype)
    fields = _fields(model_class)
    _check_fields(config_overrides, fields - {"global_context"}, "config_overrides")

    path = Path(path)
    tensors, header = _read(path)
    fixed = {
        name: header.pop(name) for name in header.keys() - fields
    }  # by the class, if it is the right one
    live, stale = _split_stale(tensors)
    inferred = infer_config(live)
    has_branch, has_table = inferred.pop("global_context"), inferred.pop(_TABLE)
    _check_agreement(inferred, header, f"the header of {path}")
    _check_agreement(inferred, config_overrides, "config_overrides")

    # 1. The config.
    choice = _choose(global_context, header.get("global_context"), has_branch, has_table)
    table = None if choice.table == choice.branch else choice.table
    decided = {"global_context": choice.branch, _TABLE: table}
    described = header | decided if choice.overrules_file else decided | header
    config = inferred | described | config_overrides

    # 2. An empty model says which tensors there must be.
    unused = [name for name in live if choice.overrules_file and _our_tail(name).startswith(_BRANCH)]
    live = {name: tensor for name, tensor in live.items() if name not in unused}
    with init_empty_weights():
        model = model_class.from_config(config)
    strange = {name: value for name, value in fixed.items() if _as_json(model.config.get(name)) != value}
    _check_fields(strange, fields, f"the header of {path}")
    expected = to_published(model.state_dict())
    _check_tensors(
        {k: v for k, v in expected.items() if not _our_tail(k).startswith(choice.drawn)}, live, path
    )

    # 3. The tensors take their places.
    state_dict = from_published(live)
    if choice.fold:
        state_dict |= {k: v / 2 for k, v in state_dict.items() if k.endswith(".attn1.to_out.0.weight")}
    if choice.drawn:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = model_class.from_config(config).state_dict()
        kept = live["pos_embed.proj.weight"].dtype
        state_dict |= {k: v.to(kept) for k, v in fresh.items() if _our_tail(k).startswith(choice.drawn)}
    state_dict = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state_dict.items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.eval()

    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"{len(tensors)} tensors: {inferred['num_layers']} blocks, "
        f"{inferred['num_attention_heads']} heads of {inferred['attention_head_dim']}, "
        f"{'with' if has_branch else 'no'} global context, {'with' if has_table else 'no'} bias tables",
        dropped={
            reason: tuple(names)
            for reason, names in (("stale copies", stale), ("the global context, not wanted", unused))
            if names
        },
        chosen=choice.explain(seed),
    )
    logger.info(f"{path} holds {report.found}")
    for reason, names in report.dropped.items():
        logger.info(f"{path}: left aside {len(names)} tensors ({reason}): {'; '.join(_by_block(names))}")
    logger.log(logging.WARNING if choice.changes_model else logging.INFO, f"{path}: {report.chosen}")
    return model, report


@dataclass(frozen=True)
class _Choice:
    """What becomes of the global-context branch."""

    branch: bool  # built with it
    table: bool  # and with bias tables
    fold: bool = False  # self-attention's output weights halved
    drawn: tuple[str, ...] = ()  # tensors that begin so are drawn at random, and not asked of the file
    overrules_file: bool = False  # the caller decided, whatever the file holds and says

    @property
    def changes_model(self) -> bool:
        return self.fold or self.overrules_file

    def explain(self, seed: int | None) -> str:
        if not self.changes_model:
            return f"built {'with' if self.branch else 'without'} global context, as the file has it"
        if self.fold:
            return "built without global context, and the output weights of self-attention halved"
        if self.drawn:
            return f"built with global context, drawn at random from seed {seed}"
        return "built without global context, and nothing folded"


def _choose(global_context: str, stated: bool | None, has_branch: bool, has_table: bool) -> _Choice:
    """stated: what the file's header says of its model; None where it says nothing, as in published files."""
    if global_context == "random":
        # The published sizes count the bias tables with the branch.
        drawn = (_BRANCH,) if has_table else (_BRANCH, _TABLE)
        return _Choice(branch=True, table=True, drawn=drawn, overrules_file=True)
    if global_context != "auto":
        return _Choice(branch=False, table=has_table, fold=global_context == "fold", overrules_file=True)
    branch = has_branch if stated is None else stated
    return _Choice(branch=branch, table=has_table, fold=not branch and stated is None)


def save_single_file(model: Any, path: str | os.PathLike[str]) -> None:
    """`SingleFileMixin.save_single_file`, which documents it."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    state_dict = model.state_dict()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with init_empty_weights():
        empty = type(model).from_config({name: config[name] for name in _fields(type(model))})
    expected = empty.state_dict()
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
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, staged, metadata=metadata)
        settle(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    flush(path.parent)


# --- Layouts ------------------------------------------------------------------------------------------------


def from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the published layout under our names: stale copies dropped, `to_qkv` cut in three."""
    live, _ = _split_stale(state_dict)
    ours = {}
    for name, tensor in live.items():
        if ".attn1.to_qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                ours[name.replace("to_qkv", f"to_{letter}")] = part.clone()  # of its own memory
        else:
            ours[_rename(name, _OUR_NAMES)] = tensor
    return ours


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_published`: self-attention's projections fused, no stale copies."""
    published = {}
    for name, tensor in state_dict.items():
        if ".attn1.to_q." in name:
            parts = [state_dict[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            published[name.replace("to_q", "to_qkv")] = torch.cat(parts)
        elif ".attn1.to_k." not in name and ".attn1.to_v." not in name:
            published[_rename(name, _PUBLISHED_NAMES)] = tensor
    return published


def infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config fields that the tensors of a published checkpoint tell.

    Returns:
        `num_layers`, `num_attention_heads`, `attention_head_dim`, `in_channels`, `out_channels`,
        `patch_size`, `caption_channels`, `use_additional_conditions`; `global_context` and
        `relative_position_bias`: whether there are such tensors; `window_size` where a bias table tells it.

    Raises:
        ValueError: A tensor that tells a size is missing or has an impossible shape.
    """
    dim, in_channels, patch, _ = _shape(state_dict, "pos_embed.proj.weight", "D", "C", "p", "p")
    (head_dim,) = _shape(state_dict, "transformer_blocks.0.attn1.norm_q.weight", "D / heads")
    _, caption_channels = _shape(state_dict, "caption_projection.linear_1.weight", "D", "caption channels")
    outputs, _ = _shape(state_dict, "proj_out.weight", "p * p * C", "D")
    if dim % head_dim or outputs % patch**2:
        raise ValueError(
            "the tensors must agree on a LocalDiT, but pos_embed.proj.weight tells width "
            f"{dim} and patch {patch}, norm_q a head width of {head_dim}, proj_out {outputs} outputs"
        )

    blocks = {int(name.split(".")[1]) for name in state_dict if re.match(r"transformer_blocks\.\d+\.", name)}
    if blocks != set(range(len(blocks))):
        raise ValueError(f"blocks must be numbered from 0 without gaps, the file has {sorted(blocks)}")

    tails = {_our_tail(name): tensor for name, tensor in state_dict.items()}
    config = {
        "num_layers": len(blocks),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": outputs // patch**2,
        "patch_size": patch,
        "caption_channels": caption_channels,
        "use_additional_conditions": any(".resolution_embedder." in name for name in state_dict),
        "global_context": any(tail.startswith(_BRANCH) for tail in tails),
        _TABLE: _TABLE in tails,
    }
    for tail in (_TABLE, f"{_BRANCH}{_TABLE}"):
        if tail in tails:
            rows, _ = _shape(tails, tail, "(2 * window_size - 1)²", "heads")
            window = (math.isqrt(rows) + 1) // 2
            if (2 * window - 1) ** 2 != rows:
                raise ValueError(f"attn1.{tail} must have (2 * window_size - 1)² rows, the file has {rows}")
            config["window_size"] = window
    return config


def _our_tail(name: str) -> str:
    """Our name of a tensor, after `attn1.`; empty if it belongs to no self-attention."""
    tail = name.partition(".attn1.")[2]
    return _OUR_NAMES.get(tail, tail)


def _rename(name: str, names: Mapping[str, str]) -> str:
    head, attn1, tail = name.partition(".attn1.")
    return head + attn1 + names.get(tail, tail)


def _split_stale(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the published network computes with, and what only lies beside it."""
    stale = {}
    for name, tensor in state_dict.items():
        match = _STALE.fullmatch(name)
        if match and ("attn2" in name or f"{match[1]}attn1.to_qkv.{match[3]}" in state_dict):
            stale[name] = tensor
    return {name: tensor for name, tensor in state_dict.items() if name not in stale}, stale


def _shape(state_dict: Mapping[str, Tensor], name: str, *dims: str) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(
            f"a LocalDiT checkpoint must hold {name} ({', '.join(dims)}), but there are "
            f"{', '.join(sorted(state_dict)[:3])}, ... ({len(state_dict)} tensors)"
        )
    shape = tuple(state_dict[name].shape)
    if len(shape) != len(dims) or 0 in shape:
        raise ValueError(f"{name} must be ({', '.join(dims)}), the file has {shape}")
    return shape


# --- Checks -------------------------------------------------------------------------------------------------


def _check_arguments(global_context: str, seed: int | None, dtype: torch.dtype | None) -> None:
    if global_context not in GLOBAL_CONTEXT_CHOICES:
        raise ValueError(f"global_context must be one of {GLOBAL_CONTEXT_CHOICES}, got {global_context!r}")
    if (global_context == "random") != (seed is not None):
        raise ValueError(
            'seed must be an integer with global_context="random" and None with any other choice, '
            f"got seed={seed!r} and global_context={global_context!r}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating type such as torch.float16, or None, got {dtype!r}")


def _fields(model_class: Any) -> set[str]:
    """The config fields that a class takes; a subclass may have fixed others."""
    return model_class._get_init_keys(model_class) - {"self", "kwargs"}


def _check_fields(given: Mapping[str, Any], fields: Collection[str], source: str) -> None:
    if unknown := sorted(set(given) - set(fields)):
        raise ValueError(f"{source} must name config fields, got {unknown}; there are {sorted(fields)}")


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_agreement(inferred: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    for name in inferred.keys() & given.keys():
        # The one size with a default that another field sets.
        value = inferred["in_channels"] if name == "out_channels" and given[name] is None else given[name]
        if value != inferred[name]:
            raise ValueError(f"{source} says {name}={given[name]!r}, but the tensors tell {inferred[name]!r}")


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Raise one readable list of all that does not fit, in the file's own names."""
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
    lines = [
        line
        for group, names in groups.items()
        if names
        for line in (f"  {group} ({len(names)}):", *(f"    {name}" for name in _by_block(names)))
    ]
    if any(".attn1.to_qkv." in name for name in groups["missing"]) and any(
        ".attn1.to_q." in name for name in groups["surplus"]
    ):
        lines.append(
            "  attn1.to_q without attn1.to_qkv is the layout of a folder: load the folder by from_pretrained"
        )
    if lines:
        raise ValueError(
            "\n".join((f"the tensors of {path} must be those of the model, but some are", *lines))
        )


def _by_block(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the number of the block alone, as one."""
    blocks: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"transformer_blocks\.(\d+)\.", line)
        pattern = line if match is None else line.replace(match[1], "{}", 1)
        blocks.setdefault(pattern, []).extend([] if match is None else [match[1]])
    return [
        pattern.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}", 1)
        if numbers
        else pattern
        for pattern, numbers in blocks.items()
    ]


# --- Files --------------------------------------------------------------------------------------------------


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
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the config fields that the header names."""
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

    config, cases = _read_header(metadata, path)
    recorded = tuple(f"case{k}." for k in range(cases))
    return _unwrap({k: v for k, v in content.items() if not str(k).startswith(recorded)}, path), config


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


def _read_header(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, Any], int]:
    """Config fields, and the number of recorded test cases."""
    try:
        config, meta = (json.loads(metadata.get(key, "{}")) for key in ("config", "meta"))
        cases = len(meta.get("cases", ()))
        recorded = {ours: meta[name] for name, ours in _RECORDED_NAMES.items() if name in meta}
        return recorded | {name: value for name, value in config.items() if not name.startswith("_")}, cases
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


def settle(file: Path) -> None:
    """Put a new file on the disk, and let others read it as they may any new file, unlike safetensors."""
    probe = file.with_name(f"{file.name}.mode")
    probe.touch()
    file.chmod(probe.stat().st_mode)
    probe.unlink()
    flush(file)


def flush(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on the disk. Windows keeps folders by itself."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
