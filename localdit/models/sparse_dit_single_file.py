"""Released MicroDiT checkpoints: one file that holds the whole transformer, read and written strictly.

The released layout differs from the module tree in these ways:

- projections are fused: `qkv` of self-attention, `kv_linear` of attention to text;
- the experts' tensors stand where a dense feed-forward has its layers, as `mlp.w1` and `mlp.w2`;
- it holds two buffers that nothing learned: the position table, from which `sample_size` and
  `interpolation_scale` are read, and `mask_token`, which is zero;
- the configuration is missing. Widths and depths are read from the tensors, the rest from the header of our
  own files.
"""

import math
import os
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from localdit.models.layers import sincos_table
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

# Width of the backbone, and channels per head, of the published sizes: no tensor tells the second.
_HEAD_DIMS = {1024: 64, 512: 32}
# What trainers put before every name of the transformer, which may stand beside its encoders.
_PREFIXES = re.compile(r"((module|dit|_orig_mod)\.)+")
# What the position table tells, and a caller may overrule: no weight depends on it.
_PLACES = ("sample_size", "interpolation_scale")


class SparseDiTSingleFileMixin:
    """`from_single_file` and `save_single_file`, for a model whose tensors have SparseDiT's names."""

    config: Any

    @classmethod
    def from_single_file(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **config_overrides: Any
    ) -> Self:
        """Build the model from one file in MicroDiT's released layout.

        Widths, depths, channels and experts are read from the tensors, `sample_size` and
        `interpolation_scale` from the position table. What tensors cannot tell (`attention_head_dim` of an
        unpublished width, `expert_capacity`, ...) comes from `config_overrides`, else from the header of a
        file that `save_single_file` wrote, else it is the default of the class, which is the published value.

        A trainer's checkpoint may hold encoders beside the transformer, whose names then begin with `dit.`:
        they are left aside. What was found, dropped and chosen is logged under "localdit".

        Args:
            path: `.safetensors`; or `.pt`, `.pth`, `.bin`, `.ckpt`, read without running what they hold.
            dtype: Of the model. None keeps the file's.
            config_overrides: Config fields of this class. `sample_size` and `interpolation_scale` may differ
                from the file's, as where training goes on at another size.

        Returns:
            The model, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: `path` does not exist.
            ValueError: The file is empty, cut, corrupt, or holds more than tensors. A tensor is missing,
                surplus or misshapen, or a buffer is not what the model computes by itself. A config field is
                unknown, or contradicts the tensors.
        """
        return load_single_file(cls, path, dtype=dtype, **config_overrides)[0]

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write the released layout, with the config in the header: `from_single_file` gives an equal model.

        Scales of queries and keys (`qk_norm_affine`), which no released file has, are named `ln_q` and
        `ln_k`. The file appears whole or not at all.

        Args:
            path: Must end in `.safetensors`. Missing folders above it are made.

        Raises:
            ValueError: Another ending; or the model has tensors that the layout has no place for (adapters,
                fused projections), or has them elsewhere (offloaded to disk).
        """
        write_single_file(self, path, partial(to_released, config=self.config))


def load_single_file(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> tuple[Any, SingleFileReport]:
    """`SparseDiTSingleFileMixin.from_single_file`, which documents the arguments; returns its report too."""
    check_dtype(dtype)
    check_fields(config_overrides, config_fields(model_class), "config_overrides")

    # 1. The config.
    path = Path(path)
    file = read_single_file(path)
    tensors, others = _split_others(file.tensors)
    inferred = infer_config(tensors)
    check_agreement(inferred, file.config, f"the header of {path}")
    told = {name: value for name, value in inferred.items() if name not in _PLACES}
    check_agreement(told, config_overrides, "config_overrides")
    config = inferred | file.config | config_overrides
    if "attention_head_dim" not in config:
        if config["hidden_size"] not in _HEAD_DIMS:
            raise ValueError(
                f"attention_head_dim must be given with a width of {config['hidden_size']}: no tensor tells "
                f"it, and it is published for {' and '.join(map(str, _HEAD_DIMS))} alone"
            )
        config["attention_head_dim"] = _HEAD_DIMS[config["hidden_size"]]

    # 2. An empty model says which tensors there must be. Its blocks have the published widths, or their own.
    model = empty_model(model_class, known_fields(model_class, config))
    expected = to_released(model.state_dict())
    if any(tensors[name].shape != expected[name].shape for name in expected.keys() & tensors.keys()):
        config = infer_ratios(tensors, config) | config
        model = empty_model(model_class, known_fields(model_class, config))
    check_fixed_fields(model, file.config, f"the header of {path}")
    expected = to_released(model.state_dict(), model.config)
    check_tensors(expected | {"pos_embed": tensors["pos_embed"]}, tensors, path)
    if tensors["mask_token"].any():
        raise ValueError(f"mask_token must be zero, which stands for a dropped token, in {path} it is not")

    # 3. The tensors take their places.
    fill_model(model, from_released(tensors), dtype)
    config = model.config
    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"{len(file.tensors)} tensors: {config.mixer_num_layers} blocks of {config.mixer_hidden_size} "
        f"and {config.num_layers} of {config.hidden_size}, {config.num_experts} experts",
        dropped={
            reason: names for reason, names in (("buffers", _BUFFERS), ("other networks", others)) if names
        },
        chosen=f"built for latents of {config.sample_size} with positions divided by "
        f"{config.interpolation_scale}, heads of {config.attention_head_dim} and a capacity of "
        f"{config.expert_capacity}",
    )
    log_report(report, path)
    return model, report


# --- Layout -------------------------------------------------------------------------------------------------


def _layers(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Names of tensors from names of layers."""
    return {
        f"{released}.{kind}": tuple(f"{name}.{kind}" for name in ours)
        for released, ours in names.items()
        for kind in ("weight", "bias")
    }


# Released names, and ours. Several of ours: the released tensor holds them one after the other.
_NAMES = _layers(
    {
        "x_embedder.proj": ("patch_embed.proj",),
        "t_embedder.mlp.0": ("time_embed.linear_1",),
        "t_embedder.mlp.2": ("time_embed.linear_2",),
        "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
        "y_embedder.y_proj.norm": ("caption_projection.norm",),
        "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
        "pooled_y_emb_process.fc1": ("pooled_projection.linear_1",),
        "pooled_y_emb_process.norm": ("pooled_projection.norm",),
        "pooled_y_emb_process.fc2": ("pooled_projection.linear_2",),
        "patch_mixer_map_xin.0": ("mixer_in.norm",),
        "patch_mixer_map_xin.1": ("mixer_in.proj",),
        "patch_mixer_map_xout.0": ("mixer_out.norm",),
        "patch_mixer_map_xout.1": ("mixer_out.proj",),
        "patch_mixer_map_y.0": ("mixer_context.norm",),
        "patch_mixer_map_y.1": ("mixer_context.proj",),
        "final_layer.norm_final": ("norm_out",),
        "final_layer.adaLN_modulation.1": ("adaln_out",),
        "final_layer.linear": ("proj_out",),
    }
)
_BLOCK_NAMES = _layers(
    {
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "norm3": ("norm3",),
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attn.ln_q": ("attn1.norm_q",),
        "attn.ln_k": ("attn1.norm_k",),
        "attn.proj": ("attn1.to_out.0",),
        "cross_attn.q_linear": ("attn2.to_q",),
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
        "cross_attn.ln_q": ("attn2.norm_q",),
        "cross_attn.ln_k": ("attn2.norm_k",),
        "cross_attn.proj": ("attn2.to_out.0",),
        "adaLN_modulation.1": ("adaln",),
        "mlp.w1": ("ff.gate_proj",),
        "mlp.w2": ("ff.up_proj",),
        "mlp.w3": ("ff.down_proj",),
        "mlp.gate": ("ff.router",),
    }
) | {"mlp.w1": ("ff.experts_in",), "mlp.w2": ("ff.experts_out",)}  # fmt: skip
_STACKS = {
    "patch_mixer": "mixer_blocks",
    "blocks": "transformer_blocks",
    "y_emb_preprocess": "caption_refiner",
}
_BLOCK = re.compile(r"(patch_mixer|blocks|y_emb_preprocess)((?:\.\d+)?\.)(.+)")
_OUR_BLOCK = re.compile(r"(mixer_blocks|transformer_blocks|caption_refiner)((?:\.\d+)?\.)(.+)")
_RELEASED_NAMES = {name: released for released, ours in _NAMES.items() for name in ours}
_RELEASED_BLOCK_NAMES = {name: released for released, ours in _BLOCK_NAMES.items() for name in ours}
_RELEASED_STACKS = {ours: released for released, ours in _STACKS.items()}
_BUFFERS = ("pos_embed", "mask_token")


def our_names(released: str) -> tuple[str, ...]:
    """Our names of what a released tensor holds, in order; a strange name stays as it is."""
    match = _BLOCK.fullmatch(released)
    if match and match[3] in _BLOCK_NAMES:
        return tuple(f"{_STACKS[match[1]]}{match[2]}{name}" for name in _BLOCK_NAMES[match[3]])
    return _NAMES.get(released, (released,))


def from_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the released layout under our names: buffers dropped, fused projections cut apart."""
    ours: dict[str, Tensor] = {}
    for released, tensor in state_dict.items():
        if released in _BUFFERS:
            continue
        names = our_names(released)
        if len(names) == 1:
            ours[names[0]] = tensor
        else:
            ours |= {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)))}
    return ours


def to_released(state_dict: Mapping[str, Tensor], config: Any = None) -> dict[str, Tensor]:
    """The inverse of `from_released`. The buffers, which no weight tells, are added if `config` is given."""
    released: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        theirs, parts = _released_name(name)
        if len(parts) == 1:
            released[theirs] = tensor
        elif name == parts[0]:
            released[theirs] = torch.cat([state_dict[part] for part in parts])
    if config is not None:
        side = config.sample_size // config.patch_size
        released["pos_embed"] = _position_table(side, config.hidden_size, config.interpolation_scale)[None]
        released["mask_token"] = torch.zeros(1, 1, len(state_dict["proj_out.bias"]))
    return released


def _released_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The released name of one of our tensors, and all of ours that it holds, in order."""
    match = _OUR_BLOCK.fullmatch(name)
    if match and match[3] in _RELEASED_BLOCK_NAMES:
        tail = _RELEASED_BLOCK_NAMES[match[3]]
        stem = f"{match[1]}{match[2]}"
        return (
            f"{_RELEASED_STACKS[match[1]]}{match[2]}{tail}",
            tuple(f"{stem}{part}" for part in _BLOCK_NAMES[tail]),
        )
    return _RELEASED_NAMES.get(name, name), (name,)


def _position_table(side: int, dim: int, interpolation_scale: float) -> Tensor:
    places = torch.arange(side, dtype=torch.float32) / interpolation_scale
    return sincos_table(places, places, dim).float()


def _split_others(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The transformer's tensors, without a trainer's prefixes, and the names of what lies beside them."""
    ours = [name for name in state_dict if re.match(r"(module\.)?dit\.", name)] or list(state_dict)
    others = tuple(name for name in state_dict if name not in set(ours))
    return {_PREFIXES.sub("", name, count=1): state_dict[name] for name in ours}, others


# --- Config -------------------------------------------------------------------------------------------------


def infer_config(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config fields that the tensors of a released checkpoint tell, widths within the blocks apart.

    Raises:
        ValueError: A tensor that tells a size is missing or has an impossible shape, or the position table
            is none.
    """
    dim, in_channels, patch, _ = tensor_shape(state_dict, "x_embedder.proj.weight", "D", "C", "p", "p")
    outputs, _ = tensor_shape(state_dict, "final_layer.linear.weight", "p * p * C", "D")
    _, times = tensor_shape(state_dict, "t_embedder.mlp.0.weight", "D", "sinusoids")
    _, caption_channels = tensor_shape(state_dict, "y_embedder.y_proj.fc1.weight", "D", "caption channels")
    refiner, _ = tensor_shape(state_dict, "y_emb_preprocess.mlp.w1.weight", "hidden", "D")
    if outputs % patch**2:
        raise ValueError(f"final_layer.linear.weight must have a multiple of {patch**2} rows, got {outputs}")
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": outputs // patch**2,
        "patch_size": patch,
        "hidden_size": dim,
        "num_layers": count_blocks(state_dict, "blocks"),
        "mixer_num_layers": count_blocks(state_dict, "patch_mixer"),
        "caption_channels": caption_channels,
        "timestep_embed_dim": times,
        "ffn_inner_factor": 1.0 if refiner == 4 * dim else 2 / 3,
        "use_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "qk_norm_affine": "blocks.0.attn.ln_q.weight" in state_dict,
    }
    if config["mixer_num_layers"]:
        (config["mixer_hidden_size"],) = tensor_shape(state_dict, "patch_mixer.0.norm1.weight", "M")
    matches = (re.fullmatch(r"blocks\.(\d+)\.mlp\.gate\.weight", name) for name in state_dict)
    sparse = [int(match[1]) for match in matches if match]
    if sparse:
        config["moe_every_n"] = min(sparse) + 1
        config["num_experts"], _ = tensor_shape(
            state_dict, f"blocks.{min(sparse)}.mlp.gate.weight", "experts", "D"
        )
    return config | _infer_places(state_dict, dim, patch)


def _infer_places(state_dict: Mapping[str, Tensor], dim: int, patch: int) -> dict[str, Any]:
    """`sample_size` and `interpolation_scale` from the position table, which must be what they make."""
    _, tokens, width = tensor_shape(state_dict, "pos_embed", "1", "tokens", "D")
    table = state_dict["pos_embed"][0].float()
    side = math.isqrt(tokens)
    if side**2 == tokens and side > 1 and width == dim:
        # The first two channels are sine and cosine of the column, which is 1 / scale in the second token.
        angle = math.atan2(table[1, 0], table[1, dim // 4])
        scale = float(Fraction(1 / max(angle, 1e-3)).limit_denominator(64))
        rounding = torch.finfo(state_dict["pos_embed"].dtype).eps  # of a file in half precision
        if torch.allclose(table, _position_table(side, dim, scale), rtol=0, atol=max(1e-3, rounding)):
            return {"sample_size": side * patch, "interpolation_scale": scale}
    raise ValueError(
        "pos_embed must be the sine-cosine table of a square of tokens, the file has other numbers or "
        f"another shape: {tuple(table.shape)}"
    )


def infer_ratios(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios that give every block the widths it has in the file."""

    def attention(name: str, dim: int) -> float:
        rows, _ = tensor_shape(state_dict, f"{name}.attn.qkv.weight", "3 h", "D")
        return rows / 3 / dim

    def feed_forward(name: str, dim: int) -> float:
        if f"{name}.mlp.gate.weight" in state_dict:
            return tensor_shape(state_dict, f"{name}.mlp.w1", "experts", "D", "f")[2] / dim
        hidden, _ = tensor_shape(state_dict, f"{name}.mlp.w1.weight", "f", "D")
        return hidden / config["ffn_inner_factor"] / dim

    dim, blocks = config["hidden_size"], [f"blocks.{i}" for i in range(config["num_layers"])]
    ratios: dict[str, Any] = {
        "attention_ratio": [attention(name, dim) for name in blocks],
        "ffn_ratio": [feed_forward(name, dim) for name in blocks],
    }
    if config["mixer_num_layers"]:
        dim = config["mixer_hidden_size"]
        ratios["mixer_attention_ratio"] = attention("patch_mixer.0", dim)
        ratios["mixer_ffn_ratio"] = feed_forward("patch_mixer.0", dim)
    return ratios
