"""What dropped tokens save: operations counted as published, and the shape of a comparison by the clock."""

import dataclasses
import json

import pytest
import torch
from toy_sparse import TOY

from localdit import cli
from localdit.evaluation import masking
from localdit.evaluation.timing import Setup, Spread


@pytest.fixture
def small(monkeypatch):
    """The comparison with toy models."""
    monkeypatch.setattr(masking, "MODELS", {"cpu": ("Toy", TOY)})
    monkeypatch.setattr(masking, "XL", TOY)


def test_operations_are_counted_as_published():
    """MicroDiT Tiny with gathered experts: 20.1 and 42.6 G for a picture of 256 pixels."""
    assert masking.operations(masking.TINY, 256, 0.75) == 20_063_537_152
    assert masking.operations(masking.TINY, 256, 0.0) == 42_616_834_048


@pytest.mark.slow
@pytest.mark.parametrize(("size", "masked", "unmasked"), [(256, 94.1, 238.1), (512, 356.5, 1000.9)])
def test_the_operations_of_the_large_model_are_counted_as_published(size, masked, unmasked):
    for mask_ratio, giga in ((0.75, masked), (0.0, unmasked)):
        assert masking.operations(masking.XL, size, mask_ratio) / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_with_dropped_tokens_is_compared_with_a_whole_one(dtype):
    threads = torch.get_num_threads()
    (result,) = masking.benchmark(Setup(3, dtype, device="cpu"), size=80, batch=2)
    assert (result.device, result.model, result.dtype) == ("cpu", "Toy", dtype)
    assert (result.size, result.batch, result.pairs, result.threads) == (80, 2, 3, threads)
    assert 0 < result.ratio.low <= result.ratio.median <= result.ratio.high
    assert result.masked_seconds > 0
    assert result.unmasked_seconds > 0
    assert 1 < result.counted < 4
    assert 1 < result.counted_xl_256 < 4


@pytest.mark.usefixtures("small")
def test_the_steps_take_turns_in_alternating_order(monkeypatch):
    """Each pair has both, the first pair does not count, and a ratio is taken within its pair."""
    order, clock = [], iter([9.0, 9.0, 4.0, 1.0, 1.0, 3.0, 2.0, 1.0])

    def spy(setup, call, device):
        call()
        order.append(calls.pop())
        return next(clock)

    calls = []
    forward = masking.SparseDiTTransformer2DModel.forward

    def noting(self, *args, mask_ratio, **kwargs):
        calls.append(mask_ratio)
        return forward(self, *args, mask_ratio=mask_ratio, **kwargs)

    monkeypatch.setattr(masking.SparseDiTTransformer2DModel, "forward", noting)
    monkeypatch.setattr(Setup, "seconds", spy)
    monkeypatch.setattr(masking, "counted_ratio", lambda *_: 2.0)
    (result,) = masking.benchmark(Setup(pairs=3, device="cpu"), size=32)
    assert order == [0.0, 0.75, 0.75, 0.0, 0.0, 0.75, 0.75, 0.0]
    # Dropped 4, 3, 2; whole 1, 1, 1.
    assert (result.masked_seconds, result.unmasked_seconds) == (3.0, 1.0)
    assert result.ratio.median == pytest.approx(1 / 3)


def test_a_bad_size_is_named():
    with pytest.raises(ValueError, match="size must be a positive multiple of 16, got 100"):
        masking.benchmark(Setup(), size=100)


def test_the_command_prints_a_table_or_json(monkeypatch, capsys):
    result = masking.Result(
        device="cpu",
        model="Tiny",
        dtype="float32",
        size=256,
        batch=1,
        threads=1,
        pairs=8,
        masked_seconds=1.5,
        unmasked_seconds=3.0,
        ratio=Spread(2.0, 1.9, 2.1),
        counted=2.12,
        counted_xl_256=2.53,
        counted_xl_512=2.81,
    )
    seen = []
    monkeypatch.setattr(masking, "benchmark", lambda *args: seen.append(args) or [result])
    assert cli.main(["benchmark", "--masking"]) == 0
    assert seen == [(Setup(), 256, 1)]
    *_, row, last = capsys.readouterr().out.splitlines()
    times = ["1.500s", "3.000s", "2.00", "1.90", "to", "2.10", "2.12"]
    assert row.split() == ["cpu", "Tiny", "256", "1", *times]
    assert last == "counted for XL: 2.53 at 256 px, 2.81 at 512 px"
    assert cli.main(["benchmark", "--masking", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(result)
