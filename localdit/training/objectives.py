"""What a run learns: each objective brings its data, its loss, a preview, and the export of the result."""

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from localdit.data.samples import Samples
from localdit.training.autoencoder import Autoencoding
from localdit.training.config import build
from localdit.training.denoising import Denoising
from localdit.training.distillation import ConsistencyDistillation
from localdit.training.dit_loss import LearnedVariance
from localdit.training.edm import EDM
from localdit.training.flow import RectifiedFlow
from localdit.training.order import Draws
from localdit.training.stopping import StopRequest
from localdit.training.text_encoder import SceneParsing


class Objective(Protocol):
    """A dataclass whose fields are the keys of a configuration's `objective` section."""

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        """Make or load the training set, kept in `folder` if worth it. The fresh model may be changed.

        Every process calls it. Raises `Stopped` when `stop` says so.
        """

    def loss(self, model: nn.Module, draws: Draws, **batch: Any) -> Tensor:
        """Score a batch of the training set: a scalar, float32. Randomness comes from `draws` alone."""

    def validate(self, model: Any, accelerator: Accelerator, stop: StopRequest) -> dict[str, float]:
        """Losses on samples kept out of training, with fixed noise; empty where there is nothing to measure.

        Every process calls it and gets the same.
        """

    def report(self, model: Any) -> dict[str, float]:
        """What the log should say besides the loss, of the steps since the last report."""

    def preview(self, model: Any, stop: StopRequest) -> Image.Image | None:
        """Show what the model can do; None where that is nothing to see, or when asked to stop."""

    def export(self, model: Any, folder: Path) -> None:
        """Write the finished model as others load it."""


OBJECTIVES = {
    "autoencoding": Autoencoding,
    "consistency_distillation": ConsistencyDistillation,
    "denoising": Denoising,
    "edm": EDM,
    "learned_variance": LearnedVariance,
    "rectified_flow": RectifiedFlow,
    "scene_parsing": SceneParsing,
}


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
