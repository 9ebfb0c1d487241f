"""The loop: one for every objective, and a resumed run goes on as the unbroken one would have."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from localdit import LocalDiTPipeline
from localdit.data.scenes import captions, scene
from localdit.training.checkpoint import checkpoints
from localdit.training.config import Config, TrainConfig
from localdit.training.loop import Order, learning_rate, train
from localdit.training.text_encoder import train_tokenizer

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
            "vae": str(frozen / "vae"),
            "text_encoder": str(frozen / "text_encoder"),
            "tokenizer": str(frozen / "tokenizer"),
            "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"},
            "scenes": 6,
            "picture_size": 64,
            "max_sequence_length": 64,
            "caption_dropout": 0.5,
        },
        train=TrainConfig(**{"max_steps": 6, "batch_size": 3, "warmup_steps": 2, "log_every": 1, **options}),
    )


def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path, frozen):
    options = {"gradient_accumulation": 2, "schedule": "cosine", "save_every": 3}
    whole = denoising(tmp_path / "whole", frozen, **options)
    train(whole)

    def stop(*args):
        raise InterruptedError

    broken = denoising(tmp_path / "broken", frozen, **options)
    with pytest.MonkeyPatch.context() as patch:  # killed after the save at step 3
        from localdit.training import loop

        saved = []
        save = loop.save_checkpoint
        patch.setattr(loop, "save_checkpoint", lambda *a: saved.append(save(*a)) or stop())
        with pytest.raises(InterruptedError):
            train(broken)
    assert [path.name for path in saved] == ["step-00000003"]
    train(broken)

    a, b = (checkpoints(tmp_path / name)[-1] for name in ("whole", "broken"))
    assert a.name == b.name == "step-00000006"
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        left, right = load_file(a / file), load_file(b / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file

    def losses(name):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    # The line of step 3 is written before the save that the run died in.
    assert losses("broken") == losses("whole")


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
    averaged = load_file(checkpoints(tmp_path)[-1] / "ema.safetensors")
    trained = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
    assert not all(torch.equal(exported[name], trained[name]) for name in averaged)


def test_the_encoded_scenes_are_made_again_when_what_they_depend_on_changes(tmp_path, frozen):
    config = denoising(tmp_path, frozen, max_steps=1)
    path = tmp_path / "encoded_scenes.safetensors"
    train(config, resume="never")
    made = path.stat().st_mtime_ns
    train(config, resume="never")
    assert path.stat().st_mtime_ns == made
    train(replace(config, objective={**config.objective, "seed": 5}), resume="never")
    assert path.stat().st_mtime_ns > made


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


def test_two_processes_share_the_batches_of_one():
    options = TrainConfig(max_steps=5, batch_size=4)
    alone = list(Order(10, replace(options, batch_size=8), 0, 0, 1))
    ranks = [list(Order(10, options, 0, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks)] == alone
    assert list(Order(10, options, 2, 0, 2)) == ranks[0][2:]  # resumed at step 2
    epoch = [i for batch in alone for i in batch][:10]
    assert sorted(epoch) == list(range(10))


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
