"""A LocalDiTPipeline of real classes at toy size, every weight of which speaks."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.pipelines import LocalDiTPipeline

WORDS = ("a", "red", "blue", "green", "circle", "square", "star", "left", "of", "on", "grey")
SIZE = {"height": 48, "width": 64}  # 6 x 8 latents, 3 x 4 tokens: windows of 4 pad and shift


def redraw(module: nn.Module, std: float) -> None:
    """Draw every parameter anew, so that no layer is silent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def toy_tokenizer() -> T5Tokenizer:
    """T5's tokenizer, which knows a few words whole and spells the others."""
    words = [("▁" + word, -1.0) for word in WORDS]
    letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0)


def toy_text_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).eval()
    redraw(encoder, 0.3)
    return encoder


def toy_vae(**config: Any) -> AutoencoderKL:
    blocks = (4, 8, 8, 8)
    defaults: dict[str, Any] = {
        "block_out_channels": blocks,
        "down_block_types": ("DownEncoderBlock2D",) * len(blocks),
        "up_block_types": ("UpDecoderBlock2D",) * len(blocks),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.4,
        "sample_size": 64,
    }
    vae = AutoencoderKL(**defaults | config).eval()
    redraw(vae, 0.2)
    return vae


def toy_transformer(**config: Any) -> LocalDiTTransformer2DModel:
    defaults: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "caption_channels": 16,
        "sample_size": 8,
    }
    transformer = LocalDiTTransformer2DModel(**defaults | config).eval()
    redraw(transformer, 0.1)
    return transformer


def toy_pipeline(**components: Any) -> LocalDiTPipeline:
    """A pipeline without progress bar. `components` take the place of the toys."""
    makers = {
        "tokenizer": toy_tokenizer,
        "text_encoder": toy_text_encoder,
        "vae": toy_vae,
        "transformer": toy_transformer,
        "scheduler": DPMSolverMultistepScheduler,
    }
    pipe = LocalDiTPipeline(
        **{name: components[name] if name in components else make() for name, make in makers.items()}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: LocalDiTPipeline, prompt: Any = "a red circle", **kwargs: Any) -> Tensor:
    """Three steps at `SIZE` to latents, or as `kwargs` say."""
    size = {} if "image" in kwargs else SIZE
    defaults = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0}
    return pipe(prompt, **size | defaults | kwargs).images


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def spy(pipe: LocalDiTPipeline) -> list[dict[str, Any]]:
    """A list that grows by the arguments of every call of the transformer."""
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls
