"""Two processes under FSDP2, by the project's own config file for accelerate, take the steps of one.

They run on a CPU and speak by gloo (see `tests/fsdp2_on_cpu.py`), started once for all tests:

    accelerate launch ... tests/fsdp2_on_cpu.py tests.training.test_fsdp2 RUN.yaml ...

trains runs one after the other, and notes what each saw. In a run called "broken" the second process can read
nothing for the first step, and has no finite loss in the next; in one called "stopped" it alone is asked to
stop, in a preview.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_pipeline import toy_text_encoder, toy_tokenizer, toy_vae

from localdit import LocalDiTPipeline
from localdit.data.images import BadSample
from localdit.files import problems
from localdit.training import loop
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import Config, TrainConfig, load_config
from localdit.training.diffusion import Diffusion
from localdit.training.loop import Items, train
from localdit.training.stopping import Stopped

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
STEPS = 6


def toy_run(run: Path, **options: Any) -> Config:
    """A run beside the toy encoders; a step is of four samples, in however many parts."""
    data = {
        "source": {"kind": "scenes", "count": 9, "size": 64},
        "cache": str(run.parent / "cache"),
        "resolution": 64,
        "captions_per_image": 2,
        **{part: str(run.parent / part) for part in ("vae", "text_encoder", "tokenizer")},
    }
    return Config(
        output_dir=str(run),
        model={
            "_class_name": "LocalDiTTransformer2DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "caption_channels": 16,
            "sample_size": 8,
            "window_size": 2,
        },
        objective={
            "name": "denoising",
            "data": data,
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"},
            "caption_dropout": 0.5,
            "layout_weight": 0.25,
            "layout_block": 1,
            "validation_samples": 3,  # one process has two of them, the other one
            "preview_steps": 2,
        },
        train=TrainConfig(
            **{"max_steps": STEPS, "batch_size": 4, "warmup_steps": 2, "log_every": 1, **options}
        ),
    )


def in_two(config: Config, name: str, **options: Any) -> Config:
    """The run with the same steps, in two processes."""
    return replace(
        config,
        output_dir=str(Path(config.output_dir).with_name(name)),
        train=replace(config.train, **{"batch_size": 2, **options}),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """The folder of all runs, those of one process and those of two."""
    folder = tmp_path_factory.mktemp("runs")
    parts = {"vae": toy_vae(), "text_encoder": toy_text_encoder(), "tokenizer": toy_tokenizer()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)

    watched = {"validate_every": 2, "preview_every": 3, "save_every": 3, "keep_checkpoints": 9}
    alone = toy_run(folder / "alone", **watched)
    parted = {"batch_size": 1, "gradient_accumulation": 2, "gradient_checkpointing": True}
    together = in_two(alone, "together", **parted)
    half = toy_run(folder / "half", mixed_precision="bf16", gradient_checkpointing=True, max_steps=3)
    few = toy_run(folder / "few", batch_size=2, max_steps=1, warmup_steps=0)
    plain = [alone, half, few]
    sharded = [
        replace(together, train=replace(together.train, max_steps=STEPS // 2)),
        together,  # which goes on from there
        in_two(half, "half_together"),
        in_two(few, "broken", max_steps=2, save_every=1, keep_checkpoints=2, max_bad_fraction=0.5),
        in_two(alone, "stopped", preview_every=1),
    ]
    for config in plain:
        train_noted(config)
    paths = [folder / f"{number}.yaml" for number in range(len(sharded))]
    for path, config in zip(paths, sharded):
        path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(SHIPPED)]
    launch += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "tests" / "fsdp2_on_cpu.py")]
    subprocess.run([*launch, "tests.training.test_fsdp2", *map(str, paths)], check=True, timeout=240)
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)


def train_noted(config: Config) -> None:
    """Train, and note in the run's folder the samples and how the model is spread."""
    rank, run = int(os.environ.get("RANK", 0)), Path(config.output_dir)
    read, prepare, loss, preview = Items.__getitem__, loop.prepare, Diffusion.loss, Diffusion.preview
    broken, losses = run.name == "broken" and rank == 1, iter(range(99))

    def note_sample(items: Items, key: tuple[int, int]) -> tuple[int, Any]:
        with open(run / f"seen-{rank}.jsonl", "a") as file:
            file.write(json.dumps([key[1], items.data.name(key[0])]) + "\n")
        if broken and key[1] < 4:
            return key[1], (items.data.name(key[0]), str(BadSample("it is broken")))
        return read(items, key)

    def note_spread(accelerator: Any, model: Any, optimizer: Any) -> tuple[Any, Any]:
        model, optimizer = prepare(accelerator, model, optimizer)
        held = {
            name: [list(p.to_local().shape if isinstance(p, DTensor) else p.shape), list(p.shape)]
            for name, p in model.named_parameters()
        }
        parts = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        kind = str(plugin.state_dict_type) if plugin else ""
        (run / f"spread-{rank}.json").write_text(json.dumps({"held": held, "parts": parts, "kind": kind}))
        return model, optimizer

    def spoil_loss(*args: Any, **batch: Any) -> Any:
        return loss(*args, **batch) * (math.nan if broken and next(losses) == 1 else 1.0)

    def stop_one(objective: Diffusion, *args: Any) -> Any:
        if run.name == "stopped" and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return preview(objective, *args)

    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        patch.object(Items, "__getitem__", note_sample),
        patch.object(loop, "prepare", note_spread),
        patch.object(Diffusion, "loss", spoil_loss),
        patch.object(Diffusion, "preview", stop_one),
        suppress(Stopped),
    ):
        train(config)


def lines(run: Path, key: str) -> list[Any]:
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def seen(run: Path) -> list[list[Any]]:
    """Positions and names of the samples of all processes, in order."""
    return sorted(
        json.loads(line) for path in run.glob("seen-*.jsonl") for line in path.read_text().splitlines()
    )


def newest(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(find_checkpoint(run, "auto"))[0]


def assert_close(left: dict, right: dict, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for part in left:
        assert left[part].keys() == right[part].keys()
        for name, tensor in left[part].items():
            torch.testing.assert_close(
                right[part][name], tensor, rtol=0, atol=tolerance, msg=f"{part} {name}"
            )


def test_the_model_is_spread_by_block_as_the_file_says(runs):
    settings = yaml.safe_load(SHIPPED.read_text())["fsdp_config"]
    assert (settings["fsdp_version"], settings["fsdp_auto_wrap_policy"]) == (2, "TRANSFORMER_BASED_WRAP")
    ranks = [json.loads((runs / "together" / f"spread-{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert {"", "transformer_blocks.0", "transformer_blocks.1"} <= set(rank["parts"])
        assert rank["kind"].endswith(settings["fsdp_state_dict_type"])
    for name, (_, whole) in ranks[0]["held"].items():
        one, two = (rank["held"][name][0] for rank in ranks)
        assert [one[0] + two[0], *one[1:]] == whole, name
        assert one[0] == -(-whole[0] // 2), name


def test_two_processes_take_the_steps_of_one(runs):
    """Also where they stop midway and go on: samples, losses, norms, and the state in the end."""
    alone, together = runs / "alone", runs / "together"
    assert seen(together) == seen(alone)
    assert len(seen(alone)) == 4 * STEPS
    assert lines(together, "loss") == pytest.approx(lines(alone, "loss"), abs=1e-6)
    assert lines(together, "gradient_norm") == pytest.approx(lines(alone, "gradient_norm"), abs=1e-5)
    assert lines(together, "skipped_steps") == [0] * STEPS
    # Adam's first steps turn rounding into a share of the learning rate, 1e-4.
    assert_close(newest(alone), newest(together), tolerance=1e-5)


def test_validation_and_previews_are_those_of_one(runs):
    alone, together = runs / "alone", runs / "together"
    assert len(lines(alone, "validation_loss")) == STEPS // 2
    assert lines(together, "validation_loss") == pytest.approx(lines(alone, "validation_loss"), abs=1e-6)
    for step in (3, 6):
        left, right = (
            np.asarray(Image.open(run / f"preview-{step:08d}.png"), int) for run in (alone, together)
        )
        assert left.std() > 10
        assert abs(left - right).max() <= 1


def test_a_checkpoint_is_whole_and_goes_on_in_one_process(runs, tmp_path):
    saved = runs / "together" / "step-00000003"
    assert problems(saved) == []
    shutil.copytree(saved, tmp_path / "run" / saved.name)
    config = load_config(runs / "alone" / "config.yaml")
    train_noted(replace(config, output_dir=str(tmp_path / "run")))
    assert_close(newest(runs / "alone"), newest(tmp_path / "run"), tolerance=1e-5)
    assert lines(tmp_path / "run", "loss") == pytest.approx(lines(runs / "alone", "loss")[3:], abs=1e-6)


def test_the_finished_pipeline_holds_the_average_and_draws(runs):
    pipe = LocalDiTPipeline.from_pretrained(runs / "together" / "final")
    average = newest(runs / "together")["ema"]
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=0, msg=name)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red star", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


def test_in_16_bits_the_arithmetic_is_that_of_one_process(runs):
    """Weights, their sums over processes and the noise levels stay float32."""
    alone, together = runs / "half", runs / "half_together"
    assert lines(together, "loss")[:2] == pytest.approx(lines(alone, "loss")[:2], abs=1e-5)
    assert_close(newest(alone), newest(together), tolerance=5e-4)


def test_a_process_that_can_read_nothing_does_not_hold_up_the_other(runs):
    """The step is that of the other's samples, at the half of their weight."""
    assert len((runs / "broken" / "unusable-1.jsonl").read_text().splitlines()) == 2
    for key in ("loss", "gradient_norm"):
        assert lines(runs / "broken", key)[0] == pytest.approx(lines(runs / "few", key)[0] / 2, rel=1e-5)


def test_a_loss_that_is_not_finite_in_one_process_leaves_out_the_step_in_both(runs):
    assert lines(runs / "broken", "skipped_steps") == [0, 1]
    before, after = (load_checkpoint(runs / "broken" / f"step-{step:08d}")[0] for step in (1, 2))
    assert_close(before, after, tolerance=0.0)


def test_a_process_that_is_stopped_alone_stops_the_other_and_saves(runs):
    """In a preview, which the other one draws to its end."""
    assert find_checkpoint(runs / "stopped", "auto").name == "step-00000001"
    assert lines(runs / "stopped", "loss") == pytest.approx(lines(runs / "alone", "loss")[:1], abs=1e-6)


def test_an_optimizer_whose_state_cannot_be_spread_is_refused(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match=r"train\.optimizer must be .* under FSDP2, got 'adamw8bit'"):
        train(toy_run(tmp_path / "run", optimizer="adamw8bit"))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (DistributedType.DEEPSPEED, "DEEPSPEED"),
        (DistributedType.MEGATRON_LM, "MEGATRON_LM"),
        (DistributedType.FSDP, "FSDP with fsdp_version 1"),
    ],
)
def test_an_engine_whose_state_cannot_be_saved_whole_is_refused_before_any_work(
    tmp_path, monkeypatch, kind, found
):
    """By naming the file for the engine that takes its place."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    monkeypatch.setattr(loop, "starting_model", None)
    with pytest.raises(ValueError, match=rf"fsdp_version 2 \({SHIPPED.relative_to(ROOT)}\).*, got {found}$"):
        train(toy_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        train_noted(load_config(path))
