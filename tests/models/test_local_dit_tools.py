"""The tools of diffusers, peft and torch on the LocalDiT transformer, as far as they meet what is its own;
`test_tools.py` has what holds for every architecture."""

import pytest
import torch
from architectures import ARCHITECTURES, assert_compiles_with_its_gradients, with_lora
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from toys import relative_error, run, toy_inputs, toy_model

from localdit.models.local_dit import LocalDiTTransformer2DModel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

COMPILED = ARCHITECTURES["local_dit"].small


def test_a_variant_is_saved_beside_the_whole_precision(tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert LocalDiTTransformer2DModel.from_pretrained(tmp_path).dtype == torch.float32
    half = LocalDiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert all(torch.equal(half.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_the_declaration_that_layerwise_casting_reads_names_what_is_kept():
    patterns = LocalDiTTransformer2DModel._skip_layerwise_casting_patterns
    assert set(patterns) >= {"pos_embed", "norm", "adaln_single"}


def test_the_whole_forward_compiles_with_full_attention():
    model = toy_model(**COMPILED, full_attention_layers=(0,))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid in [(8, 9), (5, 7)]:
        inputs = toy_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


@pytest.mark.parametrize("global_context", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_blocks_that_are_compiled_for_any_size_are_one_graph_whatever_their_shift(global_context):
    config = {"num_layers": 2, "window_size": 2, "global_context": global_context}
    model, plain = toy_model(**config), toy_model(**config)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    # Of the first no two numbers are equal by chance, which the compiler would take for a rule.
    for grid in [(10, 14), (18, 6)]:
        inputs = toy_inputs(grid, batch=3)
        assert relative_error(run(model, inputs), run(plain, inputs)) < 1e-5
    assert counter.frame_count == 1


def sees_every_token(module: nn.Module, name: str) -> bool:
    """The linear layers that are worth float8, as docs/performance.md names them."""
    few_rows = (".squeeze", ".excite", ".attn2.to_k", ".attn2.to_v")  # once per picture, or per prompt
    return (
        isinstance(module, nn.Linear)
        and name.startswith("transformer_blocks.")
        and not name.endswith(few_rows)
    )


def test_the_matrices_of_the_blocks_may_be_float8():
    quantization = pytest.importorskip("torchao.quantization")
    plain, model, inputs = toy_model(), toy_model(), toy_inputs((5, 7))
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig(), filter_fn=sees_every_token)
    quantized = {name for name, p in model.named_parameters() if type(p) is not nn.Parameter}
    chosen = {name for name, module in plain.named_modules() if sees_every_token(module, name)}
    assert quantized == {f"{name}.weight" for name in chosen}
    assert len(quantized) == 4 * 9
    prediction = run(model, inputs)
    assert 0 < relative_error(prediction, run(plain, inputs)) < 0.2
    names = ("encoder_hidden_states", "encoder_attention_mask")
    context = model.encode_text(*(inputs.pop(name) for name in names))
    assert relative_error(run(model, inputs | {names[0]: context}), prediction) < 1e-5


def test_a_compiled_model_gives_the_same_gradients():
    assert_compiles_with_its_gradients(toy_model(**COMPILED), toy_inputs((5, 7)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
@pytest.mark.parametrize("global_context", [False, True])
def test_inductor_computes_the_same(global_context):
    model = toy_model(num_layers=2, window_size=2, global_context=global_context)  # one block is shifted
    compiled = torch.compile(model, fullgraph=True)
    for grid in [(8, 8), (5, 7)]:
        inputs = toy_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


def test_a_lora_on_the_global_contexts_own_layers_is_the_same_fused_into_them():
    """The 1x1 takes the squeeze-excite scale into its weight, which an adapter beside it does not see."""
    layers = ("pointwise", "squeeze", "to_kv")
    model = toy_model(num_layers=2)
    inputs = toy_inputs((5, 7), batch=3)
    plain = run(model, inputs)
    adapted = run(with_lora(model, layers), inputs)
    assert relative_error(adapted, plain) > 1e-3
    model.fuse_lora()
    model.unload_lora()
    assert relative_error(run(model, inputs), adapted) < 1e-5


def test_a_lora_compiles():
    model, inputs = with_lora(toy_model(**COMPILED)), toy_inputs((5, 7))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
