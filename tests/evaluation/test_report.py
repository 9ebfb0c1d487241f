"""The grid of pictures and the results file."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localdit.evaluation.report import Shown, draw_grid, write_report


@pytest.fixture
def shown(tmp_path) -> list[Shown]:
    """Seventy plain pictures of several sizes and colours."""
    items = []
    for i in range(70):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (40 + 20 * (i % 3), 80), (3 * i, 0, 255 - 3 * i)).save(path)
        items.append(Shown(path, f"picture {i}", "all right"))
    return items


def middle(grid: Image.Image, column: int, row: int, side: int) -> tuple[int, ...]:
    width, height = (grid.width - 6) // 8, (grid.height - 6) // 8
    return grid.getpixel((6 + column * width + side // 2, 6 + row * height + side // 2))


def test_the_first_64_pictures_stand_eight_in_a_row(shown):
    grid = draw_grid(shown, side=60)
    for i in (0, 1, 7, 8, 37, 63):
        assert middle(grid, i % 8, i // 8, 60) == (3 * i, 0, 255 - 3 * i)
    assert grid.size == (8 * 66 + 6, 8 * (66 + 2 * 14) + 6)  # two lines below each


def test_fewer_pictures_make_a_smaller_grid_and_no_words_take_no_room(shown):
    assert draw_grid([Shown(item.path) for item in shown[:3]], side=60).size == (3 * 66 + 6, 72)


def test_long_prompts_are_cut_and_stay_in_their_column(shown):
    """Between two columns runs a margin that no letter enters."""
    items = [Shown(item.path, "wide words " * 30, "wrong: " + "everything, " * 20) for item in shown[:2]]
    grid = draw_grid(items, side=60)
    assert grid.height == 66 + 5 * 14 + 6
    margin = np.asarray(grid)[:, 67:72]
    assert (margin == 0xEC).all()


def test_results_and_grid_are_written_whole(shown, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "out"
    write_report(folder, {"fid": 1.5, "prompt": "крас\ud800"}, shown[:2])
    assert json.loads((folder / "results.json").read_text()) == {"fid": 1.5, "prompt": "крас\ud800"}
    with Image.open(folder / "grid.png") as grid:
        assert grid.format == "PNG"
    before = (folder / "results.json").read_bytes()

    def fail(self: Path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder, {"fid": 2.5}, shown[:2])
    assert (folder / "results.json").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "results.json"]
