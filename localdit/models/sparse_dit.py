"""SparseDiT: a text-to-image diffusion transformer made cheap to train by sparse experts and dropped tokens.

MicroDiT (Sehwag et al. 2024, "Stretching Each Dollar: Diffusion Training from Scratch on a Micro-Budget",
arXiv 2407.15811): a narrow *patch mixer* reads every token, most tokens are then dropped in training, and a
backbone whose widths grow with depth reads the rest. Every second block has expert-choice experts (Zhou et
al. 2022, arXiv 2202.09368). The network inside is the F of EDM (Karras et al. 2022, arXiv 2206.00364, eq. 7).
`docs/models/sparse_dit.md` maps the paper to this file and says where paper, published code and this differ.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from localdit.models.layers import heads_of, modulate, sincos_table
from localdit.models.sparse_dit_single_file import SparseDiTSingleFileMixin
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

# B batch   C channels   H W latent   p patch   h w token grid   N = h*w tokens   L text tokens
# D width of the backbone, M of the mixer   W inner width of an attention   A heads   d = W/A head width
# E experts   K tokens per expert   f hidden width of a feed-forward

_SIZES = (
    "sample_size",
    "patch_size",
    "in_channels",
    "out_channels",
    "hidden_size",
    "num_layers",
    "attention_head_dim",
    "caption_channels",
    "ffn_multiple_of",
    "mixer_hidden_size",
    "num_experts",
    "moe_every_n",
    "residual_init_denominator",
    "timestep_embed_dim",
)

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # two of (B, L, A, d)


# --- Widths, positions, and which tokens are kept -----------------------------------------------------------


class BlockShape(NamedTuple):
    """The sizes of one block."""

    dim: int
    attention_dim: int  # inner width of self-attention
    ff_dim: int  # hidden width of the feed-forward, or of one expert
    experts: bool


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def dense_width(dim: int, ratio: float, config: Any) -> int:
    """Hidden width of a SwiGLU feed-forward: `ffn_inner_factor` of dim * ratio, rounded up."""
    factor = Fraction(config.ffn_inner_factor).limit_denominator(1000)  # 0.6666666666666666 is 2/3
    return round_up(int(int(dim * ratio) * factor), config.ffn_multiple_of)


def ratio_by_depth(ratio: Sequence[float], depth: int) -> list[float]:
    """One ratio per block: two numbers are the ends of a straight line, more stand for themselves."""
    first, last = ratio[0], ratio[-1]
    return (
        [first + (last - first) * i / max(depth - 1, 1) for i in range(depth)]
        if len(ratio) == 2
        else list(ratio)
    )


def block_shapes(config: Any) -> tuple[list[BlockShape], list[BlockShape]]:
    """The sizes of the mixer's blocks and of the backbone's (paper, section 3.2: layer-wise scaling)."""

    def shape(dim: int, attention_ratio: float, ffn_ratio: float, experts: bool) -> BlockShape:
        attention_dim = dim
        if attention_ratio != 1:  # an even number of heads
            attention_dim = round_up(int(dim * attention_ratio), 2 * config.attention_head_dim)
        hidden = round_up(int(dim * ffn_ratio), config.ffn_multiple_of)
        return BlockShape(
            dim, attention_dim, hidden if experts else dense_width(dim, ffn_ratio, config), experts
        )

    every = config.moe_every_n
    mixer = [
        shape(
            config.mixer_hidden_size,
            config.mixer_attention_ratio,
            config.mixer_ffn_ratio,
            experts=i >= 1 and (i + 1) % every == 0,
        )
        for i in range(config.mixer_num_layers)
    ]
    depth = config.num_layers
    ratios = zip(ratio_by_depth(config.attention_ratio, depth), ratio_by_depth(config.ffn_ratio, depth))
    # The last block of the backbone is dense, the mixer's need not be.
    backbone = [
        shape(config.hidden_size, *ratio, experts=(i + 1) % every == 0 and i < depth - 1)
        for i, ratio in enumerate(ratios)
    ]
    return mixer, backbone


def position_table(
    grid: tuple[int, int], dim: int, interpolation_scale: float, device: torch.device
) -> Tensor:
    """2-D sine-cosine embedding, (N, dim), of token indices divided by `interpolation_scale`."""
    rows, columns = (
        torch.arange(length, device=device, dtype=torch.float32) / interpolation_scale for length in grid
    )
    return sincos_table(rows, columns, dim)


def kept_count(tokens: int, mask_ratio: float) -> int:
    """How many of so many tokens stay when `mask_ratio` of them are dropped."""
    return int(tokens * (1 - mask_ratio))


# --- Experts ------------------------------------------------------------------------------------------------


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x: (R, D), rows: (E, S), numbers of rows. Returns (E, S, D)."""
    return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def add_rows(y: Tensor, rows: Tensor, count: int) -> Tensor:
    """The transpose of `take_rows`: y, (E, S, D), added up into (count, D), in float32.

    No expert takes a token twice, so expert by expert every sum has one order on every device.
    """
    total = torch.zeros(
        count, y.shape[-1], dtype=torch.promote_types(y.dtype, torch.float32), device=y.device
    )
    for expert_rows, expert_y in zip(rows, y):
        total.index_add_(0, expert_rows, expert_y.to(total.dtype))
    return total


class _TakeRows(torch.autograd.Function):
    """`take_rows` whose gradient is `add_rows`: autograd's own would be summed in any order on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count, ctx.dtype = len(x), x.dtype
        return take_rows(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return add_rows(grads[0], rows, ctx.count).to(ctx.dtype), None


class _AddRows(torch.autograd.Function):
    """`add_rows`, whose gradient is `take_rows`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dtype = y.dtype
        return add_rows(y, rows, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return take_rows(grads[0], rows).to(ctx.dtype), None, None


class SparseDiTRouter(nn.Linear):
    """How well each expert suits each token, always in float32: rounded scores tie, and ties would decide."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D). Returns probabilities over the experts, (B, N, E), float32 or better."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # The meta device, on which operations are counted, knows no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype)).softmax(dim=-1)


class SparseDiTExperts(nn.Module):
    """Expert-choice feed-forward: each expert takes the K tokens of an image that suit it best.

    A token may be taken by several experts, whose outputs add up weighted by their probabilities, or by none,
    and then gets zero. Each expert is exactly full, so nothing overflows and no balancing loss is needed; an
    image's result does not depend on its batch. The weights of the experts are `nn.Parameter`s of three
    dimensions, which tools that look for `nn.Linear` (LoRA, quantisation, layerwise casting) leave alone.
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, capacity: float):
        super().__init__()
        self.num_experts = num_experts
        self.capacity = capacity
        self.router = SparseDiTRouter(dim, num_experts)
        self.experts_in = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.experts_out = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def init_weights(self, residual_std: float) -> None:
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.normal_(self.experts_in, std=0.02)
        nn.init.normal_(self.experts_out, std=residual_std)

    def tokens_per_expert(self, tokens: int) -> int:
        return max(1, min(tokens, int(self.capacity * tokens / self.num_experts)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, N, D). Returns the gates, (B, E, K), falling, and the indices of the tokens they are for."""
        scores = self.router(x).transpose(1, 2)  # (B, E, N)
        # A stable sort, where topk would break ties as it pleases: the token with the lower index is taken.
        gates, tokens = scores.sort(dim=-1, descending=True, stable=True)
        taken = self.tokens_per_expert(x.shape[1])
        return gates[..., :taken], tokens[..., :taken]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D). Returns (B, N, D)."""
        batch, count, _ = x.shape
        gates, tokens = self.route(x)  # (B, E, K)
        rows = tokens + count * torch.arange(batch, device=x.device)[:, None, None]
        rows, gates = (y.transpose(0, 1).flatten(1) for y in (rows, gates))  # (E, B*K)

        y = _TakeRows.apply(x.flatten(0, 1), rows)  # (E, B*K, D)
        y = torch.bmm(F.gelu(torch.bmm(y, self.experts_in)), self.experts_out)
        y = _AddRows.apply(y * gates[..., None], rows, batch * count)  # (B*N, D), float32
        return y.to(x.dtype).unflatten(0, (batch, count))


class SparseDiTFeedForward(nn.Module):
    """SwiGLU: down(SiLU(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def init_weights(self, residual_std: float) -> None:
        nn.init.normal_(self.gate_proj.weight, std=0.02)
        for layer in (self.up_proj, self.down_proj):  # both, as published
            nn.init.normal_(layer.weight, std=residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# --- Attention ----------------------------------------------------------------------------------------------


class SparseDiTAttnProcessor:
    """What `SparseDiTAttention` computes (a processor holds no tensors, only the choice of backend)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "SparseDiTAttention", hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = attn.project(hidden_states)  # (B, N, A, d)
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(2))


class SparseDiTCrossAttnProcessor:
    """What `SparseDiTCrossAttention` computes."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "SparseDiTCrossAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        q = heads_of(attn.norm_q(attn.to_q(hidden_states)), attn.heads)  # (B, N, A, d)
        if isinstance(encoder_hidden_states, Tensor):
            encoder_hidden_states = attn.project_text(encoder_hidden_states)
        k, v = encoder_hidden_states  # (B, L, A, d)
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=encoder_attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(2))


class QKNorm(nn.LayerNorm):
    """LayerNorm over all heads together, scaled or not, in the dtype of its input in autocast too."""

    def __init__(self, dim: int, eps: float, affine: bool):
        super().__init__(dim, eps=eps, elementwise_affine=affine, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, W). Returns the same shape."""
        return super().forward(x).to(x.dtype)


class _Attention(nn.Module, AttentionModuleMixin):
    """What every attention here learns: four projections and, if configured, scales of queries and keys."""

    is_cross_attention = False
    to_qkv: nn.Linear
    to_kv: nn.Linear
    processor: Any
    _default_processor_cls: ClassVar[Any]

    def __init__(self, dim: int, inner_dim: int, config: Any):
        super().__init__()
        self.heads = inner_dim // config.attention_head_dim
        self.use_bias = config.use_bias  # for AttentionModuleMixin.fuse_projections
        self.to_q = nn.Linear(dim, inner_dim, bias=config.use_bias)
        self.to_k = nn.Linear(dim, inner_dim, bias=config.use_bias)
        self.to_v = nn.Linear(dim, inner_dim, bias=config.use_bias)
        self.to_out = nn.ModuleList((nn.Linear(inner_dim, dim, bias=config.use_bias),))
        self.norm_q = QKNorm(inner_dim, config.norm_eps, config.qk_norm_affine)
        self.norm_k = QKNorm(inner_dim, config.norm_eps, config.qk_norm_affine)
        self.processor = self._default_processor_cls()

    def init_weights(self, residual_std: float) -> None:
        for layer in (self.to_q, self.to_k, self.to_v):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(self.to_out.get_parameter("0.weight"), std=residual_std)


class SparseDiTAttention(_Attention):
    """Self-attention with normalised queries and keys, whose inner width may differ from the block's."""

    _default_processor_cls: ClassVar[Any] = SparseDiTAttnProcessor

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both normalised) and values of x, (B, N, D): three of (B, N, A, d)."""
        if self.fused_projections:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return (
            heads_of(self.norm_q(q), self.heads),
            heads_of(self.norm_k(k), self.heads),
            heads_of(v, self.heads),
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden_states: (B, N, D); attention_mask: (B, 1, 1, N) bool. Returns (B, N, D)."""
        return self.processor(self, hidden_states, attention_mask)


class SparseDiTCrossAttention(_Attention):
    """Attention from image tokens to text tokens of the same width."""

    _default_processor_cls: ClassVar[Any] = SparseDiTCrossAttnProcessor
    is_cross_attention = True

    def project_text(self, text: Tensor) -> KeysValues:
        """Normalised keys, and values, of the caption (B, L, D): two of (B, L, A, d)."""
        k, v = (
            self.to_kv(text).chunk(2, dim=-1)
            if self.fused_projections
            else (self.to_k(text), self.to_v(text))
        )
        return heads_of(self.norm_k(k), self.heads), heads_of(v, self.heads)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, D); encoder_hidden_states: (B, L, D), or what `project_text` made of it;
        encoder_attention_mask: (B, 1, 1, L) bool. Returns (B, N, D)."""
        return self.processor(self, hidden_states, encoder_hidden_states, encoder_attention_mask)


# --- Caption ------------------------------------------------------------------------------------------------


class SparseDiTProjection(nn.Module):
    """Linear, tanh-GELU, LayerNorm, linear: of the caption's tokens, and of their mean."""

    def __init__(self, in_dim: int, dim: int, eps: float):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps, bias=False)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_dim). Returns (..., dim)."""
        return self.linear_2(self.norm(F.gelu(self.linear_1(x), approximate="tanh")))


class SparseDiTCaptionRefiner(nn.Module):
    """A plain pre-norm transformer block among the caption's tokens."""

    def __init__(self, config: Any):
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.attn1 = SparseDiTAttention(dim, dim, config)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.ff = SparseDiTFeedForward(dim, dense_width(dim, 4.0, config), config.use_bias)

    def init_weights(self) -> None:
        for part in (self.attn1, self.ff):
            part.init_weights(residual_std=0.02)
        # It starts as the identity.
        nn.init.zeros_(self.attn1.to_out.get_parameter("0.weight"))
        nn.init.zeros_(self.ff.down_proj.weight)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """text: (B, L, D); mask: (B, 1, 1, L) bool. Returns (B, L, D)."""
        text = text + self.attn1(self.norm1(text), mask)
        return text + self.ff(self.norm2(text))


# --- Block --------------------------------------------------------------------------------------------------


class SparseDiTBlock(nn.Module):
    """Self-attention, attention to text, and a feed-forward or experts; the first and the last are modulated.

    A subclass may take further inputs by keyword: they come from the model's `attention_kwargs`.
    """

    def __init__(self, config: Any, shape: BlockShape):
        """config: the model's config. shape: the sizes of this block, mixer or backbone."""
        super().__init__()
        dim = shape.dim
        self.adaln = nn.Linear(config.hidden_size, 6 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.attn1 = SparseDiTAttention(dim, shape.attention_dim, config)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.attn2 = SparseDiTCrossAttention(dim, dim, config)
        self.norm3 = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.ff: SparseDiTExperts | SparseDiTFeedForward
        if shape.experts:
            self.ff = SparseDiTExperts(dim, shape.ff_dim, config.num_experts, config.expert_capacity)
        else:
            self.ff = SparseDiTFeedForward(dim, shape.ff_dim, config.use_bias)

    def init_weights(self, residual_std: float) -> None:
        """Draw the weights. residual_std: of the layers that write to the residual stream."""
        for part in (self.attn1, self.attn2, self.ff):
            part.init_weights(residual_std)
        nn.init.zeros_(self.adaln.weight)  # the gates are closed

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysValues,
        conditioning: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: (B, N, dim).
            encoder_hidden_states: The caption at this block's width, (B, L, dim), or its keys and values of
                it.
            conditioning: Time and pooled caption, after the activation, (B, D).
            encoder_attention_mask: (B, 1, 1, L) bool, True = attend; None attends to all.

        Returns:
            (B, N, dim).
        """
        x = hidden_states
        six = self.adaln(conditioning).unflatten(-1, (6, 1, -1))  # (B, 6, 1, dim)
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = six.unbind(1)

        y = modulate(self.norm1(x), attn_shift, attn_scale)
        x = x + attn_gate * self.attn1(y)

        x = x + self.attn2(self.norm2(x), encoder_hidden_states, encoder_attention_mask)

        y = modulate(self.norm3(x), ff_shift, ff_scale)
        x = x + ff_gate * self.ff(y)
        return x


# --- Model --------------------------------------------------------------------------------------------------


@dataclass
class SparseDiTOutput(BaseOutput):
    """What the transformer gives.

    Attributes:
        sample: (B, out_channels, H, W), the network's F; zero where tokens were dropped.
        mask: (B, N), float32, 1 where a token was dropped and 0 where it was kept; None without masking.
    """

    sample: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class SparseTextContext:
    """What a caption is to the transformer, made once by `encode_text` and passed at every step."""

    pooled: Tensor  # (B, D)
    text: Tensor  # (B, L, D), for the backbone
    mixer_text: Tensor  # (B, L, M), for the mixer
    mask: Tensor | None  # (B, 1, 1, L) bool
    # Keys and values for each block, the mixer's first. None: each block makes its own at its turn.
    keys_values: tuple[KeysValues, ...] | None

    @property
    def batch_size(self) -> int:
        return len(self.text)


class SparseDiTTransformer2DModel(
    StrictModelMixin,
    ModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    CacheMixin,
    SparseDiTSingleFileMixin,
):
    """The SparseDiT transformer. The defaults are MicroDiT XL/2 at 256 pixels, 1.17 B parameters.

    It is the F of EDM's preconditioning: it reads latents already scaled by c_in and c_noise = ln(sigma) / 4,
    and gives what a scheduler or loss turns into a clean sample. Sizes other than `sample_size` squared run,
    and were not trained by those who published weights.

    A subclass may name another `block_class` and add config fields, as of LocalDiT.

    Args:
        sample_size: Latent side that a pipeline makes by default (32 latents: 256 pixels). No tensor depends
            on it.
        patch_size: Side of a token in latents.
        in_channels: Latent channels.
        out_channels: Predicted channels; `None` for `in_channels`.
        hidden_size: Width of the backbone.
        num_layers: Blocks of the backbone.
        attention_head_dim: Channels per head, in every attention. Widths differ in their number of heads.
        caption_channels: Width of the text encoder's output.
        interpolation_scale: Divides token indices before they are embedded: 1.0 at 256 pixels, 2.0 at 512.
        attention_ratio: Inner width of self-attention by the backbone's: first and last block, with a
            straight line between them, or one number per block. A ratio other than 1 is rounded up to an even
            number of heads.
        ffn_ratio: Likewise of the feed-forward's hidden width.
        ffn_multiple_of: Hidden widths are rounded up to multiples of this.
        ffn_inner_factor: Share of that width in dense feed-forwards, which have a third matrix. Not in
            experts.
        mixer_num_layers: Blocks of the patch mixer; 0 is a model without it.
        mixer_hidden_size: Width of the mixer.
        mixer_attention_ratio: As `attention_ratio`, one number for the whole mixer.
        mixer_ffn_ratio: As `ffn_ratio`, likewise.
        num_experts: Experts of each block that has them.
        expert_capacity: Experts that a token has on average: each takes `capacity * tokens / num_experts`.
        moe_every_n: Every n-th block has experts, except for the backbone's last.
        use_bias: Biases in attention and feed-forwards.
        norm_eps: Of every LayerNorm.
        qk_norm_affine: Learned scales of queries and keys.
        residual_init_denominator: Layers that write to the residual stream start with 0.02 / sqrt(this *
            depth).
        depth_scaled_init: That depth is the block's own, counted from 1, else the backbone's.
        mixer_depth_scaled_init: The mixer's blocks count too, and the backbone's are counted on from them.
        timestep_embed_dim: Sine and cosine channels of c_noise.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "norm", "time_embed", "adaln"]
    _keep_in_fp32_modules: ClassVar = ["router"]
    _no_split_modules: ClassVar = ["SparseDiTBlock"]
    _repeated_blocks: ClassVar = ["SparseDiTBlock"]
    block_class: ClassVar[type[SparseDiTBlock]] = SparseDiTBlock

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
        out_channels: int | None = None,
        hidden_size: int = 1024,
        num_layers: int = 28,
        attention_head_dim: int = 64,
        caption_channels: int = 1024,
        interpolation_scale: float = 1.0,
        attention_ratio: tuple[float, ...] = (0.5, 1.0),
        ffn_ratio: tuple[float, ...] = (0.5, 4.0),
        ffn_multiple_of: int = 256,
        ffn_inner_factor: float = 2 / 3,
        mixer_num_layers: int = 6,
        mixer_hidden_size: int = 768,
        mixer_attention_ratio: float = 1.0,
        mixer_ffn_ratio: float = 4.0,
        num_experts: int = 8,
        expert_capacity: float = 2.0,
        moe_every_n: int = 2,
        use_bias: bool = False,
        norm_eps: float = 1e-6,
        qk_norm_affine: bool = False,
        residual_init_denominator: int = 2,
        depth_scaled_init: bool = True,
        mixer_depth_scaled_init: bool = False,
        timestep_embed_dim: int = 512,
    ):
        super().__init__()
        self._check_config()
        dim = hidden_size
        mixer_shapes, shapes = block_shapes(self.config)

        self.patch_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, dim, pos_embed_type=None
        )
        self.time_proj = Timesteps(timestep_embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = PixArtAlphaTextProjection(timestep_embed_dim, dim)  # linear, tanh-GELU, linear
        self.caption_projection = SparseDiTProjection(caption_channels, dim, norm_eps)
        self.caption_refiner = SparseDiTCaptionRefiner(self.config)
        self.pooled_projection = SparseDiTProjection(dim, dim, norm_eps)

        def bridge(source: int, target: int) -> nn.Module:
            if mixer_num_layers == 0 or source == target:
                return nn.Identity()
            norm, proj = nn.LayerNorm(source, eps=norm_eps, bias=False), nn.Linear(source, target, bias=False)
            return nn.Sequential(OrderedDict(norm=norm, proj=proj))

        self.mixer_in = bridge(dim, mixer_hidden_size)
        self.mixer_context = bridge(dim, mixer_hidden_size)
        self.mixer_out = bridge(mixer_hidden_size, dim)
        self.mixer_blocks = nn.ModuleList(self.block_class(self.config, shape) for shape in mixer_shapes)
        self.transformer_blocks = nn.ModuleList(self.block_class(self.config, shape) for shape in shapes)

        self.norm_out = nn.LayerNorm(dim, eps=norm_eps, bias=False)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * (out_channels or in_channels))

        self._block_inputs = extra_inputs(self.block_class, SparseDiTBlock)

        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as the published training does; a fresh model predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a linear layer on patches
        for part in (self.time_embed, self.caption_projection, self.pooled_projection):
            for layer in (part.linear_1, part.linear_2):
                nn.init.normal_(layer.weight, std=0.02)
        self.caption_refiner.init_weights()

        config = self.config
        mixer, depth = config.mixer_num_layers, config.num_layers
        mixer_depths, depths = [depth] * mixer, list(range(1, depth + 1))
        if config.mixer_depth_scaled_init:
            mixer_depths, depths = list(range(1, mixer + 1)), [mixer + at_depth for at_depth in depths]
        if not config.depth_scaled_init:
            depths = [depth] * depth
        for block, at_depth in zip(self._blocks, [*mixer_depths, *depths]):
            block.init_weights(residual_std=0.02 / (config.residual_init_denominator * at_depth) ** 0.5)

        nn.init.zeros_(self.adaln_out.weight)
        nn.init.zeros_(self.proj_out.weight)

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def encode_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> SparseTextContext:
        """Project and refine a caption, and make each block's keys and values of it, once for all steps.

        The model's output is bit for bit the same as with the caption itself.

        Args:
            encoder_hidden_states: Text features, (B, L, caption_channels).
            encoder_attention_mask: (B, L), 1 or True = keep, 0 or False = padding; None keeps all.
            attention_kwargs: As for `forward`; a LoRA's `scale` applies here too.
        """
        check_caption(encoder_hidden_states, encoder_attention_mask, self.config.caption_channels)
        context = self._read_caption(encoder_hidden_states, encoder_attention_mask)
        attentions = [block.attn2 for block in self._blocks]
        # An offloaded block fetches its weights in its own forward alone.
        if any(attn.to_k.weight.device != context.text.device for attn in attentions):
            return context
        mixer = self.config.mixer_num_layers
        texts = [context.mixer_text] * mixer + [context.text] * self.config.num_layers
        keys_values = tuple(attn.project_text(text) for attn, text in zip(attentions, texts))
        return SparseTextContext(context.pooled, context.text, context.mixer_text, context.mask, keys_values)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | SparseTextContext,
        timestep: Tensor | float,
        encoder_attention_mask: Tensor | None = None,
        mask_ratio: float = 0.0,
        mask_noise: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SparseDiTOutput | tuple[Tensor, ...]:
        """Predict F of a noisy sample.

        Args:
            hidden_states: Latents scaled by c_in, (B, in_channels, H, W); H and W multiples of the patch
                size.
            encoder_hidden_states: Text features, (B, L, caption_channels), or `encode_text` of them. All
                zeros are the learned "no text".
            timestep: c_noise = ln(sigma) / 4, (B,) or a scalar, as EDM schedulers list it.
            encoder_attention_mask: (B, L), 1 or True = keep. None keeps all, as the published weights expect:
                they read the padding too.
            mask_ratio: Share of the tokens to drop between mixer and backbone, in training alone.
            mask_noise: (B, N): of each sample the tokens with the lowest noise are kept. None draws it.
            attention_kwargs: `scale` of a LoRA; anything else goes to the blocks of a subclass by name.
            return_dict: Return a `SparseDiTOutput`, else a tuple of what it holds.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
        """
        self._check_inputs(
            hidden_states,
            encoder_hidden_states,
            timestep,
            encoder_attention_mask,
            mask_ratio,
            mask_noise,
            attention_kwargs,
        )
        batch, _, height, width = hidden_states.shape
        patch, device = self.config.patch_size, hidden_states.device
        grid = height // patch, width // patch

        # 1. Tokens.
        positions = position_table(grid, self.config.hidden_size, self.config.interpolation_scale, device)
        x = self.patch_embed(hidden_states)  # (B, N, D)
        x = x + positions.to(x.dtype)

        # 2. Text, and with time what modulates every block.
        if isinstance(encoder_hidden_states, SparseTextContext):
            context = encoder_hidden_states
        else:
            context = self._read_caption(encoder_hidden_states, encoder_attention_mask)
        times = torch.as_tensor(timestep, device=device).expand(batch)
        time = self.time_embed(self.time_proj(times).to(hidden_states.dtype))  # (B, D)
        cond = F.gelu(time + context.pooled, approximate="tanh")

        # 3. The mixer sees every token ...
        mixer = self.config.mixer_num_layers
        keys_values: tuple[KeysValues | None, ...] = context.keys_values or (None,) * (
            mixer + self.config.num_layers
        )
        fixed = (cond, context.mask, attention_kwargs)
        x = self._run(self.mixer_blocks, self.mixer_in(x), context.mixer_text, keys_values[:mixer], *fixed)

        # 4. ... and the backbone those that are kept, in any order: each carries its own place.
        kept = None
        if mask_ratio > 0:
            tokens = x.shape[1]
            noise = torch.rand(batch, tokens, device=device) if mask_noise is None else mask_noise
            kept = noise.argsort(dim=1, stable=True)[:, : kept_count(tokens, mask_ratio), None]  # (B, N', 1)
            x = x.gather(1, kept.expand(-1, -1, x.shape[2]))
        x = self._run(self.transformer_blocks, self.mixer_out(x), context.text, keys_values[mixer:], *fixed)

        # 5. Output. A dropped token is zero.
        shift, scale = self.adaln_out(cond).unflatten(-1, (2, 1, -1)).unbind(1)  # (B, 1, D)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))  # (B, N, p*p*C)
        mask = None
        if kept is not None:
            blank = x.new_zeros(batch, grid[0] * grid[1], x.shape[2])
            x = blank.scatter(1, kept.expand(-1, -1, x.shape[2]), x)
            mask = torch.ones(blank.shape[:2], device=device).scatter(1, kept[..., 0], 0.0)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # (B, h, w, p, p, C)
        sample = x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)
        output = SparseDiTOutput(sample=sample, mask=mask)
        return output if return_dict else output.to_tuple()

    @property
    def _blocks(self) -> list[SparseDiTBlock]:
        """The mixer's blocks, then the backbone's."""
        return cast("list[SparseDiTBlock]", [*self.mixer_blocks, *self.transformer_blocks])

    def _run(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        text: Tensor,
        keys_values: Sequence[KeysValues | None],
        cond: Tensor,
        text_mask: Tensor | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        """One stack of blocks, mixer or backbone."""
        for block, own in zip(blocks, keys_values):
            run = partial(block, **attention_kwargs) if attention_kwargs else block
            fixed = (text if own is None else own, cond, text_mask)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(run, x, *fixed)
            else:
                x = run(x, *fixed)
        return x

    def _read_caption(self, text: Tensor, mask: Tensor | None) -> SparseTextContext:
        keep = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, L)
        text = self.caption_refiner(self.caption_projection(text), keep)  # (B, L, D)
        if keep is None:
            mean = text.mean(1)
        else:
            weight = keep[:, 0, 0, :, None].to(text.dtype)
            mean = (text * weight).sum(1) / weight.sum(1)
        pooled = self.pooled_projection(mean)
        return SparseTextContext(pooled, text, self.mixer_context(text), keep, keys_values=None)

    def _check_config(self) -> None:
        config = self.config
        sizes = {name: config[name] for name in _SIZES if config[name] is not None}
        check_sizes(sizes)
        check_types(SparseDiTTransformer2DModel.__init__, config)
        if config.mixer_num_layers < 0:
            raise ValueError(f"mixer_num_layers must not be negative, got {config.mixer_num_layers}")
        for name in ("hidden_size", "mixer_hidden_size"):
            if config[name] % config.attention_head_dim:
                raise ValueError(
                    f"{name} must be a multiple of attention_head_dim {config.attention_head_dim}, "
                    f"got {config[name]}"
                )
        if config.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, got {config.hidden_size}")
        for name in ("attention_ratio", "ffn_ratio"):
            ratios = config[name]
            if len(ratios) not in (2, config.num_layers) or not all(ratio > 0 for ratio in ratios):
                raise ValueError(
                    f"{name} must hold 2 positive numbers, or one for each of {config.num_layers} layers, "
                    f"got {ratios}"
                )
        for name in (
            "interpolation_scale",
            "ffn_inner_factor",
            "mixer_attention_ratio",
            "mixer_ffn_ratio",
            "expert_capacity",
        ):
            if not config[name] > 0:
                raise ValueError(f"{name} must be positive, got {config[name]}")
        if not 0 <= config.norm_eps < 1:
            raise ValueError(f"norm_eps must be at least 0 and less than 1, got {config.norm_eps}")

        dim, depth, mixer_dim = config.hidden_size, config.num_layers, config.mixer_hidden_size
        channels = config.in_channels + sizes.get("out_channels", 0)
        ends = config.caption_channels + config.timestep_embed_dim + config.patch_size**2 * channels
        widest = int(dim * max(*config.attention_ratio, *config.ffn_ratio))
        experts = depth // config.moe_every_n * config.num_experts * config.ffn_multiple_of
        mixer = config.mixer_num_layers * mixer_dim * int(mixer_dim * (10 + config.mixer_ffn_ratio))
        check_parameters(depth * 10 * dim**2 + dim * (widest + experts + ends) + mixer, sizes)

    def _check_inputs(
        self,
        hidden_states: Tensor,
        text: Tensor | SparseTextContext,
        timestep: Tensor | float,
        text_mask: Tensor | None,
        mask_ratio: float,
        mask_noise: Tensor | None,
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        config = self.config
        check_sample(hidden_states, config.in_channels, config.patch_size)
        batch, _, height, width = hidden_states.shape

        if isinstance(text, SparseTextContext):
            if text.batch_size != batch:
                raise ValueError(
                    f"encoder_hidden_states is a SparseTextContext of batch {text.batch_size}, "
                    f"hidden_states has batch {batch}"
                )
            if text_mask is not None:
                raise ValueError(
                    "encoder_attention_mask must be None with a SparseTextContext, which holds the mask "
                    "given to encode_text"
                )
        else:
            check_caption(text, text_mask, config.caption_channels, batch)

        check_timestep(timestep, batch)

        tokens = height * width // config.patch_size**2
        if not 0 <= mask_ratio < 1 or kept_count(tokens, mask_ratio) == 0:
            raise ValueError(
                f"mask_ratio must be at least 0 and leave one of {tokens} tokens, got {mask_ratio}"
            )
        if mask_ratio > 0 and not self.training:
            raise ValueError(f"mask_ratio must be 0 in evaluation mode, got {mask_ratio}; call train() first")
        if mask_noise is not None and (mask_ratio == 0 or mask_noise.shape != (batch, tokens)):
            raise ValueError(
                f"mask_noise must be ({batch}, {tokens}), and None with a mask_ratio of 0, "
                f"got {tuple(mask_noise.shape)} with {mask_ratio}"
            )

        check_attention_kwargs(attention_kwargs, self._block_inputs, self.block_class)
