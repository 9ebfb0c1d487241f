"""What an evaluation leaves behind: one JSON, and one picture of the pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from localdit.data.images import decode_image
from localdit.files import staged_file

COLUMNS, ROWS = 8, 8  # at most
MARGIN, LINE, FONT_SIZE = 6, 14, 11  # pixels
PAPER, INK, FAINT = "#ececec", "#202020", "#8a4b08"


@dataclass(frozen=True)
class Shown:
    """A picture of the grid, what was asked for, and what was found."""

    path: Path
    prompt: str = ""
    finding: str = ""


def draw_grid(shown: Sequence[Shown], side: int = 192) -> Image.Image:
    """The first 64 pictures, eight in a row, each within side x side, with prompt and finding below."""
    shown = shown[: COLUMNS * ROWS]
    columns = min(COLUMNS, len(shown))
    font = ImageFont.load_default(FONT_SIZE)
    texts = [
        [(line, INK) for line in _wrap(item.prompt, font, side, 3)]
        + [(line, FAINT) for line in _wrap(item.finding, font, side, 2)]
        for item in shown
    ]
    width, height = side + MARGIN, side + max(map(len, texts)) * LINE + MARGIN
    size = columns * width + MARGIN, math.ceil(len(shown) / columns) * height + MARGIN
    grid = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(grid)
    for index, (item, text) in enumerate(zip(shown, texts)):
        x, y = MARGIN + index % columns * width, MARGIN + index // columns * height
        picture = ImageOps.contain(decode_image(item.path.read_bytes()), (side, side))
        grid.paste(picture, (x + (side - picture.width) // 2, y + side - picture.height))
        for row, (line, color) in enumerate(text):
            pen.text((x, y + side + 2 + row * LINE), line, color, font)
    return grid


def _wrap(text: str, font: Any, width: int, limit: int) -> list[str]:
    """Lines that fit a width in pixels. What is cut off, of a word or behind the last line, leaves a "…"."""
    lines: list[str] = []
    for word in text[:500].split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], f"{lines[limit - 1]}…"]
    for row, line in enumerate(lines):
        while font.getlength(lines[row]) > width:
            line = line.rstrip("…")[:-1]
            lines[row] = f"{line}…"
    return lines


def write_report(folder: Path, results: dict[str, Any], shown: Sequence[Shown]) -> None:
    """Write `results.json` and `grid.png`. Each is whole or not there."""
    with staged_file(folder / "grid.png") as path:
        draw_grid(shown).save(path, format="PNG")
    with staged_file(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
