"""Prompts of an evaluation: from a text file, from GenEval's, or told by the pictures themselves."""

import json
from pathlib import Path

from localdit.data.images import BadSample, decode_image
from localdit.pictures import read_settings


def read_prompts(path: Path) -> list[str]:
    """The lines of a file, without the empty ones."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def read_geneval(path: Path) -> list[tuple[str, str]]:
    """The prompts of a file of GenEval (Ghosh et al. 2023), each with its whole line, which its judge reads.

    Raises:
        ValueError: A line is no JSON object with a "prompt".
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(
                f'{path}, line {number} must be a JSON object with a text as "prompt", got {line:.80}'
            )
        found.append((prompt, line.strip()))
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def prompt_of(picture: Path) -> str | None:
    """The prompt of a picture file: the one that its settings tell, or else the text file of its name.

    None for what is no readable picture and has no prompt either.

    Raises:
        ValueError: A readable picture has neither.
    """
    try:
        return read_settings(str(picture)).prompt
    except ValueError:
        caption = picture.with_suffix(".txt")
    if caption.is_file():
        return read_prompts(caption)[0]
    try:
        decode_image(picture.read_bytes())
    except BadSample:
        return None
    raise ValueError(
        f"{picture} tells no prompt: it must be a PNG that localdit made, or have {caption.name} beside it"
    )
