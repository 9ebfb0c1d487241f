"""What the published sizes of every architecture hold and cost: parameters, memory, operations of a forward.

All is counted, on PyTorch's meta device, which computes nothing: 2 operations for each multiplication and
addition in linear layers, convolutions and attention, of one forward for one picture. Guidance calls twice.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.models.sparse_dit import SparseDiTTransformer2DModel

SIDES = (256, 512, 1024)  # of pictures, in pixels


@dataclass(frozen=True)
class Family:
    """What the sizes of one architecture share."""

    name: str
    model: Any  # class of the transformer
    idea: str
    objective: str
    text_encoder: str | None  # None: labels of classes
    scheduler: str
    page: str  # under docs/models/
    text: tuple[int, int] | None = None  # tokens and width of a text
    latent: int = 8  # pixels to a side of a latent; 1 without an autoencoder
    # Config fields that count blocks, and after how many blocks these cost the same again.
    periods: Mapping[str, int] = field(default_factory=dict)


LOCAL_DIT = Family(
    "LocalDiT",
    LocalDiTTransformer2DModel,
    "attention in shifted windows of 4 x 4 tokens, and an optional mean of the whole picture",
    "noise, 1000 steps of linear betas",
    "FLAN-T5-XXL, 120 tokens",
    "DPM-Solver++ 2M, 20 steps",
    "local_dit.md",
    text=(120, 4096),
    periods={"num_layers": 4},  # a block is shifted by its number modulo the window
)
SPARSE_DIT = Family(
    "SparseDiT",
    SparseDiTTransformer2DModel,
    "experts choose their tokens; in training most tokens are dropped after a small mixer",
    "EDM's denoiser, sigma_data 0.9",
    "DFN5B-CLIP-ViT-H-14-378, 77 tokens",
    "EDM Heun, 30 steps",
    "sparse_dit.md",
    text=(77, 1024),
)
LEDIT = Family(
    "LEDiT",
    LEDiTTransformer2DModel,
    "no positions: a causal mask in every second block and one convolution tell places, at any size",
    "noise and variance, 1000 steps of linear betas",
    None,
    "DDPM with learned range, 250 steps",
    "ledit.md",
    periods={"num_layers": 2},
)
PIXEL_DIT = Family(
    "PixelDiT",
    PixelDiTTransformer2DModel,
    "no autoencoder: a narrow transformer on pixels, conditioned by one on patches of 16 x 16",
    "velocity of a flow",
    None,
    "Adams-Bashforth on the flow, 100 steps",
    "pixeldit.md",
    latent=1,
    periods={"num_layers": 1, "num_pixel_layers": 1},
)
PIXEL_DIT_TEXT = Family(
    "PixelDiT, text",
    PixelDiTTextTransformer2DModel,
    "the same, with text and patches in one attention",
    "velocity of a flow",
    "Gemma-2-2B-it, 300 tokens",
    "DPM-Solver++ 2M along the flow, 50 steps",
    "pixeldit.md",
    text=(300, 2304),
    latent=1,
    periods={"num_layers": 1, "num_pixel_layers": 1},
)
FAMILIES = (LOCAL_DIT, SPARSE_DIT, LEDIT, PIXEL_DIT, PIXEL_DIT_TEXT)


def _heads(layers: int, heads: int, head_dim: int, **others: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        **others,
    }


_TINY = {"hidden_size": 512, "num_layers": 16, "attention_head_dim": 32}
SIZES: tuple[tuple[str, Family, dict[str, Any]], ...] = (
    ("LocalDiT", LOCAL_DIT, {}),
    ("LocalDiT, no global context", LOCAL_DIT, {"global_context": False}),
    ("SparseDiT-XL", SPARSE_DIT, {}),
    ("SparseDiT-XL, 1.2B variant", SPARSE_DIT, {"ffn_inner_factor": 1.0, "qk_norm_affine": True}),
    ("SparseDiT-Tiny", SPARSE_DIT, {**_TINY, "mixer_num_layers": 4, "mixer_hidden_size": 512}),
    ("LEDiT-S", LEDIT, _heads(12, 6, 64)),
    ("LEDiT-B", LEDIT, _heads(12, 12, 64)),
    ("LEDiT-L", LEDIT, _heads(24, 16, 64)),
    ("LEDiT-XL", LEDIT, _heads(28, 16, 72)),
    ("PixelDiT-B", PIXEL_DIT, _heads(12, 12, 64, num_pixel_layers=2)),
    ("PixelDiT-L", PIXEL_DIT, _heads(22, 16, 64, num_pixel_layers=4)),
    ("PixelDiT-XL", PIXEL_DIT, _heads(26, 16, 72, num_pixel_layers=4)),
    ("PixelDiT, text", PIXEL_DIT_TEXT, {}),
)


@dataclass(frozen=True)
class Size:
    """One published size, counted."""

    name: str
    architecture: str
    tokens: dict[int, int]  # by the side of a picture in pixels; likewise gflops
    parameters: int
    bfloat16_bytes: int  # of the transformer's weights
    gflops: dict[int, float]


def count_sizes() -> Iterator[Size]:
    """Count every published size."""
    for name, family, config in SIZES:
        model = _on_meta(family, config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        patch = family.latent * model.config.patch_size
        yield Size(
            name=name,
            architecture=family.name,
            tokens={side: (side // patch) ** 2 for side in SIDES},
            parameters=parameters,
            bfloat16_bytes=2 * parameters,
            gflops={side: count_flops(family, config, side) / 1e9 for side in SIDES},
        )


def count_flops(family: Family, config: Mapping[str, Any], side: int) -> int:
    """Operations of one forward for one picture of `side` x `side` pixels.

    Blocks that repeat are counted once and multiplied, which changes nothing: with a remainder of blocks and
    with one period more, the difference is what each further period costs.
    """
    depths = {name: dict(_on_meta(family, config).config)[name] for name in family.periods}
    few = {name: depth % family.periods[name] or family.periods[name] for name, depth in depths.items()}
    base = total = _count(family, {**config, **few}, side)
    for name, depth in depths.items():
        if more := (depth - few[name]) // family.periods[name]:
            deeper = {**config, **few, name: few[name] + family.periods[name]}
            total += more * (_count(family, deeper, side) - base)
    return total


def _on_meta(family: Family, config: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return family.model(**config).eval()


def _count(family: Family, config: Mapping[str, Any], side: int) -> int:
    model = _on_meta(family, config)
    with torch.device("meta"):
        latent = side // family.latent
        inputs: dict[str, Tensor] = {
            "hidden_states": torch.empty(1, model.config.in_channels, latent, latent),
            "timestep": torch.empty(1),
        }
        if family.text is None:
            inputs["class_labels"] = torch.empty(1, dtype=torch.int64)
        else:
            inputs["encoder_hidden_states"] = torch.empty(1, *family.text)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    return int(counter.get_total_flops())
