"""What PixelDiT's pipelines compute: against samplers written out by hand, and against themselves."""

import json
import logging
import subprocess
import sys
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from toy_pipeline import generators, spy
from toy_pixeldit import LENGTH, NAMES, SIZE, class_pipeline, run, text_pipeline

from localdit.pipelines import NonFiniteError, PixelDiTPipeline, PixelDiTTextPipeline
from localdit.pipelines.pixeldit_text import instruction, published_scheduler
from localdit.schedulers.flow_adams_bashforth import FlowAdamsBashforthScheduler

both = pytest.mark.parametrize("make", [class_pipeline, text_pipeline], ids=["class", "text"])


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference is below `tolerance` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def picture(height: int = 8, width: int = 12, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise(seed: int) -> Tensor:
    return torch.randn(1, 3, 8, 12, generator=generators(seed)[0])


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


# --- The samplers written out


@torch.no_grad()
def adams_bashforth(
    pipe: PixelDiTPipeline,
    label: int,
    guidance: float,
    interval: tuple[float, float],
    x: Tensor,
    steps: int,
    first: int = 0,
    shift: float = 1.0,
) -> Tensor:
    """The published class sampler, in its own time from 0, noise, to 1."""
    times = torch.arange(steps + 1) / steps
    times = times / (times + (1 - times) * shift)
    before = None
    for i in range(first, steps):
        t = times[i : i + 1]
        none, some = (pipe.transformer(x, t, torch.tensor([y])).sample for y in (10, label))
        g = guidance if interval[0] < t < interval[1] else 1.0
        v = none + g * (some - none)
        x = x + (times[i + 1] - t) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
    return x


@pytest.mark.parametrize(
    ("guidance", "interval", "shift"),
    [(1.0, (0.0, 1.0), 1.0), (3.25, (0.1, 0.9), 1.0), (2.5, (0.3, 0.7), 2.0), (2.0, (0.2, 1.0), 1.0)],
)
def test_labels_to_images_is_the_sampler_written_out(guidance, interval, shift):
    """With ten steps, times stand on the ends of the intervals, where there is no guidance any more."""
    pipe = class_pipeline(scheduler=FlowAdamsBashforthScheduler(shift=shift))
    expected = adams_bashforth(pipe, 4, guidance, interval, noise(3), steps=10, shift=shift)
    made = run(
        pipe,
        4,
        num_inference_steps=10,
        guidance_scale=guidance,
        guidance_interval=interval,
        generator=generators(3)[0],
    )
    assert_same(made, expected)


@torch.no_grad()
def embeddings(pipe: PixelDiTTextPipeline, text: str, instructed: bool) -> Tensor:
    """Text features by hand: the first place, and the last LENGTH - 1."""
    before = instruction() if instructed else ""
    spelled = [2, *(pipe.tokenizer.convert_tokens_to_ids(c) for c in (before + text).replace(" ", "▁"))]
    whole = len(before) + 1 + LENGTH - 2 if instructed else LENGTH
    spelled = spelled[:whole]
    mask = torch.tensor([[1] * len(spelled) + [0] * (whole - len(spelled))])
    ids = torch.tensor([spelled + [0] * (whole - len(spelled))])
    states = pipe.text_encoder(ids, attention_mask=mask).last_hidden_state
    return torch.cat((states[:, :1], states[:, -(LENGTH - 1) :]), dim=1)


@torch.no_grad()
def dpm_solver(
    pipe: PixelDiTTextPipeline, text: str, guidance: float, x: Tensor, steps: int, instructed: bool = True
) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) in λ = ln((1 - σ) / σ), times as floats."""
    base = torch.linspace(0, 0.999, steps + 1, dtype=torch.float64)
    sigmas = [*(4 * base / (1 + 3 * base)).flip(0)[:-1].tolist(), 0.0]
    positive, negative = embeddings(pipe, text, instructed), embeddings(pipe, "", False)
    x, clean, width = x.double(), None, None
    for s, t in pairwise(sigmas):
        some, none = (
            pipe.transformer(x.float(), torch.tensor([1000 * s]), y).sample.double()
            for y in (positive, negative)
        )
        before, clean = clean, x - s * (none + guidance * (some - none))
        if t == 0:
            return clean
        before_width, width = width, float(np.log((1 - t) / t) - np.log((1 - s) / s))
        direction = clean
        if before is not None:
            direction = clean + width / before_width / 2 * (clean - before)
        x = t / s * x - (1 - t) * np.expm1(-width) * direction
    return x


@pytest.mark.parametrize("instructed", [False, True])
@pytest.mark.parametrize("steps", [2, 5])
def test_text_to_image_is_the_sampler_written_out(steps, instructed):
    """The prompt is stripped and not lower-cased."""
    pipe = text_pipeline()
    expected = dpm_solver(pipe, "A Hen", 2.75, noise(3), steps, instructed)
    made = run(
        pipe,
        "  A Hen\n",
        num_inference_steps=steps,
        guidance_scale=2.75,
        use_instruction=instructed,
        generator=generators(3)[0],
    )
    assert_same(made, expected.float(), 1e-3)


def test_the_text_models_noise_levels_are_the_published_ones():
    scheduler = published_scheduler()
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.99975, 0.79968, 0.0]), rtol=0, atol=1e-5)
    calls = spy(pipe := text_pipeline())
    run(pipe, num_inference_steps=2)
    asked = [call["timestep"] for call in calls]
    assert all(t.dtype == torch.float32 for t in asked)
    torch.testing.assert_close(torch.stack(asked)[:, 0], torch.tensor([999.75, 799.68]), rtol=0, atol=0.01)


def test_the_class_models_time_runs_from_noise_to_data():
    calls = spy(pipe := class_pipeline())
    run(pipe, 7, num_inference_steps=4, guidance_interval=(0.1, 0.9))
    assert [call["timestep"][0].item() for call in calls] == [0, 0.25, 0.5, 0.75]
    assert [call["class_labels"].tolist() for call in calls] == [[7], [10, 7], [10, 7], [10, 7]]


@pytest.mark.parametrize("interval", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.81, 0.89)])
def test_outside_the_interval_guidance_has_no_effect(interval):
    pipe = class_pipeline()
    plain = run(pipe, num_inference_steps=10, guidance_scale=1.0, generator=generators(0)[0])
    calls = spy(pipe)
    for scale in (2.0, 50.0):
        made = run(
            pipe,
            num_inference_steps=10,
            guidance_scale=scale,
            guidance_interval=interval,
            generator=generators(0)[0],
        )
        assert torch.equal(made, plain)
    assert {len(call["hidden_states"]) for call in calls} == {1}


@both
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        FlowMatchHeunDiscreteScheduler(),
        FlowAdamsBashforthScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
        ),
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_scheduler_of_flow_matching_arrives_where_an_oracle_points(make, scheduler, monkeypatch):
    """The oracle knows the picture, and from wherever it is asked it predicts what leads there."""
    pipe, goal = make(scheduler=scheduler), noise(8) / 3

    def oracle(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        t = timestep[0].item()
        if isinstance(pipe, PixelDiTPipeline):
            return ((goal - hidden_states) / (1 - t),)
        return ((hidden_states - goal) / (t / 1000),)

    monkeypatch.setattr(pipe.transformer, "forward", oracle)
    assert_same(run(pipe, num_inference_steps=8), goal, 2e-3)


# --- Batches, seeds, images


@both
@pytest.mark.parametrize("from_image", [False, True], ids=["pure", "image"])
@pytest.mark.parametrize("each", [1, 2])
def test_every_picture_of_a_batch_is_the_one_made_alone(make, each, from_image):
    pipe = make()
    conditions: list[Any] = ["a hen", "Blue"] if make is text_pipeline else [3, "hen"]
    images = [picture(seed=seed) for seed in range(2)]
    kwargs: dict[str, Any] = {"strength": 0.6} if from_image else {}
    own = [kwargs | {"image": image} if from_image else kwargs for image in images]
    many = "num_images_per_prompt" if make is text_pipeline else "num_images_per_label"
    seeds = range(10, 10 + 2 * each)
    together = kwargs | {"image": images} if from_image else kwargs
    batch = run(pipe, conditions, **together, **{many: each}, generator=generators(*seeds))
    assert batch.shape == (2 * each, 3, 8, 12)
    for i, seed in enumerate(seeds):
        alone = run(pipe, conditions[i // each], **own[i // each], generator=generators(seed)[0])
        assert_same(batch[i : i + 1], alone)
    for i in range(1, len(batch)):
        assert (batch[i] - batch[0]).abs().max() > 0.01 * batch.abs().max()


@pytest.mark.parametrize(("strength", "first"), [(0.0, 10), (0.09, 10), (0.3, 7), (0.8, 2), (0.99, 1)])
def test_image_to_image_mixes_noise_in_and_starts_there(strength, first):
    pipe, image = class_pipeline(), picture()
    calls = spy(pipe)
    made = run(
        pipe,
        2,
        image=image,
        strength=strength,
        num_inference_steps=10,
        guidance_interval=(0.1, 0.9),
        generator=generators(5)[0],
    )
    sigma = 1 - first / 10
    start = (1 - sigma) * pixels_of(image) + sigma * noise(5)
    assert len(calls) == 10 - first
    assert_same(made, adams_bashforth(pipe, 2, 3.0, (0.1, 0.9), start, 10, first))


@both
def test_full_strength_begins_with_noise_at_the_size_of_the_image(make):
    pipe = make()
    started = run(pipe, image=picture(11, 13), strength=1.0, generator=generators(1)[0])
    assert torch.equal(started, run(pipe, generator=generators(1)[0]))


@both
def test_sizes_default_to_the_transformers_and_to_the_images(make):
    def size(**kwargs: Any) -> tuple[int, ...]:
        condition = {"prompt": "a"} if make is text_pipeline else {"class_labels": 1}
        extra = {"max_sequence_length": LENGTH} if make is text_pipeline else {}
        images = pipe(**condition, **extra, num_inference_steps=1, output_type="pt", **kwargs).images
        return tuple(images.shape[2:])

    pipe = make()
    assert size() == (16, 16)
    assert size(width=8) == (16, 8)
    assert size(image=picture(15, 30)) == (12, 28)
    assert size(image=picture(15, 30), height=8) == (8, 28)
    assert size(image=[picture(15, 30)], height=8, width=4) == (8, 4)


@both
def test_given_latents_are_the_noise(make):
    pipe = make()
    drawn = run(pipe, generator=generators(9)[0])
    assert torch.equal(run(pipe, latents=noise(9)), drawn)
    assert not torch.equal(run(pipe), drawn)


@both
def test_output_types_are_one_picture(make):
    pipe = make()
    raw, pt, array, pil = (
        run(pipe, output_type=kind, generator=generators(0)[0]) for kind in ("latent", "pt", "np", "pil")
    )
    assert torch.equal(pt, (raw / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.array(pil[0]), (array[0] * 255).round().astype(np.uint8))
    images = run(pipe, generator=generators(0)[0], return_dict=True)
    assert torch.equal(images, raw)


@both
def test_bfloat16_stays_near_float32_and_draws_the_same_noise(make):
    pipe = make()
    expected = run(pipe, guidance_scale=1.5, generator=generators(0)[0])
    pipe.transformer.to(torch.bfloat16)
    made = run(pipe, guidance_scale=1.5, generator=generators(0)[0])
    assert made.dtype == torch.float32
    assert (made - expected).abs().mean() < 0.1 * expected.std()


# --- Labels


def test_labels_may_be_names_numbers_and_lists_of_both():
    pipe = class_pipeline()
    calls = spy(pipe)
    for labels in ("hen", 2, ["hen"], [2], torch.tensor([2]), (2,)):
        run(pipe, labels, guidance_scale=1.0, num_inference_steps=1)
    assert [call["class_labels"].tolist() for call in calls] == [[2]] * 6
    assert pipe.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "hen": 2}
    run(pipe, ["Tinca tinca", 10], guidance_scale=1.0, num_inference_steps=1)
    assert calls[-1]["class_labels"].tolist() == [0, 10]


# --- Text


def test_the_instruction_is_sanas_but_for_its_quotes():
    lines = instruction().split("\n")
    assert len(lines) == 8
    assert 'generate an "Enhanced prompt" that' in lines[0]
    assert "'" not in lines[0]
    assert lines[-1] == "User Prompt: "


def seen_texts(pipe: Any) -> list[tuple[int, int, int]]:
    """A list that grows by texts, places and tokens that are no padding, of every call of the encoder."""
    seen: list[tuple[int, int, int]] = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args[0].shape, int(kwargs["attention_mask"][0].sum()))),
        with_kwargs=True,
    )
    return seen


def test_prompts_are_instructed_and_negative_ones_are_not():
    """Equal texts are read once; the tokenizer is left as it was."""
    pipe = text_pipeline()
    side = pipe.tokenizer.padding_side
    seen = seen_texts(pipe)
    run(pipe, ["hen", " hen ", "owl"], negative_prompt="bad", num_inference_steps=1)
    count = len(instruction()) + 1
    assert seen == [(2, count + LENGTH - 2, count + 3), (1, LENGTH, 4)]
    assert pipe.tokenizer.padding_side == side
    seen.clear()
    run(pipe, "hen", guidance_scale=1.0, num_inference_steps=1, use_instruction=False)
    assert seen == [(1, LENGTH, 4)]


def test_the_transformer_gets_the_whole_length_and_no_mask():
    pipe = text_pipeline()
    calls = spy(pipe)
    run(pipe, "hen")
    assert all(call["encoder_hidden_states"].shape == (2, LENGTH, 16) for call in calls)
    assert all("encoder_attention_mask" not in call for call in calls)


def test_embeddings_stand_for_text_and_may_be_kept():
    pipe = text_pipeline()
    expected = run(pipe, ["hen", "owl"], negative_prompt="bad", generator=generators(0)[0])
    positive, negative = pipe.encode_prompt(["hen", "owl"], True, "bad", max_sequence_length=LENGTH)
    assert positive.shape == negative.shape == (2, LENGTH, 16)
    denoiser = text_pipeline(text_encoder=None, tokenizer=None)
    made = run(denoiser, prompt_embeds=positive, negative_prompt_embeds=negative, generator=generators(0)[0])
    assert torch.equal(made, expected)
    other = run(pipe, ["hen", "owl"], negative_prompt=None, generator=generators(0)[0])
    assert not torch.equal(other, expected)
    encoder = text_pipeline(transformer=None, scheduler=None)
    assert_same(encoder.encode_prompt("hen", False, max_sequence_length=LENGTH)[0], positive[:1], 1e-6)


def test_lost_words_are_reported_by_name(caplog):
    pipe = text_pipeline()
    with caplog.at_level(logging.WARNING):
        run(pipe, "hen " * 4, num_inference_steps=1)
        assert not caplog.records
        run(pipe, "hen hen hen hen blue owl", num_inference_steps=1)
    (record,) = caplog.records
    assert record.getMessage() == "Gemma2Model is given 20 tokens, and the text is cut before: blue owl"


# --- Callbacks


@both
def test_callbacks_see_every_step_and_may_change_or_stop_it(make):
    pipe = make()
    names = list(pipe._callback_tensor_inputs)
    expected, seen, kept = run(pipe, generator=generators(0)[0]), [], []

    def look(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline is pipe
        assert pipe.current_timestep == t
        assert (pipe.num_timesteps, pipe.guidance_scale, pipe.attention_kwargs) == (4, 3.0, {})
        seen.append((i, sorted(tensors)))
        return tensors

    kwargs = {"callback_on_step_end_tensor_inputs": names, "attention_kwargs": {}}
    made = run(pipe, callback_on_step_end=look, generator=generators(0)[0], **kwargs)
    assert torch.equal(made, expected)
    assert seen == [(i, sorted(names)) for i in range(4)]
    assert pipe.current_timestep is None

    def stop(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = i == 1
        kept.append(tensors["latents"])
        return tensors

    calls = spy(pipe)
    assert torch.equal(run(pipe, callback_on_step_end=stop, generator=generators(0)[0]), kept[1])
    assert len(calls) == 2
    zeros = run(pipe, callback_on_step_end=lambda p, i, t, x: {"latents": torch.zeros_like(x["latents"])})
    assert not zeros.any()
    assert torch.equal(run(pipe, callback_on_step_end=lambda *_: None, generator=generators(0)[0]), expected)


@both
def test_guidance_may_end_early(make):
    pipe = make()
    calls = spy(pipe)

    def cut(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 1:
            pipeline._guidance_scale = 0.0
        return tensors

    run(pipe, callback_on_step_end=cut, guidance_interval=(0.0, 1.0))
    assert [len(call["hidden_states"]) for call in calls][1:] == [2, 1, 1]


def test_changed_text_is_read_from_the_next_step():
    pipe = text_pipeline()
    calls = spy(pipe)

    def change(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])} if i == 1 else {}

    run(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    text = [call["encoder_hidden_states"] for call in calls]
    assert text[1][1].any()
    assert not text[2][1].any()
    assert torch.equal(text[1][0], text[2][0])
    with pytest.raises(ValueError, match="guidance_scale must be above 1 from the start"):
        run(
            pipe,
            guidance_scale=1.0,
            callback_on_step_end=lambda p, *_: setattr(p, "_guidance_scale", 3.0),
        )


# --- Diffusers' tools


@both
def test_a_saved_pipeline_is_loaded_with_its_bits(make, tmp_path):
    pipe = make()
    expected = run(pipe, generator=generators(0)[0])
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    for cls in (type(pipe), DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is type(pipe)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(run(loaded, generator=generators(0)[0]), expected)
    if make is class_pipeline:
        assert loaded.labels == pipe.labels
        assert index["id2label"] == {str(label): name for label, name in NAMES.items()}
    else:
        automatic = AutoPipelineForText2Image.from_pretrained(tmp_path)
        assert type(automatic) is PixelDiTTextPipeline
    assert getattr(diffusers, type(pipe).__name__) is type(pipe)


def test_a_fresh_process_loads_a_pipeline_with_its_own_scheduler(tmp_path):
    """diffusers imports no module because a folder names it, and the scheduler's is one of ours."""
    class_pipeline().save_pretrained(tmp_path)
    code = (
        "from localdit import PixelDiTPipeline\n"
        f"print(type(PixelDiTPipeline.from_pretrained({str(tmp_path)!r}).scheduler).__name__)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert loaded.stdout.split()[-1:] == ["FlowAdamsBashforthScheduler"], loaded.stderr


@both
def test_a_lora_is_loaded_scaled_and_unloaded(make, tmp_path):
    pipe, other = make(), make().transformer
    plain = run(pipe, generator=generators(0)[0])
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "compress"]))
    state = {name: torch.randn_like(x) for name, x in get_peft_model_state_dict(other).items()}
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=state)
    pipe.load_lora_weights(tmp_path, adapter_name="toy")
    full = run(pipe, generator=generators(0)[0])
    assert not torch.equal(full, plain)
    none = run(pipe, attention_kwargs={"scale": 0.0}, generator=generators(0)[0])
    assert torch.equal(none, plain)
    pipe.unload_lora_weights()
    assert_same(run(pipe, generator=generators(0)[0]), plain)


@both
def test_offloaded_models_make_the_same_picture(make):
    pipe = make()
    expected = run(pipe, generator=generators(0)[0])
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are set again after each call
        assert torch.equal(run(pipe, generator=generators(0)[0]), expected)


@both
def test_a_cache_of_threshold_zero_changes_nothing_and_a_high_one_skips(make):
    """Steps in and out of the guidance interval have batches of two sizes, and caches of their own."""
    pipe = make()
    kwargs = {"guidance_interval": (0.4, 0.9), "num_inference_steps": 6}
    expected = run(pipe, **kwargs, generator=generators(0)[0])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert_same(run(pipe, **kwargs, generator=generators(0)[0]), expected, 1e-6)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    ran: list[int] = []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_pre_hook(lambda *_: ran.append(1))
    assert not torch.equal(run(pipe, **kwargs, generator=generators(0)[0]), expected)
    assert len(ran) == 2  # one for each batch size
    pipe.transformer.disable_cache()


# --- What is refused


BAD: list[tuple[dict[str, Any], str]] = [
    ({"height": 10}, "height must be a positive multiple of 4, got 10"),
    ({"width": 0}, "width must be a positive multiple of 4, got 0"),
    ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    ({"strength": 1.5}, "strength must be between 0 and 1, got 1.5"),
    ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be .* got \(0.5, 0.2\)"),
    ({"guidance_interval": (-0.1, 0.2)}, r"guidance_interval must be .* got \(-0.1, 0.2\)"),
    ({"output_type": "jpg"}, "output_type must be .* got 'jpg'"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among .* got \['noise'\]"),
    ({"generator": generators(1, 2)}, "generator must be one or a list of 1, .* got 2"),
    ({"latents": torch.zeros(1, 3, 12, 8)}, r"\(1, 3, 8, 12\), got torch.float32 of shape \(1, 3, 12, 8\)"),
    ({"latents": torch.full((1, 3, 8, 12), torch.nan)}, "latents must be finite"),
    ({"image": []}, "image must hold a picture or be None"),
    ({"image": [picture(), picture()]}, "image must be one or 1, one for each prompt, got 2"),
    ({"image": picture(3, 12)}, "under 4 a side, got 3 x 12"),
    ({"image": pixels_of(picture())}, r"image must lie in \[0, 1\]"),
]
BAD_LABELS: list[tuple[Any, str]] = [
    ([], r"class_labels must hold a label, got \[\]"),
    (11, "class_labels must be integers from 0 to 10 or names, got 11"),
    (-1, "class_labels must be integers from 0 to 10 or names, got -1"),
    (1.5, "class_labels must be integers .* got 1.5"),
    ([1, "dodo"], "class_labels must be numbers or known names, got 'dodo', which is none of 4"),
]
EMBEDS = torch.randn(1, LENGTH, 16)
BAD_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt must be a text or a list of texts"),
    ({"prompt": 3}, "prompt must be a text .* got 3"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt must be one text or 1, .* got 2"),
    ({"prompt_embeds": EMBEDS}, "prompt must be None with prompt_embeds, got 'a hen'"),
    ({"prompt": None, "prompt_embeds": EMBEDS[..., :8]}, r"prompt_embeds must be \(texts, tokens, 16\)"),
    ({"prompt": None, "prompt_embeds": EMBEDS[:, :9]}, "must have one length, got 9 and 20"),
    ({"max_sequence_length": 21}, "max_sequence_length must be at most 20, got 21"),
    ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
]


def refuse_to_run(pipe: Any) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a model ran")

    for model in (pipe.transformer, getattr(pipe, "text_encoder", None)):
        if model is not None:
            model.register_forward_pre_hook(refuse)


@both
@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_bad_input_is_refused_before_a_model_runs(make, kwargs, message):
    refuse_to_run(pipe := make())
    with pytest.raises(ValueError, match=message):
        run(pipe, **kwargs)


@pytest.mark.parametrize(("labels", "message"), BAD_LABELS)
def test_labels_that_are_none_are_refused(labels, message):
    refuse_to_run(pipe := class_pipeline())
    with pytest.raises(ValueError, match=message):
        run(pipe, labels)


@pytest.mark.parametrize(("kwargs", "message"), BAD_TEXT)
def test_bad_text_is_refused_before_a_model_runs(kwargs, message):
    refuse_to_run(pipe := text_pipeline())
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a hen", "max_sequence_length": LENGTH} | SIZE | kwargs)


@both
def test_what_a_call_needs_must_be_there(make):
    for missing in ("transformer", "scheduler"):
        with pytest.raises(ValueError, match=f"{missing} must be loaded to make a picture"):
            run(make(**{missing: None}))
    with pytest.raises(ValueError, match="scheduler must be one of flow matching, got DDIMScheduler"):
        run(make(scheduler=DDIMScheduler()))
    if make is text_pipeline:
        with pytest.raises(ValueError, match="without tokenizer and text_encoder, prompt_embeds must be"):
            run(make(text_encoder=None))


@both
def test_models_that_overflow_are_named(make):
    pipe = make()
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"denoising gave .* run the transformer in"):
        run(pipe)
    if make is text_pipeline:
        pipe = make()
        with torch.no_grad():
            pipe.text_encoder.norm.weight[0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"the text encoder gave .*: run it in bfloat16 or float32"):
            run(pipe)
