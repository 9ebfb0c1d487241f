"""Which tokens SparseDiT's experts take while it trains.

Experts choose their tokens (Zhou et al. 2022, arXiv 2202.09368), so no expert starves: each is exactly full.
Tokens can starve, and this counts how many do.
"""

import torch
from torch import Tensor, nn

from localdit.models.sparse_dit import SparseDiTExperts

# B batch   N tokens that a layer sees   E experts   K tokens per expert


class RoutingStatistics:
    """Counts what every layer of experts in a model takes, from now until `detach`.

    It counts on the device, which is waited for in `report` alone, and only layers in training mode, so that
    previews and validation leave no mark. The model computes the same bits, and a compiled block stays one
    graph. Gradient checkpointing runs a block twice, and counts it twice: means and maxima stay what they
    are. A process counts its own samples.

    Args:
        model: Holds `SparseDiTExperts` at any depth.
        device: Where the model will train; it may be moved there later.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.counters = {
            name.removesuffix(".ff"): _Counter(module, device)
            for name, module in model.named_modules()
            if isinstance(module, SparseDiTExperts)
        }

    def report(self) -> dict[str, float]:
        """What was counted since the last report, and begin anew; empty where that was nothing.

        Each layer has four figures, as `experts/transformer_blocks.1/untaken`:

        - untaken: share of the tokens it sees that no expert takes, to which it adds nothing.
        - most: most experts that take one token.
        - gate_min, gate_max: what the output of an expert is multiplied by, in the mean over the tokens it
          takes: of the expert where that is least, and where it is greatest.

        `experts/untaken` and so on are the model's: the mean of the layers' shares, and their extremes.
        """
        layers = {name: counter.report() for name, counter in self.counters.items()}
        layers = {name: figures for name, figures in layers.items() if figures}
        if not layers:
            return {}
        untaken, most, gate_min, gate_max = (
            [figures[key] for figures in layers.values()]
            for key in ("untaken", "most", "gate_min", "gate_max")
        )
        line = {
            "experts/untaken": sum(untaken) / len(untaken),
            "experts/most": max(most),
            "experts/gate_min": min(gate_min),
            "experts/gate_max": max(gate_max),
        }
        for name, figures in layers.items():
            line |= {f"experts/{name}/{key}": value for key, value in figures.items()}
        return line

    def detach(self) -> None:
        """Leave the model as it was found."""
        for counter in self.counters.values():
            del counter.layer.route


class _Counter:
    """Stands in for one layer's `route`; as a method of an object, so that a copied layer has its own."""

    def __init__(self, layer: SparseDiTExperts, device: torch.device):
        self.layer = layer
        # How many tokens 0, 1, ..., E experts took, and for each expert the sum of its gates.
        self.tokens = torch.zeros(layer.num_experts + 1, dtype=torch.int64, device=device)
        self.gates = torch.zeros(layer.num_experts, device=device)
        layer.route = self.route  # type: ignore[method-assign]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, N, D). Returns what the layer's own `route` does."""
        gates, indices = type(self.layer).route(self.layer, x)  # (B, E, K)
        if self.layer.training:
            taken = torch.zeros(*indices.shape[:2], x.shape[1], dtype=torch.bool, device=x.device)
            takers = taken.scatter_(2, indices, True).sum(1)  # (B, N)
            numbers = torch.arange(len(self.tokens), device=x.device)
            self.tokens += (takers[..., None] == numbers).sum((0, 1))
            self.gates += gates.detach().sum((0, 2))
        return gates, indices

    def report(self) -> dict[str, float]:
        """The four figures, or none; begin anew."""
        tokens, gates = self.tokens.tolist(), self.gates.tolist()
        self.tokens.zero_()
        self.gates.zero_()
        if not any(tokens):
            return {}
        taken = sum(takers * count for takers, count in enumerate(tokens)) / len(gates)  # by each expert
        return {
            "untaken": tokens[0] / sum(tokens),
            "most": float(max(takers for takers, count in enumerate(tokens) if count)),
            "gate_min": min(gates) / taken,
            "gate_max": max(gates) / taken,
        }
