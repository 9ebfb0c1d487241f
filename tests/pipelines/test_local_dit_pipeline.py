"""What LocalDiTPipeline computes: against a sampler written out by hand, and against itself."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from PIL import Image
from torch import Tensor
from toy_pipeline import SIZE, generators, run, spy, toy_pipeline, toy_text_encoder, toy_transformer, toy_vae

from localdit.pipelines import LocalDiTPipeline, NonFiniteError

NEGATIVE = "grey star"
WORDS = "a red circle left of a blue square on green"


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference is below `tolerance` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def image(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def by_hand(
    pipe: LocalDiTPipeline,
    prompt: str,
    negative: str,
    guidance: float,
    seed: int,
    steps: int,
    picture: Image.Image | None = None,
    run_steps: int | None = None,
    interval: tuple[float, float] = (-1.0, 2.0),
) -> Tensor:
    """DDIM (Song et al. 2020, eq. 12) for one picture, each text in a call of its own: (1, 3, H, W)."""

    def features(text: str) -> dict[str, Tensor]:
        tokens = pipe.tokenizer(text).input_ids
        pad = [0] * (120 - len(tokens))
        mask = torch.tensor([[1] * len(tokens) + pad])
        embeds = pipe.text_encoder(torch.tensor([tokens + pad]), mask).last_hidden_state
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def predict(x: Tensor, t: int, text: str) -> Tensor:
        sizes = {"resolution": torch.tensor([[48.0, 64.0]]), "aspect_ratio": torch.tensor([64 / 48])}
        return pipe.transformer(
            x, timestep=torch.tensor([t]), added_cond_kwargs=sizes, **features(text)
        ).sample

    generator = torch.Generator().manual_seed(seed)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    stride = 1000 // steps
    times = [stride * i for i in reversed(range(steps))]
    scaling, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    if picture is None:
        x = torch.randn(1, 4, 6, 8, generator=generator)
    else:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = pipe.vae.encode(pixels).latent_dist
        x = posterior.mean + posterior.std * torch.randn(1, 4, 6, 8, generator=generator)
        x = (x - shift) * scaling
        times = times[steps - run_steps :]
        if times:
            a = alpha_bar[times[0]]
            x = a.sqrt() * x + (1 - a).sqrt() * torch.randn(1, 4, 6, 8, generator=generator)
    for t in times:
        a, before = alpha_bar[t], alpha_bar[t - stride] if t >= stride else torch.tensor(1.0)
        noise = predict(x.float(), t, prompt)
        if guidance > 1 and interval[0] < 1 - t / 1000 < interval[1]:
            unguided = predict(x.float(), t, negative)
            noise = unguided + guidance * (noise - unguided)
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return pipe.vae.decode(x.float() / scaling + shift).sample


@pytest.fixture
def ddim() -> LocalDiTPipeline:
    return toy_pipeline(scheduler=DDIMScheduler(clip_sample=False), vae=toy_vae(shift_factor=0.3))


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_text_to_image_is_the_sampler_written_out(ddim, guidance):
    expected = by_hand(ddim, "a red circle", NEGATIVE, guidance, seed=3, steps=4)
    pixels = run(
        ddim,
        "  A Red CIRCLE\n",
        negative_prompt=NEGATIVE,
        guidance_scale=guidance,
        generator=generators(3)[0],
        num_inference_steps=4,
        output_type="pt",
    )
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert pixels.std() > 0.01


@pytest.mark.parametrize(
    ("interval", "rows"),
    [((0.3, 0.9), [1, 2, 2, 1]), ((0.0, 1.0), [2, 2, 2, 1]), ((0.25, 0.5), [1] * 4), (None, [2] * 4)],
)
def test_outside_the_interval_the_prompt_alone_is_read(ddim, interval, rows):
    """The four times are 0.25, 0.5, 0.75 and 1: the ends of the interval are outside."""
    calls = spy(ddim)
    pixels = run(
        ddim,
        negative_prompt=NEGATIVE,
        guidance_scale=3.5,
        guidance_interval=interval,
        generator=generators(3)[0],
        num_inference_steps=4,
        output_type="pt",
    )
    assert [call["encoder_hidden_states"].batch_size for call in calls] == rows
    everywhere = (-1.0, 2.0)
    expected = by_hand(ddim, "a red circle", NEGATIVE, 3.5, seed=3, steps=4, interval=interval or everywhere)
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 0), (0.1, 0), (0.5, 2), (0.8, 3)])
def test_image_to_image_is_the_sampler_written_out(ddim, strength, steps):
    """Strength takes the last int(4 * strength) steps; without any the picture goes through the VAE alone."""
    calls = spy(ddim)
    picture = image()
    pixels = run(
        ddim,
        image=picture,
        strength=strength,
        generator=generators(5)[0],
        num_inference_steps=4,
        output_type="pt",
    )
    assert len(calls) == steps
    expected = by_hand(ddim, "a red circle", "", 3.0, seed=5, steps=4, picture=picture, run_steps=steps)
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_full_strength_is_text_to_image_at_the_size_of_the_image(pipe):
    started = run(pipe, image=image(50, 65), strength=1.0, generator=generators(1)[0])
    assert torch.equal(started, run(pipe, generator=generators(1)[0]))


@pytest.mark.parametrize("from_image", [False, True], ids=["t2i", "i2i"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("text", ["prompt", "embeds"])
@pytest.mark.parametrize("per_prompt", [1, 2])
@pytest.mark.parametrize("prompts", ["a red circle", ["a blue star", WORDS]], ids=["one", "two"])
def test_every_picture_of_a_batch_is_the_one_made_alone(prompts, per_prompt, text, guidance, from_image):
    """For every way to call the pipeline, with a scheduler that draws noise in every step."""
    pipe = toy_pipeline(scheduler=EulerAncestralDiscreteScheduler())
    several = [prompts] if isinstance(prompts, str) else prompts
    pictures = [image(seed=seed) for seed in range(len(several))]
    seeds = range(10, 10 + len(several) * per_prompt)
    calls = spy(pipe)
    kwargs: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": NEGATIVE}
    if from_image:
        kwargs |= {"image": pictures, "strength": 0.7}
    if text == "prompt":
        batch_kwargs = kwargs | {"prompt": prompts}
    else:
        names = [
            "prompt_embeds",
            "prompt_attention_mask",
            "negative_prompt_embeds",
            "negative_prompt_attention_mask",
        ]
        encoded = dict(zip(names, pipe.encode_prompt(prompts, guidance > 1, NEGATIVE)))
        batch_kwargs = kwargs | encoded | {"prompt": None}
        if guidance > 1:
            del batch_kwargs["negative_prompt"]
    batch = run(pipe, **batch_kwargs, num_images_per_prompt=per_prompt, generator=generators(*seeds))

    assert batch.shape == (len(seeds), 4, 6, 8)
    rows = len(seeds) * (2 if guidance > 1 else 1)
    assert {call["encoder_hidden_states"].batch_size for call in calls} == {rows}
    for i, seed in enumerate(seeds):
        own = kwargs | {"image": pictures[i // per_prompt]} if from_image else kwargs
        alone = run(pipe, several[i // per_prompt], **own, generator=generators(seed)[0])
        assert_same(batch[i : i + 1], alone)
    for i in range(1, len(batch)):
        assert (batch[i] - batch[0]).abs().max() > 0.01 * batch.abs().max()


def test_a_seed_makes_the_same_picture_again_and_no_seed_another(pipe):
    first, again, other = (
        run(pipe, generator=generator, output_type="pt") for generator in (*generators(7, 7), None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Text.


def encoded_texts(pipe: LocalDiTPipeline) -> list[list[str]]:
    """A list that grows by the texts of every call of the text encoder."""
    texts: list[list[str]] = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args: texts.append(pipe.tokenizer.batch_decode(args[0], skip_special_tokens=True))
    )
    return texts


def test_text_is_lower_cased_stripped_and_read_once(pipe):
    texts = encoded_texts(pipe)
    run(pipe, ["  A Red Circle ", "a red circle", "STAR"], num_images_per_prompt=2)
    assert texts == [["a red circle", "star", ""]]


def test_without_guidance_no_negative_prompt_is_read(pipe):
    texts = encoded_texts(pipe)
    unguided = run(pipe, "star", negative_prompt="circle", guidance_scale=1.0, generator=generators(0)[0])
    assert texts == [["star"]]
    for guidance in (0.0, -2.0):
        assert torch.equal(run(pipe, "star", guidance_scale=guidance, generator=generators(0)[0]), unguided)


def test_a_missing_negative_prompt_is_the_empty_text(pipe):
    expected = run(pipe, generator=generators(0)[0], negative_prompt="")
    embeds, mask, *_ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    given = {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    for kwargs in ({}, {"negative_prompt": None}, {"negative_prompt": [" "]}, given):
        assert torch.equal(run(pipe, generator=generators(0)[0], **kwargs), expected)
    assert not torch.equal(run(pipe, generator=generators(0)[0], negative_prompt="star"), expected)


def test_padding_is_masked(pipe):
    """What stands in the padded places changes nothing."""
    embeds, mask, *_ = pipe.encode_prompt("star", do_classifier_free_guidance=False)
    assert mask.sum() == 2  # the word and the end
    noisy = torch.where(mask[:, :, None].bool(), embeds, torch.randn_like(embeds))
    kwargs = {"prompt": None, "prompt_attention_mask": mask, "guidance_scale": 1.0}
    pictures = [run(pipe, prompt_embeds=x, generator=generators(0)[0], **kwargs) for x in (embeds, noisy)]
    assert_same(pictures[0], pictures[1], 1e-6)


def test_lost_words_are_reported_once_and_by_name(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        run(
            pipe,
            ["A red circle on a BLUE elephant in green", "star"],
            num_images_per_prompt=2,
            max_sequence_length=9,
        )
        (record,) = caplog.records
        # Of "elephant" the first two letters fit: it is lost as a word.
        assert (
            record.getMessage()
            == "T5EncoderModel is given 9 tokens, and the text is cut before: elephant in green"
        )
        assert record.name == "localdit.pipelines.local_dit"

        caplog.clear()
        run(pipe, "star " * 119)
        assert not caplog.records
        run(pipe, "circle " + "star " * 10_000, negative_prompt="blue " * 120)
        lost = [record.getMessage().partition("before: ")[2].split() for record in caplog.records]
        assert lost == [["star"] * 9882, ["blue"]]


def test_cut_text_is_read_up_to_the_limit(pipe):
    embeds, mask, *_ = pipe.encode_prompt("star " * 200, do_classifier_free_guidance=False)
    whole, whole_mask, *_ = pipe.encode_prompt("star " * 119, do_classifier_free_guidance=False)
    assert torch.equal(embeds, whole)
    assert torch.equal(mask, whole_mask)
    assert mask.all()


def test_the_text_goes_through_the_transformer_once(pipe, monkeypatch):
    seen = []
    encode = pipe.transformer.encode_text
    monkeypatch.setattr(
        pipe.transformer, "encode_text", lambda *args, **kwargs: seen.append(1) or encode(*args, **kwargs)
    )
    calls = spy(pipe)
    run(pipe, num_inference_steps=4)
    assert len(calls) == 4
    assert len(seen) == 1
    assert all(call["encoder_hidden_states"] is calls[0]["encoder_hidden_states"] for call in calls)


# Sizes.


def spy_on_timesteps(pipe: LocalDiTPipeline, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note what the transformer is told of times and sizes ahead of a run."""
    told: list[Any] = []
    encode = pipe.transformer.encode_timesteps

    def note(times: torch.Tensor, sizes: Any, **kwargs: Any) -> Any:
        told.append((times, sizes))
        return encode(times, sizes, **kwargs)

    monkeypatch.setattr(pipe.transformer, "encode_timesteps", note)
    return told


def test_sizes_are_told_as_published(pipe, monkeypatch):
    """Resolution is (height, width) in pixels, the aspect ratio width by height."""
    told = spy_on_timesteps(pipe, monkeypatch)
    run(pipe, height=32, width=96)
    [(times, sizes)] = told
    assert sizes["resolution"].tolist() == [[32, 96]]
    assert sizes["aspect_ratio"].tolist() == [3]
    assert times.dtype == torch.float32
    assert times.tolist() == pipe.scheduler.timesteps.tolist()


def test_a_model_without_size_conditions_is_told_none(monkeypatch):
    pipe = toy_pipeline(transformer=toy_transformer(use_additional_conditions=False))
    told = spy_on_timesteps(pipe, monkeypatch)
    run(pipe)
    assert told[0][1] is None


def test_times_are_read_once_and_halves_of_guidance_share_their_latents(pipe, monkeypatch):
    told, calls = spy_on_timesteps(pipe, monkeypatch), spy(pipe)
    run(pipe, num_inference_steps=3, guidance_scale=5)
    assert len(told) == 1
    assert [len(call["hidden_states"]) for call in calls] == [1] * 3
    assert [call["encoder_hidden_states"].batch_size for call in calls] == [2] * 3


def test_sizes_default_to_the_transformers_and_to_the_images(pipe):
    def size(**kwargs: Any) -> tuple[int, ...]:
        return tuple(pipe("star", num_inference_steps=1, output_type="pt", **kwargs).images.shape[2:])

    assert size() == (64, 64)
    assert size(width=32) == (64, 32)
    assert size(image=image(63, 100)) == (48, 96)
    assert size(image=image(63, 100), height=32) == (32, 96)
    assert size(image=[image(63, 100)], height=16, width=16) == (16, 16)
    assert size(image=torch.randn(4, 6, 8)) == (48, 64)
    assert size(image=image(20, 20), strength=0.0) == (16, 16)


def test_a_learned_variance_is_left_aside():
    pipe = toy_pipeline(transformer=toy_transformer(out_channels=8))
    calls = spy(pipe)
    both = run(pipe, generator=generators(0)[0])
    with torch.no_grad():  # the output's channels are the last index of proj_out's rows
        for parameter in (pipe.transformer.proj_out.weight, pipe.transformer.proj_out.bias):
            parameter.view(4, 8, -1)[:, 4:] += 1
    assert torch.equal(run(pipe, generator=generators(0)[0]), both)
    assert len(calls) == 6


# Image to image.


def test_an_image_is_encoded_once_and_sampled_for_every_picture(pipe, monkeypatch):
    seen = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: seen.append(len(x)) or encode(x))
    latents = run(
        pipe,
        ["star", "circle"],
        image=image(),
        strength=0.0,
        num_images_per_prompt=2,
        generator=generators(0, 1, 0, 2),
    )
    assert seen == [1]
    assert torch.equal(latents[0], latents[2])  # equal generators, equal samples
    for other in (1, 3):
        assert (latents[0] - latents[other]).abs().max() > 0.1


def test_every_kind_of_image_starts_alike(pipe):
    picture = image()
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    kinds = [picture, array, array.astype(np.float32) / 255, tensor, tensor[None], [picture], [tensor]]
    first, *others = (run(pipe, image=kind, strength=0.4, generator=generators(4)[0]) for kind in kinds)
    for other in others:
        assert_same(other, first, 1e-5)


def test_latents_go_round(pipe):
    """What output_type="latent" gives is taken back as an image, without the VAE."""
    start = run(pipe, generator=generators(0)[0])
    assert torch.equal(run(pipe, image=start, strength=0.0), start)
    pipe.vae = None
    assert torch.equal(run(pipe, image=[start[0]], strength=0.0), start)
    pixels = toy_pipeline()(  # and decoded they are the picture
        "star", image=start, strength=0.0, output_type="pt"
    ).images
    assert torch.equal(pixels, run(toy_pipeline(), generator=generators(0)[0], output_type="pt"))


def test_given_latents_are_the_noise(pipe):
    noise = torch.randn(1, 4, 6, 8, generator=generators(9)[0])
    drawn = run(pipe, generator=generators(9)[0])
    assert torch.equal(run(pipe, latents=noise), drawn)
    latents = torch.randn(1, 4, 6, 8)
    calls = spy(pipe)
    run(pipe, image=latents, latents=noise, strength=0.5, num_inference_steps=4)
    a = pipe.scheduler.alphas_cumprod[calls[0]["timestep"].timestep[0].long()]
    expected = a.sqrt() * latents + (1 - a).sqrt() * noise
    torch.testing.assert_close(calls[0]["hidden_states"][:1], expected, rtol=1e-4, atol=1e-4)


# What comes out.


def test_output_types_are_one_picture(pipe):
    pt = run(pipe, output_type="pt", generator=generators(0)[0])
    array = run(pipe, output_type="np", generator=generators(0)[0])
    (pil,) = run(pipe, output_type="pil", generator=generators(0)[0])
    assert pt.shape == (1, 3, 48, 64)
    assert pt.dtype == torch.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.array(pil), (array[0] * 255).round().astype(np.uint8))
    latents = run(pipe, generator=generators(0)[0])
    assert torch.equal((pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1), pt)
    images = pipe("a red circle", **SIZE, num_inference_steps=3, guidance_scale=3.0, output_type="pt",
                  generator=generators(0)[0], return_dict=False)  # fmt: skip
    assert isinstance(images, tuple)
    assert torch.equal(images[0], pt)


def test_bfloat16_stays_near_float32(pipe):
    expected = run(pipe, generator=generators(0)[0], output_type="pt")
    pipe.to(torch.bfloat16)
    pixels = run(pipe, generator=generators(0)[0], output_type="pt")
    assert pixels.dtype == torch.float32
    assert (pixels - expected).abs().mean() < 0.1 * expected.std()


def test_the_noise_of_a_seed_is_one_at_every_precision(pipe):
    pipe.to(torch.bfloat16)
    noise = pipe.prepare_latents(1, 48, 64, torch.arange(0), pipe.device, generators(0)[0])
    assert torch.equal(noise, torch.randn(1, 4, 6, 8, generator=generators(0)[0]))


# Parts that are not there.


def test_what_a_call_does_not_need_may_be_missing():
    whole = toy_pipeline()
    expected = run(whole, generator=generators(0)[0])
    names = [
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ]
    encoder = toy_pipeline(vae=None, transformer=None, scheduler=None)
    encoded = dict(zip(names, encoder.encode_prompt("a red circle")))
    denoiser = toy_pipeline(tokenizer=None, text_encoder=None, vae=None)
    assert torch.equal(run(denoiser, None, **encoded, generator=generators(0)[0]), expected)


@pytest.mark.parametrize(
    ("missing", "kwargs", "message"),
    [
        ("transformer", {}, "transformer must be loaded"),
        ("scheduler", {}, "scheduler must be loaded"),
        ("text_encoder", {}, "without tokenizer and text_encoder, prompt_embeds must be given"),
        ("tokenizer", {}, "without tokenizer and text_encoder, prompt_embeds must be given"),
        ("vae", {"output_type": "pil"}, "output_type must be 'latent' without a vae, got 'pil'"),
        ("vae", {"image": image()}, "image must be latents without a vae"),
    ],
)
def test_what_a_call_needs_must_be_there(missing, kwargs, message):
    pipe = toy_pipeline(**{missing: None})
    with pytest.raises(ValueError, match=message):
        run(pipe, **kwargs)


# Bad input.

EMBEDS = torch.randn(2, 120, 16)
MASK = torch.ones(2, 120)
GIVEN = {
    "prompt": None,
    "prompt_embeds": EMBEDS,
    "prompt_attention_mask": MASK,
    "negative_prompt_embeds": EMBEDS,
    "negative_prompt_attention_mask": MASK,
}
HOLE = torch.where(torch.arange(2)[:, None] == 1, 0, MASK)
BROKEN = EMBEDS.masked_fill(EMBEDS > 2, torch.nan)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 40}, "height must be a positive multiple of 16, got 40"),
        ({"width": 0}, "width must be a positive multiple of 16, got 0"),
        ({"height": -16}, "height must be a positive multiple of 16, got -16"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        ({"strength": 1.1}, "strength must be between 0 and 1, got 1.1"),
        ({"strength": float("nan")}, "strength must be between 0 and 1, got nan"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be .* got \(0.5, 0.2\)"),
        ({"guidance_interval": 0.5}, "guidance_interval must be two numbers that rise .* got 0.5"),
        ({"guidance_interval": (0.5,)}, r"guidance_interval must be two numbers .* got \(0.5,\)"),
        ({"eta": -0.1}, "eta must be between 0 and 1"),
        ({"eta": 0.5}, "eta must be 0 with DPMSolverMultistepScheduler"),
        ({"output_type": "jpg"}, "output_type must be .* got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among .* got \['noise'\]"),
        ({"timesteps": []}, "timesteps must hold a value or be None"),
        ({"sigmas": [1.0, 0.5]}, "sigmas must be None with DPMSolverMultistepScheduler"),
        ({"timesteps": [9, 5], "sigmas": [1.0]}, "must not both be given"),
        ({"generator": generators(1, 2)}, "generator must be one or a list of 1, .* got 2"),
        ({"latents": torch.zeros(1, 4, 8, 6)}, r"\(1, 4, 6, 8\), got torch.float32 of shape \(1, 4, 8, 6\)"),
        ({"latents": torch.full((1, 4, 6, 8), torch.inf)}, "latents must be finite"),
        # Text.
        ({"prompt": None}, "prompt must be a text or a list of texts, or prompt_embeds be given, got None"),
        ({"prompt": []}, "prompt must be a text or a list"),
        ({"prompt": ["star", 3]}, r"got \['star', 3\]"),
        ({"prompt": 3}, "got 3"),
        ({"negative_prompt": ["star", "star"]}, "negative_prompt must be one text or 1, .* got 2"),
        ({"prompt_attention_mask": MASK}, "prompt_attention_mask must come with"),
        ({"negative_prompt_attention_mask": MASK}, "attention_mask must come with negative_prompt_embeds"),
        # Embeddings.
        (GIVEN | {"prompt": "star"}, "prompt must be None with prompt_embeds, got 'star'"),
        (GIVEN | {"negative_prompt": "star"}, "negative_prompt must be None with negative_prompt_embeds"),
        (GIVEN | {"prompt_embeds": EMBEDS[0]}, r"must be \(texts, tokens, 16\), got \(120, 16\)"),
        (GIVEN | {"prompt_embeds": EMBEDS[..., :8]}, r"prompt_embeds must be .* got \(2, 120, 8\)"),
        (GIVEN | {"prompt_embeds": EMBEDS[:, :0]}, r"prompt_embeds must be .* got \(2, 0, 16\)"),
        (GIVEN | {"prompt_embeds": EMBEDS.long()}, "prompt_embeds must be finite floating .* torch.int64"),
        (GIVEN | {"prompt_embeds": BROKEN}, "prompt_embeds must be finite"),
        (GIVEN | {"negative_prompt_embeds": BROKEN}, "negative_prompt_embeds must be finite"),
        (GIVEN | {"prompt_attention_mask": None}, r"prompt_attention_mask must be \(2, 120\) .* got None"),
        (GIVEN | {"prompt_attention_mask": MASK[:, :9]}, r"got \(2, 9\)"),
        (GIVEN | {"prompt_attention_mask": MASK[:1]}, r"got \(1, 120\)"),
        (GIVEN | {"prompt_attention_mask": MASK[:, None]}, r"got \(2, 1, 120\)"),
        (GIVEN | {"prompt_attention_mask": 0 * MASK}, "prompt_attention_mask must be 1 for text"),
        (GIVEN | {"prompt_attention_mask": HOLE}, "with a 1 in every row"),
        (GIVEN | {"prompt_attention_mask": -10000 * MASK}, "1 for text and 0 for padding"),
        (GIVEN | {"negative_prompt_attention_mask": None}, "negative_prompt_attention_mask must be"),
        (GIVEN | {"negative_prompt_embeds": EMBEDS[1:], "negative_prompt_attention_mask": MASK[1:]},
         "negative_prompt must be one text or 2, .* got 1"),
        (GIVEN | {"negative_prompt_embeds": EMBEDS[:, :9], "negative_prompt_attention_mask": MASK[:, :9]},
         "must have one length, got 120 and 9"),
        ({"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK, "max_sequence_length": 60},
         "must have one length, got 120 and 60"),
        # Pictures.
        ({"image": []}, "image must hold a picture or be None"),
        ({"image": [image(), image()]}, "image must be one or 1, one for each prompt, got 2"),
        ({"image": [image(), torch.zeros(4, 6, 8)], "prompt": ["a", "a"], **SIZE}, "got both"),
        ({"image": [image(), image(48, 48)], "prompt": ["a", "a"]}, "images of different sizes"),
        ({"image": torch.zeros(4, 6, 8), "height": 64, "width": 64}, r"must be \(8, 8\), got \[\(6, 8\)\]"),
        ({"image": torch.zeros(4, 7, 8)}, r"they must be \(6, 8\), got \[\(7, 8\)\]"),
        ({"image": image(8, 64)}, "under 16 a side, got 8 x 64"),
        ({"image": "cat.png"}, "got str"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_model_runs(pipe, kwargs, message):
    def refuse(*args: Any) -> None:
        raise AssertionError("a model ran")

    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        model.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        run(pipe, **kwargs)


# Broken numbers.


def test_a_text_encoder_that_overflows_is_named(pipe):
    with torch.no_grad():
        pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e6)
    run(pipe)
    pipe.text_encoder.half()
    with pytest.raises(NonFiniteError, match=r"the text encoder gave .*: run it in bfloat16 or float32"):
        run(pipe)


def test_a_transformer_that_overflows_is_named(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.inf
    for output_type in ("pil", "latent"):
        with pytest.raises(NonFiniteError, match=r"denoising gave .* run the transformer in"):
            run(pipe, output_type=output_type)


def overflowing_vae(force_upcast: bool) -> Any:
    """A VAE in float16 whose feature maps need float32; the norms after them bring its output back."""
    vae = toy_vae(force_upcast=force_upcast)
    with torch.no_grad():
        for layer in (vae.encoder.conv_in, vae.decoder.conv_in):
            layer.weight.mul_(1e5)
            layer.weight.clamp_(-6e4, 6e4)  # the weights themselves fit
    return vae.half()


@pytest.mark.parametrize(("part", "kwargs"), [("encoder", {"image": image()}), ("decoder", {})])
def test_a_vae_that_overflows_is_named(part, kwargs):
    pipe = toy_pipeline(vae=overflowing_vae(force_upcast=False))
    with pytest.raises(NonFiniteError, match=f"the VAE's {part} gave .*: run the VAE in float32"):
        run(pipe, output_type="pil", **kwargs)


def test_a_vae_that_asks_for_it_runs_in_float32_and_is_left_as_it_was():
    pipe = toy_pipeline(vae=overflowing_vae(force_upcast=True))
    before = {name: x.clone() for name, x in pipe.vae.state_dict().items()}
    pixels = run(pipe, image=image(), strength=0.5, output_type="pt")
    assert pixels.isfinite().all()
    assert pixels.std() > 0.01
    for name, x in pipe.vae.state_dict().items():
        assert x.dtype == torch.float16
        assert torch.equal(x, before[name])


def test_float16_text_encoders_are_loaded_with_their_wide_layers(tmp_path):
    """from_pretrained keeps T5's wo in float32, and the pipeline casts no text encoder."""
    encoder = toy_text_encoder()
    with torch.no_grad():
        encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e6)
    toy_pipeline(text_encoder=encoder).save_pretrained(tmp_path)
    pipe = LocalDiTPipeline.from_pretrained(
        tmp_path, dtype={"text_encoder": torch.float16, "default": torch.float32}
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, *_ = pipe.encode_prompt("star")
    assert embeds.dtype == torch.float16
    assert pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert run(pipe).isfinite().all()


# Noise within the steps.


@pytest.mark.parametrize(("scheduler", "eta"), [(DDIMScheduler(), 0.8), (DDPMScheduler(), 0.0)])
def test_noise_within_the_steps_comes_from_the_generators(scheduler, eta):
    pipe = toy_pipeline(scheduler=scheduler)
    batch = run(pipe, ["star", "circle"], eta=eta, generator=generators(1, 2))
    noise = torch.cat([torch.randn(1, 4, 6, 8, generator=generator) for generator in generators(1, 2)])
    # Other generators from the same start: the steps' own noise makes the difference.
    other = run(pipe, ["star", "circle"], eta=eta, latents=noise, generator=generators(3, 4))
    assert (batch - other).abs().max() > 0.01 * batch.abs().max()
    again = run(pipe, ["star", "circle"], eta=eta, generator=generators(1, 2))
    assert torch.equal(batch, again)


def test_a_folder_may_have_a_guidance_of_its_own(pipe, tmp_path):
    """It is what a call takes that names none, and 7 where the folder says nothing."""
    assert pipe.config.default_guidance_scale == 7
    plain = run(pipe, generator=generators(0)[0], guidance_scale=None)
    assert pipe.guidance_scale == 7
    own = LocalDiTPipeline(**pipe.components, default_guidance_scale=2.5)
    own.save_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    made = run(loaded, generator=generators(0)[0], guidance_scale=None)
    assert loaded.guidance_scale == 2.5
    assert not torch.equal(made, plain)
    given = run(pipe, generator=generators(0)[0], guidance_scale=2.5)
    assert torch.equal(made, given)
