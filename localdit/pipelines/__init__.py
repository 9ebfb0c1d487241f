"""Pipelines: a prompt, and a picture if one likes, in; pictures out. One file per architecture.

Importing this package makes its pipelines known to diffusers, as far as diffusers lets others do so.
"""

import warnings
from contextlib import suppress

import diffusers
import transformers

from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.pipelines.common import NonFiniteError
from localdit.pipelines.local_dit import LocalDiTPipeline

__all__ = ["LocalDiTPipeline", "NonFiniteError"]


def register_with_diffusers() -> None:
    """Enter our classes where diffusers looks for its own.

    `DiffusionPipeline.from_pretrained` looks for a pipeline on the `diffusers` module, the AutoPipelines in
    two mappings, and the caches of `enable_cache` in a registry for how to read a block. Mappings and
    registry are internals of diffusers: where they are missing or broken, their convenience is lost and no
    more.
    """
    diffusers.LocalDiTPipeline = LocalDiTPipeline
    diffusers.LocalDiTTransformer2DModel = LocalDiTTransformer2DModel  # for AutoModel

    # The mappings' module imports most of diffusers' pipelines, whose warnings are nobody's business here.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with suppress(ImportError, AttributeError, RuntimeError), warnings.catch_warnings(action="ignore"):
        from diffusers.pipelines import auto_pipeline

        # One class does both tasks.
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["localdit"] = LocalDiTPipeline
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["localdit"] = LocalDiTPipeline
    transformers.logging.set_verbosity(verbosity)

    with suppress(ImportError, AttributeError, TypeError):
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(
            LocalDiTTransformer2DModel.block_class, TransformerBlockMetadata(return_hidden_states_index=0)
        )


register_with_diffusers()
