"""CLIP score: how well pictures fit their prompts, in the eyes of a CLIP (Hessel et al. 2021).

Computed with transformers alone. torchmetrics' CLIPScore (1.9) loads by a short list of hub names, expects
tensors where the CLIPModel of transformers 5 gives objects, and cuts off the last token of long prompts, by
which CLIP reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from localdit.evaluation.folders import read_batches


@dataclass(frozen=True)
class Clip:
    """A CLIP and what prepares its inputs. `name` is the folder or hub name it was loaded from."""

    name: str
    model: Any
    processor: Any

    @property
    def text_limit(self) -> int:
        """Tokens of the longest prompt that it reads, start and end included."""
        return int(self.model.config.text_config.max_position_embeddings)


def load_clip(name: str) -> Clip:
    """Load a CLIP from a folder, or by its hub name.

    Raises:
        ValueError: There is none in the folder or on the hub, or the hub cannot be reached.
    """
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
        processor = transformers.CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no CLIP could be loaded from {name} ({str(error).splitlines()[0]}): give --clip-score a folder "
            "with the files of a CLIPModel and its CLIPProcessor"
        ) from None
    return Clip(name, model.eval(), processor)


@torch.no_grad()
def clip_scores(
    clip: Clip,
    prompts: Mapping[Path, str],
    bad: dict[Path, str],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> dict[Path, float]:
    """Score pictures by their prompts: 100 max(cos(picture, prompt), 0) of each that can be read.

    The processor decides how a picture comes to CLIP: with the published ones, its shorter side is scaled to
    224 pixels, bicubic, and the middle is cut out. A prompt is cut at CLIP's limit.

    Args:
        clip: What scores.
        prompts: Of each picture.
        bad: Takes the pictures that cannot be read, and why.
        batch_size: Pictures at a time.
        device: Where CLIP runs.
    """
    model = clip.model.to(device)
    scores: dict[Path, float] = {}
    with tqdm(total=len(prompts), desc="CLIP score", unit="picture", disable=None) as bar:
        for paths, pictures in read_batches(list(prompts), batch_size, lambda picture: picture, bad):
            inputs = clip.processor(
                text=[prompts[path] for path in paths],
                images=pictures,
                padding=True,
                truncation=True,
                max_length=clip.text_limit,
                return_tensors="pt",
            )
            output = model(**inputs.to(device))
            cosines = (output.image_embeds * output.text_embeds).sum(-1)  # both have length 1
            scores |= zip(paths, (100 * cosines.clamp(min=0)).tolist())
            bar.update(len(paths))
    return scores


def measure_prompts(
    clip: Clip,
    prompts: Mapping[Path, str],
    bad: dict[Path, str],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> tuple[dict[Path, float], dict[str, Any], list[str]]:
    """Score pictures by their prompts. See `clip_scores` for the arguments.

    Returns:
        The score of each picture; what they were computed with; and what has to be known of them.

    Raises:
        ValueError: None of the pictures can be read.
    """
    scores = clip_scores(clip, prompts, bad, batch_size=batch_size, device=device)
    if not scores:
        raise ValueError(f"none of the {len(prompts)} pictures can be read")
    ids = clip.processor.tokenizer(list(prompts.values()), verbose=False)["input_ids"]
    cut = sum(len(tokens) > clip.text_limit for tokens in ids)
    computed_with = {
        "pictures": len(scores),
        "clip": clip.name,
        "image_processor": type(clip.processor.image_processor).__name__,
        "score": "mean of 100 max(cos, 0)",
        "prompts_cut": cut,
    }
    warnings = [
        f"{cut:,} of {len(prompts):,} prompts are longer than CLIP's {clip.text_limit} tokens, and were cut"
    ]
    return scores, computed_with, warnings if cut else []
