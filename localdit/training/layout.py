"""A side task for the denoiser of scenes: say, at every place of the picture, what stands nearest and where.

The head reads the hidden states in the middle of the transformer while it denoises, and is thrown away after
training. As with the alignment of Yu et al. 2024 ("Representation Alignment for Generation", section 3), the
first half of the network is told what to find out, instead of having to guess it from the picture's error;
here the target is the scene itself, not the features of another network.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localdit.data.samples import Samples
from localdit.data.scenes import BACKGROUNDS, COLORS, SHAPES, Scene
from localdit.data.sources import Scenes

# B batch   N tokens   D width

_CLASSES = (len(COLORS), len(SHAPES), len(BACKGROUNDS))
# Offsets and radii (in units of the picture's side) times this are of order 1.
_OFFSET_SCALE, _RADIUS_SCALE = 4.0, 10.0


def layout_of(described: Scene, grid: int) -> tuple[Tensor, Tensor]:
    """What stands nearest to the centre of each cell of a grid x grid raster.

    Returns:
        labels: (grid², 3) int8: colour and shape of the nearest object, and the background.
        places: (grid², 3) float16: that object's centre seen from the cell, and its radius, both scaled.
    """
    lines = (np.arange(grid) + 0.5) / grid
    x, y = (axis.ravel() for axis in np.meshgrid(lines, lines))  # (grid²,) each
    centres = np.array([(o.x, o.y, o.radius) for o in described.objects])  # (objects, 3)
    distance = np.hypot(x[:, None] - centres[:, 0], y[:, None] - centres[:, 1]) - centres[:, 2]
    nearest = distance.argmin(axis=1)  # (grid²,)
    looks = np.array([(list(COLORS).index(o.color), SHAPES.index(o.shape)) for o in described.objects])
    ground = np.full((grid**2, 1), list(BACKGROUNDS).index(described.background))
    labels = np.concatenate((looks[nearest], ground), axis=1)
    offset = centres[nearest, :2] - np.stack((x, y), axis=1)
    places = np.concatenate((_OFFSET_SCALE * offset, _RADIUS_SCALE * centres[nearest, 2:]), axis=1)
    return torch.from_numpy(labels).to(torch.int8), torch.from_numpy(places).half()


class WithLayouts(Samples):
    """Samples of drawn scenes, each with its layout: also {"labels": (grid², 3), "places": (grid², 3)}.

    Args:
        whole: The samples.
        source: The scenes that they show.
        grid: Side of the layouts.
    """

    def __init__(self, whole: Samples, source: Scenes, grid: int):
        self.whole, self.groups, self.shards = whole, whole.groups, whole.shards
        numbers = (int(whole.name(index).removeprefix("scene-")) for index in range(len(whole)))
        layouts = [layout_of(source.scene(number), grid) for number in numbers]
        self.labels, self.places = (torch.stack(part) for part in zip(*layouts))

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {**self.whole[key], "labels": self.labels[key[0]], "places": self.places[key[0]]}

    def name(self, index: int) -> str:
        return self.whole.name(index)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:  # type: ignore[override]
        layouts = {name: torch.stack([item.pop(name) for item in items]) for name in ("labels", "places")}
        return {**self.whole.collate(items), **layouts}


class LayoutHead(nn.Module):
    """Reads the layout from the output of a block, linearly.

    Args:
        dim: Width of the block, D.
        block: The block whose output is read. The head keeps what it last saw in training.
    """

    def __init__(self, dim: int, block: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.read = nn.Linear(dim, sum(_CLASSES) + 3)
        self._hidden_states: Tensor | None = None
        block.register_forward_hook(self._keep)

    def loss(self, labels: Tensor, places: Tensor) -> Tensor:
        """Cross-entropies of the labels (B, N, 3) plus squared errors of the places (B, N, 3), a mean."""
        hidden_states, self._hidden_states = self._hidden_states, None
        assert hidden_states is not None, "the model has not run since the last loss"
        answers = self.read(self.norm(hidden_states.float())).float()
        *logits, found = answers.split((*_CLASSES, 3), dim=-1)
        loss = (found - places.float()).square().sum(dim=-1).mean()
        for logit, label in zip(logits, labels.long().unbind(-1)):
            loss = loss + F.cross_entropy(logit.flatten(0, 1), label.flatten())
        return loss

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.training:
            self._hidden_states = output  # (B, N, D)
