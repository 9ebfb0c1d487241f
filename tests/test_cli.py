"""The command line: files, settings and messages, with a toy pipeline whose weights are drawn at random."""

import dataclasses
import inspect
import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from toy_pipeline import toy_pipeline, toy_transformer

import localdit
from localdit import LocalDiTPipeline, cli
from localdit.evaluation import speed
from localdit.pictures import Settings, read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A pipeline folder whose pictures are 64x64 pixels unless another size is asked for."""
    folder = tmp_path_factory.mktemp("toy")
    toy_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder; what `--quiet` silences speaks again afterwards."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.disable(logging.NOTSET)


@pytest.fixture
def generate(model, capsys):
    """Run `localdit generate` with the toy and few steps; give back the lines of stdout."""

    def run(*args: str, code: int = 0) -> list[str]:
        options = [] if "--from-png" in args else ["--steps", "2"]
        options += [] if {"--from-png", "--model"} & set(args) else ["--model", model]
        assert cli.main(["generate", *args, *options]) == code
        return capsys.readouterr().out.splitlines()

    return run


def opened(path: str) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


def pixels(path: str) -> np.ndarray:
    return np.asarray(opened(path))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Settings -----------------------------------------------------------------------------------------------


def test_a_picture_carries_its_settings(generate, model):
    [path] = generate(
        "a Red circle", "--seed", "5", "--size", "64x48", "--guidance", "3", "--negative", "a star"
    )
    assert read_settings(path) == Settings(
        prompt="a Red circle",
        negative="a star",
        seed=5,
        size=(64, 48),
        steps=2,
        guidance=3,
        model=model,
        dtype="float32",
    )
    picture = opened(path)
    assert picture.size == (64, 48)
    first, second, third = picture.text["parameters"].splitlines()
    assert (first, second) == ("a Red circle", "Negative prompt: a star")
    assert third.startswith(
        "Steps: 2, Sampler: DPMSolverMultistepScheduler, CFG scale: 3.0, Seed: 5, Size: 64x48"
    )


def test_from_png_makes_the_same_picture_again(generate):
    [path] = generate("a red circle", "--size", "48", "--scheduler", "euler-ancestral")
    [again] = generate("--from-png", path)
    assert again != path
    assert (pixels(again) == pixels(path)).all()
    assert read_settings(again) == read_settings(path)


def test_options_go_before_the_settings_of_a_png(generate):
    [path] = generate("a red circle", "--size", "48", "--seed", "3")
    [changed] = generate("a green star", "--from-png", path, "--guidance", "2")
    assert read_settings(changed) == dataclasses.replace(
        read_settings(path), prompt="a green star", guidance=2
    )
    assert (pixels(changed) != pixels(path)).any()


def test_every_picture_is_the_one_made_alone_with_its_seed(generate):
    paths = generate("a red circle", "a green star", "--num", "2", "--seed", "11")
    settings = [read_settings(path) for path in paths]
    assert [(s.prompt, s.seed) for s in settings] == [
        ("a red circle", 11),
        ("a red circle", 12),
        ("a green star", 13),
        ("a green star", 14),
    ]
    [alone] = generate("a green star", "--seed", "13", "--out", "alone")
    assert (pixels(alone) == pixels(paths[2])).all()
    assert (pixels(paths[3]) != pixels(paths[2])).any()


def test_a_drawn_seed_is_said_and_recorded(model, capsys):
    assert cli.main(["generate", "a star", "--model", model, "--steps", "1"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0].endswith(f"seed {read_settings(said.out.strip()).seed}")
    assert cli.main(["generate", "a star", "--model", model, "--steps", "1", "--quiet"]) == 0
    silent = capsys.readouterr()
    assert silent.err == ""
    assert silent.out != said.out


def test_the_scheduler_is_the_named_one(generate):
    [own] = generate("a star", "--seed", "1")
    [named] = generate("a star", "--seed", "1", "--scheduler", "ddim")
    assert (pixels(own) != pixels(named)).any()
    assert "Sampler: DDIMScheduler" in opened(named).text["parameters"]


def test_defaults_are_those_of_the_pipeline():
    call = inspect.signature(LocalDiTPipeline.__call__).parameters
    assert Settings.steps == call["num_inference_steps"].default
    assert Settings.guidance == call["guidance_scale"].default
    assert Settings.strength == call["strength"].default
    assert Settings.negative == call["negative_prompt"].default


# --- From a picture -----------------------------------------------------------------------------------------


@pytest.fixture
def scene(folder) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("scene.png")
    return "scene.png"


def test_a_picture_is_the_start(generate, scene):
    [kept] = generate("a star", "--image", scene, "--strength", "0", "--seed", "1")
    [other] = generate("a star", "--image", scene, "--strength", "1", "--seed", "1")
    assert opened(kept).size == opened(other).size == (64, 48)
    assert (pixels(kept) != pixels(other)).any()
    settings = read_settings(kept)
    assert (settings.image, settings.strength) == (os.path.abspath(scene), 0)


def test_from_png_takes_the_picture_it_started_from_and_no_other(generate, scene, capsys):
    [path] = generate("a star", "--image", scene, "--strength", "0.5", "--seed", "1")
    [again] = generate("--from-png", path)
    assert (pixels(again) == pixels(path)).all()

    Image.new("RGB", (64, 48)).save(scene)
    assert cli.main(["generate", "--from-png", path]) == 2
    assert "is not what outputs/a-star-1.png was made from" in capsys.readouterr().err
    Path(scene).unlink()
    assert cli.main(["generate", "--from-png", path]) == 2
    assert "scene.png is no file" in capsys.readouterr().err

    Image.new("RGB", (64, 48)).save("other.png")
    [replaced] = generate("--from-png", path, "--image", "other.png")
    assert read_settings(replaced).image == os.path.abspath("other.png")


# --- Files --------------------------------------------------------------------------------------------------


def test_default_names_are_new(generate, folder):
    for _ in range(3):
        generate("A red circle, left of ... a blue SQUARE!", "--seed", "7")
    stem = "outputs/a-red-circle-left-of-a-blue-square-7"
    assert files(folder) == [f"{stem}-2.png", f"{stem}-3.png", f"{stem}.png"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("крас­ный КРУГ", "крас-ный-круг"), ("", "picture"), ("???", "picture"), ("ab " * 99, "ab")],
)
def test_any_prompt_makes_a_file_name(prompt, name):
    assert cli.generate.slug(prompt).startswith(name)
    assert len(cli.generate.slug(prompt)) <= 40


def test_a_pattern_names_the_files(generate, folder):
    Path("prompts.txt").write_text("a red circle\n\n  a green star \n", encoding="utf-8")
    out = generate(
        "--prompt-file", "prompts.txt", "--seed", "4", "--out", "new/{index:02d}-{slug}-{seed}.png"
    )
    assert out == ["new/00-a-red-circle-4.png", "new/01-a-green-star-5.png"]
    assert files(folder) == [*out, "prompts.txt"]


def test_a_file_that_exists_is_kept_unless_told_otherwise(generate, folder, capsys):
    Path("star.png").write_text("mine")
    assert cli.main(["generate", "a star", "--out", "star.png"]) == 2
    assert capsys.readouterr().err == (
        "localdit: error: star.png exists: choose another --out, or --overwrite it\n"
    )
    assert Path("star.png").read_text() == "mine"
    assert generate("a star", "--out", "star.png", "--overwrite") == ["star.png"]
    assert read_settings("star.png").prompt == "a star"
    assert files(folder) == ["star.png"]


def test_json_lines_say_all_about_each_picture(generate):
    lines = [json.loads(line) for line in generate("a star", "--num", "2", "--seed", "8", "--json")]
    assert [line["seed"] for line in lines] == [8, 9]
    for line in lines:
        settings = vars(read_settings(line["file"]))
        assert {name: line[name] for name in settings} == settings
        assert line["seconds"] > 0
        assert line["made_with"]["localdit"] == localdit.__version__


def test_ctrl_c_leaves_whole_pictures_alone_behind(generate, folder, monkeypatch, capsys):
    """The signal comes while the second picture is being written."""
    save = Image.Image.save

    def save_and_interrupt(picture, path, **kwargs):
        save(picture, path, **kwargs)
        if len(files(folder)) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Image.Image, "save", save_and_interrupt)
    assert generate("a star", "--num", "3", "--seed", "1", code=130) == ["outputs/a-star-1.png"]
    assert files(folder) == ["outputs/a-star-1.png"]
    assert pixels("outputs/a-star-1.png").shape == (64, 64, 3)


# --- Messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is no prompt: give one, or --prompt-file, or --from-png"),
        (["a", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (
            ["a", "--steps", "many"],
            "argument --steps: invalid int value: 'many' (see localdit generate --help)",
        ),
        (["a", "--guidance", "nan"], "guidance must be a number from 0 to 100, got nan"),
        (["a", "--seed", "-1"], "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        (["a", "--num", "0"], "--num must be at least 1, got 0"),
        (["a", "--size", "64x"], "argument --size: must be WIDTHxHEIGHT or one number, got '64x'"),
        (["a", "--size", "0"], "size must be a width and a height in pixels, got (0, 0)"),
        (["a", "--strength", "0.5"], "--strength says how far to leave --image, which is not given"),
        (["a", "--image", "missing.png"], "missing.png is no file"),
        (["a", "--prompt-file", "missing.txt"], "missing.txt: No such file or directory"),
        (["a", "--model", "missing/folder/"], "there is no folder missing/folder/, and it is no hub name"),
        (["a", "--model", "."], ". is no pipeline folder: it holds no model_index.json"),
        (["a", "--out", "a.jpg"], "--out a.jpg: pictures are written as .png, which holds their settings"),
        (["a", "--out", "{name}.png"], "--out may hold {slug}, {seed} and {index}, got {name}.png"),
        (["a", "b", "--out", "a.png"], "--out a.png names one file for 2 pictures: add {index} or {seed}"),
        (["a", "--device", "tpu:0"], "PyTorch knows no device tpu:0"),
        (["a", "--frames", "2"], "unrecognized arguments: --frames 2"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(args, message, folder, monkeypatch, capsys):
    monkeypatch.setattr(cli.generate, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    try:
        code = cli.main(["generate", *args])
    except SystemExit as exit_:  # as argparse leaves
        code = exit_.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith(f"localdit: error: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert files(folder) == []


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no prompt"):
        cli.main(["generate", "--debug"])


def test_an_error_of_a_library_is_named(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cli.generate, "load_pipeline", fail)
    assert cli.main(["generate", "a star", "--quiet"]) == 2
    assert capsys.readouterr().err == "localdit: error: RuntimeError: out of memory\n"


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"localdit {localdit.__version__}\n"
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    for command in ("generate", "convert", "train", "evaluate", "benchmark"):
        assert f"    {command} " in overview
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


# --- The other commands -------------------------------------------------------------------------------------


@pytest.fixture
def published(folder) -> str:
    """A checkpoint in the published layout, without global context."""
    toy_transformer(global_context=False).save_single_file("published.safetensors")
    return "published.safetensors"


def test_convert_goes_to_a_folder_and_back(published, capsys):
    """By default the absent branch is folded in, which nothing can undo; "none" leaves the weights alone."""
    options = [
        "--global-context",
        "none",
        "--sample-size",
        "8",
        "--config",
        "norm_eps=1e-5",
        "qk_norm_eps=1e-9",
    ]
    assert cli.main(["convert", published, "transformer", *options]) == 0
    said = capsys.readouterr()
    assert said.out == "transformer\n"
    assert "chosen:" in said.err
    config = json.loads(Path("transformer/config.json").read_text())
    assert (config["sample_size"], config["norm_eps"], config["qk_norm_eps"]) == (8, 1e-5, 1e-9)

    assert cli.main(["convert", "transformer", "back.safetensors"]) == 0
    before, after = (safetensors.torch.load_file(name) for name in (published, "back.safetensors"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_convert_puts_a_pipeline_together(published, model, generate, capsys):
    parts = [option for part in ("vae", "text-encoder", "scheduler") for option in (f"--{part}", model)]
    arguments = ["convert", published, "whole", "--pipeline", "--sample-size", "8", *parts]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == "whole\n"
    assert len(generate("a star", "--model", "whole")) == 1

    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("localdit: error: target must be empty or new")
    assert cli.main([*arguments, "--overwrite", "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vae", "vae"], "--vae is a part of a pipeline: add --pipeline"),
        (["--text-encoder", "t5"], "--text-encoder is a part of a pipeline: add --pipeline"),
        (["--config", "rope=maybe"], "argument --config: must be KEY=VALUE with a JSON value"),
        (["--global-context", "half"], "argument --global-context: invalid choice: 'half'"),
    ],
)
def test_convert_says_what_is_wrong(options, message, capsys):
    try:
        code = cli.main(["convert", "in.safetensors", "out", *options])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert capsys.readouterr().err.startswith(f"localdit: error: {message}")


def test_train_takes_values_in_place_of_the_files(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "localdit.training.loop.train", lambda config, resume: seen.append((config, resume)) or "runs/x/final"
    )
    Path("run.yaml").write_text(
        "output_dir: runs/x\nmodel: {}\nobjective: {}\ntrain: {max_steps: 9, batch_size: 2}"
    )
    assert cli.main(["train", "run.yaml", "train.max_steps=3", "--resume", "never"]) == 0
    assert capsys.readouterr().out == "runs/x/final\n"
    [(config, resume)] = seen
    assert (config.train.max_steps, config.train.batch_size, resume) == (3, 2, "never")

    assert cli.main(["train", "run.yaml", "train.steps=3"]) == 2
    assert "train.steps" in capsys.readouterr().err


def test_evaluate_counts_what_is_right(model, folder, monkeypatch, capsys):
    arguments = ["evaluate", "--scenes", "--model", model, "--count", "3", "--steps", "1", "--seed", "4"]
    assert cli.main([*arguments, "--out", "scenes", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["count"], result["seed"], result["num_inference_steps"]) == (3, 4, 1)
    assert "scenes/scenes.json" in files(folder)

    result["one_object"]["relation"], result["two_objects"]["relation"] = None, 0.8125
    monkeypatch.setattr("localdit.evaluation.scenes.evaluate_scenes", lambda *args, **kwargs: result)
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["right,", "in", "%", "one", "object", "two", "objects"]
    assert table[-1].split() == ["relation", "-", "81.2"]

    assert cli.main([*arguments, "--count", "0"]) == 2
    assert capsys.readouterr().err == "localdit: error: --count must be at least 1, got 0\n"


def test_benchmark_prints_a_table_or_json(monkeypatch, capsys):
    result = speed.Result(
        device="cpu",
        dtype="float32",
        size=64,
        batch=2,
        threads=1,
        pairs=3,
        global_context=True,
        seconds=1.5,
        pixart_seconds=3.0,
        ratio=2.0,
        ratio_low=1.9,
        ratio_high=2.1,
    )
    seen = []
    monkeypatch.setattr(speed, "benchmark", lambda *args: seen.append(args) or [result])
    assert cli.main(["benchmark", "--size", "64", "--batch", "2", "--threads", "1", "--pairs", "3"]) == 0
    assert seen == [(64, 3, 2, "float32", 1, None)]
    table = capsys.readouterr().out.splitlines()
    assert table[-1].split() == ["cpu", "with", "1.500s", "3.000s", "2.00", "1.90", "to", "2.10"]
    assert cli.main(["benchmark", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(result)
