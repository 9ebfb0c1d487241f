"""What is in a source, and what training at some resolution makes of it: numbers, a table and a picture."""

import itertools
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from localdit.data.buckets import bucket_sizes, fit, nearest_buckets
from localdit.data.images import BadSample, decode_image
from localdit.data.sources import Bad, Source
from localdit.plots import new_figure

_CHUNK = 512  # samples that are looked at together
_SHOWN = 8  # pictures in the picture


@dataclass(frozen=True)
class Report:
    """What was found. n usable pictures with m captions together."""

    resolution: int
    buckets: Sequence[tuple[int, int]]  # height and width
    sizes: NDArray[np.int32]  # width and height of each picture, (n, 2)
    bucket: NDArray[np.int64]  # of each picture, (n,)
    captions: NDArray[np.int64]  # of each picture, (n,)
    words: NDArray[np.int64]  # of each caption, (m,)
    tokens: NDArray[np.int64] | None  # of each caption, (m,)
    max_length: int  # tokens that training takes
    copies: int  # pictures that equal an earlier one, byte for byte
    bad: Sequence[Bad]
    decoded: bool  # whether the pixels were looked at
    examples: Sequence[int]  # some samples of the source

    @property
    def scale(self) -> NDArray[np.float64]:
        """How many times smaller each picture becomes in its bucket, (n,); below 1 it is enlarged."""
        covered = np.array(self.buckets)[self.bucket, ::-1]
        return (self.sizes / covered).min(axis=1)

    @property
    def cropped(self) -> NDArray[np.float64]:
        """The share of each picture that sticks out of its bucket, (n,)."""
        used = np.array(self.buckets)[self.bucket].prod(axis=1) * self.scale**2
        return 1 - used / self.sizes.astype(np.int64).prod(axis=1)

    def facts(self) -> dict[str, Any]:
        """The report as JSON."""
        width, height = self.sizes.T
        counts = np.bincount(self.bucket, minlength=len(self.buckets)).tolist()
        facts = {
            "pictures": len(self.sizes),
            "bad": len(self.bad),
            "decoded": self.decoded,
            "copies": self.copies,
            "width": _spread(width),
            "height": _spread(height),
            "megapixels": _spread(width / 1e6 * height),
            "resolution": self.resolution,
            "buckets": [
                {"height": height, "width": width, "pictures": count}
                for (height, width), count in zip(self.buckets, counts)
            ],
            "enlarged": int((self.scale < 1).sum()),
            "cropped": float(self.cropped.mean()) if len(self.sizes) else None,
            "captions": len(self.words),
            "captions_per_picture": _spread(self.captions),
            "words": _spread(self.words),
            "reasons": _reasons(self.bad),
        }
        if self.tokens is not None:
            facts |= {
                "tokens": _spread(self.tokens),
                "max_length": self.max_length,
                "too_long": int((self.tokens > self.max_length).sum()),
            }
        return facts


def check(
    source: Source,
    resolution: int,
    *,
    decode: bool = False,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    max_length: int = 120,
    progress: bool = False,
) -> Report:
    """Look at every sample of a source.

    Args:
        source: Opened with `max_bad_fraction=1`, so that it may hold anything.
        resolution: Of the training, in pixels.
        decode: Decode the pixels too: slow, and finds pictures that are cut off.
        count_tokens: How many tokens each text has.
        max_length: Tokens that training takes.
        progress: Show a bar.

    Raises:
        ValueError: No model has buckets of that resolution.
    """
    buckets = bucket_sizes(resolution)
    bad, good, captions, words, tokens = list(source.bad), [], [], [], []
    digests: set[bytes] = set()
    with (
        ThreadPoolExecutor() as pool,
        warnings.catch_warnings(),
        tqdm(total=len(source), desc="checking", unit=" pictures", disable=None if progress else True) as bar,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF data, without a file's name
        for start in range(0, len(source), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(source)))
            reasons = pool.map(lambda i: _reason(source, i), chunk) if decode else itertools.repeat(None)
            texts: list[str] = []
            for i, reason in zip(chunk, reasons):
                record = source.record(i)
                if reason:
                    bad.append(Bad(record.name, reason))
                    continue
                good.append(i)
                captions.append(len(record.captions))
                texts += record.captions
                digests.add(bytes.fromhex(record.digest))
            words += [len(text.split()) for text in texts]
            tokens += count_tokens(texts) if count_tokens and texts else []
            bar.update(len(chunk))
    sizes = source.sizes[np.array(good, dtype=np.int64)]
    step = max(1, len(good) // _SHOWN)
    return Report(
        resolution,
        buckets,
        sizes,
        nearest_buckets(sizes, buckets),
        np.array(captions, dtype=np.int64),
        np.array(words, dtype=np.int64),
        np.array(tokens, dtype=np.int64) if count_tokens else None,
        max_length,
        len(good) - len(digests),
        bad,
        decode,
        good[step // 2 :: step][:_SHOWN],
    )


def table(facts: dict[str, Any]) -> str:
    """The facts of a report as people like to read them."""
    pictures, bad = facts["pictures"], facts["bad"]
    lines = [f"{_count(pictures, 'picture')} with {_count(facts['captions'], 'caption')}, {bad:,} bad"]
    if not facts["decoded"]:
        lines.append("only headers were read: --decode looks at the pixels too")
    if facts["copies"]:
        lines.append(f"{_count(facts['copies'], 'picture')} the same as an earlier one, byte for byte")
    if pictures:
        lines += ["", *_spread_lines(facts), "", *_bucket_lines(facts)]
    if bad:
        lines += ["", f"bad, {bad / (pictures + bad):.2%}"]
    for reason in facts["reasons"]:
        text = f"{reason['count']:>8,}  {reason['reason']}  (such as {reason['example']})"
        lines += textwrap.wrap(text, 110, subsequent_indent=" " * 10)
    return "\n".join(lines)


def _spread_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{'':22}" + "".join(f"{name:>10}" for name in facts["width"])]
    for name in ("width", "height", "megapixels", "captions_per_picture", "words", "tokens"):
        if name in facts:
            digits = 2 if name == "megapixels" else 0
            values = "".join(f"{value:>10,.{digits}f}" for value in facts[name].values())
            lines.append(f"{name.replace('_', ' '):22}{values}")
    if "tokens" in facts:
        over, share = _count(facts["too_long"], "caption"), facts["too_long"] / facts["captions"]
        lines.append(f"{over} ({share:.1%}) of more than {facts['max_length']} tokens would lose the end")
    return lines


def _bucket_lines(facts: dict[str, Any]) -> list[str]:
    used = [bucket for bucket in facts["buckets"] if bucket["pictures"]]
    most = max(bucket["pictures"] for bucket in used)
    lines = [f"at {facts['resolution']} px{'pictures':>16}"]
    for bucket in used:
        size, count = f"{bucket['width']:>5} x {bucket['height']:<5}", bucket["pictures"]
        bar = "#" * max(1, round(40 * count / most))
        lines.append(f"{size}{count:>10,} {count / facts['pictures']:>7.1%} {bar}")
    share = facts["enlarged"] / facts["pictures"]
    lines.append(f"{_count(facts['enlarged'], 'picture')} ({share:.1%}) smaller than that would be enlarged")
    lines.append(f"{facts['cropped']:.1%} of a picture is cropped on average")
    return lines


def draw(report: Report, source: Source, title: str, path: Path) -> None:
    """A PNG: histograms of ratios, sizes and caption lengths, and some pictures as training sees them."""
    figure = new_figure(14, 8)
    figure.suptitle(
        f"{title}: {len(report.sizes):,} pictures, {len(report.bad):,} bad", parse_math=False, fontsize=14
    )
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    ratios, scales, lengths = upper.subplots(1, 3, width_ratios=(1.5, 1, 1))
    _draw_ratios(ratios, report)
    _draw_scales(scales, report)
    _draw_lengths(lengths, report)
    for axes in (ratios, scales, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    _draw_examples(lower, report, source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a script that the font does not know
        figure.savefig(path, dpi=100)


_GOOD, _WARN = "#3b6ea5", "#d1495b"


def _draw_ratios(axes: Any, report: Report) -> None:
    counts = np.bincount(report.bucket, minlength=len(report.buckets))
    labels = [f"{width} x {height}" for height, width in report.buckets]
    axes.bar(range(len(labels)), counts, color=_GOOD)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(labels) - 0.3)
    axes.set_title(f"pictures by their size at {report.resolution} px")


def _draw_scales(axes: Any, report: Report) -> None:
    octaves = np.log2(report.scale) if len(report.sizes) else np.zeros(0)
    low, high = min(-1.0, octaves.min(initial=0)), max(2.0, octaves.max(initial=0))
    edges = np.arange(np.floor(4 * low), np.ceil(4 * high) + 1) / 4
    counts, _ = np.histogram(octaves, edges)
    colors = [_GOOD if edge >= 0 else _WARN for edge in edges[:-1]]
    axes.bar(edges[:-1], counts, width=0.25, align="edge", color=colors)
    ticks = np.arange(np.floor(low), np.ceil(high) + 1)
    axes.set_xticks(ticks, [f"{2**tick:g} x" for tick in ticks])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("pictures by how much larger they are than that\n(left of 1 x: enlarged)")


def _draw_lengths(axes: Any, report: Report) -> None:
    values, unit = (report.words, "words") if report.tokens is None else (report.tokens, "tokens")
    top = max(int(values.max(initial=0)), 1)
    if report.tokens is not None:
        top = max(top, report.max_length)
        axes.axvline(report.max_length, color="black", linewidth=0.8)
        axes.annotate(
            f" {report.max_length}", (report.max_length, 1), xycoords=("data", "axes fraction"), va="top"
        )
    width = -(-(top + 1) // 40)
    edges = np.arange(0, top + width + 1, width)
    counts, _ = np.histogram(values, edges)
    beyond = edges[:-1] > (report.max_length if report.tokens is not None else np.inf)
    axes.bar(edges[:-1], counts, width=width, align="edge", color=np.where(beyond, _WARN, _GOOD))
    axes.set_title(f"captions by their {unit}")


def _draw_examples(figure: Any, report: Report, source: Source) -> None:
    """In squares that stand in one row, each with its first caption."""
    chosen = list(report.examples)
    buckets = nearest_buckets(source.sizes[chosen], report.buckets)
    for axes, i, bucket in itertools.zip_longest(figure.subplots(1, _SHOWN), chosen, buckets):
        axes.set(xticks=(), yticks=())
        axes.spines[:].set_visible(False)
        try:
            image = fit(decode_image(source.read(i)), report.buckets[bucket]) if i is not None else None
        except BadSample:
            image = None  # without decoding all, some may turn out bad
        if image is None:
            axes.axis("off")
            continue
        image.thumbnail((256, 256))
        x, y = np.array(image.size) / max(image.size)
        axes.imshow(np.asarray(image), extent=(-x, x, -y, y))
        axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), facecolor="#dddddd")
        text = textwrap.wrap(source.record(i).captions[0], 26, max_lines=4, placeholder=" …")
        axes.text(0, -1.08, "\n".join(text), ha="center", va="top", fontsize=8, parse_math=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _reason(source: Source, i: int) -> str | None:
    try:
        decode_image(source.read(i))
    except BadSample as error:
        return str(error)
    return None


def _spread(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    shares = {"least": 0, "median": 0.5, "95 %": 0.95, "most": 1}
    return dict(zip(shares, np.quantile(values, list(shares.values()), method="inverted_cdf").tolist()))


def _reasons(bad: Sequence[Bad]) -> list[dict[str, Any]]:
    """Most frequent first. Reasons that differ in their numbers alone are one."""
    groups: dict[str, list[Bad]] = {}
    for one in bad:
        groups.setdefault(re.sub(r"\d[\d,]*", "0", one.reason), []).append(one)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [{"reason": group[0].reason, "count": len(group), "example": group[0].name} for group in ordered]
