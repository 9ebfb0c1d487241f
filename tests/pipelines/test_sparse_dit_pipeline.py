"""What SparseDiTPipeline computes: recorded numbers, a sampler written out by hand, and itself."""

import json
import logging
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FirstBlockCacheConfig,
)
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from toy_pipeline import generators, spy, toy_text_encoder, toy_tokenizer
from toy_sparse import pseudo_random, recorded_model, toy_sparse
from toy_sparse_pipeline import (
    LENGTH,
    run_sparse,
    toy_sparse_pipeline,
)

from localdit.pipelines import NonFiniteError, SparseDiTPipeline
from localdit.schedulers.edm_heun import EDMHeunScheduler

SCHEDULERS = (EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
every_scheduler = pytest.mark.parametrize("cls", SCHEDULERS)
NEGATIVE = "grey circle"


@pytest.fixture
def sparse_pipe() -> SparseDiTPipeline:
    return toy_sparse_pipeline()


def seeded(pipe: SparseDiTPipeline, *args: Any, **kwargs: Any) -> Tensor:
    return run_sparse(pipe, *args, generator=generators(0)[0], **kwargs)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference is below `tolerance` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def image(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Numbers.


@pytest.mark.parametrize(
    ("cls", "guidance", "total", "length", "calls"),
    [
        (EDMHeunScheduler, 1.0, 15.0062, 41.6608, 11),
        (EDMHeunScheduler, 5.0, 131.963, 122.173, 11),
        (EDMEulerScheduler, 1.0, 17.4116, 19.3622, 6),
        (EDMEulerScheduler, 5.0, 115.255, 72.3661, 6),
    ],
)
def test_the_recorded_samples_come_out(cls, guidance, total, length, calls):
    """From embeddings and given noise; without guidance to name, the negative half is zeros."""
    pipe = toy_sparse_pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=recorded_model(),
        scheduler=cls(sigma_data=0.9),
    )
    seen = spy(pipe)
    noise = 12**0.5 * pseudo_random(1004, (2, 4, 8, 8)).float()
    latents = pipe(
        prompt_embeds=2 * pseudo_random(1002, (2, 1, 5, 24))[:, 0].float(),
        latents=noise * 80 / pipe.scheduler.init_noise_sigma,  # diffusers' starts at sqrt(80² + 1)
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    assert len(seen) == calls
    assert {len(call["hidden_states"]) for call in seen} == {4 if guidance > 1 else 2}
    assert latents.sum().item() == pytest.approx(total, rel=1e-3)
    assert latents.norm().item() == pytest.approx(length, rel=1e-3)
    assert latents.dtype == torch.float32


@torch.no_grad()
def by_hand(
    pipe: SparseDiTPipeline, prompt: str, negative: str | None, guidance: float, seed: int, steps: int
) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 2) for one picture, each text in a call of its own."""

    def features(text: str | None) -> Tensor:
        if text is None:
            return torch.zeros(1, LENGTH, 24)
        letters = [f"{letter}</w>" if i + 1 == len(word) else letter
                   for word in text.split() for i, letter in enumerate(word)]  # fmt: skip
        vocab = pipe.tokenizer.get_vocab()
        tokens = [53, *(vocab[letter] for letter in letters), 54]
        return pipe.text_encoder(torch.tensor([tokens + [0] * (LENGTH - len(tokens))])).last_hidden_state

    def slope(x: Tensor, sigma: float) -> Tensor:
        total, t = sigma**2 + 0.81, torch.tensor(sigma).log() / 4
        half = pipe.transformer(x.float() / total**0.5, features(prompt), t).sample
        if guidance > 1:
            null = pipe.transformer(x.float() / total**0.5, features(negative), t).sample
            half = null + guidance * (half - null)
        return (x - (0.81 / total * x + 0.9 * sigma / total**0.5 * half)) / sigma

    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    levels = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = 80 * torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(seed)).double()
    for sigma, after in pairwise(levels):
        first = slope(x, sigma)
        there = x + (after - sigma) * first
        x = there if after == 0 else x + (after - sigma) * (first + slope(there, after)) / 2
    pixels = pipe.vae.decode(x.float() / pipe.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("state_dtype", ["float32", "float64"])
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (3.5, None), (3.5, NEGATIVE)])
def test_text_to_image_is_the_sampler_written_out(guidance, negative, state_dtype):
    pipe = toy_sparse_pipeline(scheduler=EDMHeunScheduler(sigma_data=0.9, state_dtype=state_dtype))
    expected = by_hand(pipe, "a red star", negative, guidance, seed=3, steps=4)
    pixels = run_sparse(
        pipe, "  A Red STAR\n", negative_prompt=negative, guidance_scale=guidance,
        generator=generators(3)[0], num_inference_steps=4, output_type="pt",
    )  # fmt: skip
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-3)
    assert pixels.std() > 0.01


@every_scheduler
@pytest.mark.parametrize("from_image", [False, True], ids=["t2i", "i2i"])
def test_an_oracle_is_followed_to_its_picture(cls, from_image):
    """It knows the picture, and predicts what leads there from wherever it is asked."""
    pipe = toy_sparse_pipeline(scheduler=cls(sigma_data=0.9))
    picture, calls = 0.5 * torch.randn(4, 6, 8), []

    def forward(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        calls.append(timestep)
        sigma = (4 * timestep.double()).exp()[:, None, None, None]
        total = sigma**2 + 0.81
        noisy = hidden_states.double() * total.sqrt()
        return (((picture - 0.81 / total * noisy) * total.sqrt() / (0.9 * sigma)).float(),)

    pipe.transformer.forward = forward
    start = {"image": torch.randn(4, 6, 8), "strength": 0.6} if from_image else {}
    latents = run_sparse(pipe, **start, num_inference_steps=10)
    steps = 6 if from_image else 10
    assert len(calls) == (2 * steps - 1 if cls is EDMHeunScheduler else steps)
    torch.testing.assert_close(latents, picture[None], rtol=0, atol=2e-3)


@every_scheduler
def test_an_image_starts_with_the_noise_of_its_step(cls):
    pipe = toy_sparse_pipeline(scheduler=cls(sigma_data=0.9))
    calls = spy(pipe)
    start, noise = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    run_sparse(pipe, image=start, strength=0.5, latents=noise, num_inference_steps=6, guidance_scale=1.0)
    sigma = (4 * calls[0]["timestep"].double()).exp().item()
    assert 0.1 < sigma < 10
    expected = (start + sigma * noise) / (sigma**2 + 0.81) ** 0.5
    torch.testing.assert_close(calls[0]["hidden_states"], expected, rtol=0, atol=1e-4)


@every_scheduler
@pytest.mark.parametrize("per_prompt", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_picture_of_a_batch_is_the_one_made_alone(cls, guidance, per_prompt):
    pipe = toy_sparse_pipeline(scheduler=cls(sigma_data=0.9))
    prompts = ["a blue star", "a red circle"]
    seeds = range(10, 10 + 2 * per_prompt)
    batch = run_sparse(
        pipe, prompts, num_images_per_prompt=per_prompt, generator=generators(*seeds), guidance_scale=guidance
    )
    assert batch.shape == (len(seeds), 4, 6, 8)
    for i, seed in enumerate(seeds):
        alone = run_sparse(
            pipe, prompts[i // per_prompt], generator=generators(seed)[0], guidance_scale=guidance
        )
        assert_same(batch[i : i + 1], alone)
    for i in range(1, len(batch)):
        assert (batch[i] - batch[0]).abs().max() > 0.01 * batch.abs().max()


def test_churn_takes_its_noise_from_the_generators():
    pipe = toy_sparse_pipeline(scheduler=EDMHeunScheduler(sigma_data=0.9, s_churn=4.0))
    batch = run_sparse(pipe, ["star", "circle"], generator=generators(1, 2), num_inference_steps=4)
    for i, prompt in enumerate(("star", "circle")):
        alone = run_sparse(pipe, prompt, generator=generators(1, 2)[i], num_inference_steps=4)
        assert_same(batch[i : i + 1], alone)
    noise = torch.cat([torch.randn(1, 4, 6, 8, generator=g) for g in generators(1, 2)])
    other = run_sparse(
        pipe, ["star", "circle"], generator=generators(3, 4), latents=noise, num_inference_steps=4
    )
    assert (batch - other).abs().max() > 0.01 * batch.abs().max()


# Text.


def test_no_negative_prompt_is_no_text_at_all(sparse_pipe):
    expected = seeded(sparse_pipe)
    zeros = torch.zeros(1, LENGTH, 24)
    assert torch.equal(seeded(sparse_pipe, negative_prompt_embeds=zeros), expected)
    assert not torch.equal(seeded(sparse_pipe, negative_prompt=""), expected)
    for guidance in (1.0, 0.5, 0.0, -2.0):
        calls = spy(sparse_pipe)
        seeded(sparse_pipe, negative_prompt="star", guidance_scale=guidance)
        assert {len(call["hidden_states"]) for call in calls} == {1}


def test_text_is_padded_with_zero_whatever_the_tokenizer_says(sparse_pipe):
    """CLIP's tokenizers pad with their end token; the states of the padding are read as they are."""
    assert sparse_pipe.tokenizer.pad_token_id == 54
    seen = []
    sparse_pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, kwargs)), with_kwargs=True
    )
    embeds, _ = sparse_pipe.encode_prompt("a Star", False, max_sequence_length=9)
    ids, kwargs = seen[0]
    assert not kwargs  # no mask
    star = [sparse_pipe.tokenizer.get_vocab()[token] for token in ("a</w>", "s", "t", "a", "r</w>")]
    assert ids.tolist() == [[53, *star, 54, 0, 0]]
    with torch.no_grad():
        expected = sparse_pipe.text_encoder(ids).last_hidden_state
    assert torch.equal(embeds, expected)


def test_another_encoder_is_told_what_is_padding():
    transformer = toy_sparse(caption_channels=16)
    pipe = toy_sparse_pipeline(
        tokenizer=toy_tokenizer(), text_encoder=toy_text_encoder(), transformer=transformer
    )
    embeds, _ = pipe.encode_prompt("a red star", False, max_sequence_length=LENGTH)
    tokens = pipe.tokenizer("a red star", padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        expected = pipe.text_encoder(**tokens).last_hidden_state
    torch.testing.assert_close(embeds, expected)
    assert run_sparse(pipe).isfinite().all()


def test_cut_text_keeps_its_end_token_and_is_reported(sparse_pipe, caplog):
    seen = []
    sparse_pipe.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with caplog.at_level(logging.WARNING):
        sparse_pipe.encode_prompt("red star circle", False, max_sequence_length=9)
    assert seen[0].shape == (1, 9)
    assert seen[0][0, -1] == 54
    (record,) = caplog.records
    assert record.getMessage() == "CLIPTextModel is given 9 tokens, and the text is cut before: circle"


def test_text_is_read_once_and_goes_through_the_transformer_once(sparse_pipe, monkeypatch):
    rows, seen = [], []
    sparse_pipe.text_encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    encode = sparse_pipe.transformer.encode_text
    monkeypatch.setattr(
        sparse_pipe.transformer, "encode_text", lambda *args, **kw: seen.append(1) or encode(*args, **kw)
    )
    run_sparse(sparse_pipe, ["star", " STAR ", "circle"], negative_prompt="circle", num_images_per_prompt=2)
    assert rows == [2]
    assert len(seen) == 1


# Parts.


def test_what_a_call_does_not_need_may_be_missing():
    expected = seeded(toy_sparse_pipeline())
    encoder = toy_sparse_pipeline(vae=None, transformer=None, scheduler=None)
    embeds, negative = encoder.encode_prompt("a red star", max_sequence_length=LENGTH)
    denoiser = toy_sparse_pipeline(tokenizer=None, text_encoder=None, vae=None)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(seeded(denoiser, None, **given), expected)
    assert torch.equal(seeded(denoiser, None, prompt_embeds=embeds), expected)


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
    with pytest.raises(ValueError, match=message):
        run_sparse(toy_sparse_pipeline(**{missing: None}), **kwargs)


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"scheduler must be EDMHeunScheduler, .* got DDIMScheduler"):
        run_sparse(toy_sparse_pipeline(scheduler=DDIMScheduler()))


def test_a_saved_pipeline_is_loaded_by_every_way_of_diffusers(sparse_pipe, tmp_path):
    sparse_pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "SparseDiTPipeline"
    assert index["transformer"] == ["localdit.models.sparse_dit", "SparseDiTTransformer2DModel"]
    assert index["scheduler"] == ["localdit.schedulers.edm_heun", "EDMHeunScheduler"]
    expected = seeded(sparse_pipe, output_type="pt")
    for cls in (SparseDiTPipeline, DiffusionPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is SparseDiTPipeline
        assert type(loaded.scheduler) is EDMHeunScheduler
        assert loaded.scheduler.config.sigma_data == 0.9
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(seeded(loaded, output_type="pt"), expected)


# Sizes and pictures.


def test_sizes_default_to_the_transformers_and_to_the_images(sparse_pipe):
    def size(**kwargs: Any) -> tuple[int, ...]:
        return tuple(sparse_pipe("star", num_inference_steps=1, output_type="pt", **kwargs).images.shape[2:])

    assert size() == (64, 64)
    assert size(width=32) == (64, 32)
    assert size(image=image(63, 100)) == (48, 96)
    assert size(image=torch.randn(4, 6, 8)) == (48, 64)


@pytest.mark.parametrize(("strength", "calls"), [(0.0, 0), (0.3, 1), (0.6, 3), (1.0, 7)])
def test_strength_takes_the_last_steps(sparse_pipe, strength, calls):
    seen = spy(sparse_pipe)
    pixels = run_sparse(
        sparse_pipe, image=image(), strength=strength, num_inference_steps=4, output_type="pt"
    )
    assert len(seen) == calls
    assert pixels.shape == (1, 3, 48, 64)
    if not strength:
        latents = run_sparse(sparse_pipe, image=image(), strength=0.0, generator=generators(2)[0])
        assert latents.shape == (1, 4, 6, 8)


def test_latents_go_round(sparse_pipe):
    start = seeded(sparse_pipe)
    assert torch.equal(run_sparse(sparse_pipe, image=start, strength=0.0), start)
    noise = torch.randn(1, 4, 6, 8, generator=generators(0)[0])
    assert torch.equal(run_sparse(sparse_pipe, latents=noise), start)


def test_output_types_are_one_picture(sparse_pipe):
    pt = seeded(sparse_pipe, output_type="pt")
    array = seeded(sparse_pipe, output_type="np")
    (pil,) = seeded(sparse_pipe, output_type="pil")
    assert pt.shape == (1, 3, 48, 64)
    assert pt.dtype == torch.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.array(pil), (array[0] * 255).round().astype(np.uint8))
    (tuple_of,) = sparse_pipe(
        "a red star", height=48, width=64, num_inference_steps=3, guidance_scale=3.0, output_type="pt",
        max_sequence_length=LENGTH, generator=generators(0)[0], return_dict=False,
    )  # fmt: skip
    assert torch.equal(tuple_of, pt)


def test_bfloat16_runs_and_keeps_its_state_in_float32(sparse_pipe):
    sparse_pipe.to(torch.bfloat16)
    dtypes = []
    latents = seeded(
        sparse_pipe, callback_on_step_end=lambda p, i, t, tensors: dtypes.append(tensors["latents"].dtype)
    )
    assert set(dtypes) == {torch.float32}
    assert latents.isfinite().all()


# Callbacks.


def test_callbacks_see_every_call_and_change_nothing_unasked(sparse_pipe):
    seen, names = [], ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def look(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe.current_timestep == t
        assert pipe.num_timesteps == 5
        assert pipe.do_classifier_free_guidance
        seen.append((i, t.item(), {name: tuple(x.shape) for name, x in tensors.items()}))
        return tensors

    expected = seeded(sparse_pipe)
    found = seeded(sparse_pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(found, expected)
    shapes = dict(zip(names, [(1, 4, 6, 8), (1, LENGTH, 24), (1, LENGTH, 24)]))
    assert seen == [(i, t.item(), shapes) for i, t in enumerate(sparse_pipe.scheduler.timesteps)]
    assert sparse_pipe.current_timestep is None


def test_a_callback_may_stop_the_run(sparse_pipe):
    kept = []

    def stop(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = i == 2
        kept.append(tensors["latents"])
        return tensors

    calls = spy(sparse_pipe)
    assert torch.equal(seeded(sparse_pipe, callback_on_step_end=stop), kept[2])
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_changed_text_is_read_anew(sparse_pipe, name):
    def change(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.ones_like(tensors[name])} if i == 1 else {}

    calls = spy(sparse_pipe)
    changed = seeded(sparse_pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    texts = [call["encoder_hidden_states"].text for call in calls]
    mine, other = (1, 0) if name == "prompt_embeds" else (0, 1)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1][mine], texts[2][mine])
    assert torch.equal(texts[1][other], texts[2][other])
    assert not torch.equal(changed, seeded(sparse_pipe))


def test_guidance_may_end_early(sparse_pipe):
    calls = spy(sparse_pipe)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    run_sparse(sparse_pipe, ["star", "circle"], callback_on_step_end=cutoff)
    assert [len(call["hidden_states"]) for call in calls] == [4, 4, 2, 2, 2]
    assert torch.equal(calls[1]["encoder_hidden_states"].text[2:], calls[2]["encoder_hidden_states"].text)


# Tools.


def test_a_lora_is_loaded_scaled_and_unloaded(sparse_pipe, tmp_path):
    adapted = toy_sparse()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    state = {name: torch.randn_like(x) for name, x in get_peft_model_state_dict(adapted).items()}
    SparseDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=state)
    plain = seeded(sparse_pipe)
    sparse_pipe.load_lora_weights(tmp_path, adapter_name="toy")
    full = seeded(sparse_pipe)
    assert not torch.equal(full, plain)
    assert torch.equal(seeded(sparse_pipe, attention_kwargs={"scale": 0.0}), plain)
    half = seeded(sparse_pipe, attention_kwargs={"scale": 0.5})
    sparse_pipe.set_adapters("toy", 0.5)
    assert_same(seeded(sparse_pipe), half, 1e-3)
    sparse_pipe.unload_lora_weights()
    assert_same(seeded(sparse_pipe), plain)


def test_offloaded_models_make_the_same_picture(sparse_pipe):
    expected = seeded(sparse_pipe, image=torch.rand(3, 48, 64, generator=generators(1)[0]), output_type="pt")
    sparse_pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        start = torch.rand(3, 48, 64, generator=generators(1)[0])
        assert torch.equal(seeded(sparse_pipe, image=start, output_type="pt"), expected)


def test_sequentially_offloaded_models_make_the_same_picture(sparse_pipe):
    expected = seeded(sparse_pipe, output_type="pt")
    for model in (sparse_pipe.text_encoder, sparse_pipe.transformer, sparse_pipe.vae):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    torch.testing.assert_close(seeded(sparse_pipe, output_type="pt"), expected, rtol=0, atol=1e-5)


def test_caches_are_kept_within_a_call(sparse_pipe):
    """A cache of blocks acts on the backbone; the mixer always runs."""
    expected = seeded(sparse_pipe)
    sparse_pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert_same(seeded(sparse_pipe), expected)
    sparse_pipe.transformer.disable_cache()
    sparse_pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    ran = {"mixer_blocks": 0, "transformer_blocks": 0}
    for name in ran:
        getattr(sparse_pipe.transformer, name)[1].attn1.register_forward_pre_hook(
            lambda *_, name=name: ran.__setitem__(name, ran[name] + 1)
        )
    skipped = seeded(sparse_pipe)
    assert ran == {"mixer_blocks": 5, "transformer_blocks": 1}
    assert not torch.equal(skipped, expected)


# Bad input.

EMBEDS = torch.randn(2, LENGTH, 24)
GIVEN = {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS}
BROKEN = EMBEDS.masked_fill(EMBEDS > 2, torch.nan)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 40}, "height must be a positive multiple of 16, got 40"),
        ({"width": 0}, "width must be a positive multiple of 16, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        ({"max_sequence_length": 78}, "max_sequence_length must be at most 77, .* got 78"),
        ({"strength": 1.1}, "strength must be between 0 and 1, got 1.1"),
        ({"output_type": "jpg"}, "output_type must be .* got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among .* got \['noise'\]"),
        ({"generator": generators(1, 2)}, "generator must be one or a list of 1, .* got 2"),
        ({"latents": torch.zeros(1, 4, 8, 6)}, r"\(1, 4, 6, 8\), got torch.float32 of shape \(1, 4, 8, 6\)"),
        ({"prompt": None}, "prompt must be a text or a list of texts, or prompt_embeds be given, got None"),
        ({"prompt": []}, "prompt must be a text or a list"),
        ({"prompt": ["star", 3]}, r"got \['star', 3\]"),
        ({"negative_prompt": 3}, "negative_prompt must be a text .* got 3"),
        ({"negative_prompt": ["star", "star"]}, "negative_prompt must be one text or 1, .* got 2"),
        (GIVEN | {"prompt": "star"}, "prompt must be None with prompt_embeds, got 'star'"),
        (GIVEN | {"negative_prompt": "star"}, "negative_prompt must be None with negative_prompt_embeds"),
        (GIVEN | {"prompt_embeds": EMBEDS[0]}, r"must be \(texts, tokens, 24\), got \(12, 24\)"),
        (GIVEN | {"prompt_embeds": EMBEDS[..., :8]}, r"prompt_embeds must be .* got \(2, 12, 8\)"),
        (GIVEN | {"negative_prompt_embeds": BROKEN}, "negative_prompt_embeds must be finite"),
        (GIVEN | {"negative_prompt_embeds": EMBEDS[1:]}, "negative_prompt must be one text or 2, .* got 1"),
        (GIVEN | {"negative_prompt_embeds": EMBEDS[:, :9]}, "must have one length, got 12 and 9"),
        ({"image": []}, "image must hold a picture or be None"),
        ({"image": [image(), image()]}, "image must be one or 1, one for each prompt, got 2"),
        ({"image": "cat.png"}, "got str"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_model_runs(sparse_pipe, kwargs, message):
    def refuse(*args: Any) -> None:
        raise AssertionError("a model ran")

    for model in (sparse_pipe.text_encoder, sparse_pipe.transformer, sparse_pipe.vae):
        model.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        run_sparse(sparse_pipe, **kwargs)


# Broken numbers.


def test_a_text_encoder_that_overflows_is_named(sparse_pipe):
    with torch.no_grad():
        next(sparse_pipe.text_encoder.parameters()).fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"the text encoder gave .*: run it in bfloat16 or float32"):
        run_sparse(sparse_pipe)


def test_a_transformer_that_overflows_is_named(sparse_pipe):
    with torch.no_grad():
        sparse_pipe.transformer.proj_out.bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"denoising gave .* run the transformer in"):
        run_sparse(sparse_pipe)


def test_a_vae_that_overflows_is_named(sparse_pipe):
    with torch.no_grad():
        sparse_pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"the VAE's decoder gave .*: run the VAE in float32"):
        run_sparse(sparse_pipe, output_type="pil")
