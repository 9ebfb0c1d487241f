"""A SparseDiTPipeline of real classes at toy size, every weight of which speaks."""

from typing import Any

import torch
from toy_pipeline import redraw as redraw_all
from toy_pipeline import toy_vae
from toy_sparse import toy_sparse
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from localdit.pipelines import SparseDiTPipeline
from localdit.schedulers.edm_heun import EDMHeunScheduler

LENGTH = 12  # tokens of a text


def toy_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, which spells: "!" is 0, as in CLIP, and padding is the end token, as in its files."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["!", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def toy_clip_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=55,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=53,
        eos_token_id=54,
    )
    encoder = CLIPTextModel(config).eval()
    redraw_all(encoder, 0.3)
    return encoder


def toy_sparse_pipeline(**components: Any) -> SparseDiTPipeline:
    """A pipeline without progress bar. `components` take the place of the toys."""
    makers = {
        "tokenizer": toy_clip_tokenizer,
        "text_encoder": toy_clip_text_encoder,
        "vae": toy_vae,
        "transformer": toy_sparse,
        "scheduler": lambda: EDMHeunScheduler(sigma_data=0.9),
    }
    pipe = SparseDiTPipeline(
        **{name: components[name] if name in components else make() for name, make in makers.items()}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_sparse(pipe: SparseDiTPipeline, prompt: Any = "a red star", **kwargs: Any) -> torch.Tensor:
    """Three steps at 48 x 64 to latents, or as `kwargs` say."""
    size = {} if "image" in kwargs else {"height": 48, "width": 64}
    defaults = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0}
    defaults["max_sequence_length"] = LENGTH
    return pipe(prompt, **size | defaults | kwargs).images
