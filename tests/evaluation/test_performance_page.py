"""docs/performance.md has the floors and counts that the code gives."""

from pathlib import Path

import pytest
import torch

from localdit.evaluation import floors
from localdit.evaluation.contestants import FAMILIES, Contestant, Picture
from localdit.evaluation.counting import Count, count
from localdit.evaluation.speed import without_blocks

PAGE = (Path(__file__).parents[2] / "docs/performance.md").read_text(encoding="utf-8")
PASSES = Path(__file__).parent / "published_attention.py"
H200 = (790e12, 4.3e12)  # operations and bytes a second
BLOCKS = 4  # one for each shift


def rows(name: str) -> list[list[str]]:
    """The cells of a table of the page, without its head."""
    table = PAGE.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def guided(size: int) -> Picture:
    return Picture(size, 1, True, torch.bfloat16, torch.device("meta"))


def test_the_floors_are_those_of_the_code():
    models = ("local", "global", "pixart-alpha", "sana-0.6b", "sana-1.6b")
    for size, *cells in rows("floors"):
        for name, cell in zip(models, cells, strict=True):
            least = 1e3 * floors.seconds(Contestant(name).floor(guided(int(size))), *H200)
            assert float(cell) == pytest.approx(least, rel=0.006), (size, name)


@pytest.mark.slow
def test_the_counts_are_those_of_the_code(tmp_path):
    path = tmp_path / "localdit/models/attentions.py"
    path.parent.mkdir(parents=True)
    path.write_text(PASSES.read_text(encoding="utf-8"), encoding="utf-8")
    models = ("local", "global", "pixart-alpha", "published", "published-global")
    found = [counts(name, tmp_path) for name in models]
    assert [cells[1:] for cells in rows("counts")] == found


def counts(name: str, checkout: Path) -> list[str]:
    """A line of the table of counts, from four blocks."""
    model, forward = Contestant(name).build(guided(1024), BLOCKS, checkout)
    count(forward)  # makes what is kept
    whole, rest = count(forward), without_blocks(model, lambda: count(forward))

    def of_all(of: Count, of_rest: Count, what: str) -> int:
        few, none = (len(x.kernels) if what == "kernels" else x.bytes for x in (of, of_rest))
        return none + (few - none) * FAMILIES[name].depth // BLOCKS

    least = [counted.seconds(*H200) for counted in (whole, rest)]
    seconds = least[1] + (least[0] - least[1]) * FAMILIES[name].depth / BLOCKS
    return [
        f"{of_all(whole, rest, 'kernels')}",
        f"{of_all(whole, rest, 'bytes') / 1e9:.1f} GB",
        f"{whole.peak_bytes / 1e9:.2f} GB",
        f"{1e3 * seconds:.1f} ms",
    ]
