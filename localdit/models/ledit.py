"""LEDiT: a class-to-image diffusion transformer without positional encoding, for sizes beyond its training.

"LEDiT: Your Length-Extrapolatable Diffusion Transformer without Positional Encoding" (2025, arXiv 2503.04344,
version 3). It is a DiT (Peebles & Xie 2022, arXiv 2212.09748) whose tokens learn where they are from two
things alone: a fixed mask on the attention of every second block, and the zero padding of one convolution
after the patches. `docs/models/ledit.md` maps the paper to this file and says where they differ.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from localdit.models.layers import heads_of, modulate
from localdit.models.ledit_single_file import LEDiTSingleFileMixin
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

# B batch   C channels   H W latent   p patch   h w token grid   N = h*w tokens   T tokens in training
# D width   A heads   d = D/A head width

_TIMESTEP_CHANNELS = 256  # sines and cosines of the timestep

_SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "num_classes",
    "conv_groups",
    "multi_dilation",
)

Kind: TypeAlias = Literal["sa", "ca"]  # a block's attention: over all tokens, or over those a mask shows
# (N, N) bool, True where query may see key; or the same by blocks, for FlexAttention; None: no mask.
Mask: TypeAlias = Tensor | BlockMask | None


# --- Masks (section 3.2, figure 6) --------------------------------------------------------------------------


def _raster(row: Tensor, column: Tensor, key_row: Tensor, key_column: Tensor) -> Tensor:
    """What was read before, line by line: "One-Dimension"."""
    return (key_row < row) | ((key_row == row) & (key_column <= column))


def _rectangle(row: Tensor, column: Tensor, key_row: Tensor, key_column: Tensor) -> Tensor:
    """What lies above and to the left: "Mask Lower-right"."""
    return (key_row <= row) & (key_column <= column)


def _neighborhood(row: Tensor, column: Tensor, key_row: Tensor, key_column: Tensor) -> Tensor:
    """That, and the eight neighbours: "Unmask Neighborhood"."""
    near = ((key_row - row).abs() <= 1) & ((key_column - column).abs() <= 1)
    return _rectangle(row, column, key_row, key_column) | near


def _corner(row: Tensor, column: Tensor, key_row: Tensor, key_column: Tensor) -> Tensor:
    """All but what lies below and to the right: "Mask Lower-right Corner"."""
    return (key_row <= row) | (key_column <= column)


_SEES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "raster": _raster,
    "rectangle": _rectangle,
    "neighborhood": _neighborhood,
    "corner": _corner,
}


def causal_mask(variant: str, height: int, width: int, device: torch.device | str) -> Tensor:
    """Which keys each query sees, (N, N) bool, for a grid of `height` x `width` tokens in raster order."""
    row = torch.arange(height, device=device)[:, None, None, None]
    column = torch.arange(width, device=device)[None, :, None, None]
    seen = _SEES[variant](row, column, row.view(1, 1, -1, 1), column.view(1, 1, 1, -1))  # (h, w, h, w)
    return seen.expand(height, width, height, width).reshape(height * width, -1)


def causal_block_mask(variant: str, height: int, width: int, device: torch.device | str) -> BlockMask:
    """`causal_mask` as FlexAttention takes it: which blocks of 128 x 128 pairs are seen, and the formula."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _SEES[variant](query // width, query % width, key // width, key % width)

    tokens = height * width
    return create_block_mask(sees, None, None, tokens, tokens, device=device)


@lru_cache(maxsize=4)
def cached_mask(make: Callable[..., Any], variant: str, height: int, width: int, device: torch.device) -> Any:
    """`causal_mask` or `causal_block_mask`, once per grid and device, for all blocks, steps and models.

    A mask of N tokens has N² bytes: 16 MiB at 4096 tokens.
    """
    # A table made under inference_mode could never be used in training.
    with torch.inference_mode(False):
        return make(variant, height, width, device)


# --- Pattern ------------------------------------------------------------------------------------------------

# Of so many blocks, which are causal (table 1d).
_PATTERNS: dict[str, Callable[[int, int], bool]] = {
    "sa_ca": lambda index, layers: index % 2 == 1,
    "ca_sa": lambda index, layers: index % 2 == 0,
    "ca_first": lambda index, layers: index < layers // 2,
    "sa_first": lambda index, layers: index >= layers - layers // 2,
    "none": lambda index, layers: False,
}


def attention_kinds(pattern: str | Sequence[str], layers: int) -> tuple[Kind, ...]:
    """What each block's attention is.

    Args:
        pattern: "sa_ca" or "ca_sa", in turns, beginning with the first named; "ca_first" or "sa_first", each
            a half of the blocks (of an odd number, the smaller half is causal); "none"; or one "sa" or "ca"
            for each block.
        layers: Blocks.
    """
    if isinstance(pattern, str):
        if pattern not in _PATTERNS:
            raise ValueError(
                f"attention_pattern must be one of {', '.join(_PATTERNS)}, or a list of 'sa' and 'ca', "
                f"got {pattern!r}"
            )
        return tuple("ca" if _PATTERNS[pattern](index, layers) else "sa" for index in range(layers))
    if len(pattern) != layers or not all(kind in ("sa", "ca") for kind in pattern):
        raise ValueError(
            f"attention_pattern must name 'sa' or 'ca' for each of {layers} blocks, got {list(pattern)}"
        )
    return cast("tuple[Kind, ...]", tuple(pattern))


# --- Layers -------------------------------------------------------------------------------------------------


class LocalityConv(nn.Conv2d):
    """The convolution on the token grid, whose zero padding tells tokens of the border (section 3.3)."""

    def forward(self, x: Tensor, dilation: int = 1) -> Tensor:
        """x: (B, D, h, w). Any dilation has the same weights and is padded to the same size. Returns x's
        shape."""
        padding = dilation * (self.kernel_size[0] // 2)
        return F.conv2d(x, self.weight, self.bias, padding=padding, dilation=dilation, groups=self.groups)


class LEDiTAttnProcessor:
    """What `LEDiTAttention` computes (a processor holds no tensors, only the choice of backend)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "LEDiTAttention", hidden_states: Tensor, mask: Mask, attention_scale: Tensor | None
    ) -> Tensor:
        q, k, v = attn.project(hidden_states)  # (B, N, A, d)
        if attention_scale is not None:
            q = q * attention_scale
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask[None, None] if isinstance(mask, Tensor) else mask,
            is_causal=attn.is_raster and mask is None,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class LEDiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over the tokens that a mask shows. Queries and keys are neither normalised nor rotated.

    Args:
        dim: Width D.
        heads: Heads A.
        is_raster: Tokens see what comes before them line by line: the one mask that kernels know themselves,
            and that need not be passed.
    """

    _default_processor_cls: ClassVar[Any] = LEDiTAttnProcessor
    use_bias = True  # for AttentionModuleMixin.fuse_projections, which makes to_qkv
    is_cross_attention = False
    to_qkv: nn.Linear

    def __init__(self, dim: int, heads: int, is_raster: bool = False):
        super().__init__()
        self.heads = heads
        self.is_raster = is_raster
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList((nn.Linear(dim, dim), nn.Identity()))
        self.processor: Any = self._default_processor_cls()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, (B, N, D): three of (B, N, A, d)."""
        if self.fused_projections:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return heads_of(q, self.heads), heads_of(k, self.heads), heads_of(v, self.heads)

    def forward(
        self, hidden_states: Tensor, mask: Mask = None, attention_scale: Tensor | None = None
    ) -> Tensor:
        """hidden_states: (B, N, D); attention_scale: (), a factor on the logits. Returns (B, N, D)."""
        return self.processor(self, hidden_states, mask, attention_scale)


# --- Block --------------------------------------------------------------------------------------------------


class LEDiTBlock(nn.Module):
    """Self-attention and feed-forward, each modulated by the condition (adaLN-Zero: DiT, section 3.2).

    A subclass may take further inputs by keyword: they come from the model's `attention_kwargs`.
    """

    def __init__(self, config: Any, index: int):
        """config: the model's config. index: the block's place in the model, from 0."""
        super().__init__()
        dim = config.num_attention_heads * config.attention_head_dim
        self.causal = attention_kinds(config.attention_pattern, config.num_layers)[index] == "ca"

        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.attn1 = LEDiTAttention(
            dim, config.num_attention_heads, is_raster=self.causal and config.causal_variant == "raster"
        )
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=config.mlp_ratio, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: Tensor,
        conditioning: Tensor,
        mask: Mask = None,
        attention_scale: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: Tokens in raster order, (B, N, D).
            conditioning: SiLU of the sum of timestep and label embedding, (B, D).
            mask: What each query sees, for a causal block; None for the others, and where the kernel's own
                causal flag does.
            attention_scale: Factor on the attention logits, (); None for 1.

        Returns:
            (B, N, D).
        """
        x = hidden_states
        six = self.modulation(conditioning).unflatten(1, (6, 1, -1))  # (B, 6, 1, D)
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = six.unbind(1)

        y = modulate(self.norm1(x), attn_shift, attn_scale)
        x = torch.addcmul(x, attn_gate, self.attn1(y, mask, attention_scale))

        y = modulate(self.norm2(x), ff_shift, ff_scale)
        x = torch.addcmul(x, ff_gate, self.ff(y))
        return x


# --- Model --------------------------------------------------------------------------------------------------


class LEDiTTransformer2DModel(
    StrictModelMixin,
    ModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    CacheMixin,
    LEDiTSingleFileMixin,
):
    """The LEDiT transformer. The defaults are LEDiT-XL/2 for 256 x 256 pixels: 686,779,808 parameters.

    A subclass may name another `block_class` and add config fields.

    Args:
        sample_size: Side of the latents in training. Nothing that is learned depends on it: it is the T of
            the attention scale, and the default size of pictures.
        patch_size: Side of a token in latents.
        in_channels: Latent channels.
        out_channels: Predicted channels: the noise, and where there are twice as many the variance
            (Nichol & Dhariwal 2021, eq. 15).
        num_layers: Blocks.
        num_attention_heads: Heads of every attention.
        attention_head_dim: Channels per head. The width D is the product of the two.
        mlp_ratio: Width of the feed-forward, in D.
        norm_eps: Of the LayerNorms.
        num_classes: Labels. One more, of this number, stands for no label.
        attention_pattern: Which blocks are causal, as `attention_kinds` takes it.
        causal_variant: What a token sees in a causal block. With its row and column r, c and the key's:
            "raster": what stands before it line by line; "rectangle": rows up to r and columns up to c;
            "neighborhood": that and the eight tokens around it; "corner": rows up to r or columns up to c.
        conv_kernel_size: Side of the locality convolution in tokens, odd; 0 for none.
        conv_groups: 1 for a full convolution, D for a depthwise one.
        conv_norm: A LayerNorm after it (appendix F, "conv post norm").
        multi_dilation_prob: How often the convolution is dilated in training, 0 to 1.
        multi_dilation: Its dilation then.
        scale_attention: Multiply attention logits by sqrt(ln N / ln T) (Jin et al. 2023, arXiv 2306.08645).

    Raises:
        ValueError: for sizes that do not fit together, and for names that there are not.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "locality", "embedder", "norm", "modulation"]
    _no_split_modules: ClassVar = ["LEDiTBlock"]
    _repeated_blocks: ClassVar = ["LEDiTBlock"]
    block_class: ClassVar[type[LEDiTBlock]] = LEDiTBlock

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "block_class" in vars(cls):
            cls._no_split_modules = cls._repeated_blocks = [cls.block_class.__name__]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        num_classes: int = 1000,
        attention_pattern: str | tuple[str, ...] = "sa_ca",
        causal_variant: str = "corner",
        conv_kernel_size: int = 3,
        conv_groups: int = 1,
        conv_norm: bool = False,
        multi_dilation_prob: float = 0.1,
        multi_dilation: int = 2,
        scale_attention: bool = True,
    ):
        super().__init__()
        self._check_config()
        dim = num_attention_heads * attention_head_dim

        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.locality_conv = (
            LocalityConv(dim, dim, conv_kernel_size, groups=conv_groups) if conv_kernel_size else None
        )
        self.locality_norm = nn.LayerNorm(dim, eps=norm_eps) if conv_norm else None
        # DiT's frequencies, 10000^(-k/128). Diffusers' DiT has k/127: its default divides by one less.
        self.time_proj = Timesteps(_TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(_TIMESTEP_CHANNELS, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim)
        self.transformer_blocks = nn.ModuleList(self.block_class(self.config, i) for i in range(num_layers))
        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * out_channels)

        self._block_inputs = extra_inputs(self.block_class, LEDiTBlock)

        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as DiT does; a subclass's blocks included."""
        for module in self.modules():
            if isinstance(module, nn.Linear | LocalityConv):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # a linear layer on patches
        nn.init.zeros_(cast(Tensor, self.patch_embed.bias))
        for layer in (
            self.timestep_embedder.linear_1,
            self.timestep_embedder.linear_2,
            self.class_embedder,
        ):
            nn.init.normal_(layer.weight, std=0.02)
        # Each block starts as the identity, and the network at zero.
        for block in cast("list[LEDiTBlock]", self.transformer_blocks):
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        attention_scale: float | None = None,
        dilation: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise in a noisy sample, and its variance.

        Args:
            hidden_states: Noisy latents, (B, in_channels, H, W); H and W multiples of the patch size.
            timestep: (B,) or a scalar, in [0, 1000); 0 is clean.
            class_labels: (B,), integers in [0, num_classes]; num_classes is no label.
            attention_scale: Factor on the attention logits. None: sqrt(ln N / ln T) for N tokens, of a model
                trained on T, with `scale_attention`, else 1.
            dilation: Of the locality convolution. None: in training `multi_dilation` with the probability
                `multi_dilation_prob`, by one draw for the batch from PyTorch's default generator; else 1.
            attention_kwargs: `scale` of a LoRA; anything else goes to the blocks of a subclass by name.
            return_dict: Return a `Transformer2DModelOutput`, else a tuple.

        Returns:
            `sample`, (B, out_channels, H, W).

        Raises:
            ValueError: for arguments that do not fit the model or each other.
        """
        self._check_inputs(hidden_states, timestep, class_labels, dilation, attention_kwargs)
        batch, _, height, width = hidden_states.shape
        patch = self.config.patch_size
        grid = height // patch, width // patch
        # A compiler sees the arithmetic itself and keeps the sizes dynamic; eager code keeps the masks. What
        # comes of a fake tensor is fake as well, and not kept.
        traced = torch.compiler.is_compiling() or type(hidden_states) is not Tensor

        # 1. Tokens (sections 3.1, 3.3). No position is added to them.
        x = self.patch_embed(hidden_states)  # (B, D, h, w)
        if self.locality_conv is not None:
            x = self._convolve(x, dilation, traced)
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
        if self.locality_norm is not None:
            x = self.locality_norm(x)

        # 2. Conditions.
        timestep = torch.as_tensor(timestep, device=x.device).expand(batch)
        embedded = self.timestep_embedder(self.time_proj(timestep).to(x.dtype))  # (B, D)
        conditioning = F.silu(embedded + self.class_embedder(class_labels))

        # 3. Blocks (section 3.2).
        mask = self._mask(*grid, x.device, traced)
        scale = self._attention_scale(x.shape[1], attention_scale, x.device, traced)
        for block in cast("list[LEDiTBlock]", self.transformer_blocks):
            run = partial(block, **attention_kwargs) if attention_kwargs else block
            fixed = (conditioning, mask if block.causal else None, scale)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(run, x, *fixed)
            else:
                x = run(x, *fixed)

        # 4. Output.
        shift, scale_out = self.modulation_out(conditioning).unflatten(1, (2, 1, -1)).unbind(1)  # (B, 1, D)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale_out))  # (B, N, p*p*C)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
        sample = x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _convolve(self, x: Tensor, dilation: int | None, traced: bool) -> Tensor:
        """The locality convolution of x, (B, D, h, w), dilated now and then in training."""
        conv, config = cast(LocalityConv, self.locality_conv), self.config
        if dilation is not None or not self.training or config.multi_dilation_prob == 0:
            return conv(x, 1 if dilation is None else dilation)
        if traced:  # a graph holds no branch on a number that is drawn
            dilated = torch.rand((), device=x.device) < config.multi_dilation_prob
            return torch.where(dilated, conv(x, config.multi_dilation), conv(x))
        dilated = torch.rand((), device="cpu") < config.multi_dilation_prob  # no wait for another device
        return conv(x, config.multi_dilation if dilated else 1)

    def _mask(self, height: int, width: int, device: torch.device, traced: bool) -> Mask:
        """The mask of all causal blocks, in the form that their backend takes; None where none is needed."""
        causal = [block for block in cast("list[LEDiTBlock]", self.transformer_blocks) if block.causal]
        if not causal:
            return None
        # `set_attention_backend` sets it for all of them alike.
        backend = getattr(causal[0].attn1.processor, "_attention_backend", None)
        flex = backend == AttentionBackendName.FLEX
        variant = self.config.causal_variant
        if variant == "raster" and not flex:
            return None
        make = causal_block_mask if flex else causal_mask
        return (
            make(variant, height, width, device)
            if traced
            else cached_mask(make, variant, height, width, device)
        )

    def _attention_scale(
        self, tokens: int, given: float | None, device: torch.device, traced: bool
    ) -> Tensor | None:
        """The factor on the attention logits, (), for so many tokens; None for 1."""
        if given is not None:
            return torch.full((), given, device=device)
        trained = (self.config.sample_size // self.config.patch_size) ** 2
        # Compiled code multiplies at every size, and is compiled once for all.
        if not self.config.scale_attention or (tokens == trained and not traced):
            return None
        return (torch.full((), tokens, dtype=torch.float32, device=device).log() / math.log(trained)).sqrt()

    def _check_config(self) -> None:
        config = self.config
        sizes = {name: config[name] for name in _SIZES}
        check_sizes(sizes)
        check_types(LEDiTTransformer2DModel.__init__, config)
        if not config.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {config.mlp_ratio}")
        if not 0 <= config.norm_eps < 1:
            raise ValueError(f"norm_eps must be at least 0 and less than 1, got {config.norm_eps}")
        kernel = config.conv_kernel_size
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise ValueError(f"conv_kernel_size must be odd, or 0 for no convolution, got {kernel}")
        dim = config.num_attention_heads * config.attention_head_dim
        if dim % config.conv_groups:
            raise ValueError(
                "conv_groups must divide the width num_attention_heads * attention_head_dim, "
                f"{dim}, got {config.conv_groups}"
            )
        if not 0 <= config.multi_dilation_prob <= 1:
            raise ValueError(f"multi_dilation_prob must be between 0 and 1, got {config.multi_dilation_prob}")
        if config.causal_variant not in _SEES:
            raise ValueError(
                f"causal_variant must be one of {', '.join(_SEES)}, got {config.causal_variant!r}"
            )
        attention_kinds(config.attention_pattern, config.num_layers)
        if config.scale_attention and config.sample_size < 2 * config.patch_size:
            raise ValueError(
                f"sample_size must be at least 2 patches of {config.patch_size} with scale_attention, "
                f"got {config.sample_size}"
            )
        ends = config.num_classes + config.patch_size**2 * (config.in_channels + config.out_channels)
        block = int((10 + 2 * config.mlp_ratio) * dim**2)
        check_parameters(
            config.num_layers * block + dim * (ends + kernel**2 * dim // config.conv_groups), sizes
        )

    def _check_inputs(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        dilation: int | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        config = self.config
        check_sample(hidden_states, config.in_channels, config.patch_size)
        batch = len(hidden_states)
        check_timestep(timestep, batch)
        if tuple(class_labels.shape) != (batch,) or class_labels.is_floating_point():
            raise ValueError(
                f"class_labels must be ({batch},) integers, "
                f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}"
            )
        if dilation is not None and dilation < 1:
            raise ValueError(f"dilation must be at least 1 or None, got {dilation}")
        check_attention_kwargs(attention_kwargs, self._block_inputs, self.block_class)
