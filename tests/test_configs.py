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
    "ledit/b_256.yaml": 135_624_992,
    "ledit/l_256.yaml": 467_278_880,
    "ledit/mini.yaml": 2_021_520,
    "ledit/s_256.yaml": 34_192_544,
    "ledit/study_extrapolation.yaml": 1_147_504,
    "ledit/xl_256.yaml": 686_779_808,
    "ledit/xl_256_depthwise.yaml": 674_846_240,
    "ledit/xl_256_finetune.yaml": 686_779_808,
    "ledit/xl_256_refined.yaml": 686_779_808 + 2 * 1152,  # with the norm after the convolution
    "ledit/xl_512_finetune.yaml": 686_779_808,
    "local_dit/finetune.yaml": 518_662_672,
    "local_dit/lora.yaml": 518_662_672,
    "local_dit/mini.yaml": 3_576_016,
    "local_dit/mini_distill.yaml": 3_576_016,
    "local_dit/mini_text.yaml": 742_682,
    "local_dit/mini_vae.yaml": 944_567,
    "local_dit/stage1_256.yaml": 518_662_672,
    "local_dit/stage2_512.yaml": 518_662_672,
    "local_dit/stage3_1024.yaml": 518_662_672,
    "local_dit/study_extrapolation.yaml": 1_318_176,
    "local_dit/study_local_attention.yaml": 1_029_744,
    "sparse_dit/mini.yaml": 4_080_944,
    "sparse_dit/mini_masked.yaml": 4_080_944,
    "sparse_dit/stage1_256_masked.yaml": 1_165_442_320,
    "sparse_dit/stage1_256_masked_16ch.yaml": 1_165_540_672,
    "sparse_dit/stage2_256.yaml": 1_165_442_320,
    "sparse_dit/stage3_512_masked.yaml": 1_165_442_320,
    "sparse_dit/stage4_512.yaml": 1_165_442_320,
    "sparse_dit/tiny_256_masked.yaml": 200_692_752,
    "sparse_dit/variant_256_masked.yaml": 1_214_325_264,
    "pixeldit/b_256.yaml": 184_749_155,
    "pixeldit/l_256.yaml": 569_648_963,
    "pixeldit/mini.yaml": 3_045_043,
    "pixeldit/text_stage1_512.yaml": 1_302_470_787,
    "pixeldit/text_stage2_512.yaml": 1_302_470_787,
    "pixeldit/text_stage3_1024.yaml": 1_302_470_787,
    "pixeldit/xl_256.yaml": 797_383_203,
    "pixeldit/xl_256_low_rate.yaml": 797_383_203,
    "pixeldit/xl_256_post_modulation.yaml": 759_601_699,
    "pixeldit/xl_512.yaml": 797_383_203,
}
STAGES = ("stage1_256", "stage2_512", "stage3_1024")
ENCODINGS = {
    "ledit/encode.yaml",
    "local_dit/encode.yaml",
    "local_dit/encode_scenes.yaml",
    "sparse_dit/encode.yaml",
}
# The published recipe of SparseDiT, stage by stage.
SPARSE_STAGES = {
    "stage1_256_masked": {"mask": 0.75, "steps": 250_000, "rate": 2.4e-4, "warmup": 2500, "clip": 0.25},
    "stage2_256": {"mask": 0.0, "steps": 30_000, "rate": 8e-5, "warmup": 0, "clip": 0.25},
    "stage3_512_masked": {"mask": 0.75, "steps": 50_000, "rate": 8e-5, "warmup": 500, "clip": 0.5},
    "stage4_512": {"mask": 0.0, "steps": 5_000, "rate": 8e-5, "warmup": 0, "clip": 0.5},
}


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


@pytest.mark.parametrize("path", sorted((CONFIGS / "ledit").glob("*_*.yaml")), ids=lambda path: path.stem)
def test_a_run_on_imagenet_mixes_its_whole_cache_which_is_sorted_by_class(path):
    run = load_config(path)
    if "imagenet" in str(run.objective["data"]["source"]):
        per_shard = load_config(CONFIGS / "ledit/encode.yaml", kind=EncodeConfig).samples_per_shard
        assert run.train.shard_window > 1_281_167 / per_shard


def test_the_stages_of_sparse_dit_are_the_published_ones():
    stages = [load_config(CONFIGS / f"sparse_dit/{name}.yaml") for name in SPARSE_STAGES]
    assert stages[0].init_from is None
    for before, after in itertools.pairwise(stages):
        assert after.init_from == f"{before.output_dir}/final"
    for stage, published in zip(stages, SPARSE_STAGES.values()):
        train, objective = stage.train, build_objective(stage.objective)
        assert (train.max_steps, train.learning_rate) == (published["steps"], published["rate"])
        assert (train.warmup_steps, train.max_grad_norm) == (published["warmup"], published["clip"])
        assert objective.mask_ratio == published["mask"]
        assert 8 * train.batch_size * train.gradient_accumulation == 2048
        assert (train.weight_decay, train.betas, train.eps) == (0.1, (0.9, 0.999), 1e-8)
        assert (train.parameter_groups, objective.caption_dropout, train.seed) == ((), 0.1, 18)
        small = objective.data.resolution == 256
        assert (objective.sigma_mean, objective.sigma_std) == ((-0.6, 1.2) if small else (0.0, 0.6))
        size = (stage.model["sample_size"], stage.model.get("interpolation_scale", 1.0))
        assert size == ((32, 1.0) if small else (64, 2.0))
    assert [(s.train.schedule, s.train.learning_rate_floor) for s in stages[:2]] == [
        ("cosine", 0.33),
        ("constant", 0.0),
    ]
    averages = [(stage.train.ema_decay, stage.train.ema_start) for stage in stages]
    assert averages == [(0.0, 0), (0.0, 0), (0.99975, 25_000), (0.9975, 1_000)]


def test_pixeldits_class_runs_are_the_published_ones():
    names = ("xl_256", "xl_256_low_rate", "xl_512")
    first, rest, larger = (load_config(CONFIGS / f"pixeldit/{name}.yaml") for name in names)
    for run in (first, rest, larger):
        train, alignment = run.train, run.objective["alignment"]
        assert train.batch_size * train.gradient_accumulation * 8 == 256
        assert (train.optimizer, train.betas, train.weight_decay) == ("adamw", (0.9, 0.999), 0)
        assert (train.ema_decay, run.objective["caption_dropout"]) == (0.9999, 0.1)
        assert (alignment["block"], alignment["weight"]) == (8, 0.5)
        assert run.objective["data"]["square"]
        assert not run.objective["data"].get("flips")
    assert rest.output_dir == first.output_dir  # the low rate goes on from the other's checkpoint
    assert [run.train.learning_rate for run in (first, rest, larger)] == [1e-4, 1e-5, 1e-4]
    assert [run.train.max_grad_norm for run in (first, rest, larger)] == [1.0, 0.5, 0.5]
    assert [run.objective.get("shift", 1.0) for run in (first, rest, larger)] == [1.0, 1.0, 3.0]
    epochs = [run.train.max_steps * 256 / 1_281_167 for run in (first, rest, larger)]
    assert epochs == pytest.approx([160, 320, 850], rel=2e-3)
    assert larger.init_from == f"{first.output_dir}/final"


def test_pixeldits_text_stages_follow_each_other():
    names = ("text_stage1_512", "text_stage2_512", "text_stage3_1024")
    stages = [load_config(CONFIGS / f"pixeldit/{name}.yaml") for name in names]
    for before, after in itertools.pairwise(stages):
        assert after.init_from == f"{before.output_dir}/final"
        assert before.model | {"sample_size": 1024} == after.model | {"sample_size": 1024}
    objectives, trains = [stage.objective for stage in stages], [stage.train for stage in stages]
    assert [objective["shift"] for objective in objectives] == [3.0, 3.0, 4.0]
    assert [objective["scheduler"]["flow_shift"] for objective in objectives] == [3.0, 3.0, 4.0]
    assert [bool(objective.get("alignment")) for objective in objectives] == [True, False, False]
    assert [bool(objective["data"].get("square")) for objective in objectives] == [True, False, False]
    assert [objective["data"]["max_sequence_length"] for objective in objectives] == [300] * 3
    assert [train.batch_size * train.gradient_accumulation * 8 for train in trains] == [1024, 1024, 768]
    assert [train.learning_rate for train in trains] == [1e-4, 1e-4, 2e-5]
    assert [train.max_grad_norm for train in trains] == [0.2, 0.2, 0.1]
    assert {(train.warmup_steps, train.ema_decay, train.weight_decay) for train in trains} == {(2000, 0, 0)}


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
