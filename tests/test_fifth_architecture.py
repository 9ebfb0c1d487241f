"""A fifth architecture costs one model file, one pipeline file and one config: nothing in the package knows
its name."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from localdit.cli import main
from localdit.pictures import read_settings

FILES = Path(__file__).parent / "fifth_architecture"


@pytest.fixture
def rowdit(monkeypatch, tmp_path):
    """Its two modules on the path, and an empty working folder."""
    monkeypatch.syspath_prepend(str(FILES))
    monkeypatch.chdir(tmp_path)
    import rowdit
    import rowdit_pipeline

    yield rowdit, rowdit_pipeline
    for name in ("rowdit", "rowdit_pipeline"):
        sys.modules.pop(name, None)


def random_model(module, **config):
    torch.manual_seed(0)
    model = module.RowDiTTransformer2DModel(num_classes=7, sample_size=8, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_the_model_is_saved_loaded_and_refused_like_ours(rowdit, tmp_path):
    model = random_model(rowdit[0], num_layers=3)
    x, labels = torch.randn(2, 4, 12, 8), torch.tensor([1, 7])
    expected = model(x, torch.tensor([3.0, 900.0]), labels).sample
    model.save_pretrained(tmp_path / "model")
    loaded = rowdit[0].RowDiTTransformer2DModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(x, torch.tensor([3.0, 900.0]), labels).sample, expected)
    with pytest.raises(ValueError, match="hidden_states"):
        model(torch.randn(2, 4, 11, 8), torch.tensor([3.0, 900.0]), labels)
    (tmp_path / "model" / "config.json").write_text('{"num_layers": 4, "num_classes": 7}')
    with pytest.raises(ValueError, match=r"missing|lacks"):
        rowdit[0].RowDiTTransformer2DModel.from_pretrained(tmp_path / "model")


def test_the_pipeline_is_saved_and_loaded_and_a_picture_is_the_one_made_alone(rowdit, tmp_path):
    from diffusers import DDIMScheduler

    names = dict(enumerate(("ant", "bee", "cat", "dog", "elk", "fox", "gnu")))
    pipe = rowdit[1].RowDiTPipeline(
        transformer=random_model(rowdit[0]), scheduler=DDIMScheduler(), id2label=names
    )
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = rowdit[1].RowDiTPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)

    def latents(labels, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return loaded(labels, generator=generators, output_type="latent").images

    both = latents(["bee", 6], (1, 2))
    assert both.shape == (2, 4, 8, 8)
    torch.testing.assert_close(both[1:], latents("gnu", (2,)), rtol=0, atol=1e-5)


def test_it_is_trained_and_used_from_the_command_line(rowdit, tmp_path, capsys):
    assert main(["train", str(FILES / "rowdit.yaml")]) == 0
    final = Path("runs/rowdit/final")
    log = [json.loads(line) for line in Path("runs/rowdit/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any("validation_loss" in line for line in log)
    assert size_of("runs/rowdit/preview-00000012.png") == (4 * 128, 2 * 128)

    capsys.readouterr()
    assert main(["verify", str(final)]) == 0
    named = ["--pipeline", "rowdit_pipeline.RowDiTPipeline"]
    options = ["--label", "green star", "--model", str(final), "--seed", "3", "--steps", "2"]
    assert main(["generate", *options, *named, "--out", "star.png"]) == 0
    assert size_of("star.png") == (128, 128)
    settings = read_settings("star.png")
    assert (settings.label, settings.steps, settings.guidance) == ("green star", 2, 2.0)
    assert main(["generate", *options]) == 2  # what a folder says imports nothing
    assert "RowDiTPipeline, and localdit has" in capsys.readouterr().err
