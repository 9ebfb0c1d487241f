"""The text tower of an open_clip checkpoint as transformers' `CLIPTextModel`: what SparseDiT reads text with.

open_clip keeps queries, keys and values in one tensor, and its names differ. The tower stands alone, beside a
vision tower, or under `text.` as in the CLIPs that have a text model of their own.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from localdit.models.single_file import (
    SingleFileReport,
    check_dtype,
    check_tensors,
    count_blocks,
    fill_model,
    log_report,
    read_single_file,
    tensor_shape,
)

HEAD_DIM = 64  # of every published size; no tensor tells it
_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OUTSIDE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# What lies beside the tower: the other one, the projections to a common space, and a mask that is a constant.
_LEFT_ASIDE = re.compile(r"visual\..*|logit_scale|logit_bias|(text\.)?(text_projection(\..*)?|attn_mask)")


def load_open_clip_text(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> tuple[CLIPTextModel, SingleFileReport]:
    """Read the text tower from one open_clip checkpoint.

    Sizes are read from the tensors. Heads of 64 and QuickGELU, as of DFN5B-CLIP-ViT-H-14-378, are taken for
    granted: no tensor tells them. In open_clip's terms the output of the model is the state of every token
    after `ln_final`.

    Args:
        path: `.safetensors`; or `.pt`, `.pth`, `.bin`, `.ckpt`, read without running what they hold.
        dtype: Of the model. None keeps the file's.

    Returns:
        The model, on the CPU, in evaluation mode, and what was found.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: The file is damaged or holds more than tensors; a tensor of the tower is missing, surplus
            or misshapen.
    """
    check_dtype(dtype)
    path = Path(path)
    file = read_single_file(path)
    aside = tuple(name for name in file.tensors if _LEFT_ASIDE.fullmatch(name))
    tower = {name.removeprefix("text."): file.tensors[name] for name in file.tensors if name not in aside}

    words, width = tensor_shape(tower, "token_embedding.weight", "words", "D")
    places, _ = tensor_shape(tower, "positional_embedding", "places", "D")
    hidden, _ = tensor_shape(tower, "transformer.resblocks.0.mlp.c_fc.weight", "hidden", "D")
    if width % HEAD_DIM:
        raise ValueError(
            f"token_embedding.weight must be a multiple of {HEAD_DIM} wide, the file has {width}"
        )
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=count_blocks(tower, "transformer.resblocks"),
        num_attention_heads=width // HEAD_DIM,
        max_position_embeddings=places,
        hidden_act="quick_gelu",
        bos_token_id=words - 2,  # as in CLIP's vocabulary, which ends with them
        eos_token_id=words - 1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        empty = CLIPTextModel(config).state_dict()
    check_tensors(to_open_clip(empty), tower, path)
    model = CLIPTextModel(config)
    fill_model(model, from_open_clip(tower, empty), dtype)
    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"{len(file.tensors)} tensors: an open_clip text tower of {config.num_hidden_layers} blocks of "
        f"{width}, {words} words and {places} places",
        dropped={"of a CLIP beside its text tower": aside} if aside else {},
        chosen=f"a CLIPTextModel with heads of {HEAD_DIM} and QuickGELU",
    )
    log_report(report, path)
    return model, report


def to_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `CLIPTextModel`'s tensors as open_clip has them."""
    tower: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        theirs, part = _open_clip_name(name)
        if part is None:
            tower[theirs] = tensor
        elif part == 0:
            keys = (name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv")
            tower[theirs] = torch.cat([state_dict[key] for key in keys])
    return tower


def from_open_clip(tower: Mapping[str, Tensor], names: Any) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`, for the tensors of a `CLIPTextModel` that `names` lists."""
    state_dict = {}
    for name in names:
        theirs, part = _open_clip_name(name)
        tensor = tower[theirs]
        state_dict[name] = tensor if part is None else tensor.chunk(3)[part].clone()
    return state_dict


def _open_clip_name(name: str) -> tuple[str, int | None]:
    """What open_clip calls a tensor of `CLIPTextModel`, and which third of that it is, if it is one."""
    name = name.removeprefix("text_model.")  # of older versions of transformers
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OUTSIDE[name], None
    block = f"transformer.resblocks.{match[1]}"
    if third := re.fullmatch(r"self_attn\.([qkv])_proj", match[2]):
        return f"{block}.attn.in_proj_{match[3]}", "qkv".index(third[1])
    return f"{block}.{_LAYERS[match[2]]}.{match[3]}", None
