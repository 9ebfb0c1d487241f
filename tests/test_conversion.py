"""Conversion between published files, folders and whole pipelines, with tiny parts."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from localdit import conversion
from localdit.conversion import assemble_pipeline, convert, published_scheduler
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.local_dit_single_file import to_published
from localdit.pipelines.local_dit import LocalDiTPipeline

TOY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "caption_channels": 16,
    "sample_size": 8,
    "window_size": 2,
}


def redrawn(module):
    """A module whose every parameter speaks."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    return module.eval()


def transformer(**config):
    return redrawn(LocalDiTTransformer2DModel(**TOY | config))


def published_file(path, model):
    """A file without a header and with stale copies, as published."""
    tensors = to_published(model.state_dict())
    for index in range(len(model.transformer_blocks)):
        for part in "qkv":
            tensors[f"transformer_blocks.{index}.attn1.to_{part}.weight"] = torch.full((24, 24), 1e4)
    save_file(tensors, path)
    return path


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_parts(folder):
    """A published file, and folders of a VAE and of a text encoder with its tokenizer: paths by part."""
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    redrawn(vae).save_pretrained(folder / "vae")
    text = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    redrawn(text).save_pretrained(folder / "text")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "▁abcdefgh")]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(folder / "text")
    file = published_file(folder / "published.safetensors", transformer(global_context=False))
    return {"transformer": file, "vae": folder / "vae", "text_encoder": folder / "text"}


@pytest.fixture
def parts(tmp_path):
    return write_parts(tmp_path)


# --- convert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"full_attention_layers": (1,), "relative_position_bias": False}])
def test_a_file_becomes_a_folder_and_a_file_again(tmp_path, config, dtype):
    model = transformer(**config).to(torch.float16)
    published = published_file(tmp_path / "published.safetensors", model)
    untold = {name: value for name, value in (TOY | config).items() if name in ("sample_size", "window_size")}
    untold |= {name: config[name] for name in ("full_attention_layers",) if name in config}

    report = convert(published, tmp_path / "folder", dtype=dtype, **untold)
    # Read without diffusers, which makes float32 of what it is not told about.
    stored = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    expected = {name: tensor.to(dtype or torch.float16) for name, tensor in model.state_dict().items()}
    assert same(stored, expected)
    assert report.target == tmp_path / "folder"
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(report.dropped["stale copies"]) == 6
    assert report.chosen == ("built with global context, as the file has it",)

    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert same(load_file(tmp_path / "again.safetensors"), to_published(expected))
    convert(tmp_path / "again.safetensors", tmp_path / "folder2")
    assert files(tmp_path / "folder2") == files(tmp_path / "folder")
    assert (tmp_path / "folder2/config.json").read_text() == (tmp_path / "folder/config.json").read_text()
    assert same(load_file(tmp_path / "folder2/diffusion_pytorch_model.safetensors"), expected)


@pytest.mark.parametrize(
    ("choice", "sentence", "scale"),
    [
        ({}, "halved", 0.5),
        ({"global_context": "fold"}, "halved", 0.5),
        ({"global_context": "none"}, "nothing folded", 1),
        ({"global_context": "random", "seed": 7}, "from seed 7", 1),
    ],
)
def test_the_choice_of_global_context_is_made_and_reported(parts, tmp_path, choice, sentence, scale):
    report = convert(parts["transformer"], tmp_path / "folder", window_size=2, **choice)
    assert len(report.chosen) == 1
    assert sentence in report.chosen[0]
    tensors = len(load_file(parts["transformer"]))
    assert report.found == f"{tensors} tensors: 2 blocks, 2 heads of 12, no global context, no bias tables"
    model = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert model.config.global_context is ("seed" in choice)
    assert model.config.window_size == 2
    name = "transformer_blocks.1.attn1.to_out.0.weight"
    assert torch.equal(model.state_dict()[name], load_file(parts["transformer"])[name] * scale)


def test_the_transformer_of_a_pipeline_folder_is_converted(parts, tmp_path):
    assemble_pipeline(tmp_path / "pipeline", **parts)
    convert(tmp_path / "pipeline", tmp_path / "model.safetensors")
    model = LocalDiTTransformer2DModel.from_single_file(tmp_path / "model.safetensors")
    folder = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer")
    assert same(model.state_dict(), folder.state_dict())


def test_a_target_that_is_there_is_kept_unless_told_otherwise(parts, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    folder.mkdir()
    convert(parts["transformer"], folder)  # an empty folder is as good as none
    convert(folder, file)
    before = file.read_bytes(), files(folder)
    with pytest.raises(ValueError, match=r"target must be empty or new without overwrite=True, got .*folder"):
        convert(parts["transformer"], folder)
    with pytest.raises(ValueError, match=r"target must not exist without overwrite=True, got .*file"):
        convert(folder, file)
    assert (file.read_bytes(), files(folder)) == before

    (folder / "left_over.txt").write_text("from the last time")
    convert(parts["transformer"], folder, overwrite=True, global_context="none")
    convert(folder, file, overwrite=True)
    assert files(folder) == before[1]
    assert file.read_bytes() != before[0]


def test_overwriting_takes_nothing_that_is_no_model(parts, tmp_path):
    """Nor the source, nor a file in place of a folder."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ValueError, match="target must hold a model or a pipeline to be overwritten"):
        convert(parts["transformer"], tmp_path / "photos", overwrite=True)
    with pytest.raises(ValueError, match="target must be a folder, got the file"):
        convert(parts["transformer"], tmp_path / "photos" / "cat.jpg", overwrite=True)
    source = parts["transformer"].rename(parts["vae"] / "published.safetensors")
    with pytest.raises(ValueError, match="target must not hold what it is made from"):
        convert(source, parts["vae"], overwrite=True)
    with pytest.raises(ValueError, match="target must not hold what it is made from"):
        assemble_pipeline(parts["vae"], **parts | {"transformer": source}, overwrite=True)
    assert files(tmp_path / "photos") == ["cat.jpg"]
    assert source.exists()


@pytest.mark.parametrize("when", ["save_pretrained", "rename"])
def test_a_failed_conversion_leaves_what_was_there(parts, tmp_path, monkeypatch, when):
    target = tmp_path / "folder"
    convert(parts["transformer"], target)
    before = {name: (target / name).read_bytes() for name in files(target)}
    listing = sorted(tmp_path.iterdir())

    save, rename = LocalDiTTransformer2DModel.save_pretrained, Path.rename

    def fail(self, folder):
        save(self, folder)
        raise KeyboardInterrupt

    def fail_at_the_last(self, new):
        if ".tmp-" in self.name:
            raise OSError("no space")
        return rename(self, new)

    if when == "rename":
        monkeypatch.setattr(Path, "rename", fail_at_the_last)
    else:
        monkeypatch.setattr(LocalDiTTransformer2DModel, "save_pretrained", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        convert(parts["transformer"], target, overwrite=True, global_context="none")
    assert {name: (target / name).read_bytes() for name in files(target)} == before
    assert sorted(tmp_path.iterdir()) == listing

    monkeypatch.undo()
    with pytest.raises(ValueError, match="says num_layers=3"):
        convert(parts["transformer"], tmp_path / "other", num_layers=3)
    assert sorted(tmp_path.iterdir()) == listing


def test_a_written_folder_may_be_read_by_others(parts, tmp_path):
    (tmp_path / "plain").touch()
    convert(parts["transformer"], tmp_path / "folder")
    modes = {path.stat().st_mode for path in (tmp_path / "folder").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_folder_must_be_a_whole_localdit(tmp_path):
    def converting(folder, **kwargs):
        return convert(folder, tmp_path / "out.safetensors", **kwargs)

    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"source must be the folder of a model, but .* has no config.json"):
        converting(folder)
    transformer().save_config(folder)
    with pytest.raises(ValueError, match=r"source must hold weights as \.safetensors"):
        converting(folder)
    transformer().save_pretrained(folder)
    for choice in ({"global_context": "none"}, {"seed": 1}, {"window_size": 2}):
        with pytest.raises(ValueError, match="must be left out for"):
            converting(folder, **choice)
    with pytest.raises(ValueError, match=r"target must be a \.safetensors file, as source is a folder"):
        convert(folder, tmp_path / "elsewhere")

    transformer(num_layers=3).save_config(folder)
    with pytest.raises(
        ValueError, match=r"(?s)transformer could not be loaded .* missing .* transformer_blocks\.2"
    ):
        converting(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(
        ValueError, match=r"must hold a LocalDiTTransformer2DModel or a .*, but .* a PixArtTransformer2DModel"
    ):
        converting(folder)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        convert(tmp_path / "nothing.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# --- assemble_pipeline --------------------------------------------------------------------------------------


def test_a_pipeline_is_put_together_and_draws(parts, tmp_path):
    report = assemble_pipeline(tmp_path / "pipeline", **parts, sample_size=8, window_size=2)
    assert report.chosen[1:] == (
        "scheduler: published",
        f"vae: {parts['vae']}",
        f"text_encoder: {parts['text_encoder']}",
        f"tokenizer: {parts['text_encoder']}",
    )
    pipe = LocalDiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert report.parameters == pipe.transformer.num_parameters()
    assert pipe.transformer.config.window_size == 2
    fields = published_scheduler().config.keys() - {"_use_default_values"}
    assert all(pipe.scheduler.config[name] == published_scheduler().config[name] for name in fields)
    picture = pipe("a bad cab", num_inference_steps=2, height=16, width=8, output_type="np").images
    assert picture.shape == (1, 16, 8, 3)


def test_the_published_schedule_is_pixart_sigmas():
    config = published_scheduler().config
    assert (config.num_train_timesteps, config.beta_schedule) == (1000, "linear")
    assert (config.beta_start, config.beta_end) == (0.0001, 0.02)
    assert (config.prediction_type, config.algorithm_type, config.solver_order) == (
        "epsilon",
        "dpmsolver++",
        2,
    )


def test_parts_may_come_from_other_pipelines_and_folders(parts, tmp_path):
    assemble_pipeline(tmp_path / "first", **parts)
    EulerDiscreteScheduler(beta_start=0.001).save_pretrained(tmp_path / "euler")
    whole = dict.fromkeys(("transformer", "vae", "text_encoder"), tmp_path / "first")
    assemble_pipeline(tmp_path / "second", **whole, scheduler=tmp_path / "euler", dtype=torch.bfloat16)
    first, second = (
        LocalDiTPipeline.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        for name in ("first", "second")
    )
    for part in ("transformer", "vae", "text_encoder"):
        assert same(getattr(first, part).state_dict(), getattr(second, part).state_dict())
    assert isinstance(second.scheduler, EulerDiscreteScheduler)
    assert second.scheduler.config.beta_start == 0.001
    assert second.tokenizer("a bad cab").input_ids == first.tokenizer("a bad cab").input_ids
    stored = load_file(tmp_path / "second" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vae": "nowhere"},
            "vae must be a folder that exists or a hub name such as owner/name, got nowhere",
        ),
        ({"vae": "../nowhere"}, "vae must be a folder that exists"),
        ({"text_encoder": "/nowhere/text"}, r"tokenizer must be a folder that exists .* got /nowhere/text"),
        ({"tokenizer": "{vae}"}, "tokenizer must be a folder with one of"),
        ({"vae": "{text_encoder}"}, "vae could not be loaded from .*text"),
        ({"scheduler": "{vae}"}, "scheduler could not be loaded from .*vae"),
        ({"transformer": "{vae}"}, "source must hold a LocalDiTTransformer2DModel or a .* a AutoencoderKL"),
    ],
)
def test_a_part_that_cannot_be_loaded_is_named(parts, tmp_path, change, message):
    change = {part: name.format(**parts) for part, name in change.items()}
    with pytest.raises(ValueError, match=message):
        assemble_pipeline(tmp_path / "pipeline", **parts | change)
    assert not (tmp_path / "pipeline").exists()


def test_parts_that_do_not_fit_are_refused_before_the_text_encoder_is_loaded(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "text_encoder_class", None)

    def assembling(**changes):
        return assemble_pipeline(tmp_path / "pipeline", **parts | changes)

    narrow = published_file(tmp_path / "narrow.safetensors", transformer(caption_channels=8))
    with pytest.raises(ValueError, match=r"text_encoder must be as wide as .* caption_channels, 8, got 16"):
        assembling(transformer=narrow)
    deep = published_file(tmp_path / "deep.safetensors", transformer(in_channels=16, out_channels=16))
    with pytest.raises(ValueError, match="vae must have the transformer's 16 channels, got 4"):
        assembling(transformer=deep)
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((chr(0x4E00 + i), -1.0) for i in range(90))]
    T5Tokenizer(vocab=letters, extra_ids=0).save_pretrained(tmp_path / "chinese")
    with pytest.raises(ValueError, match="tokenizer must have at most the text encoder's 64 tokens, got 93"):
        assembling(tokenizer=tmp_path / "chinese")
    assert not (tmp_path / "pipeline").exists()


def test_missing_weights_of_a_part_are_not_made_up(parts, tmp_path):
    path = parts["text_encoder"] / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"text_encoder must be whole, but .*encoder.final_layer_norm.weight"
    ):
        assemble_pipeline(tmp_path / "pipeline", **parts)


def test_pickles_and_foreign_code_of_parts_are_not_touched(parts, tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    weights = parts["vae"] / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"a": Canary()}, weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="vae could not be loaded"):
        assemble_pipeline(tmp_path / "pipeline", **parts)

    (tmp_path / "scheduler").mkdir()
    for name in (["evil", "Scheduler"], "os.system", "AutoencoderKL", None):
        config = {"_class_name": name, "_diffusers_version": "0.38.0"}
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="scheduler must be one of diffusers'"):
            assemble_pipeline(tmp_path / "pipeline", **parts, scheduler=tmp_path / "scheduler")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name/vae", ("owner/name", "vae")),
        ("owner/name/a/b", ("owner/name", "a/b")),
    ],
)
def test_a_hub_name_may_name_a_folder_within(name, place):
    assert conversion._place("vae", name) == place
