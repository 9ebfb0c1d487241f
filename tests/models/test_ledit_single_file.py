"""LEDiT in one file, and DiT checkpoints of both layouts made into a LEDiT."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ledit_toys import dit_of, ledit_inputs, toy_ledit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import redraw, relative_error, run

from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.models.ledit_single_file import load_single_file

HEADS = {"num_attention_heads": 2}


class Block(nn.Module):
    """A block as DiT's program has it, of the layers that hold tensors."""

    def __init__(self, dim: int):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_f, scale_f, gate_f = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        y = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        q, k, v = self.attn["qkv"](y).reshape(*y.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.attn["proj"](y)
        y = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_f) + shift_f
        return x + gate_f * self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](y), approximate="tanh"))


class OriginalDiT(nn.Module):
    """DiT under the names of its published checkpoints, of two heads, without its positions."""

    def __init__(self, dim: int = 24, layers: int = 4, classes: int = 10):
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, dim, 2, 2)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(dim, 32),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)),
            }
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, w = x.shape[2] // 2, x.shape[3] // 2
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)
        angles = t[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
        c = self.t_embedder["mlp"](torch.cat((angles.cos(), angles.sin()), -1).float())
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = self.final_layer["linear"](x).reshape(len(x), h, w, 2, 2, 8)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 8, 2 * h, 2 * w)


def original(tmp_path: Path, **changes: Tensor | None) -> tuple[OriginalDiT, Path]:
    """A DiT and its file, with a position table for 8 x 8 latents. `changes` replace tensors; None drops."""
    dit, path = OriginalDiT().eval(), tmp_path / "dit.safetensors"
    redraw(dit)
    state = {**dit.state_dict(), "pos_embed": torch.randn(1, 16, 24), **changes}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return dit, path


# --- From a DiT


@pytest.mark.parametrize(
    "convolution", [{}, {"conv_groups": 24}, {"conv_groups": 3}, {"conv_kernel_size": 0}]
)
def test_a_published_dit_becomes_a_model_that_computes_the_dit_without_positions(convolution, tmp_path):
    dit, path = original(tmp_path)
    model = LEDiTTransformer2DModel.from_single_file(
        path, attention_pattern="none", scale_attention=False, **HEADS, **convolution
    )
    assert not model.training
    assert model.config.sample_size == 8
    for grid in [(4, 4), (3, 7)]:
        inputs = ledit_inputs(grid, batch=3)
        with torch.no_grad():
            expected = dit(*inputs.values())
        assert relative_error(run(model, inputs), expected) < 1e-5


def test_a_dit_of_diffusers_becomes_the_same_model(tmp_path):
    """Whose own output is the DiT's, with its position table zeroed."""
    source = toy_ledit(attention_pattern="none", conv_kernel_size=0)
    dit = dit_of(source)
    dit.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    model, report = load_single_file(
        LEDiTTransformer2DModel, path, attention_pattern="none", sample_size=8, **HEADS
    )
    assert report.dropped.keys() == {"copies of the embedders"}
    assert len(report.dropped["copies of the embedders"]) == 3 * 5
    dit.pos_embed.pos_embed.zero_()
    inputs = ledit_inputs(batch=3)
    assert relative_error(run(model, inputs), run(dit, inputs)) < 1e-5
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_embedders_that_differ_between_blocks_are_refused_by_name(tmp_path):
    dit = dit_of(toy_ledit(attention_pattern="none", conv_kernel_size=0))
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    state[name][3] += 1
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=rf"{name} must be a copy"):
        LEDiTTransformer2DModel.from_single_file(tmp_path / "dit.safetensors", **HEADS)


def test_a_position_table_that_diffusers_saved_is_dropped_and_tells_the_size(tmp_path):
    dit = dit_of(toy_ledit(attention_pattern="none", conv_kernel_size=0))
    state = {**dit.state_dict(), "pos_embed.pos_embed": torch.randn(1, 36, 24)}
    save_file(state, tmp_path / "dit.safetensors")
    model, report = load_single_file(LEDiTTransformer2DModel, tmp_path / "dit.safetensors", **HEADS)
    assert model.config.sample_size == 12
    assert report.dropped["the position table"] == ("pos_embed.pos_embed",)


def test_a_converted_dit_is_a_full_ledit_with_an_identity_for_a_convolution_and_says_so(tmp_path, caplog):
    _, path = original(tmp_path)
    with caplog.at_level(logging.INFO, logger="localdit"):
        model, report = load_single_file(LEDiTTransformer2DModel, path, **HEADS)
    assert [block.causal for block in model.transformer_blocks] == [False, True, False, True]
    assert report.parameters == model.num_parameters() == toy_ledit().num_parameters()
    assert report.dropped == {"the position table": ("pos_embed",)}
    assert "identity" in report.chosen
    assert "4 blocks, 2 heads of 12, 10 classes" in report.found
    levels = {record.levelname for record in caplog.records if "identity" in record.getMessage()}
    assert levels == {"WARNING"}
    x = torch.randn(2, 24, 5, 3)
    assert torch.equal(model.locality_conv(x), x)
    assert torch.equal(model.locality_conv(x, 2), x)


def test_another_training_size_may_be_given(tmp_path):
    _, path = original(tmp_path)
    assert LEDiTTransformer2DModel.from_single_file(path, sample_size=64, **HEADS).config.sample_size == 64


@pytest.mark.parametrize(("dim", "heads"), [(384, 6), (768, 12)])
def test_the_heads_of_published_widths_are_known(dim, heads, tmp_path):
    dit = OriginalDiT(dim, layers=1)
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    config = LEDiTTransformer2DModel.from_single_file(tmp_path / "dit.safetensors").config
    assert (config.num_attention_heads, config.attention_head_dim) == (heads, 64)
    assert config.sample_size == 32  # without a table, the default


# --- Our own file


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"conv_norm": True, "conv_groups": 24, "causal_variant": "raster", "sample_size": 12},
        {"conv_kernel_size": 0, "attention_pattern": ["sa", "ca", "ca", "sa"]},
        {"mlp_ratio": 2.5, "out_channels": 4, "patch_size": 1},
    ],
    ids=str,
)
def test_a_saved_file_gives_an_equal_model(config, tmp_path):
    model, path = toy_ledit(**config), tmp_path / "deep" / "ledit.safetensors"
    model.save_single_file(path)
    loaded, report = load_single_file(LEDiTTransformer2DModel, path)
    for name in model.config:
        assert name.startswith("_") or loaded.config[name] == model.config[name], name
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert report.dropped == {}
    assert report.chosen == "built as the file has it"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_saved_file_has_dits_names_and_ours_for_what_dit_lacks(tmp_path):
    toy_ledit(conv_norm=True).save_single_file(tmp_path / "ledit.safetensors")
    names = load_file(tmp_path / "ledit.safetensors").keys()
    ours = {f"locality_{layer}.{kind}" for layer in ("conv", "norm") for kind in ("weight", "bias")}
    assert names == OriginalDiT().state_dict().keys() | ours


def test_a_saved_file_may_be_built_with_another_mask_and_in_another_precision(tmp_path):
    model, path = toy_ledit(), tmp_path / "ledit.safetensors"
    model.save_single_file(path)
    loaded = LEDiTTransformer2DModel.from_single_file(path, dtype=torch.bfloat16, causal_variant="rectangle")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.causal_variant == "rectangle"


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_a_training_checkpoint_is_opened_without_running_anything(suffix, tmp_path):
    dit, _ = original(tmp_path)
    path = tmp_path / f"dit{suffix}"
    torch.save({"model": {f"module.{k}": v for k, v in dit.state_dict().items()}, "step": 7}, path)
    model = LEDiTTransformer2DModel.from_single_file(path, **HEADS)
    assert torch.equal(model.patch_embed.weight, dit.x_embedder["proj"].weight)


def test_a_subclass_loads_a_file(tmp_path):
    class Sub(LEDiTTransformer2DModel):
        pass

    _, path = original(tmp_path)
    assert type(Sub.from_single_file(path, **HEADS)) is Sub


# --- Refusals


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"blocks.1.attn.proj.bias": None}, HEADS, r"missing \(1\):\n    blocks.1.attn.proj.bias \(24,\)"),
        ({"stranger": torch.zeros(3)}, HEADS, r"surplus \(1\):\n    stranger \(3,\)"),
        ({"blocks.0.attn.qkv.bias": torch.zeros(70)}, HEADS, r"attn.qkv.bias is \(70,\), must be \(72,\)"),
        ({"x_embedder.proj.weight": None}, HEADS, "must hold x_embedder.proj.weight"),
        ({"blocks.1.mlp.fc1.weight": torch.zeros(96, 24).int()}, HEADS, "is torch.int32"),
        ({"pos_embed": torch.zeros(1, 15, 24)}, HEADS, "square number of places, the file has 15"),
        ({"final_layer.linear.weight": torch.zeros(33, 24)}, HEADS, "patches of 2 and 33 outputs"),
        ({}, {}, "num_attention_heads must be given with a width of 24"),
        ({}, {"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({}, {"attention_head_dim": 99}, r"must be the width, 24, got 1 \* 99"),
        ({}, {"num_attention_heads": 5}, r"must be the width, 24, got 5 \* 4"),
        ({}, HEADS | {"num_layers": 5}, "says num_layers=5, but the tensors tell 4"),
        ({}, HEADS | {"num_classes": 9}, "says num_classes=9, but the tensors tell 10"),
        ({}, HEADS | {"window_size": 4}, r"config_overrides must name config fields, got \['window_size'\]"),
        ({}, HEADS | {"causal_variant": "x"}, "causal_variant must be one of"),
        ({}, HEADS | {"dtype": torch.int8}, "dtype must be a floating type"),
        ({}, HEADS | {"conv_norm": True}, r"missing \(2\):\n    locality_norm.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, overrides, message, tmp_path):
    _, path = original(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        LEDiTTransformer2DModel.from_single_file(path, **overrides)


def test_our_own_file_without_its_convolution_is_refused(tmp_path):
    """Only a DiT, whose file has no header of ours, is given one."""
    path = tmp_path / "ledit.safetensors"
    toy_ledit().save_single_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors: dict[str, Any] = {k: v for k, v in load_file(path).items() if not k.startswith("locality")}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"missing \(2\):\n    locality_conv.weight"):
        LEDiTTransformer2DModel.from_single_file(path)


def test_a_model_with_foreign_tensors_is_not_saved(tmp_path):
    model = toy_ledit()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="undo fuse_qkv_projections"):
        model.save_single_file(tmp_path / "ledit.safetensors")
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        toy_ledit().save_single_file(tmp_path / "ledit.pt")
    assert not list(tmp_path.iterdir())
