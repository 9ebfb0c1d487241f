"""Diffusion transformers with local attention, with the interfaces of diffusers.

The public names are imported on first use: `import localdit` itself loads no PyTorch and touches no GPU, disk
or network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from localdit._version import __version__

if TYPE_CHECKING:
    from localdit.assets import MINI
    from localdit.models.ledit import LEDiTTransformer2DModel
    from localdit.models.local_dit import LocalDiTTransformer2DModel, TextContext
    from localdit.models.pixeldit import PixelDiTTransformer2DModel
    from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
    from localdit.models.sparse_dit import SparseDiTTransformer2DModel, SparseTextContext
    from localdit.pipelines.ledit import LEDiTPipeline
    from localdit.pipelines.local_dit import LocalDiTPipeline
    from localdit.pipelines.pixeldit import PixelDiTPipeline
    from localdit.pipelines.pixeldit_text import PixelDiTTextPipeline
    from localdit.pipelines.sparse_dit import SparseDiTPipeline
    from localdit.schedulers.edm_heun import EDMHeunScheduler
    from localdit.schedulers.flow_adams_bashforth import FlowAdamsBashforthScheduler

_HOMES = {
    "EDMHeunScheduler": "localdit.schedulers.edm_heun",
    "FlowAdamsBashforthScheduler": "localdit.schedulers.flow_adams_bashforth",
    "LEDiTPipeline": "localdit.pipelines.ledit",
    "LEDiTTransformer2DModel": "localdit.models.ledit",
    "MINI": "localdit.assets",
    "LocalDiTPipeline": "localdit.pipelines.local_dit",
    "LocalDiTTransformer2DModel": "localdit.models.local_dit",
    "PixelDiTPipeline": "localdit.pipelines.pixeldit",
    "PixelDiTTextPipeline": "localdit.pipelines.pixeldit_text",
    "PixelDiTTextTransformer2DModel": "localdit.models.pixeldit_text",
    "PixelDiTTransformer2DModel": "localdit.models.pixeldit",
    "SparseDiTPipeline": "localdit.pipelines.sparse_dit",
    "SparseDiTTransformer2DModel": "localdit.models.sparse_dit",
    "SparseTextContext": "localdit.models.sparse_dit",
    "TextContext": "localdit.models.local_dit",
}

__all__ = [
    "MINI",
    "EDMHeunScheduler",
    "FlowAdamsBashforthScheduler",
    "LEDiTPipeline",
    "LEDiTTransformer2DModel",
    "LocalDiTPipeline",
    "LocalDiTTransformer2DModel",
    "PixelDiTPipeline",
    "PixelDiTTextPipeline",
    "PixelDiTTextTransformer2DModel",
    "PixelDiTTransformer2DModel",
    "SparseDiTPipeline",
    "SparseDiTTransformer2DModel",
    "SparseTextContext",
    "TextContext",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localdit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
