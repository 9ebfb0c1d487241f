"""Consistency distillation: against diffusers' samplers, on an ODE with a known answer, and in the loop."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor, nn
from toy_pipeline import generators, toy_pipeline, toy_vae

from localdit import MINI, LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.training.config import Config, TrainConfig, load_config
from localdit.training.distillation import ConsistencyDistillation
from localdit.training.encode import EncodeConfig
from localdit.training.loop import starting_model, train
from localdit.training.objectives import build_objective
from localdit.training.order import Draws

BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
KINDS = ("epsilon", "v_prediction")
NO_LABEL = 2


class Points(nn.Module):
    """Knows the answer where all data of a label is one picture: from any noisy sample it predicts that
    picture, a single number in every place."""

    def __init__(self, kind: str, *values: float):
        super().__init__()
        self.kind, self.values = kind, nn.Parameter(torch.tensor(values))
        self.signal = LCMScheduler(**BETAS).alphas_cumprod

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        signal = self.signal[timestep].view(-1, 1, 1, 1)
        noise = (hidden_states - signal.sqrt() * self.points(class_labels)) / (1 - signal).sqrt()
        if self.kind == "epsilon":
            return (noise,)
        return ((noise - (1 - signal).sqrt() * hidden_states) / signal.sqrt(),)

    def points(self, class_labels: Tensor) -> Tensor:
        return self.values[class_labels].view(-1, 1, 1, 1)


def distillation(
    teacher: nn.Module, kind: str = "v_prediction", guidance: float = 1.0, segments: int = 1, steps: int = 50
) -> Any:
    """The objective as `prepare` leaves it, for classes."""
    objective = ConsistencyDistillation(
        data=EncodeConfig(source="", cache=""),
        scheduler={},
        teacher="",
        teacher_guidance_scale=guidance,
        teacher_steps=steps,
        segments=segments,
    )
    lcm = LCMScheduler(**BETAS, prediction_type=kind, original_inference_steps=steps)
    objective.schedule = lcm if segments == 1 else ddim(kind)
    objective.teacher_model, objective.precision = teacher, nullcontext
    objective.no_label = NO_LABEL
    return objective


def ddim(kind: str) -> Any:
    return DDIMScheduler(
        **BETAS,
        prediction_type=kind,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def batch(levels: list[int]) -> dict[str, Any]:
    clean = torch.randn(len(levels), 3, 5, 7)
    labels = torch.arange(len(levels)) % NO_LABEL
    return {
        "clean": clean,
        "noise": torch.randn_like(clean),
        "level": torch.tensor(levels),
        "draws": None,
        "class_labels": labels,
    }


def random_model() -> nn.Module:
    """Predicts something that depends on all that it is told."""
    layer = nn.Conv2d(5, 3, 3, padding=1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(
            self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            told = torch.stack((timestep / 1000, class_labels.float()), dim=1)[:, :, None, None]
            told = told.expand(-1, -1, *hidden_states.shape[2:])
            return (layer(torch.cat((hidden_states, told), dim=1)),)

    return Model()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_student_sees_is_what_the_sampler_makes_of_it(kind):
    objective, model = distillation(random_model(), kind), random_model()
    scheduler = LCMScheduler(**BETAS, prediction_type=kind, original_inference_steps=50)
    scheduler.set_timesteps(4)
    noisy, labels = torch.randn(2, 3, 5, 7), torch.tensor([0, 1])
    for t in scheduler.timesteps:
        predicted = objective.predict(model, noisy, t.expand(2), class_labels=labels)
        theirs = scheduler.step(predicted, t, noisy).denoised
        ours, _ = objective.split(predicted, noisy, t.expand(2))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [2, 4, 5])
def test_segments_are_the_steps_of_the_sampler(kind, segments):
    objective, model = distillation(random_model(), kind, segments=segments, steps=20), random_model()
    scheduler = ddim(kind)
    scheduler.set_timesteps(segments)
    noisy, labels = torch.randn(2, 3, 5, 7), torch.tensor([0, 1])
    starts = scheduler.timesteps.tolist()
    for t, next_start in zip(starts, [*starts[1:], 0], strict=True):
        level = torch.tensor([t, t])
        assert objective.ends(level).tolist() == [next_start] * 2
        assert objective.ends(level - 50).tolist() == [next_start] * 2  # from within, too
        predicted = objective.predict(model, noisy, level, class_labels=labels)
        theirs = scheduler.step(predicted, t, noisy)
        clean, noise = objective.split(predicted, noisy, level)
        torch.testing.assert_close(clean, theirs.pred_original_sample, rtol=1e-4, atol=1e-4)
        landed = objective.schedule.add_noise(clean, noise, objective.ends(level))
        torch.testing.assert_close(landed, theirs.prev_sample, rtol=1e-4, atol=1e-4)
        # And back: which clean sample leads there?
        torch.testing.assert_close(
            objective.aim(noisy, level, landed, objective.ends(level)), clean, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [1, 4])
def test_where_a_segment_ends_the_target_is_the_teachers_whatever_the_student_says(kind, segments):
    objective = distillation(random_model(), kind, guidance=3.0, segments=segments, steps=20)
    given = batch([49, 299, 549, 799] if segments == 4 else [49, 49, 49])
    student, other = random_model(), random_model()
    level, labels = given["level"], {"class_labels": given["class_labels"]}
    noisy = objective.schedule.add_noise(given["clean"], given["noise"], level)
    neighbour = objective.solve(noisy, level, objective.ends(level), **labels)
    target = objective.aim(noisy, level, neighbour, objective.ends(level))
    for model in (student, other):
        seen, _ = objective.split(objective.predict(model, noisy, level, **labels), noisy, level)
        difference = (seen - target).square()
        expected = ((difference + objective.huber_width**2).sqrt() - objective.huber_width).flatten(1).mean(1)
        torch.testing.assert_close(objective.errors(model, **given), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_step_is_guided_ddim(kind):
    teacher = random_model()
    objective = distillation(teacher, kind, guidance=3.5)
    scheduler = ddim(kind)
    scheduler.set_timesteps(50)
    noisy, labels = torch.randn(1, 3, 5, 7), torch.tensor([1])
    for t in (999, 519, 39, 19):
        assert t in scheduler.timesteps
        at = torch.tensor([t])
        with_label = teacher(noisy, at, labels, return_dict=False)[0]
        without = teacher(noisy, at, torch.tensor([NO_LABEL]), return_dict=False)[0]
        guided = without + 3.5 * (with_label - without)
        theirs = scheduler.step(guided, t, noisy).prev_sample
        ours = objective.solve(noisy, at, (at - 20).clamp(min=0), class_labels=labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [1, 2])
def test_a_perfect_consistency_function_costs_nothing_and_the_ends_show_a_wrong_one(kind, segments):
    """All data of label 0 is -1, of label 1 it is 2, without a label it is 0.5: with the guidance of 2 the
    teacher goes to -2.5 and to 3.5. A student who says so is right everywhere; one who says something else
    agrees with himself, but not with where the trajectories end."""
    objective = distillation(Points(kind, -1.0, 2.0, 0.5), kind, guidance=2.0, segments=segments)
    right, wrong = Points(kind, -2.5, 3.5), Points(kind, -2.0, 3.0)
    inner, first = batch([39, 459, 979, 59]), batch([19, 519] if segments == 2 else [19, 19])
    for given in (inner, first):
        given["clean"] = right.points(given["class_labels"]).detach().expand_as(given["noise"])
        assert objective.errors(right, **given).max() < 1e-3
    # But for a little, since the teacher's step changed what noise the student sees in the neighbour.
    assert objective.errors(wrong, **inner).max() < 0.05
    assert objective.errors(wrong, **first).min() > 0.45


def test_only_the_students_judgement_of_the_noisier_sample_learns():
    teacher, model = random_model(), random_model()
    objective, given = distillation(teacher, guidance=2.0), batch([999, 19, 459])
    objective.errors(model, **given).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    found = model.layer.weight.grad.clone()

    model.zero_grad()
    labels, level = {"class_labels": given["class_labels"]}, given["level"]
    earlier, end = (level - 20).clamp(min=0), torch.zeros_like(level)
    noisy = objective.schedule.add_noise(given["clean"], given["noise"], level)
    with torch.no_grad():
        neighbour = objective.solve(noisy, level, earlier, **labels)
        predicted = objective.predict(model, neighbour, earlier, **labels)
        landed = objective.schedule.add_noise(*objective.split(predicted, neighbour, earlier), end)
        target = objective.aim(noisy, level, landed, end)
    seen, _ = objective.split(objective.predict(model, noisy, level, **labels), noisy, level)
    huber = ((seen - target).square() + objective.huber_width**2).sqrt() - objective.huber_width
    huber.flatten(1).mean(1).sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, found)


def test_levels_are_the_steps_of_the_teacher():
    objective = distillation(random_model())
    levels = objective.levels(Draws(0, range(2000), torch.device("cpu")))
    assert set(levels.tolist()) == set(range(19, 1000, 20))
    assert list(objective.validation_levels().values()) == [999, 759, 499, 259]
    objective = distillation(random_model(), segments=4, steps=20)
    levels = objective.levels(Draws(0, range(2000), torch.device("cpu")))
    assert set(levels.tolist()) == set(range(49, 1000, 50))
    assert list(objective.validation_levels().values()) == [999, 749, 499, 249]


# --- In the loop


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one precision for all its accelerators; each of these runs has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction")
    toy_pipeline(scheduler=scheduler, vae=toy_vae(scaling_factor=1.0)).save_pretrained(folder)
    return folder


def toy_run(run: Path, teacher: Path, **options: Any) -> Config:
    scheduler: dict[str, Any] = {"_class_name": "LCMScheduler", **BETAS, "prediction_type": "v_prediction"}
    return Config(
        output_dir=str(run),
        init_from=str(teacher),
        model={
            "_class_name": "LocalDiTTransformer2DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "caption_channels": 16,
            "sample_size": 8,
        },
        objective={
            "name": "consistency_distillation",
            "teacher": str(teacher),
            "teacher_guidance_scale": 2.0,
            "data": {
                "source": {"kind": "scenes", "count": 9, "size": 64},
                "cache": str(teacher.parent / "cache"),
                "vae": str(teacher),
                "text_encoder": str(teacher),
                "tokenizer": str(teacher),
                "resolution": 64,
                "max_sequence_length": 24,
            },
            "scheduler": scheduler,
            "validation_samples": 2,
        },
        train=TrainConfig(**{"max_steps": 2, "batch_size": 3, "warmup_steps": 1, **options}),
    )


def test_a_run_leaves_a_pipeline_that_samples_in_a_few_steps_without_guidance(teacher, tmp_path):
    final = train(toy_run(tmp_path, teacher, preview_every=2, validate_every=2))
    pipe = LocalDiTPipeline.from_pretrained(final)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.config.default_guidance_scale == 1.0
    pipe.set_progress_bar_config(disable=True)
    draw = {"prompt": ["a red circle"] * 2, "num_inference_steps": 4, "output_type": "latent"}
    both = pipe(**draw, generator=generators(1, 2)).images
    alone = pipe(**draw | {"prompt": "a red circle"}, generator=generators(2)).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    assert not pipe.do_classifier_free_guidance
    assert (tmp_path / "preview-00000002.png").is_file()


def test_a_student_without_steps_is_its_teacher(teacher, tmp_path):
    final = train(toy_run(tmp_path, teacher, max_steps=1, learning_rate=0.0))
    taught, own = (LocalDiTPipeline.from_pretrained(folder).transformer for folder in (final, teacher))
    for name, value in own.state_dict().items():
        assert torch.equal(taught.state_dict()[name], value), name


def test_the_recipe_begins_with_the_pipeline_in_the_package_and_keeps_its_schedule():
    config = load_config(Path(__file__).parents[2] / "configs" / "local_dit" / "mini_distill.yaml")
    student = starting_model(config).state_dict()
    own = LocalDiTTransformer2DModel.from_pretrained(MINI, subfolder="transformer").state_dict()
    assert all(torch.equal(student[name], value) for name, value in own.items())
    objective: Any = build_objective(config.objective)
    objective.use_scheduler(DDIMScheduler.from_config(config.objective["scheduler"]))
    assert (objective.interval, objective.segments, objective.preview_steps) == (50, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_end": 1e-2}, r"scheduler\.beta_end must be the teacher's, 0\.02, got 0\.01"),
        ({"prediction_type": "epsilon"}, r"prediction_type must be the teacher's, 'v_prediction'"),
        ({"prediction_type": "sample"}, r"must be epsilon or v_prediction, got 'sample'"),
        ({"_class_name": "DDIMScheduler"}, r"LCMScheduler where objective\.segments is 1, got DDIM"),
        ({"original_inference_steps": 20}, r"original_inference_steps must be 50, got 20"),
    ],
)
def test_a_schedule_that_is_not_the_teachers_is_refused(teacher, tmp_path, change, message):
    config = toy_run(tmp_path, teacher)
    config.objective["scheduler"] |= change
    with pytest.raises(ValueError, match=message):
        train(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": 3}, r"objective\.segments must divide the 20 steps of the teacher, got 3"),
        ({"segments": 0}, r"objective\.segments must divide the 20 steps of the teacher, got 0"),
        ({"teacher_steps": 30}, r"teacher_steps must divide the 1000 timesteps and be fewer, got 30"),
        ({"teacher_steps": 1000}, r"teacher_steps must divide the 1000 timesteps and be fewer, got 1000"),
        ({"clip_sample": True}, r"scheduler\.clip_sample must be False, got True"),
        ({"timestep_spacing": "leading"}, r"scheduler\.timestep_spacing must be 'trailing', got 'leading'"),
        ({"_class_name": "LCMScheduler"}, r"must be a DDIMScheduler where objective\.segments is 4, got LCM"),
    ],
)
def test_segments_that_the_sampler_would_not_step_over_are_refused(teacher, tmp_path, change, message):
    config = in_segments(toy_run(tmp_path, teacher))
    for name, value in change.items():
        where = config.objective if name in ("segments", "teacher_steps") else config.objective["scheduler"]
        where[name] = value
    with pytest.raises(ValueError, match=message):
        train(config)


def in_segments(config: Config) -> Config:
    config.objective.update(segments=4, teacher_steps=20)
    config.objective["scheduler"].update(
        _class_name="DDIMScheduler", timestep_spacing="trailing", clip_sample=False
    )
    return config


def test_a_run_in_segments_leaves_a_pipeline_that_samples_with_ddim(teacher, tmp_path):
    final = train(in_segments(toy_run(tmp_path, teacher, preview_every=2, validate_every=2)))
    pipe = LocalDiTPipeline.from_pretrained(final)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    draw = {"prompt": "a red circle", "num_inference_steps": 4, "output_type": "latent"}
    assert pipe(**draw, generator=generators(2)).images.isfinite().all()
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_a_teacher_that_is_no_pipeline_is_refused(teacher, tmp_path):
    config = toy_run(tmp_path, teacher)
    config.objective["teacher"] = str(teacher / "transformer")
    with pytest.raises(ValueError, match="teacher must be the folder of a pipeline, or 'mini', got"):
        train(config)
