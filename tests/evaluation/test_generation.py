"""Pictures to measure: each is the one made alone, kept ones count if they fit, processes share the work."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

from localdit.evaluation.generation import check_kept, draw, fingerprint, generate
from localdit.pictures import Settings, read_settings, write_png

MADE_WITH = {"scheduler": "Noise", "weights": "w0"}


class Noise:
    """A pipeline whose pictures depend on prompt and generator alone; stops when its time has come."""

    def __init__(self, stop_at: int | None = None):
        self.calls: list[tuple[list[str], dict]] = []
        self.stop_at = stop_at

    def set_progress_bar_config(self, **kwargs):
        assert kwargs == {"disable": True}

    def __call__(self, prompts, generator, **options):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((prompts, options))
        noise = [torch.rand(8, 8, 3, generator=g) + len(p) for p, g in zip(prompts, generator)]
        return SimpleNamespace(
            images=[Image.fromarray((n * 25).byte().numpy()) for n in noise],
        )


def wanted(folder: Path, count: int = 5, seed: int = 3, **settings) -> dict[Path, Settings]:
    return {
        folder / f"{i:05}.png": Settings(prompt="a" * i, seed=seed + i, dtype="float32", **settings)
        for i in range(count)
    }


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_every_picture_is_the_one_made_alone_with_its_seed(tmp_path):
    pipeline = Noise()
    plan = wanted(tmp_path, size=(32, 16), steps=4, guidance=2.5, negative="a star")
    generate(pipeline, plan, MADE_WITH, batch_size=2)
    assert [len(prompts) for prompts, _ in pipeline.calls] == [2, 2, 1]
    for path, settings in plan.items():
        [alone] = draw(Noise(), [settings.prompt], [settings.seed])
        assert (pixels(path) == np.asarray(alone)).all()
        assert read_settings(str(path)) == settings
    for _, options in pipeline.calls:
        assert options == {
            "negative_prompt": "a star",
            "width": 32,
            "height": 16,
            "num_inference_steps": 4,
            "guidance_scale": 2.5,
        }


def test_what_was_stopped_goes_on_with_the_pictures_that_are_there(tmp_path):
    plan = wanted(tmp_path / "stopped", count=7)
    with pytest.raises(KeyboardInterrupt):
        generate(Noise(stop_at=2), plan, MADE_WITH, batch_size=2)
    assert names(tmp_path) == [path.name for path in list(plan)[:4]]
    assert check_kept(tmp_path / "stopped", plan, "w0") == 4
    times = {path: path.stat().st_mtime_ns for path in plan if path.exists()}

    rest = Noise()
    generate(rest, plan, MADE_WITH, batch_size=2)
    assert [prompts for prompts, _ in rest.calls] == [["a" * 4, "a" * 5], ["a" * 6]]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole = wanted(tmp_path / "whole", count=7)
    generate(Noise(), whole, MADE_WITH)
    for one, other in zip(plan, whole):
        assert (pixels(one) == pixels(other)).all()


def test_processes_share_the_pictures_and_make_what_one_makes(tmp_path):
    together, alone = (wanted(tmp_path / name, count=8) for name in ("together", "alone"))
    generate(Noise(), alone, MADE_WITH)
    for rank in (2, 0, 1):
        pipeline = Noise()
        generate(pipeline, together, MADE_WITH, batch_size=2, rank=rank, world=3)
        made = [len(prompt) for prompts, _ in pipeline.calls for prompt in prompts]
        assert made == list(range(rank, 8, 3))
    for one, other in zip(together, alone):
        assert (pixels(one) == pixels(other)).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"guidance": 3.0},
            "00000.png was made with guidance None, and this evaluation has 3.0: choose another",
        ),
        ({"seed": 4}, "00000.png was made with seed 3, and this evaluation has 4"),
        ({"model": "o/m"}, "00000.png was made with model 'mini', and this evaluation has 'o/m'"),
        ({"count": 4}, "00004.png is not of this evaluation: choose another folder"),
    ],
)
def test_pictures_of_other_settings_are_refused(tmp_path, changed, message):
    generate(Noise(), wanted(tmp_path), MADE_WITH)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        check_kept(tmp_path, wanted(tmp_path, **changed), "w0")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_pictures_of_other_weights_and_of_strangers_are_refused(tmp_path):
    plan = wanted(tmp_path)
    generate(Noise(), plan, MADE_WITH)
    with pytest.raises(ValueError, match="was made when mini had other weights or another configuration"):
        check_kept(tmp_path, plan, "w1")

    first = next(iter(plan))
    by_generate = {"scheduler": "Noise"}
    write_png(Image.new("RGB", (8, 8)), first, plan[first], by_generate)
    with pytest.raises(ValueError, match=r"00000\.png was made when mini had other weights"):
        check_kept(tmp_path, plan, "w0")
    Image.new("RGB", (8, 8)).save(first)
    with pytest.raises(ValueError, match=r"00000\.png carries no settings of localdit"):
        check_kept(tmp_path, plan, "w0")
    first.unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert check_kept(tmp_path, plan, "w0") == 4


class Part(nn.Module, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, window_size: int = 4):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(5))
        self.to(torch.bfloat16)


def test_the_fingerprint_sees_every_weight_and_every_config():
    torch.manual_seed(0)
    pipeline = SimpleNamespace(components={"transformer": Part(), "vae": None, "tokenizer": "words"})
    first = fingerprint(pipeline)
    assert fingerprint(pipeline) == first
    seen = {first}

    part = pipeline.components["transformer"]
    with torch.no_grad():
        for tensor in part.state_dict().values():
            before = tensor.clone()
            tensor.view(-1)[-1:] += 1
            seen.add(fingerprint(pipeline))
            tensor.copy_(before)
    part.register_to_config(window_size=8)
    seen.add(fingerprint(pipeline))
    assert len(seen) == 5
    part.register_to_config(window_size=4, _name_or_path="moved")
    assert fingerprint(pipeline) == first


def test_a_picture_whose_making_stops_leaves_nothing_behind(tmp_path, monkeypatch):
    save = Image.Image.save

    def save_half(picture, path, **kwargs):
        save(picture, path, **kwargs)
        Path(path).write_bytes(Path(path).read_bytes()[:50])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", save_half)
    plan = wanted(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        generate(Noise(), plan, MADE_WITH)
    assert names(tmp_path) == []
