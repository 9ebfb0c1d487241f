"""Published PixelDiT checkpoints: one file that holds a whole transformer, read and written strictly.

`PixelDiTTransformer2DModel` and `PixelDiTTextTransformer2DModel` have `from_single_file` and
`save_single_file` from here. Three layouts are read; in all of them the network itself has the same names:

- Lightning's, of the class model: `denoiser.*`, its moving average `ema_denoiser.*`, and a head that aligns
  representations in training, `diffusion_trainer.*`;
- that of the text model: `core.*`, and such a head, `_repa_projector.*`;
- ComfyUI's, of the text model: `model.diffusion_model.*`, the pixel blocks' modulation in two tensors.

Our module tree differs: q, k and v are three layers, SwiGLU's w3 and w1 are one, and the pixel-wise
modulation is cut into what acts before attention and what acts after it, one value of all pixels after the
other.
"""

import math
import os
import re
from collections.abc import Mapping
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

LICENCE = (
    "NVIDIA publishes its PixelDiT weights under NSCLv1, for research and evaluation only, and that goes for "
    "what is made of them too"
)

# Prefixes of the network, the best first, and of what is left aside, with the reason.
_NETWORKS = ("ema_denoiser.", "denoiser.", "core.", "model.diffusion_model.", "diffusion_model.")
_LEFT_ASIDE = {
    "diffusion_trainer.": "the head that aligns representations in training",
    "_repa_projector.": "the head that aligns representations in training",
    "denoiser.": "the weights of which there is a moving average",
}

# Ours, and the published name, of layers that differ in nothing else.
_LAYERS = {
    "patch_embed": "s_embedder.proj",
    "pixel_embed": "pixel_embedder.proj",
    "time_embed.linear_1": "t_embedder.mlp.0",
    "time_embed.linear_2": "t_embedder.mlp.2",
    "class_embed": "y_embedder.embedding_table",
    "caption_projection": "y_embedder.proj",
    "caption_norm": "y_embedder.norm",
    "caption_position": "y_pos_embedding",
    "norm_out": "final_layer.norm",
    "proj_out": "final_layer.linear",
}
# The same within a block of the patch level, of the class and of the text model, and of the pixel level.
# `to_qkv`, `add_qkv_proj`, `w1`, `w3` and the pixel level's `modulation` come of `_fuse` and go by `_cut`.
_CLASS_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn1.to_qkv": "attn.qkv",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn1.to_out.0": "attn.proj",
    "ff.w1": "mlp.w1",
    "ff.w3": "mlp.w3",
    "ff.net.2": "mlp.w2",
    "modulation": "adaLN_modulation.0",
}
_TEXT_BLOCK = {
    "norm1": "norm_x1",
    "norm1_context": "norm_y1",
    "norm2": "norm_x2",
    "norm2_context": "norm_y2",
    "attn1.to_qkv": "attn.qkv_x",
    "attn1.add_qkv_proj": "attn.qkv_y",
    "attn1.norm_q": "attn.q_norm_x",
    "attn1.norm_k": "attn.k_norm_x",
    "attn1.norm_added_q": "attn.q_norm_y",
    "attn1.norm_added_k": "attn.k_norm_y",
    "attn1.to_out.0": "attn.proj_x",
    "attn1.to_add_out": "attn.proj_y",
    "ff.w1": "mlp_x.w1",
    "ff.w3": "mlp_x.w3",
    "ff.net.2": "mlp_x.w2",
    "ff_context.w1": "mlp_y.w1",
    "ff_context.w3": "mlp_y.w3",
    "ff_context.net.2": "mlp_y.w2",
    "modulation": "adaLN_modulation_img.0",
    "modulation_context": "adaLN_modulation_txt.0",
}
_PIXEL_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "compress": "compress_to_attn",
    "expand": "expand_from_attn",
    "attn1.to_qkv": "attn.qkv",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "modulation": "adaLN_modulation.0",
}
_QUERY = re.compile(r"(.*\.(?:to|add)_)q((?:_proj)?\.weight)")
_KEY_OR_VALUE = re.compile(r".*\.(?:to|add)_[kv](?:_proj)?\.weight")
_FUSED_QKV = re.compile(r"(.*\.(?:to|add)_)qkv((?:_proj)?\.weight)")
_SWIGLU = re.compile(r"(transformer_blocks\.\d+\.ff(?:_context)?\.)net\.0\.proj\.weight")
_SWIGLU_HALF = re.compile(r"(transformer_blocks\.\d+\.ff(?:_context)?\.)w([13])\.weight")
_PIXEL_MODULATION = re.compile(r"(pixel_blocks\.\d+\.modulation)([12]?)\.(weight|bias)")
_COMFYUI_HALF = re.compile(r"(pixel_blocks\.\d+\.adaLN_modulation)_(msa|mlp)(?:\.0)?\.(weight|bias)")


class PixelDiTSingleFileMixin:
    """`from_single_file` and `save_single_file`, for both PixelDiT models."""

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **config_overrides: Any
    ) -> Self:
        """Build the model from one file in a published layout.

        Sizes are read from the tensors: blocks, heads and their widths on both levels, channels, patch,
        classes or text, post-modulation. What tensors cannot tell (`sample_size`, `mlp_ratio`,
        `timestep_period`, the parameters of rotary positions, ...) comes from
        `config_overrides`, else from the header of a file that `save_single_file` wrote, else it is the
        default of the class, which is the published value.

        Of weights and their moving average the average is taken; heads that served training alone are left
        aside. What was found, dropped and chosen is logged under "localdit", and with files that are not ours
        the licence of the published weights.

        Args:
            path: `.safetensors`; or `.pt`, `.pth`, `.bin`, `.ckpt`, read without running what they hold.
            dtype: Of the model. None keeps the file's.
            config_overrides: Config fields of this class, those that a subclass adds included.

        Returns:
            The model, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: `path` does not exist.
            ValueError: The file is empty, cut, corrupt, or holds more than tensors. A tensor is missing,
                surplus or misshapen. A config field is unknown, or contradicts the tensors.
        """
        model, _ = load_single_file(cls, path, dtype=dtype, **config_overrides)
        return model

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write the network's published names, without prefix, with the config in the header:
        `from_single_file` gives an equal model. The file appears whole or not at all.

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
    """`PixelDiTSingleFileMixin.from_single_file`, which documents the arguments; returns its report too."""
    check_dtype(dtype)
    check_fields(config_overrides, config_fields(model_class), "config_overrides")
    path = Path(path)
    file = read_single_file(path)
    network, prefix, dropped = find_network(file.tensors)
    network = join_halves(network)

    # 1. The config.
    inferred = infer_config(network)
    _check_kind(model_class, inferred, path)
    check_agreement(inferred, file.config, f"the header of {path}")
    check_agreement(inferred, config_overrides, "config_overrides")
    config = known_fields(model_class, inferred | file.config | config_overrides)

    # 2. An empty model says which tensors there must be; then they take their places.
    model = empty_model(model_class, config)
    check_fixed_fields(model, file.config, f"the header of {path}")
    check_tensors(to_published(model.state_dict()), network, path)
    fill_model(model, from_published(network), dtype)

    kind = "text" if "caption_channels" in inferred else "class"
    modulation = "post-modulation" if inferred["pixel_post_modulation"] else "pre-modulation"
    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"{len(file.tensors)} tensors: a {kind} model of {inferred['num_layers']} patch blocks, "
        f"{inferred['num_attention_heads']} heads of {inferred['attention_head_dim']}, and "
        f"{inferred['num_pixel_layers']} pixel blocks with {modulation}",
        dropped={reason: tuple(names) for reason, names in dropped.items()},
        chosen=f"took the network from {f'{prefix}*' if prefix else 'the names as they are'}. "
        + ("" if file.config else f"{LICENCE}."),
    )
    log_report(report, path)
    return model, report


def find_network(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], str, dict[str, list[str]]]:
    """The network's tensors within a checkpoint, without their prefix; the prefix; and the names of what else
    there is that belongs to no network, by the reason why it is left aside. What nobody knows stays among the
    network's, for the check to name it."""
    prefix = next((p for p in _NETWORKS if any(name.startswith(p) for name in tensors)), "")
    network: dict[str, Tensor] = {}
    dropped: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        reason = next((r for p, r in _LEFT_ASIDE.items() if p != prefix and name.startswith(p)), None)
        if reason is None:
            network[name.removeprefix(prefix)] = tensor
        else:
            dropped.setdefault(reason, []).append(name)
    return network, prefix, dropped


# --- Layouts ------------------------------------------------------------------------------------------------


def join_halves(network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network with ComfyUI's two halves of each pixel-wise modulation put together, others as they are.

    Raises:
        ValueError: A half is missing.
    """
    joined: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in network.items():
        if match := _COMFYUI_HALF.fullmatch(name):
            halves.setdefault(f"{match[1]}.0.{match[3]}", {})[match[2]] = tensor
        else:
            joined[name] = tensor
    for name, half in halves.items():
        if half.keys() != {"msa", "mlp"}:
            raise ValueError(f"{name} must come in two halves, msa and mlp, the file has {sorted(half)}")
        pixels = _pixels_of_patch(network)
        parts = [half[key].unflatten(0, (pixels, -1)) for key in ("msa", "mlp")]  # (P, 3E, ...)
        joined[name] = torch.cat(parts, dim=1).flatten(0, 1)
    return joined


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as the published network has them."""
    fused = _fuse(state_dict)
    names = _published_names(
        "caption_position" in state_dict,
        count_blocks(state_dict, "transformer_blocks"),
        count_blocks(state_dict, "pixel_blocks"),
    )
    return {_rename(name, names): tensor for name, tensor in fused.items()}


def from_published(network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_published`."""
    names = _published_names(
        "y_pos_embedding" in network,
        count_blocks(network, "patch_blocks"),
        count_blocks(network, "pixel_blocks"),
    )
    ours = {published: name for name, published in names.items()}
    return _cut({_rename(name, ours): tensor for name, tensor in network.items()})


def infer_config(network: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config fields that the tensors of a published network tell.

    Returns:
        `num_layers`, `num_attention_heads`, `attention_head_dim`, `num_pixel_layers`, `pixel_dim`,
        `pixel_num_attention_heads`, `pixel_attention_head_dim`, `pixel_mlp_ratio`, `in_channels`,
        `patch_size`, `pixel_post_modulation`; and `num_classes` of a class model, `caption_channels` and
        `max_text_tokens` of a text model.

    Raises:
        ValueError: A tensor that tells a size is missing or has an impossible shape.
    """
    text = "y_pos_embedding" in network
    attn, block = ("q_norm_x" if text else "q_norm"), "patch_blocks.0"
    dim, _ = tensor_shape(network, "s_embedder.proj.weight", "D", "C * p * p")
    pixel_dim, channels = tensor_shape(network, "pixel_embedder.proj.weight", "E", "C")
    (head_dim,) = tensor_shape(network, f"{block}.attn.{attn}.weight", "D / heads")
    pixel_width, _ = tensor_shape(network, "pixel_blocks.0.compress_to_attn.weight", "A", "p * p * E")
    (pixel_head_dim,) = tensor_shape(network, "pixel_blocks.0.attn.q_norm.weight", "A / heads")
    hidden, _ = tensor_shape(network, "pixel_blocks.0.mlp.fc1.weight", "hidden", "E")
    modulation, _ = tensor_shape(network, "pixel_blocks.0.adaLN_modulation.0.weight", "6 * p * p * E", "D")
    pixels = _pixels_of_patch(network)
    if dim % head_dim or pixel_width % pixel_head_dim:
        raise ValueError(
            f"the tensors must agree on a PixelDiT, but its widths of {dim} and {pixel_width} are no "
            f"multiples of their heads', {head_dim} and {pixel_head_dim}"
        )
    config = {
        "num_layers": count_blocks(network, "patch_blocks"),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "num_pixel_layers": count_blocks(network, "pixel_blocks"),
        "pixel_dim": pixel_dim,
        "pixel_num_attention_heads": pixel_width // pixel_head_dim,
        "pixel_attention_head_dim": pixel_head_dim,
        "pixel_mlp_ratio": hidden / pixel_dim,
        "in_channels": channels,
        "patch_size": math.isqrt(pixels),
        "pixel_post_modulation": modulation == 4 * pixels * pixel_dim,
    }
    if text:
        _, tokens, _ = tensor_shape(network, "y_pos_embedding", "1", "text tokens", "D")
        _, features = tensor_shape(network, "y_embedder.proj.weight", "D", "caption channels")
        return config | {"caption_channels": features, "max_text_tokens": tokens}
    labels, _ = tensor_shape(network, "y_embedder.embedding_table.weight", "classes + 1", "D")
    return config | {"num_classes": labels - 1}


def _published_names(text: bool, layers: int, pixel_layers: int) -> dict[str, str]:
    """The published name of each of our layers, after `_fuse`."""
    block = _TEXT_BLOCK if text else _CLASS_BLOCK
    levels = (("transformer_blocks", "patch_blocks", layers, block),
              ("pixel_blocks", "pixel_blocks", pixel_layers, _PIXEL_BLOCK))  # fmt: skip
    return _LAYERS | {
        f"{ours}.{i}.{layer}": f"{published}.{i}.{published_layer}"
        for ours, published, count, names in levels
        for i in range(count)
        for layer, published_layer in names.items()
    }


def _rename(name: str, names: Mapping[str, str]) -> str:
    """The other name of a tensor; what a subclass has of its own keeps its name."""
    if name in names:  # of a bare parameter
        return names[name]
    layer, dot, kind = name.rpartition(".")
    return names.get(layer, layer) + dot + kind


def _fuse(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v as one tensor, SwiGLU's w3 and w1 as two, each pixel-wise modulation as one."""
    pixels = state_dict["patch_embed.weight"].shape[1] // state_dict["pixel_embed.weight"].shape[1]
    fused: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if match := _QUERY.fullmatch(name):
            parts = [state_dict[f"{match[1]}{letter}{match[2]}"] for letter in "qkv"]
            fused[f"{match[1]}qkv{match[2]}"] = torch.cat(parts)
        elif match := _SWIGLU.fullmatch(name):
            fused[f"{match[1]}w3.weight"], fused[f"{match[1]}w1.weight"] = tensor.chunk(2)
        elif match := _PIXEL_MODULATION.fullmatch(name):
            if match[2] == "2":
                before = state_dict.get(f"{match[1]}1.{match[3]}")
                values = tensor.unflatten(0, (4, pixels, -1))  # (4, P, E, ...)
                if before is not None:
                    values = torch.cat((before.unflatten(0, (2, pixels, -1)), values))  # (6, P, E, ...)
                fused[f"{match[1]}.{match[3]}"] = values.transpose(0, 1).flatten(0, 2)
        elif not _KEY_OR_VALUE.fullmatch(name):
            fused[name] = tensor
    return fused


def _cut(fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_fuse`. What is cut off has memory of its own."""
    pixel_dim, channels = fused["pixel_embed.weight"].shape
    pixels = fused["patch_embed.weight"].shape[1] // channels
    state_dict: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        if match := _FUSED_QKV.fullmatch(name):
            for letter, part in zip("qkv", tensor.chunk(3)):
                state_dict[f"{match[1]}{letter}{match[2]}"] = part.clone()
        elif match := _SWIGLU_HALF.fullmatch(name):
            if match[2] == "3":
                halves = (tensor, fused[f"{match[1]}w1.weight"])
                state_dict[f"{match[1]}net.0.proj.weight"] = torch.cat(halves)
        elif match := _PIXEL_MODULATION.fullmatch(name):
            values = tensor.unflatten(0, (pixels, -1, pixel_dim)).transpose(0, 1)  # (6 or 4, P, E, ...)
            state_dict[f"{match[1]}2.{match[3]}"] = values[-4:].flatten(0, 2).clone()
            if len(values) == 6:
                state_dict[f"{match[1]}1.{match[3]}"] = values[:2].flatten(0, 2).clone()
        else:
            state_dict[name] = tensor
    return state_dict


def _pixels_of_patch(network: Mapping[str, Tensor]) -> int:
    """p * p, of a published network."""
    _, values = tensor_shape(network, "s_embedder.proj.weight", "D", "C * p * p")
    _, channels = tensor_shape(network, "pixel_embedder.proj.weight", "E", "C")
    pixels = values // channels
    if math.isqrt(pixels) ** 2 * channels != values:
        raise ValueError(
            f"s_embedder.proj.weight must read C * p * p values, with C = {channels} as "
            f"pixel_embedder.proj.weight has it, the file has {values}"
        )
    return pixels


def _check_kind(model_class: Any, inferred: Mapping[str, Any], path: Path) -> None:
    for field, kind, owner in (
        ("num_classes", "class", "PixelDiTTransformer2DModel"),
        ("caption_channels", "text", "PixelDiTTextTransformer2DModel"),
    ):
        if field in inferred and field not in config_fields(model_class):
            raise ValueError(f"{path} must hold another model, it holds a {kind} model: load it by {owner}")
