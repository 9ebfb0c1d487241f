"""What LEDiTPipeline computes: against DiT's sampler written out by hand, against diffusers' DiTPipeline, and
against itself."""

import logging
import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from toy_pipeline import generators, redraw, toy_vae

from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.pipelines.common import NonFiniteError
from localdit.pipelines.ledit import LEDiTPipeline

SIZE = {"height": 48, "width": 64}  # 6 x 8 latents, 3 x 4 tokens
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 4: "hen"}
PUBLISHED: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "variance_type": "learned_range",
    "timestep_spacing": "linspace",
    "clip_sample": False,
}


def toy_transformer(**config: Any) -> LEDiTTransformer2DModel:
    defaults: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_classes": 6,
        "sample_size": 8,
    }
    transformer = LEDiTTransformer2DModel(**defaults | config).eval()
    redraw(transformer, 0.1)
    return transformer


def toy_pipeline(**components: Any) -> LEDiTPipeline:
    makers: dict[str, Any] = {
        "vae": toy_vae,
        "transformer": toy_transformer,
        "scheduler": lambda: DDPMScheduler(**PUBLISHED),
        "id2label": lambda: NAMES,
    }
    pipe = LEDiTPipeline(
        **{name: components[name] if name in components else make() for name, make in makers.items()}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> LEDiTPipeline:
    return toy_pipeline()


def run(pipe: LEDiTPipeline, class_labels: Any = 3, **kwargs: Any) -> Tensor:
    defaults = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0}
    return pipe(class_labels, **SIZE | defaults | kwargs).images


def spy(pipe: LEDiTPipeline) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max()
    )


# --- The published sampler


def respaced(steps: int) -> list[int]:
    """The times of DiT: evenly from 0 to 999, rounded one by one."""
    return [round(i * 999 / (steps - 1)) for i in range(steps)]


def test_the_published_scheduler_visits_dits_own_times():
    scheduler = DDPMScheduler(**PUBLISHED)
    for steps in (250, 50, 8):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == respaced(steps)[::-1]


@torch.no_grad()
def ddpm_by_hand(
    pipe: LEDiTPipeline, label: int, guidance: float, guided_channels: int, seed: int, steps: int
) -> Tensor:
    """DiT's sampler: a diffusion of as many steps, whose variance lies between beta and its lower bound."""
    generator = torch.Generator().manual_seed(seed)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[respaced(steps)]
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    beta = 1 - alpha_bar / before
    lower = beta * (1 - before) / (1 - alpha_bar)
    x = torch.randn(1, 4, 6, 8, generator=generator).double()
    for i in reversed(range(steps)):

        def predict(label: int, x: Tensor = x, i: int = i) -> Tensor:
            t = torch.tensor([respaced(steps)[i]])
            return pipe.transformer(x.float(), t, torch.tensor([label])).sample.double()

        out = predict(label)
        noise, share = out[:, :4].clone(), (out[:, 4:] + 1) / 2
        if guidance > 1:
            without = predict(pipe.transformer.config.num_classes)[:, :guided_channels]
            noise[:, :guided_channels] = without + guidance * (noise[:, :guided_channels] - without)
        clean = (x - (1 - alpha_bar[i]).sqrt() * noise) / alpha_bar[i].sqrt()
        mean = beta[i] * before[i].sqrt() / (1 - alpha_bar[i]) * clean
        mean = mean + (1 - before[i]) * (1 - beta[i]).sqrt() / (1 - alpha_bar[i]) * x
        x = mean
        if i:
            log_variance = share * beta[i].log() + (1 - share) * lower[i].log()
            x = mean + (log_variance / 2).exp() * torch.randn(1, 4, 6, 8, generator=generator)
    return x


@pytest.mark.parametrize(("guidance", "channels"), [(1.0, None), (4.0, None), (4.0, 3)])
def test_ddpm_with_its_learned_range_is_dits_sampler_written_out(pipe, guidance, channels):
    expected = ddpm_by_hand(pipe, 2, guidance, channels or 4, seed=3, steps=8)
    options = {"guidance_scale": guidance, "guidance_channels": channels, "num_inference_steps": 8}
    assert_same(run(pipe, 2, generator=generators(3)[0], **options), expected)


def test_the_predicted_variance_matters_to_the_published_scheduler_alone():
    ddpm, ddim = toy_pipeline(), toy_pipeline(scheduler=DDIMScheduler(clip_sample=False))
    before = [run(pipe, generator=generators(0)[0]) for pipe in (ddpm, ddim)]
    for pipe in (ddpm, ddim):
        with torch.no_grad():  # the output's channels are the last index of proj_out's rows
            for parameter in (pipe.transformer.proj_out.weight, pipe.transformer.proj_out.bias):
                parameter.view(4, 8, -1)[:, 4:] += 1
    after = [run(pipe, generator=generators(0)[0]) for pipe in (ddpm, ddim)]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_two_hundred_and_fifty_steps_are_the_default(pipe):
    calls = spy(pipe)
    pipe(1, height=16, width=16, guidance_scale=1.0, output_type="latent")
    assert [int(call["timestep"][0]) for call in calls] == respaced(250)[::-1]


# --- Other samplers


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_with_ddim_it_is_diffusers_dit_pipeline(guidance):
    """Which knows the one size and the label 1000."""
    transformer, vae = toy_transformer(num_classes=1000), toy_vae()
    scheduler = DDIMScheduler(clip_sample=False)
    theirs = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    theirs.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance, "num_inference_steps": 4, "output_type": "pt"}
    expected = theirs([3, 999], generator=generators(1)[0], **options).images
    pipe = toy_pipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pixels = pipe([3, 999], generator=generators(1)[0], **options).images
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)
    assert pixels.std() > 0.01


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(),
        HeunDiscreteScheduler(),
        EulerAncestralDiscreteScheduler(),
        DDPMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_take_the_noise_and_leave_the_variance(scheduler):
    pipe = toy_pipeline(scheduler=scheduler)
    latents = run(pipe, [3, 1], generator=generators(0, 1))
    assert latents.shape == (2, 4, 6, 8)
    assert latents.isfinite().all()
    other = toy_pipeline(scheduler=scheduler, transformer=toy_transformer(out_channels=4))
    assert run(other).shape == (1, 4, 6, 8)


def test_a_solver_that_would_cut_the_prediction_is_refused_with_its_remedy(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    message = r"variance_type must be None with DPMSolverMultistepScheduler, got 'learned_range': make it by"
    with pytest.raises(ValueError, match=message):
        run(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)
    assert run(pipe).isfinite().all()


def test_a_learned_variance_of_a_model_that_predicts_none_is_refused():
    pipe = toy_pipeline(transformer=toy_transformer(out_channels=4))
    with pytest.raises(ValueError, match="variance_type must be a fixed one for a transformer of 4"):
        run(pipe)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**PUBLISHED), EulerAncestralDiscreteScheduler()])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_picture_of_a_batch_is_the_one_made_alone(scheduler, guidance):
    pipe = toy_pipeline(scheduler=scheduler)
    calls = spy(pipe)
    batch = run(
        pipe, [3, "hen"], num_images_per_label=2, generator=generators(1, 2, 3, 4), guidance_scale=guidance
    )
    assert batch.shape == (4, 4, 6, 8)
    assert {len(call["hidden_states"]) for call in calls} == {8 if guidance > 1 else 4}
    for i, label in enumerate([3, 3, 4, 4]):
        alone = run(pipe, label, generator=generators(1 + i)[0], guidance_scale=guidance)
        assert_same(batch[i : i + 1], alone)
    for i in range(1, 4):
        assert (batch[i] - batch[0]).abs().max() > 0.01 * batch.abs().max()


# --- Labels


def test_labels_are_numbers_or_names_one_or_many(pipe):
    expected = run(pipe, [0, 4], generator=generators(0, 1))
    for labels in (["tench", "hen"], ["Tinca tinca", 4], torch.tensor([0, 4])):
        assert torch.equal(run(pipe, labels, generator=generators(0, 1)), expected)
    for label in (4, "hen"):
        assert_same(run(pipe, label, generator=generators(1)[0]), expected[1:])
    assert pipe.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "hen": 4}


def test_guidance_is_away_from_the_label_that_stands_for_none(pipe):
    calls = spy(pipe)
    run(pipe, [3, 5])
    assert calls[0]["class_labels"].tolist() == [6, 6, 3, 5]
    assert torch.equal(*calls[0]["hidden_states"].chunk(2))
    run(pipe, [3, 5], guidance_scale=1.0)
    assert calls[-1]["class_labels"].tolist() == [3, 5]
    # No class, guided away from no class, is no class.
    guided, plain = (run(pipe, 6, generator=generators(0)[0], guidance_scale=s) for s in (3.0, 1.0))
    assert_same(guided, plain)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": "cat"}, "class_labels must be .*'cat'"),
        ({"class_labels": 7}, "class_labels must be .* 0 to 6 .* got 7"),
        ({"class_labels": [-1]}, "class_labels must be .* got -1"),
        ({"class_labels": 1.5}, "class_labels must be .* got 1.5"),
        ({"class_labels": []}, "class_labels must hold a label"),
        ({"height": 40}, "height must be a positive multiple of 16, got 40"),
        ({"width": 0}, "width must be a positive multiple of 16, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_images_per_label": 0}, "num_images_per_label must be at least 1, got 0"),
        ({"guidance_channels": 0}, "guidance_channels must be 1 to 4 or None, got 0"),
        ({"guidance_channels": 5}, "guidance_channels must be 1 to 4 or None, got 5"),
        ({"eta": 0.5}, "eta must be 0 with DDPMScheduler"),
        ({"strength": 1.1}, "strength must be between 0 and 1, got 1.1"),
        ({"image": []}, "image must hold a picture or be None"),
        ({"image": torch.zeros(2, 3, 48, 64)}, "image must be one or 1, one for each prompt, got 2"),
        ({"output_type": "jpg"}, "output_type must be .* got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among .* got \['noise'\]"),
        ({"sigmas": [1.0, 0.5]}, "sigmas must be None with DDPMScheduler"),
        ({"generator": generators(1, 2)}, "generator must be one or a list of 1, .* got 2"),
        ({"latents": torch.zeros(1, 4, 8, 6)}, r"\(1, 4, 6, 8\), got torch.float32 of shape \(1, 4, 8, 6\)"),
        ({"latents": torch.full((1, 4, 6, 8), torch.inf)}, "latents must be finite"),
    ],
)
def test_bad_input_is_refused_before_a_model_runs(pipe, kwargs, message):
    def refuse(*args: Any) -> None:
        raise AssertionError("a model ran")

    for model in (pipe.transformer, pipe.vae):
        model.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        run(pipe, **kwargs)


@pytest.mark.parametrize(
    ("missing", "kwargs", "message"),
    [
        ("transformer", {}, "transformer must be loaded"),
        ("scheduler", {}, "scheduler must be loaded"),
        ("vae", {"image": torch.zeros(3, 48, 64)}, "image must be latents without a vae"),
        ("vae", {"output_type": "pil"}, "output_type must be 'latent' without a vae, got 'pil'"),
    ],
)
def test_what_a_call_needs_must_be_there(missing, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(toy_pipeline(**{missing: None}), **kwargs)


# --- Sizes, and what comes out


def test_any_multiple_of_sixteen_is_a_size_and_the_default_is_that_of_training(pipe):
    def size(**kwargs: Any) -> tuple[int, ...]:
        options = {"num_inference_steps": 1, "output_type": "pt", "guidance_scale": 1.0}
        return tuple(pipe(1, **options, **kwargs).images.shape[2:])

    assert size() == (64, 64)
    assert size(width=32) == (64, 32)
    assert size(height=16, width=112) == (16, 112)


def test_larger_pictures_have_their_attention_scaled(pipe):
    """The transformer reads the number of tokens off the latents."""
    kwargs = {"generator": generators(0)[0], "height": 128, "width": 128}
    scaled = run(pipe, **kwargs)
    pipe.transformer.register_to_config(scale_attention=False)
    assert not torch.equal(run(pipe, **kwargs | {"generator": generators(0)[0]}), scaled)


def test_given_latents_are_the_noise(pipe):
    noise = torch.randn(1, 4, 6, 8, generator=generators(9)[0])
    kwargs = {"num_inference_steps": 1}  # the one time is 0, which adds no noise
    assert torch.equal(run(pipe, latents=noise, **kwargs), run(pipe, generator=generators(9)[0], **kwargs))


def test_output_types_are_one_picture(pipe):
    pt = run(pipe, output_type="pt", generator=generators(0)[0])
    array = run(pipe, output_type="np", generator=generators(0)[0])
    (pil,) = run(pipe, output_type="pil", generator=generators(0)[0])
    assert pt.shape == (1, 3, 48, 64)
    assert pt.dtype == torch.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.array(pil), (array[0] * 255).round().astype(np.uint8))
    latents = run(pipe, generator=generators(0)[0])
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), pt)
    kwargs = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", "return_dict": False}
    images = pipe(3, **SIZE, **kwargs, generator=generators(0)[0])
    assert isinstance(images, tuple)
    assert torch.equal(images[0], pt)


def test_bfloat16_stays_near_float32_and_starts_from_the_same_noise(pipe):
    expected = run(pipe, generator=generators(0)[0])
    pipe.to(torch.bfloat16)
    calls = spy(pipe)
    latents = run(pipe, generator=generators(0)[0])
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.std()
    noise = torch.randn(1, 4, 6, 8, generator=generators(0)[0])
    assert torch.equal(calls[0]["hidden_states"][:1], noise.bfloat16())


def test_a_transformer_that_overflows_is_named(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"denoising gave .* run the transformer in"):
        run(pipe)


def test_a_vae_that_overflows_is_named(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"the VAE's decoder gave .*: run the VAE in float32"):
        run(pipe, output_type="pil")


# --- Image to image


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 0), (0.4, 3), (0.75, 6)])
def test_image_to_image_begins_at_its_noise_and_takes_the_last_steps(pipe, strength, steps):
    pictures = torch.rand(2, 3, 48, 64)
    calls = spy(pipe)
    options = {"image": pictures, "strength": strength, "num_inference_steps": 8}
    latents = run(pipe, [3, 1], generator=generators(5, 6), **options)
    assert len(calls) == steps
    for i in range(2):
        generator = torch.Generator().manual_seed(5 + i)
        with torch.no_grad():
            posterior = pipe.vae.encode(2 * pictures[i : i + 1] - 1).latent_dist
        expected = posterior.mean + posterior.std * torch.randn(1, 4, 6, 8, generator=generator)
        expected = expected * pipe.vae.config.scaling_factor
        if steps:
            t = respaced(8)[steps - 1]
            a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
            noise = torch.randn(1, 4, 6, 8, generator=generator)
            expected = a.sqrt() * expected + (1 - a).sqrt() * noise
            assert int(calls[0]["timestep"][0]) == t
            assert_same(calls[0]["hidden_states"][2 + i : 3 + i], expected)
        else:
            assert_same(latents[i : i + 1], expected)


def test_the_size_of_an_image_is_the_size_of_the_picture(pipe):
    options = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
    assert pipe(1, image=torch.rand(3, 50, 36), **options).images.shape == (1, 3, 48, 32)


# --- Callbacks


def test_callbacks_see_every_step_and_may_change_latents_labels_and_guidance(pipe):
    seen, calls = [], spy(pipe)

    def change(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline is pipe
        assert pipe.current_timestep == t
        assert pipe.num_timesteps == 3
        seen.append((i, int(t), tensors["class_labels"].tolist()))
        if i == 0:
            tensors["class_labels"] = tensors["class_labels"] + 1
        if i == 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
            pipeline._guidance_scale = 1.0
        return tensors

    names = ["latents", "class_labels"]
    run(pipe, [2, 3], callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert seen == [(0, 999, [2, 3]), (1, 500, [3, 4]), (2, 0, [3, 4])]
    assert [call["class_labels"].tolist() for call in calls] == [[6, 6, 2, 3], [6, 6, 3, 4], [3, 4]]
    assert not calls[2]["hidden_states"].any()


def test_a_callback_that_changes_nothing_changes_nothing(pipe):
    expected = run(pipe, generator=generators(0)[0])
    for answer in (None, {}):
        looked = run(pipe, generator=generators(0)[0], callback_on_step_end=lambda *_, a=answer: a)
        assert torch.equal(looked, expected)


def test_a_callback_may_stop_the_run(pipe):
    calls = spy(pipe)

    def stop(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = i == 1
        return tensors

    run(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert len(calls) == 2
    run(pipe, num_inference_steps=5)  # the next run is not stopped
    assert len(calls) == 7


# --- Files


def test_a_saved_pipeline_loads_with_its_labels_and_makes_the_same_picture(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    with patch.object(logging.getLogger("diffusers"), "propagate", True):
        loaded = LEDiTPipeline.from_pretrained(tmp_path)
    assert not caplog.messages
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == pipe.labels
    assert loaded.scheduler.config.variance_type == "learned_range"
    pictures = [run(p, "hen", generator=generators(0)[0], output_type="pt") for p in (pipe, loaded)]
    assert torch.equal(*pictures)


def test_a_pipeline_without_names_takes_numbers(tmp_path):
    pipe = toy_pipeline(id2label=None)
    assert pipe.labels == {}
    assert run(pipe, 3).isfinite().all()
    with pytest.raises(ValueError, match=r"class_labels must be .*'hen'"):
        run(pipe, "hen")


def test_a_lora_loads_into_the_pipeline(pipe, tmp_path):
    plain = run(pipe, generator=generators(0)[0])
    adapter = toy_transformer()
    adapter.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapter.save_lora_adapter(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    state = {f"transformer.{name}": tensor for name, tensor in load_file(weights).items()}
    pipe.load_lora_weights(state)
    assert not torch.equal(run(pipe, generator=generators(0)[0]), plain)
    off = run(pipe, generator=generators(0)[0], attention_kwargs={"scale": 0.0})
    assert_same(off, plain, 1e-5)
