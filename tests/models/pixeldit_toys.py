"""Small PixelDiT models whose every layer speaks, inputs for them, and the naive twin's answer to both."""

from typing import Any

import torch
from naive_pixeldit import Sizes, naive_pixeldit
from torch import Tensor, nn

from localdit.models.pixeldit import PixelDiTBase, PixelDiTTransformer2DModel
from localdit.models.pixeldit_single_file import to_published
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel

SHARED: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "pixel_dim": 8,
}
CLASS: dict[str, Any] = SHARED | {"num_pixel_layers": 2, "num_classes": 10}
TEXT: dict[str, Any] = SHARED | {
    "num_pixel_layers": 1,
    "pixel_num_attention_heads": 4,
    "pixel_attention_head_dim": 12,
    "caption_channels": 32,
    "max_text_tokens": 10,
}
TOYS: dict[type[PixelDiTBase], dict[str, Any]] = {
    PixelDiTTransformer2DModel: CLASS,
    PixelDiTTextTransformer2DModel: TEXT,
}


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, so that no layer is silent (zero, or one where it multiplies)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def toy_config(cls: type[PixelDiTBase]) -> dict[str, Any]:
    return next(config for base, config in TOYS.items() if issubclass(cls, base))


def toy_model(cls: type[PixelDiTBase] = PixelDiTTransformer2DModel, *, seed: int = 0, **config: Any) -> Any:
    """A small model for evaluation with speaking weights. `config` overrides the toy sizes."""
    model = cls(**(toy_config(cls) | config)).eval()
    redraw(model, seed)
    return model


def toy_inputs(
    model: Any, grid: tuple[int, int] = (4, 6), batch: int = 2, *, seed: int = 0, text_tokens: int = 7
) -> dict[str, Any]:
    """Arguments of the forward pass for a grid of patches."""
    config = model.config
    generator = torch.Generator().manual_seed(1000 + seed)
    height, width = (config.patch_size * size for size in grid)
    time = torch.rand(batch, generator=generator)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": time,
    }
    if isinstance(model, PixelDiTTransformer2DModel):
        labels = torch.randint(0, config.num_classes + 1, (batch,), generator=generator)
        return inputs | {"class_labels": labels}
    text = torch.randn(batch, text_tokens, config.caption_channels, generator=generator)
    return inputs | {"timestep": 1000 * time, "encoder_hidden_states": text}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with pictures and text in another dtype."""
    names = ("hidden_states", "encoder_hidden_states")
    return inputs | {name: inputs[name].to(dtype) for name in names if name in inputs}


def naive(
    model: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float64, after: int | None = None
) -> Any:
    """The naive twin with the model's weights, computed in `dtype`: the sample, or the tokens `after`."""
    config = model.config
    sizes = Sizes(
        config.patch_size,
        config.norm_eps,
        config.rope_theta,
        config.rope_extent,
        config.get("text_rope_theta") if config.get("text_rope") else None,
        config.timestep_period,
        config.pixel_position,
    )
    weights = {name: tensor.to(dtype) for name, tensor in to_published(model.state_dict()).items()}
    mask = inputs.get("encoder_attention_mask")
    results = [
        naive_pixeldit(
            weights,
            sizes,
            image,
            float(inputs["timestep"][i]),
            label=int(inputs["class_labels"][i]) if "class_labels" in inputs else None,
            text=inputs["encoder_hidden_states"][i] if "encoder_hidden_states" in inputs else None,
            keep=None if mask is None else mask[i].bool(),
            after=after,
        )
        for i, image in enumerate(inputs["hidden_states"])
    ]
    return torch.stack([result[0 if after is None else 1] for result in results])


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).sample


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Euclidean distance over the reference's length, in float64."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()
