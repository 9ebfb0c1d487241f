"""Small SparseDiT models: the one of the recorded numbers, and random ones in which every layer speaks."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from localdit.models.sparse_dit import SparseDiTTransformer2DModel
from localdit.models.sparse_dit_single_file import from_released

TOY: dict[str, Any] = {
    "sample_size": 8,
    "hidden_size": 64,
    "num_layers": 4,
    "attention_head_dim": 16,
    "ffn_multiple_of": 32,
    "caption_channels": 24,
    "mixer_num_layers": 2,
    "mixer_hidden_size": 48,
    "num_experts": 4,
}


def pseudo_random(index: int, shape: tuple[int, ...]) -> Tensor:
    """The tensors of the recorded numbers: the fractional part of a large sine, in [-0.5, 0.5), float64."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    value = (12.9898 * count + 78.233 * (index + 1)).sin() * 43758.5453
    return (value - value.floor() - 0.5).reshape(shape)


def released_shapes(config: dict[str, Any] = TOY) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released layout of the toy model, from the rules by hand."""
    dim, mixer, experts, caption = (
        config[name] for name in ("hidden_size", "mixer_hidden_size", "num_experts", "caption_channels")
    )
    patch = 2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (config["sample_size"] // patch) ** 2, dim),
        "mask_token": (1, 1, patch**2 * 4),
        "x_embedder.proj.weight": (dim, 4, patch, patch),
        "x_embedder.proj.bias": (dim,),
        "t_embedder.mlp.0.weight": (dim, 512),
        "t_embedder.mlp.0.bias": (dim,),
        "t_embedder.mlp.2.weight": (dim, dim),
        "t_embedder.mlp.2.bias": (dim,),
        "patch_mixer_map_xin.0.weight": (dim,),
        "patch_mixer_map_xin.1.weight": (mixer, dim),
        "patch_mixer_map_xout.0.weight": (mixer,),
        "patch_mixer_map_xout.1.weight": (dim, mixer),
        "patch_mixer_map_y.0.weight": (dim,),
        "patch_mixer_map_y.1.weight": (mixer, dim),
        "final_layer.norm_final.weight": (dim,),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim),
        "final_layer.adaLN_modulation.1.bias": (2 * dim,),
        "final_layer.linear.weight": (patch**2 * 4, dim),
        "final_layer.linear.bias": (patch**2 * 4,),
    }
    for stem, width in (("y_embedder.y_proj", caption), ("pooled_y_emb_process", dim)):
        shapes |= {
            f"{stem}.fc1.weight": (dim, width),
            f"{stem}.fc1.bias": (dim,),
            f"{stem}.norm.weight": (dim,),
            f"{stem}.fc2.weight": (dim, dim),
            f"{stem}.fc2.bias": (dim,),
        }

    def attention(stem: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
        return {f"{stem}.qkv.weight": (3 * inner, width), f"{stem}.proj.weight": (width, inner)}

    def dense(stem: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        up, down = (hidden, width), (width, hidden)
        return {f"{stem}.mlp.w1.weight": up, f"{stem}.mlp.w2.weight": up, f"{stem}.mlp.w3.weight": down}

    shapes |= {"y_emb_preprocess.norm1.weight": (dim,), "y_emb_preprocess.norm2.weight": (dim,)}
    shapes |= attention("y_emb_preprocess.attn", dim, dim) | dense("y_emb_preprocess", dim, 192)
    # Block, width, inner width of self-attention, hidden width, experts: from the rules, by hand.
    blocks = [
        ("patch_mixer.0", mixer, mixer, 128, False),
        ("patch_mixer.1", mixer, mixer, 192, True),
        ("blocks.0", dim, 32, 32, False),
        ("blocks.1", dim, 64, 128, True),
        ("blocks.2", dim, 64, 128, False),
        ("blocks.3", dim, 64, 192, False),
    ]
    for stem, width, inner, hidden, sparse in blocks:
        shapes |= {f"{stem}.norm{i}.weight": (width,) for i in (1, 2, 3)}
        shapes |= attention(f"{stem}.attn", width, inner)
        shapes |= {
            f"{stem}.cross_attn.q_linear.weight": (width, width),
            f"{stem}.cross_attn.kv_linear.weight": (2 * width, width),
            f"{stem}.cross_attn.proj.weight": (width, width),
            f"{stem}.adaLN_modulation.1.weight": (6 * width, dim),
            f"{stem}.adaLN_modulation.1.bias": (6 * width,),
        }
        if sparse:
            shapes |= {
                f"{stem}.mlp.w1": (experts, width, hidden),
                f"{stem}.mlp.w2": (experts, hidden, width),
                f"{stem}.mlp.gate.weight": (experts, width),
            }
        else:
            shapes |= dense(stem, width, hidden)
    return shapes


def recorded_state() -> dict[str, Tensor]:
    """The weights under which the numbers were recorded, in the released layout; float32, without buffers."""
    state = {}
    for i, (name, shape) in enumerate(sorted(released_shapes().items())):
        if name in ("pos_embed", "mask_token"):
            continue
        value = pseudo_random(i, shape)
        if len(shape) == 1:
            value = 0.2 * value
            if "norm" in name or name.endswith(".0.weight"):
                value = 1 + value
        else:
            value = 2 * value / (shape[1] if len(shape) == 3 else shape[-1]) ** 0.5
        state[name] = value.float()
    return state


def recorded_model() -> SparseDiTTransformer2DModel:
    model = SparseDiTTransformer2DModel(**TOY).eval()
    model.load_state_dict(from_released(recorded_state()))
    return model


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, so that no layer is silent (zero, or one where it multiplies)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                fan_in = parameter.shape[1] if parameter.ndim == 3 else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)


def toy_sparse(
    cls: type[SparseDiTTransformer2DModel] = SparseDiTTransformer2DModel, *, seed: int = 0, **config: Any
) -> Any:
    """A small model for evaluation with speaking weights. `config` overrides the toy sizes."""
    model = cls(**(TOY | config)).eval()
    redraw(model, seed)
    return model


def sparse_inputs(
    grid: tuple[int, int] = (4, 4), batch: int = 2, *, seed: int = 0, text_tokens: int = 5, **config: Any
) -> dict[str, Any]:
    """Arguments of the forward pass for a grid of tokens."""
    config = {"in_channels": 4, "patch_size": 2} | TOY | config
    generator = torch.Generator().manual_seed(1000 + seed)
    height, width = (config["patch_size"] * size for size in grid)
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], height, width, generator=generator),
        "encoder_hidden_states": torch.randn(
            batch, text_tokens, config["caption_channels"], generator=generator
        ),
        "timestep": torch.randn(batch, generator=generator).mul(0.6),
    }
