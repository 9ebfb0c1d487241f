"""Depthwise 3x3 convolution, GELU and sums of tokens in raster order: the definition, and who computes it.

The convolution reads the map in another order of its rows and columns, shifted and padded, which comes as two
tables: a compiler sees one graph for all shifts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from localdit.kernels import use_triton

# B batch   h w token grid   N = h*w tokens   D channels   H W shifted and padded map


def encode_lines(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The tables that `depthwise_gelu` reads, int32: the sum of a row's and a column's entry is a token.

    Args:
        rows: The image's row at each row of the map, (H,), from `height` on where there is none.
        columns: The same of the columns, (W,), from `width` on.

    Returns:
        The first token of each row, (H,), and the place in a row of each column, (W,); -1 for none.
    """
    return (
        torch.where(rows < height, rows * width, -1).to(torch.int32),
        torch.where(columns < width, columns, -1).to(torch.int32),
    )


def depthwise_gelu_reference(
    x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """GELU, in its exact form, of a depthwise 3x3 convolution of the tokens laid out in a map; and its sums.

    Args:
        x: Tokens in raster order, (B, N, D).
        weight: As `nn.Conv2d` holds it, (D, 1, 3, 3).
        rows: (H,), and
        columns: (W,), the map, as `encode_lines` makes them. It holds each token once. Where it holds none,
            and beyond its edges, it is zero.

    Returns:
        (B, N, D) in raster order, and its sum over tokens, (B, D) in at least float32.
    """
    tokens = x.shape[1]
    present = (rows >= 0)[:, None] & (columns >= 0)  # (H, W)
    # One token more stands for all that are absent.
    token = torch.where(present, rows[:, None] + columns, tokens).long().flatten()  # (H*W,)
    y = F.pad(x, (0, 0, 0, 1)).index_select(1, token).unflatten(1, present.shape).permute(0, 3, 1, 2)
    y = F.gelu(F.conv2d(y, weight, padding=1, groups=len(weight))).permute(0, 2, 3, 1)  # (B, H, W, D)
    y = y.where(present[..., None], 0)
    sums = y.sum(2, dtype=torch.promote_types(y.dtype, torch.float32)).sum(1)
    place = torch.arange(len(token), device=token.device)
    place = token.new_zeros(tokens + 1).scatter(0, token, place)[:-1]  # (N,), where each token stands
    return y.flatten(1, 2).index_select(1, place), sums


def depthwise_gelu(
    x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`depthwise_gelu_reference`, by its Triton twin where `kernels` says so (see `localdit.kernels`).

    Two gradients deep is for the reference alone.
    """
    if use_triton(kernels, x):
        from localdit.kernels.depthwise_gelu_triton import depthwise_gelu_triton

        return depthwise_gelu_triton(x, weight, rows, columns)
    return depthwise_gelu_reference(x, weight, rows, columns)
