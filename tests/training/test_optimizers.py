"""Optimizers by name, parameter groups, and what of them a checkpoint holds."""

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from localdit.training.config import ParameterGroup, TrainConfig
from localdit.training.optimizers import MuonWithAdamW, build_optimizer
from localdit.training.state import capture, restore

OPTIMIZERS = ("adamw", "muon", "schedule_free_adamw", "adamw8bit")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 6)
        self.table = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return x + self.second(self.first(x * self.table[0]).tanh()) + self.table[1]


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.blocks(x))


def options(**values):
    return TrainConfig(**{"max_steps": 9, "batch_size": 1, "learning_rate": 1e-2, **values})


def steps(model, optimizer, count, ema=None):
    for number in range(count):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(model.parameters())


def extra(name):
    for package in {"schedule_free_adamw": ["schedulefree"], "adamw8bit": ["bitsandbytes"]}.get(name, []):
        pytest.importorskip(package)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss(name):
    extra(name)
    torch.manual_seed(0)
    model = Model()
    optimizer = build_optimizer(model, options(optimizer=name))
    if hasattr(optimizer, "train"):
        optimizer.train()
    x = torch.randn(50, 6)
    before = model(x).square().mean()
    steps(model, optimizer, 30)
    assert model(x).square().mean() < 0.7 * before


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    model = Model()
    optimizer = build_optimizer(model, options(optimizer="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    steps(model, optimizer, 1)
    by_muon = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert by_muon == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("first", "second")}
    assert all(optimizer.state[p] for p in model.parameters())


def test_the_rate_reaches_both_parts_also_behind_accelerate():
    model = Model()
    _, optimizer = Accelerator(cpu=True).prepare(model, build_optimizer(model, options(optimizer="muon")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, 2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(optimizer.state[p] for p in model.parameters())


def test_muon_needs_a_model_with_repeated_blocks():
    with pytest.raises(ValueError, match=r"Linear declares none \(_repeated_blocks\)\. Take adamw"):
        build_optimizer(nn.Linear(2, 2), options(optimizer="muon"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_group_that_fits_a_name_sets_its_rate_and_decay(name):
    model = Model()
    groups = (
        ParameterGroup(match=r"bias$|table", weight_decay=0.0),
        ParameterGroup(match=r"^out\.", learning_rate_scale=0.1),
    )
    optimizer = build_optimizer(model, options(optimizer=name, parameter_groups=groups, weight_decay=0.5))
    found = {
        id(p): (g["weight_decay"], g["learning_rate_scale"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    named = {n: found[id(p)] for n, p in model.named_parameters()}
    assert named["blocks.0.first.bias"] == named["out.bias"] == named["blocks.1.table"] == (0.0, 1.0)
    assert named["out.weight"] == (0.5, 0.1)
    assert named["blocks.0.first.weight"] == (0.5, 1.0)


def test_frozen_parameters_are_left_out():
    model = Model()
    model.blocks[0].requires_grad_(False)
    optimizer = build_optimizer(model, options())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_state_goes_on_bit_for_bit(name, tmp_path):
    extra(name)

    def fresh():
        torch.manual_seed(0)
        model = Model()
        optimizer = build_optimizer(model, options(optimizer=name))
        if hasattr(optimizer, "train"):
            optimizer.train()
        return model, optimizer, EMAModel(model.parameters(), decay=0.9)

    model, optimizer, ema = fresh()
    steps(model, optimizer, 3, ema)
    tensors, values = capture(model, ema, optimizer)
    tensors = {part: {n: t.clone() for n, t in named.items()} for part, named in tensors.items()}
    steps(model, optimizer, 3, ema)

    again, its_optimizer, its_ema = fresh()
    restore(again, its_ema, its_optimizer, tensors, values)
    steps(again, its_optimizer, 3, its_ema)
    for (label, left), right in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(left, right), label
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, its_ema.shadow_params))


def test_a_checkpoint_of_another_model_or_optimizer_is_an_error():
    model = Model()
    optimizer, ema = build_optimizer(model, options()), EMAModel(model.parameters())
    steps(model, optimizer, 1)
    tensors, values = capture(model, ema, optimizer)

    class Other(Model):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(1, 1)

    other = Other()
    with pytest.raises(ValueError, match=r"of another model: model lacks \['more.bias', 'more.weight'\]"):
        restore(other, EMAModel(other.parameters()), build_optimizer(other, options()), tensors, values)
    split = options(parameter_groups=(ParameterGroup(match="bias"),))
    with pytest.raises(ValueError, match="of another optimizer, or of other parameter groups"):
        restore(model, ema, build_optimizer(model, split), tensors, values)


def test_a_falling_rate_and_schedule_free_exclude_each_other():
    with pytest.raises(ValueError, match=r"train\.schedule must be constant with schedule_free_adamw"):
        build_optimizer(Model(), options(optimizer="schedule_free_adamw", schedule="cosine"))
