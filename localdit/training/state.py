"""Between the objects of a run and what its checkpoints hold: named tensors, and plain values for JSON.

Tensors are saved whole, under the names of the model's parameters, whatever the run spread them over: a
checkpoint made by eight processes with sharded weights goes on in one without, and the other way round.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

# Of a parameter group: what the configuration says, also when a run is taken up again.
_CONFIGURED = {"params", "lr", "learning_rate_scale", "weight_decay", "betas", "eps"}

Tensors = dict[str, dict[str, Tensor]]


def capture(
    model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> tuple[Tensors, dict[str, Any]]:
    """The state of a run. Every process must call it: sharded tensors are gathered, one after the other, into
    the machine's memory.

    Args:
        model: The model, of which what is trained is taken.
        ema: Its average.
        optimizer: Its optimizer.
        keep: Whether this process is one that wants the tensors; otherwise those that are gathered are empty.

    Returns:
        tensors: "model" and "ema" (by parameter), "optimizer" (by "<key>.<parameter>").
        values: What of the optimizer and the average is no tensor.
    """
    named = trained(model)
    moments, scalars = {}, {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"{key}.{name}"] = _whole(value, keep)
            else:
                scalars[f"{key}.{name}"] = value
    tensors = {
        "model": {name: _whole(parameter, keep) for name, parameter in named.items()},
        "ema": {name: _whole(value, keep) for name, value in zip(named, ema.shadow_params, strict=True)},
        "optimizer": moments,
    }
    groups = [
        {key: value for key, value in group.items() if key not in _CONFIGURED}
        for group in optimizer.param_groups
    ]
    values = {"ema_step": ema.optimization_step, "optimizer_groups": groups, "optimizer_values": scalars}
    return tensors, values


def restore(
    model: nn.Module,
    ema: EMAModel,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
) -> None:
    """Put back what `capture` gave.

    Raises:
        ValueError: The checkpoint is of another model or another optimizer.
    """
    named = trained(model)
    for part in ("model", "ema"):
        missing, extra = named.keys() - tensors[part].keys(), tensors[part].keys() - named.keys()
        if missing or extra:
            raise ValueError(
                f"the checkpoint is of another model: {part} lacks {sorted(missing)[:3]} "
                f"and has {sorted(extra)[:3]} over"
            )
    with torch.no_grad():
        for (name, parameter), average in zip(named.items(), ema.shadow_params, strict=True):
            _fill(parameter, tensors["model"][name], name)
            _fill(average, tensors["ema"][name], name)
    if len(values["optimizer_groups"]) != len(optimizer.param_groups):
        raise ValueError("the checkpoint is of another optimizer, or of other parameter groups")
    for group, saved in zip(optimizer.param_groups, values["optimizer_groups"]):
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()})
    for full_name, value in [*tensors["optimizer"].items(), *values["optimizer_values"].items()]:
        key, _, name = full_name.partition(".")
        if name not in named:
            raise ValueError(f"the checkpoint is of another optimizer: it has {full_name}")
        parameter = named[name]
        optimizer.state[parameter][key] = _like(value, parameter) if isinstance(value, Tensor) else value
    ema.optimization_step = values["ema_step"]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole(value: Tensor, keep: bool) -> Tensor:
    value = value.detach()
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if keep else whole.new_empty(0)


def _fill(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape:
        raise ValueError(
            f"the checkpoint is of another model: {name} is {tuple(value.shape)} there "
            f"and {tuple(target.shape)} here"
        )
    target.copy_(_like(value, target))


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor where and how the parameter is; a count of steps, a scalar, stays where it is."""
    if value.ndim == 0:
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
