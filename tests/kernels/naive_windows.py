"""Windowed attention from token coordinates alone, and the tables of windows cut the way Swin cuts them.

The attention is one N x N matrix per head, and knows of windows only that two tokens share one where
floor((row - shift) / window) and the same for columns agree. The tables come from rolling and padding a map.
Neither shares anything with the library or with the other.
"""

import torch
from torch import Tensor


def windows_of(grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """(G, S) int32: 4 * token + region, -1 where the padded map holds no token."""
    height, width = grid
    padded = [-(-length // window) * window for length in grid]
    table = []
    for top in range(0, padded[0], window):
        for left in range(0, padded[1], window):
            slots = []
            for y in range(top, top + window):
                for x in range(left, left + window):
                    row, column = (y + shift) % padded[0], (x + shift) % padded[1]
                    region = 2 * (row < shift) + (column < shift)
                    here = row < height and column < width
                    slots.append(4 * (row * width + column) + region if here else -1)
            table.append(slots)
    return torch.tensor(table, dtype=torch.int32)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, grid: tuple[int, int], window: int, shift: int
) -> Tensor:
    """q, k, v: (B, N, A, d), tokens in raster order; bias: (A, S, S) by places in the window, or None."""
    token = torch.arange(grid[0] * grid[1])
    row, column = token // grid[1] - shift, token % grid[1] - shift
    down, right = (line.div(window, rounding_mode="floor") for line in (row, column))
    seen = (down[:, None] == down) & (right[:, None] == right)  # (N, N)
    scores = torch.einsum("bnad,bmad->banm", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        place = row % window * window + column % window
        scores = scores + bias[:, place[:, None], place]
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("banm,bmad->bnad", p, v)
