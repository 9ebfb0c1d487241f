"""LocalDiT: a PixArt-like text-to-image diffusion transformer whose self-attention stays within windows.

Built on PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) for conditioning, Swin (Liu et al. 2021, arXiv
2103.14030) for shifted windows, and RoFormer (Su et al. 2021, arXiv 2104.09864) for rotary positions, here in
two dimensions. `docs/models/local_dit.md` maps the published description to this file and
lists what in it surprises.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.activations import GELU
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from localdit.kernels import check_kernels
from localdit.kernels.depthwise_gelu import depthwise_gelu, encode_lines
from localdit.kernels.window_attention import Attended, encode_slots, triton_computes, window_attention
from localdit.models.layers import RMSNorm, gelu, heads_of, is_watched, modulate, rotate, sincos_table
from localdit.models.local_dit_single_file import LocalDiTSingleFileMixin
from localdit.models.region import Layout, Region, build_region
from localdit.models.strict import (
    StrictModelMixin,
    check_attention_kwargs,
    check_caption,
    check_parameters,
    check_sample,
    check_sizes,
    check_timestep,
    check_types,
    extra_inputs,
)

if TYPE_CHECKING:
    from localdit.models.streaming import Streaming

# B batch   C channels   H W latent   p patch   h w token grid   N = h*w tokens   T text tokens
# D width   A heads   d = D/A head width   G windows   S tokens per window   M = G*S window slots

# The latents of the published model are an eighth of the picture's side. Used for the size conditions alone.
PIXELS_PER_LATENT = 8

_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "caption_channels",
    "sample_size",
    "patch_size",
    "window_size",
)

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # two of (B, T, A, d)


# --- Geometry: all that depends on the token grid alone -----------------------------------------------------


class Windows(NamedTuple):
    """How one cyclic shift lays the token grid out in windows. The slots of a window follow each other.

    Where the grid is no multiple of the window it is padded at the bottom and right; slots that hold only
    padding are *absent*: never attended to, zero in the global context, dropped at the end.
    """

    slot_token: Tensor  # (M,) raster index of the token in each slot; 0 where absent
    token_slot: Tensor  # (N,) slot of each token
    present: Tensor | None  # (M, 1) bool; None when nothing is absent
    attend: Tensor  # (G, 1, S, S) bool, True where query may see key
    rotary: Tensor | None  # (M, d/2, 2)
    grid: tuple[int, int]  # windows per column and per row
    slots: Tensor  # (G, S) int32, all of this once more for kernels: `encode_slots`
    # Rows and columns of the shifted and padded map, for kernels: `encode_lines`. None for a part of it.
    lines: tuple[Tensor, Tensor] | None
    # (B, M, A, d) queries of the global context, in slots. None: it makes them, of all windows.
    global_queries: Tensor | None = None


class Geometry(NamedTuple):
    """The tables of one token grid."""

    position: Tensor  # (N, D) sine-cosine embedding
    resolution: Tensor  # (1, 2) height and width in pixels
    aspect_ratio: Tensor  # (1,) width / height
    rotary: Tensor | None  # (N, d/2, 2), in raster order
    windows: tuple[Windows, ...]  # one for each shift 0 .. window-1


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of 2-D RoPE, (N, head_dim/2, 2), for `rotate`."""
    return rotary_of(torch.arange(height, device=device), torch.arange(width, device=device), head_dim)


def rotary_of(rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """`rotary_table` of the tokens where these rows (h,) and columns (w,) of a grid cross.

    The first half of the pairs of channels turns with the column, the second with the row, at
    θ_j = 10000^(-4j / head_dim).
    """
    theta = 10000 ** (-4 * torch.arange(head_dim // 4, device=rows.device) / head_dim)  # (d/4,)
    down = rows[:, None, None] * theta  # (h, 1, d/4)
    across = columns[None, :, None] * theta  # (1, w, d/4)
    shape = (len(rows), len(columns), -1)
    angles = torch.cat((across.expand(shape), down.expand(shape)), dim=-1).flatten(0, 1)  # (N, d/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def position_table(
    height: int, width: int, dim: int, base_size: int, interpolation_scale: float, device: torch.device
) -> Tensor:
    """Diffusers' 2-D sine-cosine embedding, (N, dim), stretched to `base_size`."""
    rows, columns = (
        position_axis(length, base_size, interpolation_scale, device) for length in (height, width)
    )
    return sincos_table(rows, columns, dim)


def position_axis(length: int, base_size: int, interpolation_scale: float, device: torch.device) -> Tensor:
    """The coordinates of the rows (columns) of a grid of that height (width), (length,)."""
    index = torch.arange(length, device=device, dtype=torch.float32)
    return index / (length / base_size) / interpolation_scale


def picture_size(height: int, width: int, patch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Height and width in pixels, (1, 2), and width / height, (1,), of a picture of so many tokens."""
    pixels = patch_size * PIXELS_PER_LATENT
    resolution = torch.tensor([[height * pixels, width * pixels]], dtype=torch.float32, device=device)
    return resolution, torch.tensor([width / height], dtype=torch.float32, device=device)


def shift_windows(
    height: int,
    width: int,
    window: int,
    shift: int,
    rotary: Tensor | None,
    device: torch.device,
) -> Windows:
    """Pad, shift up and left by `shift`, cut into `window`² windows (Swin, section 3.2), as index arithmetic.

    In a window that the shift wraps around the border, rows (columns) below `shift` come from the top (left)
    of the image and the others from its bottom (right): these never see each other, which is Swin's region
    mask.
    """

    def axis(length: int) -> tuple[int, Tensor, Tensor]:
        padded = -(-length // window) * window
        # The image's line at each line of the shifted map, and back. No operand is ever negative: inductor's
        # bounds for the remainder assume it.
        line = (torch.arange(padded, device=device) + shift) % padded
        slot = (torch.arange(length, device=device) + (padded - shift)) % padded
        return padded // window, line.unflatten(0, (-1, window)), slot

    down, rows, row_slot = axis(height)  # rows: (down, window)
    across, columns, column_slot = axis(width)
    row = rows[:, None, :, None].expand(down, across, window, window).reshape(-1, window**2)  # (G, S)
    column = columns[None, :, None, :].expand(down, across, window, window).reshape(-1, window**2)

    present = (row < height) & (column < width)
    # Lines below `shift` stand in the window that wraps around alone, beside lines from the other border.
    side = 2 * (row < shift) + (column < shift)
    same_region = side[:, :, None] == side[:, None, :]  # (G, S, S)
    # An absent query sees itself, since a softmax needs something to see; its output is dropped.
    itself = torch.eye(window**2, dtype=torch.bool, device=device)
    attend = (same_region & present[:, None, :]) | itself

    slot_token = torch.where(present, row * width + column, 0).flatten()
    in_row, in_column = (row_slot[:, None], column_slot[None, :])
    token_slot = (in_row // window * across + in_column // window) * window**2
    token_slot = token_slot + in_row % window * window + in_column % window
    pads = height % window != 0 or width % window != 0
    return Windows(
        slot_token=slot_token,
        token_slot=token_slot.flatten(),
        present=present.view(-1, 1) if pads else None,
        attend=attend[:, None],
        rotary=None if rotary is None else rotary[slot_token],
        grid=(down, across),
        slots=encode_slots(slot_token.view_as(side), side, present),
        lines=encode_lines(rows.flatten(), columns.flatten(), height, width),
    )


def build_geometry(
    height: int,
    width: int,
    window: int,
    dim: int,
    head_dim: int,
    rope: bool,
    base_size: int,
    interpolation_scale: float,
    patch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Geometry:
    """Compute the tables of a grid of `height` x `width` tokens."""
    rotary = rotary_table(height, width, head_dim, device) if rope else None
    resolution, aspect_ratio = picture_size(height, width, patch_size, device)
    return Geometry(
        position=position_table(height, width, dim, base_size, interpolation_scale, device).to(dtype),
        resolution=resolution,
        aspect_ratio=aspect_ratio,
        rotary=rotary,
        windows=tuple(shift_windows(height, width, window, shift, rotary, device) for shift in range(window)),
    )


@lru_cache(maxsize=8)
def cached_geometry(*key: Any) -> Geometry:
    """`build_geometry`, once per grid, dtype and device, for all blocks, steps and models."""
    # A table made under inference_mode could never be used in training.
    with torch.inference_mode(False):
        return build_geometry(*key)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler or a fake tensor stands in for the computation: nothing of it may be kept."""
    return torch.compiler.is_compiling() or type(x) is not Tensor


# --- Attention ----------------------------------------------------------------------------------------------


def relative_bias(table: Tensor | None, window: int) -> Any:
    """Spread a relative-position table, ((2w-1)², A), over pairs of slots: (A, S, S) (Swin, eq. 4)."""
    if table is None:
        return None
    line = torch.arange(window, device=table.device)
    offset = line[:, None] - line[None, :] + window - 1  # (w, w), query minus key, from 0
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]  # (w, w, w, w)
    return table[index.flatten()].view(window**2, window**2, -1).permute(2, 0, 1)


class LocalDiTAttnProcessor:
    """What `LocalDiTAttention` computes (a processor holds no tensors, only the choice of backend)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "LocalDiTAttention", hidden_states: Tensor, windows: Windows, rotary: Tensor | None
    ) -> Tensor:
        # Whoever chose one of diffusers' backends gets it.
        chosen = self._attention_backend is not None or self._parallel_config is not None
        slots, head_dim = attn.window_size**2, hidden_states.shape[2] // attn.heads
        if not chosen and triton_computes(attn.kernels, hidden_states, slots, head_dim):
            return self._in_raster_order(attn, hidden_states, windows, rotary)

        in_slots = hidden_states.index_select(1, windows.slot_token)  # (B, M, D)
        q, k, v = attn.project(in_slots, windows.rotary)  # (B, M, A, d)
        bias = relative_bias(attn.relative_position_bias, attn.window_size)
        out = self._within_windows(q, k, v, bias, windows)  # (B, M, D)
        del in_slots, v  # make room
        if attn.global_context is not None:
            q, k, v, bias = attn.global_context(q, k, windows)
            out = torch.lerp(out, self._within_windows(q, k, v, bias, windows), 0.5)
        return attn.to_out[1](attn.to_out[0](out.index_select(1, windows.token_slot)))

    def _within_windows(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, windows: Windows
    ) -> Tensor:
        """Attention of q, k, v, (B, M, A, d), with a bias (A, S, S). Returns (B, M, D)."""
        mask = windows.attend  # (G, 1, S, S)
        if bias is not None:
            mask = torch.where(mask, bias.to(q.dtype), -torch.inf)  # (G, A, S, S)
        if len(q) > 1:
            mask = mask.repeat(len(q), 1, 1, 1)  # (B*G, A, S, S)
        shape = (-1, mask.shape[-1], *q.shape[2:])
        out = dispatch_attention_fn(
            *(x.reshape(shape) for x in (q, k, v)),  # (B*G, S, A, d)
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out.reshape(len(q), -1, out.shape[2] * out.shape[3])

    def _in_raster_order(
        self, attn: "LocalDiTAttention", x: Tensor, windows: Windows, rotary: Tensor | None
    ) -> Tensor:
        """The same, by a kernel that looks up itself where the tokens of a window stand."""
        q, k, v = attn.project(x, rotary)  # (B, N, A, d)
        local = Attended(q, k, v, relative_bias(attn.relative_position_bias, attn.window_size))
        context = None
        if attn.global_context is not None:
            context = Attended(*attn.global_context(q, k, windows, raster=True))
        out = window_attention(windows.slots, local, context, attn.kernels)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class LocalDiTFullAttnProcessor:
    """What `LocalDiTFullAttention` computes."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "LocalDiTFullAttention", hidden_states: Tensor, rotary: Tensor | None) -> Tensor:
        q, k, v = attn.project(hidden_states, rotary)  # (B, N, A, d)
        out = dispatch_attention_fn(
            q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class LocalDiTCrossAttnProcessor:
    """What `LocalDiTCrossAttention` computes."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "LocalDiTCrossAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        q = attn.norm_q(heads_of(attn.to_q(hidden_states), attn.heads))  # (B, N, A, d)
        if isinstance(encoder_hidden_states, Tensor):
            encoder_hidden_states = attn.project_text(encoder_hidden_states)
        k, v = encoder_hidden_states  # (B, T, A, d)
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=encoder_attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class _Attention(nn.Module, AttentionModuleMixin):
    """What every attention here learns: four projections, and RMSNorm on the heads of q and k."""

    use_bias = True  # for AttentionModuleMixin.fuse_projections, which makes to_qkv or to_kv
    is_cross_attention = False
    to_qkv: nn.Linear
    to_kv: nn.Linear
    processor: Any
    _default_processor_cls: ClassVar[Any]

    def __init__(self, dim: int, heads: int, eps: float, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList((nn.Linear(dim, dim), nn.Dropout(dropout)))
        self.norm_q = RMSNorm(dim // heads, eps=eps)
        self.norm_k = RMSNorm(dim // heads, eps=eps)
        self.processor = self._default_processor_cls()


class LocalDiTFullAttention(_Attention):
    """Self-attention over the whole image, as in PixArt, with normalised and rotated queries and keys."""

    _default_processor_cls: ClassVar[Any] = LocalDiTFullAttnProcessor

    def queries(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """The queries alone of `project`, (B, N, A, d)."""
        q = self.to_qkv(x).chunk(3, dim=-1)[0] if self.fused_projections else self.to_q(x)
        return self._turn(self.norm_q, q, rotary)

    def project(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both normalised, then rotated) and values of x, (B, N, D): three of (B, N, A, d)."""
        # One by one: each is finished, and what it took is free, before the next is made.
        projected = (
            iter(self.to_qkv(x).chunk(3, dim=-1))
            if self.fused_projections
            else (layer(x) for layer in (self.to_q, self.to_k, self.to_v))
        )
        q = self._turn(self.norm_q, next(projected), rotary)
        k = self._turn(self.norm_k, next(projected), rotary)
        return q, k, heads_of(next(projected), self.heads)

    def _turn(self, norm: nn.Module, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Normalise the heads of x, (B, N, D), and turn them: (B, N, A, d)."""
        x = norm(heads_of(x, self.heads))
        return x if rotary is None else rotate(x, rotary, held=is_watched(norm))

    def forward(self, hidden_states: Tensor, windows: Windows, rotary: Tensor | None) -> Tensor:
        """hidden_states: (B, N, D); rotary: the table in raster order. Returns (B, N, D)."""
        return self.processor(self, hidden_states, rotary)


class LocalDiTAttention(LocalDiTFullAttention):
    """Self-attention within windows of the token grid, with Swin's relative-position bias.

    Costs O(N · w²) where full attention costs O(N²).
    """

    _default_processor_cls: ClassVar[Any] = LocalDiTAttnProcessor
    kernels = "auto"  # see `LocalDiTTransformer2DModel.set_kernels`

    def __init__(
        self,
        dim: int,
        heads: int,
        eps: float,
        dropout: float,
        window_size: int,
        relative_position_bias: bool,
        global_context: bool,
    ):
        super().__init__(dim, heads, eps, dropout)
        self.window_size = window_size
        table = ((2 * window_size - 1) ** 2, heads)
        self.relative_position_bias = nn.Parameter(torch.zeros(table)) if relative_position_bias else None
        self.global_context = (
            GlobalContext(dim, table if relative_position_bias else None) if global_context else None
        )

    def forward(self, hidden_states: Tensor, windows: Windows, rotary: Tensor | None) -> Tensor:
        """hidden_states: (B, N, D); rotary: the table in raster order. Returns (B, N, D)."""
        return self.processor(self, hidden_states, windows, rotary)


class LocalDiTCrossAttention(_Attention):
    """Attention from image tokens to text tokens."""

    _default_processor_cls: ClassVar[Any] = LocalDiTCrossAttnProcessor
    is_cross_attention = True

    def project_text(self, text: Tensor) -> KeysValues:
        """Normalised keys, and values, of the projected caption (B, T, D): two of (B, T, A, d)."""
        k, v = (
            self.to_kv(text).chunk(2, dim=-1)
            if self.fused_projections
            else (self.to_k(text), self.to_v(text))
        )
        return self.norm_k(heads_of(k, self.heads)), heads_of(v, self.heads)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, D); encoder_hidden_states: (B, T, D), or what `project_text` made of it;
        encoder_attention_mask: (B, 1, 1, T) bool. Returns (B, N, D)."""
        return self.processor(self, hidden_states, encoder_hidden_states, encoder_attention_mask)


class ScaledPointwise(nn.Conv2d):
    """A 1x1 convolution of channels that each image scales in its own way, added to a residual.

    The scale goes into the weight: a map of N tokens is read once and written once, whatever N is.
    """

    def forward(self, input: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + (input · scale) W^T. input, residual: (B, N, D); scale: (B, D). Returns (B, N, D).

        The input alone, (B, D, h, w), is convolved as by any other layer: an adapter around this one asks
        for that.
        """
        if scale is None or residual is None:
            return super().forward(input)
        weight = self.weight.flatten(1) * scale[:, None]  # (B, D, D)
        return torch.baddbmm(residual, input, weight.transpose(1, 2))


class MapConvolution(nn.Conv2d):
    """A depthwise 3x3 convolution. In raster order one pass does GELU and sums as well: `depthwise_gelu`."""

    kernels = "auto"  # see `LocalDiTTransformer2DModel.set_kernels`

    def forward(self, input: Tensor, lines: tuple[Tensor, Tensor] | None = None) -> Any:
        """input: a map, (B, D, h, w), of which the convolution alone is returned; or tokens in raster order,
        (B, N, D), with the lines of their map, of which `depthwise_gelu` returns all it does."""
        if lines is None:
            return super().forward(input)
        return depthwise_gelu(input, self.weight, *lines, self.kernels)


class GlobalContextFeatures(nn.Module):
    """x + conv(x), where conv is a depthwise 3x3, GELU, squeeze-excite and a 1x1.

    The mean of squeeze-excite, over the whole image, is the one path on which a window hears of the others.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise: nn.Module = MapConvolution(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.squeeze = nn.Linear(dim, dim // 4, bias=False)
        self.excite = nn.Linear(dim // 4, dim, bias=False)
        self.pointwise: nn.Module = ScaledPointwise(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, present: Tensor | None, tokens: int) -> Tensor:
        """One feature block on the shifted and padded map.

        Args:
            x: (B, h, w, D), zero where no token is.
            present: (h, w, 1), one where a token is and zero elsewhere; None when they are everywhere.
            tokens: How many are present.

        Returns:
            (B, h, w, D), zero where no token is.
        """
        y, rows = self.convolve(x, present)
        return self.excite_by(rows.sum(1) / tokens, x, y)

    def in_raster_order(self, x: Tensor, windows: Windows) -> Tensor:
        """The same of tokens in raster order, (B, N, D), in one pass over them before the 1x1."""
        y, sums = self.depthwise(x, windows.lines)
        return self.excite_by(sums / len(windows.token_slot), x, y)

    def convolve(self, x: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """The depthwise 3x3 and GELU of x, (B, h, w, D), and the sums of its rows, (B, h, D), in float32."""
        y = self.depthwise(x.permute(0, 3, 1, 2))
        y = gelu(y, held=is_watched(self.depthwise)).permute(0, 2, 3, 1)  # (B, h, w, D)
        if present is not None:
            y = y * present
        # Row by row: whoever has some of the rows adds up the same bits.
        return y, y.sum(2, dtype=torch.promote_types(y.dtype, torch.float32))

    def excite_by(self, mean: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x plus the 1x1 of y, scaled by what the mean over all tokens, (B, D), says.

        x, y: (B, h, w, D), or (B, N, D) in any order. Returns the same shape.
        """
        scale = self.excite(F.gelu(self.squeeze(mean.to(x.dtype)))).sigmoid()  # (B, D)
        tokens, y = x.flatten(1, -2), y.flatten(1, -2)  # (B, N, D)
        if isinstance(self.pointwise, ScaledPointwise):
            return self.pointwise(y, scale, tokens).view_as(x)
        # An adapter stands around the layer and wants the scaled channels themselves.
        scaled = (y * scale[:, None]).mT.unsqueeze(-1)  # (B, D, N, 1)
        return (tokens + self.pointwise(scaled).squeeze(-1).mT).view_as(x)


class GlobalContext(nn.Module):
    """A second attention in the same windows, whose queries have seen their neighbours and the image's mean.

    It reads the queries and keys of the first one; the two results are averaged.
    """

    def __init__(self, dim: int, bias_table: tuple[int, int] | None):
        super().__init__()
        self.query_features = nn.ModuleList((GlobalContextFeatures(dim), GlobalContextFeatures(dim)))
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.relative_position_bias = None if bias_table is None else nn.Parameter(torch.zeros(bias_table))

    def forward(
        self, q: Tensor, k: Tensor, windows: Windows, raster: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k: (B, M, A, d); (B, N, A, d) in raster order if so said, which is for kernels.

        Returns queries, keys, values in the same order and shape, and the bias, (A, S, S).
        """
        heads, query = q.shape[2], windows.global_queries
        # An adapter around a convolution convolves maps alone.
        plain = all(isinstance(features.depthwise, MapConvolution) for features in self.query_features)
        if raster and plain and windows.lines is not None:
            x = q.flatten(2)
            for features in self.query_features:
                x = cast(GlobalContextFeatures, features).in_raster_order(x, windows)
            query = heads_of(x, heads)
        else:
            if query is None:
                x, present = self.to_map(q.index_select(1, windows.slot_token) if raster else q, windows)
                for features in self.query_features:
                    x = features(x, present, tokens=len(windows.token_slot))
                query = self.to_slots(x, windows, heads)
            query = query.index_select(1, windows.token_slot) if raster else query
        key, value = self.to_kv(k.flatten(2)).chunk(2, dim=-1)
        # The spread bias, not the table: offloading takes a module's own tensors away when its forward ends.
        bias = relative_bias(self.relative_position_bias, round(windows.attend.shape[-1] ** 0.5))
        return query, heads_of(key, heads), heads_of(value, heads), bias

    @staticmethod
    def to_map(q: Tensor, windows: Windows) -> tuple[Tensor, Tensor | None]:
        """The shifted and padded map that the convolutions read: published weights depend on where it is cut.

        q: (B, M, A, d). Returns (B, h, w, D), zero where no token is, and where one is, (h, w, 1): None for
        everywhere.
        """
        down, across = windows.grid
        side = round((q.shape[1] // (down * across)) ** 0.5)

        def lay_out(x: Tensor) -> Tensor:  # (B, M, D) -> (B, h, w, D)
            x = x.unflatten(1, (down, across, side, side)).transpose(2, 3)  # (B, down, side, across, side, D)
            return x.flatten(1, 2).flatten(2, 3)

        x = lay_out(q.flatten(2))
        if windows.present is None:
            return x, None
        present = lay_out(windows.present[None])[0].to(x.dtype)  # (h, w, 1)
        return x * present, present

    @staticmethod
    def to_slots(x: Tensor, windows: Windows, heads: int) -> Tensor:
        """The map (B, h, w, D) in slots again: (B, M, A, d)."""
        down, across = windows.grid
        x = x.unflatten(2, (across, -1)).unflatten(1, (down, -1)).transpose(2, 3)
        return heads_of(x.flatten(1, 4), heads)


# --- Block --------------------------------------------------------------------------------------------------


def modulated_norm(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` of norm(x): in one pass where a batch shares shift and scale, (1, 1, D)."""
    if len(shift) > 1:
        return modulate(norm(x), shift, scale)
    return F.layer_norm(x, norm.normalized_shape, 1 + scale[0, 0], shift[0, 0], norm.eps)


class FusedGELU(GELU):
    """diffusers' projection and GELU. Where no gradient is kept the activation costs no pass of its own on
    CUDA, where it is the product's epilogue, and no memory elsewhere."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., 4 D)."""
        weight, device = self.proj.weight, hidden_states.device
        here = hidden_states.dtype == weight.dtype and device == weight.device
        can = here and hidden_states.is_cuda and not torch.is_grad_enabled()
        # Autocast does not cast for operators that it does not know, such as this one.
        if not is_bare(self.proj) or not can or torch.is_autocast_enabled(device.type):
            return gelu(self.proj(hidden_states), self.approximate, held=is_watched(self.proj))
        # The epilogue's GELU is the tanh form, on CUDA alone.
        y = torch._addmm_activation(self.proj.bias, hidden_states.flatten(0, -2), weight.t(), use_gelu=True)
        return y.unflatten(0, hidden_states.shape[:-1])


def is_bare(layer: nn.Module) -> bool:
    """Whether calling a layer is a product with its weight and no more: no adapter, no float8 weights, and
    nobody who waits for the call, to bring the weights or to look on."""
    kind = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    # Offloading puts a forward of its own in the place of the class's.
    return kind and "forward" not in vars(layer) and not layer._forward_hooks and not layer._forward_pre_hooks


class ModulatedFeedForward(FeedForward):
    """diffusers' feed-forward, which may modulate its input itself: then nobody holds that map where a block
    needs most memory."""

    def __init__(self, dim: int, dropout: float):
        super().__init__(dim, activation_fn="gelu-approximate", dropout=dropout)
        self.net[0] = FusedGELU(dim, self.net[0].proj.out_features, approximate="tanh")

    def forward(
        self,
        hidden_states: Tensor,
        norm: nn.LayerNorm | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Of hidden_states, (B, N, D), or of `modulated_norm` of it. Returns (B, N, D)."""
        if norm is not None and shift is not None and scale is not None:
            hidden_states = modulated_norm(norm, hidden_states, shift, scale)
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states


class LocalDiTBlock(nn.Module):
    """Self-attention, attention to text, feed-forward, modulated by adaLN-single (PixArt-alpha, section 2.3).

    A subclass may take further inputs by keyword: they come from the model's `attention_kwargs`.
    """

    def __init__(self, config: Any, index: int):
        """config: the model's config. index: the block's place in the model, from 0."""
        super().__init__()
        dim, heads = config.num_attention_heads * config.attention_head_dim, config.num_attention_heads
        self.shift = index % config.window_size
        self.attention_residual = config.attention_residual

        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.attn1: nn.Module
        if index in config.full_attention_layers:
            self.attn1 = LocalDiTFullAttention(dim, heads, config.qk_norm_eps, config.dropout)
        else:
            bias = config.relative_position_bias
            self.attn1 = LocalDiTAttention(
                dim,
                heads,
                config.qk_norm_eps,
                config.dropout,
                window_size=config.window_size,
                relative_position_bias=config.global_context if bias is None else bias,
                global_context=config.global_context,
            )
        self.attn2 = LocalDiTCrossAttention(dim, heads, config.qk_norm_eps, config.dropout)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.ff = ModulatedFeedForward(dim, config.dropout)

    def modulation(self, conditioning: Tensor) -> Tensor:
        """Shift, scale and gate of the self-attention, then of the feed-forward, (6, B, 1, D), from
        adaLN-single's output, (B, 6 D)."""
        return self.scale_shift_table[:, None, None] + conditioning.unflatten(1, (6, 1, -1)).transpose(0, 1)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        conditioning: Tensor,
        windows: Windows,
        rotary: Tensor | None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: Tokens in raster order, (B, N, D). Fewer than captions where these share them: the
                result is that of each caption with its sample, in the order of repeated samples.
            encoder_hidden_states: The projected caption, (B, T, D), or this block's keys and values of it.
            conditioning: What adaLN-single made of the timestep and sizes, (B, 6 D), or what `modulation`
                made of that, (6, B, 1, D).
            windows: How this block's shift lays the token grid out.
            rotary: The rotary table in raster order, for a block of full attention.
            encoder_attention_mask: (B, 1, 1, T) bool, True = attend; None attends to all.

        Returns:
            (B, N, D).
        """
        x = hidden_states
        six = self.modulation(conditioning) if conditioning.ndim == 2 else conditioning  # (6, B, 1, D)
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = six.unbind()

        y = modulated_norm(self.norm1, x, attn_shift, attn_scale)
        attended = self.attn1(y, windows, rotary)
        # The published attention adds its own input: weights depend on it.
        x = torch.addcmul(x, attn_gate, attended + y if self.attention_residual else attended)
        del attended, y  # make room

        text = encoder_hidden_states
        captions = len(text) if isinstance(text, Tensor) else len(text[0])
        if captions > len(x):  # the two halves of guidance are one until here
            x = x.repeat(captions // len(x), 1, 1)
        x = x + self.attn2(x, encoder_hidden_states, encoder_attention_mask)

        return torch.addcmul(x, ff_gate, self.ff(x, self.norm2, ff_shift, ff_scale))


# --- Model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextContext:
    """What a caption is to the transformer, made once by `encode_text` and passed at every step."""

    text: Tensor  # (B, T, D) projected caption
    mask: Tensor | None  # (B, 1, 1, T) bool
    # Keys and values for each block. None: each block makes its own at its turn.
    keys_values: tuple[KeysValues, ...] | None

    @property
    def batch_size(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class TimestepContext:
    """What a timestep and the sizes are to the transformer, made by `encode_timesteps` ahead of all steps."""

    timestep: Tensor  # (B,); B is 1 where it serves any batch
    conditioning: Tensor  # (B, 6 D)
    embedded: Tensor  # (B, D)
    # For each block, (6, B, 1, D). None: each block makes its own at its turn.
    modulations: tuple[Tensor, ...] | None


class LocalDiTTransformer2DModel(
    StrictModelMixin,
    ModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    CacheMixin,
    LocalDiTSingleFileMixin,
):
    """The LocalDiT transformer. The defaults are the published 0.52 B model.

    A subclass may name another `block_class` and add config fields: `examples/subclass_the_transformer.py`.

    Args:
        num_attention_heads: Heads of every attention.
        attention_head_dim: Channels per head. The width D is the product of the two; a multiple of 3 with
            `use_additional_conditions`; a head of a multiple of 4 with `rope`.
        in_channels: Latent channels.
        out_channels: Predicted channels; `None` for `in_channels`.
        num_layers: Blocks. Block i shifts its windows by i mod `window_size` tokens.
        caption_channels: Width of the text encoder's output.
        sample_size: Latent side that the position embedding is stretched to (128 latents: 1024 pixels).
        patch_size: Side of a token in latents.
        window_size: Side of an attention window in tokens.
        interpolation_scale: Divides the position grid; `None` for `max(sample_size // 64, 1)` as in PixArt.
        norm_eps: Of the LayerNorms.
        qk_norm_eps: Of the RMSNorms on queries and keys.
        dropout: After output projections and in the feed-forward.
        rope: Rotate queries and keys by their place in the image.
        global_context: Average a second attention into every windowed one (`GlobalContext`).
        attention_residual: Self-attention adds its own input to its output, as published.
        full_attention_layers: Indices of the blocks that attend over the whole image instead of windows.
        use_additional_conditions: Condition on resolution and aspect ratio.
        relative_position_bias: Learned bias by offset within a window; `None` follows `global_context`, as
            the published sizes are counted.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["pos_embed", "norm", "adaln_single"]
    _no_split_modules: ClassVar = ["LocalDiTBlock"]
    _repeated_blocks: ClassVar = ["LocalDiTBlock"]
    block_class: ClassVar[type[LocalDiTBlock]] = LocalDiTBlock

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "block_class" in vars(cls):
            cls._no_split_modules = cls._repeated_blocks = [cls.block_class.__name__]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 4,
        num_layers: int = 18,
        caption_channels: int = 4096,
        sample_size: int = 128,
        patch_size: int = 2,
        window_size: int = 4,
        interpolation_scale: float | None = None,
        norm_eps: float = 1e-6,
        qk_norm_eps: float = 1e-10,
        dropout: float = 0.0,
        rope: bool = True,
        global_context: bool = True,
        attention_residual: bool = True,
        full_attention_layers: tuple[int, ...] = (),
        use_additional_conditions: bool = True,
        relative_position_bias: bool | None = None,
    ):
        super().__init__()
        self._check_config()
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        # The grid is added by `forward`: what depends on the size alone comes first in the key of its tables.
        self._geometry_key: tuple[Any, ...] = (
            window_size,
            dim,
            attention_head_dim,
            rope,
            sample_size // patch_size,
            scale,
            patch_size,
        )

        self.pos_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, dim, pos_embed_type=None
        )
        self.adaln_single = AdaLayerNormSingle(dim, use_additional_conditions)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, dim)
        self.transformer_blocks = nn.ModuleList(self.block_class(self.config, i) for i in range(num_layers))
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)

        self._block_inputs = extra_inputs(self.block_class, LocalDiTBlock)

        self._streaming: Streaming | None = None
        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as the published training does; a subclass's blocks included."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))  # a linear layer on patches
        for part in (self.adaln_single.emb, self.adaln_single.linear, self.caption_projection):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for block in cast("list[LocalDiTBlock]", self.transformer_blocks):
            nn.init.normal_(block.scale_shift_table, std=block.scale_shift_table.shape[1] ** -0.5)
            nn.init.zeros_(block.attn2.to_out.get_parameter("0.weight"))  # the text comes in as it is learned
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        nn.init.zeros_(self.proj_out.weight)

    def set_kernels(self, kernels: str) -> None:
        """Say who computes what this package has kernels of its own for.

        A backend that diffusers' `set_attention_backend` chose goes first: it leaves the windows to PyTorch.

        Args:
            kernels: "auto", the default: Triton on CUDA where it is installed, for what its kernels take
                (float32, float16, bfloat16; windows of up to 64 tokens; heads of up to 128 channels), else
                PyTorch. "triton": Triton, or an error. "torch": PyTorch, of which gradients have gradients.

        Raises:
            ValueError: for another name.
            ImportError: for "triton" where Triton is not installed.
        """
        check_kernels(kernels)
        module: Any
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels

    def enable_streaming(self, max_tokens: int = 8192, offload: bool = False) -> None:
        """Compute each block in bands of rows from now on: memory for one token map and a band, at any size.

        Every window sees itself alone, so nothing changes in the result: `localdit/models/streaming.py`
        says what equal bits take. The squeeze-excites of global context need the mean of the whole image
        first, which makes their queries be computed three times: a quarter more work, or two fifths where a
        band has four rows of windows. Blocks of full attention are computed whole, in the memory that takes.

        Streaming is for inference, with all blocks on one device; caches of diffusers are to be disabled.

        Args:
            max_tokens: Of the batch, that are computed at a time; at least one row of windows is.
            offload: Keep the token map in the memory of the host, and on the device a band alone.

        Raises:
            ValueError: A subclass changes what a block or its attention computes, which may then look beyond
                a band.
        """
        from localdit.models.streaming import Streaming  # which imports this file

        streaming = Streaming(max_tokens, offload)
        streaming.check(self)
        self._streaming = streaming

    def disable_streaming(self) -> None:
        """Compute whole images again."""
        self._streaming = None

    @property
    def is_streaming(self) -> bool:
        return self._streaming is not None

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> TextContext:
        """Project a caption, and make each block's keys and values of it, once for all steps.

        Padding after the last token that any caption keeps is left out, and the mask with it where nothing is
        masked then: the model's output is that with the caption itself, but for rounding.

        Args:
            encoder_hidden_states: Text features, (B, T, caption_channels).
            encoder_attention_mask: (B, T), 1 or True = keep, 0 or False = padding; None keeps all.
            attention_kwargs: As for `forward`; a LoRA's `scale` applies here too.
        """
        text, mask = encoder_hidden_states, encoder_attention_mask
        check_caption(text, mask, self.config.caption_channels)
        if mask is not None and not (mask.is_meta or is_traced(mask)):  # those hold no values to look at
            kept = mask.bool().any(dim=0).nonzero()  # columns, (K, 1)
            length = int(kept[-1]) + 1 if len(kept) else mask.shape[1]
            text, mask = text[:, :length], mask[:, :length]
            mask = None if mask.all() else mask
        context = self._project_caption(text, mask)
        attentions = [block.attn2 for block in cast("list[LocalDiTBlock]", self.transformer_blocks)]
        # An offloaded block fetches its weights in its own forward alone.
        if any(attn.to_k.weight.device != context.text.device for attn in attentions):
            return context
        keys_values = tuple(attn.project_text(context.text) for attn in attentions)
        return TextContext(context.text, context.mask, keys_values)

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_timesteps(
        self,
        timesteps: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> list[TimestepContext]:
        """Make each block's modulation for all timesteps of a run, ahead of it.

        The model's output is that with the timestep itself, but for rounding.

        Args:
            timesteps: (S,), in [0, 1000).
            added_cond_kwargs: As for `forward`, in a batch of 1, for a model of `use_additional_conditions`.
            attention_kwargs: As for `forward`; a LoRA's `scale` applies here too.

        Returns:
            S contexts, each for any batch.
        """
        if timesteps.ndim != 1:
            raise ValueError(f"timesteps must be (S,), got {tuple(timesteps.shape)}")
        self._check_sizes(added_cond_kwargs, batch=1)
        if not len(timesteps):
            return []
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.config.use_additional_conditions:
            if not added_cond_kwargs:
                raise ValueError(
                    "added_cond_kwargs must hold resolution, (1, 2), and aspect_ratio, (1,): there are no "
                    "latents here to derive them from"
                )
            sizes = {
                name: size.expand(len(timesteps), *size.shape[1:]) for name, size in added_cond_kwargs.items()
            }
        conditioning, embedded = self.adaln_single(
            timesteps.to(self.scale_shift_table.device),
            sizes,
            batch_size=len(timesteps),
            hidden_dtype=self.dtype,
        )  # (S, 6 D), (S, D)
        blocks = cast("list[LocalDiTBlock]", self.transformer_blocks)
        # An offloaded block fetches its weights in its own forward alone.
        whole = all(block.scale_shift_table.device == conditioning.device for block in blocks)
        tables = [block.modulation(conditioning) for block in blocks] if whole else []  # (6, S, 1, D) each
        return [
            TimestepContext(
                timesteps[i : i + 1],
                conditioning[i : i + 1],
                embedded[i : i + 1],
                tuple(table[:, i : i + 1] for table in tables) if whole else None,
            )
            for i in range(len(timesteps))
        ]

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | TextContext,
        timestep: Tensor | float | TimestepContext,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        region: Region | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise (or what the model was trained for) in a noisy sample.

        Args:
            hidden_states: Noisy latents, (B, in_channels, H, W); H and W multiples of the patch size.
            encoder_hidden_states: Text features, (B, T, caption_channels), or `encode_text` of them; that may
                hold k B captions, such as the two of guidance, for as many predictions: the samples, in
                order, k times. What comes before the text is then computed once.
            timestep: (B,) or a scalar, in [0, 1000), 0 is clean; or one of `encode_timesteps`.
            encoder_attention_mask: (B, T), 1 or True = keep; None keeps all, or what the `TextContext` holds.
            added_cond_kwargs: `resolution`, (B, 2): height and width in pixels, and `aspect_ratio`, (B,):
                width / height. None derives both from the latents, as an eighth of the picture; it must be
                None with a `TimestepContext`, which holds the sizes.
            attention_kwargs: `scale` of a LoRA; anything else goes to the blocks of a subclass by name.
            return_dict: Return a `Transformer2DModelOutput`, else a tuple.
            region: Compute this part of the image alone, as `plan_region` gives it; None computes all.

        Returns:
            `sample`, (B or k B, out_channels, H, W); zero where a `region` is not computed.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
        """
        self._check_inputs(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask,
            added_cond_kwargs,
            attention_kwargs,
            region,
        )
        batch, _, height, width = hidden_states.shape
        grid = height // self.config.patch_size, width // self.config.patch_size

        # 1. Text.
        if isinstance(encoder_hidden_states, TextContext):
            context = encoder_hidden_states
        else:
            context = self._project_caption(encoder_hidden_states, encoder_attention_mask)
        if self._streaming is not None:
            sample = self._streaming.run(self, hidden_states, context, timestep, added_cond_kwargs)
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

        # A compiler sees the arithmetic itself and keeps the sizes dynamic; eager code keeps the tables. What
        # comes of a fake tensor is fake as well, and not kept.
        get_geometry: Any = build_geometry if is_traced(hidden_states) else cached_geometry
        geometry = get_geometry(*grid, *self._geometry_key, hidden_states.dtype, hidden_states.device)

        # 2. Tokens.
        # The convolution leaves the channels outermost; every layer from here on wants them innermost.
        x = self.pos_embed(hidden_states).contiguous() + geometry.position  # (B, N, D)

        # 3. Conditions.
        size = geometry.resolution, geometry.aspect_ratio
        conditioning, embedded, modulations = self.condition(timestep, added_cond_kwargs, size, x)

        # 4. Blocks.
        copies = context.batch_size // batch
        # Our own block takes a sample for several captions. A subclass's may not, nor may a cache, which
        # compares a block's output with its input.
        shares = self.block_class is LocalDiTBlock and not self.is_cache_enabled
        if copies > 1 and not (shares and len(conditioning) == 1):
            x = x.repeat(copies, 1, 1)
            if len(conditioning) > 1:  # one serves any batch
                conditioning, embedded = conditioning.repeat(copies, 1), embedded.repeat(copies, 1)
        for index, block in enumerate(cast("list[LocalDiTBlock]", self.transformer_blocks)):
            text = context.text if context.keys_values is None else context.keys_values[index]
            run = partial(block, **attention_kwargs) if attention_kwargs else block
            # The shift is chosen here, so that all blocks are one graph to a compiler.
            modulation = conditioning if modulations is None else modulations[index]
            windows, rotary = geometry.windows[block.shift], geometry.rotary
            if region is not None:
                keep, windows, rotary = region.blocks[index]
                x = x if keep is None else x.index_select(1, keep)
            fixed = (text, modulation, windows, rotary, context.mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(run, x, *fixed)
            else:
                x = run(x, *fixed)

        # 5. Output.
        x = self.predict(x, embedded)
        if region is not None:
            x = x.new_zeros(len(x), grid[0] * grid[1], x.shape[2]).index_copy(1, region.tokens, x)
        sample = self.to_latents(x, grid)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def condition(
        self,
        timestep: Tensor | float | TimestepContext,
        added_cond_kwargs: dict[str, Tensor] | None,
        size: tuple[Tensor, Tensor],
        x: Tensor,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
        """What adaLN-single makes of time and size: the three tensors of a `TimestepContext`.

        `size` is `picture_size`'s, for want of `added_cond_kwargs`; batch, dtype and device are those of x.
        """
        if isinstance(timestep, TimestepContext):
            return timestep.conditioning, timestep.embedded, timestep.modulations
        timestep = torch.as_tensor(timestep, device=x.device).expand(len(x))
        if not added_cond_kwargs or not self.config.use_additional_conditions:
            sizes = size[0].expand(len(x), 2), size[1].expand(len(x))
        else:
            sizes = added_cond_kwargs["resolution"], added_cond_kwargs["aspect_ratio"]
        conditioning, embedded = self.adaln_single(
            timestep,
            {"resolution": sizes[0], "aspect_ratio": sizes[1]},
            batch_size=len(x),
            hidden_dtype=x.dtype,
        )
        return conditioning, embedded, None

    def predict(self, x: Tensor, embedded: Tensor) -> Tensor:
        """What the last block's tokens, (B, N, D), say of their patches: (B, N, p*p*C)."""
        shift, scale = (self.scale_shift_table[:, None, None] + embedded[:, None]).unbind()  # (B, 1, D)
        return self.proj_out(modulated_norm(self.norm_out, x, shift, scale))

    def to_latents(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h*w, p*p*C) for grid = (h, w) to (B, C, H, W)."""
        size = self.config.patch_size
        x = patches.unflatten(2, (size, size, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, grid[0] * size, grid[1] * size)

    def plan_region(self, tokens: Tensor, halo: int | None = None) -> Region | None:
        """Find what must be computed for a part of the image, once for all steps: `forward`'s `region`.

        With windowed attention alone, tokens that cannot reach the part within the blocks are left out, and
        nothing changes in it. Full attention, and the mean in `global_context`, reach across the whole image:
        what comes before them is computed whole, unless there is a `halo`.

        Args:
            tokens: (h, w) bool, the patches to predict, on the device of the samples.
            halo: Leave out what is further than so many windows from the part, though it be needed, and take
                means over what is left. An approximation, but for windowed attention in a halo as wide as
                the blocks reach. None: what is needed is computed.

        Returns:
            The region, or None where it is the whole image, as with a cache enabled, which wants all
            tokens, and with streaming.

        Raises:
            ValueError: No token is to be predicted.
        """
        if tokens.ndim != 2 or tokens.dtype != torch.bool or not tokens.any():
            raise ValueError(
                "tokens must be (h, w) bool, with one that is True, "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if self.is_cache_enabled or self.is_streaming:
            return None
        geometry = cached_geometry(*tokens.shape, *self._geometry_key, self.dtype, tokens.device)
        layouts = []
        for block in cast("list[LocalDiTBlock]", self.transformer_blocks):
            is_map = getattr(block.attn1, "global_context", None) is not None
            is_global = is_map or not isinstance(block.attn1, LocalDiTAttention)
            layouts.append(Layout(geometry.windows[block.shift], is_global, is_map))
        reach = None if halo is None else halo * self.config.window_size
        return build_region(tokens, layouts, geometry.rotary, reach)

    def _project_caption(self, text: Tensor, mask: Tensor | None) -> TextContext:
        mask = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, T)
        return TextContext(self.caption_projection(text), mask, keys_values=None)

    def _check_config(self) -> None:
        config = self.config
        sizes = {name: config[name] for name in _SIZES if config[name] is not None}
        check_sizes(sizes)
        check_types(LocalDiTTransformer2DModel.__init__, config)
        dim = config.num_attention_heads * config.attention_head_dim
        width = f"{config.num_attention_heads} heads of {config.attention_head_dim}: {dim}"
        if dim % 4:
            raise ValueError(
                f"the width num_attention_heads * attention_head_dim must be a multiple of 4, got {width}"
            )
        if config.rope and config.attention_head_dim % 4:
            raise ValueError(
                f"attention_head_dim must be a multiple of 4 with rope, got {config.attention_head_dim}"
            )
        if config.use_additional_conditions and dim % 3:
            raise ValueError(
                "the width num_attention_heads * attention_head_dim must be a multiple of 3 with "
                f"use_additional_conditions, got {width}; change it or set use_additional_conditions=False"
            )
        table = (2 * config.window_size - 1) ** 2 * config.num_attention_heads
        ends = config.caption_channels + config.patch_size**2 * (
            config.in_channels + sizes.get("out_channels", 0)
        )
        check_parameters(config.num_layers * (16 * dim**2 + table) + dim * (8 * dim + ends), sizes)
        for name in ("norm_eps", "qk_norm_eps", "dropout"):
            if not 0 <= config[name] < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {config[name]}")
        if config.interpolation_scale is not None and not config.interpolation_scale > 0:
            raise ValueError(
                f"interpolation_scale must be positive or None, got {config.interpolation_scale}"
            )
        for index in config.full_attention_layers:
            if index not in range(config.num_layers):
                raise ValueError(
                    f"full_attention_layers must name blocks 0 to {config.num_layers - 1}, got {index!r}"
                )

    def _check_inputs(
        self,
        hidden_states: Tensor,
        text: Tensor | TextContext,
        timestep: Tensor | float | TimestepContext,
        text_mask: Tensor | None,
        added_cond_kwargs: dict[str, Tensor] | None,
        attention_kwargs: dict[str, Any] | None,
        region: Region | None,
    ) -> None:
        config = self.config
        check_sample(hidden_states, config.in_channels, config.patch_size)
        batch = len(hidden_states)

        if isinstance(text, TextContext):
            if text.batch_size % batch:
                raise ValueError(
                    f"encoder_hidden_states is a TextContext of batch {text.batch_size}, which must be a "
                    f"multiple of hidden_states' batch {batch}"
                )
            if text_mask is not None:
                raise ValueError(
                    "encoder_attention_mask must be None with a TextContext, which holds the mask "
                    "given to encode_text"
                )
        else:
            check_caption(text, text_mask, config.caption_channels, batch)

        if isinstance(timestep, TimestepContext):
            if added_cond_kwargs is not None:
                raise ValueError(
                    "added_cond_kwargs must be None with a TimestepContext, which holds the sizes given to "
                    "encode_timesteps"
                )
        else:
            check_timestep(timestep, batch)
            self._check_sizes(added_cond_kwargs, batch)

        check_attention_kwargs(attention_kwargs, self._block_inputs, self.block_class)

        if region is not None:
            grid = tuple(size // config.patch_size for size in hidden_states.shape[2:])
            if region.grid != grid:
                raise ValueError(f"region must be planned for {grid} tokens, got one for {region.grid}")
            if self.is_streaming:
                raise ValueError("region must be None while streaming; disable_streaming() first")
            if self.is_cache_enabled:
                raise ValueError(
                    "region must be None with a cache enabled, which keeps what all tokens gave before; "
                    "disable_cache() first"
                )

    def _check_sizes(self, added_cond_kwargs: dict[str, Tensor] | None, batch: int) -> None:
        config = self.config
        given = {name for name, value in (added_cond_kwargs or {}).items() if value is not None}
        if added_cond_kwargs is not None and config.use_additional_conditions:
            for name, expected in (("resolution", (batch, 2)), ("aspect_ratio", (batch,))):
                if name not in given:
                    raise ValueError(
                        f"added_cond_kwargs must hold {name}, {expected}; pass None to derive both "
                        "from hidden_states"
                    )
                got = tuple(added_cond_kwargs[name].shape)
                if got != expected and not (name == "aspect_ratio" and got == (batch, 1)):
                    raise ValueError(f"added_cond_kwargs' {name} must be {expected}, got {got}")
        elif given:
            raise ValueError(
                "added_cond_kwargs must be None for a model without use_additional_conditions, "
                f"got {sorted(given)}"
            )
