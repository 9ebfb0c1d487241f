"""The tools of diffusers, peft and torch on the LEDiT transformer, as far as they meet what is its own, and
what subclasses of it compute; `test_tools.py` has what holds for every architecture."""

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, assert_compiles_with_its_gradients, each
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName
from ledit_toys import LEDIT_TOY, ledit_inputs, toy_ledit
from subclasses import SUBCLASSES, GatedLEDiT, SharpLEDiT, SharpLEDiTProcessor
from toys import relative_error, run

from localdit.models.ledit import LEDiTTransformer2DModel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

COMPILED = ARCHITECTURES["ledit"].small


class NamedLEDiT(GatedLEDiT):
    """Adds a config field, and hands its parent's on."""

    @register_to_config
    def __init__(self, style: str = "plain", **kwargs: Any):
        super().__init__(**kwargs)


@each({name: toy for name, toy in SUBCLASSES.items() if issubclass(toy.cls, LEDiTTransformer2DModel)})
def test_a_subclass_computes_something_of_its_own(toy):
    model, parent = toy.model(), toy_ledit(**toy.config)
    result = model.load_state_dict(parent.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".gate" in key or ".pose." in key for key in result.missing_keys)
    assert relative_error(run(model, toy.inputs(model)), run(parent, ledit_inputs((5, 7)))) > 1e-3
    assert LEDiTTransformer2DModel._repeated_blocks == ["LEDiTBlock"]


@pytest.mark.parametrize("cls", [LEDiTTransformer2DModel, GatedLEDiT, SharpLEDiT])
def test_an_input_that_no_block_takes_is_refused_by_name(cls):
    with pytest.raises(ValueError, match=r"attention_kwargs.*posture"):
        toy_ledit(cls)(**ledit_inputs() | {"attention_kwargs": {"posture": torch.ones(2, 3)}})


def test_an_untrained_subclass_is_initialised_like_its_parent():
    model = GatedLEDiT(**LEDIT_TOY)
    assert all(torch.equal(block.gate, torch.ones(24)) for block in model.transformer_blocks)
    assert not any(block.modulation.weight.any() for block in model.transformer_blocks)


def test_a_subclass_may_add_config_fields(tmp_path):
    model = NamedLEDiT(**LEDIT_TOY, style="fancy", causal_variant="rectangle").eval()
    model.save_pretrained(tmp_path)
    model.save_single_file(tmp_path / "model.safetensors")
    loaded = NamedLEDiT.from_pretrained(tmp_path)
    assert (loaded.config.style, loaded.config.causal_variant) == ("fancy", "rectangle")
    loaded = NamedLEDiT.from_single_file(tmp_path / "model.safetensors")
    assert (loaded.config.style, loaded.config.causal_variant) == ("fancy", "rectangle")
    assert torch.equal(run(loaded, ledit_inputs()), run(model, ledit_inputs()))


@pytest.mark.usefixtures("default_backend")
@pytest.mark.filterwarnings("ignore:\nflex_attention called without", "ignore:flex_attention called without")
@pytest.mark.parametrize("variant", ["raster", "rectangle", "neighborhood", "corner"])
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_every_causal_mask_follows_the_backend(backend, variant):
    """FlexAttention takes its own form of the mask, by blocks."""
    model, inputs = toy_ledit(causal_variant=variant), ledit_inputs((5, 7))
    plain = run(model, inputs)
    model.set_attention_backend(backend)
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName(backend)}
    assert relative_error(run(model, inputs), plain) < 1e-5
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


def test_one_processor_can_be_set_for_every_attention():
    model, inputs = toy_ledit(), ledit_inputs()
    plain, processors = run(model, inputs), model.attn_processors
    model.set_attn_processor(SharpLEDiTProcessor())
    assert relative_error(run(model, inputs), plain) > 1e-3
    model.set_attn_processor(dict(processors))
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_a_compiled_model_gives_the_same_gradients(prob):
    """In training mode: the draw of the dilation is part of the graph."""
    model = toy_ledit(**COMPILED, multi_dilation_prob=prob).train()
    assert_compiles_with_its_gradients(model, ledit_inputs((5, 7)))


def test_a_model_of_both_kinds_of_attention_exports():
    model, inputs = toy_ledit(num_layers=2), ledit_inputs((5, 7))
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=False)
    (sample,) = program.module()(**inputs, return_dict=False)
    assert relative_error(sample.detach(), run(model, inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
@pytest.mark.parametrize(
    "backend",
    [
        "native",
        pytest.param(
            "flex",
            marks=pytest.mark.xfail(
                reason="PyTorch 2.13 has no code on a CPU for queries that are a view of a product",
                strict=True,
            ),
        ),
    ],
)
@pytest.mark.usefixtures("default_backend")
def test_inductor_computes_the_same(backend):
    model = toy_ledit(num_layers=2, attention_head_dim=16)
    plain = {grid: run(model, ledit_inputs(grid)) for grid in [(4, 4), (5, 7)]}
    model.set_attention_backend(backend)
    model.compile_repeated_blocks(fullgraph=True)
    for grid, expected in plain.items():
        assert relative_error(run(model, ledit_inputs(grid)), expected) < 1e-5
