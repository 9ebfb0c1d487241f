"""The speed comparison in tables and in a picture."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from localdit.evaluation.speed import Result
from localdit.evaluation.timing import Spread
from localdit.plots import new_figure

BAR, SPAN = "#4c72b0", "#202020"
PEER = "#a0a0a0"


def comparisons(results: Sequence[Result]) -> list[list[Result]]:
    """The results of each device, size, batch and guidance."""

    def kind(found: Result) -> tuple[str, int, int, bool]:
        return found.device, found.size, found.batch, found.guided

    return [list(group) for _, group in groupby(results, kind)]


def heading(results: Sequence[Result]) -> str:
    """What one comparison was measured on."""
    one = results[0]
    ceilings = max(results, key=lambda found: found.copy_speed)
    where = f"CPU, {one.threads} threads" if one.device == "cpu" else one.device.upper()
    rounds = max(found.pairs for found in results)
    return (
        f"{where}: {one.size} px, batch {one.batch}, {'guidance' if one.guided else 'no guidance'}, "
        f"{one.dtype}, {rounds} rounds; "
        f"this machine copies {ceilings.copy_speed / 1e9:,.0f} GB/s "
        f"and multiplies at {ceilings.product_speed / 1e12:,.2f} TFLOP/s"
    )


def time_rows(results: Sequence[Result]) -> list[list[str]]:
    """A table of one comparison; the first row is its head."""
    head = [
        "model",
        "ms",
        "quartiles",
        "of floor",
        "TFLOP/s",
        "GB/s",
        "kernels",
        "moved",
        "peak",
        "parameters",
        "first call",
    ]
    return [head, *(_time_row(found) for found in results)]


def _time_row(found: Result) -> list[str]:
    if found.error:
        return [found.title, f"failed: {found.error}", *["-"] * 9]
    return [
        found.title,
        f"{1e3 * found.seconds.median:.4g}",
        f"{1e3 * found.seconds.low:.4g} to {1e3 * found.seconds.high:.4g}",
        f"{found.over_floor:.2f}",
        f"{found.flops_per_second / 1e12:.3g}",
        f"{found.bytes_per_second / 1e9:.3g}",
        f"{found.kernels}",
        f"{found.moved_bytes / 1e9:.1f} GB",
        f"{found.peak_bytes / 1e6:.0f} MB",
        f"{found.parameters / 1e6:.1f} M",
        f"{found.first_seconds:.3g} s",
    ]


def ratio_rows(results: Sequence[Result]) -> list[list[str]]:
    """How many times as long each peer takes as each of ours; empty without peers."""
    ours = [found for found in results if found.ratios]
    titles = {found.model: found.title for found in results}
    if not ours:
        return []
    head = ["times as fast as", *(titles[peer] for peer in ours[0].ratios)]
    return [head, *([found.title, *map(_ratio, found.ratios.values())] for found in ours)]


def _ratio(found: Spread) -> str:
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with a panel for each comparison: medians, their quartiles, and a stroke for the floor.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = comparisons([found for found in results if not found.error])
    heights = [1 + 0.28 * len(panel) for panel in panels]
    if not panels:  # all failed, as one by one they may; what comes after them may not
        new_figure(8, 1).savefig(path, format="png", dpi=150)
        return
    figure = new_figure(8, sum(heights))
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels
    ):
        medians = [1e3 * found.seconds.median for found in panel]
        spans = [
            [1e3 * (found.seconds.median - found.seconds.low) for found in panel],
            [1e3 * (found.seconds.high - found.seconds.median) for found in panel],
        ]
        colors = [BAR if found.ratios else PEER for found in panel]
        rows = range(len(panel))
        axes.barh(rows, medians, xerr=spans, color=colors, ecolor=SPAN, height=0.7)
        axes.scatter([1e3 * found.floor_seconds for found in panel], rows, marker="|", s=150, color=SPAN)
        axes.set_yticks(rows, [found.title for found in panel], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(heading(panel).split(";")[0], fontsize=9, loc="left")
    axes.set_xlabel("milliseconds of a forward; stroke: the least at this machine's speeds")
    figure.savefig(path, format="png", dpi=150)
