"""The tools of diffusers, peft and torch on the SparseDiT transformer, as far as they meet what is its own,
and what subclasses of it compute; `test_tools.py` has what holds for every architecture."""

import pytest
import torch
from architectures import ARCHITECTURES, assert_compiles_with_its_gradients, each
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from subclasses import SUBCLASSES, GatedSparseDiT
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_sparse import TOY, sparse_inputs, toy_sparse
from toys import relative_error, run

from localdit.models.sparse_dit import SparseDiTTransformer2DModel

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # Dynamo's own, wherever it meets an autograd.Function.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
]

COMPILED = ARCHITECTURES["sparse_dit"].small


def test_a_missing_tensor_is_named(tmp_path):
    toy_sparse().save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights["transformer_blocks.1.ff.experts_in"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"missing \(1\):\s+transformer_blocks\.1\.ff\.experts_in"):
        SparseDiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_dry_run_of_training_on_fake_tensors_works():
    """Tools that plan memory or count operations run the model on tensors without data."""
    with FakeTensorMode():
        model = SparseDiTTransformer2DModel(**TOY).train()
        assert model(**sparse_inputs((3, 5)), mask_ratio=0.5).sample.shape == (2, 4, 6, 10)


def test_fusing_the_projections_reaches_the_attention_to_text():
    model = toy_sparse()
    model.fuse_qkv_projections()
    assert all(block.attn2.fused_projections for block in model._blocks)


def test_a_compiled_model_gives_the_same_gradients_with_dropped_tokens():
    model, inputs = toy_sparse(**COMPILED).train(), sparse_inputs((3, 5))
    dropped = {"mask_ratio": 0.5, "mask_noise": torch.rand(2, 15)}
    assert_compiles_with_its_gradients(model, inputs | dropped)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
def test_inductor_computes_the_same():
    model = toy_sparse(**COMPILED)
    compiled = torch.compile(model, fullgraph=True)
    for grid in [(4, 4), (3, 5)]:
        inputs = sparse_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


def test_a_lora_can_reach_the_experts():
    """By peft's `target_parameters`: no linear layer holds them."""
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=[], target_parameters=["ff.experts_in"]))
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapted
    assert all(".ff." in name for name in adapted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    assert relative_error(run(model, inputs), plain) > 1e-2


@each({name: toy for name, toy in SUBCLASSES.items() if issubclass(toy.cls, SparseDiTTransformer2DModel)})
def test_a_subclass_computes_something_of_its_own(toy):
    model, parent = toy.model(), toy_sparse()
    result = model.load_state_dict(parent.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".gate" in key or ".pose." in key for key in result.missing_keys)
    assert relative_error(run(model, toy.inputs(model)), run(parent, sparse_inputs((5, 7)))) > 1e-3


def test_an_untrained_subclass_is_initialised_like_its_parent():
    model = GatedSparseDiT(**TOY)
    assert all((block.gate == 1).all() for block in model._blocks)
    assert not any(block.adaln.weight.any() for block in model._blocks)
    assert not model.proj_out.weight.any()
