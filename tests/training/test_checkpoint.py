"""Checkpoints: what is saved comes back, what is damaged is found, nothing that was saved is lost."""

import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import localdit
from localdit.files import MANIFEST, problems
from localdit.training.checkpoint import checkpoints, find_checkpoint, load_checkpoint, save_checkpoint


def some_tensors() -> dict[str, dict[str, torch.Tensor]]:
    """Of several types and shapes, not contiguous, without elements, and in one another's memory."""
    table = torch.randn(5, 3)
    return {
        "model": {"a.weight": torch.randn(4, 6), "a.turned": torch.randn(4, 6).T, "none": torch.zeros(0, 3)},
        "ema": {"a.weight": torch.randn(4, 6).half(), "b": torch.randn(7).bfloat16()},
        "optimizer": {
            "step.a": torch.tensor(3.0),
            "state.a": torch.randint(0, 256, (5,), dtype=torch.uint8),
            "qmap.a": table,
            "qmap.b": table,
            "qmap.part": table[1:3],
        },
    }


def save(folder: Path, step: int, keep: int = 10) -> Path:
    return save_checkpoint(folder, step, {"model": {"w": torch.full((3,), float(step))}}, {}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


# --- Saving and loading -------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    tensors, state = some_tensors(), {"sample": 12, "rate": 1e-4, "config": {"betas": (0.9, 0.99)}}
    path = save_checkpoint(tmp_path / "run", 7, tensors, state, keep=1)
    assert path == tmp_path / "run" / "step-00000007"
    assert names(path) == [
        MANIFEST, "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    loaded, values = load_checkpoint(path)
    assert loaded.keys() == tensors.keys()
    for part, named in tensors.items():
        assert loaded[part].keys() == named.keys()
        for name, tensor in named.items():
            assert loaded[part][name].dtype == tensor.dtype
            assert torch.equal(loaded[part][name], tensor)
    assert (values["step"], values["sample"], values["rate"]) == (7, 12, 1e-4)
    assert values["config"] == {"betas": [0.9, 0.99]}
    assert values["versions"]["localdit"] == localdit.__version__
    assert values["versions"]["torch"] == torch.__version__
    assert (tmp_path / "run" / "latest").read_text() == "step-00000007\n"


def test_tensors_in_training_are_saved_as_they_are(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    path = save_checkpoint(
        tmp_path, 1, {"model": {"w": parameter, "optimizer": torch.zeros(1)}, "optimizer": {}}, {}, 1
    )
    tensors, _ = load_checkpoint(path)
    assert torch.equal(tensors["model"]["w"], parameter)
    assert tensors["optimizer"] == {}
    assert parameter.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_what_is_not_finite_is_never_saved(tmp_path, part, value):
    save(tmp_path, 1)
    tensors = some_tensors()
    tensors[part]["x"] = torch.randn(4, 5)
    tensors[part]["x"][random.randrange(4), random.randrange(5)] = value
    with pytest.raises(FloatingPointError, match=f"x of the {part} is not finite at step 2"):
        save_checkpoint(tmp_path, 2, tensors, {}, keep=1)
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_a_state_that_json_cannot_hold_is_an_error_and_leaves_nothing(tmp_path):
    for value, error in ((float("nan"), ValueError), (torch.zeros(1), TypeError)):
        with pytest.raises(error):
            save_checkpoint(tmp_path, 1, some_tensors(), {"loss": value}, keep=1)
    assert names(tmp_path) == []


def test_the_newest_are_kept(tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000, 100_000_001):  # as numbers, not as texts
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-100000000", "step-100000001"]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, 100_000_002, keep=0)


def test_a_disk_that_is_full_is_an_error_that_names_the_path_and_costs_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    fsync, left = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for fails_at in range(1, 5):  # model, state, manifest, folder
        left = fails_at
        with pytest.raises(
            OSError, match=r"the checkpoint was not saved: .*No space left.*step-00000002"
        ) as caught:
            save(tmp_path, 2)
        assert caught.value.errno == 28
        assert names(tmp_path) == ["latest", "step-00000001"]
        assert find_checkpoint(tmp_path, "auto") == tmp_path / "step-00000001"
    assert save(tmp_path, 2) == find_checkpoint(tmp_path, "auto")


# --- Going back behind a checkpoint -------------------------------------------------------------------------


def test_a_step_that_is_there_is_kept_under_another_name(tmp_path, caplog):
    """A run that was resumed at 1 comes to 2 and 3 again: it goes on, and what it leaves behind stays."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    before = (tmp_path / "step-00000002" / "model.safetensors").read_bytes()
    tensors = {"model": {"w": torch.randn(3)}}
    with caplog.at_level(logging.WARNING):
        path = save_checkpoint(tmp_path, 2, tensors, {}, keep=5)
    assert names(tmp_path) == [
        "latest", "step-00000001", "step-00000002", "step-00000002.old-1", "step-00000003.old-1"
    ]  # fmt: skip
    assert (tmp_path / "step-00000002.old-1" / "model.safetensors").read_bytes() == before
    assert problems(tmp_path / "step-00000003.old-1") == []
    assert len(caplog.records) == 2
    assert "step-00000003, which is kept as step-00000003.old-1" in caplog.text
    assert find_checkpoint(tmp_path, "auto") == path
    assert torch.equal(load_checkpoint(path)[0]["model"]["w"], tensors["model"]["w"])
    assert find_checkpoint(tmp_path, str(tmp_path / "step-00000003.old-1")).name == "step-00000003.old-1"

    save(tmp_path, 3)
    save(tmp_path, 2)
    assert {"step-00000002.old-2", "step-00000003.old-2"} < set(names(tmp_path))


# --- Finding ------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, "auto").name == "step-00000004"
    damage(tmp_path / "step-00000004")
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    (tmp_path / "step-00000099.tmp-1").mkdir()  # of a killed process
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "auto").name == "step-00000002"
    assert len(caplog.records) == 2
    assert "step-00000004 is damaged and passed over: model.safetensors is damaged" in caplog.text
    assert "step-00000003 is damaged and passed over: MANIFEST.json is missing" in caplog.text


def test_never_and_an_empty_run_mean_none(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere", "auto") is None
    assert find_checkpoint(tmp_path, "auto") is None
    save(tmp_path, 1)
    assert find_checkpoint(tmp_path, "never") is None


def test_a_path_is_a_checkpoint_or_a_run(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run", step)
    for path in (tmp_path / "run" / "step-00000001", tmp_path / "run" / "step-00000002", tmp_path / "run"):
        found = find_checkpoint(tmp_path / "other", str(path))
        assert found == (path if path.name != "run" else path / "step-00000002")
    damage(tmp_path / "run" / "step-00000002")
    assert find_checkpoint(tmp_path / "other", str(tmp_path / "run")).name == "step-00000001"
    with pytest.raises(ValueError, match=r"step-00000002 is no whole checkpoint: model.safetensors"):
        find_checkpoint(tmp_path, str(tmp_path / "run" / "step-00000002"))
    for wrong in ("nowhere", str(tmp_path)):
        with pytest.raises(ValueError, match="resume must be auto, never or the path of a checkpoint, got"):
            find_checkpoint(tmp_path, wrong)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: .*resume=never"):
        find_checkpoint(tmp_path, "auto")


# --- Hostile folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True])
def test_a_pickle_is_refused_unopened_with_the_way_to_convert_it(tmp_path, listed):
    path = save(tmp_path, 1)
    (path / "optimizer.pt").write_bytes(b"\x80\x02.")
    if listed:
        list_in_manifest(path)
    with pytest.raises(ValueError, match=r"optimizer.pt does not belong .* not opened, .*save_file"):
        load_checkpoint(path)


def test_a_manifest_that_agrees_does_not_make_a_damaged_file_good(tmp_path):
    path = save(tmp_path, 1)
    for file, content, message in (
        ("model.safetensors", b"\xff" * 50, r"model.safetensors is damaged: "),
        ("state.json", b"[]", r"state.json must be a JSON object with the step"),
        ("state.json", b'{"step": "x"}', r"state.json must be a JSON object with the step"),
        ("state.json", b"[" * 100_000, r"state.json must be a JSON object with the step"),
    ):
        before = (path / file).read_bytes()
        (path / file).write_bytes(content)
        list_in_manifest(path)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)
        (path / file).write_bytes(before)


def test_a_folder_that_is_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no whole checkpoint: MANIFEST.json is missing"):
        load_checkpoint(tmp_path / "nowhere")
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"MANIFEST.json is missing"):
        load_checkpoint(tmp_path)


def list_in_manifest(path: Path) -> None:
    """As only somebody who wants to harm would."""
    from hashlib import sha256

    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
        if file.name != MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps({"files": files}))
    assert problems(path) == []
