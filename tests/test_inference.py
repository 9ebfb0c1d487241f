"""Scripts written for the published repository, their imports changed."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from test_conversion import transformer, write_parts

from localdit import inference as module
from localdit.conversion import assemble_pipeline
from localdit.inference import Config, inference, load_model
from localdit.models.local_dit import LocalDiTTransformer2DModel

FEW = {"denoising_steps": 2, "height": 16, "width": 24, "seed": 5}


@dataclass
class PublishedConfig:
    """A script's own config: names and values of the published one, what only training reads among them."""

    num_workers = 32
    attention_head_dim = 72
    denoising_steps = 20
    denoising_strength = 0.8
    height = 768
    width = 1024
    batch_size = 1
    learning_rate = 5e-5
    eps = 1e-10
    max_length = 120
    guidance_scale = 7.0
    num_layers = 18
    window_size = 4
    do_rope = True
    ckpt_path = "output/LocalDit-1024.safetensors"


@pytest.fixture
def parts(tmp_path):
    parts = write_parts(tmp_path)
    return {"ckpt_path": parts.pop("transformer"), **parts}


class Recorder:
    """In place of a pipeline: keeps what it is called with."""

    def __call__(self, *prompts, **kwargs):
        self.prompts, self.kwargs = prompts, kwargs
        return (["picture"],)


def called(config, *args, **kwargs):
    pipe = Recorder()
    assert inference(pipe, *args, config, **kwargs) == ["picture"]
    return pipe


def pixels(pictures):
    return [np.asarray(picture) for picture in pictures]


# --- Whole scripts ------------------------------------------------------------------------------------------


def test_a_text_to_image_script_runs(parts, tmp_path):
    config = Config(**parts, **FEW)
    pipe = load_model(config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a bad cab", "a fad"] * config.batch_size
    images = inference(pipe, prompts, ["a bad bed"] * 2, config)
    for i, image in enumerate(images):
        image.save(tmp_path / f"generated_image_{i}.png")
    assert [image.size for image in images] == [(24, 16)] * 2

    # What it gives is the pipeline's, and picture i the one of seed + i.
    alone = pipe(
        "a fad", "a bad bed", num_inference_steps=2, height=16, width=24, generator=torch.manual_seed(6)
    )
    assert np.abs(pixels(images)[1].astype(int) - pixels(alone.images)[0]).max() <= 1
    again = inference(pipe, prompts, ["a bad bed"] * 2, config)
    assert all(map(np.array_equal, pixels(images), pixels(again)))


def test_an_image_to_image_script_runs_at_the_images_size(parts):
    class Mine(Config):
        denoising_steps = 4
        denoising_strength = 0.5
        seed = 1

    config = Mine(**parts)
    pipe = load_model(config)
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 12, 3), dtype=np.uint8))
    images = inference(pipe, ["a cab"] * 2, ["bad"] * 2, config, image=image)
    assert [picture.size for picture in images] == [(12, 20)] * 2
    assert not np.array_equal(*pixels(images))


def test_a_script_with_its_own_config_runs(parts):
    config = PublishedConfig()
    with pytest.raises(FileNotFoundError, match=r"LocalDit-1024\.safetensors does not exist"):
        load_model(config)
    for name, value in (parts | FEW).items():
        setattr(config, name, value)
    pipe = load_model(config)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.window_size == 4
    (image,) = inference(pipe, ["a cab"], ["bad"], config)
    assert image.size == (24, 16)


# --- Config -------------------------------------------------------------------------------------------------


def test_values_come_from_keywords_subclasses_and_later():
    class Mine(Config):
        height = 512
        guidance_scale = 3.0

    @dataclass
    class Annotated(Mine):
        width: int = 640

    config = Mine(guidance_scale=4.0)
    config.max_length = 7
    assert (config.height, config.guidance_scale, config.max_length, config.width) == (512, 4.0, 7, None)
    config = Annotated(width=320)
    assert (config.height, config.guidance_scale, config.width) == (512, 3.0, 320)
    assert (Config().height, Config().max_length, Config().guidance_scale) == (None, 120, 7.0)


@pytest.mark.parametrize("name", ["heigth", "num_layers", "_private", "__init__"])
def test_a_keyword_that_is_no_field_is_refused(name):
    with pytest.raises(ValueError, match=rf"got \['{name}'\]; there are .*'height'"):
        Config(**{name: 1})


def test_a_subclass_may_add_fields():
    class Mine(Config):
        style = "oil"

    assert Mine(style="ink").style == "ink"


# --- load_model ---------------------------------------------------------------------------------------------


def test_without_a_path_the_embedded_model_is_loaded(parts, tmp_path, monkeypatch):
    names = {"transformer": parts["ckpt_path"], "vae": parts["vae"], "text_encoder": parts["text_encoder"]}
    assemble_pipeline(tmp_path / "mini", **names)
    monkeypatch.setattr(module, "MINI", str(tmp_path / "mini"))
    by_default, by_path = load_model(Config()), load_model(Config(ckpt_path=tmp_path / "mini"))
    name = "transformer_blocks.0.attn1.to_out.0.weight"
    first, second = (pipe.transformer.state_dict()[name] for pipe in (by_default, by_path))
    assert torch.equal(first, second)
    assert by_default.transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "arguments", "dtype"),
    [
        ({}, {}, torch.float32),
        ({"dtype": "bfloat16"}, {}, torch.bfloat16),
        ({"dtype": torch.bfloat16}, {"dtype": "float16"}, torch.float16),
    ],
)
def test_dtype_is_the_arguments_else_the_configs_else_float32_on_a_cpu(parts, fields, arguments, dtype):
    pipe = load_model(Config(**parts, device="cpu", **fields), **arguments)
    assert {pipe.transformer.dtype, pipe.vae.dtype} == {dtype}
    # T5 keeps in float32 what overflows in float16.
    wo = pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert wo.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_what_the_file_does_not_tell_is_the_configs(parts):
    config = Config(**parts, window_size=2, do_rope=False, eps=1e-5)
    loaded = load_model(config).transformer.config
    assert (loaded.window_size, loaded.rope, loaded.qk_norm_eps) == (2, False, 1e-5)
    loaded = load_model(Config(**parts)).transformer.config
    assert (loaded.window_size, loaded.rope, loaded.qk_norm_eps) == (4, True, 1e-10)


def test_the_header_of_our_own_files_is_not_overruled(parts, tmp_path):
    model = transformer(window_size=2, rope=False, qk_norm_eps=1e-4, global_context=False)
    model.save_single_file(tmp_path / "own.safetensors")
    loaded = load_model(Config(**parts | {"ckpt_path": tmp_path / "own.safetensors"})).transformer.config
    assert (loaded.window_size, loaded.rope, loaded.qk_norm_eps) == (2, False, 1e-4)


def test_the_choice_of_global_context_is_passed_on(parts):
    pipe = load_model(Config(**parts, global_context="random", global_context_seed=3))
    expected = LocalDiTTransformer2DModel.from_single_file(
        parts["ckpt_path"], global_context="random", seed=3
    ).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("dtype", ["int8", "half precision", 16])
def test_a_dtype_that_is_none_is_refused(parts, dtype):
    with pytest.raises(ValueError, match="dtype must be a floating type"):
        load_model(Config(**parts, dtype=dtype))


# --- inference ----------------------------------------------------------------------------------------------


def test_the_published_defaults_reach_the_pipeline():
    call = called(PublishedConfig(), ["a", "b"], ["c", "d"])
    assert call.prompts == (["a", "b"], ["c", "d"])
    assert call.kwargs == {
        "image": None,
        "strength": 0.8,
        "height": 768,
        "width": 1024,
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
        "max_sequence_length": 120,
        "generator": None,
        "return_dict": False,
    }
    assert called(Config(ckpt_path="some.pt"), ["a", "b"], ["c", "d"]).kwargs == call.kwargs


@pytest.mark.parametrize(
    ("config", "image", "size"),
    [
        (Config(), None, (None, None)),
        (Config(ckpt_path="some/folder"), None, (None, None)),
        (Config(ckpt_path="some.ckpt"), None, (768, 1024)),
        (Config(ckpt_path="some.ckpt", width=512), None, (768, 512)),
        (Config(height=256), None, (256, None)),
        (Config(height=256, width=256), "picture", (None, None)),
        (PublishedConfig(), "picture", (None, None)),
    ],
)
def test_the_size_is_the_images_or_the_configs_or_the_published_or_the_models(config, image, size):
    call = called(config, ["a"], ["b"], image=image)
    assert (call.kwargs["height"], call.kwargs["width"]) == size


def test_one_text_counts_as_one():
    assert called(Config(seed=3), "a cab", "bad").prompts == (["a cab"], "bad")
    assert called(Config(), ("a", "b"), None).prompts == (["a", "b"], None)
    seeds = [
        generator.initial_seed() for generator in called(Config(seed=3), ["a", "b"], None).kwargs["generator"]
    ]
    assert seeds == [3, 4]
