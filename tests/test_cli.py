"""The command line: files, settings and messages, with a toy pipeline whose weights are drawn at random."""

import dataclasses
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from toy_clip import save_toy_clip
from toy_pipeline import toy_pipeline, toy_transformer

import localdit
from localdit import cli
from localdit.evaluation import speed, streaming
from localdit.evaluation.scenes import evaluation_prompts
from localdit.evaluation.timing import Setup, Spread
from localdit.pictures import Settings, read_settings
from localdit.pipelines import PIPELINES


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
    """How far to leave a picture is one default for all; the rest is each pipeline's own."""
    for pipeline in PIPELINES:
        assert Settings.strength == inspect.signature(pipeline.__call__).parameters["strength"].default


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


def test_a_mask_says_what_of_the_picture_is_painted(generate, scene, capsys):
    white = np.zeros((48, 64), dtype=bool)
    white[8:24, 30:50] = True
    Image.fromarray(white).save("mask.png")
    [path] = generate("a star", "--image", scene, "--mask", "mask.png", "--seed", "1")
    start = np.asarray(Image.open(scene))
    assert (pixels(path)[~white] == start[~white]).all()
    assert (pixels(path)[white] != start[white]).any()
    settings = read_settings(path)
    assert (settings.image, settings.mask) == tuple(map(os.path.abspath, (scene, "mask.png")))

    [again] = generate("--from-png", path)
    assert (pixels(again) == pixels(path)).all()
    Image.fromarray(~white).save("mask.png")
    assert cli.main(["generate", "--from-png", path]) == 2
    assert "mask.png is not what outputs/a-star-1.png was made from: give --mask" in capsys.readouterr().err
    [other] = generate("--from-png", path, "--mask", "mask.png")
    assert (pixels(other)[white] == start[white]).all()
    assert cli.main(["generate", "a star", "--mask", "mask.png"]) == 2
    assert "--mask says what of --image to paint anew, which is not given" in capsys.readouterr().err


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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        assert generate("a star", "--num", "3", "--seed", "1", code=130) == ["outputs/a-star-1.png"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert files(folder) == ["outputs/a-star-1.png"]
    assert pixels("outputs/a-star-1.png").shape == (64, 64, 3)


# --- Messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is no prompt: give one, or --prompt-file, or --label, or --from-png"),
        (["a", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        (
            ["a", "--steps", "many"],
            "argument --steps: invalid int value: 'many' (see localdit generate --help)",
        ),
        (["a", "--guidance", "nan"], "guidance must be a number from 0 to 100, got nan"),
        (["a", "--seed", "-1"], "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        (["a", "--label", "0"], "a picture shows a prompt or a label, got both"),
        (["a", "--num", "0"], "--num must be at least 1, got 0"),
        (["a", "--size", "64x"], "argument --size: must be WIDTHxHEIGHT or one number, got '64x'"),
        (["a", "--size", "0"], "size must be a width and a height in pixels, got (0, 0)"),
        (["a", "--strength", "0.5"], "--strength says how far to leave --image, which is not given"),
        (["a", "--image", "missing.png"], "missing.png is no file"),
        (["a", "--mask", "missing.png"], "missing.png is no file"),
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

    behind = ["run.yaml", "train.max_steps=3", "--resume", "never", "train.batch_size=1"]
    assert cli.main(["train", *behind]) == 0
    assert seen[-1][0].train.batch_size == 1
    with pytest.raises(SystemExit):
        cli.main(["train", *behind, "--resum", "auto"])
    assert "unrecognized arguments: --resum auto" in capsys.readouterr().err
    with monkeypatch.context() as patch:  # one of several processes
        patch.setattr("accelerate.PartialState", lambda: SimpleNamespace(is_main_process=False))
        capsys.readouterr()
        assert cli.main(["train", "run.yaml"]) == 0
        assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "required: CONFIG (see" in capsys.readouterr().err
    assert cli.main(["train", "run.yaml", "train.steps=3"]) == 2
    assert "train.steps" in capsys.readouterr().err


@pytest.fixture
def extractor(monkeypatch) -> None:
    """A small random network in the place of the published InceptionV3."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(23), nn.Flatten(), nn.Linear(3 * 13 * 13, 8))
    monkeypatch.setattr("localdit.evaluation.distance.load_inception", lambda weights: network)


@pytest.fixture
def evaluate(model, capsys):
    """Run `localdit evaluate`, with the toy and one step where pictures are made; stdout and stderr."""

    def run(*args: str, code: int = 0) -> tuple[str, str]:
        making = [] if "--images" in args else ["--model", model, "--steps", "1"]
        assert cli.main(["evaluate", *args, *making]) == code
        return capsys.readouterr()

    return run


def test_evaluate_counts_what_is_right_in_scenes(evaluate, model, folder):
    out, _ = evaluate("--scenes", "--count", "3", "--seed", "4", "--out", "scenes", "--json")
    result = json.loads(out)
    assert (result["count"], result["seed"], result["settings"]["steps"]) == (3, 4, 1)
    pictures = [f"images/0000{i}.png" for i in range(3)]
    assert files(folder) == sorted(
        f"scenes/{name}" for name in (".lock", "grid.png", "results.json", *pictures)
    )
    report = json.loads(Path("scenes/results.json").read_text())
    assert [line["file"] for line in report["pictures"]] == pictures
    for line, seed in zip(report["pictures"], (4, 5, 6)):
        settings = read_settings(f"scenes/{line['file']}")
        assert (settings.prompt, settings.seed) == (line["prompt"], line["seed"]) == (line["prompt"], seed)
    single = [len(scene.objects) == 1 for scene, _ in evaluation_prompts(3, seed=4)]
    right = [line["count"] for line, alone in zip(report["pictures"], single) if alone]
    assert result["one_object"]["count"] == pytest.approx(sum(right) / len(right), abs=1e-4)

    out, _ = evaluate("--scenes", "--count", "3", "--seed", "4")  # the same figures, and nothing is kept
    table = out.splitlines()
    assert table[0].split() == ["right,", "in", "%", "one", "object", "two", "objects"]
    assert table[1].split()[0] == "count"
    assert table[-1].split()[:2] == ["relation", "-"]
    share = result["two_objects"]["relation"]
    assert table[-1].split()[-1] == ("-" if share is None else f"{100 * share:.1f}")
    assert len(files(folder)) == 6


def test_evaluate_measures_the_same_pictures_in_several_ways(evaluate, folder, monkeypatch, extractor):
    pytest.importorskip("torchmetrics")
    save_toy_clip(folder / "clip")
    Path("prompts.txt").write_text("a red circle\n\na green star\na blue square\n", encoding="utf-8")
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)
        Path("real").mkdir(exist_ok=True)
        Image.fromarray(noise).save(f"real/{i}.jpg")
    Path("real/4.jpg").write_bytes(b"")

    measures = ["--reference", "real", "--clip-score", "clip"]
    out, said = evaluate("--prompts", "prompts.txt", "--num", "2", *measures, "--out", "out")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert list(rows) == ["FID", "KID", "CLIP"]
    assert "6 pictures against 4 of real" in rows["FID"]
    assert "real/4.jpg is empty: left out" in said
    assert "localdit: warning: FID of 6 pictures against 4 comes out too large" in said
    report = json.loads(Path("out/results.json").read_text())
    assert report["unreadable"] == {"real/4.jpg": "is empty"}
    assert [line["prompt"] for line in report["pictures"]][1:4] == [
        "a red circle",
        "a green star",
        "a green star",
    ]
    scores = [line["clip_score"] for line in report["pictures"]]
    assert report["clip_score"] == pytest.approx(sum(scores) / 6)
    assert report["settings"]["prompts"] == "prompts.txt"

    # The same pictures, found in their folder, tell their prompts themselves.
    out, _ = evaluate("--images", "out/images", *measures, "--json")
    again = json.loads(out)
    for name in ("fid", "kid", "clip_score"):
        assert again[name] == pytest.approx(report[name], rel=1e-9)
    assert "seed" not in again


def test_a_picture_of_an_evaluation_is_the_one_that_generate_makes(evaluate, generate):
    evaluate("--scenes", "--count", "3", "--out", "out")
    [again] = generate("--from-png", "out/images/00001.png")
    difference = pixels(again).astype(int) - pixels("out/images/00001.png")
    assert abs(difference).max() <= 1  # it was one of a batch: the last bit may be rounded otherwise


def test_evaluate_goes_on_with_what_is_there_and_mixes_nothing(evaluate, model, folder):
    arguments = ["--scenes", "--count", "4", "--out", "out"]
    first = json.loads(evaluate(*arguments, "--json")[0])
    before = {name: pixels(f"out/images/{name}").tolist() for name in files(folder / "out/images")}
    times = {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()}
    Path("out/images/00002.png").unlink()
    out, said = evaluate(*arguments, "--json", "--batch-size", "1")
    assert json.loads(out) == first
    assert "4 pictures, 3 of them there already" in said
    kept = {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()}
    assert [path.name for path in times if times[path] != kept[path]] == ["00002.png"]

    _, said = evaluate(*arguments, "--guidance", "3", code=2)
    assert said == (
        "localdit: error: out/images/00000.png was made with guidance 7.0, and this evaluation has 3.0: "
        "choose another folder for this evaluation\n"
    )
    assert {name: pixels(f"out/images/{name}").tolist() for name in before} == before


def test_evaluate_writes_what_the_judge_of_geneval_reads(evaluate, folder):
    lines = [
        {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": "a red star"},
        {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle\u2028"},
        {"tag": "counting", "prompt": "two stars"},
    ]
    Path("geneval.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    out, _ = evaluate(
        "--geneval", "geneval.jsonl", "--count", "2", "--num", "3", "--seed", "9", "--out", "out"
    )
    assert out == "6 pictures in out/images\n"
    samples = [f"{p:05}/samples/{i:04}.png" for p in range(2) for i in range(3)]
    metadata = [f"{p:05}/metadata.jsonl" for p in range(2)]
    assert files(folder / "out/images") == sorted(samples + metadata)
    for name, line in zip(metadata, lines):
        assert json.loads(Path("out/images", name).read_text(encoding="utf-8")) == line
    settings = [read_settings(f"out/images/{name}") for name in samples]
    assert [s.seed for s in settings] == list(range(9, 15))
    assert [s.prompt for s in settings] == ["a red star"] * 3 + ["a circle\u2028"] * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "one of the arguments --scenes --prompts --geneval --images is required"),
        (["--scenes", "--images", "real"], "argument --images: not allowed with argument --scenes"),
        (["--scenes", "--count", "0"], "--count must be at least 1, got 0"),
        (["--scenes", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--scenes", "--num", "2"], "--num is for --prompts and --geneval; the scenes have --count"),
        (["--scenes", "--seed", "-1"], "seed must be a whole number from 0"),
        (
            ["--scenes", "--inception", "w.pth"],
            "--inception is for FID and KID, whose --reference is not given",
        ),
        (
            ["--images", "real"],
            "there is nothing to measure: add --reference FOLDER (FID and KID) or --clip-score",
        ),
        (["--prompts", "p.txt", "--out", "o"], "there is nothing to measure: add --reference"),
        (["--prompts", "p.txt", "--reference", "r"], "--out must name the folder for the pictures"),
        (["--geneval", "g.jsonl"], "--out must name the folder for the pictures"),
        (["--geneval", "g.jsonl", "--out", "o"], "g.jsonl: No such file or directory"),
        (
            ["--images", "r", "--steps", "3", "--clip-score"],
            "--steps says how pictures are made, and those of",
        ),
        (["--images", "r", "--reference", "r"], "r is no folder"),
        (["--scenes", "--reference", "r"], "r is no folder"),
        (
            ["--scenes", "--model", "missing/folder/"],
            "there is no folder missing/folder/, and it is no hub name",
        ),
        (["--scenes", "--clip-score", "missing/folder/"], "no CLIP could be loaded from missing/folder/"),
    ],
)
def test_evaluate_says_what_is_wrong_before_anything_is_made(args, message, folder, monkeypatch, capsys):
    monkeypatch.setattr(cli.evaluate, "load_pipeline", lambda *args: pytest.fail("a model was loaded"))
    try:
        code = cli.main(["evaluate", *args])
    except SystemExit as exit_:
        code = exit_.code
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith(f"localdit: error: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("line", ["a red star", '{"tag": "colors"}', "[1]", '{"prompt": 3}'])
def test_geneval_prompts_that_are_none_are_named(line, capsys):
    Path("g.jsonl").write_text('{"prompt": "a"}\n' + line)
    assert cli.main(["evaluate", "--geneval", "g.jsonl", "--out", "o"]) == 2
    assert (
        'g.jsonl, line 2 must be a JSON object with a text as "prompt", got ' + line
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(model, folder):
    """Each makes every other picture; the first measures them all."""
    arguments = ["evaluate", "--scenes", "--count", "5", "--steps", "1", "--model", model, "--json", "--out"]
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = ["-m", "accelerate.commands.launch", *options, "--num_processes", "2", "-m", "localdit.cli"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def run(how: list[str], *last: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *how, *arguments, *last]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    one, two = run(["-m", "localdit.cli"], "one"), run(launch, "two")
    assert json.loads(one.stdout) == json.loads(two.stdout)
    # With --cpu, accelerate would start one process alone.
    assert "several processes" in run(launch, "three", "--device", "cpu").stderr
    for name in files(folder / "one/images"):
        assert (pixels(f"one/images/{name}") == pixels(f"two/images/{name}")).all()


def test_benchmark_streaming_prints_a_table_or_json(monkeypatch, capsys):
    asked = []

    def benchmark(cases):
        asked.extend(cases)
        for case in cases:
            yield streaming.Result(case, 16, 1_000, 2_000_000_000, 1.5, 1.0)

    monkeypatch.setattr(streaming, "benchmark", benchmark)
    assert cli.main(["benchmark", "--streaming", "--size", "64", "128", "--threads", "1"]) == 0
    assert asked == [streaming.Case(64, threads=1), streaming.Case(128, threads=1)]
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 64", "| 128"]
    assert "2.00 GB" in rows[2]

    assert cli.main(["benchmark", "--streaming", "--json", "--dtype", "bfloat16"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"]["size"] for line in lines] == list(streaming.SIZES)
    assert {line["case"]["dtype"] for line in lines} == {"bfloat16"}

    both = ["--models", "local", "global", "--size", "64", "--out", "out"]
    assert cli.main(["benchmark", "--streaming", *both]) == 0
    printed = capsys.readouterr().out
    assert Path("out/streaming.md").read_text() == printed
    assert [row.split(" | ")[3] for row in printed.splitlines()[2:]] == ["without", "with"]
    assert len(json.loads(Path("out/streaming.json").read_text())) == 2
    assert Path("out/streaming.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--streaming", "--pairs", "3"], "--pairs has no meaning with --streaming"),
        (["--streaming", "--guidance", "on"], "--guidance has no meaning with --streaming"),
        (["--streaming", "--models", "pixart-sigma"], "--models must be local or global with --streaming"),
        (["--masking", "--models", "local"], "--models has no meaning with --masking"),
        (["--masking", "--out", "out"], "--out has no meaning with --masking"),
        (["--masking", "--streaming"], "--streaming has no meaning with --masking"),
    ],
)
def test_benchmark_refuses_what_a_mode_would_ignore(args, message, capsys):
    assert cli.main(["benchmark", *args]) == 2
    assert message in capsys.readouterr().err


def test_benchmark_streaming_refuses_a_device_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["benchmark", "--streaming", "--device", "cuda"]) == 2
    assert "device must be one of cpu here, got 'cuda'" in capsys.readouterr().err


def test_benchmark_prints_tables_or_json_and_writes_files(monkeypatch, capsys, folder):
    about = {"device": "cpu", "dtype": "float32", "size": 64, "batch": 2, "threads": 1, "pairs": 3}
    ours = speed.Result(
        **about,
        guided=True,
        model="global",
        title="LocalDiT, global context",
        blocks=18,
        text_tokens=120,
        seconds=Spread(1.5, 1.4, 1.6),
        ratios={"pixart-alpha": Spread(2.0, 1.9, 2.1)},
        floor_seconds=0.5,
        over_floor=3.0,
    )
    peer = dataclasses.replace(ours, model="pixart-alpha", title="PixArt-alpha XL", ratios={})
    seen = []
    monkeypatch.setattr(speed, "benchmark", lambda *args: seen.append(args) or iter([[ours, peer]]))
    options = ["--models", "global", "pixart-alpha", "--cpu-time", "--guidance", "on", "off"]
    arguments = ["benchmark", "--size", "64", "96", "--batch", "2", "--threads", "1", "--pairs", "3"]
    assert cli.main([*arguments, *options, "--out", "speed"]) == 0
    setup = Setup(pairs=3, threads=1, cpu_time=True)
    assert seen == [(setup, [64, 96], [2], [True, False], ["global", "pixart-alpha"], None, None)]
    printed = capsys.readouterr().out
    assert "CPU, 1 threads: 64 px, batch 2, guidance, float32, 3 rounds" in printed
    assert "2.00 (1.90 to 2.10)" in printed
    assert (
        "| LocalDiT, global context | 1500 | 1400 to 1600 | 3.00 |" in (folder / "speed/speed.md").read_text()
    )
    assert json.loads((folder / "speed/speed.json").read_text())[1]["model"] == "pixart-alpha"
    assert (folder / "speed/speed.png").stat().st_size > 1000

    assert cli.main(["benchmark", "--json"]) == 0
    assert seen[1] == (Setup(), [1024], [1], [False], None, None, None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [dataclasses.asdict(ours), dataclasses.asdict(peer)]
