"""What SparseDiT saves in training by dropping tokens, by the clock and by counting, in one run.

Deferred masking (MicroDiT: Sehwag et al. 2024, section 3.1) drops 75 % of the tokens behind the patch mixer,
which sees all of them: the saving is less than four times. Two steps of one model, forward and backward, take
turns in pairs, in alternating order, and each pair gives a ratio; weights are random. The optimizer's step
comes on top and costs the same either way.

On a CPU the model is MicroDiT Tiny, on CUDA XL. The operations of the forward pass are counted for it and for
XL at 256 and 512 pixels, where it was trained; the backward pass takes twice as many.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localdit.evaluation.timing import DTYPES, Measured, Setup, Spread, check_picture, draw_weights, spread
from localdit.models.sparse_dit import SparseDiTTransformer2DModel

XL: dict[str, Any] = {}
TINY: dict[str, Any] = {
    "hidden_size": 512,
    "num_layers": 16,
    "attention_head_dim": 32,
    "mixer_num_layers": 4,
    "mixer_hidden_size": 512,
}
MODELS = {"cpu": ("Tiny", TINY), "cuda": ("XL", XL)}
MASK_RATIO = 0.75
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Result(Measured):
    """A step with 75 % of the tokens dropped, against one with all. A ratio of 2: it takes half."""

    model: str  # "Tiny" or "XL"
    masked_seconds: float  # forward and backward, median
    unmasked_seconds: float
    ratio: Spread  # of the ratios of the pairs
    counted: float  # ratio of the operations, of this model at this size
    counted_xl_256: float  # of XL at 256 pixels
    counted_xl_512: float


def benchmark(setup: Setup, size: int = 256, batch: int = 1) -> list[Result]:
    """Time training steps with 75 % of the tokens dropped, and with none.

    Args:
        setup: How to measure.
        size: Side of the square picture in pixels, a multiple of 16.
        batch: Pictures per step.

    Returns:
        One result for each device.

    Raises:
        ValueError: for a size or batch outside these, or a device that is not here.
    """
    check_picture(size, batch)
    with setup.devices() as devices:
        return [_compare(setup, size, batch, device) for device in devices]


def operations(config: dict[str, Any], size: int, mask_ratio: float) -> int:
    """Floating-point operations of a forward pass for one picture; multiply and add are two.

    Args:
        config: Of a `SparseDiTTransformer2DModel`.
        size: Side of the square picture in pixels.
        mask_ratio: Share of the tokens that are dropped.
    """
    # The counter knows attention as two matrix products, not as the CPU's fused kernel.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = SparseDiTTransformer2DModel(**config).train()
        inputs = _inputs(model, size, 1)
        with FlopCounterMode(display=False) as counter:
            model(**inputs, mask_ratio=mask_ratio)
    return counter.get_total_flops()


def counted_ratio(config: dict[str, Any], size: int) -> float:
    """How many times the operations of a forward pass go down when 75 % of the tokens are dropped."""
    return operations(config, size, 0.0) / operations(config, size, MASK_RATIO)


def _compare(setup: Setup, size: int, batch: int, device: torch.device) -> Result:
    name, config = MODELS[device.type]
    with device:
        model = SparseDiTTransformer2DModel(**config).train()
        draw_weights(model, DTYPES[setup.dtype])
        inputs = _inputs(model, size, batch)

    def step(mask_ratio: float) -> None:
        model(**inputs, mask_ratio=mask_ratio).sample.float().square().mean().backward()

    masked: list[float] = []
    unmasked: list[float] = []
    for pair in range(1 + setup.pairs):
        order = ((MASK_RATIO, masked), (0.0, unmasked))
        for mask_ratio, times in order if pair % 2 else order[::-1]:
            model.zero_grad()
            times.append(setup.seconds(partial(step, mask_ratio), device))
    del masked[0], unmasked[0]  # that pair warmed up
    return Result(
        device=device.type,
        dtype=setup.dtype,
        size=size,
        batch=batch,
        threads=torch.get_num_threads(),
        pairs=setup.pairs,
        model=name,
        masked_seconds=float(np.median(masked)),
        unmasked_seconds=float(np.median(unmasked)),
        ratio=spread(np.divide(unmasked, masked)),
        counted=counted_ratio(config, size),
        counted_xl_256=counted_ratio(XL, 256),
        counted_xl_512=counted_ratio(XL, 512),
    )


def _inputs(model: SparseDiTTransformer2DModel, size: int, batch: int) -> dict[str, Any]:
    """Arguments of a forward pass, in the model's dtype, on the device of the context."""
    config, latent = model.config, size // 8
    return {
        "hidden_states": torch.randn(batch, config.in_channels, latent, latent, dtype=model.dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, config.caption_channels, dtype=model.dtype),
        "timestep": torch.randn(batch) / 4,
    }
