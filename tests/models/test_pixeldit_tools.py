"""The tools of diffusers, peft and torch on the PixelDiT transformers, as far as they meet what is their own,
and what a subclass computes; `test_tools.py` has what holds for every architecture."""

import pytest
import torch
from architectures import ARCHITECTURES, each
from peft import LoraConfig
from pixeldit_toys import TOYS, cast, relative_error, run, toy_inputs, toy_model
from subclasses import SUBCLASSES

from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
both = pytest.mark.parametrize("cls", TOYS, ids=["class", "text"])


@both
def test_autocast_runs_without_warnings_and_stays_near(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    if cls is PixelDiTTextTransformer2DModel:
        inputs["timestep"] = inputs["timestep"] / 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(model, inputs)
    assert relative_error(half, run(model, inputs)) < 0.1


@each({name: ARCHITECTURES[name] for name in ("pixeldit", "pixeldit_text")})
def test_the_whole_forward_compiles_with_modulation_after_the_layers(toy):
    model = toy.model(**toy.small, pixel_post_modulation=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = toy.inputs(model, (3, 5))
    for given in (inputs, inputs | toy.compiled_extra):
        assert relative_error(run(compiled, given), run(model, given)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
@both
def test_inductor_computes_the_same(cls):
    model = toy_model(cls)
    compiled = torch.compile(model, fullgraph=True)
    for grid in [(4, 4), (5, 3)]:
        inputs = toy_inputs(model, grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-4


def test_a_subclass_computes_something_of_its_own():
    toy = SUBCLASSES["pixeldit, blocks, config field and input"]
    model, parent = toy.model(), toy_model()
    posed = toy.inputs(model)
    inputs = {name: value for name, value in posed.items() if name != "attention_kwargs"}
    plain = run(model, posed)
    assert relative_error(plain, run(model, inputs)) > 1e-3
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "pose"]))
    assert torch.equal(run(model, posed), plain)  # an adapter begins with nothing to say
    model.unload_lora()
    model.load_state_dict(parent.state_dict(), strict=False)
    assert relative_error(run(model, inputs), run(parent, inputs)) > 1e-3  # the pixel block's own


@pytest.mark.gpu
@both
def test_the_gpu_computes_finite_numbers_in_bfloat16(cls):
    model = toy_model(cls).cuda().bfloat16()
    on_gpu = {name: value.cuda() for name, value in toy_inputs(model).items()}
    assert run(model, cast(on_gpu, torch.bfloat16)).isfinite().all()
