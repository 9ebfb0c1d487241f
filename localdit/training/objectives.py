"""What a run learns: each objective brings its data, its loss, a preview, and the export of the result."""

from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from localdit.training.autoencoder import Autoencoding
from localdit.training.config import build
from localdit.training.denoising import Denoising
from localdit.training.text_encoder import SceneParsing


class Data(Protocol):
    """A training set: item i is the same whenever it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """A dataclass whose fields are the keys of a configuration's `objective` section."""

    def prepare(self, model: nn.Module, folder: Path, device: torch.device) -> Data:
        """Make or load the training set, kept in `folder` if worth it. The fresh model may be changed."""

    def loss(self, model: nn.Module, **batch: Tensor) -> Tensor:
        """Score a batch of the training set: a scalar, float32."""

    def preview(self, model: nn.Module) -> Image.Image | None:
        """Show what the model can do."""

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the finished model as others load it."""


OBJECTIVES = {"autoencoding": Autoencoding, "denoising": Denoising, "scene_parsing": SceneParsing}


def build_objective(values: dict[str, Any]) -> Objective:
    """The objective that `name` says, with the other values as its fields.

    Raises:
        ValueError: An unknown name, an unknown or missing field, or a value of the wrong type.
    """
    name = values.get("name")
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name must be one of {', '.join(sorted(OBJECTIVES))}, got {name!r}")
    fields = {key: value for key, value in values.items() if key != "name"}
    return build(OBJECTIVES[name], fields, where="objective.")
