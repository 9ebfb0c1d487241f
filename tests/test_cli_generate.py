"""`localdit generate` with pipelines of every kind, at toy size: prompts or labels, defaults, schedulers."""

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from toy_pipeline import redraw, toy_pipeline, toy_vae
from toy_pixeldit import NAMES, class_pipeline, text_pipeline, toy_gemma
from toy_sparse_pipeline import toy_sparse_pipeline

from localdit import PixelDiTTextTransformer2DModel, cli
from localdit.cli.common import make_scheduler
from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.pictures import SCHEDULERS, Settings, read_settings
from localdit.pipelines import PIPELINES, LEDiTPipeline, LocalDiTPipeline


def ledit_pipeline() -> LEDiTPipeline:
    transformer = LEDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_classes=10, sample_size=8
    )
    redraw(transformer, 0.1)
    published = DDPMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, variance_type="learned_range"
    )
    return LEDiTPipeline(toy_vae(), transformer, published, NAMES)


def pixel_text_pipeline() -> Any:
    """The toy with the published length of text, which a call has by default."""
    toy = text_pipeline()
    transformer = PixelDiTTextTransformer2DModel.from_config(toy.transformer.config, max_text_tokens=300)
    redraw(transformer, 0.3)
    tokenizer, encoder = toy_gemma()
    return text_pipeline(transformer=transformer, tokenizer=tokenizer, text_encoder=encoder)


MAKERS = {
    "LEDiTPipeline": ledit_pipeline,
    "LocalDiTPipeline": toy_pipeline,
    "PixelDiTPipeline": class_pipeline,
    "PixelDiTTextPipeline": pixel_text_pipeline,
    "SparseDiTPipeline": toy_sparse_pipeline,
}
OF_LABELS = ("LEDiTPipeline", "PixelDiTPipeline")
SHOWN = {name: ["--label", "hen"] if name in OF_LABELS else ["a hen"] for name in MAKERS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A folder of each pipeline, saved as anybody would."""
    folders = {}
    for name, make in MAKERS.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        make().save_pretrained(folders[name])
    return folders


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.disable(logging.NOTSET)


@pytest.fixture
def generate(capsys):
    """Run `localdit generate --quiet`; give back the lines of stdout."""

    def run(*args: str) -> list[str]:
        assert cli.main(["generate", *args, "--quiet"]) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def mistake(capsys):
    """Run a command where no weights may be loaded; give back its message."""

    def run(*args: str, command: str = "generate") -> str:
        with pytest.MonkeyPatch.context() as patch:
            for pipeline in PIPELINES:
                patch.setattr(pipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights"))
            assert cli.main([command, *args]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("localdit: error: ")

    return run


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_of_any_pipeline_draws(name, folders, generate):
    """From its own default of guidance, and again from its PNG, and from a picture."""
    [path] = generate(*SHOWN[name], "--model", folders[name], "--steps", "2", "--seed", "3")
    call = inspect.signature(next(p for p in PIPELINES if p.__name__ == name).__call__).parameters
    expected = Settings(
        prompt="" if name in OF_LABELS else "a hen",
        label="hen" if name in OF_LABELS else None,
        seed=3,
        negative=call["negative_prompt"].default if "negative_prompt" in call else None,
        steps=2,
        guidance=call["guidance_scale"].default or 7.0,  # LocalDiT's is the folder's, or else 7
        model=folders[name],
        dtype="float32",
    )
    assert read_settings(path) == expected
    assert path == f"outputs/{'hen' if expected.label else 'a-hen'}-3.png"

    [again] = generate("--from-png", path)
    assert again != path
    assert (pixels(again) == pixels(path)).all()
    assert read_settings(again) == expected

    [begun] = generate("--from-png", path, "--image", path, "--strength", "0.5")
    assert pixels(begun).shape == pixels(path).shape
    assert (pixels(begun) != pixels(path)).any()
    assert read_settings(begun).strength == 0.5


@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_the_pipelines_own_where_none_are_given(name, folders, monkeypatch, capsys):
    """What is called, and what the picture tells, are the numbers of its signature."""
    kind = next(p for p in PIPELINES if p.__name__ == name)
    call = inspect.signature(kind.__call__)
    seen: list[dict[str, Any]] = []

    class Spy:
        labels = {"hen": 2}  # noqa: RUF012
        scheduler = None

        def __call__(self, *args, **kwargs):
            seen.append(call.bind(self, *args, **kwargs).arguments)
            return ([Image.new("RGB", (4, 4))],)

        to = set_progress_bar_config = lambda self, *args, **kwargs: self

    monkeypatch.setattr(cli.generate, "load_pipeline", lambda settings: Spy())
    assert cli.main(["generate", *SHOWN[name], "--model", folders[name]]) == 0
    settings = read_settings(capsys.readouterr().out.strip())
    for field, argument in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
        default = call.parameters[argument].default or 7.0
        assert seen[0][argument] == getattr(settings, field) == default
    assert seen[0].get("negative_prompt") == settings.negative
    assert seen[0].get("class_labels", 2) == 2  # of the name


def test_no_negative_text_and_an_empty_one_are_two_things(folders, generate):
    """SparseDiT steers away from no text at all unless one is given."""
    options = ["a hen", "--model", folders["SparseDiTPipeline"], "--steps", "2", "--seed", "1"]
    [none], [empty] = generate(*options), generate(*options, "--negative", "")
    assert (read_settings(none).negative, read_settings(empty).negative) == (None, "")
    assert (pixels(none) != pixels(empty)).any()


def test_labels_are_names_or_numbers(folders, generate):
    """One label has several names; every picture is the one that its number makes."""
    model = ["--model", folders["PixelDiTPipeline"], "--steps", "2", "--seed", "1"]
    named = generate("--label", "tench", "--label", "Tinca tinca", "--label", "hen", *model, "--num", "2")
    assert [read_settings(path).label for path in named] == ["tench"] * 2 + ["Tinca tinca"] * 2 + ["hen"] * 2
    assert [read_settings(path).seed for path in named] == list(range(1, 7))
    [number] = generate("--label", "2", *model[:-1], "5", "--out", "number.png")
    assert (pixels(number) == pixels(named[4])).all()
    with Image.open(named[4]) as picture:
        assert picture.text["parameters"].startswith("hen\nSteps: 2, ")


def test_a_name_of_digits_is_a_name(folders, generate):
    """Where a label is named by another number, the name goes first."""
    shutil.copytree(folders["PixelDiTPipeline"], "digits")
    index = json.loads(Path("digits/model_index.json").read_text())
    Path("digits/model_index.json").write_text(json.dumps(index | {"id2label": {"3": "1"}}))
    options = ["--model", "digits", "--steps", "2", "--seed", "4"]
    [one], [three] = generate("--label", "1", *options), generate("--label", "3", *options)
    assert (pixels(one) == pixels(three)).all()


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("LEDiTPipeline", ["a hen"], "{} draws labels, not prompts: give --label NAME or --label NUMBER"),
        ("LocalDiTPipeline", ["--label", "3"], "{} draws prompts, not labels, got the label 3"),
        (
            "PixelDiTPipeline",
            ["--label", "goldfisch"],
            "--label must be a label of {}, with 4 names, such as goldfish, got goldfisch",
        ),
        (
            "PixelDiTPipeline",
            ["--label", "a"],
            "--label must be a label of {}, with 4 names, such as Tinca tinca, goldfish, hen, got a",
        ),
        (
            "LEDiTPipeline",
            ["--label", "hen", "--negative", "a star"],
            "LEDiTPipeline takes no negative_prompt: leave out --negative",
        ),
        (
            "SparseDiTPipeline",
            ["a hen", "--scheduler", "dpm"],
            "--scheduler must suit the model's own, EDMHeunScheduler: one of edm-dpm, edm-euler, "
            "edm-heun, got dpm",
        ),
        (
            "PixelDiTPipeline",
            ["--label", "hen", "--scheduler", "ddim"],
            "--scheduler must suit the model's own, FlowAdamsBashforthScheduler: one of dpm, flow-ab, "
            "flow-euler, unipc, got ddim",
        ),
        (
            "PixelDiTTextPipeline",
            ["a hen", "--scheduler", "edm-euler"],
            "--scheduler must suit the model's own, ",
        ),
        (
            "LocalDiTPipeline",
            ["a hen", "--scheduler", "flow-euler"],
            "--scheduler must suit the model's own, ",
        ),
        (
            "LocalDiTPipeline",
            ["a", "--pipeline", "os.system"],
            "pipeline must be",
        ),
        (
            "LocalDiTPipeline",
            ["a", "--pipeline", "no_such.Class"],
            "pipeline must be",
        ),
        (
            "LocalDiTPipeline",
            ["a", "--pipeline", "localdit.Pipe"],
            "pipeline must be",
        ),
        ("LocalDiTPipeline", ["a", "--pipeline", "a b"], "pipeline must be"),
        (
            "LocalDiTPipeline",
            ["a", "--pipeline", "diffusers.DiffusionPipeline"],
            "pipeline must be",
        ),
        (
            "LocalDiTPipeline",
            ["a", "--pipeline", "diffusers.DiTPipeline"],
            "{} draws labels, not prompts",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_weights_are_loaded(name, args, message, folders, mistake):
    assert mistake(*args, "--model", folders[name]).startswith(message.format(folders[name]))


@pytest.mark.parametrize("said", ["StableDiffusionPipeline", ["evil", "Pipeline"], "os.system", None])
def test_a_folder_has_no_say_in_what_is_imported(said, folders, mistake):
    """A class that the package lacks is named on the command line, or not at all."""
    shutil.copytree(folders["LocalDiTPipeline"], "strange")
    index = json.loads(Path("strange/model_index.json").read_text())
    Path("strange/model_index.json").write_text(json.dumps(index | {"_class_name": said}))
    Path("strange/evil.py").write_text("raise SystemExit('run')")
    message = mistake("a hen", "--model", "strange")
    assert f"strange is a {said}, and localdit has LEDiTPipeline, LocalDiTPipeline, " in message
    assert message.endswith("name the class of another by --pipeline")


class OwnPipeline(LocalDiTPipeline):
    """A pipeline from outside the package, with a default of its own."""

    def __call__(self, prompt=None, num_inference_steps=3, **kwargs):
        kwargs.setdefault("guidance_scale", 2.0)
        return super().__call__(prompt, num_inference_steps=num_inference_steps, **kwargs)


def test_a_class_from_outside_is_named_and_a_picture_cannot_name_it(folders, generate, mistake):
    name = f"{__name__}.OwnPipeline"
    path = str(Path("own.png").resolve())
    generate(
        "a hen", "--model", folders["LocalDiTPipeline"], "--pipeline", name, "--seed", "1", "--out", path
    )
    settings = read_settings(path)
    assert (settings.pipeline, settings.steps, settings.guidance) == (name, 3, None)
    message = mistake("--from-png", path)
    assert message == f"{path} was made by {name}: give --pipeline {name} if you trust it"
    [again] = generate("--from-png", path, "--pipeline", name)
    assert (pixels(again) == pixels(path)).all()


FITTING = [
    (name, scheduler)
    for name, kind in (("SparseDiTPipeline", "edm"), ("PixelDiTPipeline", "flow"), ("LEDiTPipeline", "betas"))
    for scheduler, (_, kinds) in SCHEDULERS.items()
    if kind in kinds
]


@pytest.mark.parametrize(("name", "scheduler"), FITTING)
def test_every_scheduler_of_a_models_kind_draws(name, scheduler, folders, generate):
    options = ["--model", folders[name], "--steps", "4", "--seed", "1"]
    [path] = generate(*SHOWN[name], *options, "--scheduler", scheduler)
    with Image.open(path) as picture:
        assert f"Sampler: {SCHEDULERS[scheduler][0]}" in picture.text["parameters"]


@pytest.mark.parametrize("name", [name for name, (_, kinds) in SCHEDULERS.items() if "flow" in kinds])
@pytest.mark.parametrize(
    "own",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=["flow", "dpm"],
)
def test_schedulers_of_a_flow_keep_its_shift(name, own):
    """Whatever a shift is called, the noise levels that follow from it are those of the model's own."""
    scheduler = make_scheduler(name, json.loads(own.to_json_string()))
    scheduler.set_timesteps(10)
    levels = scheduler.sigmas
    assert levels[0] == pytest.approx(1, abs=1e-3)
    middle = 3 * 0.5 / (1 + 2 * 0.5)  # of half the way, shifted
    assert abs(levels - middle).min() < 0.06
    assert (levels > 0.5).sum() >= 7  # unshifted, half of the ten


def test_evaluate_draws_with_any_pipeline_of_prompts(folders, mistake, capsys):
    options = ["--count", "2", "--steps", "1", "--size", "8x12", "--out", "made", "--json"]
    assert cli.main(["evaluate", "--scenes", "--model", folders["PixelDiTTextPipeline"], *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["count"], result["settings"]["guidance"], result["settings"]["steps"]) == (2, 2.75, 1)
    assert read_settings("made/images/00001.png").size == (8, 12)


def test_evaluate_asks_a_pipeline_of_labels_for_its_colors_and_shapes(folders, mistake, capsys):
    model = folders["LEDiTPipeline"]
    message = mistake("--scenes", "--model", model, command="evaluate")
    assert "classes must be called by colour and shape, as 'red circle', got" in message

    shutil.copytree(model, "shapes")
    index = Path("shapes/model_index.json")
    named = {"0": "red star", "1": "blue cross"}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": named}))
    options = ["--model", "shapes", "--count", "3", "--steps", "1", "--size", "96x64", "--out", "made"]
    assert cli.main(["evaluate", "--scenes", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["one_object"]["count"] is not None
    assert result["two_objects"]["count"] is None
    labels = [read_settings(f"made/images/0000{i}.png").label for i in range(3)]
    assert labels == ["red star", "blue cross", "red star"]
    assert cli.main(["generate", "--from-png", "made/images/00002.png", "--out", "again.png"]) == 0
    with Image.open("again.png") as again, Image.open("made/images/00002.png") as made:
        assert again.tobytes() == made.tobytes()


def test_the_guidance_of_the_folder_stands_in_the_picture(folders, generate):
    folder = Path(shutil.copytree(folders["LocalDiTPipeline"], "own"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"default_guidance_scale": 2.5}))
    [path] = generate("a hen", "--model", "own", "--seed", "1", "--steps", "1")
    assert read_settings(path).guidance == 2.5
