"""What two architectures share unchanged and diffusers lacks."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import Tensor, nn


def sincos_table(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """2-D sine-cosine embedding, (h*w, dim), of the coordinates (h,) of rows and (w,) of columns.

    Columns are in the first half of the channels, rows in the second: each is computed on its axis alone.
    """
    down, across = (get_1d_sincos_pos_embed_from_grid(dim // 2, axis) for axis in (rows, columns))
    shape = (len(rows), len(columns), -1)
    return torch.cat((across[None].expand(shape), down[:, None].expand(shape)), dim=-1).flatten(0, 1)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(..., D) -> (..., A, d)."""
    return x.unflatten(-1, (heads, -1))


def is_watched(module: nn.Module) -> bool:
    """Whether a hook is given what the module returns, and may keep it."""
    return bool(module._forward_hooks)


def rotate(x: Tensor, rotary: Tensor, held: bool = False) -> Tensor:
    """Turn adjacent channels of x, (B, M, A, d), by the angles of a rotary table, (M, d/2, 2), in float32.

    The table holds cosines and sines (RoFormer, arXiv 2104.09864, section 3.4.2). Unless somebody else
    holds x, it is turned in its place where no gradient is kept.
    """
    pairs, table = x.float().unflatten(-1, (-1, 2)), rotary[:, None]
    if torch.compiler.is_compiling():  # compilers fuse real arithmetic and know no complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return pairs.flatten(-2).to(x.dtype)
    # One pass where real arithmetic takes six.
    turned, by = torch.view_as_complex(pairs), torch.view_as_complex(table)
    if torch.is_grad_enabled() or held:
        return torch.view_as_real(turned * by).flatten(-2).to(x.dtype)
    turned *= by  # of x itself, or of its copy in float32
    return x if x.dtype == torch.float32 else x.copy_(pairs.flatten(-2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, where shift and scale have the shape of x or one that spreads to it."""
    return torch.addcmul(shift, x, 1 + scale)


def gelu(x: Tensor, approximate: str = "none", held: bool = False) -> Tensor:
    """GELU of x: unless somebody else holds it, in its place where no gradient is kept."""
    if torch.is_grad_enabled() or held:
        return F.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu_(x, approximate=approximate)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight follows the dtype of what it meets: autocast leaves weights in float32, for which
    PyTorch has no fused kernel beside 16-bit input, and says so. The mean square is float32 inside."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d). Returns the same shape."""
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        # On a CPU PyTorch makes more passes and maps of it.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(y.dtype).eps if self.eps is None else self.eps
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / y.shape[-1] + eps)
        y = y * scale if y is x else y.mul_(scale)
        return y.mul_(self.weight).to(x.dtype)
