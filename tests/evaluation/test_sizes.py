"""The counts of published sizes: those of the papers, multiplied exactly, and those on their page."""

import json
from pathlib import Path
from typing import Any

import pytest

from localdit import cli
from localdit.cli.models import markdown, size_rows
from localdit.evaluation import sizes
from localdit.evaluation.sizes import (
    LEDIT,
    LOCAL_DIT,
    PIXEL_DIT,
    PIXEL_DIT_TEXT,
    SIZES,
    SPARSE_DIT,
    Family,
    count_flops,
    count_sizes,
)

PAGE = Path(__file__).parents[2] / "docs/models/index.md"
PARAMETERS = {
    "LocalDiT": 518_662_672,
    "LocalDiT, no global context": 398_780_368,
    "SparseDiT-XL": 1_165_442_320,
    "SparseDiT-XL, 1.2B variant": 1_214_325_264,
    "SparseDiT-Tiny": 200_692_752,
    "LEDiT-S": 34_192_544,
    "LEDiT-B": 135_624_992,
    "LEDiT-L": 467_278_880,
    "LEDiT-XL": 686_779_808,
    "PixelDiT-B": 184_749_155,
    "PixelDiT-L": 569_648_963,
    "PixelDiT-XL": 797_383_203,
    "PixelDiT, text": 1_302_470_787,
}
CONFIGS = {name: config for name, _, config in SIZES}


@pytest.fixture
def uncounted(monkeypatch) -> None:
    """No operations are counted, which takes seconds."""
    monkeypatch.setattr(sizes, "count_flops", lambda family, config, side: 0)


@pytest.mark.parametrize(
    ("family", "name", "side", "gflops"),
    [
        (SPARSE_DIT, "SparseDiT-XL", 256, 238.1),
        (SPARSE_DIT, "SparseDiT-Tiny", 512, 190.6),
        (PIXEL_DIT, "PixelDiT-B", 256, 75.4),
        (PIXEL_DIT, "PixelDiT-L", 512, 994.0),
        (PIXEL_DIT, "PixelDiT-XL", 256, 311.2),
    ],
)
def test_a_forward_costs_what_was_published(family, name, side, gflops):
    """Counted without this package; the last is in the paper too."""
    assert count_flops(family, CONFIGS[name], side) / 1e9 == pytest.approx(gflops, abs=0.05)


@pytest.mark.parametrize(
    ("family", "config", "side"),
    [
        (LOCAL_DIT, {"num_layers": 10, "num_attention_heads": 2, "attention_head_dim": 12}, 176),
        (LEDIT, {"num_layers": 6, "num_attention_heads": 2, "attention_head_dim": 12}, 80),
        (PIXEL_DIT, {"num_layers": 3, "num_pixel_layers": 4, "num_attention_heads": 2}, 48),
        (PIXEL_DIT_TEXT, {"num_layers": 4, "num_pixel_layers": 1, "num_attention_heads": 2}, 48),
    ],
    ids=["LocalDiT", "LEDiT", "PixelDiT", "PixelDiT text"],
)
def test_multiplying_the_blocks_that_repeat_changes_nothing(
    family: Family, config: dict[str, Any], side: int
):
    """At a side whose tokens fill no window either."""
    assert count_flops(family, config, side) == sizes._count(family, config, side) > 0


@pytest.mark.usefixtures("uncounted")
def test_every_published_size_has_its_parameters():
    found = {size.name: size for size in count_sizes()}
    assert {name: size.parameters for name, size in found.items()} == PARAMETERS
    for size in found.values():
        assert size.bfloat16_bytes == 2 * size.parameters
        assert size.tokens == {256: 256, 512: 1024, 1024: 4096}


@pytest.mark.usefixtures("uncounted")
def test_the_page_has_the_command_s_tables(capsys):
    """But for the operations, which the slow test below counts."""
    assert cli.main(["models", "--markdown"]) == 0
    written, counted = tables(PAGE.read_text(encoding="utf-8")), capsys.readouterr().out.splitlines()
    assert len(written) == len(counted)
    for ours, theirs in zip(written, counted):
        is_size = any(ours.startswith(f"| {name} |") for name in PARAMETERS)
        cut = -4 if is_size else None
        assert ours.split("|")[:cut] == theirs.split("|")[:cut]


def tables(page: str) -> list[str]:
    return page.split("<!-- models -->\n")[1].split("\n<!-- /models -->")[0].splitlines()


@pytest.mark.slow
def test_the_page_has_every_count():
    counted = markdown(size_rows(list(count_sizes()))).splitlines()
    assert tables(PAGE.read_text(encoding="utf-8"))[: len(counted)] == counted


@pytest.mark.usefixtures("uncounted")
def test_the_command_prints_tables_or_json(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 130
    assert lines[0].split()[:2] == ["size", "parameters"]
    assert lines[1].split() == [
        "LocalDiT", "518,662,672", "1.04", "GB", "256,", "1024,", "4096", "0.0", "0.0", "0.0",
    ]  # fmt: skip
    assert "  text          none: labels of classes" in lines

    assert cli.main(["models", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [size["name"] for size in found] == list(PARAMETERS)
    assert found[-1]["text_encoder"] == "Gemma-2-2B-it, 300 tokens"
    assert found[5]["tokens"] == {"256": 256, "512": 1024, "1024": 4096}
