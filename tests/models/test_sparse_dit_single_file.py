"""MicroDiT's released layout, read and written: strictly, whole, and without losing a bit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sparse_dit import TINY, on_meta, recorded_inputs
from torch import Tensor
from toy_sparse import TOY, recorded_model, recorded_state, released_shapes, sparse_inputs, toy_sparse
from toys import run

from localdit.models.sparse_dit import SparseDiTTransformer2DModel, position_table
from localdit.models.sparse_dit_single_file import from_released, infer_config, load_single_file, to_released

# What no tensor of the toy tells, since it has no published width.
TOLD = {"attention_head_dim": 16, "ffn_multiple_of": 32}


def released(scale: float = 1.0, side: int = 4) -> dict[str, Tensor]:
    """The recorded weights as a released file has them."""
    table = position_table((side, side), 64, scale, torch.device("cpu")).float()
    return recorded_state() | {"pos_embed": table[None], "mask_token": torch.zeros(1, 1, 16)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(released(), tmp_path / "released.safetensors")
    return tmp_path / "released.safetensors"


# --- Reading


def test_a_released_file_gives_the_recorded_model(path):
    model = SparseDiTTransformer2DModel.from_single_file(path, **TOLD)
    assert not model.training
    assert torch.equal(run(model, recorded_inputs()), run(recorded_model(), recorded_inputs()))
    expected = recorded_model().config
    for name in TOY:
        assert model.config[name] == expected[name], name


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_pickle_of_tensors_is_read(tmp_path, suffix):
    torch.save(released(), tmp_path / f"released{suffix}")
    model = SparseDiTTransformer2DModel.from_single_file(tmp_path / f"released{suffix}", **TOLD)
    assert torch.equal(run(model, recorded_inputs()), run(recorded_model(), recorded_inputs()))


@pytest.mark.parametrize("prefix", ["dit.", "module.dit.", "dit._orig_mod."])
def test_a_trainers_file_is_read_beside_its_encoders(tmp_path, prefix, caplog):
    tensors = {f"{prefix}{name}": tensor for name, tensor in released().items()}
    tensors |= {"vae.encoder.conv_in.weight": torch.ones(3), "text_encoder.wte.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "trainer.safetensors")
    with caplog.at_level(logging.INFO, "localdit"):
        model, report = load_single_file(
            SparseDiTTransformer2DModel, tmp_path / "trainer.safetensors", **TOLD
        )
    assert torch.equal(run(model, recorded_inputs()), run(recorded_model(), recorded_inputs()))
    assert set(report.dropped["other networks"]) == {"vae.encoder.conv_in.weight", "text_encoder.wte.weight"}
    assert "other networks" in caplog.text


@pytest.mark.parametrize(("scale", "side"), [(1.0, 4), (2.0, 8), (1.5, 5), (0.75, 4), (4 / 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_tell_the_size_and_the_scale(scale, side, dtype):
    """In a file of half precision too."""
    tensors = released(scale, side)
    tensors["pos_embed"] = tensors["pos_embed"].to(dtype)
    config = infer_config(tensors)
    assert (config["sample_size"], config["interpolation_scale"]) == (2 * side, pytest.approx(scale))


def test_size_and_scale_may_be_chosen_anew(path):
    """As where training goes on at 512 pixels from weights of 256."""
    model = SparseDiTTransformer2DModel.from_single_file(
        path, sample_size=16, interpolation_scale=2.0, **TOLD
    )
    assert (model.config.sample_size, model.config.interpolation_scale) == (16, 2.0)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_dtype_may_be_asked_for(path, dtype):
    model = SparseDiTTransformer2DModel.from_single_file(path, dtype=dtype, **TOLD)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}


def test_the_report_says_what_was_found_dropped_and_chosen(path):
    _, report = load_single_file(SparseDiTTransformer2DModel, path, **TOLD)
    assert report.parameters == 648_288
    assert report.found == "114 tensors: 2 blocks of 48 and 4 of 64, 4 experts"
    assert report.dropped == {"buffers": ("pos_embed", "mask_token")}
    assert report.chosen == (
        "built for latents of 8 with positions divided by 1.0, heads of 16 and a capacity of 2.0"
    )


@pytest.mark.parametrize("config", [{}, {"in_channels": 16}, TINY], ids=["XL", "XL, 16 channels", "Tiny"])
def test_the_published_configurations_are_read_from_their_shapes(config):
    """Without any memory: all that is not told by tensors of meta is the position table."""
    model = on_meta(**config)
    tensors = to_released(model.state_dict())
    side = 32 if config == TINY else 16
    tensors["pos_embed"] = position_table(
        (side, side), model.config.hidden_size, 2.0, torch.device("cpu")
    ).float()[None]
    inferred = infer_config(tensors)
    assert inferred.pop("sample_size") == 2 * side
    assert inferred.pop("interpolation_scale") == 2.0
    assert inferred.pop("out_channels") == inferred["in_channels"]
    assert {name: model.config[name] for name in inferred} == inferred


# --- There and back


CONFIGS: list[dict[str, Any]] = [
    {},
    {"sample_size": 12, "interpolation_scale": 2.0},
    {"mixer_num_layers": 0},
    {"mixer_hidden_size": 64},
    {"qk_norm_affine": True, "ffn_inner_factor": 1.0, "residual_init_denominator": 3},
    {"use_bias": True, "out_channels": 8},
    {"attention_ratio": [1.0, 0.5, 0.5, 1.0], "ffn_ratio": [3.0, 1.0, 2.0, 4.0], "mixer_ffn_ratio": 2.0},
    {"moe_every_n": 9},
    {"num_experts": 3, "expert_capacity": 1.0, "moe_every_n": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_is_written_is_read_back_with_the_same_bits(config, tmp_path):
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5))
    model.save_single_file(tmp_path / "deep/model.safetensors")
    loaded = SparseDiTTransformer2DModel.from_single_file(tmp_path / "deep/model.safetensors")
    assert torch.equal(run(loaded, inputs), run(model, inputs))

    def fields(model: Any) -> dict[str, Any]:
        values = {name: value for name, value in model.config.items() if not name.startswith("_")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    assert fields(loaded) == fields(model) | {"out_channels": fields(loaded)["out_channels"]}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_widths_are_read_from_the_tensors_where_there_is_no_header(config, tmp_path):
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5))
    save_file(to_released(model.state_dict(), model.config), tmp_path / "bare.safetensors")
    told = TOLD | {name: config[name] for name in ("expert_capacity",) if name in config}
    if config.get("moe_every_n") == 9:  # no tensor tells how far apart experts are where there are none
        told["moe_every_n"] = 9
    loaded = SparseDiTTransformer2DModel.from_single_file(tmp_path / "bare.safetensors", **told)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_the_names_go_round():
    state = recorded_state()
    back = to_released(from_released(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert from_released(state).keys() == toy_sparse().state_dict().keys()


def test_what_is_written_is_the_released_layout(tmp_path):
    model = recorded_model()
    model.save_single_file(tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == released_shapes()
    for name, tensor in released().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0 if name != "pos_embed" else 1e-6)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert '"_class_name": "SparseDiTTransformer2DModel"' in file.metadata()["config"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_written_and_read(dtype, tmp_path):
    model = toy_sparse().to(dtype)
    model.save_single_file(tmp_path / "half.safetensors")
    loaded = SparseDiTTransformer2DModel.from_single_file(tmp_path / "half.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_subclass_reads_a_released_file(path):
    class Another(SparseDiTTransformer2DModel):
        pass

    assert type(Another.from_single_file(path, **TOLD)) is Another


# --- What is refused


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in released().items() if key != name}


def with_tensor(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return released() | {name: tensor}


WRONG_FILES: dict[str, tuple[dict[str, Tensor], str]] = {
    "no embedder": (without("x_embedder.proj.weight"), r"must hold x_embedder\.proj\.weight"),
    "no positions": (without("pos_embed"), "must hold pos_embed"),
    "another table": (with_tensor("pos_embed", torch.zeros(1, 16, 64)), "pos_embed must be the sine-cosine"),
    "no square": (with_tensor("pos_embed", torch.zeros(1, 12, 64)), r"pos_embed must be .* \(12, 64\)"),
    "a learned mask": (with_tensor("mask_token", torch.ones(1, 1, 16)), "mask_token must be zero"),
    "a missing tensor": (without("blocks.2.attn.proj.weight"), r"missing \(1\):\s+blocks\.2\.attn\.proj"),
    "a missing expert": (without("blocks.1.mlp.w2"), r"missing \(1\):\s+blocks\.1\.mlp\.w2 \(4, 128, 64\)"),
    "a missing block": (
        {name: tensor for name, tensor in released().items() if not name.startswith("blocks.2.")},
        r"numbered from 0 without gaps, the file has \[0, 1, 3\]",
    ),
    "a surplus tensor": (with_tensor("blocks.0.extra", torch.ones(3)), r"surplus \(1\):\s+blocks\.0\.extra"),
    "a misshapen tensor": (
        with_tensor("blocks.0.norm1.weight", torch.ones(63)),
        r"blocks\.0\.norm1\.weight is \(63,\), must be \(64,\)",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_is_refused_by_name(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message):
        SparseDiTTransformer2DModel.from_single_file(tmp_path / "wrong.safetensors", **TOLD)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window_size": 4}, r"config_overrides must name config fields, got \['window_size'\]"),
        ({"num_layers": 5}, "config_overrides says num_layers=5, but the tensors tell 4"),
        ({"num_experts": 8}, "config_overrides says num_experts=8, but the tensors tell 4"),
        ({"dtype": torch.int8}, "dtype must be a floating type"),
    ],
)
def test_wrong_overrides_are_named_with_their_value(path, overrides, message):
    with pytest.raises(ValueError, match=message):
        SparseDiTTransformer2DModel.from_single_file(path, **TOLD | overrides)


def test_heads_of_an_unpublished_width_must_be_told(path):
    with pytest.raises(ValueError, match="attention_head_dim must be given with a width of 64"):
        SparseDiTTransformer2DModel.from_single_file(path)


def test_an_adapted_or_fused_model_is_not_written(tmp_path):
    fused = toy_sparse()
    fused.fuse_qkv_projections()
    adapted = toy_sparse()
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for model in (fused, adapted):
        with pytest.raises(ValueError, match="unload the adapters, or undo fuse_qkv_projections"):
            model.save_single_file(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
