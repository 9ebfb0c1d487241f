"""Published PixelDiT checkpoints: every layout is read, what does not fit is named, and what is written comes
back."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig
from pixeldit_toys import TOYS, redraw, run, toy_inputs, toy_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localdit.models.pixeldit import PixelDiTBlock, PixelDiTTransformer2DModel
from localdit.models.pixeldit_single_file import (
    from_published,
    infer_config,
    join_halves,
    load_single_file,
    to_published,
)
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel

both = pytest.mark.parametrize("cls", TOYS, ids=["class", "text"])
HEAD = "the head that aligns representations in training"
CONFIGS: list[dict[str, Any]] = [
    {},
    {"pixel_post_modulation": True},
    {"patch_size": 2, "in_channels": 4, "pixel_dim": 4, "pixel_mlp_ratio": 3.0},
    {"num_layers": 1, "num_pixel_layers": 3, "pixel_num_attention_heads": 2, "pixel_attention_head_dim": 4},
]


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def head(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{i}.{kind}": torch.randn(4, 4) for i in (0, 2, 4) for kind in ("weight", "bias")}


def lightning(path: Path, network: dict[str, Tensor], **families: dict[str, Tensor]) -> Path:
    """The class model's checkpoint: a moving average, by default beside weights that are noise."""
    noise = {name: torch.randn_like(tensor) for name, tensor in network.items()}
    named = families or {"denoiser": noise, "ema_denoiser": network}
    tensors = {key: x for name, family in named.items() for key, x in prefixed(f"{name}.", family).items()}
    tensors |= head("diffusion_trainer.proj.0.")
    torch.save({"state_dict": tensors, "epoch": 319, "global_step": 1_600_000}, path)
    return path


def core(path: Path, network: dict[str, Tensor]) -> Path:
    """The text model's checkpoint."""
    torch.save({"state_dict": prefixed("core.", network) | head("_repa_projector.")}, path)
    return path


def comfyui(path: Path, network: dict[str, Tensor], pixels: int, tail: str = "") -> Path:
    """ComfyUI's: of each pixel of a modulation three values in one tensor and three in another."""
    tensors = {}
    for name, tensor in network.items():
        if name.startswith("pixel_blocks.") and ".adaLN_modulation.0." in name:
            values = tensor.unflatten(0, (pixels, 6, -1))
            for part, half in (("msa", values[:, :3]), ("mlp", values[:, 3:])):
                key = name.replace("adaLN_modulation.0", f"adaLN_modulation_{part}{tail}")
                tensors[key] = half.flatten(0, 2).contiguous()
        else:
            tensors[name] = tensor.contiguous()
    save_file(prefixed("model.diffusion_model.", tensors), path)
    return path


def untold(model: Any) -> dict[str, Any]:
    return {"sample_size": model.config.sample_size}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


# --- The layout


@both
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_layouts_are_each_others_inverse(cls, config):
    state_dict = toy_model(cls, **config).state_dict()
    published = to_published(state_dict)
    assert same(from_published(published), state_dict)
    assert sum(x.numel() for x in published.values()) == sum(x.numel() for x in state_dict.values())


def test_the_published_class_network_has_these_names_and_shapes():
    with torch.device("meta"):
        model = PixelDiTTransformer2DModel()
    shapes = {name: tuple(x.shape) for name, x in to_published(model.state_dict()).items()}
    d, k, e, h = 1152, 4096, 16, 3072
    attention = {"q_norm.weight": (72,), "k_norm.weight": (72,), "proj.weight": (d, d), "proj.bias": (d,)}
    attention |= {"qkv.weight": (3 * d, d)}
    patch = {
        "norm1.weight": (d,),
        "norm2.weight": (d,),
        "mlp.w1.weight": (h, d),
        "mlp.w3.weight": (h, d),
        "mlp.w2.weight": (d, h),
        "adaLN_modulation.0.weight": (6 * d, d),
        "adaLN_modulation.0.bias": (6 * d,),
    } | {f"attn.{name}": shape for name, shape in attention.items()}
    pixel = {
        "norm1.weight": (e,),
        "norm2.weight": (e,),
        "compress_to_attn.weight": (d, k),
        "compress_to_attn.bias": (d,),
        "expand_from_attn.weight": (k, d),
        "expand_from_attn.bias": (k,),
        "mlp.fc1.weight": (4 * e, e),
        "mlp.fc1.bias": (4 * e,),
        "mlp.fc2.weight": (e, 4 * e),
        "mlp.fc2.bias": (e,),
        "adaLN_modulation.0.weight": (6 * k, d),
        "adaLN_modulation.0.bias": (6 * k,),
    } | {f"attn.{name}": shape for name, shape in attention.items()}
    expected: dict[str, tuple[int, ...]] = {
        "pixel_embedder.proj.weight": (e, 3),
        "pixel_embedder.proj.bias": (e,),
        "s_embedder.proj.weight": (d, 768),
        "s_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (1001, d),
        "final_layer.norm.weight": (e,),
        "final_layer.linear.weight": (3, e),
        "final_layer.linear.bias": (3,),
    }
    expected |= {f"patch_blocks.{i}.{name}": shape for i in range(26) for name, shape in patch.items()}
    expected |= {f"pixel_blocks.{i}.{name}": shape for i in range(4) for name, shape in pixel.items()}
    assert shapes == expected


def test_the_published_text_network_has_these_names_and_shapes():
    with torch.device("meta"):
        model = PixelDiTTextTransformer2DModel()
    shapes = {name: tuple(x.shape) for name, x in to_published(model.state_dict()).items()}
    d, h = 1536, 4096
    block: dict[str, tuple[int, ...]] = {}
    for stream, modulation in (("x", "img"), ("y", "txt")):
        block |= {
            f"norm_{stream}1.weight": (d,),
            f"norm_{stream}2.weight": (d,),
            f"attn.qkv_{stream}.weight": (3 * d, d),
            f"attn.q_norm_{stream}.weight": (64,),
            f"attn.k_norm_{stream}.weight": (64,),
            f"attn.proj_{stream}.weight": (d, d),
            f"attn.proj_{stream}.bias": (d,),
            f"mlp_{stream}.w1.weight": (h, d),
            f"mlp_{stream}.w2.weight": (d, h),
            f"mlp_{stream}.w3.weight": (h, d),
            f"adaLN_modulation_{modulation}.0.weight": (6 * d, d),
            f"adaLN_modulation_{modulation}.0.bias": (6 * d,),
        }
    found = {name: shape for name, shape in shapes.items() if name.startswith("patch_blocks.")}
    assert found == {f"patch_blocks.{i}.{name}": shape for i in range(14) for name, shape in block.items()}
    assert shapes["y_embedder.proj.weight"] == (d, 2304)
    assert shapes["y_embedder.norm.weight"] == (d,)
    assert shapes["y_pos_embedding"] == (1, 300, d)
    assert shapes["pixel_blocks.1.compress_to_attn.weight"] == (1152, 4096)


@both
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_tensors_tell_the_config(cls, config):
    model = toy_model(cls, **config)
    inferred = infer_config(to_published(model.state_dict()))
    patch = {"pixel_num_attention_heads": model.config.num_attention_heads,
             "pixel_attention_head_dim": model.config.attention_head_dim}  # fmt: skip
    expected = {name: model.config[name] for name in inferred}
    assert inferred == {name: patch[name] if value is None else value for name, value in expected.items()}
    assert len(inferred) == 12 + (cls is PixelDiTTextTransformer2DModel)


# --- Reading


def test_of_a_lightning_checkpoint_the_moving_average_is_read(tmp_path, caplog):
    model = toy_model()
    path = lightning(tmp_path / "class.ckpt", to_published(model.state_dict()))
    with caplog.at_level(logging.INFO, logger="localdit"):
        loaded, report = load_single_file(PixelDiTTransformer2DModel, path, **untold(model))
    assert same(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert {reason: len(names) for reason, names in report.dropped.items()} == {
        HEAD: 6,
        "the weights of which there is a moving average": len(to_published(model.state_dict())),
    }
    assert report.parameters == 340_019
    assert "a class model of 2 patch blocks, 4 heads of 16, and 2 pixel blocks" in report.found
    assert "ema_denoiser.*" in report.chosen
    assert "NSCLv1, for research and evaluation only" in report.chosen
    assert "NSCLv1" in caplog.text
    inputs = toy_inputs(model)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_without_a_moving_average_the_weights_are_read(tmp_path):
    model = toy_model()
    path = lightning(tmp_path / "class.ckpt", {}, denoiser=to_published(model.state_dict()))
    loaded, report = load_single_file(PixelDiTTransformer2DModel, path, **untold(model))
    assert same(loaded.state_dict(), model.state_dict())
    assert list(report.dropped) == [HEAD]
    assert "took the network from denoiser.*" in report.chosen


def test_the_text_models_checkpoint_is_read(tmp_path):
    model = toy_model(PixelDiTTextTransformer2DModel)
    path = core(tmp_path / "text.pth", to_published(model.state_dict()))
    loaded, report = load_single_file(PixelDiTTextTransformer2DModel, path, **untold(model))
    assert same(loaded.state_dict(), model.state_dict())
    assert {reason: len(names) for reason, names in report.dropped.items()} == {HEAD: 6}
    assert "a text model of 2 patch blocks" in report.found


@pytest.mark.parametrize("tail", ["", ".0"])
def test_comfyuis_checkpoint_is_read(tail, tmp_path):
    model = toy_model(PixelDiTTextTransformer2DModel)
    path = comfyui(tmp_path / "text.safetensors", to_published(model.state_dict()), pixels=16, tail=tail)
    loaded = PixelDiTTextTransformer2DModel.from_single_file(path, **untold(model))
    assert same(loaded.state_dict(), model.state_dict())


def test_half_of_a_modulation_is_refused():
    network = {
        "s_embedder.proj.weight": torch.zeros(8, 48),
        "pixel_embedder.proj.weight": torch.zeros(8, 3),
        "pixel_blocks.0.adaLN_modulation_msa.weight": torch.zeros(384, 8),
    }
    with pytest.raises(ValueError, match=r"must come in two halves, msa and mlp, the file has \['msa'\]"):
        join_halves(network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_the_dtype_is_the_files_or_the_one_asked_for(dtype, tmp_path):
    model = toy_model().half()
    path = lightning(tmp_path / "class.ckpt", to_published(model.state_dict()))
    loaded = PixelDiTTransformer2DModel.from_single_file(path, dtype=dtype, **untold(model))
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float16}


def test_overrides_say_what_the_tensors_do_not(tmp_path):
    model = toy_model(timestep_period=100.0, mlp_ratio=3.0)
    path = lightning(tmp_path / "class.ckpt", to_published(model.state_dict()))
    told = {"timestep_period": 100.0, "mlp_ratio": 3.0, "sample_size": 16}
    loaded = PixelDiTTransformer2DModel.from_single_file(path, **told)
    inputs = toy_inputs(model)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    with pytest.raises(ValueError, match=r"w1\.weight is \(128, 64\), must be \(170, 64\)"):
        PixelDiTTransformer2DModel.from_single_file(path)


# --- What is refused


@both
def test_missing_surplus_and_misshapen_tensors_are_named(cls, tmp_path):
    network = to_published(toy_model(cls).state_dict())
    del network["pixel_blocks.0.expand_from_attn.bias"]
    network["patch_blocks.1.extra"] = torch.zeros(3)
    network["t_embedder.mlp.0.bias"] = torch.zeros(5)
    path = core(tmp_path / "broken.pth", network)
    with pytest.raises(ValueError, match="must be those of the model") as error:
        cls.from_single_file(path)
    assert error.match(r"missing \(1\):\n +pixel_blocks.0.expand_from_attn.bias \(128,\)")
    assert error.match(r"surplus \(1\):\n +patch_blocks.1.extra \(3,\)")
    assert error.match(r"misshapen \(1\):\n +t_embedder.mlp.0.bias is \(5,\), must be \(64,\)")


@both
def test_a_model_of_the_other_kind_is_refused_with_the_name_of_its_class(cls, tmp_path):
    other = next(base for base in TOYS if base is not cls)
    path = core(tmp_path / "other.pth", to_published(toy_model(other).state_dict()))
    with pytest.raises(ValueError, match=f"must hold another model, .* load it by {other.__name__}"):
        cls.from_single_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s_embedder.proj.weight": None}, r"must hold s_embedder.proj.weight \(D, C \* p \* p\)"),
        ({"s_embedder.proj.weight": torch.zeros(64, 50)}, "must read C . p . p values, with C = 3 .* has 50"),
        ({"patch_blocks.0.attn.q_norm.weight": torch.zeros(48)}, "widths of 64 and 64 are no multiples"),
        ({"pixel_embedder.proj.weight": torch.zeros(8)}, r"pixel_embedder.proj.weight must be \(E, C\)"),
    ],
    ids=["no patch embedding", "no square patch", "odd heads", "a vector"],
)
def test_tensors_that_tell_no_model_are_refused(change, message):
    network = to_published(toy_model().state_dict()) | change
    with pytest.raises(ValueError, match=message):
        infer_config({name: tensor for name, tensor in network.items() if tensor is not None})


def test_overrides_that_contradict_or_do_not_exist_are_refused(tmp_path):
    path = lightning(tmp_path / "class.ckpt", to_published(toy_model().state_dict()))
    with pytest.raises(ValueError, match="config_overrides says num_layers=3, but the tensors tell 2"):
        PixelDiTTransformer2DModel.from_single_file(path, num_layers=3)
    with pytest.raises(ValueError, match=r"config_overrides must name config fields, got \['window_size'\]"):
        PixelDiTTransformer2DModel.from_single_file(path, window_size=4)
    with pytest.raises(ValueError, match="dtype must be a floating type"):
        PixelDiTTransformer2DModel.from_single_file(path, dtype=torch.int8)


def test_a_pickle_that_holds_more_than_tensors_is_refused_unread(tmp_path):
    path = tmp_path / "class.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Path("/")}, path)
    with pytest.raises(ValueError, match=r"more than tensors .* nothing in it was run"):
        PixelDiTTransformer2DModel.from_single_file(path)


# --- Writing


@both
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_written_file_gives_an_equal_model(cls, config, tmp_path, caplog):
    model = toy_model(cls, **config | {"timestep_period": 50.0, "mlp_ratio": 2.5})
    path = tmp_path / "deep" / "model.safetensors"
    model.save_single_file(path)
    with caplog.at_level(logging.INFO, logger="localdit"):
        loaded = cls.from_single_file(path)
    assert same(loaded.state_dict(), model.state_dict())
    configs = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (loaded, model)]
    assert configs[0] == configs[1]
    assert load_file(path).keys() == to_published(model.state_dict()).keys()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"])["_class_name"] == cls.__name__
    assert "NSCLv1" not in caplog.text  # weights of one's own


def test_what_the_layout_has_no_place_for_is_not_written(tmp_path):
    model = toy_model()
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        model.save_single_file(tmp_path / "model.pth")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="unload the adapters"):
        model.save_single_file(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


class GatedBlock(PixelDiTBlock):
    def __init__(self, config: Any):
        super().__init__(config)
        self.gate = nn.Parameter(torch.full((config.gates,), 0.5))

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        return torch.lerp(hidden_states, super().forward(hidden_states, *args), self.gate.mean())


class GatedPixelDiT(PixelDiTTransformer2DModel):
    block_class = GatedBlock

    @register_to_config
    def __init__(self, gates: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


def test_a_subclass_keeps_what_is_its_own(tmp_path):
    model = toy_model(GatedPixelDiT, gates=5)
    redraw(model)
    model.save_single_file(tmp_path / "model.safetensors")
    loaded = GatedPixelDiT.from_single_file(tmp_path / "model.safetensors")
    assert loaded.config.gates == 5
    inputs = toy_inputs(model)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
