"""Classes by the names that configurations give them."""

import inspect
import pkgutil
from contextlib import suppress
from types import ModuleType
from typing import Any

import diffusers

import localdit


def find_class(key: str, name: str, *homes: ModuleType) -> Any:
    """A class of localdit, of diffusers, of other homes, or one from elsewhere as package.module.Class.

    Args:
        key: Of the configuration, for errors.
        name: Of the class.
        homes: Where else it may be.

    Raises:
        ValueError: There is no such class.
    """
    found = next((getattr(home, name) for home in (localdit, *homes, diffusers) if hasattr(home, name)), None)
    if "." in name:
        with suppress(ImportError, AttributeError, ValueError):
            found = pkgutil.resolve_name(name)
    if not inspect.isclass(found):
        raise ValueError(
            f"{key} must name a class of localdit or diffusers, or be package.module.Class, got {name!r}"
        )
    return found
