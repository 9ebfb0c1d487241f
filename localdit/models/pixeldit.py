"""PixelDiT: a diffusion transformer on pixels themselves, without an autoencoder, on two levels.

After "PixelDiT: Pixel Diffusion Transformers for Image Generation" (Yu et al. 2025, arXiv 2511.20645). A
transformer on patches of 16 x 16 pixels settles what is where; its tokens then condition a narrow transformer
on single pixels, whose attention is between patches packed into one token each. Here are both levels and the
class-conditional model; `pixeldit_text.py` has the text-conditional one.
`docs/models/pixeldit.md` maps the paper to this file and lists where paper, first program and this one
differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    TimestepEmbedding,
    get_1d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import Tensor, nn

from localdit.models.layers import RMSNorm, heads_of, modulate, rotate
from localdit.models.pixeldit_single_file import PixelDiTSingleFileMixin
from localdit.models.strict import (
    StrictModelMixin,
    check_attention_kwargs,
    check_parameters,
    check_sample,
    check_sizes,
    check_timestep,
    check_types,
    extra_inputs,
)

# B batch   C channels   H W image   p patch   h w patch grid   N = h*w patches   P = p*p pixels of a patch
# D width   A heads   d = D/A head width   E pixel width   n patches worked on at a time

TIME_CHANNELS = 256  # of the sinusoid

_SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "num_pixel_layers",
    "pixel_dim",
    "pixel_num_attention_heads",
    "pixel_attention_head_dim",
    "num_classes",
    "caption_channels",
    "max_text_tokens",
)


# --- Geometry: all that depends on the patch grid alone -----------------------------------------------------


class Geometry(NamedTuple):
    """The tables of one patch grid."""

    rotary: Tensor  # (N, d/2, 2); for the text model (T + N, d/2, 2), text first
    pixel_rotary: Tensor  # (N, a/2, 2), for the heads of the pixel blocks
    rows: Tensor | None  # (h, 1, p, 1, E/2) the embedding of each pixel's row
    columns: Tensor | None  # (1, w, 1, p, E/2) and of its column


def rotary_table(
    height: int, width: int, head_dim: int, theta: float, extent: float, device: torch.device
) -> Tensor:
    """Cosines and sines of normalised 2-D RoPE, (N, head_dim/2, 2), for `rotate`.

    Whatever its size and shape, a picture reaches from 0 to `extent` along both sides. Even pairs of channels
    turn with the column, odd ones with the row, at θ_k = theta^(-4k / head_dim) for the k-th of each.
    """
    frequency = theta ** (-4 * torch.arange(head_dim // 4, device=device) / head_dim)  # (d/4,)

    def axis(length: int) -> Tensor:  # (length, d/4); a linspace would bind a compiler to one length
        place = torch.arange(length, device=device) * extent / max(length - 1, 1)
        return place[:, None] * frequency

    x, y = axis(width)[None], axis(height)[:, None]
    shape = (height, width, -1)
    angles = torch.stack((x.expand(shape), y.expand(shape)), dim=-1).flatten(2).flatten(0, 1)  # (N, d/2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def text_rotary_table(tokens: int, head_dim: int, theta: float | None, device: torch.device) -> Tensor:
    """Cosines and sines of ordinary RoPE, (tokens, head_dim/2, 2); with `theta` None those of no turn."""
    position = torch.arange(tokens, device=device)[:, None]
    if theta is None:
        angles = torch.zeros(tokens, head_dim // 2, device=device)
    else:
        angles = position * theta ** (-2 * torch.arange(head_dim // 2, device=device) / head_dim)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def build_geometry(
    height: int,
    width: int,
    text_tokens: int,
    patch_size: int,
    head_dim: int,
    pixel_head_dim: int,
    rope: tuple[float, float],
    text_theta: float | None,
    position_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Geometry:
    """Compute the tables of a grid of `height` x `width` patches.

    rope: theta and extent. position_dim: the pixel width E, or 0 for no positions of pixels.
    """
    rotary = rotary_table(height, width, head_dim, *rope, device)
    pixel_rotary = rotary
    if pixel_head_dim != head_dim:
        pixel_rotary = rotary_table(height, width, pixel_head_dim, *rope, device)
    if text_tokens:
        rotary = torch.cat((text_rotary_table(text_tokens, head_dim, text_theta, device), rotary))

    def axis(patches: int) -> Tensor:  # (patches, p, E/2)
        pixel = torch.arange(patches * patch_size, device=device)
        table = get_1d_sincos_pos_embed_from_grid(position_dim // 2, pixel, output_type="pt")
        return table.to(dtype).unflatten(0, (-1, patch_size))

    return Geometry(
        rotary,
        pixel_rotary,
        rows=axis(height)[:, None, :, None] if position_dim else None,
        columns=axis(width)[None, :, None] if position_dim else None,
    )


@lru_cache(maxsize=8)
def cached_geometry(*key: Any) -> Geometry:
    """`build_geometry`, once per grid, dtype and device, for all blocks, steps and models."""
    # A table made under inference_mode could never be used in training.
    with torch.inference_mode(False):
        return build_geometry(*key)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut pictures (B, C, H, W) into patches (B, N, C, P), both grid and pixels row by row."""
    x = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Lay pixels (B, N, P, C) back into pictures (B, C, H, W)."""
    x = x.unflatten(2, (patch_size, patch_size)).unflatten(1, grid)  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# --- Attention ----------------------------------------------------------------------------------------------


class PixelDiTAttnProcessor:
    """What `PixelDiTAttention` computes (a processor holds no tensors, only the choice of backend)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "PixelDiTAttention", hidden_states: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = attn.project(hidden_states)  # (B, N, A, d)
        out = dispatch_attention_fn(
            rotate(q, rotary),
            rotate(k, rotary),
            v,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(2))


class PixelDiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over all patches, with normalised and rotated queries and keys."""

    use_bias = False  # of the projections that AttentionModuleMixin.fuse_projections makes
    is_cross_attention = False
    to_qkv: nn.Linear
    processor: Any
    _default_processor_cls: ClassVar[Any] = PixelDiTAttnProcessor

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = RMSNorm(dim // heads, eps=eps)
        self.norm_k = RMSNorm(dim // heads, eps=eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.processor = self._default_processor_cls()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both normalised) and values of x, (B, N, D): three of (B, N, A, d)."""
        if self.fused_projections:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (heads_of(y, self.heads) for y in (q, k, v))
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, hidden_states: Tensor, rotary: Tensor) -> Tensor:
        """hidden_states: (B, N, D); rotary: (N, d/2, 2). Returns (B, N, D)."""
        return self.processor(self, hidden_states, rotary)


# --- Blocks -------------------------------------------------------------------------------------------------


def swiglu(dim: int, config: Any) -> FeedForward:
    """w2(SiLU(w1 x) · w3 x) without biases, two thirds of `mlp_ratio` wide; w3 and w1 are one layer."""
    hidden = int(2 * config.mlp_ratio * dim / 3)
    return FeedForward(dim, inner_dim=hidden, activation_fn="swiglu", bias=False)


class PixelDiTBlock(nn.Module):
    """The patch level's block: attention and SwiGLU, modulated by the condition (DiT, section 3.2).

    A subclass may take further inputs by keyword: they come from the model's `attention_kwargs`.
    """

    def __init__(self, config: Any):
        """config: the model's config."""
        super().__init__()
        dim, eps = config.num_attention_heads * config.attention_head_dim, config.norm_eps
        self.norm1 = RMSNorm(dim, eps=eps)
        self.attn1 = PixelDiTAttention(dim, config.num_attention_heads, eps)
        self.norm2 = RMSNorm(dim, eps=eps)
        self.ff = swiglu(dim, config)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: Tensor, conditioning: Tensor, rotary: Tensor) -> Tensor:
        """hidden_states: (B, N, D); conditioning: (B, 1, D); rotary: (N, d/2, 2). Returns (B, N, D)."""
        x = hidden_states
        six = self.modulation(conditioning).unflatten(-1, (6, -1))  # (B, 1, 6, D)
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = six.unbind(2)

        y = modulate(self.norm1(x), attn_shift, attn_scale)
        x = torch.addcmul(x, attn_gate, self.attn1(y, rotary))

        y = modulate(self.norm2(x), ff_shift, ff_scale)
        x = torch.addcmul(x, ff_gate, self.ff(y))
        return x


class PixelDiTPixelBlock(nn.Module):
    """The pixel level's block, the paper's PiT block: pixels packed into a token per patch, attention between
    these, pixels unpacked, and a small MLP on each pixel.

    Pixel-wise adaLN: every pixel of every patch has shifts, scales and gates of its own, 6·P·E numbers for a
    patch where a pixel token has E. They are made for `chunk_size` patches at a time, those that act before
    attention apart from those that act after it, and never stand in memory together.
    """

    chunk_size: ClassVar[int] = 1024  # patches, of all pictures of a batch

    def __init__(self, config: Any):
        """config: the model's config."""
        super().__init__()
        dim, eps = config.num_attention_heads * config.attention_head_dim, config.norm_eps
        heads = config.pixel_num_attention_heads or config.num_attention_heads
        attn_dim = heads * (config.pixel_attention_head_dim or config.attention_head_dim)
        pixel_dim = config.pixel_dim
        packed = config.patch_size**2 * pixel_dim  # P*E

        self.norm1 = RMSNorm(pixel_dim, eps=eps)
        # Shift and scale before attention. With post-modulation nothing is modulated there.
        self.modulation1 = None if config.pixel_post_modulation else nn.Linear(dim, 2 * packed)
        self.compress = nn.Linear(packed, attn_dim)
        self.attn1 = PixelDiTAttention(attn_dim, heads, eps)
        self.expand = nn.Linear(attn_dim, packed)
        self.norm2 = RMSNorm(pixel_dim, eps=eps)
        self.ff = FeedForward(pixel_dim, mult=config.pixel_mlp_ratio, activation_fn="gelu")
        # Attention's gate, and shift, scale and gate of the MLP; or scale and shift of both.
        self.modulation2 = nn.Linear(dim, 4 * packed)

    def forward(self, hidden_states: Tensor, conditioning: Tensor, rotary: Tensor) -> Tensor:
        """One block.

        Args:
            hidden_states: Pixel tokens by patch, (B, N, P, E).
            conditioning: One vector for each patch, (B, N, D).
            rotary: (N, a/2, 2).

        Returns:
            (B, N, P, E).
        """
        x, cond = hidden_states.flatten(0, 1), conditioning.flatten(0, 1)  # (B*N, P, E), (B*N, D)
        chunks = list(zip(x.split(self.chunk_size), cond.split(self.chunk_size)))
        z = torch.cat([self.pack(*chunk) for chunk in chunks])  # (B*N, a)
        z = self.attn1(z.unflatten(0, hidden_states.shape[:2]), rotary).flatten(0, 1)
        x = torch.cat([self.unpack(*chunk, y) for chunk, y in zip(chunks, z.split(self.chunk_size))])
        return x.view_as(hidden_states)

    def pack(self, x: Tensor, cond: Tensor) -> Tensor:
        """Pixels (n, P, E) and conditions (n, D) to one token a patch, (n, a)."""
        y = self.norm1(x)
        if self.modulation1 is not None:
            y = modulate(y, *self.modulation1(cond).unflatten(-1, (2, *x.shape[1:])).unbind(1))
        return self.compress(y.flatten(1))

    def unpack(self, x: Tensor, cond: Tensor, z: Tensor) -> Tensor:
        """Pixels (n, P, E) after attention, whose result is z, (n, a), and after the MLP."""
        four = self.modulation2(cond).unflatten(-1, (4, *x.shape[1:])).unbind(1)  # (n, P, E) each
        attended = self.expand(z).view_as(x)
        if self.modulation1 is None:
            attn_scale, attn_shift, ff_scale, ff_shift = four
            x = x + modulate(attended, attn_shift, attn_scale)
            return x + modulate(self.ff(self.norm2(x)), ff_shift, ff_scale)
        attn_gate, ff_shift, ff_scale, ff_gate = four
        x = torch.addcmul(x, attn_gate, attended)
        y = modulate(self.norm2(x), ff_shift, ff_scale)
        return torch.addcmul(x, ff_gate, self.ff(y))


# --- Models -------------------------------------------------------------------------------------------------


@dataclass
class PixelDiTOutput(BaseOutput):
    """What the models return."""

    sample: Tensor  # (B, C, H, W)
    hidden_state: Tensor | None = None  # (B, N, D) tokens of the block that was asked for


class PixelDiTBase(
    StrictModelMixin,
    ModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    CacheMixin,
    PixelDiTSingleFileMixin,
):
    """What the class and the text model share: all layers but those of their conditions, the pixel level, the
    tables of a size, and checks. A subclass names its blocks and computes the patch level."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["embed", "norm", "caption"]
    _no_split_modules: ClassVar[list[str]]
    _repeated_blocks: ClassVar[list[str]]
    block_class: ClassVar[type[nn.Module]]
    pixel_block_class: ClassVar[type[PixelDiTPixelBlock]] = PixelDiTPixelBlock

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        blocks = [cls.block_class.__name__, cls.pixel_block_class.__name__]
        cls._no_split_modules = cls._repeated_blocks = blocks

    def _add_shared_layers(self, model: "type[PixelDiTBase]") -> int:
        """Check the config, make the layers that both models have, and return the width D.

        model: The class whose signature is the config, without the fields of a subclass.
        """
        self._check_config(model.__init__)
        config = self.config
        dim = config.num_attention_heads * config.attention_head_dim
        # The grid is added by `forward`: what depends on the size alone comes first in the key of its tables.
        self._geometry_key: tuple[Any, ...] = (
            config.patch_size,
            config.attention_head_dim,
            config.pixel_attention_head_dim or config.attention_head_dim,
            (config.rope_theta, config.rope_extent),
            config.get("text_rope_theta") if config.get("text_rope") else None,
            config.pixel_dim if config.pixel_position else 0,
        )
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, dim)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, dim)
        self.transformer_blocks = nn.ModuleList(self.block_class(config) for _ in range(config.num_layers))
        self.pixel_embed = nn.Linear(config.in_channels, config.pixel_dim)
        self.pixel_blocks = nn.ModuleList(
            self.pixel_block_class(config) for _ in range(config.num_pixel_layers)
        )
        self.norm_out = RMSNorm(config.pixel_dim, eps=config.norm_eps)
        self.proj_out = nn.Linear(config.pixel_dim, config.in_channels)
        self._block_inputs = extra_inputs(self.block_class, model.block_class)
        self.gradient_checkpointing = False
        return dim

    def init_weights(self) -> None:
        """Draw the weights as the published training does; what is not named here is PyTorch's default.

        The modulations are zero, so that each block starts as the identity, and the final layer is zero, so
        that the first prediction is.
        """
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for layer in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        if self.config.zero_init_modulation:
            for name, parameter in self.named_parameters():
                if "modulation" in name:
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def _geometry(self, hidden_states: Tensor, text_tokens: int = 0) -> Geometry:
        patch = self.config.patch_size
        grid = (hidden_states.shape[2] // patch, hidden_states.shape[3] // patch)
        # A compiler sees the arithmetic itself and keeps the sizes dynamic; eager code keeps the tables. What
        # comes of a fake tensor is fake as well, and not kept.
        traced = torch.compiler.is_compiling() or type(hidden_states) is not Tensor
        get_geometry: Any = build_geometry if traced else cached_geometry
        return get_geometry(
            *grid, text_tokens, *self._geometry_key, hidden_states.dtype, hidden_states.device
        )

    def _time(self, timestep: Tensor | float, x: Tensor) -> Tensor:
        """The embedding τ of the time, (B, 1, D)."""
        timestep = torch.as_tensor(timestep, device=x.device).expand(len(x))
        wave = get_timestep_embedding(  # float32
            timestep,
            TIME_CHANNELS,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
            max_period=self.config.timestep_period,
        )
        return self.time_embed(wave.to(x.dtype))[:, None]

    def _run(self, block: Any, *inputs: Any) -> Any:
        """A block, its gradient checkpointed where that is asked for."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _pixel_level(self, pixels: Tensor, conditioning: Tensor, geometry: Geometry) -> Tensor:
        """From noisy patches (B, N, C, P) and a condition for each, (B, N, D), to their prediction
        (B, N, P, C)."""
        x = self.pixel_embed(pixels.transpose(2, 3).contiguous())  # (B, N, P, E)
        if geometry.rows is not None and geometry.columns is not None:
            patch = self.config.patch_size
            shape = (geometry.rows.shape[0], geometry.columns.shape[1], patch, patch, -1)
            place = torch.cat((geometry.columns.expand(shape), geometry.rows.expand(shape)), dim=-1)
            x = x + place.flatten(2, 3).flatten(0, 1)  # absolute, whatever the patch
        for block in self.pixel_blocks:
            x = self._run(block, x, conditioning, geometry.pixel_rotary)
        return self.proj_out(self.norm_out(x))

    def _check_config(self, init: Callable[..., None]) -> None:
        config = self.config
        sizes = {name: config[name] for name in _SIZES if config.get(name) is not None}
        check_sizes(sizes)
        check_types(init, config)
        for name in ("attention_head_dim", "pixel_attention_head_dim"):
            if config[name] is not None and config[name] % 4:
                raise ValueError(f"{name} must be a multiple of 4, got {config[name]}")
        if config.pixel_position and config.pixel_dim % 4:
            raise ValueError(f"pixel_dim must be a multiple of 4 with pixel_position, got {config.pixel_dim}")
        for name in ("mlp_ratio", "pixel_mlp_ratio", "rope_theta", "rope_extent", "timestep_period"):
            if not config[name] > 0:
                raise ValueError(f"{name} must be positive, got {config[name]}")
        if not 0 <= config.norm_eps < 1:
            raise ValueError(f"norm_eps must be at least 0 and less than 1, got {config.norm_eps}")
        dim = config.num_attention_heads * config.attention_head_dim
        packed = config.patch_size**2 * config.pixel_dim
        patch_block = dim**2 * (10 + 2 * config.mlp_ratio)
        outside = (
            sizes.get("num_classes", 0) + sizes.get("caption_channels", 0) + sizes.get("max_text_tokens", 0)
        )
        check_parameters(
            config.num_layers * patch_block
            + config.num_pixel_layers * 4 * packed * dim
            + dim * (config.in_channels * config.patch_size**2 + outside),
            sizes,
        )

    def _check_shared_inputs(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        return_hidden_state_of: int | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        config = self.config
        check_sample(hidden_states, config.in_channels, config.patch_size)
        check_timestep(timestep, len(hidden_states))
        if return_hidden_state_of is not None and not 1 <= return_hidden_state_of <= config.num_layers:
            raise ValueError(
                f"return_hidden_state_of must be a block from 1 to {config.num_layers} or None, "
                f"got {return_hidden_state_of}"
            )
        check_attention_kwargs(attention_kwargs, self._block_inputs, self.block_class)


class PixelDiTTransformer2DModel(PixelDiTBase):
    """The class-conditional PixelDiT. The defaults are the published XL, 797 M parameters.

    A subclass may name another `block_class` or `pixel_block_class` and add config fields.

    Args:
        sample_size: Side of the pictures it is made for, in pixels. A pipeline's default, and no more.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of a picture, and of the prediction.
        num_layers: Patch blocks.
        num_attention_heads: Of the patch blocks.
        attention_head_dim: Channels per head, a multiple of 4. The width D is the product of the two.
        num_pixel_layers: Pixel blocks.
        pixel_dim: Channels of a pixel token, a multiple of 4 with `pixel_position`.
        pixel_num_attention_heads: Of the pixel blocks' attention; `None` for those of the patch blocks.
        pixel_attention_head_dim: Likewise.
        mlp_ratio: Hidden width of the patch blocks' feed-forward, over D, before SwiGLU's two thirds.
        pixel_mlp_ratio: Hidden width of the pixel blocks' MLP, over `pixel_dim`.
        num_classes: Labels. One more, `num_classes`, stands for none.
        rope_theta: Base of the rotary frequencies.
        rope_extent: What a side of the picture measures in rotary positions, whatever its pixels.
        timestep_period: Longest period of the time's sinusoid, over 2π.
        pixel_position: Add a fixed sine-cosine embedding of each pixel's row and column.
        pixel_post_modulation: Modulate what comes out of the pixel blocks' branches, not what goes in: the
            authors' later cure for spikes of the loss. No published weights have it.
        zero_init_modulation: Start from modulations of zero (adaLN-Zero).
        norm_eps: Of all norms.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    block_class: ClassVar[type[nn.Module]] = PixelDiTBlock

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        num_layers: int = 26,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_pixel_layers: int = 4,
        pixel_dim: int = 16,
        pixel_num_attention_heads: int | None = None,
        pixel_attention_head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        pixel_mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        rope_theta: float = 10000.0,
        rope_extent: float = 16.0,
        timestep_period: float = 10.0,
        pixel_position: bool = True,
        pixel_post_modulation: bool = False,
        zero_init_modulation: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        dim = self._add_shared_layers(PixelDiTTransformer2DModel)
        self.class_embed = nn.Embedding(num_classes + 1, dim)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.class_embed.weight, std=0.02)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        return_hidden_state_of: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> PixelDiTOutput | tuple[Tensor, ...]:
        """Predict the velocity of a noisy picture, from noise to data.

        Args:
            hidden_states: Pictures in [-1, 1] with noise, (B, C, H, W); H and W multiples of the patch size.
            timestep: (B,) or a scalar, in [0, 1]; 0 is noise and 1 is data.
            class_labels: (B,), integers in [0, num_classes]; the last is no class.
            return_hidden_state_of: Return the tokens after this patch block too, counted from 1, which is
                what representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940) reads.
            attention_kwargs: `scale` of a LoRA; anything else goes to the patch blocks of a subclass by name.
            return_dict: Return a `PixelDiTOutput`, else a tuple of what it would hold.

        Returns:
            `sample`, (B, C, H, W), and `hidden_state`, (B, N, D), if asked for.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
        """
        self._check_shared_inputs(hidden_states, timestep, return_hidden_state_of, attention_kwargs)
        self._check_labels(class_labels, len(hidden_states))
        height, width = hidden_states.shape[2:]
        patch = self.config.patch_size
        geometry = self._geometry(hidden_states)

        # 1. Patches, and the condition.
        pixels = patchify(hidden_states, patch)  # (B, N, C, P)
        x = self.patch_embed(pixels.flatten(2))  # (B, N, D), without positions: those are the rotary ones
        t = self._time(timestep, x)  # (B, 1, D)
        cond = F.silu(t + self.class_embed(class_labels)[:, None])

        # 2. What is where.
        hidden_state = None
        for index, block in enumerate(self.transformer_blocks, start=1):
            run = partial(block, **attention_kwargs) if attention_kwargs else block
            x = self._run(run, x, cond, geometry.rotary)
            if index == return_hidden_state_of:
                hidden_state = x

        # 3. Its pixels, each patch conditioned by its token; the class is in that already.
        pixels = self._pixel_level(pixels, F.silu(t + x), geometry)  # (B, N, P, C)
        sample = unpatchify(pixels, (height // patch, width // patch), patch)
        if return_dict:
            return PixelDiTOutput(sample=sample, hidden_state=hidden_state)
        return (sample,) if hidden_state is None else (sample, hidden_state)

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        if labels.ndim != 1 or len(labels) != batch or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"class_labels must be ({batch},) integers, got {labels.dtype} of {tuple(labels.shape)}"
            )
