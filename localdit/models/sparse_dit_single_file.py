"""Released MicroDiT checkpoints: one file that holds the whole transformer, read and written strictly.

The released layout differs from the module tree in these ways:

- projections are fused: `qkv` of self-attention, `kv_linear` of attention to text;
- the experts' tensors stand where a dense feed-forward has its layers, as `mlp.w1` and `mlp.w2`;
- it holds two buffers that nothing learned: the position table, from which `sample_size` and
  `interpolation_scale` are read, and `mask_token`, which is zero;
- the configuration is missing. Widths and depths are read from the tensors.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


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


def to_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_released`, but for the buffers, which no weight tells."""
    released: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        theirs, parts = _released_name(name)
        if len(parts) == 1:
            released[theirs] = tensor
        elif name == parts[0]:
            released[theirs] = torch.cat([state_dict[part] for part in parts])
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
    theirs = _RELEASED_NAMES.get(name, name)
    return theirs, (name,)
