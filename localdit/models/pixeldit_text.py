"""The text-conditional PixelDiT: the patch level is a transformer of two streams (MM-DiT, Esser et al. 2024,
arXiv 2403.03206, section 4), one of patches and one of text; the pixel level is that of `pixeldit.py`.
"""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn

# Diffusers looks for this class in the component's own module when it loads a pipeline.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from localdit.models.layers import RMSNorm, heads_of, modulate, rotate
from localdit.models.pixeldit import (
    PixelDiTAttention,
    PixelDiTBase,
    PixelDiTOutput,
    patchify,
    swiglu,
    unpatchify,
)
from localdit.models.strict import check_caption

# B batch   C channels   H W image   p patch   N patches   P = p*p pixels of a patch   T text tokens
# D width   A heads   d = D/A head width


class PixelDiTJointAttnProcessor:
    """What `PixelDiTJointAttention` computes (a processor holds no tensors, only the choice of backend)."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "PixelDiTJointAttention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        text, image = attn.project_text(encoder_hidden_states), attn.project(hidden_states)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image))  # (B, T + N, A, d)
        out = dispatch_attention_fn(
            rotate(q, rotary),
            rotate(k, rotary),
            v,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, tokens:]), attn.to_add_out(out[:, :tokens])


class PixelDiTJointAttention(PixelDiTAttention):
    """Attention over text and patches together. Each stream has projections and norms of its own."""

    added_proj_bias = False  # of the projections that AttentionModuleMixin.fuse_projections makes
    to_added_qkv: nn.Linear
    _default_processor_cls: ClassVar[Any] = PixelDiTJointAttnProcessor

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__(dim, heads, eps)
        self.add_q_proj = nn.Linear(dim, dim, bias=False)
        self.add_k_proj = nn.Linear(dim, dim, bias=False)
        self.add_v_proj = nn.Linear(dim, dim, bias=False)
        self.norm_added_q = RMSNorm(dim // heads, eps=eps)
        self.norm_added_k = RMSNorm(dim // heads, eps=eps)
        self.to_add_out = nn.Linear(dim, dim)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both normalised) and values of text, (B, T, D): three of (B, T, A, d)."""
        if self.fused_projections:
            q, k, v = self.to_added_qkv(text).chunk(3, dim=-1)
        else:
            q, k, v = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)
        q, k, v = (heads_of(y, self.heads) for y in (q, k, v))
        return self.norm_added_q(q), self.norm_added_k(k), v

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        rotary: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: (B, N, D); encoder_hidden_states: (B, T, D); rotary: (T + N, d/2, 2);
        attention_mask: (B, 1, 1, T + N) bool. Returns patches (B, N, D) and text (B, T, D)."""
        return self.processor(self, hidden_states, encoder_hidden_states, rotary, attention_mask)


class PixelDiTTextBlock(nn.Module):
    """The patch level's block on two streams, which meet in attention and nowhere else.

    A subclass may take further inputs by keyword: they come from the model's `attention_kwargs`.
    """

    def __init__(self, config: Any):
        """config: the model's config."""
        super().__init__()
        dim, eps = config.num_attention_heads * config.attention_head_dim, config.norm_eps
        self.norm1 = RMSNorm(dim, eps=eps)
        self.norm1_context = RMSNorm(dim, eps=eps)
        self.attn1 = PixelDiTJointAttention(dim, config.num_attention_heads, eps)
        self.norm2 = RMSNorm(dim, eps=eps)
        self.norm2_context = RMSNorm(dim, eps=eps)
        self.ff = swiglu(dim, config)
        self.ff_context = swiglu(dim, config)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.modulation_context = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        conditioning: Tensor,
        rotary: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            hidden_states: Patches, (B, N, D).
            encoder_hidden_states: Text, (B, T, D).
            conditioning: Of the time, (B, 1, D).
            rotary: (T + N, d/2, 2).
            attention_mask: (B, 1, 1, T + N) bool, True = attend; None attends to all.

        Returns:
            Patches (B, N, D) and text (B, T, D).
        """
        x, text = hidden_states, encoder_hidden_states
        six, six_text = (
            layer(conditioning).unflatten(-1, (6, -1)).unbind(2)  # (B, 1, D) each
            for layer in (self.modulation, self.modulation_context)
        )
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = six_text

        y = modulate(self.norm1(x), shift1, scale1)
        text_y = modulate(self.norm1_context(text), text_shift1, text_scale1)
        y, text_y = self.attn1(y, text_y, rotary, attention_mask)
        x = torch.addcmul(x, gate1, y)
        text = torch.addcmul(text, text_gate1, text_y)

        y = modulate(self.norm2(x), shift2, scale2)
        x = torch.addcmul(x, gate2, self.ff(y))
        text_y = modulate(self.norm2_context(text), text_shift2, text_scale2)
        text = torch.addcmul(text, text_gate2, self.ff_context(text_y))
        return x, text


class PixelDiTTextTransformer2DModel(PixelDiTBase):
    """The text-conditional PixelDiT. The defaults are the published 1.3 B model.

    Its time runs the other way than the class model's, from data to noise, and so does its prediction. A
    subclass may name another `block_class` or `pixel_block_class` and add config fields.

    Args:
        sample_size, patch_size, in_channels, num_layers, num_attention_heads, attention_head_dim,
        num_pixel_layers, pixel_dim, pixel_num_attention_heads, pixel_attention_head_dim, mlp_ratio,
        pixel_mlp_ratio, rope_theta, rope_extent, timestep_period, pixel_position, pixel_post_modulation,
        norm_eps: As of `PixelDiTTransformer2DModel`.
        caption_channels: Width of the text encoder's output.
        max_text_tokens: Length of the learned table of text positions.
        text_rope: Rotate text queries and keys by their place in the text.
        text_rope_theta: Base of their frequencies.
        zero_init_modulation: As of `PixelDiTTransformer2DModel`. The published text model was started from
            modulations drawn at random, which is False.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    block_class: ClassVar[type[nn.Module]] = PixelDiTTextBlock
    # What the last block makes of the text: the training loop tells `DistributedDataParallel`.
    has_unread_parameters = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 1024,
        patch_size: int = 16,
        in_channels: int = 3,
        num_layers: int = 14,
        num_attention_heads: int = 24,
        attention_head_dim: int = 64,
        num_pixel_layers: int = 2,
        pixel_dim: int = 16,
        pixel_num_attention_heads: int | None = 16,
        pixel_attention_head_dim: int | None = 72,
        mlp_ratio: float = 4.0,
        pixel_mlp_ratio: float = 4.0,
        caption_channels: int = 2304,
        max_text_tokens: int = 300,
        text_rope: bool = True,
        text_rope_theta: float = 10000.0,
        rope_theta: float = 10000.0,
        rope_extent: float = 16.0,
        timestep_period: float = 10.0,
        pixel_position: bool = True,
        pixel_post_modulation: bool = False,
        zero_init_modulation: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        dim = self._add_shared_layers(PixelDiTTextTransformer2DModel)
        self.caption_projection = nn.Linear(caption_channels, dim)
        self.caption_norm = RMSNorm(dim, eps=norm_eps)
        self.caption_position = nn.Parameter(torch.empty(1, max_text_tokens, dim))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.caption_position)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_hidden_state_of: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> PixelDiTOutput | tuple[Tensor, ...]:
        """Predict the velocity of a noisy picture, from data to noise.

        Args:
            hidden_states: Pictures in [-1, 1] with noise, (B, C, H, W); H and W multiples of the patch size.
            timestep: (B,) or a scalar, in [0, 1000]: 1000 times the share σ of noise.
            encoder_hidden_states: Text features, (B, T, caption_channels), T at most `max_text_tokens`.
            encoder_attention_mask: (B, T), 1 or True = keep; None keeps all, padding included, which is what
                the published weights were trained with. Patches are never masked.
            return_hidden_state_of: Return the patches' tokens after this patch block too, counted from 1.
            attention_kwargs: `scale` of a LoRA; anything else goes to the patch blocks of a subclass by name.
            return_dict: Return a `PixelDiTOutput`, else a tuple of what it would hold.

        Returns:
            `sample`, (B, C, H, W), and `hidden_state`, (B, N, D), if asked for.

        Raises:
            ValueError: for arguments that do not fit the model or each other.
        """
        self._check_shared_inputs(hidden_states, timestep, return_hidden_state_of, attention_kwargs)
        batch, _, height, width = hidden_states.shape
        check_caption(encoder_hidden_states, encoder_attention_mask, self.config.caption_channels, batch)
        patch, tokens = self.config.patch_size, encoder_hidden_states.shape[1]
        if not 1 <= tokens <= self.config.max_text_tokens:
            raise ValueError(
                f"encoder_hidden_states must be of 1 to {self.config.max_text_tokens} tokens, "
                f"got {tuple(encoder_hidden_states.shape)}"
            )
        geometry = self._geometry(hidden_states, tokens)

        # 1. Patches, time and text.
        pixels = patchify(hidden_states, patch)  # (B, N, C, P)
        x = self.patch_embed(pixels.flatten(2))  # (B, N, D), without positions: those are the rotary ones
        t = self._time(timestep, x)  # (B, 1, D)
        cond = F.silu(t)
        text = self.caption_norm(self.caption_projection(encoder_hidden_states))  # (B, T, D)
        text = text + self.caption_position[:, :tokens]
        mask = None
        if encoder_attention_mask is not None:
            mask = F.pad(encoder_attention_mask.bool(), (0, x.shape[1]), value=True)[:, None, None]

        # 2. What is where.
        hidden_state = None
        for index, block in enumerate(self.transformer_blocks, start=1):
            run = partial(block, **attention_kwargs) if attention_kwargs else block
            x, text = self._run(run, x, text, cond, geometry.rotary, mask)
            if index == return_hidden_state_of:
                hidden_state = x

        # 3. Its pixels, each patch conditioned by its token; the text is in that already.
        pixels = self._pixel_level(pixels, F.silu(t + x), geometry)  # (B, N, P, C)
        sample = unpatchify(pixels, (height // patch, width // patch), patch)
        if return_dict:
            return PixelDiTOutput(sample=sample, hidden_state=hidden_state)
        return (sample,) if hidden_state is None else (sample, hidden_state)
