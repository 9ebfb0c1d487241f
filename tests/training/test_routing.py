"""Routing statistics: a naive count from the definition, and a model that does not notice being counted."""

import math
from collections import defaultdict
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy_sparse import redraw, sparse_inputs, toy_sparse

from localdit.models.sparse_dit import SparseDiTExperts
from localdit.training.routing import RoutingStatistics

CPU = torch.device("cpu")
LAYERS = ["mixer_blocks.1", "transformer_blocks.1"]
FIGURES = ["untaken", "most", "gate_min", "gate_max"]


def naive_figures(layer: SparseDiTExperts, seen: list[Tensor]) -> dict[str, float]:
    """The four figures of a layer that saw these inputs, each (B, N, D): expert by expert, token by token."""
    takers, gates = [], [[] for _ in range(layer.num_experts)]
    for x in seen:
        count = x.shape[1]
        share = max(1, min(count, math.floor(layer.capacity * count / layer.num_experts)))
        scores = (x.double() @ layer.router.weight.double().T).softmax(2)
        for sample in scores.tolist():
            by_token = [0] * count
            for expert, own in enumerate(gates):
                for n in sorted(range(count), key=lambda n: -sample[n][expert])[:share]:
                    by_token[n] += 1
                    own.append(sample[n][expert])
            takers += by_token
    means = [sum(own) / len(own) for own in gates]
    return {
        "untaken": takers.count(0) / len(takers),
        "most": max(takers),
        "gate_min": min(means),
        "gate_max": max(means),
    }


def spied(model: nn.Module) -> dict[str, list[Tensor]]:
    """What each layer of experts sees from now on."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for name in LAYERS:
        layer = model.get_submodule(f"{name}.ff")
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
    return seen


def step(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """The sample and all gradients of one training step without an optimizer."""
    model.zero_grad()
    sample = model(**inputs, **kwargs).sample
    sample.square().mean().backward()
    return sample.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("config", [{}, {"num_experts": 3, "expert_capacity": 1.3}], ids=str)
def test_the_figures_are_those_of_a_naive_count(config, mask_ratio):
    """Over steps of several sizes, and then anew."""
    model = toy_sparse(**config).train()
    statistics, seen = RoutingStatistics(model, CPU), spied(model)
    for grids in ([(3, 5), (7, 9)], [(4, 6)]):
        for grid in grids:
            inputs = sparse_inputs(grid, batch=3)
            inputs["hidden_states"] = torch.randn_like(inputs["hidden_states"])
            step(model, inputs, mask_ratio=mask_ratio)
        report = statistics.report()
        naive = {name: naive_figures(model.get_submodule(f"{name}.ff"), seen[name]) for name in LAYERS}
        for name in LAYERS:
            found = {key: report.pop(f"experts/{name}/{key}") for key in FIGURES}
            assert found == pytest.approx(naive[name], rel=1e-5), name
            if mask_ratio and name == "transformer_blocks.1":
                assert seen[name][0].shape[1] == int(grids[0][0] * grids[0][1] * 0.25)
        assert report == pytest.approx(
            {
                "experts/untaken": sum(figures["untaken"] for figures in naive.values()) / 2,
                "experts/most": max(figures["most"] for figures in naive.values()),
                "experts/gate_min": min(figures["gate_min"] for figures in naive.values()),
                "experts/gate_max": max(figures["gate_max"] for figures in naive.values()),
            },
            rel=1e-5,
        )
        seen.clear()
    assert statistics.report() == {}


@pytest.mark.parametrize(
    ("capacity", "untaken", "most"),
    [(1.0, 0.75, 4), (4.0, 0.0, 4), (0.25, 0.9375, 4)],
)
def test_equal_experts_fight_for_the_same_tokens(capacity, untaken, most):
    """With one router row for all, all take the same tokens, each at a probability of one in four."""
    layer = SparseDiTExperts(8, 8, num_experts=4, capacity=capacity)
    nn.init.ones_(layer.router.weight)
    statistics = RoutingStatistics(nn.ModuleDict({"block": layer}), CPU)
    layer.route(torch.randn(5, 16, 8))
    expected = {"untaken": untaken, "most": most, "gate_min": 0.25, "gate_max": 0.25}
    expected = {f"experts/{place}{key}": value for place in ("", "block/") for key, value in expected.items()}
    assert statistics.report() == pytest.approx(expected)


def test_a_model_that_is_counted_computes_the_same_bits():
    model, inputs = toy_sparse().train(), sparse_inputs((3, 5), batch=3)
    masked = {"mask_ratio": 0.75, "mask_noise": torch.rand(3, 15)}
    plain, gradients = step(model, inputs, **masked)
    attributes = [set(vars(module)) for module in model.modules()]
    state, buffers = model.state_dict().keys(), dict(model.named_buffers()).keys()

    statistics = RoutingStatistics(model, CPU)
    assert model.state_dict().keys() == state
    assert dict(model.named_buffers()).keys() == buffers
    for detached in (False, True):
        sample, found = step(model, inputs, **masked)
        assert torch.equal(sample, plain)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients))
        assert bool(statistics.report()) != detached
        if not detached:
            statistics.detach()
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_checkpointing_changes_neither_the_figures_nor_the_gradients():
    model, inputs = toy_sparse().train(), sparse_inputs((3, 5), batch=3)
    masked = {"mask_ratio": 0.5, "mask_noise": torch.rand(3, 15)}
    statistics = RoutingStatistics(model, CPU)
    _, gradients = step(model, inputs, **masked)
    report = statistics.report()
    model.enable_gradient_checkpointing()
    _, checkpointed = step(model, inputs, **masked)
    assert statistics.report() == pytest.approx(report)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, gradients))


@torch.no_grad()
def test_only_training_counts():
    model, inputs = toy_sparse(), sparse_inputs()
    statistics = RoutingStatistics(model, CPU)
    model(**inputs)
    assert statistics.report() == {}
    model.train()(**inputs)
    assert statistics.report()["experts/most"] >= 1


def test_a_copied_model_routes_by_its_own_weights_and_counts_for_itself():
    model, inputs = toy_sparse().train(), sparse_inputs()
    statistics = RoutingStatistics(model, CPU)
    copy = deepcopy(model)
    redraw(copy, seed=1)
    assert torch.equal(step(copy, inputs)[0], step(toy_sparse(seed=1).train(), inputs)[0])
    assert statistics.report() == {}


# Dynamo's own: wherever it meets an autograd.Function, and where a block's input has a history.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_block_is_counted_without_compiling_at_every_step():
    torch._dynamo.reset()
    model, inputs = toy_sparse(mixer_num_layers=0, num_layers=2, moe_every_n=1).train(), sparse_inputs((3, 5))
    twin = deepcopy(model)
    frames = CompileCounterWithBackend("eager")
    model.transformer_blocks[0].compile(fullgraph=True, backend=frames)
    step(model, inputs)
    statistics, expected = RoutingStatistics(model, CPU), RoutingStatistics(twin, CPU)
    for _ in range(3):
        step(model, inputs)
        step(twin, inputs)
    assert frames.frame_count == 2  # without counting and with it
    assert statistics.report() == pytest.approx(expected.report(), rel=1e-5)
    step(model, inputs)
    statistics.report()
    statistics.detach()
    step(model, inputs)
    assert statistics.report() == {}
    torch._dynamo.reset()
