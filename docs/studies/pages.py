"""What the scripts of studies share: they write their tables into their own pages."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Put each block between the lines `<!-- name -->` and `<!-- /name -->` of a page, for what is there.

    Raises:
        ValueError: The page has no such lines.
    """
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = place.subn(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"{page} must have the lines <!-- {name} --> and <!-- /{name} --> once")
    page.write_text(text, encoding="utf-8")


def spread(values: Sequence[float], form: str = "{:.0f}", unit: str = " %") -> str:
    """The mean, and the values of the seeds."""
    return f"{form.format(np.mean(values))}{unit} ({', '.join(form.format(value) for value in values)})"
