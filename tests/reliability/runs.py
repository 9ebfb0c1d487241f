"""Runs that are told to stop, that go on, and that meet gradients which are not finite."""

import json
import math
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState

from localdit.training.autoencoder import Autoencoding
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import Config, TrainConfig
from localdit.training.diffusion import Diffusion
from localdit.training.loop import train
from localdit.training.stopping import Stopped

from . import Outcome, experiment
from .toys import captioned, denoising_run, same, save_encoders

STEPS, ACCUMULATION = 5, 2
MODEL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}


def toy_run(folder: Path, **options: Any) -> Config:
    """Five steps of two micro-batches of an autoencoder, which crops and draws noise at random."""
    defaults = {"max_steps": STEPS, "batch_size": 2, "gradient_accumulation": ACCUMULATION, "warmup_steps": 2}
    return Config(
        str(folder),
        MODEL,
        {"name": "autoencoding", "scenes": 7, "picture_size": 32, "crop_size": 16},
        TrainConfig(**{**defaults, "log_every": 1, "save_every": 100, "learning_rate": 1e-3, **options}),
    )


def finish(config: Config) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision otherwise
    with mock.patch.object(Autoencoding, "export"):
        train(config)


def outcome_of(run: Path) -> tuple[Any, list[Any]]:
    """Tensors of the newest checkpoint, and the losses of all steps."""
    found = find_checkpoint(run, "auto")
    assert found is not None
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return load_checkpoint(found)[0], [(line["step"], line["loss"]) for line in lines]


def equal(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> bool:
    return same(one[0], other[0]) and one[1] == other[1]


@contextmanager
def at_call(method: str, call: int, do: Any, objective: type = Autoencoding) -> Iterator[None]:
    """Do something when a method of the objective is called for the n-th time, from 1."""
    original, calls = getattr(objective, method), iter(range(1, 10**9))

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return do(result) if next(calls) == call else result

    with mock.patch.object(objective, method, called):
        yield


def terminate(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return result


@experiment(
    "R4",
    "SIGTERM in a step, between accumulated batches or in a preview: the step on its way is saved, and the "
    "run that goes on ends as the unbroken one, bit for bit",
    full=50,
    small=3,
)
def sigterm(folder: Path, trials: int) -> Outcome:
    options = {"preview_every": 1}
    finish(toy_run(folder / "whole", **options))
    whole, passed = outcome_of(folder / "whole"), 0
    for trial in range(trials):
        method, calls = [("loss", STEPS * ACCUMULATION), ("preview", STEPS)][trial % 2]
        call = random.randint(1, calls - 1)
        step = call if method == "preview" else -(-call // ACCUMULATION)
        config = toy_run(folder / f"{trial}", **options)
        stopped = False
        try:
            with at_call(method, call, terminate):
                finish(config)
        except Stopped:
            stopped = True
        found = find_checkpoint(Path(config.output_dir), "auto")
        # A signal in the preview after step n is heard at the end of step n + 1 at the latest.
        saved = found is not None and int(found.name[-8:]) - step in (0, method == "preview")
        if stopped and saved:
            finish(config)
            passed += equal(outcome_of(Path(config.output_dir)), whole)
    return Outcome(trials, passed, "exit code 143; a second signal ends the process at once")


@experiment(
    "R5",
    "A run that stops at any step and goes on equals the unbroken one bit for bit: weights, average, "
    "moments, losses",
    full=42,
    small=2,
)
def resume(folder: Path, trials: int) -> Outcome:
    """Over objectives, optimizers, data workers, precisions and accumulation; crops, noise, timesteps and
    which captions are dropped are random, the stop is amid an epoch."""
    source = captioned(folder / "pictures", [(64, 64), (80, 72), (64, 96), (64, 64), (72, 64)])
    encoders = save_encoders(folder / "encoders")
    kinds: list[dict[str, Any]] = [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "num_workers": 2, "mixed_precision": "bf16"},
        {"optimizer": "schedule_free_adamw"},
        {"optimizer": "adamw8bit", "gradient_accumulation": 1},
        {"optimizer": "adamw", "schedule": "cosine", "gradient_accumulation": 3},
        {"optimizer": "muon", "denoising": True, "num_workers": 2},
        {"optimizer": "adamw", "denoising": True, "gradient_accumulation": 2, "resample": True},
    ]
    passed, failed = 0, set()
    for trial in range(trials):
        options = dict(kinds[trial % len(kinds)])
        kind: type = Diffusion if options.pop("denoising", False) else Autoencoding
        name = folder / f"{trial}-whole"
        if kind is Autoencoding:
            whole = toy_run(name, **options)
        else:
            with_dropout = {"caption_dropout": 0.5}
            whole = denoising_run(
                name, source, encoders, with_dropout, max_steps=STEPS, batch_size=2, **options
            )
        finish(whole)
        parts = replace(whole, output_dir=str(folder / f"{trial}-parts"))
        stop = random.randint(1, STEPS - 1) * whole.train.gradient_accumulation
        try:
            with at_call("loss", stop, terminate, kind):
                finish(parts)
        except Stopped:
            finish(parts)
        if equal(outcome_of(Path(parts.output_dir)), outcome_of(Path(whole.output_dir))):
            passed += 1
        else:
            failed.add(json.dumps(options))
    names = (
        "an autoencoder and a transformer whose captions are dropped at random; AdamW, schedule-free and "
        "8-bit AdamW, Muon; 0 and 2 workers; float32 and bfloat16"
    )
    return Outcome(trials, passed, f"not: {', '.join(sorted(failed))}" if failed else names)


@experiment(
    "R19",
    "A batch whose gradients are not finite changes neither weights nor average nor moments, and is counted",
    full=50,
    small=2,
)
def not_finite(folder: Path, trials: int) -> Outcome:
    passed = 0
    for trial in range(trials):
        step, poison = random.randint(2, STEPS), torch.tensor(random.choice([math.nan, math.inf]))
        config = toy_run(folder / f"{trial}", save_every=1, keep_checkpoints=STEPS)
        call = step * ACCUMULATION - random.randint(0, 1)
        with at_call("loss", call, poison.__mul__):
            finish(config)
        before, after = (
            load_checkpoint(folder / f"{trial}" / f"step-{number:08d}")[0] for number in (step - 1, step)
        )
        lines = (folder / f"{trial}" / "log.jsonl").read_text().splitlines()
        counted = [json.loads(line)["skipped_steps"] for line in lines]
        finite = all(
            t.isfinite().all() for part in after.values() for t in part.values() if t.is_floating_point()
        )
        expected = [int(number >= step) for number in range(1, STEPS + 1)]
        passed += same(before, after) and finite and counted == expected
    return Outcome(trials, passed)
