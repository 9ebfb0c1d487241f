"""`localdit convert` with every architecture: files to folders and back, pipelines, what does not apply."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_pipeline import redraw, toy_text_encoder, toy_tokenizer, toy_transformer, toy_vae
from toy_pixeldit import SHARED, toy_gemma
from toy_sparse import toy_sparse
from toy_sparse_pipeline import toy_clip_text_encoder, toy_clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from localdit import cli, conversion
from localdit.cli.convert import ARCHITECTURES as NAMES
from localdit.conversion import ARCHITECTURES, assemble_pipeline, convert
from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.models.open_clip_text import to_open_clip
from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel


def toy_ledit() -> LEDiTTransformer2DModel:
    return LEDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_classes=6, sample_size=8
    )


def toy_pixeldit() -> PixelDiTTransformer2DModel:
    return PixelDiTTransformer2DModel(**SHARED, num_classes=6)


def toy_pixeldit_text() -> PixelDiTTextTransformer2DModel:
    return PixelDiTTextTransformer2DModel(
        **SHARED,
        pixel_num_attention_heads=1,
        pixel_attention_head_dim=8,
        caption_channels=16,
        max_text_tokens=20,
    )


MODELS = {
    "local_dit": toy_transformer,
    "sparse_dit": toy_sparse,
    "ledit": toy_ledit,
    "pixeldit": toy_pixeldit,
    "pixeldit_text": toy_pixeldit_text,
}
# What a file without a header leaves open.
OPEN = {
    "sparse_dit": {"attention_head_dim": 16, "ffn_multiple_of": 32},
    "ledit": {"num_attention_heads": 2, "sample_size": 8},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toy(name: str) -> Any:
    model = MODELS[name]().eval()
    redraw(model, 0.3)
    return model


def published(name: str) -> tuple[Any, str]:
    """A toy, and a file of it without a header, as published."""
    model = toy(name)
    model.save_single_file("ours.safetensors")
    save_file(load_file("ours.safetensors"), "published.safetensors")
    return model, "published.safetensors"


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def write_parts(name: str) -> dict[str, str]:
    """Folders of the parts that a pipeline of this architecture holds, with toys in them."""
    parts = {}
    if name in ("local_dit", "sparse_dit", "ledit"):
        toy_vae().save_pretrained("vae")
        parts["vae"] = "vae"
    encoders = {
        "local_dit": lambda: (toy_tokenizer(), toy_text_encoder()),
        "sparse_dit": lambda: (toy_clip_tokenizer(), toy_clip_text_encoder()),
        "pixeldit_text": toy_gemma,
    }
    if name in encoders:
        for part in encoders[name]():
            part.save_pretrained("text")
        parts["text_encoder"] = "text"
    return parts


def test_the_command_line_knows_every_architecture():
    assert tuple(ARCHITECTURES) == NAMES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_published_file_becomes_a_folder_and_a_file_again(name, capsys):
    """The folder tells by itself what it is."""
    model, file = published(name)
    options = [f"{key}={value}" for key, value in OPEN.get(name, {}).items()]
    options = ["--config", *options] if options else []
    options += ["--global-context", "auto"] if name == "local_dit" else []
    assert cli.main(["convert", file, "folder", "--architecture", name, *options]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"found: {len(load_file(file))} tensors")
    assert f", {model.num_parameters():,} parameters" in said
    assert ("for research and evaluation only" in said) is name.startswith("pixeldit")
    config = json.loads(Path("folder/config.json").read_text())
    assert config["_class_name"] == type(model).__name__
    assert same(load_file("folder/diffusion_pytorch_model.safetensors"), model.state_dict())

    assert cli.main(["convert", "folder", "again.safetensors"]) == 0
    assert same(load_file("again.safetensors"), load_file(file))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pipeline_is_put_together_and_draws(name, capsys):
    """With the parts that apply, and the scheduler that was published."""
    _, file = published(name)
    parts = write_parts(name)
    options = [text for part, place in parts.items() for text in (f"--{part.replace('_', '-')}", place)]
    if name in OPEN:
        options += ["--config", *(f"{key}={value}" for key, value in OPEN[name].items())]
    assert cli.main(["convert", file, "whole", "--pipeline", "--architecture", name, *options]) == 0
    said = capsys.readouterr().err
    assert "chosen: scheduler: published" in said
    for part, place in parts.items():
        assert f"chosen: {part}: {place}" in said
    pipe = ARCHITECTURES[name].pipeline.from_pretrained("whole")
    pipe.set_progress_bar_config(disable=True)
    what: Any = "a hen" if "text_encoder" in parts else 3
    length = {"max_sequence_length": 20} if "text_encoder" in parts else {}
    [picture] = pipe(what, num_inference_steps=2, height=16, width=32, output_type="np", **length).images
    assert picture.shape == (16, 32, 3)

    # A pipeline folder is a source too, and what it was made with is what another gets.
    parts = dict.fromkeys(parts, "whole")
    assemble_pipeline("second", transformer="whole", scheduler="whole", **parts)
    second = ARCHITECTURES[name].pipeline.from_pretrained("second")
    assert type(second.scheduler) is type(pipe.scheduler)
    assert same(second.transformer.state_dict(), pipe.transformer.state_dict())
    convert("whole", "back.safetensors", architecture=name)
    assert same(load_file("back.safetensors"), load_file(file))


def test_the_published_schedulers():
    """Of each size, as the papers' programs sample."""

    def scheduler(name: str, **config: Any) -> Any:
        model = MODELS[name]()
        model.register_to_config(**config)
        return ARCHITECTURES[name].scheduler(model.config)

    assert scheduler("sparse_dit").config.sigma_data == 0.9
    assert scheduler("ledit").config.variance_type == "learned_range"
    assert scheduler("ledit", out_channels=4).config.variance_type == "fixed_small"
    assert [scheduler("pixeldit", sample_size=size).config.shift for size in (256, 512)] == [1, 2]
    shifts = [scheduler("pixeldit_text", sample_size=size).config.flow_shift for size in (512, 1024)]
    assert shifts == [3, 4]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sparse_dit",
            ["--global-context", "fold"],
            "global_context must be left out for sparse_dit: its choices",
        ),
        ("pixeldit", ["--window-size", "4"], "window_size must be left out for pixeldit: its choices are"),
        ("ledit", ["--seed", "1"], "seed must be left out for ledit"),
        ("local_dit", ["--config", "num_classes=3"], "num_classes must be left out for local_dit"),
        (
            "pixeldit",
            ["--pipeline", "--vae", "v"],
            "vae must be left out for pixeldit, whose pipeline has none",
        ),
        ("pixeldit_text", ["--pipeline", "--vae", "v"], "vae must be left out for pixeldit_text"),
        ("ledit", ["--pipeline", "--text-encoder", "t"], "text_encoder must be left out for ledit"),
        ("ledit", ["--pipeline", "--tokenizer", "t"], "tokenizer must be left out for ledit"),
    ],
)
def test_what_does_not_apply_names_the_architecture(name, options, message, capsys, folder):
    toy(name).save_single_file("file.safetensors")
    assert cli.main(["convert", "file.safetensors", "out", "--architecture", name, *options]) == 2
    assert capsys.readouterr().err.startswith(f"localdit: error: {message}")
    assert [path.name for path in folder.iterdir()] == ["file.safetensors"]


def test_a_folder_of_another_architecture_is_refused():
    toy("ledit").save_pretrained("folder")
    with pytest.raises(ValueError, match="must hold a PixelDiTTransformer2DModel, but folder holds a LEDiT"):
        convert("folder", "out.safetensors", architecture="pixeldit")
    with pytest.raises(ValueError, match=r"architecture must be one of local_dit, sparse_dit, .* got 'dit'"):
        convert("folder", "out.safetensors", architecture="dit")


def test_the_text_encoder_may_be_one_file_of_an_open_clip(monkeypatch, capsys):
    """Its tower is what the published model reads text with; the tokenizer is that of the published one."""
    config = CLIPTextConfig(
        vocab_size=55,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        bos_token_id=53,
        eos_token_id=54,
    )
    encoder = CLIPTextModel(config).eval()
    redraw(encoder, 0.3)
    save_file(to_open_clip(encoder.state_dict()) | {"logit_scale": torch.ones(())}, "clip.safetensors")
    model = toy_sparse(caption_channels=64)
    model.save_single_file("sparse.safetensors")
    toy_vae().save_pretrained("vae")
    toy_clip_tokenizer().save_pretrained("tokenizer")
    options = ["--architecture", "sparse_dit", "--pipeline", "--vae", "vae"]
    text = ["--text-encoder", "clip.safetensors", "--tokenizer", "tokenizer"]
    assert cli.main(["convert", "sparse.safetensors", "whole", *options, *text]) == 0
    said = capsys.readouterr().err
    assert "the text encoder is a CLIPTextModel with heads of 64 and QuickGELU, of 29 tensors" in said
    assert "dropped: 1 tensors, of a CLIP beside its text tower" in said
    pipe = ARCHITECTURES["sparse_dit"].pipeline.from_pretrained("whole")
    assert same(pipe.text_encoder.state_dict(), encoder.state_dict())

    seen = []
    monkeypatch.setattr(conversion, "_load_tokenizer", lambda name: seen.append(name) or toy_clip_tokenizer())
    assemble_pipeline("second", transformer=model_folder(model), vae="vae", text_encoder="clip.safetensors")
    assert seen == ["apple/DFN5B-CLIP-ViT-H-14-378"]


def model_folder(model: Any) -> str:
    model.save_pretrained("model")
    return "model"
