"""The objective of DiT and LEDiT in the loop: noise and variance, classes, dilation of the convolution."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from toy_pipeline import toy_vae

from localdit import LEDiTPipeline, LEDiTTransformer2DModel
from localdit.data.scenes import class_name, scene
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import Config, TrainConfig
from localdit.training.dit_loss import LearnedVariance, dit_loss
from localdit.training.loop import train
from localdit.training.order import Draws
from localdit.training.throughput import Throughput

SCENES = 9
CLASSES = sorted({class_name(scene(i, objects=1)) for i in range(SCENES)})
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "variance_type": "learned_range",
    "timestep_spacing": "linspace",
    "clip_sample": False,
}
WIDTHS = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    toy_vae().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one precision for all its accelerators; each of these runs has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def class_run(run: Path, vae: str, model: dict[str, Any] | None = None, **options: Any) -> Config:
    fields = {"sample_size": 8, "num_classes": len(CLASSES), "multi_dilation_prob": 0.4}
    return Config(
        output_dir=str(run),
        model={"_class_name": "LEDiTTransformer2DModel", **WIDTHS, **fields, **(model or {})},
        objective={
            "name": "learned_variance",
            "data": {
                "source": {"kind": "scene_classes", "count": SCENES, "size": 64},
                "cache": str(Path(vae).parent / "cache"),
                "pipeline": "LEDiTPipeline",
                "vae": vae,
                "resolution": 64,
                "flips": True,
            },
            "scheduler": SCHEDULER,
            "caption_dropout": 0.5,
            "preview_steps": 2,
        },
        train=TrainConfig(**{"max_steps": 6, "batch_size": 3, "warmup_steps": 2, "log_every": 1, **options}),
    )


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def newest(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(find_checkpoint(run, "auto"))[0]


def test_training_lowers_the_loss_and_writes_a_pipeline_that_draws_at_any_size(vae, tmp_path):
    options = {"max_steps": 30, "learning_rate": 3e-3, "preview_every": 30, "validate_every": 15}
    config = class_run(tmp_path, vae, **options)
    config.objective["validation_samples"] = 2
    final = train(config)
    lines = [line for line in log_of(tmp_path) if "loss" in line]
    first, last = (sum(line["loss"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < 0.97 * first

    measured = [line for line in log_of(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in measured] == [15, 30]
    ranges = [value for name, value in measured[1].items() if name.startswith("validation_loss/")]
    assert len(ranges) == 10
    assert measured[1]["validation_loss"] == pytest.approx(sum(ranges) / 10, rel=1e-5)
    assert (tmp_path / "preview-00000030.png").is_file()

    pipe = LEDiTPipeline.from_pretrained(final)
    assert list(pipe.labels) == CLASSES
    assert pipe(CLASSES[1], num_inference_steps=2, height=96, width=64).images[0].size == (64, 96)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)
    assert pipe(len(CLASSES) - 1, num_inference_steps=2).images[0].size == (64, 64)


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(vae, tmp_path):
    whole = class_run(tmp_path / "whole", vae, max_steps=8, save_every=4)
    train(whole)
    broken = replace(whole, output_dir=str(tmp_path / "broken"))
    with pytest.MonkeyPatch.context() as patch:  # killed some steps after the save at step 4
        reports, report = iter(range(6)), Throughput.report
        patch.setattr(Throughput, "report", lambda *args: [next(reports), report(*args)][1])
        with pytest.raises(StopIteration):
            train(broken)
    assert find_checkpoint(tmp_path / "broken", "auto").name == "step-00000004"
    train(broken)
    left, right = newest(tmp_path / "whole"), newest(tmp_path / "broken")
    for part, tensors in left.items():
        assert all(torch.equal(tensor, right[part][name]) for name, tensor in tensors.items()), part


@pytest.mark.parametrize("layout", ["published", "diffusers"])
def test_fine_tuning_starts_from_a_dit_trained_at_another_size(vae, tmp_path, layout):
    fields = {"sample_size": 16, "out_channels": 8, "num_embeds_ada_norm": len(CLASSES)}
    dit = DiTTransformer2DModel(**WIDTHS, **fields)
    first, second = (block.norm1.emb for block in dit.transformer_blocks)
    second.load_state_dict(first.state_dict())  # in converted files they are copies
    file = tmp_path / "dit.safetensors"
    save_file({name: tensor.clone() for name, tensor in dit.state_dict().items()}, file)
    if layout == "published":
        model = LEDiTTransformer2DModel.from_single_file(file, num_attention_heads=2, conv_kernel_size=0)
        file = tmp_path / "published.pt"
        model.save_single_file(file.with_suffix(".safetensors"))
        torch.save(load_file(file.with_suffix(".safetensors")), file)  # as published: without a config
    config = class_run(tmp_path / "run", vae, max_steps=1, learning_rate=0.0, warmup_steps=1)
    train(replace(config, init_from=str(file)))
    tuned, given = newest(tmp_path / "run")["model"], dit.state_dict()
    identity = torch.nn.init.dirac_(torch.empty(24, 24, 3, 3))
    assert torch.equal(tuned["locality_conv.weight"], identity)
    assert not tuned["locality_conv.bias"].any()
    names = {"proj_out.weight": "proj_out_2.weight", "patch_embed.weight": "pos_embed.proj.weight"}
    names |= {name: name for name in tuned if ".attn1." in name or ".ff." in name}
    assert len(names) == 2 + 2 * (8 + 4)
    assert all(torch.equal(tuned[ours], given[theirs]) for ours, theirs in names.items())


class Recorder(torch.nn.Module):
    """Predicts nothing, and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, **arguments: Any) -> tuple[torch.Tensor]:
        self.calls.append(arguments)
        return (arguments["hidden_states"].repeat(1, 2, 1, 1),)


def objective(dilation_prob: float = 0.0, **config: Any) -> LearnedVariance:
    values = class_run(Path("run"), "vae").objective | {"scheduler": {**SCHEDULER, **config}}
    made = LearnedVariance(**{name: value for name, value in values.items() if name != "name"})
    made.use_scheduler(DPMSolverMultistepScheduler.from_config(made.scheduler))
    made.dilation, made.dilation_prob = 3, dilation_prob
    return made


def draws(first: int) -> Draws:
    return Draws(7, range(first, first + 4), torch.device("cpu"))


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean, noise, and timesteps."""
    return torch.randn(4, 3, 6, 10), torch.randn(4, 3, 6, 10), torch.tensor([0, 1, 500, 999])


def test_the_error_of_each_sample_is_dits_of_what_the_model_says_of_it():
    made, model = objective(), Recorder()
    clean, noise, level = samples()
    labels = torch.tensor([3, 0, 1, 4])
    errors = made.errors(model, clean, noise, level, draws(0), class_labels=labels)
    share = (1 - torch.linspace(1e-4, 2e-2, 1000)).cumprod(0)[level].view(4, 1, 1, 1)
    noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
    torch.testing.assert_close(model.calls[0]["hidden_states"], noisy)
    torch.testing.assert_close(
        errors, dit_loss(noisy.repeat(1, 2, 1, 1), clean, noise, level, made.tables), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(model.calls[0]["timestep"], level)
    assert torch.equal(model.calls[0]["class_labels"], labels)


def test_the_dilation_follows_from_the_step_whatever_processes_share_it():
    made, model = objective(dilation_prob=0.3), Recorder()
    state = torch.get_rng_state()
    for first in (0, 4):  # the samples of one process, and those of another
        for step in range(300):
            positions = range(8 * step + first, 8 * step + first + 4)
            made.errors(model, *samples_of_ones(), Draws(7, positions, torch.device("cpu"), step))
    dilations = [call["dilation"] for call in model.calls]
    assert dilations[:300] == dilations[300:]
    assert set(dilations) == {1, 3}
    assert 0.23 < dilations.count(3) / len(dilations) < 0.37
    assert torch.equal(torch.get_rng_state(), state)


def samples_of_ones() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(4, 1, 1, 1), torch.ones(4, 1, 1, 1), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(("training", "probability"), [(False, 1.0), (True, 0.0)])
def test_no_dilation_is_drawn_in_validation_or_for_a_model_without(training, probability):
    made, model = objective(probability), Recorder().train(training)
    first, second = draws(0), draws(0)
    made.errors(model, *samples(), first)
    assert "dilation" not in model.calls[0]
    assert torch.equal(first.uniform(), second.uniform())


def test_a_model_in_training_never_draws_its_dilation_itself(vae, tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model drew")

    monkeypatch.setattr("localdit.models.ledit.torch.rand", refuse)
    monkeypatch.setattr(
        Draws, "uniform", lambda self, *shape: torch.full((len(self.generators), *shape), 0.5)
    )
    monkeypatch.setattr(Draws, "of_step", lambda self: 0.5)
    given = []
    forward = LEDiTTransformer2DModel.forward

    @functools.wraps(forward)
    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["dilation"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LEDiTTransformer2DModel, "forward", heard)
    train(class_run(tmp_path, vae, {"multi_dilation_prob": 0.6}, max_steps=2))
    assert given == [2, 2]


def test_a_model_without_a_variance_and_a_scheduler_of_velocities_are_refused(vae, tmp_path):
    with pytest.raises(ValueError, match=r"model\.out_channels must be 8, noise and variance, got 4"):
        train(class_run(tmp_path, vae, {"out_channels": 4}))
    with pytest.raises(ValueError, match="prediction_type must be epsilon, got 'v_prediction'"):
        objective(prediction_type="v_prediction")
