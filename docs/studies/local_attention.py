"""The study of docs/studies/local_attention.md: train, measure, draw, and write its tables.

    python docs/studies/local_attention.py

Finished runs and measurements are kept under runs/studies/local_attention and not done again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pages import fill, spread

from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.evaluation.scenes import evaluate_scenes
from localdit.training.plot import curve, read_log

CONFIG = "configs/local_dit/study_local_attention.yaml"
RUNS = Path("runs/studies/local_attention")
PAGE = Path(__file__).with_suffix(".md")
SEEDS = (0, 1, 2)
PROMPTS = 128
GUIDANCE = 3.0

# The names of the patterns, and the fields of the model's config that make them, given its number of blocks.
PATTERNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "local": lambda blocks: {"global_context": False, "full_attention_layers": []},
    "global": lambda blocks: {"global_context": True, "full_attention_layers": []},
    "alternating": lambda blocks: {
        "global_context": False,
        "full_attention_layers": list(range(1, blocks, 2)),
    },
    "full": lambda blocks: {"global_context": False, "full_attention_layers": list(range(blocks))},
}
STUDY = {"num_attention_heads": 4, "attention_head_dim": 24, "caption_channels": 128, "window_size": 2}
PUBLISHED = {"num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096, "window_size": 4}
# Of what time and memory are measured: a title, the widths, the blocks, the side in latent pixels, the batch.
CASES = (
    ("the study's model, batch of 32", STUDY, 6, 16, 32),
    ("published width, 512 px", PUBLISHED, 2, 64, 1),
    ("published width, 1024 px", PUBLISHED, 2, 128, 1),
)
ROUNDS = 3  # in which the patterns take turns, after one that warms up

SCORES = {
    "one object: colour": ("one_object", "color"),
    "one object: colour and shape": ("one_object", "color and shape"),
    "two objects: colours": ("two_objects", "color"),
    "two objects: relation": ("two_objects", "relation"),
    "two objects: all attributes": ("two_objects", "all attributes"),
}


def run_folder(pattern: str, seed: int) -> Path:
    return RUNS / f"{pattern}-{seed}"


def train(pattern: str, seed: int) -> None:
    run = run_folder(pattern, seed)
    if (run / "final").exists():
        return
    fields = PATTERNS[pattern](6)
    command = [sys.executable, "-m", "localdit.cli", "train", CONFIG, f"output_dir={run}"]
    command += [
        f"train.seed={seed}",
        *(f"model.{name}={json.dumps(value)}" for name, value in fields.items()),
    ]
    subprocess.run(command, check=True)


def evaluate(pattern: str, seed: int) -> dict[str, Any]:
    """Scene accuracy on the same held-out prompts for every run, and the last validation losses."""
    run = run_folder(pattern, seed)
    kept = run / "study.json"
    if not kept.exists():
        pipeline = LocalDiTPipeline.from_pretrained(run / "final")
        accuracy = evaluate_scenes(pipeline, count=PROMPTS, seed=1, guidance_scale=GUIDANCE)
        (validation,) = [line for line in read_log(run) if "validation_loss" in line]
        kept.write_text(json.dumps({"accuracy": accuracy, "validation": validation}), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def measure(widths: dict[str, Any], blocks: int, side: int, batch: int) -> dict[str, dict[str, float]]:
    """For each pattern: seconds of a forward, of a forward and backward, and bytes kept between the two."""
    models, inputs = {}, latents_and_text(widths, side, batch)
    for pattern, fields in PATTERNS.items():
        model = LocalDiTTransformer2DModel(**widths, num_layers=blocks, sample_size=side, **fields(blocks))
        for parameter in model.parameters():  # some start at zero, which may cost less time
            torch.nn.init.normal_(parameter, std=0.02)
        models[pattern] = model
    seconds: dict[str, list[tuple[float, float]]] = {pattern: [] for pattern in PATTERNS}
    for turn in range(1 + ROUNDS):
        for pattern in list(PATTERNS)[:: 1 if turn % 2 else -1]:
            seconds[pattern].append(time_once(models[pattern], inputs))
    return {
        pattern: {
            "forward": float(np.median([forward for forward, _ in taken[1:]])),  # the first warms up
            "training": float(np.median([training for _, training in taken[1:]])),
            "kept": kept_for_backward(models[pattern], inputs),
        }
        for pattern, taken in seconds.items()
    }


def latents_and_text(widths: dict[str, Any], side: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, side, side),
        "encoder_hidden_states": torch.randn(batch, 32, widths["caption_channels"]),
        "timestep": torch.full((batch,), 500),
    }


def time_once(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
    forward = time.perf_counter() - start
    start = time.perf_counter()
    model(**inputs).sample.square().mean().backward()
    return forward, time.perf_counter() - start


def kept_for_backward(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """Bytes of the tensors that the forward keeps, each memory counted once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**inputs).sample.square().mean()
    del loss
    return float(sum(kept.values()))


def accuracy_table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | " + " | ".join(results) + " |", "| --- |" + " ---: |" * len(results)]
    cells = [
        spread([one["validation"]["validation_loss"] for one in of], "{:.4f}", "") for of in results.values()
    ]
    lines.append("| validation loss | " + " | ".join(cells) + " |")
    for name, (kind, respect) in SCORES.items():
        cells = [spread([100 * one["accuracy"][kind][respect] for one in of]) for of in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(costs: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| | " + " | ".join(PATTERNS) + " |", "| --- |" + " ---: |" * len(PATTERNS)]
    for title, of in costs.items():
        for name, what in (("forward", "forward"), ("training", "forward and backward")):
            cells = [f"{of[pattern][name] / of['full'][name]:.2f}" for pattern in PATTERNS]
            lines.append(f"| {title}: {what} | " + " | ".join(cells) + " |")
        cells = [f"{of[pattern]['kept'] / of['full']['kept']:.2f}" for pattern in PATTERNS]
        cells[-1] += f" ({of['full']['kept'] / 2**20:,.0f} MiB)"
        lines.append(f"| {title}: kept for the backward pass | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """The runs' losses, the validation loss by noise level, and the accuracies with a dot for each seed."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    losses, levels, scores = figure.subplots(1, 3)
    width = 0.8 / len(results)
    for number, (pattern, of) in enumerate(results.items()):
        color = f"C{number}"
        logs = [curve(read_log(run_folder(pattern, seed)), "loss") for seed in SEEDS]
        mean = np.mean([values for _, values in logs], axis=0)
        smooth = np.convolve(mean, np.ones(5) / 5, mode="valid")
        losses.plot(logs[0][0][4:], smooth, color=color, label=pattern)

        ranges = [name for name in of[0]["validation"] if "/" in name]
        middles = [np.mean([int(n) for n in name.split("/")[1].split("-")]) for name in ranges]
        means = [np.mean([one["validation"][name] for one in of]) for name in ranges]
        reference = [np.mean([one["validation"][name] for one in results["full"]]) for name in ranges]
        levels.plot(middles, np.divide(means, reference), marker=".", color=color)

        for place, (kind, respect) in enumerate(SCORES.values()):
            values = [100 * one["accuracy"][kind][respect] for one in of]
            at = place + (number - (len(results) - 1) / 2) * width
            scores.bar(at, np.mean(values), width * 0.92, color=color, alpha=0.6)
            scores.plot([at] * len(values), values, ".", color=color, markersize=4)
    losses.set(title="training loss, mean of the seeds", xlabel="step", yscale="log")
    losses.legend()
    levels.set(title="validation loss over that of full attention", xlabel="timestep")
    scores.set(title="right pictures, %", xticks=range(len(SCORES)), ylim=(0, 100))
    scores.set_xticklabels([name.replace(": ", ":\n") for name in SCORES], fontsize=7)
    for axes in (losses, levels, scores):
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.savefig(out, dpi=110)


def main() -> None:
    for seed in SEEDS:
        for pattern in PATTERNS:
            train(pattern, seed)
    results = {pattern: [evaluate(pattern, seed) for seed in SEEDS] for pattern in PATTERNS}
    kept = RUNS / "costs.json"
    if not kept.exists():
        costs = {title: measure(*case) for title, *case in CASES}
        kept.write_text(json.dumps(costs), encoding="utf-8")
    costs = json.loads(kept.read_text(encoding="utf-8"))

    draw(results, PAGE.with_suffix(".png"))
    fill(PAGE, {"accuracy": accuracy_table(results), "cost": cost_table(costs)})


if __name__ == "__main__":
    main()
