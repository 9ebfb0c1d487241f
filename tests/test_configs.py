"""Every run in configs/ builds its model on the meta device, with the stated number of parameters."""

import itertools
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from localdit.training.config import load_config
from localdit.training.encode import EncodeConfig
from localdit.training.loop import build_model
from localdit.training.objectives import build_objective

CONFIGS = Path(__file__).parent.parent / "configs"
PARAMETERS = {
    "local_dit/finetune.yaml": 518_662_672,
    "local_dit/lora.yaml": 518_662_672,
    "local_dit/mini.yaml": 3_576_016,
    "local_dit/mini_text.yaml": 742_682,
    "local_dit/mini_vae.yaml": 944_567,
    "local_dit/stage1_256.yaml": 518_662_672,
    "local_dit/stage2_512.yaml": 518_662_672,
    "local_dit/stage3_1024.yaml": 518_662_672,
}
STAGES = ("stage1_256", "stage2_512", "stage3_1024")
ENCODINGS = {"local_dit/encode.yaml", "local_dit/encode_scenes.yaml"}


def test_every_config_is_known():
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert {name for name in found if not name.startswith("accelerate/")} == PARAMETERS.keys() | ENCODINGS


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_an_encoding_is_read(name):
    assert load_config(CONFIGS / name, kind=EncodeConfig).cache


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").iterdir()), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    assert load_config_from_file(str(path)).num_processes >= 8


def test_the_stages_of_the_published_training_follow_each_other_on_one_grid():
    stages = [load_config(CONFIGS / f"local_dit/{name}.yaml") for name in STAGES]
    for before, after in itertools.pairwise(stages):
        assert after.init_from == f"{before.output_dir}/final"
    reach = []
    for stage, pixels in zip(stages, (256, 512, 1024)):
        size = stage.model["sample_size"]
        assert (size, stage.objective["data"]["resolution"]) == (pixels // 8, pixels)
        scale = stage.model.get("interpolation_scale") or max(size // 64, 1)
        reach.append(size / 2 / scale)  # tokens a side, in units of the position table
        assert (stage.train.weight_decay, stage.train.max_grad_norm) == (0.03, 0.01)
        assert (stage.train.ema_decay, stage.train.warmup_steps, stage.train.eps) == (0.9999, 1000, 1e-10)
    assert reach == [32, 32, 32]
    assert [stage.train.learning_rate for stage in stages] == [5e-5, 5e-5, 2e-5]
    assert stages[-1].train.batch_size == 12


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_config_is_read_and_its_model_has_the_stated_size(name):
    config = load_config(CONFIGS / name)
    build_objective(config.objective)
    with torch.device("meta"):
        model = build_model(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_an_unknown_model_field_or_class_is_an_error():
    with pytest.raises(ValueError, match=r"unknown key model\.num_layer;"):
        build_model({"_class_name": "LocalDiTTransformer2DModel", "num_layer": 2})
    with pytest.raises(ValueError, match=r"_class_name must name a class .*, got 'DiTX'"):
        build_model({"_class_name": "DiTX"})
    with pytest.raises(ValueError, match=r"objective\.name must be one of .*, got 'magic'"):
        build_objective({"name": "magic"})
