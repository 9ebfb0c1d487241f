"""Published checkpoint files: what is read, what is refused, and that what is written comes back."""

import json
import logging
import os
import pickle
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from naive_local_dit import published_layout
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from toys import TOY, redraw, relative_error, run, toy_inputs, toy_model

from localdit.models import single_file
from localdit.models.local_dit import LocalDiTTransformer2DModel, build_geometry
from localdit.models.local_dit_single_file import from_published, infer_config, to_published
from localdit.models.single_file import by_block, read_state_dict

FIXTURES = Path(__file__).parents[1] / "fixtures"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
LOCAL = {"global_context": False, "relative_position_bias": False}  # what a published checkpoint holds


def stale_copies(tensors):
    """The tensors that lie unused in a published checkpoint, as garbage that would be seen in any output."""
    stale = {}
    for name, tensor in tensors.items():
        if ".attn1.to_qkv." in name:
            for part in "qkv":
                stale[name.replace("to_qkv", f"to_{part}")] = torch.full_like(tensor.chunk(3)[0], 1e4)
        if ".attn2.to_k." in name:
            stale[name.replace("to_k", "to_kv")] = torch.full_like(torch.cat((tensor, tensor)), -1e4)
    return stale


def published_file(path, model, metadata=None):
    """What the first program would have saved of a model: no header, stale copies among the rest."""
    tensors = published_layout(model.state_dict())
    tensors |= stale_copies(tensors)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


def load(path, **kwargs):
    return LocalDiTTransformer2DModel.from_single_file(path, **kwargs)


def toy_file(tmp_path, **config):
    """A model, its published file, and the overrides that no file tells."""
    model = toy_model(**config)
    return (
        model,
        published_file(tmp_path / "published.safetensors", model),
        {"sample_size": TOY["sample_size"]},
    )


def same(first, second):
    """Whether two state dicts hold the same bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def without_branch(state_dict):
    return {name: tensor for name, tensor in state_dict.items() if ".global_context." not in name}


def halved(state_dict):
    """A state dict with the output weights of self-attention, not their biases, at one half."""
    return {k: v * 0.5 if k.endswith("attn1.to_out.0.weight") else v for k, v in state_dict.items()}


# --- The layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, LOCAL, {"relative_position_bias": False}, {"full_attention_layers": (1,)}]
)
def test_the_layouts_are_each_others_inverse(config):
    """Against the naive twin's own translation."""
    state_dict = toy_model(**config).state_dict()
    published = to_published(state_dict)
    assert same(published, published_layout(state_dict))
    assert same(from_published(published), state_dict)
    assert same(from_published(published | stale_copies(published)), state_dict)


def test_a_cut_projection_has_memory_of_its_own():
    fused = {"transformer_blocks.0.attn1.to_qkv.weight": torch.randn(6, 2)}
    for tensor in from_published(fused).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_published_checkpoint_has_the_published_size_and_tells_its_config():
    """518,323,408 numbers, 119,543,040 of them stale."""
    with torch.device("meta"):
        model = LocalDiTTransformer2DModel(global_context=False)
    live = to_published(model.state_dict())
    stale = stale_copies(live)
    assert sum(tensor.numel() for tensor in stale.values()) == 119_543_040
    assert sum(tensor.numel() for tensor in (live | stale).values()) == 518_323_408
    inferred = infer_config(live | stale)
    assert inferred.pop("global_context") is inferred.pop("relative_position_bias") is False
    assert inferred == {name: model.config[name] for name in inferred}
    assert len(inferred) == 8


@pytest.mark.parametrize(
    "config",
    [
        {},
        LOCAL,
        {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "window_size": 3},
        {"in_channels": 5, "out_channels": 7, "patch_size": 3, "caption_channels": 9},
        {"use_additional_conditions": False, "num_attention_heads": 1, "window_size": 2},
        {"global_context": False, "relative_position_bias": True, "window_size": 8},
        {"global_context": True, "relative_position_bias": False},
    ],
)
def test_sizes_are_read_from_the_tensors(tmp_path, config):
    model, path, untold = toy_file(tmp_path, **config)
    choice = "auto" if model.config.global_context else "none"
    loaded = load(path, global_context=choice, **untold)
    table = model.config.relative_position_bias
    told = set(model.config) - {"_use_default_values", "relative_position_bias", "full_attention_layers"}
    if not (model.config.global_context if table is None else table):
        told -= {"window_size"}
    assert {name: loaded.config[name] for name in told} == {name: model.config[name] for name in told}
    assert same(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_stale_copies_change_nothing(tmp_path):
    """They hold garbage here; the output is bit for bit that of the model that was saved."""
    model, path, untold = toy_file(tmp_path)
    assert any(".attn1.to_q." in name for name in load_file(path))
    assert any(".attn2.to_kv." in name for name in load_file(path))
    inputs = toy_inputs((6, 10), batch=3)
    assert torch.equal(run(load(path, **untold), inputs), run(model, inputs))


@pytest.mark.parametrize("name", ["published_with_global_context", "published_local_only"])
def test_published_weights_without_a_header_compute_what_was_published(tmp_path, name):
    """The weights of the recorded files, alone in a file, as a published checkpoint has them."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sample_size = json.loads(file.metadata()["meta"])["sample_size"]
    weights = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    save_file(weights, tmp_path / "bare.safetensors")
    choice = "auto" if "global" in name else "none"
    bare = load(tmp_path / "bare.safetensors", sample_size=sample_size, global_context=choice)
    recorded = load(FIXTURES / f"{name}.safetensors")
    assert same(bare.state_dict(), recorded.state_dict())

    case = {key.removeprefix("case1."): t for key, t in tensors.items() if key.startswith("case1.")}
    output = case.pop("output")
    case["added_cond_kwargs"] = {key: case.pop(key) for key in ("resolution", "aspect_ratio")}
    assert relative_error(run(bare, case), output) < 1e-5
    assert relative_error(run(recorded, case), output) < 1e-5


# --- The global context -------------------------------------------------------------------------------------


def test_a_file_without_the_branch_is_folded_and_it_is_said(tmp_path, caplog):
    model, path, untold = toy_file(tmp_path, **LOCAL)
    loaded = load(path, **untold)
    assert loaded.config.global_context is False
    assert same(loaded.state_dict(), halved(model.state_dict()))
    assert same(load(path, global_context="fold", **untold).state_dict(), loaded.state_dict())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "halved" in caplog.text


def test_folding_is_the_mean_over_random_branches(tmp_path):
    """The spec's reading of a published file: a branch of zero mean, averaged with the local attention.

    Turning the sign of the value half of to_kv turns that of the branch's result, and to_out is linear: in
    one attention, the mean over a draw and its mirror image is what folding gives.
    """
    _, path, untold = toy_file(tmp_path, **LOCAL)
    folded, drawn = load(path, **untold), load(path, global_context="random", seed=5, **untold)
    folded, drawn = folded.transformer_blocks[1].attn1, drawn.transformer_blocks[1].attn1
    geometry = build_geometry(6, 7, 4, 24, 12, True, 8, 1.0, 2, torch.float32, torch.device("cpu"))
    x = torch.randn(2, 42, 24)
    with torch.no_grad():
        first = drawn(x, geometry.windows[1], geometry.rotary)
        drawn.global_context.to_kv.weight[24:] *= -1
        drawn.global_context.to_kv.bias[24:] *= -1
        second = drawn(x, geometry.windows[1], geometry.rotary)
        assert relative_error(second, first) > 1e-2
        assert relative_error((first + second) / 2, folded(x, geometry.windows[1], geometry.rotary)) < 1e-6


@pytest.mark.parametrize("choice", ["fold", "none"])
def test_a_branch_that_is_not_wanted_is_left_aside_and_it_is_said(tmp_path, caplog, choice):
    """The bias tables of the local attention are not part of it."""
    model, path, untold = toy_file(tmp_path)
    with caplog.at_level(logging.INFO):
        loaded = load(path, global_context=choice, **untold)
    local = without_branch(model.state_dict())
    assert loaded.config.global_context is False
    assert loaded.config.relative_position_bias is True
    assert same(loaded.state_dict(), halved(local) if choice == "fold" else local)
    # 11 tensors of the branch, and 8 stale ones, in each of 4 blocks; listed by name, the blocks in one.
    assert "left aside 44 tensors (the global context, not wanted)" in caplog.text
    assert "left aside 32 tensors (stale copies)" in caplog.text
    assert "transformer_blocks.{0,1,2,3}.attn1.processor.to_global_kv.weight" in caplog.text


@pytest.mark.parametrize("config", [{}, LOCAL, {"global_context": False, "relative_position_bias": True}])
def test_a_random_branch_depends_on_the_seed_alone(tmp_path, config):
    model, path, untold = toy_file(tmp_path, **config)
    before = torch.get_rng_state()
    first = load(path, global_context="random", seed=3, **untold)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random numbers go on as they would have
    torch.rand(7)
    second = load(path, global_context="random", seed=3, **untold)
    other = load(path, global_context="random", seed=4, **untold)

    assert first.config.global_context is True
    assert first.config.relative_position_bias is None
    assert same(first.state_dict(), second.state_dict())
    differ = {
        name
        for name, tensor in first.state_dict().items()
        if not torch.equal(tensor, other.state_dict()[name])
    }
    assert {name.split(".attn1.")[1] for name in differ} == {
        "global_context.to_kv.weight",
        *(
            f"global_context.query_features.{i}.{layer}.weight"
            for i in (0, 1)
            for layer in ("depthwise", "squeeze", "excite", "pointwise")
        ),
    }
    # All else is the file's; tables that it lacks begin at zero, as in training.
    kept = without_branch(model.state_dict())
    drawn = first.state_dict()
    assert same({name: drawn[name] for name in kept}, kept)
    tables = [tensor for name, tensor in without_branch(drawn).items() if name not in kept]
    assert len(tables) == (0 if "relative_position_bias" in str(kept.keys()) else 4)
    assert not any(table.any() for table in tables)


def test_a_random_branch_is_drawn_as_the_model_draws_its_own(tmp_path):
    _, path, untold = toy_file(tmp_path, **LOCAL)
    drawn = load(path, global_context="random", seed=11, **untold)
    torch.manual_seed(11)
    fresh = LocalDiTTransformer2DModel(**TOY)
    branch = [name for name in fresh.state_dict() if ".global_context." in name]
    assert same(*({name: m.state_dict()[name] for name in branch} for m in (drawn, fresh)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_context": "random"}, "seed must be an integer"),
        ({"global_context": "fold", "seed": 1}, "seed must be an integer .* got seed=1"),
        ({"seed": 0}, "None with any other choice"),
        ({"global_context": "halve"}, "global_context must be one of .* got 'halve'"),
        ({"dtype": "float16"}, "dtype must be a floating type .* got 'float16'"),
        ({"dtype": torch.int8}, "dtype must be a floating type"),
        ({"window": 8}, r"config_overrides must name config fields, got \['window'\]; .*'window_size'"),
        ({"num_layers": 5}, "config_overrides says num_layers=5, but the tensors tell 4"),
        ({"window_size": 8}, "config_overrides says window_size=8, but the tensors tell 4"),
        ({"out_channels": 8}, "config_overrides says out_channels=8, but the tensors tell 4"),
    ],
)
def test_arguments_that_cannot_hold_are_refused(tmp_path, arguments, message):
    _, path, _ = toy_file(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(path, **arguments)


def test_overrides_go_before_the_header_and_the_header_before_defaults(tmp_path):
    model = toy_model(sample_size=48, rope=False, attention_residual=False, norm_eps=1e-4)
    model.save_single_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", rope=True, out_channels=None)
    assert (loaded.config.sample_size, loaded.config.norm_eps) == (48, 1e-4)
    assert (loaded.config.rope, loaded.config.attention_residual) == (True, False)
    assert loaded.out_channels == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("choice", [{"global_context": "random", "seed": 0}, {"global_context": "fold"}])
def test_dtype_is_the_models_and_none_keeps_the_files(tmp_path, dtype, choice):
    model = toy_model(**LOCAL).to(torch.bfloat16)
    path = published_file(tmp_path / "published.safetensors", model)
    loaded = load(path, dtype=dtype, **choice)
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.bfloat16}
    assert all(parameter.requires_grad for parameter in loaded.parameters())


# --- Strictness ---------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_list_with_shapes(tmp_path):
    _, path, untold = toy_file(tmp_path)
    tensors = load_file(path)
    for index in (0, 2):
        del tensors[f"transformer_blocks.{index}.ff.net.2.bias"]
    tensors["transformer_blocks.1.attn1.to_qkv.weight"] = torch.zeros(70, 24)
    tensors["transformer_blocks.1.attn3.to_q.weight"] = torch.zeros(2, 3)
    tensors["proj_out.bias"] = torch.zeros(16, dtype=torch.int64)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is compared)
        load(path, **untold)
    assert str(error.value).splitlines() == [
        f"the tensors of {path} must be those of the model, but some are",
        "  missing (2):",
        "    transformer_blocks.{0,2}.ff.net.2.bias (24,)",
        "  surplus (1):",
        "    transformer_blocks.1.attn3.to_q.weight (2, 3)",
        "  misshapen (1):",
        "    transformer_blocks.1.attn1.to_qkv.weight is (70, 24), must be (72, 24)",
        "  of a type that no weight has (1):",
        "    proj_out.bias is torch.int64",
    ]


def test_a_branch_that_is_there_in_part_is_not_made_up_for(tmp_path):
    _, path, untold = toy_file(tmp_path)
    tensors = load_file(path)
    del tensors["transformer_blocks.3.attn1.processor.to_global_kv.bias"]
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"missing \(1\):\n +transformer_blocks.3.attn1.processor.to_global_kv.bias"
    ):
        load(path, **untold)


def test_a_file_of_a_folder_is_told_from_a_published_one(tmp_path):
    toy_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the folder by from_pretrained"):
        load(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="is a folder: load it by from_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("pos_embed.proj.weight", None, r"must hold pos_embed.proj.weight \(D, C, p, p\)"),
        ("transformer_blocks.0.attn1.norm_q.weight", torch.ones(7), "a head width of 7"),
        ("transformer_blocks.0.attn1.norm_q.weight", torch.ones(0), r"the file has \(0,\)"),
        (
            "proj_out.weight",
            torch.ones(3),
            r"proj_out.weight must be \(p \* p \* C, D\), the file has \(3,\)",
        ),
        ("transformer_blocks.99999999999.x", torch.ones(1), "numbered from 0 without gaps"),
        ("transformer_blocks.0.attn1.processor.local_rel_pos_bias", torch.ones(48, 2), "the file has 48"),
        ("transformer_blocks.0.attn1.processor.local_rel_pos_bias", torch.tensor(1.0), r"the file has \(\)"),
    ],
)
def test_tensors_that_tell_no_possible_size_are_refused(tmp_path, name, tensor, message):
    """The impossible table stands in the last block that has one."""
    tensors = to_published(toy_model(num_layers=1).state_dict())
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(ValueError, match=message):
        infer_config(tensors)


# --- Writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        LOCAL,
        {"global_context": False, "relative_position_bias": True},
        {"relative_position_bias": False, "rope": False, "window_size": 3, "sample_size": 40},
        {"full_attention_layers": (0, 2), "attention_residual": False, "dropout": 0.1},
        {"full_attention_layers": (0, 1, 2, 3), "qk_norm_eps": 1e-5, "interpolation_scale": 1.5},
        {"in_channels": 3, "out_channels": None, "use_additional_conditions": False},
    ],
)
def test_what_is_written_comes_back_with_its_config(tmp_path, config):
    """Nothing is folded on the way: the header says whether there is a global context."""
    model = toy_model(**config)
    model.save_single_file(tmp_path / "new" / "model.safetensors")
    loaded = load(tmp_path / "new" / "model.safetensors")
    assert json.loads(loaded.to_json_string()) == json.loads(model.to_json_string())
    assert same(loaded.state_dict(), model.state_dict())


def test_what_was_loaded_can_be_written_both_ways(tmp_path):
    """The tensors of a file are views of one memory, which safetensors must not take for shared weights."""
    model, path, untold = toy_file(tmp_path)
    loaded = load(path, **untold)
    loaded.save_single_file(path)  # over the file that it came from
    assert same(load(path).state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "folder")
    reloaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert same(reloaded.state_dict(), model.state_dict())


def test_the_written_file_is_in_the_published_layout_without_stale_copies(tmp_path):
    model = toy_model().to(memory_format=torch.channels_last)
    model.config["_name_or_path"] = "somewhere/weights"
    path = tmp_path / "model.safetensors"
    model.save_single_file(path)
    assert same(load_file(path), published_layout(model.state_dict()))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert "somewhere" not in metadata["config"]
    assert json.loads(metadata["config"])["_class_name"] == "LocalDiTTransformer2DModel"


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("the old file")

    def fail(tensors, file, metadata):
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(single_file, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        toy_model().save_single_file(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "the old file"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_saved_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append(os.readlink(f"/proc/self/fd/{f}")), flush(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    toy_model().save_single_file(tmp_path / "model.safetensors")
    assert len(calls) == 3
    assert ".safetensors.tmp-" in calls[0]
    assert calls[1:] == ["replace", str(tmp_path)]
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == plain.stat().st_mode


def test_a_model_that_the_layout_cannot_hold_is_not_written(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*model.pt"):
        toy_model().save_single_file(tmp_path / "model.pt")
    model = toy_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    with pytest.raises(ValueError, match="unload the adapters"):
        model.save_single_file(path)
    model.unload_lora()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="undo fuse_qkv_projections"):
        model.save_single_file(path)
    with torch.device("meta"):
        empty = LocalDiTTransformer2DModel(**TOY)
    with pytest.raises(ValueError, match="scale_shift_table is offloaded"):
        empty.save_single_file(path)
    assert list(tmp_path.iterdir()) == []


class Styled(LocalDiTTransformer2DModel):
    """A subclass with a config field of its own, which makes a layer, and others that it has fixed."""

    @register_to_config
    def __init__(
        self, num_attention_heads=2, attention_head_dim=12, num_layers=2, caption_channels=16, sample_size=16,
        in_channels=4, out_channels=4, global_context=True, relative_position_bias=None, window_size=4,
        patch_size=2, use_additional_conditions=True, num_styles=0,
    ):  # fmt: skip
        fields = {name: value for name, value in self.config.items() if name != "num_styles"}
        super().__init__(**fields, rope=False, full_attention_layers=(1,))
        if num_styles:
            self.styles = nn.Embedding(num_styles, 6)


def test_a_subclass_has_its_fields_and_tensors_in_the_file(tmp_path, caplog):
    model = Styled(num_styles=3)
    redraw(model)
    path = tmp_path / "styled.safetensors"
    model.save_single_file(path)
    loaded = Styled.from_single_file(path)
    assert not caplog.records
    assert type(loaded) is Styled
    assert (loaded.config.num_styles, loaded.config.rope) == (3, False)
    assert same(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"the header of .* must name config fields, got \['num_styles'\]"):
        load(path)
    rotary = tmp_path / "rotary.safetensors"
    toy_model(num_layers=2, full_attention_layers=(1,)).save_single_file(rotary)
    with pytest.raises(ValueError, match=r"must name config fields, got \['rope'\]"):
        Styled.from_single_file(rotary)

    plain = toy_model(num_layers=2, full_attention_layers=(1,))
    plain = published_file(tmp_path / "plain.safetensors", plain)
    assert Styled.from_single_file(plain).config.num_styles == 0
    with pytest.raises(ValueError, match=r"missing \(1\):\n +styles.weight \(5, 6\)"):
        Styled.from_single_file(plain, num_styles=5)


def test_lines_that_differ_in_the_block_alone_are_one():
    """The first number between dots counts, whatever stands before it; a number in a shape is none."""
    lines = [
        "blocks.0.mlp.0.weight (2,)",
        "blocks.11.mlp.0.weight (2,)",
        "blocks.2.mlp.2.weight (2,)",
        "a.x (1,)",
    ]
    lines += ["blocks.3.mlp.0.weight (3,)", "layer_1.b is 0.5 of 1.2.3"]
    assert by_block(lines) == [
        "blocks.{0,11}.mlp.0.weight (2,)",
        "blocks.2.mlp.2.weight (2,)",
        "a.x (1,)",
        "blocks.3.mlp.0.weight (3,)",
        "layer_1.b is 0.5 of 1.2.3",
    ]


# --- Files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", *PICKLES])
def test_every_format_gives_the_same_model(tmp_path, suffix):
    model = toy_model()
    path = published_file(tmp_path / f"published{suffix}", model)
    assert same(load(path, sample_size=16).state_dict(), model.state_dict())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "step": 7, "optimizer": {"lr": 1e-4}},
        lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {f"model.module.{name}": nn.Parameter(tensor) for name, tensor in tensors.items()},
    ],
)
def test_common_wrappers_are_opened_and_it_is_said(tmp_path, caplog, wrap, legacy):
    tensors = {"proj_out.weight": torch.randn(3, 4), "proj_out.bias": torch.randn(3)}
    content = wrap(tensors)
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
    with caplog.at_level(logging.INFO):
        read = read_state_dict(tmp_path / "file.pt")
    assert same(read, tensors)
    assert not any(tensor.requires_grad for tensor in read.values())
    said = {
        name for name in ("'state_dict'", "'step'", "'model'", "'module.'", "'model.'") if name in caplog.text
    }
    expected = {
        "'step'": "step" in content,
        "'state_dict'": "state_dict" in content,
        "'model'": "model" in content,
        "'module.'": "module." in str(content),
        "'model.'": "model.module" in str(content),
    }
    assert said == {name for name, is_there in expected.items() if is_there}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds none"),
        ({"state_dict": {}}, "holds none"),
        ({"state_dict": {"a": torch.ones(1)}, "model": {"a": torch.ones(1)}}, r"\['state_dict', 'model'\]"),
        ({"a": torch.ones(1), "step": 3}, "'step' is a int"),
        ({0: torch.ones(1)}, "0 is a Tensor"),
        ([torch.ones(1)], "it holds a list"),
        (torch.ones(1), "it holds a Tensor"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message) as error:
        read_state_dict(tmp_path / "file.pt")
    assert str(tmp_path / "file.pt") in str(error.value)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("suffix", PICKLES)
@pytest.mark.parametrize("place", ["beside", "within", "alone"])
def test_a_pickle_that_would_run_is_refused_and_does_not_run(tmp_path, suffix, write, place):
    canary = Canary(tmp_path / "canary")
    content = {
        "beside": {"state_dict": {"a": torch.ones(2)}, "args": canary},
        "within": {"a": torch.ones(2), "b": canary},
        "alone": canary,
    }[place]
    path = tmp_path / f"weights{suffix}"
    with path.open("wb") as file:
        if write == "plain":
            pickle.dump({"a": canary} if place != "alone" else canary, file)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=write == "zip")
    for read in (read_state_dict, load):
        with pytest.raises(
            ValueError, match=r"holds more than tensors.*nothing in it was run.*convert"
        ) as error:
            read(path)
        assert str(path) in str(error.value)
        # The reader knows no opcodes of newer plain pickles, so it cannot say what they would have called.
        assert ("mkdir" in str(error.value)) == (write != "plain")
        assert "weights_only=True" not in str(error.value)
    assert not canary.path.exists()
    with path.open("rb") as file, pytest.raises(Exception):  # noqa: B017, PT011 (the canary sings where it may)
        torch.load(file, weights_only=False)["nothing"]
    assert canary.path.exists()


def test_a_safetensors_file_cut_or_changed_in_its_header_is_named(tmp_path):
    """At every byte of the header, and at random ones of the data; random bytes of the header changed."""
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.randn(5, 3), "b": torch.randn(4)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (*range(header), *random.sample(range(header, len(whole)), 20)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights\.safetensors is (cut|empty)"):
            read_state_dict(path)
    for _ in range(300):
        changed = bytearray(whole)
        changed[random.randrange(header)] = random.randrange(256)
        path.write_bytes(changed)
        # A change that makes another name is no damage that a reader can see.
        with suppress(ValueError):
            assert len(read_state_dict(path)) == 2


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_cut_pickle_is_named(tmp_path, legacy):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.randn(500)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in (0, 1, 10, *random.sample(range(11, len(whole)), 30)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights\.pt (is|holds)"):
            read_state_dict(path)


@pytest.mark.parametrize("suffix", [".safetensors", *PICKLES])
def test_files_that_are_none_are_named(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(FileNotFoundError, match="weights"):
        read_state_dict(path)
    path.touch()
    with pytest.raises(ValueError, match=rf"weights\{suffix} is empty \(0 bytes\)"):
        read_state_dict(path)
    path.write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(ValueError, match=rf"weights\{suffix} (is cut, corrupt|holds)"):
        read_state_dict(path)
    with pytest.raises(ValueError, match=r"path must end in \.safetensors or \.pt.*weights\.gguf"):
        path.rename(tmp_path / "weights.gguf") and read_state_dict(tmp_path / "weights.gguf")


def test_recorded_cases_are_left_aside_only_if_the_header_counts_them(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"model.a": torch.randn(2), "case0.output": torch.randn(3), "case1.output": torch.randn(3)}
    save_file(tensors, path, metadata={"meta": json.dumps({"cases": [[8, 8], [8, 16]]})})
    assert same(read_state_dict(path), {"a": tensors["model.a"]})
    save_file(tensors, path, metadata={"meta": json.dumps({"cases": [[8, 8]]})})
    assert read_state_dict(path).keys() == {"model.a", "case1.output"}
    save_file(tensors, path)
    assert read_state_dict(path).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "{"}, "must be JSON objects"),
        ({"config": "[1]"}, "must be JSON objects"),
        ({"meta": "7"}, "must be JSON objects"),
        ({"config": "[" * 100_000}, "must be JSON objects"),
        ({"config": json.dumps({"auto_map": {"AutoModel": "evil.Model"}})}, r"got \['auto_map'\]"),
        ({"config": json.dumps({"num_layers": 10**9})}, "says num_layers=1000000000, but the tensors tell 4"),
        ({"config": json.dumps({"caption_channels": "16"})}, "says caption_channels='16'"),
        ({"config": json.dumps({"sample_size": -1})}, "sample_size must be a positive integer"),
        ({"config": json.dumps({"global_context": False})}, r"surplus \(44\)"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, metadata, message):
    path = published_file(tmp_path / "published.safetensors", toy_model(), metadata)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_stripped_branch_is_missed(tmp_path):
    """A file that says it has a global context is not folded in silence."""
    path = tmp_path / "model.safetensors"
    toy_model().save_single_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".processor." not in name}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"missing \(48\)"):
        load(path)
