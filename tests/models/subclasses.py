"""Subclasses of the models, which save, load, offload, train, compile and take a LoRA as their parents do.

Of each architecture one changes what a block computes, one hears of a further input, one swaps the attention
processor, and one adds a config field: it hands the parent's fields on, or spells them out.
"""

from dataclasses import replace
from typing import Any

import torch
from architectures import ARCHITECTURES, PROJECTIONS
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from localdit.models.ledit import LEDiTAttention, LEDiTAttnProcessor, LEDiTBlock, LEDiTTransformer2DModel
from localdit.models.local_dit import (
    LocalDiTAttention,
    LocalDiTAttnProcessor,
    LocalDiTBlock,
    LocalDiTTransformer2DModel,
)
from localdit.models.pixeldit import PixelDiTBlock, PixelDiTPixelBlock, PixelDiTTransformer2DModel
from localdit.models.sparse_dit import (
    BlockShape,
    SparseDiTAttention,
    SparseDiTAttnProcessor,
    SparseDiTBlock,
    SparseDiTTransformer2DModel,
)


class GatedLocalDiTBlock(LocalDiTBlock):
    """A block that learns, channel by channel, how much of itself to use."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.gate = nn.Parameter(torch.ones(config.num_attention_heads * config.attention_head_dim))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), self.gate)


class GatedLocalDiT(LocalDiTTransformer2DModel):
    block_class = GatedLocalDiTBlock


class PosedLocalDiTBlock(LocalDiTBlock):
    """A block that also hears of a pose, (B, pose_channels)."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.pose = nn.Linear(config.pose_channels, config.num_attention_heads * config.attention_head_dim)

    def forward(self, hidden_states: Tensor, *args: Any, pose: Tensor | None = None, **kwargs: Any) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return super().forward(hidden_states, *args, **kwargs)


class PosedLocalDiT(LocalDiTTransformer2DModel):
    block_class = PosedLocalDiTBlock

    @register_to_config
    def __init__(self, pose_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


class SpelledOutLocalDiT(LocalDiTTransformer2DModel):
    """As diffusers' own models have it: every field in the signature."""

    block_class = PosedLocalDiTBlock

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
        pose_channels: int = 3,
    ):
        fields = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "__class__", "pose_channels")
        }
        super().__init__(**fields)


class SharpLocalDiTProcessor(LocalDiTAttnProcessor):
    """Local attention whose output counts twice."""

    def __call__(self, attn: LocalDiTAttention, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(attn, *args, **kwargs)


class SharpLocalDiTBlock(LocalDiTBlock):
    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.attn1.set_processor(SharpLocalDiTProcessor())


class SharpLocalDiT(LocalDiTTransformer2DModel):
    block_class = SharpLocalDiTBlock


class GatedSparseBlock(SparseDiTBlock):
    """A block that learns, channel by channel, how much of itself to use."""

    def __init__(self, config: Any, shape: BlockShape):
        super().__init__(config, shape)
        self.gate = nn.Parameter(torch.ones(shape.dim))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), self.gate)


class GatedSparseDiT(SparseDiTTransformer2DModel):
    block_class = GatedSparseBlock


class PosedSparseBlock(SparseDiTBlock):
    """A block that also hears of a pose, (B, pose_channels)."""

    def __init__(self, config: Any, shape: BlockShape):
        super().__init__(config, shape)
        self.pose = nn.Linear(config.pose_channels, shape.dim)

    def forward(self, hidden_states: Tensor, *args: Any, pose: Tensor | None = None, **kwargs: Any) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return super().forward(hidden_states, *args, **kwargs)


class PosedSparseDiT(SparseDiTTransformer2DModel):
    block_class = PosedSparseBlock

    @register_to_config
    def __init__(self, pose_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


class SharpSparseProcessor(SparseDiTAttnProcessor):
    """Attention whose output counts twice."""

    def __call__(self, attn: SparseDiTAttention, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(attn, *args, **kwargs)


class SharpSparseBlock(SparseDiTBlock):
    def __init__(self, config: Any, shape: BlockShape):
        super().__init__(config, shape)
        self.attn1.set_processor(SharpSparseProcessor())


class SharpSparseDiT(SparseDiTTransformer2DModel):
    block_class = SharpSparseBlock


class GatedLEDiTBlock(LEDiTBlock):
    """A block that learns how much of itself to use, and hears of a pose, (B, 3), where there is one."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        dim = config.num_attention_heads * config.attention_head_dim
        self.gate = nn.Parameter(torch.ones(dim))
        self.pose = nn.Linear(3, dim)

    def forward(self, hidden_states: Tensor, *args: Any, pose: Tensor | None = None, **kwargs: Any) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), self.gate)


class GatedLEDiT(LEDiTTransformer2DModel):
    block_class = GatedLEDiTBlock


class SharpLEDiTProcessor(LEDiTAttnProcessor):
    """Attention whose output counts twice."""

    def __call__(self, attn: LEDiTAttention, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(attn, *args, **kwargs)


class SharpLEDiTBlock(LEDiTBlock):
    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.attn1.set_processor(SharpLEDiTProcessor())


class SharpLEDiT(LEDiTTransformer2DModel):
    block_class = SharpLEDiTBlock


class PosedPixelDiTBlock(PixelDiTBlock):
    """A block that also hears of a pose, (B, pose_channels)."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.pose = nn.Linear(config.pose_channels, config.num_attention_heads * config.attention_head_dim)

    def forward(
        self, hidden_states: Tensor, conditioning: Tensor, rotary: Tensor, pose: Tensor | None = None
    ) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return super().forward(hidden_states, conditioning, rotary)


class SharpPixelBlock(PixelDiTPixelBlock):
    """A pixel block that counts twice."""

    def forward(self, hidden_states: Tensor, conditioning: Tensor, rotary: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states, conditioning, rotary)


class PosedPixelDiT(PixelDiTTransformer2DModel):
    block_class = PosedPixelDiTBlock
    pixel_block_class = SharpPixelBlock

    @register_to_config
    def __init__(self, pose_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


def posed(channels: int) -> dict[str, Any]:
    return {"attention_kwargs": {"pose": torch.linspace(-2, 2, 2 * channels).view(2, channels)}}


_local, _sparse, _ledit, _pixeldit = (
    ARCHITECTURES[name] for name in ("local_dit", "sparse_dit", "ledit", "pixeldit")
)
_local_subclass = replace(_local, grids=((5, 7),), repeated={"num_layers": 2})
_one_block = {"num_layers": 1, "mixer_num_layers": 0}
_sparse_subclass = replace(_sparse, small=_one_block, grids=((3, 5),), repeated=_one_block, graphs=1)
_list_pattern = {"attention_pattern": ["sa", "ca", "ca", "sa"]}
SUBCLASSES = {
    "local_dit, block": replace(_local_subclass, cls=GatedLocalDiT, blocks=("GatedLocalDiTBlock",)),
    "local_dit, config field and input": replace(
        _local_subclass,
        cls=PosedLocalDiT,
        blocks=("PosedLocalDiTBlock",),
        config={"pose_channels": 5},
        extra=posed(5),
        lora=(*PROJECTIONS, "pose"),
    ),
    "local_dit, all config fields spelled out": replace(
        _local_subclass,
        cls=SpelledOutLocalDiT,
        blocks=("PosedLocalDiTBlock",),
        config={"pose_channels": 5},
        extra=posed(5),
    ),
    "local_dit, processor": replace(_local_subclass, cls=SharpLocalDiT, blocks=("SharpLocalDiTBlock",)),
    "sparse_dit, block": replace(_sparse_subclass, cls=GatedSparseDiT, blocks=("GatedSparseBlock",)),
    "sparse_dit, config field and input": replace(
        _sparse_subclass,
        cls=PosedSparseDiT,
        blocks=("PosedSparseBlock",),
        config={"pose_channels": 5},
        extra=posed(5),
        lora=(*PROJECTIONS, "pose"),
    ),
    "sparse_dit, processor": replace(_sparse_subclass, cls=SharpSparseDiT, blocks=("SharpSparseBlock",)),
    "ledit, block and input": replace(
        _ledit, cls=GatedLEDiT, blocks=("GatedLEDiTBlock",), config=_list_pattern, extra=posed(3)
    ),
    "ledit, processor": replace(_ledit, cls=SharpLEDiT, blocks=("SharpLEDiTBlock",), config=_list_pattern),
    "pixeldit, blocks, config field and input": replace(
        _pixeldit,
        cls=PosedPixelDiT,
        blocks=("PosedPixelDiTBlock", "SharpPixelBlock"),
        config={"pose_channels": 5},
        extra=posed(5),
        repeated=_pixeldit.small,
        lora=(*PROJECTIONS, "pose"),
    ),
}
