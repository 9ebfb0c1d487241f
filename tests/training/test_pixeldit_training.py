"""PixelDiT through the training loop: both models, their alignment with another network, two processes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model, Gemma2Config, Gemma2Model, GemmaTokenizer

from localdit import PixelDiTPipeline, PixelDiTTextPipeline
from localdit.training import loop
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import Config, TrainConfig
from localdit.training.flow import model_time, velocity
from localdit.training.loop import train
from localdit.training.objectives import build_objective
from localdit.training.order import Draws

SIZES: dict[str, Any] = {
    "sample_size": 64,
    "patch_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_pixel_layers": 1,
    "pixel_dim": 4,
}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    """A toy DINOv2, a toy Gemma and its tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(hidden_size=8, image_size=28, **sizes)).save_pretrained(folder / "dinov2")
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-,.:>\"'\n"
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    GemmaTokenizer(vocab=vocab, add_bos_token=True).save_pretrained(folder / "gemma")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_key_value_heads": 1, "head_dim": 4, **sizes}
    Gemma2Model(Gemma2Config(vocab_size=len(vocab), **sizes)).save_pretrained(folder / "gemma")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one precision for all its accelerators; each of these runs has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def options(**values: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 4, "batch_size": 3, "warmup_steps": 0, "log_every": 1, **values})


def of_classes(run: Path, alignment: dict[str, Any] | None = None, **values: Any) -> Config:
    return Config(
        output_dir=str(run),
        model={"_class_name": "PixelDiTTransformer2DModel", **SIZES, "num_classes": 48},
        objective={
            "name": "rectified_flow",
            "data": {
                "source": {"kind": "scene_classes", "count": 400, "size": 64},
                "cache": str(run / "cache"),
                "pipeline": "PixelDiTPipeline",
                "resolution": 64,
            },
            "on_the_fly": True,
            "scheduler": {"_class_name": "FlowAdamsBashforthScheduler"},
            "alignment": alignment,
            "preview_steps": 2,
        },
        train=options(**values),
    )


def of_text(run: Path, frozen: Path, alignment: dict[str, Any] | None = None, **values: Any) -> Config:
    config = of_classes(run, alignment, **values)
    config.model.update(
        _class_name="PixelDiTTextTransformer2DModel",
        pixel_num_attention_heads=1,
        pixel_attention_head_dim=8,
        caption_channels=8,
        max_text_tokens=20,
    )
    del config.model["num_classes"]
    config.objective["data"].update(
        source={"kind": "scenes", "count": 9, "size": 64},
        pipeline="PixelDiTTextPipeline",
        text_encoder=str(frozen / "gemma"),
        tokenizer=str(frozen / "gemma"),
        max_sequence_length=20,
    )
    config.objective.update(
        discrete_levels=1000,
        shift=3.0,
        scheduler={
            "_class_name": "DPMSolverMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    )
    return config


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run) if "loss" in line]


def newest(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(find_checkpoint(run, "auto"))[0]


def test_the_class_model_learns_previews_and_is_exported_as_its_pipeline(tmp_path, frozen):
    alignment = {"features": str(frozen / "dinov2"), "block": 2}
    config = of_classes(
        tmp_path, alignment, max_steps=24, learning_rate=3e-3, preview_every=24, validate_every=12
    )
    config.objective.update(validation_samples=2)
    final = train(config)
    found = losses(tmp_path)
    assert sum(found[-4:]) < 0.95 * sum(found[:4])
    assert (tmp_path / "preview-00000024.png").is_file()
    measured = [line for line in log(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in measured] == [12, 24]
    assert measured[1]["validation_loss/noise 0.95"] < measured[0]["validation_loss/noise 0.95"]
    assert any("alignment_head" in name for name in newest(tmp_path)["model"])
    exported = load_file(final / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("alignment_head" in name for name in exported)
    image = PixelDiTPipeline.from_pretrained(final)("red circle", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_the_text_model_learns_with_gemma_and_is_exported_as_its_pipeline(tmp_path, frozen):
    alignment = {"features": str(frozen / "dinov2"), "block": 1, "hidden": 6, "picture_size": 28}
    config = of_text(tmp_path, frozen, alignment, max_steps=12, learning_rate=3e-3, preview_every=12)
    final = train(config)
    found = losses(tmp_path)
    assert sum(found[-3:]) < sum(found[:3])
    assert (tmp_path / "preview-00000012.png").is_file()
    pipe = PixelDiTTextPipeline.from_pretrained(final)
    image = pipe("a red circle", num_inference_steps=2, max_sequence_length=20).images[0]
    assert image.size == (64, 64)


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, frozen):
    """The alignment ends on the way."""
    alignment = {"features": str(frozen / "dinov2"), "block": 1, "steps": 3}
    train(of_classes(tmp_path / "whole", alignment, max_steps=5))
    train(of_classes(tmp_path / "parts", alignment, max_steps=2))
    train(of_classes(tmp_path / "parts", alignment, max_steps=5))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    left, right = newest(tmp_path / "parts"), newest(tmp_path / "whole")
    for part in left:
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(tensor, right[part][name]) for name, tensor in left[part].items())


def test_alignment_counts_for_as_many_steps_as_it_is_given(tmp_path, frozen):
    """Untrained, 0.5 · (1 - cosine) is all that it adds, and after its end the head stays as it is."""
    alignment = {"features": str(frozen / "dinov2"), "block": 1, "steps": 2}
    constant = {"max_steps": 4, "learning_rate": 0.0}
    train(of_classes(tmp_path / "without", None, **constant))
    train(of_classes(tmp_path / "with", alignment, **constant))
    extra = [one - two for one, two in zip(losses(tmp_path / "with"), losses(tmp_path / "without"))]
    assert all(0.2 < value < 0.8 for value in extra[:2])
    assert extra[2:] == [0, 0]


def test_a_lower_rate_goes_on_from_the_checkpoint_in_the_same_folder(tmp_path):
    """As configs/pixeldit/xl_256_low_rate.yaml does: with moments and averages, but the new run's rate."""
    first = of_classes(tmp_path / "run", max_steps=2, learning_rate=1e-3)
    rest = of_classes(tmp_path / "run", max_steps=4, learning_rate=1e-4, max_grad_norm=0.5)
    rest = replace(rest, init_from=str(tmp_path / "run" / "final"))
    with pytest.raises(ValueError, match="init_from must be the folder of a saved model"):
        train(rest)
    final = train(first)
    train(rest)
    unbroken = of_classes(tmp_path / "unbroken", max_steps=3, learning_rate=1e-3)
    train(unbroken)
    assert [line["learning_rate"] for line in log(tmp_path / "run")] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert losses(tmp_path / "run")[:3] == losses(tmp_path / "unbroken")
    averages = newest(tmp_path / "run")["ema"]
    exported = load_file(final / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], averages[name]) for name in averages)


def test_parameters_without_gradients_are_made_known(tmp_path, frozen, monkeypatch):
    """Those of the text's last half block, and of an alignment's head after its end."""
    told = []

    def handler() -> DistributedDataParallelKwargs:
        told.append(DistributedDataParallelKwargs())
        return told[-1]

    monkeypatch.setattr(loop, "DistributedDataParallelKwargs", handler)
    alignment = {"features": str(frozen / "dinov2"), "block": 1}
    train(of_classes(tmp_path / "whole", alignment, max_steps=1))
    train(of_classes(tmp_path / "ending", {**alignment, "steps": 1}, max_steps=1))
    train(of_text(tmp_path / "text", frozen, max_steps=1))
    assert [each.find_unused_parameters for each in told] == [False, True, True]


def test_two_processes_take_the_steps_of_one(tmp_path, frozen):
    """Though nothing reads what the last block makes of the text, nor the alignment's head after its end."""
    alignment = {"features": str(frozen / "dinov2"), "block": 1, "steps": 2}
    alone = of_text(tmp_path / "alone", frozen, alignment, batch_size=4)
    train(alone)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    together = replace(together, train=replace(alone.train, batch_size=2))
    config = tmp_path / "together.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(together)))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "-m", "localdit.cli", "train", str(config)], check=True, env=environment, timeout=120
    )
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), abs=1e-6)
    left, right = newest(tmp_path / "alone")["model"], newest(tmp_path / "together")["model"]
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("pipeline", [PixelDiTPipeline, PixelDiTTextPipeline])
def test_training_asks_the_model_what_its_pipeline_asks_it(pipeline):
    """At one noise level both tell it the same time, and what it has to say in training is what the pipeline
    reads as noise - data."""
    data, noise, times = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), []

    class Trained(torch.nn.Module):
        dtype = torch.float32

        def forward(self, hidden_states, timestep, **_):
            times.append(timestep)
            return (velocity(data, noise, pipeline.flow_direction),)

    pipe = pipeline()
    pipe.transformer = Trained()
    conditions = {"class_labels": torch.tensor([0, 1]), "prompt_embeds": torch.zeros(2, 1, 1)}
    torch.testing.assert_close(pipe._velocity(data, 0.3, conditions, guided=False), noise - data)
    torch.testing.assert_close(times, [model_time(torch.full((2,), 0.3), pipeline.flow_direction)])


def test_levels_are_a_thousand_where_the_configuration_says_so():
    values = of_classes(Path("run")).objective
    objective = build_objective({**values, "discrete_levels": 1000})
    levels = objective.levels(Draws(0, range(64), torch.device("cpu")))
    torch.testing.assert_close(1000 * levels, (1000 * levels).round(), rtol=0, atol=1e-3)
    assert len(levels.unique()) > 32


def test_a_pipeline_whose_flow_points_nowhere_is_refused(tmp_path):
    config = of_classes(tmp_path)
    config.objective["data"]["pipeline"] = "LEDiTPipeline"
    with pytest.raises(ValueError, match=r"must say where its flow points \(flow_direction\)"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": {"features": "mini", "block": 3}}, r"alignment\.block must be from 1 to 2, got 3"),
        ({"scheduler": {"_class_name": "DDPMScheduler"}}, "must be one of flow matching, got DDPMScheduler"),
        ({"alignment": {"block": 1}}, r"missing key objective\.alignment\.features"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, message):
    config = of_classes(tmp_path)
    config.objective.update(changes)
    with pytest.raises(ValueError, match=message):
        train(config)


def test_a_model_and_a_pipeline_that_do_not_fit_are_refused(tmp_path, frozen):
    config = of_text(tmp_path, frozen)
    config.objective["data"].update(pipeline="PixelDiTPipeline", text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="must be one of texts for PixelDiTTextTransformer2DModel"):
        train(config)
