"""Published LocalDiT checkpoints: one file that holds the whole transformer, read and written strictly.

`LocalDiTTransformer2DModel.from_single_file` and `save_single_file` are made of what stands here. The
published layout differs from the module tree in three ways:

- self-attention's projections are fused, as `attn1.to_qkv`, and beside them lie stale initial copies in
  `attn1.to_{q,k,v}`; `attn2.to_kv` is a stale copy too. Reading a stale copy gives noise without any error;
- the global-context tensors stand under `attn1.processor.`, where a file holds them at all: the published
  program drew them afresh at each start and never saved them;
- the configuration is missing. Sizes are read from the tensors, the rest from the header of our own files.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from localdit.models.single_file import (
    SingleFileReport,
    check_agreement,
    check_dtype,
    check_fields,
    check_fixed_fields,
    check_tensors,
    config_fields,
    count_blocks,
    empty_model,
    fill_model,
    known_fields,
    log_report,
    read_single_file,
    tensor_shape,
    write_single_file,
)

GLOBAL_CONTEXT_CHOICES = ("auto", "fold", "random", "none")

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
_FOLDER_LAYOUT = (
    "attn1.to_q without attn1.to_qkv is the layout of a folder: load the folder by from_pretrained"
)
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


class LocalDiTSingleFileMixin:
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
        write_single_file(self, path, to_published)


def load_single_file(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    global_context: str = "auto",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> tuple[Any, SingleFileReport]:
    """`LocalDiTSingleFileMixin.from_single_file`, which documents the arguments; returns its report too."""
    _check_arguments(global_context, seed, dtype)
    check_fields(config_overrides, config_fields(model_class) - {"global_context"}, "config_overrides")

    path = Path(path)
    file = read_single_file(path)
    header = {ours: file.recorded[name] for name, ours in _RECORDED_NAMES.items() if name in file.recorded}
    header |= file.config
    live, stale = _split_stale(file.tensors)
    inferred = infer_config(live)
    has_branch, has_table = inferred.pop("global_context"), inferred.pop(_TABLE)
    check_agreement(inferred, header, f"the header of {path}")
    check_agreement(inferred, config_overrides, "config_overrides")

    # 1. The config.
    choice = _choose(global_context, header.get("global_context"), has_branch, has_table)
    table = None if choice.table == choice.branch else choice.table
    decided = {"global_context": choice.branch, _TABLE: table}
    described = header | decided if choice.overrules_file else decided | header
    config = known_fields(model_class, inferred | described | config_overrides)

    # 2. An empty model says which tensors there must be.
    unused = [name for name in live if choice.overrules_file and _our_tail(name).startswith(_BRANCH)]
    live = {name: tensor for name, tensor in live.items() if name not in unused}
    model = empty_model(model_class, config)
    check_fixed_fields(model, header, f"the header of {path}")
    expected = to_published(model.state_dict())
    expected = {k: v for k, v in expected.items() if not _our_tail(k).startswith(choice.drawn)}
    folder_layout = any(".attn1.to_q." in name for name in live)
    check_tensors(expected, live, path, _FOLDER_LAYOUT if folder_layout else None)

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
    fill_model(model, state_dict, dtype)

    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"{len(file.tensors)} tensors: {inferred['num_layers']} blocks, "
        f"{inferred['num_attention_heads']} heads of {inferred['attention_head_dim']}, "
        f"{'with' if has_branch else 'no'} global context, {'with' if has_table else 'no'} bias tables",
        dropped={
            reason: tuple(names)
            for reason, names in (("stale copies", stale), ("the global context, not wanted", unused))
            if names
        },
        chosen=choice.explain(seed),
    )
    log_report(report, path, choice.changes_model)
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
    dim, in_channels, patch, _ = tensor_shape(state_dict, "pos_embed.proj.weight", "D", "C", "p", "p")
    (head_dim,) = tensor_shape(state_dict, "transformer_blocks.0.attn1.norm_q.weight", "D / heads")
    _, caption_channels = tensor_shape(
        state_dict, "caption_projection.linear_1.weight", "D", "caption channels"
    )
    outputs, _ = tensor_shape(state_dict, "proj_out.weight", "p * p * C", "D")
    if dim % head_dim or outputs % patch**2:
        raise ValueError(
            "the tensors must agree on a LocalDiT, but pos_embed.proj.weight tells width "
            f"{dim} and patch {patch}, norm_q a head width of {head_dim}, proj_out {outputs} outputs"
        )

    tails = {_our_tail(name): tensor for name, tensor in state_dict.items()}
    config = {
        "num_layers": count_blocks(state_dict, "transformer_blocks"),
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
            rows, _ = tensor_shape(tails, tail, "(2 * window_size - 1)²", "heads")
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


def _check_arguments(global_context: str, seed: int | None, dtype: torch.dtype | None) -> None:
    if global_context not in GLOBAL_CONTEXT_CHOICES:
        raise ValueError(f"global_context must be one of {GLOBAL_CONTEXT_CHOICES}, got {global_context!r}")
    if (global_context == "random") != (seed is not None):
        raise ValueError(
            'seed must be an integer with global_context="random" and None with any other choice, '
            f"got seed={seed!r} and global_context={global_context!r}"
        )
    check_dtype(dtype)
