"""The depthwise convolution with GELU and sums, definition and Triton twin, against one tap at a time."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from localdit.kernels import depthwise_gelu_triton as twin
from localdit.kernels import interpreted
from localdit.kernels.depthwise_gelu import depthwise_gelu, depthwise_gelu_reference, encode_lines
from localdit.kernels.depthwise_gelu_triton import depthwise_gelu_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = pytest.mark.parametrize("compute", [depthwise_gelu_reference, depthwise_gelu_triton])
TOLERANCE = 1e-6  # rounding to float32 leaves a third of it


class Case(NamedTuple):
    """A grid of tokens and the map that is convolved."""

    grid: tuple[int, int]
    window: int
    shift: int
    dim: int
    batch: int = 2

    def draw(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """x, the weight, and the gradients of the two results."""
        shape = (self.batch, self.grid[0] * self.grid[1], self.dim)
        tensors = [torch.randn(shape), torch.randn(self.dim, 1, 3, 3), torch.randn(shape)]
        return [x.to(DEVICE, dtype) for x in tensors] + [torch.randn(self.batch, self.dim, device=DEVICE)]

    def lines(self) -> tuple[Tensor, Tensor]:
        padded = [-(-length // self.window) * self.window for length in self.grid]
        rows, columns = ((torch.arange(length) + self.shift) % length for length in padded)
        rows, columns = encode_lines(rows, columns, *self.grid)
        return rows.to(DEVICE), columns.to(DEVICE)


CASES = [
    Case((8, 8), 4, 0, 24),
    Case((8, 12), 4, 1, 24),
    Case((5, 7), 4, 2, 24, batch=3),
    Case((3, 9), 4, 3, 8),
    Case((17, 18), 4, 1, 72, batch=1),  # more than a tile of rows, of columns, of channels
    Case((9, 13), 8, 5, 6),
    Case((7, 5), 3, 2, 9),
    Case((1, 3), 1, 0, 5),
    Case((2, 1), 4, 3, 65, batch=1),
]


def one_tap_at_a_time(case: Case, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by padding and rolling a map, and by the formula of GELU."""
    (height, width), window, shift = case.grid, case.window, case.shift
    x = x.unflatten(1, case.grid)
    x = torch.cat((x, x.new_zeros(len(x), -height % window, width, case.dim)), dim=1)
    x = torch.cat((x, x.new_zeros(*x.shape[:2], -width % window, case.dim)), dim=2)
    x = x.roll((-shift, -shift), dims=(1, 2))
    edge = x.new_zeros(len(x), 1, x.shape[2], case.dim)
    x = torch.cat((edge, x, edge), dim=1)
    edge = x.new_zeros(*x.shape[:2], 1, case.dim)
    x = torch.cat((edge, x, edge), dim=2)
    down, across = x.shape[1] - 2, x.shape[2] - 2
    u = sum(x[:, i : i + down, j : j + across] * weight[:, 0, i, j] for i in range(3) for j in range(3))
    u = u.roll((shift, shift), dims=(1, 2))[:, :height, :width].flatten(1, 2)
    y = u * (1 + torch.special.erf(u / math.sqrt(2))) / 2
    return y, y.sum(1)


def gradients(compute, x: Tensor, weight: Tensor, *grads: Tensor) -> list[Tensor]:
    """The two results, then the gradients of x and of the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    results = compute(x, weight)
    return [*results, *torch.autograd.grad(results, (x, weight), grads)]


def computed(compute, case: Case, tensors: list[Tensor]) -> list[Tensor]:
    return gradients(lambda x, weight: compute(x, weight, *case.lines()), *tensors)


def oracle(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """In float64."""
    return gradients(
        lambda x, weight: one_tap_at_a_time(case, x, weight), *(x.cpu().double() for x in tensors)
    )


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
def test_float32_equals_one_tap_at_a_time(compute, case, poisoned):
    """The output, the sums and both gradients, whatever stood in the memory before."""
    tensors = case.draw()
    for value, reference in zip(computed(compute, case, tensors), oracle(case, tensors), strict=True):
        assert relative_error(value, reference) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=str)
def test_16_bits_are_no_further_from_the_truth_than_twice_the_definition(case, dtype, poisoned):
    tensors = case.draw(dtype)
    values = computed(depthwise_gelu_triton, case, tensors)
    plain = computed(depthwise_gelu_reference, case, tensors)
    cut = dtype is torch.bfloat16 and interpreted()
    for value, other, reference in zip(values, plain, oracle(case, tensors), strict=True):
        assert value.dtype is other.dtype
        # The interpreter cuts float32 to bfloat16 where a GPU rounds: a last bit, 2^-8, at each of the steps.
        bound = 2**-6 if cut else 2 * relative_error(other, reference)
        assert relative_error(value, reference) < bound


@pytest.mark.parametrize("shift", range(4))
def test_every_shift_equals_one_tap_at_a_time(shift):
    case = Case((6, 5), 4, shift, 3)
    tensors = case.draw()
    values = computed(depthwise_gelu_triton, case, tensors)
    for value, reference in zip(values, oracle(case, tensors), strict=True):
        assert relative_error(value, reference) < TOLERANCE


def test_far_from_zero_gelu_is_the_identity_or_nothing():
    """One tap of one at a single token: the input itself goes into GELU."""
    u = torch.tensor([-1e15, -50.0, -6.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 6.0, 50.0, 1e15], device=DEVICE)
    weight = torch.zeros(len(u), 1, 3, 3, device=DEVICE)
    weight[:, :, 1, 1] = 1
    line = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    u.requires_grad_()
    y, sums = depthwise_gelu_triton(u.view(1, 1, -1), weight, line, line)
    expected = torch.nn.functional.gelu(u.detach().double()).cpu()
    assert torch.allclose(y.detach().cpu().flatten().double(), expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(sums.flatten(), y.flatten())
    (grad,) = torch.autograd.grad(y.sum(), u)
    exact = u.detach().double().cpu().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(exact).sum(), exact)
    assert torch.allclose(grad.cpu().double(), slope, rtol=1e-6, atol=1e-6)


def test_tensors_laid_out_otherwise_are_read_as_well():
    case = Case((4, 6), 4, 1, 24)
    x, weight, *grads = case.draw()
    turned = [tensor.mT.contiguous().mT for tensor in (x, weight, *grads)]
    for value, other in zip(
        computed(depthwise_gelu_triton, case, [x, weight, *grads]),
        computed(depthwise_gelu_triton, case, turned),
        strict=True,
    ):
        assert torch.equal(value, other)


def test_under_autocast_tokens_are_read_and_written_in_16_bits():
    case = Case((4, 6), 4, 1, 24)
    x, weight, *_ = case.draw()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, sums = depthwise_gelu_triton(x.requires_grad_(), weight.requires_grad_(), *case.lines())
    assert (y.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    expected = depthwise_gelu_triton(x.bfloat16(), weight, *case.lines())
    assert torch.equal(y, expected[0])
    assert torch.equal(sums, expected[1])
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


def test_twice_the_same_gives_the_same_bits():
    case = Case((9, 7), 4, 3, 16)
    tensors = case.draw()
    first, second = (computed(depthwise_gelu_triton, case, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_weight_that_is_not_trained_costs_no_gradient(monkeypatch):
    case = Case((4, 4), 4, 0, 16)
    x, weight, *_ = case.draw()
    launched = []
    launch = twin._launch

    def record(kernel, *args):
        launched.append(kernel)
        launch(kernel, *args)

    monkeypatch.setattr(twin, "_launch", record)
    depthwise_gelu_triton(x.requires_grad_(), weight, *case.lines())[0].sum().backward()
    assert len(launched) == 3
    assert twin.weight_kernel not in launched


# --- What PyTorch's tools make of it


def test_the_operators_are_what_they_are_registered_as():
    """Schema, fake tensors, autograd, and tracing with dynamic shapes."""
    case = Case((3, 5), 4, 1, 16)
    x, weight, grad, grad_sums = case.draw()
    lines = case.lines()
    torch.library.opcheck(twin._forward, (x.requires_grad_(), weight.requires_grad_(), *lines))
    torch.library.opcheck(
        twin._backward,
        (grad, grad_sums, x.detach(), weight.detach(), *lines, True),
        # Gradients of gradients are the definition's.
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_compiler_keeps_the_operator_in_its_graph_and_makes_one_for_all_shifts():
    """Forward and backward. The other tables are those of other shifts, of the same size."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(depthwise_gelu_triton, fullgraph=True, backend=backend)
    for shift in (0, 3):
        case = Case((8, 8), 4, shift, 16)
        tensors = case.draw()
        expected = computed(depthwise_gelu_triton, case, tensors)
        for value, other in zip(computed(compiled, case, tensors), expected, strict=True):
            assert torch.equal(value, other)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert torch.ops.localdit.depthwise_gelu.default in graphs[0] or twin._forward in graphs[0]


# --- The choice


def test_a_cpu_computes_the_definition_unless_triton_is_asked_for(monkeypatch):
    case = Case((4, 4), 4, 0, 16)
    x, weight, *_ = (tensor.cpu() for tensor in case.draw())
    lines = [line.cpu() for line in case.lines()]
    asked = []
    monkeypatch.setattr(twin, "depthwise_gelu_triton", lambda *args: asked.append(args))
    expected = depthwise_gelu_reference(x, weight, *lines)
    for kernels in ("auto", "torch"):
        results = depthwise_gelu(x, weight, *lines, kernels)
        assert all(torch.equal(value, other) for value, other in zip(results, expected, strict=True))
    assert not asked
    monkeypatch.setattr("localdit.kernels.interpreted", lambda: True)
    depthwise_gelu(x, weight, *lines, "triton")
    assert len(asked) == 1


# --- The cost


@pytest.mark.parametrize("kernel", [twin.convolve_kernel, twin.weight_kernel], ids=["convolve", "weight"])
def test_the_programs_are_exactly_linear_in_tokens(kernel):
    """From 1024 to 4096 pixels, a token being 16 of them."""
    counts = []
    for pixels in (1024, 2048, 4096):
        line = torch.empty(pixels // 16, dtype=torch.int32, device="meta")
        counts.append(twin.tiles(kernel, line, line))
    assert counts[1:] == [4 * counts[0], 16 * counts[0]]
