"""The examples and the notebook run on LocalDiT-Mini as a user runs them, each in a process of its own.

Steps are few, so that each is a matter of seconds; what the pictures show is measured elsewhere.
"""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from localdit import LocalDiTPipeline

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
TESTED = {
    "text_to_image.py",
    "image_to_image.py",
    "larger_than_trained.py",
    "subclass_the_transformer.py",
    "train_on_a_laptop.py",
    "tour_of_localdit_mini.ipynb",
}


def run(name: str, folder: Path, *arguments: str) -> tuple[list[str], np.ndarray]:
    """What an example printed, and the picture (height, width, 3) whose path came last."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    *said, path = done.stdout.splitlines()
    assert Path(path).parts[0] == "outputs"
    with Image.open(folder / path) as picture:
        return said, np.asarray(picture, dtype=float)


def test_every_example_is_tested_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == TESTED


def test_text_to_image_draws_each_prompt(tmp_path):
    _, picture = run("text_to_image.py", tmp_path, "a green star", "a red circle", "--steps", "2")
    assert picture.shape == (128, 256, 3)
    star, circle = np.split(picture, 2, axis=1)
    assert np.abs(star - circle).max() > 50


def test_image_to_image_leaves_its_start_the_further_the_stronger_it_is(tmp_path):
    options = ("--steps", "10", "--strengths", "0.1", "1.0")
    _, picture = run("image_to_image.py", tmp_path, *options)
    start, near, far = np.split(picture, 3, axis=1)
    assert 1 < np.abs(near - start).mean() < np.abs(far - start).mean()


def test_larger_than_trained_gives_the_size_asked_for_beside_the_trained_one(tmp_path):
    _, picture = run("larger_than_trained.py", tmp_path, "--steps", "2", "--width", "256", "--height", "144")
    assert picture.shape == (144, 128 + 8 + 256 + 8 + 256, 3)


def test_a_subclass_starts_as_its_parent_and_comes_back_from_its_folder(tmp_path):
    said, picture = run("subclass_the_transformer.py", tmp_path, "--steps", "2")
    assert [line.rsplit(": ")[1] for line in said[1:]] == ["True", "True"]
    silent, tinted = np.split(picture, 2, axis=1)
    assert np.abs(silent - tinted).max() > 10
    config = json.loads((tmp_path / "outputs/subclass_the_transformer/config.json").read_text())
    assert (config["_class_name"], config["tint_channels"]) == ("TintedLocalDiT", 3)


def test_training_ends_with_a_pipeline_that_draws(tmp_path):
    options = ("--steps", "2", "--scenes", "8", "--sampling-steps", "2")
    _, picture = run("train_on_a_laptop.py", tmp_path, *options)
    assert picture.shape == (128, 3 * 128, 3)
    run_folder = tmp_path / "outputs/train_on_a_laptop"
    losses = [json.loads(line)["loss"] for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert isinstance(LocalDiTPipeline.from_pretrained(run_folder / "final"), LocalDiTPipeline)


def test_the_notebook_runs_from_end_to_end():
    notebook = nbformat.read(EXAMPLES / "tour_of_localdit_mini.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = "steps, judged = 2, 4"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    for sentence in ("of 4 right", "398,780,368", "518,662,672", "the same picture: True"):
        assert sentence in text
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 8


def test_the_page_of_the_model_names_what_is_there():
    """Every name in the column for the code of its first table."""
    page = (REPOSITORY / "docs/models/local_dit.md").read_text(encoding="utf-8")
    table = page.split("| the description | the code |")[1].split("\n\n")[0]
    cells = [row.split(" | ")[1] for row in table.splitlines()[2:]]
    model = import_module("localdit.models.local_dit")
    built = (REPOSITORY / "localdit/models/local_dit.py").read_text(encoding="utf-8")
    named = 0
    for cell in cells:
        place = re.match(r"`(localdit/[\w/]+)\.py`", cell)
        module = import_module(place[1].replace("/", ".")) if place else model
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", cell.replace(place[0], "") if place else cell):
            found = module
            for part in name.split("."):
                found = getattr(found, part, None)
            assert found is not None or f"self.{name} = " in built, name
            named += 1
    assert named > 25


@pytest.mark.parametrize(
    "link",
    sorted(
        set(
            re.findall(
                r"\]\((\.\./[^)#]+)", (REPOSITORY / "docs/models/local_dit.md").read_text(encoding="utf-8")
            )
        )
    ),
)
def test_the_page_of_the_model_links_to_files(link):
    assert (REPOSITORY / "docs/models" / link).is_file()
