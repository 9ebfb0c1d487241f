"""The LocalDiT transformer by its Triton kernels: who chooses them, and that the prediction stays the same.

Without CUDA the kernels run in Triton's interpreter, on the tensors of the CPU.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toys import naive, relative_error, run, toy_inputs, toy_model

from localdit.kernels import interpreted
from localdit.kernels import window_attention_triton as twin
from localdit.models.local_dit import FusedGELU, LocalDiTTransformer2DModel

TOLERANCE = 2e-6

in_the_interpreter = pytest.mark.skipif(not interpreted(), reason="the kernels are compiled here")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each window attention that Triton computes."""
    counted: list[int] = []
    attend = twin.window_attention_triton

    def counting(*args: Any) -> Tensor:
        counted.append(1)
        return attend(*args)

    monkeypatch.setattr(twin, "window_attention_triton", counting)
    return counted


def with_kernels(kernels: str, **config: Any) -> LocalDiTTransformer2DModel:
    model = toy_model(**config)
    model.set_kernels(kernels)
    return model


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of each parameter, and of the noisy sample."""
    sample = inputs["hidden_states"].clone().requires_grad_()
    model.zero_grad()
    prediction = model(**inputs | {"hidden_states": sample}).sample
    weights = torch.linspace(-1, 1, prediction.numel(), device=prediction.device).view_as(prediction)
    (prediction * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"hidden_states": sample.grad}


# --- The numbers


@in_the_interpreter
@pytest.mark.parametrize(
    ("config", "grid", "batch"),
    [
        ({"global_context": False, "relative_position_bias": True}, (8, 6), 1),
        ({"num_attention_heads": 1}, (5, 7), 2),
        ({"relative_position_bias": False, "full_attention_layers": (1,)}, (4, 4), 1),
        ({"window_size": 2, "num_layers": 2}, (3, 6), 2),
        ({"window_size": 8, "num_layers": 2, "rope": False}, (9, 5), 1),
    ],
    ids=str,
)
def test_the_kernels_predict_what_the_naive_twin_does(config, grid, batch, launches):
    """Four blocks in windows of 4 take all shifts."""
    model = with_kernels("triton", **config)
    inputs = toy_inputs(grid, batch)
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE
    assert len(launches) == model.config.num_layers - len(model.config.full_attention_layers)


@in_the_interpreter
@pytest.mark.parametrize(
    "config", [{}, {"global_context": False, "relative_position_bias": True}], ids=["with context", "without"]
)
def test_the_kernels_give_every_gradient(config, launches):
    """With windows of 4, in some of which nothing is, and shifts of 0 and 1."""
    model, inputs = toy_model(num_attention_heads=1, num_layers=2, **config), toy_inputs((3, 5), batch=2)
    plain = gradients(model, inputs)
    assert not launches
    model.set_kernels("triton")
    for name, gradient in gradients(model, inputs).items():
        assert relative_error(gradient, plain.pop(name)) < 2e-5, name
    assert not plain
    assert launches


@in_the_interpreter
def test_dropout_and_checkpointing_stay_what_they_are(launches):
    """Dropout comes after the attention, on tokens in raster order, whoever attends."""
    model, inputs = toy_model(dropout=0.3, num_layers=2, window_size=2).train(), toy_inputs((3, 5))
    torch.manual_seed(0)
    plain = gradients(model, inputs)
    model.set_kernels("triton")
    model.enable_gradient_checkpointing()
    torch.manual_seed(0)
    for name, gradient in gradients(model, inputs).items():
        assert relative_error(gradient, plain[name]) < 2e-5, name
    assert len(launches) == 4


@in_the_interpreter
def test_fused_projections_are_read_by_the_kernels():
    model, inputs = with_kernels("triton", num_layers=2, window_size=2), toy_inputs((3, 5))
    apart = run(model, inputs)
    model.fuse_qkv_projections()
    assert relative_error(run(model, inputs), apart) < TOLERANCE


def test_an_adapter_around_a_convolution_of_the_global_context_speaks():
    """It convolves maps alone, so that the kernel makes way for it."""
    model = toy_model(num_layers=2, window_size=2, num_attention_heads=1)
    inputs = toy_inputs((3, 5), batch=3, num_attention_heads=1)
    plain = run(model, inputs)
    with pytest.warns(UserWarning, match="Merging is not supported"):  # of depthwise convolutions
        model.add_adapter(LoraConfig(r=12, target_modules=["depthwise"], init_lora_weights=False))
    adapted = run(model, inputs)
    assert relative_error(adapted, plain) > 1e-3
    model.set_kernels("triton")
    assert relative_error(run(model, inputs), adapted) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("global_context", [False, True])
def test_a_gpu_predicts_what_the_naive_twin_does_and_trains(global_context, launches):
    model, inputs = toy_model(global_context=global_context), toy_inputs((5, 7), batch=3)
    expected = naive(model, inputs)
    model = model.cuda()
    added = {key: x.cuda() for key, x in inputs.pop("added_cond_kwargs").items()}
    inputs = {key: x.cuda() for key, x in inputs.items()} | {"added_cond_kwargs": added}
    assert relative_error(run(model, inputs).cpu(), expected) < 1e-5
    assert len(launches) == 4
    found = gradients(model, inputs)
    model.set_kernels("torch")
    for name, gradient in gradients(model, inputs).items():
        assert relative_error(found[name], gradient) < 1e-4, name


# --- The choice


def test_on_a_cpu_nothing_changes_by_itself(launches):
    model, inputs = toy_model(), toy_inputs()
    automatic = run(model, inputs)
    model.set_kernels("torch")
    assert torch.equal(run(model, inputs), automatic)
    assert not launches


@in_the_interpreter
@pytest.mark.usefixtures("default_backend")
def test_a_backend_of_diffusers_goes_first(launches):
    model, inputs = with_kernels("triton", num_layers=1), toy_inputs((3, 5))
    model.set_attention_backend("native")
    run(model, inputs)
    assert not launches
    model.reset_attention_backend()
    run(model, inputs)
    assert launches


def test_the_choice_reaches_every_module_that_has_one():
    model = with_kernels("torch")
    assert {module.kernels for module in model.modules() if hasattr(module, "kernels")} == {"torch"}
    assert toy_model().transformer_blocks[0].attn1.kernels == "auto"


def test_a_choice_that_cannot_be_is_refused(monkeypatch):
    model = toy_model()
    with pytest.raises(ValueError, match="kernels must be one of auto, triton, torch, got 'cuda'"):
        model.set_kernels("cuda")
    monkeypatch.setattr("localdit.kernels.HAS_TRITON", False)
    with pytest.raises(ImportError, match="needs Triton, which is not installed"):
        model.set_kernels("triton")
    model.set_kernels("auto")
    assert run(model, toy_inputs()).isfinite().all()


# --- The product's epilogue


class OnCuda(Tensor):
    """A tensor of the CPU that takes itself for one of CUDA."""

    is_cuda = True


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of each product whose epilogue is GELU, which is computed as CUDA does."""
    seen: list[torch.dtype] = []

    def as_on_cuda(bias: Tensor, x: Tensor, weight: Tensor, use_gelu: bool) -> Tensor:
        seen.append(x.dtype)
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", as_on_cuda)
    return seen


def listen(layer: nn.Module, calls: list[nn.Module]) -> None:
    layer.register_forward_hook(lambda module, *_: calls.append(module))


def come_before(layer: nn.Module, calls: list[nn.Module]) -> None:
    layer.register_forward_pre_hook(lambda module, *_: calls.append(module))


def offload(layer: nn.Module, calls: list[nn.Module]) -> None:
    """As diffusers does, group by group: what it fetches is there when the layer is called, not before."""

    class Fetch(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(layer).register_hook(Fetch(), "fetch")


@pytest.mark.parametrize("waits", [None, listen, come_before, offload])
def test_the_epilogue_makes_way_for_whoever_waits_for_the_layer(waits, epilogues):
    layer, x, calls = FusedGELU(6, 10, approximate="tanh"), torch.randn(2, 3, 5, 6), []
    if waits is not None:
        waits(layer.proj, calls)
    with torch.no_grad():
        found = layer(x.as_subclass(OnCuda))
        plain = F.gelu(F.linear(x, layer.proj.weight, layer.proj.bias), approximate="tanh")
    assert relative_error(found.as_subclass(Tensor), plain) < 1e-6
    assert (len(epilogues), len(calls)) == ((1, 0) if waits is None else (0, 1))


def test_autocast_multiplies_in_16_bits_here_too(epilogues):
    """It knows the layer's product, and none with an epilogue on CUDA."""
    layer, x = FusedGELU(6, 10, approximate="tanh"), torch.randn(2, 3, 6).as_subclass(OnCuda)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not epilogues


def test_a_gradient_has_no_epilogue(epilogues):
    layer, x = FusedGELU(6, 10, approximate="tanh"), torch.randn(2, 6).as_subclass(OnCuda)
    layer(x).sum().backward()
    assert layer.proj.weight.grad.abs().sum() > 0
    assert not epilogues


# --- Compilation


@in_the_interpreter
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("global_context", [False, True])
def test_the_blocks_of_all_shifts_are_one_graph(global_context):
    """The shift is a table, so that nothing in the code depends on it."""
    model = with_kernels("triton", global_context=global_context)
    inputs = toy_inputs((4, 4), batch=1)
    expected = run(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative_error(run(model, inputs), expected) < TOLERANCE
    assert counter.frame_count == 1
    operators = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("localdit.window_attention" in operator for operator in operators) == 1
    assert sum("localdit.depthwise_gelu" in operator for operator in operators) == 2 * global_context
