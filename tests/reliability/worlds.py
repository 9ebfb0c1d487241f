"""A run that goes on with another number of processes.

    torchrun --nproc-per-node 2 -m tests.reliability.worlds RUN.yaml ...

trains runs one after the other, as `localdit train` does, and notes the samples in `seen-<process>.jsonl`.
`tests/fsdp2_on_cpu.py` starts it under FSDP2.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from accelerate.state import AcceleratorState

from localdit.training.config import Config, load_config
from localdit.training.loop import Items, train

from . import Outcome, experiment
from .toys import denoising_run, save_encoders

ROOT = Path(__file__).parents[2]
STEPS = 12
TOLERANCE = 1e-6
# Samples of a micro-batch in one process, micro-batches of a step there and with two processes.
BATCHES = [(4, 1, 1), (2, 2, 1), (2, 3, 3), (6, 1, 1), (2, 4, 2)]


@experiment(
    "R6",
    "A run whose processes become two and then one again takes the steps of one that stays alone: the same "
    "samples in each, the losses within 1e-6",
    full=len(BATCHES),
    small=None,
)
def changing_worlds(folder: Path, trials: int) -> Outcome:
    """The two processes have a copy of the model each."""
    return change_worlds(
        folder, trials, ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    )


@experiment(
    "R6",
    "So does one whose two processes share the model under FSDP2, as `configs/accelerate/fsdp2.yaml` says",
    full=len(BATCHES),
    small=None,
)
def changing_shards(folder: Path, trials: int) -> Outcome:
    """The two processes have half of each of the model's tensors."""
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"),
    ]
    launch += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "tests" / "fsdp2_on_cpu.py")]
    return change_worlds(folder, trials, launch)


def change_worlds(folder: Path, trials: int, launch: Sequence[str]) -> Outcome:
    """A third of the steps each. The processes are CPU ones and speak by gloo.

    Args:
        folder: An empty one.
        trials: How many runs.
        launch: The module that starts two processes, and what it is told before this module's name.
    """
    encoders, runs = save_encoders(folder / "encoders"), []
    for trial in range(trials):
        size, accumulation, together = BATCHES[trial % len(BATCHES)]
        options = {
            "max_steps": STEPS,
            "batch_size": size,
            "gradient_accumulation": accumulation,
            "seed": trial,
        }
        source = {"kind": "scenes", "count": 19, "size": 64}
        data = {**encoders, "captions_per_image": 2}
        config = denoising_run(folder / f"{trial}" / "alone", source, data, {}, **options)
        train_noted(config)
        changing = replace(config, output_dir=str(folder / f"{trial}" / "changing"))
        train_noted(until(changing, STEPS // 3))
        # The step's samples stay as many: two processes take half of them each.
        per_process = size * accumulation // (2 * together)
        two = {"batch_size": per_process, "gradient_accumulation": together}
        runs.append((changing, until(changing, 2 * STEPS // 3, **two)))
    train_in_two([config for _, config in runs], folder, launch)
    passed, most = 0, 0.0
    for changing, _ in runs:
        train_noted(changing)
        run, alone = Path(changing.output_dir), Path(changing.output_dir).with_name("alone")
        difference = max(abs(a - b) for a, b in zip(losses(run), losses(alone), strict=True))
        most = max(most, difference)
        passed += difference <= TOLERANCE and seen(run) == seen(alone)
    note = f"1, 2 and 1 processes (gloo), {STEPS // 3} steps each; losses differ by {most:.1e} at most"
    return Outcome(trials, passed, note)


def until(config: Config, steps: int, **options: Any) -> Config:
    return replace(config, train=replace(config.train, max_steps=steps, **options))


def train_noted(config: Config) -> None:
    """Train, and note the position and the name of each sample."""
    read, path = Items.__getitem__, Path(config.output_dir, f"seen-{os.environ.get('RANK', 0)}.jsonl")

    def note(items: Items, key: tuple[int, int]) -> tuple[int, Any]:
        with open(path, "a") as file:
            file.write(json.dumps([key[1], items.data.name(key[0])]) + "\n")
        return read(items, key)

    if "RANK" not in os.environ:
        AcceleratorState._reset_state(reset_partial_state=True)  # runs differ in nothing that it holds
    with (
        patch.object(Items, "__getitem__", note),
        open(os.devnull, "w") as nowhere,
        redirect_stderr(nowhere),
    ):
        train(config)


def train_in_two(configs: Sequence[Config], folder: Path, launch: Sequence[str]) -> None:
    paths = [folder / f"{number}.yaml" for number in range(len(configs))]
    for path, config in zip(paths, configs):
        path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    subprocess.run(
        [sys.executable, "-m", *launch, "tests.reliability.worlds", *map(str, paths)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def seen(run: Path) -> Counter[tuple[int, str]]:
    """The samples by position, those of all processes: a step's are those of consecutive positions."""
    lines = [line for path in run.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    return Counter((position, name) for position, name in map(json.loads, lines))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        train_noted(load_config(path))
