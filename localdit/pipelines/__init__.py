"""Pipelines: a prompt or a label, and a picture if one likes, in; pictures out. One file per architecture.

Importing this package makes its pipelines known to diffusers, as far as diffusers lets others do so.
"""

import inspect
import pkgutil
import warnings
from contextlib import suppress
from typing import Any

import diffusers
import transformers

from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.models.sparse_dit import SparseDiTTransformer2DModel
from localdit.pipelines.common import NonFiniteError
from localdit.pipelines.ledit import LEDiTPipeline
from localdit.pipelines.local_dit import LocalDiTPipeline
from localdit.pipelines.pixeldit import PixelDiTPipeline
from localdit.pipelines.pixeldit_text import PixelDiTTextPipeline
from localdit.pipelines.sparse_dit import SparseDiTPipeline

# Of a saved pipeline diffusers loads what is in diffusers or in modules that have been imported: these two.
from localdit.schedulers.edm_heun import EDMHeunScheduler as EDMHeunScheduler
from localdit.schedulers.flow_adams_bashforth import (
    FlowAdamsBashforthScheduler as FlowAdamsBashforthScheduler,
)

__all__ = [
    "LEDiTPipeline",
    "LocalDiTPipeline",
    "NonFiniteError",
    "PixelDiTPipeline",
    "PixelDiTTextPipeline",
    "SparseDiTPipeline",
]

PIPELINES = (
    LEDiTPipeline,
    LocalDiTPipeline,
    PixelDiTPipeline,
    PixelDiTTextPipeline,
    SparseDiTPipeline,
)
# Of AutoPipelines.
TEXT_PIPELINES = {
    "localdit": LocalDiTPipeline,
    "pixeldit": PixelDiTTextPipeline,
    "sparsedit": SparseDiTPipeline,
}
# Models, with where their blocks return what they were given: the hidden states, and the text's, if any.
MODELS: dict[Any, dict[str, int]] = {
    LEDiTTransformer2DModel: {"return_hidden_states_index": 0},
    LocalDiTTransformer2DModel: {"return_hidden_states_index": 0},
    PixelDiTTransformer2DModel: {"return_hidden_states_index": 0},
    PixelDiTTextTransformer2DModel: {
        "return_hidden_states_index": 0,
        "return_encoder_hidden_states_index": 1,
    },
    SparseDiTTransformer2DModel: {"return_hidden_states_index": 0},
}


def find_pipeline(name: str) -> Any:
    """A pipeline's class: one of ours by its name, one from elsewhere by its path, package.module.Class.

    Raises:
        ValueError: There is no such class, or it is no pipeline.
    """
    found: Any = {cls.__name__: cls for cls in PIPELINES}.get(name)
    reason = ""
    if found is None and "." in name:
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            reason = f": {error}"
    base = diffusers.DiffusionPipeline
    if not (inspect.isclass(found) and issubclass(found, base) and found is not base):
        known = ", ".join(cls.__name__ for cls in PIPELINES)
        raise ValueError(f"pipeline must be {known} or package.module.Class of another, got {name!r}{reason}")
    return found


def register_with_diffusers() -> None:
    """Enter our classes where diffusers looks for its own.

    `DiffusionPipeline.from_pretrained` looks for a pipeline on the `diffusers` module, the AutoPipelines in
    two mappings, and the caches of `enable_cache` in a registry for how to read a block. Mappings and
    registry are internals of diffusers: where they are missing or broken, their convenience is lost and no
    more.
    """
    for cls in (*PIPELINES, *MODELS):  # models for AutoModel
        setattr(diffusers, cls.__name__, cls)

    # The mappings' module imports most of diffusers' pipelines, whose warnings are nobody's business here.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with suppress(ImportError, AttributeError, RuntimeError), warnings.catch_warnings(action="ignore"):
        from diffusers.pipelines import auto_pipeline

        # One class does both tasks.
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.update(TEXT_PIPELINES)
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.update(TEXT_PIPELINES)
    transformers.logging.set_verbosity(verbosity)

    with suppress(ImportError, AttributeError, TypeError):
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        for model, indices in MODELS.items():
            TransformerBlockRegistry.register(model.block_class, TransformerBlockMetadata(**indices))


register_with_diffusers()
