"""Diffusion transformers with local attention, with the interfaces of diffusers.

The public names are imported on first use: `import localdit` itself loads no PyTorch and touches no GPU, disk
or network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from localdit._version import __version__

if TYPE_CHECKING:
    from localdit.assets import MINI
    from localdit.models.local_dit import LocalDiTTransformer2DModel, TextContext
    from localdit.pipelines.local_dit import LocalDiTPipeline

_HOMES = {
    "MINI": "localdit.assets",
    "LocalDiTPipeline": "localdit.pipelines.local_dit",
    "LocalDiTTransformer2DModel": "localdit.models.local_dit",
    "TextContext": "localdit.models.local_dit",
}

__all__ = ["MINI", "LocalDiTPipeline", "LocalDiTTransformer2DModel", "TextContext", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'localdit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
