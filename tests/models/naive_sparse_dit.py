"""SparseDiT from its description alone, on the released layout: slow, plain, in any precision.

Experts are dispatched by a one-hot tensor over all tokens, as the published program does it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + (x / 2**0.5).erf()) / 2


def one_hot_experts(
    x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, capacity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, N, D), gate: (E, D), w1: (E, D, f), w2: (E, f, D). Returns y, gates and tokens, (B, E, K)."""
    count, experts = x.shape[1], len(gate)
    k = max(1, min(count, math.floor(capacity * count / experts)))
    scores = torch.softmax(torch.einsum("bnd,ed->bne", x, gate), dim=2)
    gates, tokens = scores.transpose(1, 2).topk(k, dim=2)
    dispatch = F.one_hot(tokens, count).to(x.dtype)  # (B, E, K, N)
    taken = torch.einsum("bekn,bnd->bekd", dispatch, x)
    hidden = gelu(torch.einsum("bekd,edf->bekf", taken, w1))
    y = torch.einsum("bekf,efd->bekd", hidden, w2) * gates[..., None]
    return torch.einsum("bekn,bekd->bnd", dispatch, y), gates, tokens


def attention(
    state: State, q: Tensor, k: Tensor, v: Tensor, name: str, head_dim: int, eps: float, mask: Any
) -> Tensor:
    q = norm(q, state.get(f"{name}.ln_q.weight"), eps)
    k = norm(k, state.get(f"{name}.ln_k.weight"), eps)
    heads = []
    for start in range(0, q.shape[-1], head_dim):
        part = slice(start, start + head_dim)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return linear(state, f"{name}.proj", torch.cat(heads, -1))


def feed_forward(state: State, name: str, x: Tensor, capacity: float) -> Tensor:
    if f"{name}.gate.weight" in state:
        w1, w2 = state[f"{name}.w1"], state[f"{name}.w2"]
        return one_hot_experts(x, state[f"{name}.gate.weight"], w1, w2, capacity)[0]
    return linear(
        state, f"{name}.w3", F.silu(linear(state, f"{name}.w1", x)) * linear(state, f"{name}.w2", x)
    )


def sinusoids(x: Tensor, channels: int, period: float = 10000.0) -> tuple[Tensor, Tensor]:
    angles = x[:, None] * period ** (-torch.arange(channels // 2, dtype=x.dtype) / (channels // 2))
    return angles.sin(), angles.cos()


def projection(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    x = gelu_tanh(linear(state, f"{name}.fc1", x))
    return linear(state, f"{name}.fc2", norm(x, state[f"{name}.norm.weight"], eps))


def naive_sparse_dit(
    state: State,
    config: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor | None = None,
    mask_ratio: float = 0.0,
    mask_noise: Tensor | None = None,
) -> Tensor:
    """The sample, in the precision of the state. Arguments as of the model's forward."""
    dtype = state["x_embedder.proj.weight"].dtype
    eps, patch, head_dim = config["norm_eps"], config["patch_size"], config["attention_head_dim"]
    mask = encoder_attention_mask
    latents, text = hidden_states.to(dtype), encoder_hidden_states.to(dtype)
    batch, _, height, width = latents.shape
    grid = height // patch, width // patch

    # Tokens, row by row, and where they are.
    embed, dim = state["x_embedder.proj.weight"], len(state["x_embedder.proj.weight"])
    tokens = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            piece = latents[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            place = torch.tensor([column, row], dtype=dtype) / config["interpolation_scale"]
            sin, cos = sinusoids(place, dim // 2)
            position = torch.cat((sin[0], cos[0], sin[1], cos[1]))
            tokens.append(piece.flatten(1) @ embed.flatten(1).T + state["x_embedder.proj.bias"] + position)
    x = torch.stack(tokens, 1)

    # Conditions.
    sin, cos = sinusoids(timestep.to(dtype).expand(batch), config["timestep_embed_dim"])
    time = linear(
        state, "t_embedder.mlp.2", gelu_tanh(linear(state, "t_embedder.mlp.0", torch.cat((cos, sin), 1)))
    )
    y = projection(state, "y_embedder.y_proj", text, eps)
    z = norm(y, state["y_emb_preprocess.norm1.weight"], eps)
    qkv = linear(state, "y_emb_preprocess.attn.qkv", z).chunk(3, -1)
    y = y + attention(state, *qkv, "y_emb_preprocess.attn", head_dim, eps, mask)
    z = norm(y, state["y_emb_preprocess.norm2.weight"], eps)
    y = y + feed_forward(state, "y_emb_preprocess.mlp", z, 0.0)
    keep = torch.ones(y.shape[:2], dtype=dtype) if mask is None else mask.to(dtype)
    mean = (y * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    cond = time + projection(state, "pooled_y_emb_process", mean, eps)

    def block(name: str, x: Tensor, y: Tensor) -> Tensor:
        six = linear(state, f"{name}.adaLN_modulation.1", gelu_tanh(cond))[:, None].chunk(6, -1)
        z = norm(x, state[f"{name}.norm1.weight"], eps) * (1 + six[1]) + six[0]
        qkv = linear(state, f"{name}.attn.qkv", z).chunk(3, -1)
        x = x + six[2] * attention(state, *qkv, f"{name}.attn", head_dim, eps, None)
        z = norm(x, state[f"{name}.norm2.weight"], eps)
        q, kv = (
            linear(state, f"{name}.cross_attn.q_linear", z),
            linear(state, f"{name}.cross_attn.kv_linear", y),
        )
        x = x + attention(state, q, *kv.chunk(2, -1), f"{name}.cross_attn", head_dim, eps, mask)
        z = norm(x, state[f"{name}.norm3.weight"], eps) * (1 + six[4]) + six[3]
        return x + six[5] * feed_forward(state, f"{name}.mlp", z, config["expert_capacity"])

    def bridge(name: str, x: Tensor) -> Tensor:
        if f"{name}.1.weight" not in state:
            return x
        return linear(state, f"{name}.1", norm(x, state[f"{name}.0.weight"], eps))

    x, mixer_y = bridge("patch_mixer_map_xin", x), bridge("patch_mixer_map_y", y)
    for i in range(config["mixer_num_layers"]):
        x = block(f"patch_mixer.{i}", x, mixer_y)

    count = x.shape[1]
    kept = torch.arange(count).expand(batch, -1)
    if mask_ratio:
        assert mask_noise is not None
        kept = mask_noise.argsort(1)[:, : int(count * (1 - mask_ratio))]
        x = torch.stack([sample[index] for sample, index in zip(x, kept)])
    x = bridge("patch_mixer_map_xout", x)
    for i in range(config["num_layers"]):
        x = block(f"blocks.{i}", x, y)

    shift, scale = linear(state, "final_layer.adaLN_modulation.1", gelu_tanh(cond))[:, None].chunk(2, -1)
    x = norm(x, state["final_layer.norm_final.weight"], eps) * (1 + scale) + shift
    x = linear(state, "final_layer.linear", x)
    channels = x.shape[-1] // patch**2
    sample = torch.zeros(batch, channels, height, width, dtype=dtype)
    for b in range(batch):
        for slot, token in enumerate(kept[b].tolist()):
            row, column = token // grid[1] * patch, token % grid[1] * patch
            piece = x[b, slot].view(patch, patch, channels).permute(2, 0, 1)
            sample[b, :, row : row + patch, column : column + patch] = piece
    return sample
