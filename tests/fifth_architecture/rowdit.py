"""RowDiT: what a fifth architecture costs, as somebody would write it outside the package.

Tokens attend along their own row of patches, and the convolution that makes them carries from row to row.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from localdit.models.layers import RMSNorm, heads_of, modulate, sincos_table
from localdit.models.strict import StrictModelMixin, check_sample, check_timestep

# B batch   C channels   H W latent   p patch   h w patch grid   N = h*w tokens   D width   A heads


class RowAttnProcessor:
    """What `RowAttention` computes. Holds no tensors, only the choice of backend."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "RowAttention", x: Tensor, grid: tuple[int, int]) -> Tensor:
        rows = x.unflatten(1, grid).flatten(0, 1)  # (B*h, w, D)
        q = attn.norm_q(heads_of(attn.to_q(rows), attn.heads))
        k = attn.norm_k(heads_of(attn.to_k(rows), attn.heads))
        v = heads_of(attn.to_v(rows), attn.heads)
        out = dispatch_attention_fn(
            q, k, v, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(out.flatten(2)).unflatten(0, (-1, grid[0])).flatten(1, 2)  # (B, N, D)


class RowAttention(nn.Module, AttentionModuleMixin):
    """Self-attention along the rows of the patch grid."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.processor = RowAttnProcessor()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x: (B, N, D), laid out on the grid. Returns (B, N, D)."""
        return self.processor(self, x, grid)


class RowDiTBlock(nn.Module):
    """Attention and feed-forward, each modulated by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn1 = RowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """hidden_states: (B, N, D), condition: (B, D). Returns (B, N, D)."""
        x = hidden_states
        six = self.modulation(F.silu(condition)).unflatten(-1, (6, 1, -1))  # (B, 6, 1, D)
        attn_shift, attn_scale, attn_gate, ff_shift, ff_scale, ff_gate = six.unbind(1)
        x = x + attn_gate * self.attn1(modulate(self.norm1(x), attn_shift, attn_scale), grid)
        return x + ff_gate * self.ff(modulate(self.norm2(x), ff_shift, ff_scale))


class RowDiTTransformer2DModel(
    StrictModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CacheMixin
):
    """Class-conditional RowDiT, which predicts the noise.

    Args:
        sample_size: Side of the latents that it is for.
        patch_size: Side of a patch in latent pixels.
        in_channels: Of the latents.
        num_layers: Blocks.
        num_attention_heads: Heads.
        attention_head_dim: Width of one.
        num_classes: Labels are below it, and it is no class.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["RowDiTBlock"]  # noqa: RUF012
    _no_split_modules = ["RowDiTBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 2,
        num_attention_heads: int = 2,
        attention_head_dim: int = 16,
        num_classes: int = 1000,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_embed = nn.Conv2d(in_channels, dim, 3 * patch_size, patch_size, padding=patch_size)
        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(64, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim)
        self.transformer_blocks = nn.ModuleList(
            RowDiTBlock(dim, num_attention_heads) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)
        self.gradient_checkpointing = False
        for block in self.transformer_blocks:  # each begins as the identity
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            hidden_states: Noisy latents, (B, C, H, W).
            timestep: (B,), in [0, 1000); 0 is clean.
            class_labels: (B,), integers in [0, num_classes].
        """
        config = self.config
        check_sample(hidden_states, config.in_channels, config.patch_size)
        check_timestep(timestep, len(hidden_states))
        grid = tuple(side // config.patch_size for side in hidden_states.shape[2:])
        x = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)  # (B, N, D)
        places = (torch.arange(side, device=x.device, dtype=torch.float32) for side in grid)
        x = x + sincos_table(*places, x.shape[-1]).to(x)
        time = self.timestep_embedder(self.time_proj(timestep.expand(len(x))).to(x))
        condition = time + self.class_embedder(class_labels)  # (B, D)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, condition, grid)
            else:
                x = block(x, condition, grid)
        x = self.proj_out(self.norm_out(x)).transpose(1, 2).unflatten(2, grid)  # (B, p*p*C, h, w)
        sample = F.pixel_shuffle(x, config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
