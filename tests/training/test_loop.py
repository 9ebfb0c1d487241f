"""The loop: one for every objective, and a resumed run goes on as the unbroken one would have."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from localdit import LocalDiTPipeline
from localdit.data.cache import Cache
from localdit.data.images import BadSample
from localdit.data.scenes import captions, scene
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import Config, LoraConfig, ParameterGroup, TrainConfig
from localdit.training.encode import ImageWorker
from localdit.training.loop import learning_rate, train
from localdit.training.stopping import Stopped
from localdit.training.text_encoder import train_tokenizer
from localdit.training.throughput import Throughput

TOY_VAE = {
    "block_out_channels": [4, 4, 4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    """A toy autoencoder, text encoder and tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    AutoencoderKL(**TOY_VAE).save_pretrained(folder / "vae")
    tokenizer = train_tokenizer(c.text for i in range(50) for c in captions(scene(i)))
    sizes = {"vocab_size": 256, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, dropout_rate=0.0)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one precision for all its accelerators; each of these runs has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def denoising(run: Path, frozen: Path, **options) -> Config:
    return Config(
        output_dir=str(run),
        model={
            "_class_name": "LocalDiTTransformer2DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "caption_channels": 12,
            "sample_size": 8,
            "window_size": 2,
        },
        objective={
            "name": "denoising",
            "data": {
                "source": {"kind": "scenes", "count": 9, "size": 64},
                "cache": str(frozen / "cache"),
                "vae": str(frozen / "vae"),
                "text_encoder": str(frozen / "text_encoder"),
                "tokenizer": str(frozen / "tokenizer"),
                "resolution": 64,
                "captions_per_image": 2,
                "max_sequence_length": 64,
            },
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"},
            "caption_dropout": 0.5,
        },
        train=TrainConfig(**{"max_steps": 6, "batch_size": 3, "warmup_steps": 2, "log_every": 1, **options}),
    )


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def validations(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def newest(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(find_checkpoint(run, "auto"))[0]


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for part in left:
        assert left[part].keys() == right[part].keys()
        for name, tensor in left[part].items():
            assert torch.equal(tensor, right[part][name]), f"{part}: {name}"


def test_a_tracker_gets_what_the_log_gets(frozen, tmp_path):
    """Read from TensorBoard's files by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = denoising(tmp_path / "run", frozen, max_steps=3, log_with=("tensorboard",))
    train(config)
    (events,) = {
        path.parent for path in (tmp_path / "run").rglob("events.out.*") if path.parent.name == "localdit"
    }
    reader = EventAccumulator(str(events)).Reload()
    for name in ("loss", "gradient_norm", "learning_rate"):
        lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        logged = [(entry.step, entry.value) for entry in reader.Scalars(name)]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_written(
    frozen, tmp_path, monkeypatch
):
    monkeypatch.setattr("localdit.training.journal.get_available_trackers", lambda: [])
    with pytest.raises(ImportError, match=r"train\.log_with names trackio, .* pip install trackio"):
        train(denoising(tmp_path / "run", frozen, log_with=("trackio",)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation": 2, "schedule": "cosine"},
        {"optimizer": "muon", "num_workers": 2, "parameter_groups": (ParameterGroup("bias", 0.5),)},
        {"optimizer": "schedule_free_adamw", "mixed_precision": "bf16"},
        {"optimizer": "adamw8bit", "gradient_checkpointing": True},
        {"resample": True, "num_workers": 2},
    ],
    ids=lambda options: options.get("optimizer", "adamw"),
)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, frozen, options):
    pytest.importorskip(
        {"schedule_free_adamw": "schedulefree", "adamw8bit": "bitsandbytes"}.get(
            options.get("optimizer", ""), "torch"
        )
    )
    options = {
        "save_every": 4,
        **options,
    }  # eight steps of three or six: one epoch of the 18 captions and a part
    whole = denoising(tmp_path / "whole", frozen, max_steps=8, **options)
    whole.model["dropout"] = 0.2
    train(whole)

    broken = replace(whole, output_dir=str(tmp_path / "broken"))
    with pytest.MonkeyPatch.context() as patch:  # killed some steps after the save at step 4
        reports = iter(range(6))
        report = Throughput.report
        patch.setattr(Throughput, "report", lambda *args: [next(reports), report(*args)][1])
        with pytest.raises(StopIteration):
            train(broken)
    assert find_checkpoint(tmp_path / "broken", "auto").name == "step-00000004"
    train(broken)

    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8


def test_two_processes_take_the_steps_of_one(tmp_path, frozen):
    alone = denoising(tmp_path / "alone", frozen, max_steps=3, batch_size=4)
    alone.objective.update(layout_weight=0.25, layout_block=1)
    train(alone)
    together = replace(alone, output_dir=str(tmp_path / "together"))
    together = replace(together, train=replace(alone.train, batch_size=2))
    config = tmp_path / "together.yaml"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(together)))))
    shipped = Path(__file__).parents[2] / "configs" / "accelerate" / "ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(shipped)]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "-m", "localdit.cli", "train", str(config)], check=True, env=environment, timeout=120
    )
    for (_, one), (_, two) in zip(losses(tmp_path / "alone"), losses(tmp_path / "together"), strict=True):
        assert two == pytest.approx(one, abs=1e-6)
    left, right = newest(tmp_path / "alone")["model"], newest(tmp_path / "together")["model"]
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_a_step_whose_gradient_is_not_finite_changes_nothing(tmp_path, frozen, monkeypatch):
    before = {}

    def poisoned(self, *args, **kwargs):
        loss = Denoising_loss(self, *args, **kwargs)
        poisoned.calls += 1
        return loss * float("nan") if poisoned.calls in (3, 4) else loss

    from localdit.training.denoising import Denoising

    Denoising_loss, poisoned.calls = Denoising.loss, 0
    monkeypatch.setattr(Denoising, "loss", poisoned)
    config = denoising(tmp_path, frozen, max_steps=4, save_every=1, keep_checkpoints=9)
    train(config)
    before, after = (load_checkpoint(tmp_path / f"step-{n:08d}")[0] for n in (2, 4))
    assert_same(before, after)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in log] == [0, 0, 1, 2]
    assert math.isnan(log[2]["loss"])


def test_too_many_such_steps_in_a_row_stop_the_run_before_it_saves(tmp_path, frozen, monkeypatch):
    from localdit.training.denoising import Denoising

    monkeypatch.setattr(Denoising, "loss", lambda self, model, draws, **batch: model_nan(model))

    def model_nan(model):
        return sum(p.sum() for p in model.parameters()) * float("inf")

    config = denoising(tmp_path, frozen, max_steps=9, max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 3, were not finite"):
        train(config)
    assert find_checkpoint(tmp_path, "auto") is None


@pytest.mark.parametrize("moment", ["step", "accumulation", "preview", "validation"])
def test_sigterm_saves_the_step_and_the_run_goes_on_from_it(tmp_path, frozen, monkeypatch, moment):
    from localdit.training.denoising import Denoising

    options = {"gradient_accumulation": 2, "preview_every": 2, "validate_every": 2, "save_every": 100}
    config = denoising(tmp_path, frozen, max_steps=4, **options)
    config.objective["validation_samples"] = 4
    method, call = {"step": ("loss", 4), "accumulation": ("loss", 3)}.get(moment, ("preview", 1))
    method = "validate" if moment == "validation" else method
    original, calls = getattr(Denoising, method), iter(range(1, 99))

    def interrupted(self, *args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Denoising, method, interrupted)
    with pytest.raises(Stopped, match="stopped after step"):
        train(config)
    saved = find_checkpoint(tmp_path, "auto")
    assert saved.name in ("step-00000002", "step-00000003")  # the step that was on its way is the last one
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    train(config)
    whole = denoising(tmp_path / "whole", frozen, max_steps=4, **options)
    whole.objective["validation_samples"] = 4
    train(whole)
    assert_same(newest(tmp_path), newest(tmp_path / "whole"))
    assert validations(tmp_path) == validations(tmp_path / "whole")
    assert [step for step, _ in validations(tmp_path)] == [2, 4]
    for step in (2, 4):
        preview = f"preview-{step:08d}.png"
        assert (tmp_path / preview).read_bytes() == (tmp_path / "whole" / preview).read_bytes()


def test_sigterm_while_the_cache_is_filled_keeps_its_shards(tmp_path, frozen, monkeypatch):
    config = denoising(tmp_path / "run", frozen, max_steps=1)
    config.objective["data"].update(cache=str(tmp_path / "cache"), samples_per_shard=4)
    moments, calls = ImageWorker.moments, iter(range(99))

    def interrupted(self, pixels):
        if next(calls) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return moments(self, pixels)

    monkeypatch.setattr(ImageWorker, "moments", interrupted)
    with pytest.raises(Stopped, match="stopped between two shards"):
        train(config)
    shards = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(shards) == 1
    written = shards[0].stat().st_mtime_ns
    monkeypatch.undo()
    train(config)
    assert find_checkpoint(tmp_path / "run", "auto").name == "step-00000001"
    assert shards[0].stat().st_mtime_ns == written


def test_a_lora_is_trained_alone_and_loads_into_the_pipeline(tmp_path, frozen):
    base = train(denoising(tmp_path / "base", frozen, max_steps=2))
    config = denoising(tmp_path / "lora", frozen, max_steps=4, learning_rate=1e-2, warmup_steps=0)
    config = replace(config, init_from=str(base), lora=LoraConfig(rank=3, alpha=6.0))
    final = train(config)
    assert [path.name for path in final.iterdir() if path.suffix == ".safetensors"] == [
        "pytorch_lora_weights.safetensors"
    ]
    assert all("lora_" in name for name in newest(tmp_path / "lora")["model"])

    pipe = LocalDiTPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)

    def latents():
        made = pipe(
            "a star",
            num_inference_steps=2,
            height=64,
            width=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
        )[0]
        return made

    without = latents()
    pipe.load_lora_weights(final)
    adapter = next(iter(pipe.transformer.peft_config.values()))
    assert (adapter.r, adapter.lora_alpha) == (3, 6.0)
    assert not torch.equal(latents(), without)
    pipe.unload_lora_weights()
    assert torch.equal(latents(), without)


def test_a_run_starts_from_given_weights_on_another_grid(tmp_path, frozen):
    base = train(denoising(tmp_path / "base", frozen, max_steps=2))
    config = denoising(tmp_path / "next", frozen, max_steps=1, warmup_steps=1, learning_rate=0.0)
    config.model.update(sample_size=16, interpolation_scale=2.0)
    train(replace(config, init_from=str(base)))
    given = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(given[name], value) for name, value in newest(tmp_path / "next")["model"].items())
    narrower = denoising(tmp_path / "other", frozen)
    narrower.model["num_layers"] = 3
    with pytest.raises(ValueError, match=r"init_from .* does not fit the model"):
        train(replace(narrower, init_from=str(base)))
    with pytest.raises(ValueError, match="init_from must be the folder of a saved model"):
        train(replace(config, init_from=str(tmp_path / "nowhere"), output_dir=str(tmp_path / "none")))


def test_unusable_samples_are_left_out_and_too_many_stop_the_run(tmp_path, frozen, monkeypatch):
    original = Cache.__getitem__

    def broken(self, key):
        if key[0] in (2, 7):
            raise BadSample("it is broken")
        return original(self, key)

    monkeypatch.setattr(Cache, "__getitem__", broken)
    config = denoising(tmp_path, frozen, max_steps=3, max_bad_fraction=0.02)
    train(config)  # one pass over nine pictures: two of them, which count as two of a hundred
    listed = [json.loads(line) for line in (tmp_path / "unusable-0.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in listed) == ["scene-00000002", "scene-00000007"]
    assert {line["reason"] for line in listed} == {"it is broken"}
    with pytest.raises(ValueError, match=r"3 of .* samples are unusable, more than train\.max_bad_fraction"):
        train(replace(config, train=replace(config.train, max_steps=6)), resume="never")


def test_encoding_on_the_fly_gives_what_the_cache_holds(tmp_path, frozen):
    cached = denoising(tmp_path / "cached", frozen, max_steps=3)
    train(cached)
    fresh = denoising(tmp_path / "fresh", frozen, max_steps=3)
    fresh.objective.update(on_the_fly=True)
    fresh.objective["data"]["captions_per_image"] = None
    train(fresh)
    for (_, one), (_, two) in zip(losses(tmp_path / "cached"), losses(tmp_path / "fresh"), strict=True):
        assert two == pytest.approx(one, rel=0.05)  # other captions; the pictures are in float16 in the cache


def test_the_side_task_lowers_its_loss_and_is_not_exported(tmp_path, frozen):
    config = denoising(tmp_path, frozen, max_steps=30, learning_rate=3e-3)
    config.objective.update(layout_weight=1.0, layout_block=1)
    final = train(config)
    found = losses(tmp_path)
    assert sum(loss for _, loss in found[-5:]) < 0.8 * sum(loss for _, loss in found[:5])
    assert any("layout_head" in name for name in newest(tmp_path)["model"])
    exported = load_file(final / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("layout_head" in name for name in exported)


def test_validation_measures_each_range_of_timesteps_on_samples_kept_apart(tmp_path, frozen):
    config = denoising(tmp_path, frozen, max_steps=4, validate_every=2)
    config.objective["validation_samples"] = 5
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [2, 4]
    ranges = [key for key in measured[0] if key.startswith("validation_loss/")]
    assert len(ranges) == 10
    mean = sum(measured[1][key] for key in ranges) / 10
    assert measured[1]["validation_loss"] == pytest.approx(mean, rel=1e-5)


def test_training_lowers_the_loss_and_writes_a_pipeline_that_loads(tmp_path, frozen):
    config = denoising(tmp_path, frozen, max_steps=40, learning_rate=3e-3, preview_every=40)
    final = train(config)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = (sum(line["loss"] for line in part) / 10 for part in (lines[:10], lines[-10:]))
    assert last < 0.97 * first
    pipe = LocalDiTPipeline.from_pretrained(final)
    image = pipe("a red circle", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    assert (tmp_path / "preview-00000040.png").is_file()
    assert (tmp_path / "config.yaml").is_file()


def test_the_exported_weights_are_the_averaged_ones(tmp_path, frozen):
    final = train(denoising(tmp_path, frozen))
    exported = load_file(final / "transformer" / "diffusion_pytorch_model.safetensors")
    averaged, trained = newest(tmp_path)["ema"], newest(tmp_path)["model"]
    assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
    assert not all(torch.equal(exported[name], trained[name]) for name in averaged)


def test_the_autoencoder_and_the_text_encoder_go_through_the_same_loop(tmp_path):
    options = TrainConfig(max_steps=2, batch_size=2, warmup_steps=1, log_every=1, preview_every=2)
    vae = Config(
        str(tmp_path / "vae"),
        {"_class_name": "AutoencoderKL", **TOY_VAE},
        {"name": "autoencoding", "scenes": 4, "picture_size": 64, "crop_size": 32},
        options,
    )
    final = train(vae)
    config = AutoencoderKL.from_pretrained(final).config
    assert config.scaling_factor > 0
    assert config.scaling_factor != 0.18215  # measured, not AutoencoderKL's default
    assert (tmp_path / "vae" / "preview-00000002.png").is_file()

    text = Config(
        str(tmp_path / "text"),
        {"_class_name": "SceneParser", "vocab_size": 128, "d_model": 16, "num_layers": 1, "num_heads": 2},
        {"name": "scene_parsing", "captions": 8},
        options,
    )
    final = train(text)
    assert T5EncoderModel.from_pretrained(final / "text_encoder").config.d_model == 16
    train(text)  # resumes at its end: nothing to do, nothing breaks


def test_the_learning_rate_warms_up_and_falls_to_zero():
    options = TrainConfig(max_steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10)
    rate = learning_rate(replace(options, schedule="cosine"))
    assert rate(0) == 0
    assert rate(5) == 1
    assert rate(10) == 2
    assert rate(55) == pytest.approx(1)
    assert rate(100) == pytest.approx(0)
    constant = learning_rate(options)
    assert (constant(5), constant(99)) == (1, 2)


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path, frozen):
    with pytest.raises(
        ValueError, match="resume must be auto, never or the path of a checkpoint, got 'nowhere'"
    ):
        train(denoising(tmp_path, frozen), resume="nowhere")
