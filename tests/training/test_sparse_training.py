"""SparseDiT through the loop: the published stages at toy size, one after the other, and sharded by block."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_pipeline import toy_vae
from toy_sparse import TOY, sparse_inputs, toy_sparse
from toy_sparse_pipeline import toy_clip_text_encoder, toy_clip_tokenizer

from localdit import SparseDiTPipeline
from localdit.training import edm
from localdit.training.checkpoint import find_checkpoint, load_checkpoint
from localdit.training.config import Config, TrainConfig
from localdit.training.loop import learning_rate, starting_model, train
from localdit.training.state import capture, restore
from localdit.training.throughput import Throughput

CONFIGS = Path(__file__).parent.parent.parent / "configs"
STAGES = ("stage1_256_masked", "stage2_256", "stage3_512_masked", "stage4_512")


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    """A toy autoencoder, and a toy CLIP with its tokenizer, on disk."""
    folder = tmp_path_factory.mktemp("frozen")
    toy_vae().save_pretrained(folder / "vae")
    toy_clip_text_encoder().save_pretrained(folder / "clip")
    toy_clip_tokenizer().save_pretrained(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """A process has one precision for all its accelerators; each of these runs has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def toy_run(run: Path, frozen: Path, *, pixels: int = 64, objective: Any = None, **options: Any) -> Config:
    """A run on scenes of 64 pixels, 16 tokens, or of 128."""
    return Config(
        output_dir=str(run),
        model={"_class_name": "SparseDiTTransformer2DModel", **TOY, "sample_size": pixels // 8},
        objective={
            "name": "edm",
            "data": {
                "source": {"kind": "scenes", "count": 8, "size": pixels},
                "cache": str(frozen / f"cache_{pixels}"),
                "pipeline": "SparseDiTPipeline",
                "vae": str(frozen / "vae"),
                "text_encoder": str(frozen / "clip"),
                "tokenizer": str(frozen / "clip"),
                "resolution": pixels,
                "captions_per_image": 1,
                "max_sequence_length": 20,
            },
            "scheduler": {"_class_name": "EDMHeunScheduler", "sigma_data": 0.9},
            "caption_dropout": 0.5,
            **(objective or {}),
        },
        train=TrainConfig(**{"max_steps": 2, "batch_size": 3, "warmup_steps": 1, "log_every": 1, **options}),
    )


def stage(name: str, folder: Path, frozen: Path) -> Config:
    """A published stage with its toy model, data and number of steps, and everything else as it is."""
    values = yaml.safe_load((CONFIGS / "sparse_dit" / f"{name}.yaml").read_text())
    published = {
        key: value
        for key, value in values["objective"].items()
        if key in ("sigma_mean", "sigma_std", "mask_ratio", "caption_dropout")
    }
    options = {
        key: value for key, value in values["train"].items() if key not in ("num_workers", "batch_size")
    }
    options |= {"max_steps": 2, "preview_every": 2, "validate_every": 2, "ema_start": 1, "log_every": 1}
    options |= {"gradient_accumulation": min(options.get("gradient_accumulation", 1), 2)}
    options |= {"warmup_steps": min(options["warmup_steps"], 1)}
    objective = {**published, "validation_samples": 1, "preview_steps": 2}
    config = toy_run(
        folder / name, frozen, pixels=values["model"]["sample_size"] * 2, objective=objective, **options
    )
    config.model["interpolation_scale"] = values["model"].get("interpolation_scale", 1.0)
    if "init_from" in values:
        config = replace(config, init_from=str(folder / Path(values["init_from"]).parent.name / "final"))
    return config


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run) if "loss" in line]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_the_four_stages_follow_each_other(tmp_path, frozen, monkeypatch):
    """Masked, unmasked, larger and masked, unmasked: each starts with the weights of the one before."""
    asked: list[tuple[float, int, int]] = []
    edm_loss = edm.edm_loss

    def seen(model, latents, sigma, noise, **kwargs):
        if model.training:
            asked.append(
                (kwargs.get("mask_ratio", 0.0), latents.shape[-1], len(kwargs.get("mask_noise", [[]])[0]))
            )
        return edm_loss(model, latents, sigma, noise, **kwargs)

    monkeypatch.setattr(edm, "edm_loss", seen)
    before: dict[str, torch.Tensor] = {}
    for name, pixels in zip(STAGES, (64, 64, 128, 128)):
        config = stage(name, tmp_path, frozen)
        start = starting_model(config)
        assert start.config.interpolation_scale == pixels / 64
        assert not before or all(torch.equal(before[key], value) for key, value in start.state_dict().items())
        final = train(config)
        before = exported(tmp_path / name)
        assert any(not torch.equal(value, before[key]) for key, value in start.state_dict().items())

        masked, tokens = "masked" in name, (pixels // 16) ** 2
        assert set(asked) == {(0.75, pixels // 8, tokens) if masked else (0.0, pixels // 8, 0)}
        asked.clear()
        (measured,) = (line for line in log(tmp_path / name) if "validation_loss" in line)
        assert 0.1 < measured["validation_loss"] < 2
        assert 0 <= log(tmp_path / name)[0]["experts/untaken"] < 1
        assert (tmp_path / name / "preview-00000002.png").is_file()
        pipe = SparseDiTPipeline.from_pretrained(final)
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a red star", num_inference_steps=2).images[0].size == (pixels, pixels)


def test_a_stage_can_go_on_from_the_whole_state_of_the_one_before(tmp_path, frozen):
    """As published between the stages of one size: optimizer and count of steps too, at another rate."""
    first = toy_run(
        tmp_path / "first", frozen, objective={"mask_ratio": 0.75}, max_steps=3, schedule="cosine"
    )
    train(first)
    after = toy_run(tmp_path / "after", frozen, max_steps=5, learning_rate=1e-3)
    train(after, resume=str(find_checkpoint(tmp_path / "first", "auto")))
    assert [line["step"] for line in log(tmp_path / "after")] == [4, 5]
    assert {line["learning_rate"] for line in log(tmp_path / "after")} == {1e-3}
    tensors, _ = load_checkpoint(find_checkpoint(tmp_path / "after", "auto"))
    assert tensors["optimizer"]["step.proj_out.weight"].item() == 5


def test_a_masked_run_that_is_resumed_equals_the_unbroken_one_bit_for_bit(tmp_path, frozen, monkeypatch):
    options = {"save_every": 2, "gradient_accumulation": 2, "mixed_precision": "bf16", "ema_start": 3}
    options |= {"schedule": "cosine", "learning_rate_floor": 0.33, "gradient_checkpointing": True}
    objective = {"mask_ratio": 0.75, "layout_weight": 0.5, "layout_block": 1}
    whole = toy_run(tmp_path / "whole", frozen, objective=objective, max_steps=5, **options)
    train(whole)
    broken = replace(whole, output_dir=str(tmp_path / "broken"))
    reports, report = iter(range(3)), Throughput.report
    with monkeypatch.context() as patch:  # killed after a step that was not saved
        patch.setattr(Throughput, "report", lambda *args: [next(reports), report(*args)][1])
        with pytest.raises(StopIteration):
            train(broken)
    assert find_checkpoint(tmp_path / "broken", "auto").name == "step-00000002"
    train(broken)
    left, right = (load_checkpoint(find_checkpoint(tmp_path / n, "auto"))[0] for n in ("whole", "broken"))
    for part in left:
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(left[part][name], value) for name, value in right[part].items()), part
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_training_lowers_the_loss(tmp_path, frozen):
    train(toy_run(tmp_path, frozen, max_steps=40, learning_rate=3e-3, objective={"mask_ratio": 0.5}))
    found = losses(tmp_path)
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


def test_an_average_that_begins_late_begins_with_the_weights_it_finds(tmp_path, frozen):
    options = {
        "ema_start": 2,
        "ema_decay": 0.75,
        "save_every": 1,
        "keep_checkpoints": 9,
        "learning_rate": 1e-2,
    }
    train(toy_run(tmp_path / "late", frozen, max_steps=5, **options))
    states = [load_checkpoint(tmp_path / "late" / f"step-{n:08d}")[0] for n in range(1, 6)]
    name = "proj_out.weight"
    average = states[2]["model"][name]
    for state in states[:3]:
        torch.testing.assert_close(state["ema"][name], state["model"][name])
    for state in states[3:]:
        average = 0.75 * average + 0.25 * state["model"][name]
        torch.testing.assert_close(state["ema"][name], average)


def test_a_run_without_an_average_exports_its_weights(tmp_path, frozen):
    train(toy_run(tmp_path, frozen, max_steps=3, ema_decay=0.0))
    tensors, _ = load_checkpoint(find_checkpoint(tmp_path, "auto"))
    for name, value in exported(tmp_path).items():
        torch.testing.assert_close(value, tensors["model"][name], msg=name)


def test_the_cosine_ends_at_its_floor():
    """Composer's formula, which the published training uses, at some steps."""
    options = TrainConfig(
        max_steps=250,
        batch_size=1,
        learning_rate=2.4,
        warmup_steps=25,
        schedule="cosine",
        learning_rate_floor=0.33,
    )
    rate = learning_rate(options)
    assert rate(10) == pytest.approx(2.4 * 10 / 25)
    for step in (25, 60, 137, 250):
        half_wave = (1 + torch.tensor(torch.pi * (step - 25) / 225).cos().item()) / 2
        assert rate(step) == pytest.approx(2.4 * (0.33 + 0.67 * half_wave), rel=1e-5)
    with pytest.raises(ValueError, match=r"train\.learning_rate_floor must be at most 1, got 1\.5"):
        replace(options, learning_rate_floor=1.5)


def test_fsdp2_shards_by_block_and_computes_the_same(tmp_path):
    """By the policy that accelerate makes of configs/accelerate/fsdp2.yaml, on a process of its own: values,
    gradients, and what is saved."""
    settings = yaml.safe_load((CONFIGS / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"], auto_wrap_policy=settings["fsdp_auto_wrap_policy"]
    )
    model, whole = toy_sparse().train(), toy_sparse().train()
    blocks = {*model.mixer_blocks, *model.transformer_blocks}
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert {module for module in model.modules() if wraps(module)} == blocks

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for module in blocks:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        experts = model.transformer_blocks[1].ff.experts_in
        assert isinstance(experts, DTensor)
        assert experts.placements[0].is_shard(0)  # by expert

        inputs, mask = sparse_inputs((3, 5), batch=3), {"mask_ratio": 0.75, "mask_noise": torch.rand(3, 15)}
        for each in (whole, model):
            each(**inputs, **mask).sample.square().mean().backward()
        for (name, one), two in zip(whole.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, msg=name)

        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        optimizer.step()
        ema = EMAModel(model.parameters(), decay=0.5)
        tensors, values = capture(model, ema, optimizer)
        assert tensors["model"]["transformer_blocks.1.ff.experts_in"].shape == experts.shape
        unwanted, _ = capture(model, ema, optimizer, keep=False)
        assert unwanted["ema"].keys() == tensors["ema"].keys()
        assert not any(value.numel() for value in unwanted["ema"].values())
        other = torch.optim.AdamW(whole.parameters(), 1e-3)
        restore(whole, EMAModel(whole.parameters(), decay=0.5), other, tensors, values)
        assert all(torch.equal(one, tensors["model"][name]) for name, one in whole.named_parameters())
    finally:
        dist.destroy_process_group()
