"""LEDiT in one file, read and written strictly; and DiT checkpoints, made into the LEDiT that fine-tuning
starts from.

Neither weights nor code of LEDiT were released. A file of ours has DiT's published layout, without its
position table and with `locality_conv` (and `locality_norm`) beside it; its config stands in the header.

A DiT is read in two layouts: the published one, and that of diffusers' `DiTTransformer2DModel`, which holds a
copy of the embedders in every block. Its position table is dropped, and the convolution, which it lacks,
starts as the identity: with `attention_pattern="none"` the model computes what that DiT computes without
positions.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

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
from localdit.models.strict import check_sizes

# Heads by width, of the published sizes S, B, L, XL: no tensor tells them.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


class Layout(NamedTuple):
    """What a layout calls our layers, where it differs."""

    title: str
    blocks: str  # in place of "transformer_blocks"
    outside: Mapping[str, str]  # layers outside the blocks
    inside: Mapping[str, str]  # layers of a block
    fused: bool  # queries, keys and values are one layer
    table: str  # the position table


PUBLISHED = Layout(
    title="DiT's published layout",
    blocks="blocks",
    outside={
        "patch_embed": "x_embedder.proj",
        "timestep_embedder.linear_1": "t_embedder.mlp.0",
        "timestep_embedder.linear_2": "t_embedder.mlp.2",
        "class_embedder": "y_embedder.embedding_table",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    inside={
        "modulation": "adaLN_modulation.1",
        "attn1.to_q": "attn.qkv",
        "attn1.to_k": "attn.qkv",
        "attn1.to_v": "attn.qkv",
        "attn1.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    },
    fused=True,
    table="pos_embed",
)
DIFFUSERS = Layout(
    title="diffusers' layout of DiT",
    blocks="transformer_blocks",
    outside={
        "patch_embed": "pos_embed.proj",
        "timestep_embedder.linear_1": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "timestep_embedder.linear_2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        "class_embedder": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
        "modulation_out": "proj_out_1",
        "proj_out": "proj_out_2",
    },
    inside={"modulation": "norm1.linear"},
    fused=False,
    table="pos_embed.pos_embed",
)
_COPY = re.compile(r"transformer_blocks\.(?!0\.)\d+(\.norm1\.emb\..*)")


class LEDiTSingleFileMixin:
    """`from_single_file` and `save_single_file`, for a model whose tensors have LEDiT's names."""

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **config_overrides: Any
    ) -> Self:
        """Build the model from one file: a LEDiT as `save_single_file` writes it, or a DiT.

        Blocks, width, channels, patch, labels, feed-forward and convolution are read from the tensors, and
        `sample_size` from a DiT's position table; heads are those of the published sizes. What tensors cannot
        tell (`attention_pattern`, `causal_variant`, heads of other widths, ...) comes from
        `config_overrides`, else from the header of a file of ours, else it is the default of the class.

        A DiT gets the convolution that `conv_kernel_size` and `conv_groups` say, as the identity, and loses
        its positions; this is logged under "localdit" as a warning, and what was found as information.

        Args:
            path: `.safetensors`; or `.pt`, `.pth`, `.bin`, `.ckpt`, read without running what they hold.
            dtype: Of the model. None keeps the file's.
            config_overrides: Config fields of this class. `sample_size` may differ from the file's, as where
                training goes on at another size.

        Returns:
            The model, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: `path` does not exist.
            ValueError: The file is empty, cut, corrupt, or holds more than tensors. A tensor is missing,
                surplus or misshapen, or the copies of an embedder differ. A config field is unknown, or
                contradicts the tensors.
        """
        return load_single_file(cls, path, dtype=dtype, **config_overrides)[0]

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write DiT's layout with our convolution, and the config in the header: `from_single_file` gives an
        equal model. The file appears whole or not at all.

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
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> tuple[Any, SingleFileReport]:
    """`LEDiTSingleFileMixin.from_single_file`, which documents the arguments; returns its report too."""
    check_dtype(dtype)
    check_fields(config_overrides, config_fields(model_class), "config_overrides")

    # 1. The config.
    path = Path(path)
    file = read_single_file(path)
    layout = DIFFUSERS if "pos_embed.proj.weight" in file.tensors else PUBLISHED
    tensors, copies = _split_copies(file.tensors) if layout is DIFFUSERS else (file.tensors, ())
    inferred = infer_config(tensors, layout)
    check_agreement(inferred, file.config, f"the header of {path}")
    told = {name: value for name, value in inferred.items() if name != "sample_size"}
    check_agreement(told, config_overrides, "config_overrides")
    config = inferred | file.config | config_overrides
    config |= _heads(tensors[_published_name("patch_embed.weight", layout)].shape[0], config)
    table = tensors.get(layout.table)
    tensors = {name: tensor for name, tensor in tensors.items() if name != layout.table}

    # 2. An empty model says which tensors there must be.
    model = empty_model(model_class, known_fields(model_class, config))
    check_fixed_fields(model, file.config, f"the header of {path}")
    names = model.state_dict().keys()
    is_dit = not file.config and not any(name.startswith("locality_") for name in tensors)
    convolution = {name for name in names if is_dit and name.startswith("locality_conv.")}
    expected = to_published(
        {name: tensor for name, tensor in model.state_dict().items() if name not in convolution}, layout
    )
    check_tensors(expected, tensors, path)

    # 3. The tensors take their places.
    state_dict = from_published(tensors, names - convolution, layout)
    if convolution:
        identity = torch.zeros_like(model.locality_conv.weight, device="cpu")
        nn.init.dirac_(identity, model.locality_conv.groups)
        kept = state_dict["patch_embed.weight"].dtype
        state_dict["locality_conv.weight"] = identity.to(kept)
        state_dict["locality_conv.bias"] = torch.zeros(len(identity), dtype=kept)
    fill_model(model, state_dict, dtype)

    config = model.config
    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"{len(file.tensors)} tensors in {layout.title}: {config.num_layers} blocks, "
        f"{config.num_attention_heads} heads of {config.attention_head_dim}, {config.num_classes} classes",
        dropped={
            reason: tuple(names)
            for reason, names in (
                ("copies of the embedders", copies),
                ("the position table", () if table is None else (layout.table,)),
            )
            if names
        },
        chosen="a DiT, built without its positions, and "
        + ("with a convolution that is the identity" if convolution else "without a convolution")
        if is_dit
        else "built as the file has it",
    )
    log_report(report, path, changes_model=is_dit)
    return model, report


def infer_config(state_dict: Mapping[str, Tensor], layout: Layout = PUBLISHED) -> dict[str, Any]:
    """The config fields that the tensors of a checkpoint tell.

    Returns:
        `num_layers`, `in_channels`, `out_channels`, `patch_size`, `num_classes`, `mlp_ratio`; of a file with
        a convolution `conv_kernel_size`, `conv_groups` and `conv_norm`; of one with a position table
        `sample_size`.

    Raises:
        ValueError: A tensor that tells a size is missing or has an impossible shape.
    """

    def shape(name: str, *dims: str) -> tuple[int, ...]:
        return tensor_shape(state_dict, _published_name(name, layout), *dims)

    dim, in_channels, patch, _ = shape("patch_embed.weight", "D", "C", "p", "p")
    rows, _ = shape("class_embedder.weight", "classes + 1", "D")
    hidden, _ = shape("transformer_blocks.0.ff.net.0.proj.weight", "ratio * D", "D")
    outputs, _ = shape("proj_out.weight", "p * p * C", "D")
    if outputs % patch**2:
        raise ValueError(
            f"the tensors must agree on a DiT, but there are patches of {patch} and {outputs} outputs"
        )
    config = {
        "num_layers": count_blocks(state_dict, layout.blocks),
        "in_channels": in_channels,
        "out_channels": outputs // patch**2,
        "patch_size": patch,
        "num_classes": rows - 1,
        "mlp_ratio": hidden / dim,
    }
    if "locality_conv.weight" in state_dict:
        _, per_group, kernel, _ = shape("locality_conv.weight", "D", "D / groups", "k", "k")
        config |= {
            "conv_kernel_size": kernel,
            "conv_groups": dim // per_group,
            "conv_norm": "locality_norm.weight" in state_dict,
        }
    if layout.table in state_dict:
        _, tokens, _ = shape(layout.table, "1", "N", "D")
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{layout.table} must have a square number of places, the file has {tokens}")
        config["sample_size"] = math.isqrt(tokens) * patch
    return config


def _heads(dim: int, config: Mapping[str, Any]) -> dict[str, int]:
    """Heads and their width, as the config says one of them, else as published."""
    given = {name: config[name] for name in ("num_attention_heads", "attention_head_dim") if name in config}
    check_sizes(given)
    if not given:
        if dim not in _HEADS:
            raise ValueError(
                f"num_attention_heads must be given with a width of {dim}: no tensor tells it, and it is "
                f"published for {', '.join(map(str, _HEADS))} alone"
            )
        given["num_attention_heads"] = _HEADS[dim]
    heads = given.get("num_attention_heads") or max(dim // given["attention_head_dim"], 1)
    head_dim = given.get("attention_head_dim") or dim // heads
    if heads * head_dim != dim:
        raise ValueError(
            f"num_attention_heads * attention_head_dim must be the width, {dim}, got {heads} * {head_dim}"
        )
    return {"num_attention_heads": heads, "attention_head_dim": head_dim}


# --- Layouts ------------------------------------------------------------------------------------------------


def _published_name(name: str, layout: Layout) -> str:
    """What a layout calls a tensor of ours."""
    layer, _, kind = name.rpartition(".")
    block = re.match(r"transformer_blocks\.(\d+)\.(.*)", layer)
    if block is None:
        return f"{layout.outside.get(layer, layer)}.{kind}" if layer else name
    return f"{layout.blocks}.{block[1]}.{layout.inside.get(block[2], block[2])}.{kind}"


def to_published(state_dict: Mapping[str, Tensor], layout: Layout = PUBLISHED) -> dict[str, Tensor]:
    """Our state dict in another layout; in the published one, queries, keys and values are fused."""
    published: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if layout.fused and ".attn1.to_q." in name:
            tensor = torch.cat([state_dict[name.replace("to_q", f"to_{letter}")] for letter in "qkv"])
        published.setdefault(_published_name(name, layout), tensor)
    return published


def from_published(
    published: Mapping[str, Tensor], names: Iterable[str], layout: Layout = PUBLISHED
) -> dict[str, Tensor]:
    """The inverse of `to_published`, for the tensors of ours that `names` lists."""
    ours = {}
    for name in names:
        tensor = published[_published_name(name, layout)]
        if layout.fused and (fused := re.search(r"\.attn1\.to_([qkv])\.", name)):
            tensor = tensor.chunk(3)["qkv".index(fused[1])].clone()  # of its own memory
        ours[name] = tensor
    return ours


def _split_copies(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors that count, and the names of the copies of the first block's embedders.

    Raises:
        ValueError: A copy differs.
    """
    copies = {name: match[1] for name in state_dict if (match := _COPY.fullmatch(name))}
    for name, tail in copies.items():
        first = state_dict.get(f"transformer_blocks.0{tail}")
        if first is None or not torch.equal(first, state_dict[name]):
            raise ValueError(f"{name} must be a copy of transformer_blocks.0{tail}, the file has another")
    return {name: tensor for name, tensor in state_dict.items() if name not in copies}, tuple(copies)
