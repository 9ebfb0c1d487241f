"""The optimizers that a configuration can name."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from localdit.training.config import TrainConfig


def build_optimizer(model: nn.Module, options: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `options.optimizer` names, over all parameters of the model."""
    if options.optimizer == "muon":
        return MuonWithAdamW(model, options)
    return torch.optim.AdamW(
        model.parameters(), options.learning_rate, options.betas, options.eps, options.weight_decay
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the repeated blocks, AdamW for all else: tables, norms, biases, first and last
    layers (Jordan et al. 2024).

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, section 2.2), so that one learning rate
    and one weight decay serve both.
    """

    def __init__(self, model: nn.Module, options: TrainConfig):
        hidden = list(_block_matrices(model))
        if not hidden:
            raise ValueError(
                "train.optimizer is muon, which is for the matrices of repeated blocks: "
                f"{type(model).__name__} declares none (_repeated_blocks). Take adamw."
            )
        known = {id(parameter) for parameter in hidden}
        others = [p for p in model.parameters() if id(p) not in known]
        self.parts = (
            torch.optim.Muon(
                hidden, options.learning_rate, options.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                others, options.learning_rate, options.betas, options.eps, options.weight_decay
            ),
        )
        super().__init__([{"params": [*hidden, *others]}], {})
        # One list of groups and one state, those of the parts themselves: whoever sets a rate sets theirs.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state: Any = defaultdict(dict)
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Step both parts. The closure of `torch.optim.Optimizer.step` has no use here and must be None."""
        if closure is not None:
            raise ValueError("closure must be None: gradients are computed before the step")
        for part in self.parts:
            part.step()


def _block_matrices(model: nn.Module) -> Iterator[Tensor]:
    repeated = getattr(model, "_repeated_blocks", ())
    for block in model.modules():
        if type(block).__name__ in repeated:
            yield from (layer.weight for layer in block.modules() if isinstance(layer, nn.Linear))
