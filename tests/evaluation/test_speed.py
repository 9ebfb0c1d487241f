"""The speed comparison: what a slice says about a whole model, and the shape of the results."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from localdit.evaluation import speed


def test_a_slice_tells_the_time_of_the_whole(monkeypatch):
    """3 blocks stand for 20: the part outside the blocks counts once."""
    clock = 0.0

    class Model(nn.Module):
        """Its forward takes 4 s, and 10 s more for each block."""

        def __init__(self):
            super().__init__()
            self.transformer_blocks = nn.ModuleList(nn.Identity() for _ in range(3))

        def forward(self, hidden_states):
            nonlocal clock
            clock += 4 + 10 * len(self.transformer_blocks)

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock))
    model = Model()
    contestant = speed.Contestant(model, {"hidden_states": torch.zeros(1)}, depth=20)
    contestant.run()
    assert (contestant.empty_seconds, contestant.seconds) == (4, [204])
    assert len(model.transformer_blocks) == 3


@pytest.fixture
def narrow(monkeypatch):
    """The comparison at a width of 24 with 32 text channels."""
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 32}
    monkeypatch.setattr(speed, "WIDTH", width)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_local_dits_are_compared_with_pixart(narrow, dtype):
    results = speed.benchmark(size=48, pairs=3, batch=2, dtype=dtype, device="cpu")
    assert [result.global_context for result in results] == [False, True]
    for result in results:
        assert (result.size, result.pairs, result.batch, result.dtype) == (48, 3, 2, dtype)
        assert (result.device, result.threads) == ("cpu", torch.get_num_threads())
        assert 0 < result.ratio_low <= result.ratio <= result.ratio_high
        assert result.seconds > 0
    assert results[0].pixart_seconds == results[1].pixart_seconds


def test_threads_hold_for_the_comparison_alone(monkeypatch):
    monkeypatch.setattr(speed, "_compare", lambda *arguments: [torch.get_num_threads()])
    before = torch.get_num_threads()
    assert speed.benchmark(threads=before + 2, device="cpu") == [before + 2]
    assert torch.get_num_threads() == before


def test_the_contestants_are_the_published_models():
    """On the meta device, as on CUDA, the models are whole."""
    contestants = speed._contestants(1024, 1, torch.float32, torch.device("meta"))
    assert [sum(p.numel() for p in contestant.model.parameters()) for contestant in contestants] == [
        398_780_368,
        518_662_672,
        611_349_152,
    ]
    assert [contestant.depth for contestant in contestants] == [18, 18, 28]


def test_no_weight_of_a_contestant_is_silent(narrow):
    for contestant in speed._contestants(48, 1, torch.float32, torch.device("cpu")):
        for name, parameter in contestant.model.named_parameters():
            assert parameter.std() > 0.01, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1000}, "size must be a positive multiple of 16, got 1000"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"device": "tpu"}, "device must be one of cpu.* here, got 'tpu'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        speed.benchmark(**arguments)
