"""What one denoising step takes is measured in a process of its own, and told in a table."""

from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from PIL import Image

from localdit.evaluation import streaming
from localdit.evaluation.streaming import HEAD, Case, Result, benchmark, draw, measure, row

TOY = {"num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 16}


@pytest.mark.skipif(not streaming._CLEAR.exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("max_tokens", [16, None])
def test_a_step_is_measured_in_bands_and_whole(monkeypatch, max_tokens):
    monkeypatch.setattr(streaming, "WIDTH", TOY)
    result = measure(Case(size=128, blocks=2, max_tokens=max_tokens))
    assert result.tokens == 64
    assert result.weight_bytes > 4 * 2 * 16 * 24**2  # the matrices of two blocks
    assert result.peak_bytes >= 0
    assert result.seconds > 0
    assert result.cpu_seconds > 0


def test_a_process_that_fails_is_told_with_its_error():
    with pytest.raises(RuntimeError, match="nowhere"):
        list(benchmark([Case(size=16, device="nowhere")]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 500}, "size must be a positive multiple of 16, got 500"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_a_case_that_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Case(**{"size": 512} | fields)


def test_a_line_of_the_table_says_what_was_measured():
    case = Case(size=8192, dtype="bfloat16")
    whole = replace(case, size=512, max_tokens=None, global_context=False)
    results = [
        Result(case, 262_144, 10**9, 2_040_000_000, 571.6, 67.6),
        Result(whole, 1024, 1, 10**8, 1.0, 0.5),
    ]
    head, rule = HEAD.splitlines()
    banded, plain = map(row, results)
    assert head.count("|") == rule.count("|") == banded.count("|")
    assert banded == "| 8192 | 262,144 | 18 | with | bfloat16 | 8,192 | 2.04 GB | 571.6 | 67.6 |"
    assert plain == "| 512 | 1,024 | 18 | without | bfloat16 | whole | 0.10 GB | 1.0 | 0.5 |"


def test_the_plot_has_a_line_for_each_model_and_a_point_for_each_size(tmp_path):
    case, taken = Case(size=512), (1024, 10**9, 10**8, 1.0, 0.5)
    results = [Result(replace(case, size=size), *taken) for size in (512, 1024)]
    draw([*results, Result(replace(case, global_context=False), *taken)], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        shades = {shade for _, shade in picture.convert("RGB").getcolors(2**24)}
    assert {(31, 119, 180), (255, 127, 14)} <= shades  # matplotlib's first two colours


def test_the_axes_of_the_plot_have_numbers_within_a_decade(monkeypatch, tmp_path):
    """Peaks of 0.2 to 0.9 GB stand between two powers of ten."""
    seen: list[str] = []

    def read(figure: Figure, *_: object, **__: object) -> None:
        figure.canvas.draw()
        seen.extend(label.get_text() for label in figure.axes[0].get_yticklabels())

    monkeypatch.setattr(Figure, "savefig", read)
    peaks = {512: 200_000_000, 1024: 900_000_000}
    draw(
        [Result(Case(size), 1024, 10**9, peak, 1.0, 0.5) for size, peak in peaks.items()], tmp_path / "a.png"
    )
    assert {"0.2", "0.5"} <= set(seen)
