"""What subclasses of the LocalDiT transformer compute, and how their config fields are handed on; that the
tools work on them is in `test_tools.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import each
from diffusers.configuration_utils import register_to_config
from subclasses import SUBCLASSES, GatedLocalDiT, PosedLocalDiT, SharpLocalDiT
from torch import nn
from toys import TOY, relative_error, run, toy_inputs, toy_model

from localdit.models.local_dit import LocalDiTTransformer2DModel


@each({name: toy for name, toy in SUBCLASSES.items() if issubclass(toy.cls, LocalDiTTransformer2DModel)})
def test_a_subclass_computes_something_of_its_own(toy):
    """And starts from its parent's weights where the names agree."""
    model, parent = toy.model(), toy_model()
    result = model.load_state_dict(parent.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".gate" in key or ".pose." in key for key in result.missing_keys)
    assert relative_error(run(model, toy.inputs(model)), run(parent, toy_inputs((5, 7)))) > 1e-3


def test_an_extra_input_is_heard_by_every_block_and_may_be_left_out():
    model, parent = toy_model(PosedLocalDiT, pose_channels=5), toy_model()
    model.load_state_dict(parent.state_dict(), strict=False)
    inputs = SUBCLASSES["local_dit, config field and input"].inputs(model)
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
