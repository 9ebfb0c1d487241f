"""Who competes: published sizes, names and options, and the hook for a checkout of the published LocalDiT."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from localdit.evaluation import contestants
from localdit.evaluation.contestants import FAMILIES, Contestant, Picture, parse

META = Picture(1024, 1, False, torch.float32, torch.device("meta"))
SMALL = Picture(64, 1, True, torch.float32, torch.device("cpu"))

# The processor of a checkout: its signature, as published, and attention over nothing.
CHECKOUT = """
class GCAttnProcessor2_0:
    def __init__(self, window_size, num_heads, use_global, shift_size, dim, do_rope, device, dtype):
        self.options = (window_size, num_heads, use_global, shift_size, dim, do_rope)

    def set_image_size(self, height, width):
        self.size = (height, width)

    def __call__(self, attn, hidden_states, **kwargs):
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return attn.to_out[0](attn.norm_q(q.unflatten(-1, (attn.heads, -1))).flatten(2) + k + v)
"""


@pytest.fixture
def narrow(monkeypatch):
    """Widths of 24, with 32 text channels."""
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 32}
    monkeypatch.setattr(contestants, "WIDTH", width)
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24}
    for config in (contestants.SANA_600M, contestants.SANA_1600M):
        for name, value in (width | cross).items():
            monkeypatch.setitem(config, name, value)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    path = tmp_path / "localdit/models/attentions.py"
    path.parent.mkdir(parents=True)
    path.write_text(CHECKOUT)
    return tmp_path


def test_every_contestant_has_the_published_size():
    found = {}
    for name in ("local", "global", "pixart-alpha", "pixart-sigma", "sana-0.6b", "sana-1.6b"):
        model, _ = Contestant(name).build(META, 1)
        block = sum(p.numel() for p in model.transformer_blocks.parameters())
        rest = sum(p.numel() for p in model.parameters()) - block
        found[name] = rest + FAMILIES[name].depth * block
    assert found == {
        "local": 398_780_368,
        "global": 518_662_672,
        "pixart-alpha": 611_349_152,
        "pixart-sigma": 610_856_096,
        "sana-0.6b": 591_747_872,
        "sana-1.6b": 1_604_462_752,
    }


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "name", ["local", "global", "pixart-alpha", "pixart-sigma", "sana-0.6b", "sana-1.6b"]
)
def test_every_contestant_predicts_noise_for_its_picture(name: str):
    model, forward = Contestant(name).build(SMALL, 2)
    for weight, parameter in model.named_parameters():
        assert parameter.std() > 0.01, weight
    sample = forward().sample
    side = 64 // 32 if name.startswith("sana") else 64 // 8
    assert sample.shape[0] == 2
    assert sample.shape[2:] == (side, side)
    assert sample.isfinite().all()
    assert len(model.transformer_blocks) == 2


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("name", "is_global"), [("published", False), ("published-global", True)])
def test_the_attention_of_a_checkout_is_put_into_pixart(checkout: Path, name: str, is_global: bool):
    model, forward = Contestant(name).build(SMALL, 6, checkout)
    assert forward().sample.isfinite().all()
    processors = [block.attn1.processor for block in model.transformer_blocks]
    assert [processor.options for processor in processors] == [
        (4, 2, is_global, shift, 24, True) for shift in (0, 1, 2, 3, 0, 1)
    ]
    assert {processor.size for processor in processors} == {(4, 4)}
    assert isinstance(model.transformer_blocks[0].attn2.norm_k, nn.Module)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "reference must be a checkout of the published LocalDiT: .*attentions.py is not there"),
        ("import nothing_of_this_name", "attentions.py does not load: No module named"),
        ("class Other: pass", "attentions.py does not load: .*GCAttnProcessor2_0"),
        (
            "class GCAttnProcessor2_0: pass",
            "is another LocalDiT than the published one: .* takes no arguments",
        ),
    ],
)
def test_what_is_no_checkout_is_named(checkout: Path, source: str | None, message: str):
    path = checkout / "localdit/models/attentions.py"
    if source is None:
        path.unlink()
    else:
        path.write_text(source)
    with pytest.raises(ValueError, match=message):
        Contestant("published").build(SMALL, 1, checkout)


@pytest.mark.usefixtures("narrow")
def test_options_say_how_a_model_runs(monkeypatch):
    compiled, flash = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    model, forward = Contestant("pixart-sigma", ("cudnn", "compiled")).build(SMALL, 2)
    assert compiled == list(model.transformer_blocks)
    model.register_forward_pre_hook(lambda *_: flash.append(torch.backends.cuda.flash_sdp_enabled()))
    forward()
    assert flash == [False]
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.usefixtures("narrow")
def test_each_contestant_is_compiled_for_itself(monkeypatch):
    """For the attention that it asked for, and for its own length of text."""
    seen: list[bool] = []
    symbols: set[type] = set()

    def look(graph, inputs):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        symbols.update(type(x) for x in inputs)
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: look)
    torch._dynamo.reset()
    for contestant in parse(
        ["pixart-alpha:cudnn+compiled", "pixart-sigma:compiled", "pixart-sigma:cudnn+compiled"], None, "cuda"
    ):
        _, forward = contestant.build(SMALL, 1)
        forward()
    torch._dynamo.reset()
    assert seen == [False, True, False]
    assert symbols <= {torch.Tensor, nn.Parameter}  # no size is left open


def test_a_graph_is_recorded_once_and_takes_what_its_recording_took(monkeypatch):
    """CUDA is played here: memory in use before, the peak of the recording, and what is called."""
    called: list[str] = []
    cuda = mock.MagicMock()
    cuda.memory_allocated.return_value = 1000
    cuda.max_memory_allocated.return_value = 1700
    cuda.CUDAGraph.return_value.replay = lambda: called.append("played")
    monkeypatch.setattr(torch, "cuda", cuda)
    forward = contestants.Graphed(lambda: called.append("run"))
    forward()
    forward()
    assert called == ["run"] * 4 + ["played"] * 2
    assert cuda.graph.call_count == 1
    assert forward.peak_bytes == 700


def test_options_follow_a_colon():
    assert parse(["local", "pixart-sigma:cudnn+compiled"], None, "cuda") == [
        Contestant("local"),
        Contestant("pixart-sigma", ("cudnn", "compiled")),
    ]
    assert Contestant("pixart-sigma", ("cudnn", "compiled")).name == "pixart-sigma:cudnn+compiled"


def test_a_checkout_is_for_the_published_models():
    assert parse(["local", "published"], Path("checkout"), "cpu")[1] == Contestant("published")
    with pytest.raises(ValueError, match="a reference is for published and published-global among"):
        parse(["local"], Path("checkout"), "cpu")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["flux"], "models must be among local, .*, got 'flux'"),
        (["local:fast"], "options of models must be among torch, .*, got 'local:fast'"),
        (["sana-0.6b:torch"], "the option torch is for LocalDiT's own models, got 'sana-0.6b:torch'"),
        (["pixart-sigma:cudnn"], "the option cudnn needs the device cuda, got 'pixart-sigma:cudnn' on cpu"),
        (["published"], "published needs a reference, a checkout of the published LocalDiT, got none"),
        (["local", "global", "local"], "models must differ from each other, got local global local"),
    ],
)
def test_who_cannot_compete_is_named(names: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse(names, None, "cpu")
