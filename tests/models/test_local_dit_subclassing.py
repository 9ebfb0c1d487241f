"""A subclass of the LocalDiT transformer saves, loads, offloads, trains, compiles and takes a LoRA.

One changes what a block computes, one swaps the attention processor, two add a config field and an input: one
hands the parent's fields on, one spells them out.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig
from torch import Tensor, nn
from toys import TOY, redraw, relative_error, run, toy_inputs, toy_model

from localdit.models.local_dit import (
    LocalDiTAttention,
    LocalDiTAttnProcessor,
    LocalDiTBlock,
    LocalDiTTransformer2DModel,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class GatedBlock(LocalDiTBlock):
    """A block that learns, channel by channel, how much of itself to use."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.gate = nn.Parameter(torch.ones(config.num_attention_heads * config.attention_head_dim))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), self.gate)


class GatedLocalDiT(LocalDiTTransformer2DModel):
    block_class = GatedBlock


class PosedBlock(LocalDiTBlock):
    """A block that also hears of a pose, (B, pose_channels)."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.pose = nn.Linear(config.pose_channels, config.num_attention_heads * config.attention_head_dim)

    def forward(self, hidden_states: Tensor, *args: Any, pose: Tensor | None = None, **kwargs: Any) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return super().forward(hidden_states, *args, **kwargs)


class PosedLocalDiT(LocalDiTTransformer2DModel):
    block_class = PosedBlock

    @register_to_config
    def __init__(self, pose_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


class SpelledOutLocalDiT(LocalDiTTransformer2DModel):
    """As diffusers' own models have it: every field in the signature."""

    block_class = PosedBlock

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 4,
        num_layers: int = 18,
        caption_channels: int = 4096,
        sample_size: int = 128,
        patch_size: int = 2,
        window_size: int = 4,
        interpolation_scale: float | None = None,
        norm_eps: float = 1e-6,
        qk_norm_eps: float = 1e-10,
        dropout: float = 0.0,
        rope: bool = True,
        global_context: bool = True,
        attention_residual: bool = True,
        full_attention_layers: tuple[int, ...] = (),
        use_additional_conditions: bool = True,
        relative_position_bias: bool | None = None,
        pose_channels: int = 3,
    ):
        fields = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "__class__", "pose_channels")
        }
        super().__init__(**fields)


class SharpProcessor(LocalDiTAttnProcessor):
    """Local attention whose output counts twice."""

    def __call__(self, attn: LocalDiTAttention, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(attn, *args, **kwargs)


class SharpBlock(LocalDiTBlock):
    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.attn1.set_processor(SharpProcessor())


class SharpLocalDiT(LocalDiTTransformer2DModel):
    block_class = SharpBlock


SUBCLASSES = {
    "block": (GatedLocalDiT, {}),
    "config field and input": (PosedLocalDiT, {"pose_channels": 5}),
    "all config fields spelled out": (SpelledOutLocalDiT, {"pose_channels": 5}),
    "processor": (SharpLocalDiT, {}),
}
every_subclass = pytest.mark.parametrize(("cls", "config"), SUBCLASSES.values(), ids=SUBCLASSES)


def subclass_inputs(config: dict[str, Any]) -> dict[str, Any]:
    inputs = toy_inputs((5, 7))
    if "pose_channels" in config:
        generator = torch.Generator().manual_seed(7)
        inputs["attention_kwargs"] = {"pose": torch.randn(2, config["pose_channels"], generator=generator)}
    return inputs


@every_subclass
def test_a_subclass_computes_something_of_its_own(cls, config):
    """And starts from its parent's weights where the names agree."""
    model, parent = toy_model(cls, **config), toy_model()
    result = model.load_state_dict(parent.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".gate" in key or ".pose." in key for key in result.missing_keys)
    inputs = subclass_inputs(config)
    plain = {key: value for key, value in inputs.items() if key != "attention_kwargs"}
    assert relative_error(run(model, inputs), run(parent, plain)) > 1e-3


def test_an_extra_input_is_heard_by_every_block_and_may_be_left_out():
    model, parent = toy_model(PosedLocalDiT, pose_channels=5), toy_model()
    model.load_state_dict(parent.state_dict(), strict=False)
    inputs = subclass_inputs({"pose_channels": 5})
    without = {key: value for key, value in inputs.items() if key != "attention_kwargs"}
    assert torch.equal(run(model, without), run(parent, without))
    heard = []
    for i in range(4):
        model.load_state_dict(parent.state_dict(), strict=False)
        for k, block in enumerate(model.transformer_blocks):
            nn.init.constant_(block.pose.weight, float(k == i))
            nn.init.zeros_(block.pose.bias)
        heard.append(relative_error(run(model, inputs), run(parent, without)))
    assert min(heard) > 1e-3


@every_subclass
def test_a_subclass_saves_and_loads(cls, config, tmp_path):
    model, inputs = toy_model(cls, **config), subclass_inputs(config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    assert saved.get("pose_channels") == config.get("pose_channels")
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is cls
    assert torch.equal(run(loaded, inputs), run(model, inputs))


class SmallPosedLocalDiT(PosedLocalDiT):
    """Hands on what its parent hands on, with another default, and with one value that is always the same."""

    @register_to_config
    def __init__(self, num_layers: int = 2, style: str = "plain", **kwargs: Any):
        super().__init__(num_layers=num_layers, **kwargs | {"rope": False})


def test_fields_that_are_handed_on_are_recorded_saved_and_loaded(tmp_path):
    """Through two generations, from a folder, a config, and one file."""
    fields = {name: value for name, value in TOY.items() if name != "num_layers"}
    model = SmallPosedLocalDiT(**fields, pose_channels=5, style="fancy", dropout=0.125)
    expected = dict(LocalDiTTransformer2DModel(**fields).config)
    expected |= {"num_layers": 2, "rope": False, "dropout": 0.125, "pose_channels": 5, "style": "fancy"}

    def public(config):
        return {name: value for name, value in config.items() if not name.startswith("_")}

    assert public(model.config) == public(expected)
    model.save_pretrained(tmp_path)
    model.save_single_file(tmp_path / "model.safetensors")
    for loaded in (
        SmallPosedLocalDiT.from_pretrained(tmp_path),
        SmallPosedLocalDiT.from_single_file(tmp_path / "model.safetensors"),
    ):
        assert public(loaded.config) | {"full_attention_layers": ()} == public(expected)
        assert all(
            torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items()
        )
    other = SmallPosedLocalDiT.from_config(model.config, pose_channels=7)
    assert public(other.config) == public(expected) | {"pose_channels": 7}
    # What a config leaves open is the subclass's default, not its parent's.
    config = {name: value for name, value in fields.items() if name != "num_layers"}
    assert len(SmallPosedLocalDiT.from_config(config).transformer_blocks) == 2


def test_a_field_that_no_parent_has_is_refused():
    with pytest.raises(TypeError, match="posture"):
        PosedLocalDiT(**TOY, posture=5)


@every_subclass
def test_a_subclass_compiles(cls, config):
    model, inputs = toy_model(cls, num_layers=1, window_size=2, **config), subclass_inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


@every_subclass
def test_a_subclass_compiles_block_by_block(cls, config):
    """The declaration names the subclass's own block."""
    model, inputs = toy_model(cls, num_layers=2, **config), subclass_inputs(config)
    plain = run(model, inputs)
    assert model._repeated_blocks == model._no_split_modules == [cls.block_class.__name__]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(run(model, inputs), plain) < 1e-5


@every_subclass
def test_a_subclass_takes_a_lora(cls, config, tmp_path):
    model, inputs = toy_model(cls, **config), subclass_inputs(config)
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    redraw(model)
    adapted = run(model, inputs)
    assert relative_error(adapted, plain) > 1e-2
    scaled = inputs | {"attention_kwargs": {"scale": 0.0} | inputs.get("attention_kwargs", {})}
    model.save_lora_adapter(tmp_path)
    unscaled = run(model, scaled)
    model.unload_lora()
    plain = run(model, inputs)
    assert relative_error(unscaled, plain) < 1e-6
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), adapted)


@every_subclass
@pytest.mark.parametrize("level", ["block_level", "leaf_level", "sequential"])
def test_a_subclass_offloads(level, cls, config, tmp_path):
    model, inputs = toy_model(cls, **config), subclass_inputs(config)
    plain = run(model, inputs)
    if level == "sequential":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    assert torch.equal(run(model, inputs), plain)


@every_subclass
def test_a_subclass_trains_with_gradient_checkpointing(cls, config):
    model, inputs = toy_model(cls, **config).train(), subclass_inputs(config)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name


@every_subclass
def test_a_subclass_takes_an_encoded_caption(cls, config):
    model, inputs = toy_model(cls, **config), subclass_inputs(config)
    with torch.no_grad():
        context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    encoded = inputs | {"encoder_hidden_states": context, "encoder_attention_mask": None}
    assert torch.equal(run(model, encoded), run(model, inputs))


def test_a_subclass_loads_a_published_file():
    path = Path(__file__).parents[1] / "fixtures/published_with_global_context.safetensors"
    model, parent = (cls.from_single_file(path) for cls in (SharpLocalDiT, LocalDiTTransformer2DModel))
    assert type(model) is SharpLocalDiT
    for key, tensor in parent.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_an_input_that_no_block_takes_is_refused_by_name():
    inputs = toy_inputs() | {"attention_kwargs": {"posture": torch.ones(2, 3)}}
    for cls in (LocalDiTTransformer2DModel, PosedLocalDiT):
        with pytest.raises(ValueError, match=r"attention_kwargs.*posture"):
            toy_model(cls)(**inputs)


def test_an_untrained_subclass_is_initialised_like_its_parent():
    """The parent's rules hold for the subclass's model, and what the subclass adds keeps its own start."""
    model = GatedLocalDiT(num_attention_heads=2, attention_head_dim=12, num_layers=2, caption_channels=16)
    assert all(torch.equal(block.gate, torch.ones(24)) for block in model.transformer_blocks)
    assert not any(block.attn2.to_out[0].weight.any() for block in model.transformer_blocks)
    assert not model.proj_out.weight.any()
