"""What every model here holds its config, its weights and its inputs to, beyond what diffusers does.

Values of a wrong type or size are refused before memory is taken for them, missing weights are never made up
for, and inputs that do not fit are refused before anything is computed.
"""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from localdit.models.single_file import PICKLE_SUFFIXES, refuse_misfits

MAX_PARAMETERS = 10**11  # more is a slip


class StrictModelMixin:
    """Before `ModelMixin` among the bases of a model: `from_pretrained` is strict, and the `__init__` of a
    subclass may name its own config fields alone and hand on the others as `**kwargs`."""

    ignore_for_config: ClassVar = ["kwargs"]  # they are registered by the parent that names them

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        """The config fields of a class, with its parents' as far as they are handed on."""
        keys: set[str] = set()
        for cls in input_class.__mro__:
            if "__init__" in vars(cls):
                parameters = inspect.signature(cls.__init__).parameters
                keys |= parameters.keys()
                if "kwargs" not in parameters:
                    break
        return keys - {"kwargs"}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a folder, or a model of the hub: diffusers' method, but strict, and from safetensors.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a hub name.
            output_loading_info: Return what diffusers found beside the model.
            kwargs: As diffusers documents them. Pickles, `.bin`, are read with `use_safetensors=False` alone.

        Raises:
            ValueError: Tensors are missing, surplus or misshapen, and it is said which; or the weights are
                pickles. A config field has a value that it cannot have.
            OSError: There are no weights, or they are damaged.
            NotImplementedError: A tensor is missing, and there is a `device_map`: PyTorch's.
            RuntimeError: A tensor is misshapen, with `low_cpu_mem_usage=False`: diffusers'.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
            refuse_pickles(folder)
        load: Any = super().from_pretrained  # type: ignore[misc]
        model, found = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        # Of a FlashPack file nothing is found out.
        missing = set(found.get("missing_keys", ()))
        if kwargs.get("device_map") is None:  # of shards, diffusers believes the index
            missing |= {name for name, tensor in model.state_dict().items() if tensor.is_meta}
        files = list(folder.glob("*.safetensors"))
        refuse_misfits(
            files[0] if len(files) == 1 else pretrained_model_name_or_path,
            {
                "missing": sorted(missing),
                "surplus": sorted(found.get("unexpected_keys", ())),
                "misshapen": sorted(
                    f"{name} is {tuple(shape)}, must be {tuple(expected)}"
                    for name, shape, expected in found.get("mismatched_keys", ())
                ),
            },
            hint="to begin with some of them, build the model, and load_state_dict(..., strict=False)",
        )
        return (model, found) if output_loading_info else model


def refuse_pickles(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError, and say how to convert them, if a folder has weights, but as pickles alone."""
    folder = Path(folder)
    pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLE_SUFFIXES]
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} must have weights as .safetensors, but has {', '.join(pickles)}, pickles, which can "
            "hold code. Convert them, which takes tensors and runs nothing: load the folder by its class's "
            "from_pretrained(..., use_safetensors=False), and save_pretrained to it"
        )


# --- Config -------------------------------------------------------------------------------------------------


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise ValueError unless every one is a positive integer."""
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_types(init: Callable[..., None], config: Mapping[str, Any]) -> None:
    """Raise ValueError if a config field has another type than it has in the signature of `init`.

    A float is finite and may be an integer, a tuple may be a list, as in a file, and a bool is no number.
    """
    for name, kind in get_type_hints(init).items():
        if name in config and not _fits(config[name], kind):
            raise ValueError(f"{name} must be {inspect.formatannotation(kind)}, got {config[name]!r}")


def _fits(value: Any, kind: Any) -> bool:
    kinds = [one for one in get_args(kind) if one is not ...]
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in kinds)
    if get_origin(kind) in (tuple, list):
        return isinstance(value, tuple | list) and all(any(_fits(v, one) for one in kinds) for v in value)
    if kind is float:
        return _fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def check_parameters(at_least: int, sizes: Mapping[str, Any]) -> None:
    """Raise ValueError if a model would have more than `MAX_PARAMETERS`.

    Args:
        at_least: How many it has, or somewhat less.
        sizes: What makes them so many, for the message.
    """
    if at_least > MAX_PARAMETERS:
        listed = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(f"the model must have at most {MAX_PARAMETERS:,} parameters, got {listed}")


# --- Inputs -------------------------------------------------------------------------------------------------


def check_sample(hidden_states: Tensor, channels: int, patch_size: int) -> None:
    """Raise ValueError unless a noisy sample is (B, channels, H, W), in whole patches."""
    shape = tuple(hidden_states.shape)
    if hidden_states.ndim != 4 or shape[1] != channels:
        raise ValueError(f"hidden_states must be (batch, {channels}, height, width), got {shape}")
    for name, size in zip(("height", "width"), shape[2:]):
        if size < 1 or size % patch_size:
            raise ValueError(f"hidden_states' {name} must be a multiple of {patch_size}, got {size}")


def check_timestep(timestep: Tensor | float, batch: int) -> None:
    """Raise ValueError unless there is one timestep, or one for each of the batch."""
    # Of sizes that a compiler keeps dynamic, tuples do not compare.
    if isinstance(timestep, Tensor) and (
        timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) != 1 and len(timestep) != batch)
    ):
        raise ValueError(f"timestep must be a scalar or ({batch},), got {tuple(timestep.shape)}")


def check_caption(text: Tensor, mask: Tensor | None, channels: int, batch: int | None = None) -> None:
    """Raise ValueError unless text features are (B, T, channels), with B the batch of the sample if there is
    one, and their mask (B, T)."""
    if text.ndim != 3 or text.shape[2] != channels:
        raise ValueError(
            f"encoder_hidden_states must be (batch, tokens, {channels}), got {tuple(text.shape)}"
        )
    if batch is not None and len(text) != batch:
        raise ValueError(
            f"encoder_hidden_states has batch {len(text)}, hidden_states has batch {batch}; repeat the text"
        )
    if mask is not None and mask.shape != text.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask must be {tuple(text.shape[:2])} like encoder_hidden_states, "
            f"got {tuple(mask.shape)}"
        )


def extra_inputs(block_class: type[nn.Module], base: type[nn.Module]) -> frozenset[str]:
    """The names of what a subclass's block takes beyond the block `base`."""
    own, known = (inspect.signature(block.forward).parameters for block in (block_class, base))
    return frozenset(own) - frozenset(known)


def check_attention_kwargs(
    given: Mapping[str, Any] | None, extra: frozenset[str], block_class: type[nn.Module]
) -> None:
    """Raise ValueError if `attention_kwargs` holds anything but what `extra_inputs` found."""
    if unknown := set(given or ()) - extra:
        raise ValueError(
            f"attention_kwargs holds {sorted(unknown)}, which {block_class.__name__} does not take; "
            f"it takes {sorted(extra | {'scale'})}"
        )
