"""The LocalDiT transformer once more, slowly: the oracle that `LocalDiTTransformer2DModel` is tested against.

Plain functions of a state dict in the published layout, nothing shared with the library, nothing clever:

- attention is one N x N matrix per head, whose mask and relative bias come from token coordinates. Two tokens
  see each other when floor((row - shift) / window) and the same for columns agree: a window grid that starts
  before the image, so there is no padding, no roll and no wrap;
- the global branch never builds a padded or rolled map. It asks for each token where its eight neighbours lie
  on such a map, and takes zero where there is no token.

The dtype is that of the state dict: float64 gives the oracle, bfloat16 the error that honest rounding makes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Architecture(NamedTuple):
    """What a published state dict does not say. `sample_size` is in latents, `window_size` in tokens."""

    num_attention_heads: int
    window_size: int = 4
    sample_size: int = 128
    interpolation_scale: float | None = None
    norm_eps: float = 1e-6
    qk_norm_eps: float = 1e-10
    rope: bool = True
    attention_residual: bool = True
    full_attention_layers: tuple[int, ...] = ()


class Weights:
    """A view of the tensors below a prefix: `Weights(state, "a.")("b.weight")` is `state["a.b.weight"]`."""

    def __init__(self, state: dict[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __call__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.state)

    def below(self, name: str) -> "Weights":
        return Weights(self.state, f"{self.prefix}{name}.")

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self(f"{name}.weight").T
        return y + self(f"{name}.bias") if f"{name}.bias" in self else y


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Norms, angles and softmax are never computed below float32."""
    return torch.promote_types(x.dtype, torch.float32)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    wide = x.to(statistics_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(statistics_dtype(x))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide.dtype)).to(x.dtype)


def coordinates(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every token, each (N,)."""
    token = torch.arange(grid[0] * grid[1])
    return token // grid[1], token % grid[1]


# --- Embeddings


def position_table(grid: tuple[int, int], dim: int, base_size: int, interpolation_scale: float) -> Tensor:
    """(N, D), float64: [sin column, cos column, sin row, cos row], the grid stretched to the base size."""
    quarter = torch.arange(dim // 4, dtype=torch.float64)
    frequency = 10000.0 ** (-quarter / (dim // 4))
    parts = []
    for position, size in zip(reversed(coordinates(grid)), reversed(grid)):
        angle = torch.outer(position.double() * base_size / size / interpolation_scale, frequency)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1)


def sinusoids(value: Tensor) -> Tensor:
    """(M,) to (M, 256), cosines first."""
    # Angles reach 1000, where float32 rounds visibly: that rounding is part of the published model.
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angle = torch.outer(value.float(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def embed_numbers(weights: Weights, values: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,) numbers to (M, out) by sinusoids and a two-layer SiLU MLP."""
    return weights.linear("linear_2", F.silu(weights.linear("linear_1", sinusoids(values).to(dtype))))


def patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) to (B, N, C*p*p), channel first in each token's vector."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


def picture(tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """(B, N, p*p*C), channel last in each token's vector, to (B, C, H, W)."""
    cut = tokens.reshape(len(tokens), *grid, size, size, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, grid[0] * size, grid[1] * size)


# --- Attention


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)  # (B, A, N, d)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, N, D)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v; bias broadcasts to (B, A, N, M), -inf where nothing may be seen."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.to(statistics_dtype(q)) + bias).softmax(-1).to(v.dtype) @ v


def rotate(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """2-D RoPE on (B, A, N, d). Adjacent channels pair up; half the pairs turn by column, half by row."""
    dim = x.shape[-1]
    row, column = (c.to(statistics_dtype(x)) for c in coordinates(grid))
    frequency = 10000.0 ** (-4 * torch.arange(dim // 4, dtype=row.dtype) / dim)
    angle = torch.cat((torch.outer(column, frequency), torch.outer(row, frequency)), dim=-1)  # (N, d/2)
    even, odd = x[..., 0::2].to(angle.dtype), x[..., 1::2].to(angle.dtype)
    turned = torch.stack(
        (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), dim=-1
    )
    return turned.flatten(-2).to(x.dtype)


def same_window(grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """(N, N), True where two tokens lie in the same window of the shifted grid."""
    row, column = (torch.div(c - shift, window, rounding_mode="floor") for c in coordinates(grid))
    return (row[:, None] == row[None]) & (column[:, None] == column[None])


def relative_bias(table: Tensor | None, seen: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(A, N, N): the table's entry for the tokens' offset (query minus key), -inf where nothing is seen."""
    nothing = torch.full(seen.shape, -torch.inf, dtype=torch.float64)
    if table is None:
        return torch.where(seen, 0, nothing)[None]
    row, column = coordinates(grid)
    down, right = row[:, None] - row[None] + window - 1, column[:, None] - column[None] + window - 1
    entry = torch.where(seen, down * (2 * window - 1) + right, 0)
    return torch.where(seen, table[entry].double().permute(2, 0, 1), nothing)


def neighbour(grid: tuple[int, int], window: int, shift: int, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Index of each token's neighbour on the padded and shifted map, and whether there is one, each (N,)."""
    lines, inside = [], []
    for line, step, size in zip(coordinates(grid), (down, right), grid):
        padded = math.ceil(size / window) * window
        on_map = (line - shift) % padded + step
        image = (on_map + shift) % padded
        lines.append(image)
        inside.append((on_map >= 0) & (on_map < padded) & (image < size))
    exists = inside[0] & inside[1]
    return torch.where(exists, lines[0] * grid[1] + lines[1], 0), exists


def query_features(weights: Weights, x: Tensor, grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """x + conv(x), x: (B, N, D): depthwise 3x3, GELU, squeeze-excite over the real tokens, 1x1."""
    kernel = weights("conv.0.weight")  # (D, 1, 3, 3)
    y = torch.zeros_like(x)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            index, exists = neighbour(grid, window, shift, down, right)
            y = y + x[:, index] * exists[:, None] * kernel[:, 0, down + 1, right + 1]
    y = F.gelu(y)
    squeezed = F.gelu(weights.linear("conv.2.fc.0", y.mean(1, keepdim=True)))
    y = y * torch.sigmoid(weights.linear("conv.2.fc.2", squeezed))
    return x + y @ weights("conv.3.weight")[:, :, 0, 0].T


def windowed_attention(
    weights: Weights, x: Tensor, grid: tuple[int, int], block: int, arch: Architecture
) -> Tensor:
    """Section 3 and, where the state dict has its tensors, section 4."""
    heads, window = arch.num_attention_heads, arch.window_size
    shift = block % window
    whole = block in arch.full_attention_layers
    q, k, v = (split_heads(part, heads) for part in weights.linear("to_qkv", x).chunk(3, dim=-1))
    q = rms_norm(q, weights("norm_q.weight"), arch.qk_norm_eps)
    k = rms_norm(k, weights("norm_k.weight"), arch.qk_norm_eps)
    if arch.rope:
        q, k = rotate(q, grid), rotate(k, grid)
    seen = same_window(grid, window, shift)
    if whole:
        seen = torch.ones_like(seen)

    extra = weights.below("processor")
    tables = [
        extra(name) if name in extra else None for name in ("local_rel_pos_bias", "global_rel_pos_bias")
    ]
    out = attention(q, k, v, relative_bias(tables[0], seen, grid, window).to(statistics_dtype(x)))
    if "to_global_kv" in extra:
        features = join_heads(q)
        for step in (0, 1):
            features = query_features(
                extra.below(f"query_feat_extract.{step}"), features, grid, window, shift
            )
        key, value = (
            split_heads(part, heads) for part in extra.linear("to_global_kv", join_heads(k)).chunk(2, dim=-1)
        )
        bias = relative_bias(tables[1], seen, grid, window).to(statistics_dtype(x))
        out = (out + attention(split_heads(features, heads), key, value, bias)) / 2
    return weights.linear("to_out.0", join_heads(out))


def text_attention(weights: Weights, x: Tensor, text: Tensor, mask: Tensor, arch: Architecture) -> Tensor:
    heads = arch.num_attention_heads
    q = rms_norm(split_heads(weights.linear("to_q", x), heads), weights("norm_q.weight"), arch.qk_norm_eps)
    k = rms_norm(split_heads(weights.linear("to_k", text), heads), weights("norm_k.weight"), arch.qk_norm_eps)
    v = split_heads(weights.linear("to_v", text), heads)
    bias = torch.where(mask.bool(), 0, -torch.inf)[:, None, None].to(statistics_dtype(x))
    return weights.linear("to_out.0", join_heads(attention(q, k, v, bias)))


# --- The whole


def naive_local_dit(
    state: dict[str, Tensor],
    arch: Architecture,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor,
    resolution: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
) -> Tensor:
    """Section 2 of the description, from latents (B, C, H, W) to the prediction (B, C_out, H, W).

    The resolution and the aspect ratio are left out for a model without these conditions.
    """
    weights = Weights(state)
    kernel = weights("pos_embed.proj.weight")  # (D, C, p, p)
    dim, patch, dtype = len(kernel), kernel.shape[-1], kernel.dtype
    grid = (hidden_states.shape[2] // patch, hidden_states.shape[3] // patch)
    scale = arch.interpolation_scale
    scale = max(arch.sample_size // 64, 1) if scale is None else scale

    x = patches(hidden_states.to(dtype), patch) @ kernel.flatten(1).T + weights("pos_embed.proj.bias")
    x = x + position_table(grid, dim, arch.sample_size // patch, scale).to(dtype)

    embedder = weights.below("adaln_single.emb")
    cond = embed_numbers(embedder.below("timestep_embedder"), timestep, dtype)
    if resolution is not None and aspect_ratio is not None:
        size = embed_numbers(embedder.below("resolution_embedder"), resolution.flatten(), dtype)
        ratio = embed_numbers(embedder.below("aspect_ratio_embedder"), aspect_ratio, dtype)
        cond = cond + torch.cat((size.reshape(len(cond), -1), ratio), dim=-1)
    six = weights.below("adaln_single").linear("linear", F.silu(cond)).reshape(len(cond), 6, dim)

    caption = weights.below("caption_projection")
    text = F.gelu(caption.linear("linear_1", encoder_hidden_states.to(dtype)), approximate="tanh")
    text = caption.linear("linear_2", text)

    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    for i in range(depth):
        block = weights.below(f"transformer_blocks.{i}")
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (block("scale_shift_table") + six)[
            :, :, None
        ].unbind(1)

        n = layer_norm(x, arch.norm_eps) * (1 + scale_a) + shift_a
        y = windowed_attention(block.below("attn1"), n, grid, i, arch)
        x = x + gate_a * (y + n if arch.attention_residual else y)

        x = x + text_attention(block.below("attn2"), x, text, encoder_attention_mask, arch)

        n = layer_norm(x, arch.norm_eps) * (1 + scale_f) + shift_f
        y = F.gelu(block.below("ff").linear("net.0.proj", n), approximate="tanh")
        x = x + gate_f * block.below("ff").linear("net.2", y)

    shift, scale_out = (weights("scale_shift_table") + cond[:, None])[:, :, None].unbind(1)
    x = layer_norm(x, arch.norm_eps) * (1 + scale_out) + shift
    return picture(weights.linear("proj_out", x), grid, patch)


def published_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `LocalDiTTransformer2DModel` under the published keys (queries, keys, values fused)."""
    inner = {
        "relative_position_bias": "processor.local_rel_pos_bias",
        "global_context.relative_position_bias": "processor.global_rel_pos_bias",
        "global_context.to_kv.weight": "processor.to_global_kv.weight",
        "global_context.to_kv.bias": "processor.to_global_kv.bias",
    }
    for step in (0, 1):
        for ours, theirs in {
            "depthwise": "0",
            "squeeze": "2.fc.0",
            "excite": "2.fc.2",
            "pointwise": "3",
        }.items():
            inner[f"global_context.query_features.{step}.{ours}.weight"] = (
                f"processor.query_feat_extract.{step}.conv.{theirs}.weight"
            )
    published = {}
    for key, tensor in state.items():
        head, found, tail = key.partition(".attn1.")
        if not found:
            published[key] = tensor
        elif tail.startswith("to_q."):
            parts = [state[f"{head}.attn1.to_{name}.{tail[5:]}"] for name in "qkv"]
            published[f"{head}.attn1.to_qkv.{tail[5:]}"] = torch.cat(parts)
        elif not tail.startswith(("to_k.", "to_v.")):
            published[f"{head}.attn1.{inner.get(tail, tail)}"] = tensor
    return published
