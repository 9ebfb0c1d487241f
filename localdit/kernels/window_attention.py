"""Attention within windows of a token grid that stays in raster order: the definition, and who computes it.

The windows come as a table, so any partition of the tokens will do, and a compiler sees one graph for all
shifts of the windows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from localdit.kernels import use_triton

# B batch   N tokens   A heads   d head width   G windows   S slots per window

# What the Triton twin takes: beyond, a window's scores and outputs no longer fit in the registers.
MAX_SLOTS = 64
MAX_HEAD_DIM = 128


class Attended(NamedTuple):
    """Queries, keys and values of one attention, and its bias."""

    q: Tensor  # (B, N, A, d)
    k: Tensor  # (B, N, A, d)
    v: Tensor  # (B, N, A, d)
    bias: Tensor | None  # (A, S, S), added to the scores of all windows


def encode_slots(token: Tensor, region: Tensor, present: Tensor) -> Tensor:
    """The table of windows that `window_attention` reads, (G, S) int32: 4 · token + region, -1 for no token.

    Args:
        token: Index of the token in each slot of each window, (G, S). Anything where there is none.
        region: 0 to 3, (G, S): tokens of one window see each other within their region alone.
        present: (G, S) bool, False for a slot without a token.
    """
    return torch.where(present, 4 * token + region, -1).to(torch.int32)


def window_attention_reference(slots: Tensor, local: Attended, context: Attended | None = None) -> Tensor:
    """Softmax attention of every token over the tokens that share its window and its region of the window.

    Args:
        slots: The windows, (G, S), as `encode_slots` makes them. Every one of the N tokens is in one slot.
        local: The attention.
        context: A second one in the same windows; the two results are averaged.

    Returns:
        (B, N, A, d), zero for tokens in no slot. Scores are scaled by d^(-1/2).
    """
    if context is not None:
        return (window_attention_reference(slots, local) + window_attention_reference(slots, context)) / 2
    present, region = slots >= 0, slots & 3  # (G, S)
    token = (slots >> 2).clamp(min=0).flatten()  # (G*S,)
    # A softmax needs something to see, so an absent query sees itself; its output is dropped.
    itself = torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device)
    seen = present[:, None] & (region[:, :, None] == region[:, None]) | itself  # (G, S, S)
    seen = seen[:, None]
    mask = seen if local.bias is None else torch.where(seen, local.bias.to(local.q.dtype), -torch.inf)

    q, k, v = (
        x.index_select(1, token).unflatten(1, slots.shape).transpose(2, 3) for x in local[:3]
    )  # (B, G, A, S, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.transpose(2, 3).where(present[:, :, None, None], 0).flatten(1, 2)  # (B, G*S, A, d)
    return torch.zeros_like(local.q).index_add(1, token, out)


def triton_computes(kernels: str, x: Tensor, slots: int, head_dim: int) -> bool:
    """Whether the Triton twin computes the attention of tensors like x, in windows of that many slots.

    Raises:
        ValueError: "triton" for what the twin does not take.
    """
    if not use_triton(kernels, x):
        return False
    fits = slots <= MAX_SLOTS and head_dim <= MAX_HEAD_DIM
    if kernels == "triton" and not fits:
        raise ValueError(
            f'kernels="triton" takes windows of at most {MAX_SLOTS} tokens and heads of at most '
            f"{MAX_HEAD_DIM} channels, got {slots} and {head_dim}"
        )
    return fits


def window_attention(
    slots: Tensor, local: Attended, context: Attended | None = None, kernels: str = "auto"
) -> Tensor:
    """`window_attention_reference`, by its Triton twin where `kernels` says so (see `localdit.kernels`).

    Two gradients deep is for the reference alone.
    """
    if triton_computes(kernels, local.q, slots.shape[1], local.q.shape[-1]):
        from localdit.kernels.window_attention_triton import window_attention_triton

        return window_attention_triton(slots, local, context)
    return window_attention_reference(slots, local, context)
