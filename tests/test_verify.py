"""`localdit verify`: what is whole passes, and whatever is wrong is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_pipeline import toy_pipeline

from localdit import MINI
from localdit.cli import main
from localdit.files import MANIFEST, staged_folder
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.training.checkpoint import save_checkpoint

TOY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "caption_channels": 8,
    "sample_size": 8,
}


def verify(capsys, path: Path) -> tuple[int, dict]:
    """The exit code and the report."""
    code = main(["verify", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


def problems(capsys, path: Path) -> list[str]:
    code, report = verify(capsys, path)
    found = report["problems"] + [line for part in report["parts"] for line in part["problems"]]
    assert code == bool(found)
    assert report["good"] == (not found)
    return found


def flip(file: Path, byte: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def save(run: Path, step: int, **tensors: torch.Tensor) -> Path:
    return save_checkpoint(
        run, step, {"model": {"w": torch.randn(5), **tensors}, "optimizer": {}}, {}, keep=9
    )


# --- Checkpoints and runs -----------------------------------------------------------------------------------


def test_a_run_says_what_is_damaged_and_what_a_resume_takes(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step)
    flip(run / "step-00000003" / "model.safetensors")
    save(run / "elsewhere", 2)
    (run / "elsewhere" / "step-00000002").rename(run / "step-00000002.old-1")
    shutil.rmtree(run / "elsewhere")
    (run / "step-00000004.tmp-77").mkdir()
    (run / "final.replaced-77").mkdir()
    shutil.copytree(Path(MINI, "transformer"), run / "final")

    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run}: a run, 11 files, 7.")
    assert [line.split()[:2] for line in lines if line.startswith(("  ok ", "  BAD"))] == [
        ["ok", "step-00000001"],
        ["ok", "step-00000002"],
        ["BAD", "step-00000003"],
        ["ok", "final"],
    ]
    assert lines[4].strip() == "model.safetensors is damaged: its SHA-256 is another"
    assert "  a resume goes on from step-00000002" in lines
    assert any("step-00000004.tmp-77 is being written, or was left by a killed run" in line for line in lines)
    assert "  final.replaced-77 was about to be replaced when its run was killed" in lines
    assert any("step-00000002.old-1 was left behind" in line for line in lines)
    assert lines[-1] == "1 problem"

    code, report = verify(capsys, run)
    assert code == 1
    assert [part["good"] for part in report["parts"]] == [True, True, False, True]


def test_a_good_checkpoint_passes_and_says_so(tmp_path, capsys):
    path = save(tmp_path, 1)
    assert main(["verify", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: a checkpoint, 3 files, ")
    assert out.endswith("\nall is well\n")


def test_a_checkpoint_needs_its_manifest(tmp_path, capsys):
    path = save(tmp_path, 1)
    (path / MANIFEST).unlink()
    assert problems(capsys, path) == [f"{MANIFEST} is missing: the folder was never finished"]
    (path / "state.json").unlink()  # known by its name alone
    assert problems(capsys, path) == [f"{MANIFEST} is missing: the folder was never finished"]


def test_no_checkpoint_can_be_resumed_from_when_all_are_damaged(tmp_path, capsys):
    flip(save(tmp_path, 1) / "state.json")
    code, report = verify(capsys, tmp_path)
    assert code == 1
    assert "no checkpoint can be resumed from" in report["notes"]


# --- Pipelines and models -----------------------------------------------------------------------------------


def test_the_mini_is_whole(capsys):
    assert main(["verify", "mini"]) == 0
    assert "a pipeline, 11 files, 10.7 MB" in capsys.readouterr().out


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(saved_pipeline, tmp_path) -> Path:
    return shutil.copytree(saved_pipeline, tmp_path / "pipeline")


def test_a_pipeline_as_diffusers_saves_it_passes(pipeline, capsys):
    assert problems(capsys, pipeline) == []
    _, report = verify(capsys, pipeline)
    assert report["kind"] == "a pipeline"
    assert "no manifest" in report["notes"][0]


def test_what_a_pipeline_lists_must_be_there(pipeline, capsys):
    shutil.rmtree(pipeline / "scheduler")
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert sorted(problems(capsys, pipeline)) == [
        "scheduler is missing: model_index.json lists it, and there is no config in such a folder",
        "vae has no safetensors file",
    ]


def test_a_pickle_is_a_problem_and_stays_closed(pipeline, capsys):
    (pipeline / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    (found,) = problems(capsys, pipeline)
    assert found.startswith("vae/diffusion_pytorch_model.bin is a pickle, which can run code")


def test_damaged_files_are_named(pipeline, capsys):
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (pipeline / "vae" / "config.json").write_text("{")
    first, second = problems(capsys, pipeline)
    assert first.startswith("transformer/diffusion_pytorch_model.safetensors cannot be read: ")
    assert second.startswith("vae/config.json is not valid JSON: ")
    (pipeline / "model_index.json").write_text("[]")
    assert "model_index.json must be an object" in problems(capsys, pipeline)


def test_a_manifest_is_held_against_a_pipeline_that_has_one(saved_pipeline, tmp_path, capsys):
    target = tmp_path / "pipeline"
    with staged_folder(target) as staged:
        shutil.copytree(saved_pipeline, staged, dirs_exist_ok=True)
    assert problems(capsys, target) == []
    flip(target / "vae" / "diffusion_pytorch_model.safetensors")
    found = problems(capsys, target)
    assert found == ["vae/diffusion_pytorch_model.safetensors is damaged: its SHA-256 is another"]


@pytest.fixture
def sharded(tmp_path) -> Path:
    LocalDiTTransformer2DModel(**TOY).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    return tmp_path / "model"


def test_shards_must_be_there_and_hold_what_the_index_says(sharded, capsys):
    assert problems(capsys, sharded) == []
    index = "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    shards[0].unlink()
    tensors = load_file(shards[1])
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shards[1])
    assert problems(capsys, sharded) == [
        f"{shards[0].name} is missing, a shard of {index}",
        f"{shards[1].name} and {index} differ, in {lost}",
    ]


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/weights.safetensors", "..\\weights.safetensors"]
)
def test_an_index_must_not_point_elsewhere(sharded, capsys, name):
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    values["weight_map"][first] = name
    index.write_text(json.dumps(values))
    assert f"{index.name} points to {name}, which is not beside it" in problems(capsys, sharded)
    index.write_text("[1]")
    assert f"{index.name} has no weight_map" in problems(capsys, sharded)


# --- Files --------------------------------------------------------------------------------------------------


def test_values_that_are_not_finite_are_found(tmp_path, capsys):
    tensors = {
        "good": torch.randn(4),
        "count": torch.arange(3),
        "half": torch.tensor([1.0, float("inf")], dtype=torch.float16),
        "eighth": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn),
    }
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file)
    assert problems(capsys, file) == ["weights.safetensors holds infinities or NaN, in eighth and 1 more"]
    save_file({name: tensors[name] for name in ("good", "count", "half")}, file)
    assert problems(capsys, file) == ["weights.safetensors holds infinities or NaN, in half"]
    save_file({name: tensors[name] for name in ("good", "count")}, file)
    assert problems(capsys, file) == []


def test_a_pickle_alone_is_a_problem(tmp_path, capsys):
    file = tmp_path / "weights.ckpt"
    file.write_bytes(b"\x80\x02.")
    assert "weights.ckpt is a pickle" in problems(capsys, file)[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no "),
        ("notes.txt", "a file must be .safetensors to be checked, got "),
        ("empty", "holds no checkpoint, run, pipeline, model, cache or other safetensors files"),
    ],
)
def test_what_cannot_be_checked_is_an_error(tmp_path, capsys, name, message):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


# --- Caches -------------------------------------------------------------------------------------------------


def test_a_cache_is_held_against_its_index(tmp_path, capsys):
    from reliability.toys import write_cache

    images, text = write_cache(tmp_path)
    code, report = verify(capsys, tmp_path)
    assert (code, report["kind"], report["files"]) == (0, "a cache", 2)
    flip(images)
    text.unlink()
    first, second = problems(capsys, tmp_path)
    assert first.startswith(f"{text.name} is missing")
    assert second.startswith(f"{images.name} is damaged")
    (tmp_path / "index.json").unlink()
    assert "holds no finished cache" in problems(capsys, tmp_path)[0]
