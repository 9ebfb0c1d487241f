"""PixelDiT pipelines of real classes at toy size, every weight of which speaks."""

from typing import Any

from torch import Tensor
from toy_pipeline import redraw
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.pipelines import PixelDiTPipeline, PixelDiTTextPipeline
from localdit.pipelines.pixeldit_text import published_scheduler
from localdit.schedulers.flow_adams_bashforth import FlowAdamsBashforthScheduler

SIZE = {"height": 8, "width": 12}  # 2 x 3 patches
LENGTH = 20  # tokens of text
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "hen"}
SHARED: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_pixel_layers": 1,
    "pixel_dim": 4,
}


def class_pipeline(**components: Any) -> PixelDiTPipeline:
    """A class pipeline without progress bar. `components` take the place of the toys."""
    if "transformer" not in components:
        components["transformer"] = PixelDiTTransformer2DModel(**SHARED, num_classes=10).eval()
        redraw(components["transformer"], 0.3)
    components.setdefault("scheduler", FlowAdamsBashforthScheduler())
    pipe = PixelDiTPipeline(**{"id2label": NAMES} | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toy_gemma() -> tuple[GemmaTokenizer, Gemma2Model]:
    """Gemma's tokenizer, which spells every word, and a small Gemma."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-,.:>\"'\n"
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = GemmaTokenizer(vocab=vocab, add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(special) + len(letters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    encoder = Gemma2Model(config).eval()
    redraw(encoder, 0.3)
    return tokenizer, encoder


def text_pipeline(**components: Any) -> PixelDiTTextPipeline:
    """A text pipeline without progress bar. `components` take the place of the toys."""
    tokenizer, encoder = toy_gemma()
    transformer = PixelDiTTextTransformer2DModel(
        **SHARED,
        pixel_num_attention_heads=1,
        pixel_attention_head_dim=8,
        caption_channels=16,
        max_text_tokens=LENGTH,
    ).eval()
    redraw(transformer, 0.3)
    toys = {"transformer": transformer, "text_encoder": encoder, "tokenizer": tokenizer}
    pipe = PixelDiTTextPipeline(**{**toys, "scheduler": published_scheduler(), **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, condition: Any = None, **kwargs: Any) -> Tensor:
    """Four steps at `SIZE` to the raw tensor, or as `kwargs` say."""
    size = {} if "image" in kwargs else SIZE
    defaults: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}
    if isinstance(pipe, PixelDiTTextPipeline):
        defaults["max_sequence_length"] = LENGTH
        condition = "a hen" if condition is None and "prompt_embeds" not in kwargs else condition
    else:
        condition = 1 if condition is None else condition
    return pipe(condition, **size | defaults | kwargs).images
