"""The pipeline with every kind of scheduler, whatever the transformer predicts.

An oracle stands in for the transformer: it knows the picture, and predicts what leads there from wherever it
is asked. Only a pipeline that keeps scheduler, times, scales and kind of prediction in step arrives there.
"""

import io
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from toy_pipeline import generators, run, spy, toy_pipeline
from tqdm import tqdm

from localdit.models.local_dit import TextContext, TimestepContext
from localdit.pipelines import LocalDiTPipeline

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"prediction_type": kind} | extra)
        for name, extra in (
            ("DPMSolverMultistepScheduler", {}),
            ("UniPCMultistepScheduler", {}),
            ("DDIMScheduler", {"clip_sample": False}),
            ("DDPMScheduler", {"clip_sample": False}),
            ("EulerDiscreteScheduler", {}),
            ("EulerAncestralDiscreteScheduler", {}),
            ("HeunDiscreteScheduler", {}),
            ("LCMScheduler", {}),
        )
        for kind in ("epsilon", "v_prediction")
    ),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "prediction_type": "epsilon"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "epsilon"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "prediction_type": "epsilon"}),
    ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 2.0}),
    ("UniPCMultistepScheduler", FLOW),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
]
IDS = [
    f"{name.removesuffix('Scheduler')}-{'-'.join(map(str, config.values()))}" for name, config in SCHEDULERS
]
every_scheduler = pytest.mark.parametrize(("name", "config"), SCHEDULERS, ids=IDS)

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def build(name: str, config: dict[str, Any]) -> LocalDiTPipeline:
    if "FlowMatch" not in name:
        config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"} | config
    return toy_pipeline(scheduler=getattr(diffusers, name)(**config))


def is_flow(name: str, config: dict[str, Any]) -> bool:
    return "FlowMatch" in name or config.get("prediction_type") == "flow_prediction"


def levels(t: Tensor, flow: bool) -> tuple[Tensor, Tensor]:
    """Share of the picture and of the noise in what the transformer sees at time t."""
    if flow:
        return 1 - t / 1000, t / 1000
    sigmas = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
    low = t.long().clamp(0, 998)
    sigma = torch.lerp(
        sigmas[low], sigmas[low + 1], t.double() - low
    )  # schedulers interpolate so between times
    return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()


def install_oracle(pipe: LocalDiTPipeline, picture: Tensor, flow: bool) -> list[dict[str, Tensor]]:
    """Put the oracle in the transformer's place; returns a list that grows by its calls."""
    kind = "flow" if flow else pipe.scheduler.config.prediction_type
    calls: list[dict[str, Tensor]] = []

    def forward(
        hidden_states: Tensor, timestep: TimestepContext, encoder_hidden_states: TextContext, **_: Any
    ) -> tuple[Tensor]:
        calls.append({"hidden_states": hidden_states, "timestep": timestep.timestep})
        share, noise_share = (x[:, None, None, None] for x in levels(timestep.timestep, flow))
        noise = (hidden_states - share * picture) / noise_share.clamp(min=1e-3)
        predicted = {
            "epsilon": noise,
            "v_prediction": share * noise - noise_share * picture,
            "flow": noise - picture,
        }
        copies = encoder_hidden_states.batch_size // len(hidden_states)
        return (predicted[kind].float().repeat(copies, 1, 1, 1),)

    pipe.transformer.forward = forward
    return calls


@every_scheduler
@pytest.mark.parametrize("strength", [None, 0.6], ids=["t2i", "i2i"])
def test_an_oracle_is_followed_to_its_picture(name, config, strength):
    pipe = build(name, config)
    picture = 0.5 * torch.randn(4, 6, 8)
    calls = install_oracle(pipe, picture, is_flow(name, config))
    start = {} if strength is None else {"image": torch.randn(4, 6, 8), "strength": strength}
    latents = run(pipe, **start, num_inference_steps=10)
    steps = 10 if strength is None else 6
    assert len(calls) == (2 * steps - 1 if "Heun" in name else steps)
    # Flow times of the multistep schedulers are cut to whole numbers, so the oracle is asked a little early.
    tolerance = 0.02 if "use_flow_sigmas" in config else 1e-3
    torch.testing.assert_close(latents, picture[None], rtol=0, atol=tolerance)


@every_scheduler
@pytest.mark.parametrize("strength", [None, 0.6], ids=["t2i", "i2i"])
def test_the_first_step_sees_the_noise_of_its_time(name, config, strength):
    """From text: unit noise alone. From an image: image and noise in the shares of the first time."""
    pipe, flow = build(name, config), is_flow(name, config)
    calls = install_oracle(pipe, torch.zeros(4, 6, 8), flow)
    noise, image = torch.randn(2, 4, 6, 8), torch.randn(1, 4, 6, 8)
    start = {} if strength is None else {"image": image, "strength": strength}
    run(pipe, ["star", "circle"], **start, latents=noise, num_inference_steps=5, guidance_scale=1.0)
    share, noise_share = levels(calls[0]["timestep"][0], flow)
    if strength is None:
        expected = noise
    else:
        expected = share * image + noise_share * noise
        assert 0.05 < share < 0.95
    tolerance = 1e-3 if not flow else 3e-3
    torch.testing.assert_close(calls[0]["hidden_states"], expected.float(), rtol=0, atol=tolerance)


@every_scheduler
def test_batches_are_what_each_generator_makes_alone(name, config):
    pipe = build(name, config)
    batch = run(pipe, ["star", "circle"], generator=generators(1, 2))
    assert batch.isfinite().all()
    for i, prompt in enumerate(("star", "circle")):
        alone = run(pipe, prompt, generator=generators(1, 2)[i])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-4 * alone.abs().max().item())


@every_scheduler
def test_one_step_is_enough(name, config):
    assert run(build(name, config), num_inference_steps=1).isfinite().all()


@pytest.mark.parametrize(("strength", "steps"), [(None, 5), (0.6, 3)])
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DDIMScheduler"])
def test_the_progress_bar_counts_steps(name, strength, steps, monkeypatch):
    """A scheduler of second order calls the transformer twice in a step, and the bar ends where it should."""
    pipe = build(name, {})
    bars = []

    def progress_bar(total: int) -> tqdm:
        bars.append(tqdm(total=total, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    run(
        pipe,
        num_inference_steps=5,
        **{} if strength is None else {"image": torch.randn(4, 6, 8), "strength": strength},
    )
    assert [(bar.n, bar.total) for bar in bars] == [(steps, steps)]


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DDPMScheduler", "HeunDiscreteScheduler"])
def test_own_timesteps_are_visited(name):
    pipe = build(name, {})
    calls = spy(pipe)
    run(pipe, timesteps=[900, 500, 100], num_inference_steps=99)
    times = [int(call["timestep"].timestep[0]) for call in calls]
    assert times == ([900, 500, 500, 100, 100] if "Heun" in name else [900, 500, 100])


def test_own_timesteps_are_cut_by_strength():
    pipe = build("DPMSolverMultistepScheduler", {})
    calls = spy(pipe)
    run(
        pipe, timesteps=[900, 700, 500, 100], num_inference_steps=99, image=torch.randn(4, 6, 8), strength=0.5
    )
    assert [int(call["timestep"].timestep[0]) for call in calls] == [500, 100]


def test_own_sigmas_are_visited():
    pipe = build("FlowMatchEulerDiscreteScheduler", {})
    calls = spy(pipe)
    run(pipe, sigmas=[1.0, 0.6, 0.25])
    assert [call["timestep"].timestep[0].item() for call in calls] == pytest.approx([1000, 600, 250])


def test_dynamic_shifting_follows_the_number_of_tokens():
    """mu lies on the line through the two points of the scheduler's config (SD3, section 5.3.2)."""
    config = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 12}
    pipe = build("FlowMatchEulerDiscreteScheduler", config | {"base_shift": 0.0, "max_shift": 2.0})
    for size, shift in ((32, 0.0), (64, 3.0)):  # 4 and 16 tokens
        calls = spy(pipe)
        run(pipe, height=size, width=size, sigmas=[1.0, 0.5])
        e = torch.tensor(shift).exp().item()
        assert calls[1]["timestep"].timestep[0].item() == pytest.approx(1000 * e / (e + 1), rel=1e-4)


def test_the_scheduler_is_asked_and_not_assumed():
    """eta goes to a scheduler that knows it; one without scale_model_input needs none."""
    pipe = build("DDIMScheduler", {})
    plain, noisy = (run(pipe, eta=eta, generator=generators(0)[0]) for eta in (0.0, 1.0))
    assert (plain - noisy).abs().max() > 0.01
    flow = build("FlowMatchEulerDiscreteScheduler", {})
    assert not hasattr(flow.scheduler, "scale_model_input")
    assert not hasattr(flow.scheduler, "init_noise_sigma")
