"""Diffusers' tools work on LocalDiTPipeline: callbacks, saving, AutoPipelines, LoRA, offload, caches."""

import json
import sys
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.hooks import _helpers
from diffusers.pipelines import auto_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from toy_pipeline import SIZE, generators, run, spy, toy_pipeline, toy_transformer, toy_vae

from localdit.models.local_dit import LocalDiTTransformer2DModel, TextContext
from localdit.pipelines import LocalDiTPipeline, register_with_diffusers

TEXT = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]


def seeded(pipe: LocalDiTPipeline, *args: Any, **kwargs: Any) -> Tensor:
    return run(pipe, *args, generator=generators(0)[0], **kwargs)


# Callbacks.


def test_callbacks_see_every_step_and_change_nothing_unasked(pipe):
    seen = []

    def look(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline is pipe
        assert pipe.current_timestep == t
        assert pipe.num_timesteps == 3
        assert pipe.guidance_scale == 3.0
        assert pipe.do_classifier_free_guidance
        assert pipe.attention_kwargs == {}
        seen.append((i, int(t), {name: tuple(x.shape) for name, x in tensors.items()}))
        return tensors

    names = ["latents", *TEXT]
    expected = seeded(pipe)
    kwargs = {
        "callback_on_step_end": look,
        "callback_on_step_end_tensor_inputs": names,
        "attention_kwargs": {},
    }
    assert torch.equal(seeded(pipe, **kwargs), expected)
    shapes = dict(zip(names, [(1, 4, 6, 8), (1, 120, 16), (1, 120), (1, 120, 16), (1, 120)]))
    assert seen == [(i, int(t), shapes) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert pipe.current_timestep is None
    # One that returns nothing only looks on.
    assert torch.equal(seeded(pipe, callback_on_step_end=lambda *_: None), expected)


def test_a_callback_may_change_the_latents(pipe):
    zeros = seeded(
        pipe,
        callback_on_step_end=lambda pipe, i, t, tensors: {"latents": torch.zeros_like(tensors["latents"])},
    )
    assert not zeros.any()


def test_a_callback_may_stop_the_run(pipe):
    kept = []

    def stop(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = i == 1
        kept.append(tensors["latents"])
        return tensors

    calls = spy(pipe)
    assert torch.equal(seeded(pipe, num_inference_steps=5, callback_on_step_end=stop), kept[1])
    assert len(calls) == 2
    seeded(pipe, num_inference_steps=5)  # the next run is not stopped
    assert len(calls) == 7


def attended(context: TextContext, row: int) -> Tensor:
    """The tokens of one caption that the transformer attends to."""
    text = context.text[row]
    return text if context.mask is None else text[context.mask[row].flatten()]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", TEXT)
def test_changed_text_is_read_anew(pipe, name, in_place):
    """From the step after, as if the run had that text from there."""

    def change(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if i == 0:
            changed = torch.zeros_like(tensors[name])
            changed[:, :3] = 1
            if not in_place:
                return {name: changed}
            tensors[name].copy_(changed)
        return None

    calls = spy(pipe)
    expected = seeded(pipe)
    changed = seeded(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    before, first, after = (calls[i]["encoder_hidden_states"] for i in (0, 3, 4))
    half, other = (0, 1) if name.startswith("negative") else (1, 0)
    for row in (half, other):
        assert torch.equal(attended(before, row), attended(first, row))
    torch.testing.assert_close(attended(before, other), attended(after, other), rtol=1e-5, atol=1e-5)
    assert not torch.equal(attended(before, half), attended(after, half))
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("prompts", [["star"], ["star", "circle"]])
@pytest.mark.parametrize("kind", ["object", "halved", "scale alone"])
def test_guidance_may_end_early(pipe, prompts, kind):
    """After step 1 the transformer runs on the prompts alone, however the callback was written."""

    def cut(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 1:
            pipeline._guidance_scale = 0.0
            if kind == "halved":  # as diffusers' guide has it, for [negative, positive]
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    calls = spy(pipe)
    kwargs = {"num_inference_steps": 4, "generator": generators(*range(len(prompts)))}
    names = ["prompt_embeds"] if kind == "halved" else ["latents"]
    callback = cutoff if kind == "object" else cut
    run(pipe, prompts, **kwargs, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    batch = len(prompts)
    assert [call["encoder_hidden_states"].batch_size for call in calls] == [
        2 * batch,
        2 * batch,
        batch,
        batch,
    ]
    guided, alone = calls[1]["encoder_hidden_states"], calls[2]["encoder_hidden_states"]
    for row in range(batch):
        torch.testing.assert_close(attended(guided, batch + row), attended(alone, row), rtol=1e-5, atol=1e-5)


def test_guidance_that_ends_within_its_interval_is_over(pipe):
    def cut(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 2:
            pipeline._guidance_scale = 0.0
        return tensors

    calls = spy(pipe)
    kwargs = {"num_inference_steps": 6, "guidance_interval": (0.1, 0.9)}
    seeded(pipe, callback_on_step_end=cut, **kwargs)
    assert [call["encoder_hidden_states"].batch_size for call in calls] == [1, 2, 2, 1, 1, 1]


def test_guidance_may_change_but_not_begin(pipe):
    def set_guidance(value: float) -> Any:
        def callback(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            pipeline._guidance_scale = value
            return tensors

        return callback

    assert not torch.equal(seeded(pipe, callback_on_step_end=set_guidance(5.0)), seeded(pipe))
    with pytest.raises(ValueError, match="guidance_scale must be above 1 from the start"):
        seeded(pipe, guidance_scale=1.0, callback_on_step_end=set_guidance(5.0))


def test_several_callback_objects_work_together(pipe):
    class Halve(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
            callback_kwargs["latents"] = callback_kwargs["latents"] / 2
            return callback_kwargs

    both = MultiPipelineCallbacks([Halve(), SDCFGCutoffCallback(cutoff_step_ratio=0.34), Halve()])
    calls = spy(pipe)
    seeded(pipe, callback_on_step_end=both)
    assert [call["encoder_hidden_states"].batch_size for call in calls] == [2, 2, 1]
    quartered = seeded(
        pipe, num_inference_steps=1, callback_on_step_end=MultiPipelineCallbacks([Halve(), Halve()])
    )
    assert torch.equal(quartered, seeded(pipe, num_inference_steps=1) / 4)


# Saving, loading, sharing.


def test_a_saved_pipeline_is_loaded_by_every_way_of_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LocalDiTPipeline"
    assert index["transformer"] == ["localdit.models.local_dit", "LocalDiTTransformer2DModel"]
    expected = seeded(pipe, output_type="pt")
    for cls in (LocalDiTPipeline, DiffusionPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is LocalDiTPipeline
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(seeded(loaded, output_type="pt"), expected)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_in_pickles_is_refused_unless_it_is_given(pipe, tmp_path, part):
    pipe.save_pretrained(tmp_path)
    for weights in (tmp_path / part).glob("*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=rf"{part} must have weights as \.safetensors.*Convert them"):
        LocalDiTPipeline.from_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path, **{part: None})
    assert getattr(loaded, part) is None


def test_missing_parts_are_saved_and_loaded_as_missing(tmp_path):
    toy_pipeline(text_encoder=None, tokenizer=None).save_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path, vae=None)
    assert loaded.text_encoder is loaded.tokenizer is loaded.vae is None
    assert loaded.transformer is not None
    assert loaded.vae_scale_factor == 8


def test_parts_are_shared_and_swapped(pipe):
    expected = seeded(pipe)
    again = LocalDiTPipeline(**pipe.components)
    other = LocalDiTPipeline.from_pipe(pipe)
    for same in (
        again,
        other,
        AutoPipelineForImage2Image.from_pipe(pipe),
        AutoPipelineForText2Image.from_pipe(pipe),
    ):
        assert type(same) is LocalDiTPipeline
        assert same.transformer is pipe.transformer
        same.set_progress_bar_config(disable=True)
        assert torch.equal(seeded(same), expected)
    other.vae = toy_vae(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    assert other.vae_scale_factor == 2
    assert other("star", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


def test_a_subclassed_transformer_takes_its_place(tmp_path):
    pipe = toy_pipeline()

    class Negated(LocalDiTTransformer2DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (-super().forward(*args, **kwargs)[0],)

    expected = seeded(pipe, num_inference_steps=1, guidance_scale=1.0)
    config = dict(pipe.transformer.config)
    negated = Negated.from_config(config)
    negated.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = negated.eval()
    latents = seeded(pipe, num_inference_steps=1, guidance_scale=1.0)
    a = pipe.scheduler.alphas_cumprod[999]
    noise = torch.randn(1, 4, 6, 8, generator=generators(0)[0])
    torch.testing.assert_close((latents + expected) / 2, noise / a.sqrt(), rtol=1e-3, atol=1e-2)


def test_importing_the_pipelines_makes_them_known():
    assert diffusers.LocalDiTPipeline is LocalDiTPipeline
    for mapping in (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    ):
        assert mapping["localdit"] is LocalDiTPipeline
    metadata = _helpers.TransformerBlockRegistry.get(LocalDiTTransformer2DModel.block_class)
    assert metadata.return_hidden_states_index == 0


def test_without_diffusers_internals_the_rest_is_still_made_known(monkeypatch):
    monkeypatch.delattr(diffusers, "LocalDiTPipeline")
    monkeypatch.delattr(diffusers.pipelines, "auto_pipeline")
    monkeypatch.setitem(sys.modules, "diffusers.pipelines.auto_pipeline", None)
    monkeypatch.delattr(_helpers, "TransformerBlockRegistry")
    verbosity = transformers.logging.get_verbosity()
    register_with_diffusers()
    assert diffusers.LocalDiTPipeline is LocalDiTPipeline
    assert transformers.logging.get_verbosity() == verbosity


# LoRA.


def lora_file(folder: Any, seed: int = 0) -> dict[str, Tensor]:
    """Save a LoRA whose both halves are drawn at random; returns its tensors."""
    transformer = toy_transformer()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(x.shape, generator=generator)
        for name, x in get_peft_model_state_dict(transformer).items()
    }
    LocalDiTPipeline.save_lora_weights(folder, transformer_lora_layers=state)
    return state


def test_a_lora_is_loaded_scaled_and_unloaded(pipe, tmp_path):
    plain = seeded(pipe)
    lora_file(tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="toy")
    assert pipe.get_list_adapters() == {"transformer": ["toy"]}
    full = seeded(pipe)
    assert not torch.equal(full, plain)
    # The scale reaches both the text, read once, and the steps.
    for scale in (0.0, 0.5):
        scaled = seeded(pipe, attention_kwargs={"scale": scale})
        pipe.set_adapters("toy", scale)
        torch.testing.assert_close(seeded(pipe), scaled)
        pipe.set_adapters("toy", 1.0)
    assert torch.equal(seeded(pipe, attention_kwargs={"scale": 0.0}), plain)
    pipe.fuse_lora()
    torch.testing.assert_close(seeded(pipe), full, rtol=1e-3, atol=1e-2)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(seeded(pipe), plain, rtol=1e-3, atol=1e-2)
    assert not pipe.get_list_adapters()


def test_a_lora_of_something_else_is_refused(pipe, tmp_path):
    state = {f"unet.{name}": x for name, x in lora_file(tmp_path).items()}
    with pytest.raises(ValueError, match=r"must have keys under 'transformer\.'"):
        pipe.load_lora_weights(state)


def test_a_lora_is_never_unpickled(pipe, tmp_path):
    state = {f"transformer.{name}": x for name, x in lora_file(tmp_path).items()}
    torch.save(state, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"weight_name must be a \.safetensors file, got 'lora\.bin'"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.bin")
    with pytest.raises(Exception, match="header"):
        pipe.load_lora_weights(tmp_path / "lora.bin")
    with pytest.raises(Exception, match="header"):
        pipe.load_lora_weights(tmp_path / "lora.bin", use_safetensors=False)
    assert not pipe.get_list_adapters()


# Memory.


def test_offloaded_models_make_the_same_picture(pipe):
    expected = seeded(pipe, image=torch.rand(3, 48, 64, generator=generators(1)[0]), output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are set again after each call
        pixels = seeded(pipe, image=torch.rand(3, 48, 64, generator=generators(1)[0]), output_type="pt")
        assert torch.equal(pixels, expected)
        assert [hook.model for hook in pipe._all_hooks] == [pipe.text_encoder, pipe.transformer, pipe.vae]


def test_sequentially_offloaded_models_make_the_same_picture(pipe):
    """Weights wait on the meta device, and come for the time of a layer's call."""
    expected = seeded(pipe, image=torch.rand(3, 48, 64, generator=generators(1)[0]), output_type="pt")
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        assert next(model.parameters()).device.type == "meta"
    pixels = seeded(pipe, image=torch.rand(3, 48, 64, generator=generators(1)[0]), output_type="pt")
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{"offload_type": "leaf_level"},
                                    {"offload_type": "block_level", "num_blocks_per_group": 1}])  # fmt: skip
def test_group_offload_makes_the_same_picture(pipe, kwargs):
    expected = seeded(pipe)
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), **kwargs)
    assert torch.equal(seeded(pipe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "half"])
def test_on_a_gpu_the_picture_is_that_of_the_cpu(how):
    pipe = toy_pipeline()
    image = torch.rand(3, 48, 64, generator=generators(1)[0])
    expected = seeded(pipe, image=image, output_type="pt")
    if how == "half":
        pipe.transformer.to("cuda", torch.float16)
        pipe.vae.to("cuda", torch.float16)
        pipe.text_encoder.to("cuda")
    else:
        getattr(pipe, how)()
    pixels = seeded(pipe, image=image, output_type="pt")
    torch.testing.assert_close(pixels.cpu(), expected, rtol=0, atol=0.05 if how == "half" else 1e-3)


def test_the_vae_may_slice_and_tile(pipe):
    image = torch.rand(2, 3, 48, 64, generator=generators(1)[0])
    expected = seeded(pipe, ["star", "circle"], image=image, output_type="pt")
    pipe.vae.enable_slicing()
    pixels = seeded(pipe, ["star", "circle"], image=image, output_type="pt")
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    assert isinstance(pipe.vae, AutoencoderKL)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
    tiled = seeded(pipe, ["star", "circle"], image=image, output_type="pt")
    assert tiled.shape == expected.shape
    assert not torch.equal(tiled, expected)


# Speed.


@pytest.mark.parametrize("prompts", ["star", ["star", "circle", "ring"]])
def test_a_cache_that_skips_nothing_changes_nothing(pipe, prompts):
    expected = seeded(pipe, prompts)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(seeded(pipe, prompts), expected)
    pipe.transformer.disable_cache()


def test_caches_are_kept_within_a_call(pipe):
    """A high threshold skips blocks, and the next call finds nothing left."""
    expected = seeded(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    ran = []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_pre_hook(lambda *_: ran.append(1))
    skipped = seeded(pipe, num_inference_steps=4)
    assert len(ran) == 1
    assert not torch.equal(skipped, expected)
    assert torch.equal(seeded(pipe, num_inference_steps=4), skipped)
    # Guidance that ends halves the batch: what the guided steps left in the cache must not be used then.
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    ran.clear()
    seeded(pipe, num_inference_steps=4, callback_on_step_end=cutoff)
    assert len(ran) == 2
    pipe.transformer.disable_cache()


def test_caches_may_ask_for_the_time(pipe):
    asked = []

    def current_timestep() -> int:
        asked.append(int(pipe.current_timestep))
        return asked[-1]

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=current_timestep,
    )
    expected = seeded(pipe, num_inference_steps=6)
    pipe.transformer.enable_cache(config)
    assert not torch.equal(seeded(pipe, num_inference_steps=6), expected)
    assert set(asked) <= {int(t) for t in pipe.scheduler.timesteps}
    assert len(set(asked)) > 1


@pytest.mark.slow
def test_a_compiled_transformer_takes_its_place(pipe):
    """Whatever wraps the transformer hands on what the pipeline asks of it."""
    expected = seeded(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(seeded(pipe), expected, rtol=1e-4, atol=1e-2)
    assert pipe("star", **SIZE, num_inference_steps=1).images[0].size == (64, 48)
