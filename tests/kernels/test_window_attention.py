"""Window attention, the definition and its Triton twin, against attention over all tokens in float64."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from naive_windows import dense_attention, windows_of
from torch import Tensor

from localdit.kernels import interpreted
from localdit.kernels import window_attention as definition
from localdit.kernels import window_attention_triton as twin
from localdit.kernels.window_attention import Attended, window_attention, window_attention_reference
from localdit.kernels.window_attention_triton import window_attention_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = pytest.mark.parametrize("attend", [window_attention_reference, window_attention_triton])
TOLERANCE = 1e-6  # rounding to float32 leaves a third of it


class Case(NamedTuple):
    """A grid of tokens, its windows, and what attends in them."""

    grid: tuple[int, int]
    window: int
    shift: int
    head_dim: int
    attentions: int = 1
    bias: bool = True
    heads: int = 2
    batch: int = 2

    def draw(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """(q, k, v, bias) of each attention, then the gradient of the result."""
        shape = (self.batch, self.grid[0] * self.grid[1], self.heads, self.head_dim)
        tensors: list[Tensor | None] = []
        for _ in range(self.attentions):
            tensors += [torch.randn(shape) for _ in range(3)]
            tensors.append(torch.randn(self.heads, self.window**2, self.window**2) if self.bias else None)
        tensors.append(torch.randn(shape))
        return [None if x is None else x.to(DEVICE, dtype) for x in tensors]

    def slots(self) -> Tensor:
        return windows_of(self.grid, self.window, self.shift).to(DEVICE)


CASES = [
    Case((8, 8), 4, 0, 72),
    Case((8, 12), 4, 1, 72, attentions=2, batch=1),
    Case((5, 7), 4, 2, 72, attentions=2, heads=1, batch=3),
    Case((3, 9), 4, 3, 72, bias=False),
    Case((6, 5), 4, 1, 12),  # a head below the least tile
    Case((5, 7), 4, 2, 40, attentions=2, bias=False, heads=3, batch=1),
    Case((4, 6), 4, 3, 128),
    Case((5, 7), 2, 1, 32),  # four windows in a tile
    Case((4, 6), 2, 0, 72, attentions=2),
    Case((9, 13), 8, 5, 36, batch=1),
    Case((8, 8), 8, 0, 64, attentions=2, batch=1),
    Case((7, 5), 3, 2, 24),  # nine slots in a tile of 16
]


def gradients(attend, slots: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    """What `attend` gives, then the gradient of each tensor that is there."""
    *inputs, grad = [None if x is None else x.detach().requires_grad_() for x in tensors]
    second = Attended(*inputs[4:]) if len(inputs) > 4 else None
    out = attend(slots, Attended(*inputs[:4]), second)
    return [out, *torch.autograd.grad(out, [x for x in inputs if x is not None], grad)]


def oracle(case: Case, tensors: list[Tensor | None]) -> list[Tensor]:
    """The same of attention over all tokens, in float64."""

    def attend(slots: Tensor, local: Attended, context: Attended | None) -> Tensor:
        parts = [local] if context is None else [local, context]
        return sum(dense_attention(*part, *case[:3]) for part in parts) / len(parts)

    return gradients(attend, case.slots(), [None if x is None else x.cpu().double() for x in tensors])


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.detach().cpu().double() - reference).norm() / reference.norm()).item()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# --- The numbers


@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_attention_over_all_tokens(attend, case, poisoned):
    """The output and every gradient, whatever stood in the memory before."""
    tensors = case.draw()
    for value, reference in zip(gradients(attend, case.slots(), tensors), oracle(case, tensors), strict=True):
        assert relative_error(value, reference) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[2], CASES[7], CASES[9]], ids=str)
def test_16_bits_are_no_further_from_the_truth_than_twice_the_definition(case, dtype, poisoned):
    tensors = case.draw(dtype)
    values = gradients(window_attention_triton, case.slots(), tensors)
    plain = gradients(window_attention_reference, case.slots(), tensors)
    cut = dtype is torch.bfloat16 and interpreted()
    for value, other, reference in zip(values, plain, oracle(case, tensors), strict=True):
        assert value.dtype is dtype
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: a last bit, 2^-8, at each of the steps.
        bound = 2**-6 if cut else 2 * relative_error(other, reference)
        assert relative_error(value, reference) < bound


@BOTH
def test_a_token_alone_in_its_window_gets_its_own_value(attend):
    """Sixteen such windows in a tile."""
    case = Case((3, 7), 1, 0, 16)
    q, k, v, _, _ = case.draw()
    assert torch.equal(attend(case.slots(), Attended(q, k, v, None)), v)


def test_scores_far_from_zero_do_not_overflow():
    case = CASES[2]
    tensors = [x if x is None or x.ndim == 3 else 30 * x for x in case.draw()]
    value = gradients(window_attention_triton, case.slots(), tensors)[0]
    assert relative_error(value, oracle(case, tensors)[0]) < 1e-5  # float32 holds scores of 1e4 to 1e-3


def test_views_of_a_packed_projection_are_read_where_they_stand():
    case = Case((5, 7), 4, 2, 24)
    packed = torch.randn(2, 35, 3 * 48, device=DEVICE)
    views = [part.unflatten(-1, (2, 24)) for part in packed.chunk(3, dim=-1)]
    assert all(twin._aligned(view) is view for view in views)
    out = window_attention_triton(case.slots(), Attended(*views, None))
    copies = Attended(*(view.contiguous() for view in views), None)
    assert torch.equal(out, window_attention_triton(case.slots(), copies))


def test_tensors_laid_out_otherwise_are_read_as_well():
    case = Case((4, 6), 4, 1, 24)
    q, k, v, bias, _ = case.draw()
    expected = window_attention_triton(case.slots(), Attended(q, k, v, bias))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    bias = bias.mT.contiguous().mT
    assert torch.equal(window_attention_triton(case.slots(), Attended(*turned, bias)), expected)


def test_an_expanded_gradient_is_read_as_well():
    case = Case((4, 6), 4, 1, 24)
    *tensors, grad = case.draw()
    expected = gradients(window_attention_triton, case.slots(), [*tensors, torch.ones_like(grad)])
    x = [tensor.requires_grad_() for tensor in tensors]
    window_attention_triton(case.slots(), Attended(*x)).sum().backward()
    assert all(torch.equal(tensor.grad, other) for tensor, other in zip(x, expected[1:], strict=True))


# --- The table


@BOTH
def test_windows_may_stand_in_any_order(attend):
    case = Case((9, 7), 4, 3, 16)
    q, k, v, bias, _ = case.draw()
    slots = case.slots()
    expected = attend(slots, Attended(q, k, v, bias))
    shuffled = slots[torch.randperm(len(slots))]
    assert torch.equal(attend(shuffled, Attended(q, k, v, bias)), expected)


@pytest.mark.parametrize("window", [2, 4])
def test_some_of_the_windows_write_their_own_tokens_alone(window, poisoned):
    case = Case((6, 5), window, 1, 16)
    q, k, v, bias, _ = case.draw()
    slots = case.slots()
    whole = window_attention_triton(slots, Attended(q, k, v, bias))
    some = slots[1::2].contiguous()
    tokens = (some[some >= 0] >> 2).long()
    out = window_attention_triton(some, Attended(q, k, v, bias))
    assert torch.equal(out[:, tokens], whole[:, tokens])
    written = torch.zeros(30, dtype=torch.bool, device=DEVICE)
    written[tokens] = True
    assert out[:, ~written].isnan().all()


@BOTH
def test_what_an_absent_slot_would_read_changes_nothing(attend):
    """Absent slots have no token: no value anywhere, however large, may reach the windows that hold them."""
    case = Case((5, 5), 4, 0, 16, batch=1)
    q, k, v, bias, _ = case.draw()
    slots = case.slots()
    expected = attend(slots, Attended(q, k, v, bias))
    k[:, 0], v[:, 0] = 1e6, 1e6  # the token whose number stands for nothing in `slot_token`
    corner = 24  # alone in its window, with 15 absent slots
    assert torch.equal(attend(slots, Attended(q, k, v, bias))[:, corner], expected[:, corner])


def test_twice_the_same_gives_the_same_bits():
    case = Case((9, 7), 4, 3, 16)
    tensors = case.draw()
    first, second = (gradients(window_attention_triton, case.slots(), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_bias_that_is_not_trained_costs_no_gradient(monkeypatch):
    case = Case((4, 4), 4, 0, 16)
    q, k, v, bias, _ = case.draw()
    asked = []
    kernel = twin.backward_kernel

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                asked.append(args[9] is not None)  # dbias_ptr
                return kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(twin, "backward_kernel", Recorder())
    for trained in (False, True):
        q = q.detach().requires_grad_()
        window_attention_triton(
            case.slots(), Attended(q, k, v, bias.detach().requires_grad_(trained))
        ).sum().backward()
    assert asked == [False, True]


# --- What PyTorch's tools make of it


@pytest.mark.parametrize("case", [Case((3, 5), 4, 1, 16, attentions=2), Case((4, 3), 2, 1, 16, bias=False)])
def test_the_operators_are_what_they_are_registered_as(case):
    """Schema, fake tensors, autograd, and tracing with dynamic shapes."""
    *inputs, grad = case.draw()
    slots = case.slots()
    for x in inputs:
        if x is not None:
            x.requires_grad_()
    padded = [*inputs, None, None, None, None][:8]
    torch.library.opcheck(twin._forward, (slots, *padded))
    torch.library.opcheck(
        twin._backward,
        (grad, slots, *[None if x is None else x.detach() for x in inputs[:4]], 0.5, case.bias),
        # Gradients of gradients are the definition's.
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_compiler_keeps_the_operator_in_its_graph_and_makes_one_for_all_shifts():
    """Forward and backward. The second table is that of another shift, of the same size."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(window_attention_triton, fullgraph=True, backend=backend)
    for shift in range(4):
        case = Case((4, 4), 4, shift, 16, attentions=2, heads=1)
        tensors = case.draw()
        expected = gradients(window_attention_triton, case.slots(), tensors)
        for value, other in zip(gradients(compiled, case.slots(), tensors), expected, strict=True):
            assert torch.equal(value, other)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert torch.ops.localdit.window_attention.default in graphs[0] or twin._forward in graphs[0]


def test_export_keeps_the_operator():
    class Module(torch.nn.Module):
        def forward(self, slots: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention_triton(slots, Attended(q, k, v, None))

    case = Case((4, 4), 4, 0, 16)
    q, k, v = case._replace(bias=False).draw()[:3]
    program = torch.export.export(Module(), (case.slots(), q, k, v))
    assert "localdit.window_attention.default" in program.graph_module.code


def test_queries_that_autocast_left_in_float32_follow_the_values():
    case = Case((4, 6), 4, 1, 24, bias=False)
    q, k, v, _, _ = case.draw()
    mixed = Attended(q.requires_grad_(), k, v.half(), None)
    out = window_attention_triton(case.slots(), mixed)
    assert out.dtype is torch.float16
    out.sum().backward()
    assert q.grad.dtype is torch.float32
    halves = Attended(q.detach().half(), k.half(), v.half(), None)
    assert torch.equal(out, window_attention_triton(case.slots(), halves))


# --- The choice


def test_a_cpu_computes_the_definition_unless_triton_is_asked_for(monkeypatch):
    case = Case((4, 4), 4, 0, 16)
    local = Attended(*(x.cpu() for x in case.draw()[:4]))
    slots = case.slots().cpu()
    asked = []
    monkeypatch.setattr(twin, "window_attention_triton", lambda *args: asked.append(args))
    for kernels in ("auto", "torch"):
        out = window_attention(slots, local, kernels=kernels)
        assert torch.equal(out, window_attention_reference(slots, local))
    assert not asked
    monkeypatch.setattr("localdit.kernels.interpreted", lambda: True)
    window_attention(slots, local, kernels="triton")
    assert len(asked) == 1


def test_triton_where_it_cannot_serve_is_an_error_that_says_why(monkeypatch):
    def ask(x: Tensor, slots: int = 16, head_dim: int = 72) -> bool:
        return definition.triton_computes("triton", x, slots, head_dim)

    x = torch.zeros(1)
    monkeypatch.setattr("localdit.kernels.interpreted", lambda: False)
    with pytest.raises(ValueError, match=r'kernels="triton" takes tensors on CUDA, got one on cpu'):
        ask(x)
    monkeypatch.setattr("localdit.kernels.interpreted", lambda: True)
    assert ask(x)
    with pytest.raises(ValueError, match=r"takes float32, float16 and bfloat16, got torch.float64"):
        ask(x.double())
    with pytest.raises(ValueError, match=r"at most 64 tokens .* at most 128 channels, got 256 and 72"):
        ask(x, slots=256)
    with pytest.raises(ValueError, match="got 16 and 129"):
        ask(x, head_dim=129)


# --- The cost


@pytest.mark.parametrize("window", [2, 4, 8])
def test_the_programs_are_exactly_linear_in_tokens(window):
    """From 1024 to 4096 pixels, a token being 16 of them, in the published heads."""
    tile = twin.constants(16, 72, window**2, torch.bfloat16)["TILE"]
    programs = []
    for pixels in (1024, 2048, 4096):
        tokens = (pixels // 16) ** 2
        q = torch.empty(2, tokens, 16, 72, device="meta")
        slots = torch.empty(tokens // window**2, window**2, dtype=torch.int32, device="meta")
        programs.append(math.prod(twin.launch_grid(q, slots, tile)))
    assert programs[0] == 2 * 16 * 4096 // max(window**2, 16)
    assert programs[1:] == [4 * programs[0], 16 * programs[0]]
