"""Small LocalDiT models whose every layer speaks, inputs for them, and the naive twin's answer to both."""

from typing import Any

import torch
from naive_local_dit import Architecture, naive_local_dit, published_layout
from torch import Tensor, nn

from localdit.models.local_dit import LocalDiTTransformer2DModel

TOY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "caption_channels": 16,
    "sample_size": 16,
    "window_size": 4,
}


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, so that no layer is silent (zero, or one where it multiplies)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "relative_position_bias" in name:
                parameter.copy_(noise)
            elif "norm_" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1 and "table" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def toy_model(
    cls: type[LocalDiTTransformer2DModel] = LocalDiTTransformer2DModel, *, seed: int = 0, **config: Any
) -> Any:
    """A small model for evaluation with speaking weights. `config` overrides the toy sizes."""
    model = cls(**(TOY | config)).eval()
    redraw(model, seed)
    return model


def toy_inputs(
    grid: tuple[int, int] = (8, 8), batch: int = 2, *, seed: int = 0, text_tokens: int = 7, **config: Any
) -> dict[str, Any]:
    """Arguments of the forward pass for a grid of tokens. Captions are padded to different lengths."""
    config = {"in_channels": 4, "patch_size": 2} | TOY | config
    generator = torch.Generator().manual_seed(1000 + seed)
    height, width = (config["patch_size"] * size for size in grid)
    length = torch.randint(1, text_tokens + 1, (batch, 1), generator=generator)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, config["in_channels"], height, width, generator=generator),
        "encoder_hidden_states": torch.randn(
            batch, text_tokens, config["caption_channels"], generator=generator
        ),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_attention_mask": (torch.arange(text_tokens) < length).long(),
    }
    if config.get("use_additional_conditions", True):
        inputs["added_cond_kwargs"] = {
            "resolution": torch.randint(64, 1025, (batch, 2), generator=generator).float(),
            "aspect_ratio": 0.5 + torch.rand(batch, generator=generator),
        }
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with latents and text in another dtype."""
    return inputs | {key: inputs[key].to(dtype) for key in ("hidden_states", "encoder_hidden_states")}


def architecture(model: LocalDiTTransformer2DModel) -> Architecture:
    config = {name: model.config[name] for name in Architecture._fields}
    return Architecture(**config | {"full_attention_layers": tuple(config["full_attention_layers"])})


def naive(
    model: LocalDiTTransformer2DModel, inputs: dict[str, Any], dtype: torch.dtype = torch.float64
) -> Tensor:
    """The naive twin with the model's weights, computed in `dtype`."""
    state = {key: tensor.to(dtype) for key, tensor in published_layout(model.state_dict()).items()}
    inputs = dict(inputs)
    inputs.update(inputs.pop("added_cond_kwargs", {}))
    return naive_local_dit(state, architecture(model), **inputs)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    return model(**inputs, **kwargs).sample


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Euclidean distance over the reference's length, in float64."""
    reference = reference.double()
    return ((value.double() - reference).norm() / reference.norm()).item()
