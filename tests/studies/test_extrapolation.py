"""The study of extrapolation: its twins are LEDiT's network with positions, and it runs from end to end."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from localdit import LEDiTTransformer2DModel
from localdit.data.scenes import COLORS, SHAPES, class_name, scene

FOLDER = Path(__file__).parents[2] / "docs/studies"
SIZES = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12, "sample_size": 8}
PLAIN = {**SIZES, "num_classes": 5, "attention_pattern": "none", "conv_kernel_size": 0}


@pytest.fixture
def study(monkeypatch):
    """The script as a module, found as the script itself finds what lies beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import extrapolation

    yield extrapolation
    for name in ("extrapolation", "pages"):
        del sys.modules[name]


def randomised(model):
    """`model` with weights that depend on their names alone."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name) + parameter.numel())
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def shuffled(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The patches of x, (B, C, 12, 12), in another order."""
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)[:, :, order]  # (B, C, N, 2, 2)
    return patches.unflatten(2, (6, 6)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


@pytest.mark.parametrize("twin", ["SineDiT", "RotaryDiT"])
def test_a_twin_differs_from_the_plain_network_in_its_positions_alone(study, twin):
    plain = randomised(LEDiTTransformer2DModel(**PLAIN))
    kind = getattr(study, twin)
    without, placed = randomised(kind(**PLAIN, positions=False)), randomised(kind(**PLAIN))
    assert placed.state_dict().keys() == plain.state_dict().keys()
    inputs = torch.randn(2, 4, 12, 12), torch.tensor([30, 700]), torch.tensor([4, 1])
    torch.testing.assert_close(without(*inputs).sample, plain(*inputs).sample, rtol=0, atol=0)

    order = torch.randperm(36)
    for model, knows_places in ((without, False), (placed, True)):
        moved = model(shuffled(inputs[0], order), *inputs[1:]).sample
        difference = (moved - shuffled(model(*inputs).sample, order)).abs().max()
        assert (difference > 1e-2) == knows_places
        assert knows_places or difference < 1e-4


def test_the_rotary_twin_sees_distances_and_the_sine_cosine_one_places(study):
    """Of a constant picture all queries and keys are alike but for their rotation, which says how far apart
    two tokens are: attention over equal values shows nothing of it. A table shows."""
    inputs = torch.full((1, 4, 8, 8), 0.7), torch.tensor([300]), torch.tensor([2])
    for kind, uniform in ((study.RotaryDiT, True), (study.SineDiT, False)):
        sample = randomised(kind(**PLAIN))(*inputs).sample
        patches = sample.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)  # (1, C, N, 2, 2)
        spread = (patches - patches[:, :, :1]).abs().max()
        assert (spread < 1e-4) == uniform


def test_the_positions_of_a_smaller_picture_are_those_of_the_larger_ones_corner(study):
    model = randomised(study.SineDiT(**PLAIN))
    x = torch.randn(2, 4, 12, 12)
    whole, corner = model.patch_embed(x), model.patch_embed(x[:, :, :8, :6])
    torch.testing.assert_close(corner, whole[:, :, :4, :3])


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_study_trains_measures_draws_and_writes(study, tmp_path, monkeypatch, fresh_accelerator):
    toy = [
        "objective.data.source={kind: scene_classes, count: 9, size: 64}",
        "objective.data.resolution=64",
        "model.sample_size=8",
        "model.num_layers=2",
        "objective.layout_block=1",
        "train.max_steps=2",
        "train.batch_size=2",
    ]
    classes = sorted({class_name(scene(i, objects=1)) for i in range(9)})
    arms = {}
    for arm in ("LEDiT", "RoPE", "LocalDiT"):
        recipe, changes = study.ARMS[arm]
        counted = [f"model.num_classes={len(classes)}"] if recipe == study.LEDIT else []
        place = f"objective.data.cache={tmp_path}/{recipe.parent.name}"
        arms[arm] = (recipe, [*changes, *toy, *counted, place])
    monkeypatch.setattr(study, "ARMS", arms)
    page = tmp_path / "page.md"
    page.write_text(study.PAGE.read_text())
    values = {"RUNS": tmp_path, "PAGE": page, "SEEDS": (5,), "SIDES": (64, 96), "PICTURES": 2}
    values |= {"SHOWN": (classes[0],), "SAMPLING": {"num_inference_steps": 1, "guidance_scale": 2.0}}
    for name, value in values.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.chdir(tmp_path)

    study.main()
    with Image.open(tmp_path / "page.png") as grid:
        assert grid.size == (2 * 64, 3 * 64)
    written = page.read_text()
    rows = [line for line in written.splitlines() if "x96 | colour and shape" in line]
    assert len(rows) == 1
    assert rows[0].count(" % (") == 3
    assert "not been made" not in written
    found = json.loads((tmp_path / "RoPE-5/study.json").read_text())
    assert found.keys() == {"64", "96"}

    monkeypatch.setattr(study, "train", lambda config: pytest.fail("it was trained again"))
    study.main()
    assert page.read_text() == written


def test_localdit_is_asked_for_every_class_by_name(study):
    assert set(study.LocalDiTOfClasses.labels) == {f"{color} {shape}" for color in COLORS for shape in SHAPES}
    assert sorted(study.LocalDiTOfClasses.labels.values()) == list(range(48))
