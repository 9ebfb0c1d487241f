"""Plots, for which matplotlib has to be there: it comes with the extra `train`."""

from importlib.util import find_spec
from typing import Any


def check_plots() -> None:
    """See whether plots can be made, before the work whose figures they are to show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib, of the extra 'train': pip install 'localdit[train]'")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, whose parts make room for each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_plots()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
