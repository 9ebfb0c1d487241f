"""The speed comparison: what a slice says about a whole model, whose turn it is, and what is reported."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from torch import nn

from localdit.cli.models import markdown
from localdit.evaluation import contestants, speed
from localdit.evaluation.speed_report import comparisons, draw, heading, ratio_rows, time_rows
from localdit.evaluation.timing import Setup, Spread, spread


@pytest.fixture
def narrow(monkeypatch):
    """The comparison at a width of 24 with 32 text channels, and little to measure the machine with."""
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 32}
    monkeypatch.setattr(contestants, "WIDTH", width)
    monkeypatch.setattr(speed, "COPY_BYTES", {"cpu": 2**10})
    monkeypatch.setattr(speed, "PRODUCT_SIDE", {"cpu": 8})


class Clock:
    """A clock on which a forward takes 4 s, and 10 s more for each block."""

    def __init__(self):
        self.model = nn.Module()
        self.model.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(3))

    def __call__(self, forward):
        forward()
        return 4 + 10 * len(self.model.transformer_blocks)


def test_a_slice_tells_the_time_of_the_whole():
    """3 blocks stand for 20: the part outside the blocks counts once."""
    clock = Clock()
    runner = speed.Runner(clock.model, lambda: None, 20, clock)
    runner.run()
    assert (runner.first_seconds, runner.empty_seconds, runner.seconds) == (34, 4, [204])
    assert len(clock.model.transformer_blocks) == 3


def test_a_whole_model_is_timed_as_it_is():
    clock = Clock()
    runner = speed.Runner(clock.model, lambda: None, 3, clock)
    runner.run()
    assert (runner.empty_seconds, runner.seconds) == (0, [34])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_local_dits_are_compared_with_pixart(dtype):
    setup = Setup(pairs=3, dtype=dtype, device="cpu", cpu_time=True)
    plain, guided = speed.benchmark(setup, [48], [2], [False, True])
    assert {result.guided for result in plain} == {False}
    assert {result.guided for result in guided} == {True}
    results = guided
    assert [result.model for result in results] == ["local", "global", "pixart-alpha"]
    for result in results:
        assert (result.size, result.pairs, result.batch, result.dtype) == (48, 3, 2, dtype)
        assert (result.device, result.threads) == ("cpu", torch.get_num_threads())
        assert 0 < result.seconds.low <= result.seconds.median <= result.seconds.high
        assert result.over_floor == result.seconds.median / result.floor_seconds > 0
        assert min(result.kernels, result.moved_bytes, result.peak_bytes, result.copy_speed) > 0
    local, both, pixart = results
    for ours in (local, both):
        found = ours.ratios["pixart-alpha"]
        assert 0 < found.low <= found.median <= found.high
    assert pixart.ratios == {}
    assert both.kernels > local.kernels
    assert both.parameters > local.parameters


@pytest.mark.usefixtures("narrow")
def test_a_checkout_joins_the_default_models(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "_compare", lambda team, *_: team)
    (team,) = speed.benchmark(Setup(pairs=1, device="cpu"), [32], reference=tmp_path)
    assert [contestant.name for contestant in team] == [
        *("local", "global", "pixart-alpha"),
        *("published", "published-global"),
    ]


@pytest.mark.usefixtures("narrow")
def test_a_ratio_is_taken_within_its_round_and_the_order_alternates(monkeypatch):
    """Each contestant takes what its round says; the first round does not count."""
    order: list[str] = []
    by_round = {"local": [9.0, 1.0, 2.0, 4.0], "pixart-alpha": [1.0, 2.0, 6.0, 16.0]}

    class Scripted(speed.Runner):
        def __init__(self, model, forward, depth, clock):
            self.name = "pixart-alpha" if "PixArt" in type(model).__name__ else "local"
            self.seconds, self.first_seconds, self.costs = [], 0.0, {}

        def run(self):
            order.append(self.name[0])
            self.seconds.append(by_round[self.name][len(self.seconds)])

    monkeypatch.setattr(speed, "Runner", Scripted)
    (results,) = speed.benchmark(Setup(pairs=3, device="cpu"), [48], models=["local", "pixart-alpha"])
    assert "".join(order) == "pllppllp"
    assert results[0].seconds.median == 2
    assert results[0].ratios == {"pixart-alpha": Spread(3, 2.5, 3.5)}


@pytest.mark.usefixtures("narrow")
def test_three_rounds_are_measured_when_time_runs_out():
    (results,) = speed.benchmark(Setup(pairs=50, device="cpu"), [32], models=["local"], limit=0.0)
    assert results[0].pairs == 3


@pytest.mark.usefixtures("narrow")
def test_counts_of_the_whole_model_follow_from_a_slice(monkeypatch):
    """5 blocks counted are 5 blocks extrapolated from 3."""
    picture = contestants.Picture(64, 2, True, torch.bfloat16, torch.device("cpu"))
    family = dataclasses.replace(contestants.FAMILIES["global"], depth=5)
    monkeypatch.setitem(contestants.FAMILIES, "global", family)
    from_three = speed._count("global", picture, None)
    monkeypatch.setattr(speed, "SLICE", 5)
    assert speed._count("global", picture, None) == from_three


@pytest.mark.usefixtures("narrow")
def test_the_report_has_a_table_of_times_one_of_ratios_and_a_picture(tmp_path):
    models = ["local", "pixart-alpha"]
    results = [
        result
        for found in speed.benchmark(Setup(1, device="cpu"), [32, 48], models=models)
        for result in found
    ]
    assert json.loads(json.dumps([dataclasses.asdict(result) for result in results]))[0]["model"] == "local"
    assert [[one.size for one in found] for found in comparisons(results)] == [[32, 32], [48, 48]]
    assert heading(results).startswith(
        f"CPU, {torch.get_num_threads()} threads: 32 px, batch 1, no guidance, float32, 1 rounds"
    )
    head, first, second = time_rows(results[:2])
    assert len(head) == len(first) == len(second)
    assert (first[0], second[0]) == ("LocalDiT", "PixArt-alpha XL")
    assert (head[-1], first[-1]) == ("first call", f"{results[0].first_seconds:.3g} s")
    head, row = ratio_rows(results[:2])
    assert head == ["times as fast as", "PixArt-alpha XL"]
    assert row[0] == "LocalDiT"
    assert row[1].startswith(f"{results[0].ratios['pixart-alpha'].median:.2f} (")
    assert ratio_rows(results[1:2]) == []

    draw(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000

    draw([dataclasses.replace(results[0], error="out of memory")], tmp_path / "failed.png")
    with Image.open(tmp_path / "failed.png") as picture:
        assert picture.width > picture.height  # empty, and no error


@pytest.mark.usefixtures("narrow")
def test_on_a_gpu_one_that_fails_leaves_the_others(monkeypatch):
    """Errors of arguments are raised."""
    picture = contestants.Picture(32, 1, False, torch.float32, torch.device("cpu"))
    enter = speed._enter

    def enter_or_fail(contestant, picture, *others):
        if contestant.model == "pixart-alpha":
            raise failure
        return enter(contestant, dataclasses.replace(picture, device=torch.device("cpu")), *others)

    monkeypatch.setattr(speed, "_enter", enter_or_fail)
    on_gpu = dataclasses.replace(picture, device=torch.device("cuda"))
    team = [contestants.Contestant(name) for name in ("local", "pixart-alpha")]
    failure = MemoryError("out of memory\nTry less")
    local, pixart = speed._compare(team, on_gpu, Setup(pairs=1), None, None, (1e9, 1e9))
    assert (local.error, pixart.error) == ("", "out of memory")
    assert local.seconds.median > pixart.seconds.median == 0
    assert local.ratios == {}
    failure = ValueError("no checkout")
    with pytest.raises(ValueError, match="no checkout"):
        speed._compare(team, on_gpu, Setup(pairs=1), None, None, (1e9, 1e9))


def test_one_that_failed_is_in_the_table():
    result = speed.Result(
        "cuda", "float32", 64, 1, 1, 0, True, "local", "LocalDiT", 18, 120, error="out of memory"
    )
    rows = time_rows([result])
    assert rows[1][:2] == ["LocalDiT", "failed: out of memory"]
    assert markdown(rows).endswith("| LocalDiT | failed: out of memory | - | - | - | - | - | - | - | - | - |")


def test_quartiles_and_median():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)


def test_threads_hold_for_the_comparison_alone():
    before = torch.get_num_threads()
    with Setup(threads=before + 2, device="cpu").devices():
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("setup", "arguments", "message"),
    [
        ({}, {"sizes": [1000]}, "size must be a positive multiple of 16, got 1000"),
        ({}, {"sizes": [48], "models": ["sana-0.6b"]}, "size must be a multiple of 32 for sana-0.6b, got 48"),
        ({}, {"batches": [1, 0]}, "batch must be at least 1, got 0"),
        ({"pairs": 0}, {}, "pairs must be at least 1, got 0"),
        ({"threads": 0}, {}, "threads must be at least 1, got 0"),
        ({"dtype": "float8"}, {}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"device": "cuda", "cpu_time": True}, {}, "cpu_time must be False on cuda"),
        ({"device": "tpu"}, {}, "device must be one of cpu.* here, got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(setup, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(speed.benchmark(Setup(**{"device": "cpu"} | setup), **arguments))
