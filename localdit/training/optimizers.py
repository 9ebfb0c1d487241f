"""The optimizers that a configuration can name, over groups of parameters with their own rates."""

import importlib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from localdit.training.config import TrainConfig

Group = dict[str, Any]


def build_optimizer(model: nn.Module, options: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `options.optimizer` names, over the parameters of the model that require gradients.

    Every parameter group holds its `learning_rate_scale`: the rate of the run times that is its own.

    Raises:
        ValueError: A group of `options.parameter_groups` fits no parameter.
        ImportError: The optimizer needs an extra that is not installed.
    """
    if options.optimizer == "muon":
        return MuonWithAdamW(model, options)
    groups = parameter_groups(dict(model.named_parameters()), options)
    match options.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, options.learning_rate, options.betas, options.eps)
        case "adamw8bit":
            bitsandbytes = _import("bitsandbytes", extra="quant")
            return bitsandbytes.optim.AdamW8bit(groups, options.learning_rate, options.betas, options.eps)
        case "schedule_free_adamw":
            if options.schedule != "constant":
                raise ValueError(
                    "train.schedule must be constant with schedule_free_adamw, whose averaging takes "
                    f"the place of a falling rate, got {options.schedule!r}"
                )
            schedulefree = _import("schedulefree", extra="train")
            return schedulefree.AdamWScheduleFree(
                groups, options.learning_rate, options.betas, options.eps, warmup_steps=0
            )


def parameter_groups(parameters: dict[str, Tensor], options: TrainConfig) -> list[Group]:
    """The trained parameters, split by the first of `options.parameter_groups` that fits their name."""
    rules = options.parameter_groups
    members: list[list[Tensor]] = [[] for _ in (*rules, None)]
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            fits = (i for i, rule in enumerate(rules) if re.search(rule.match, name))
            members[next(fits, len(rules))].append(parameter)
    groups = []
    for rule, found in zip((*rules, None), members):
        if found:
            decay = rule.weight_decay if rule and rule.weight_decay is not None else options.weight_decay
            scale = rule.learning_rate_scale if rule else 1.0
            groups.append({"params": found, "weight_decay": decay, "learning_rate_scale": scale})
    return groups


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the repeated blocks, AdamW for all else: tables, norms, biases, first and last
    layers (Jordan et al. 2024).

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one learning rate
    and one weight decay serve both.
    """

    def __init__(self, model: nn.Module, options: TrainConfig):
        hidden = {id(parameter) for parameter in _block_matrices(model)}
        if not hidden:
            raise ValueError(
                "train.optimizer is muon, which is for the matrices of repeated blocks: "
                f"{type(model).__name__} declares none (_repeated_blocks). Take adamw."
            )
        named = dict(model.named_parameters())
        matrices = parameter_groups({n: p for n, p in named.items() if id(p) in hidden}, options)
        others = parameter_groups({n: p for n, p in named.items() if id(p) not in hidden}, options)
        rate = options.learning_rate
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, rate, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, rate, options.betas, options.eps))
        super().__init__([{"params": group["params"]} for group in matrices + others], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state: Any = defaultdict(dict)
        self._share()

    def _share(self) -> None:
        """Give the parts these very groups and this very state: whoever sets a rate sets theirs."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's. (accelerate calls it once to move an optimizer's state to its device.)"""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Step both parts. The closure of `torch.optim.Optimizer.step` has no use here and must be None."""
        if closure is not None:
            raise ValueError("closure must be None: gradients are computed before the step")
        for part in self.parts:
            part.step()


def _block_matrices(model: nn.Module) -> Iterator[Tensor]:
    repeated = getattr(model, "_repeated_blocks", None) or ()
    for block in model.modules():
        if type(block).__name__ in repeated:
            yield from (layer.weight for layer in block.modules() if isinstance(layer, nn.Linear))


def _import(package: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this optimizer needs {package}, of the extra {extra!r}: pip install 'localdit[{extra}]'"
        ) from error
