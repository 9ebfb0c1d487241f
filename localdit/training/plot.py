"""A picture of what runs wrote into their log.jsonl: losses, gradient norms, learning rates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from localdit.plots import new_figure


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, in their order.

    Raises:
        ValueError: There is no log, or nothing in it yet, or a line is damaged.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"{run} is no run: it holds no log.jsonl")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number} is no JSON: {line[:80]!r}") from None
    if not lines:
        raise ValueError(f"{path} is empty: the run has not logged yet")
    return lines


def plot_runs(runs: Sequence[Path], out: Path, *, smoothing: int = 10) -> None:
    """Draw the curves of one or more runs, side by side in colour, into one picture.

    Args:
        runs: Folders of runs, or their log files.
        out: The picture to write; its suffix says the format (.png, .svg, .pdf).
        smoothing: Logged values in the running mean of losses and norms. 1 is none.

    Raises:
        ValueError: A run has no log, or `smoothing` is below 1.
        ImportError: matplotlib is not installed.
    """
    if smoothing < 1:
        raise ValueError(f"smoothing must be at least 1, got {smoothing}")
    logs = [read_log(run) for run in runs]
    titles = {"loss": "training loss", "gradient_norm": "gradient norm", "learning_rate": "learning rate"}
    has_validation = any("validation_loss" in line for log in logs for line in log)
    panels = ["loss", *(["validation_loss"] if has_validation else []), "gradient_norm", "learning_rate"]
    figure = new_figure(5.2 * len(panels), 3.8)
    for number, name in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for run, log in zip(runs, logs):
            steps, values = curve(log, name)
            if not len(steps):
                continue
            label = (run if run.is_dir() else run.parent).name
            if name in ("loss", "gradient_norm") and smoothing > 1 and len(values) > smoothing:
                (single,) = axes.plot(steps, values, linewidth=0.7, alpha=0.3)
                mean = np.convolve(values, np.ones(smoothing) / smoothing, mode="valid")
                axes.plot(steps[smoothing - 1 :], mean, color=single.get_color(), label=label)
            else:
                axes.plot(steps, values, marker="." if name == "validation_loss" else None, label=label)
        axes.set(title=titles.get(name, "validation loss"), xlabel="step")
        if name in ("loss", "validation_loss", "gradient_norm") and all(
            v > 0 for v in curve_values(logs, name)
        ):
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        if len(runs) > 1:
            axes.legend()
    figure.savefig(out, dpi=120)


def curve(log: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity, where it is logged."""
    pairs = [(line["step"], line[name]) for line in log if name in line]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def curve_values(logs: list[list[dict[str, Any]]], name: str) -> np.ndarray:
    """The values of one quantity in all logs."""
    return np.concatenate([curve(log, name)[1] for log in logs])
