"""What the LocalDiT transformer refuses: each wrong value is named before anything is computed."""

from typing import Any, NoReturn

import pytest
import torch
from toys import TOY, toy_inputs, toy_model

from localdit.models.local_dit import LocalDiTTransformer2DModel


def with_hidden_states(*shape: int) -> dict[str, Any]:
    return toy_inputs() | {"hidden_states": torch.randn(shape)}


def with_conditions(**conditions: Any) -> dict[str, Any]:
    inputs = toy_inputs(batch=3)
    return inputs | {"added_cond_kwargs": inputs["added_cond_kwargs"] | conditions}


def without_condition(name: str) -> dict[str, Any]:
    inputs = toy_inputs()
    conditions = {key: value for key, value in inputs["added_cond_kwargs"].items() if key != name}
    return inputs | {"added_cond_kwargs": conditions}


# What is passed, the argument that the message must name, and the value that it must show.
WRONG_INPUTS = {
    "latents without a batch": (with_hidden_states(4, 16, 16), "hidden_states", r"\(4, 16, 16\)"),
    "latents with a frame": (with_hidden_states(2, 4, 1, 16, 16), "hidden_states", r"\(2, 4, 1, 16, 16\)"),
    "latents of 3 channels": (with_hidden_states(2, 3, 16, 16), "hidden_states", r"\b3\b"),
    "odd height": (with_hidden_states(2, 4, 17, 16), "height", "17"),
    "odd width": (with_hidden_states(2, 4, 16, 15), "width", "15"),
    "no height": (with_hidden_states(2, 4, 0, 16), "height", r"\b0\b"),
    "text without a batch": (
        toy_inputs() | {"encoder_hidden_states": torch.randn(7, 16), "encoder_attention_mask": None},
        "encoder_hidden_states",
        r"\(7, 16\)",
    ),
    "text of another width": (
        toy_inputs() | {"encoder_hidden_states": torch.randn(2, 7, 15)},
        "encoder_hidden_states",
        r"\b15\b",
    ),
    "text for one of two samples": (
        toy_inputs() | {"encoder_hidden_states": torch.randn(1, 7, 16), "encoder_attention_mask": None},
        "encoder_hidden_states",
        r"\b1\b",
    ),
    "mask of another length": (
        toy_inputs() | {"encoder_attention_mask": torch.ones(2, 8)},
        "encoder_attention_mask",
        r"\(2, 8\)",
    ),
    "mask for another batch": (
        toy_inputs() | {"encoder_attention_mask": torch.ones(1, 7)},
        "encoder_attention_mask",
        r"\(1, 7\)",
    ),
    "mask of rank 3": (
        toy_inputs() | {"encoder_attention_mask": torch.ones(2, 1, 7)},
        "encoder_attention_mask",
        r"\(2, 1, 7\)",
    ),
    "timesteps for another batch": (toy_inputs() | {"timestep": torch.arange(3)}, "timestep", r"\(3,\)"),
    "timesteps of rank 2": (toy_inputs() | {"timestep": torch.ones(2, 1)}, "timestep", r"\(2, 1\)"),
    "no resolution": (without_condition("resolution"), "resolution", r"\(2, 2\)"),
    "no aspect ratio": (without_condition("aspect_ratio"), "aspect_ratio", r"\(2,\)"),
    "resolution None": (with_conditions(resolution=None), "resolution", r"\(3, 2\)"),
    "one number of resolution": (with_conditions(resolution=torch.ones(3)), "resolution", r"\(3,\)"),
    "resolution turned": (with_conditions(resolution=torch.ones(2, 3)), "resolution", r"\(2, 3\)"),
    "resolution for another batch": (with_conditions(resolution=torch.ones(2, 2)), "resolution", r"\(2, 2\)"),
    "aspect ratio for another batch": (
        with_conditions(aspect_ratio=torch.ones(2)),
        "aspect_ratio",
        r"\(2,\)",
    ),
    "unknown attention argument": (
        toy_inputs() | {"attention_kwargs": {"gligen": 1}},
        "attention_kwargs",
        "gligen",
    ),
}


@pytest.mark.parametrize(("inputs", "name", "value"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_a_wrong_input_is_named_with_its_value_before_anything_is_computed(inputs, name, value):
    model = toy_model()

    def fail(*_: Any) -> NoReturn:
        pytest.fail("a layer ran before the check")

    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=name) as error:
        model(**inputs)
    assert error.match(value)


def test_an_encoded_caption_for_another_batch_is_refused():
    model, inputs = toy_model(), toy_inputs(batch=3)
    context = model.encode_text(inputs["encoder_hidden_states"][:2], inputs["encoder_attention_mask"][:2])
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*\b2\b.*\b3\b"):
        model(**inputs | {"encoder_hidden_states": context, "encoder_attention_mask": None})


def test_a_mask_beside_an_encoded_caption_is_refused():
    """The caption holds its own: a second one would be ignored."""
    model, inputs = toy_model(), toy_inputs()
    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    with pytest.raises(ValueError, match="encoder_attention_mask"):
        model(**inputs | {"encoder_hidden_states": context})


@pytest.mark.parametrize(
    ("text", "mask", "name", "value"),
    [
        (torch.randn(2, 7, 15), None, "encoder_hidden_states", "15"),
        (torch.randn(7, 16), None, "encoder_hidden_states", r"\(7, 16\)"),
        (torch.randn(2, 7, 16), torch.ones(2, 6), "encoder_attention_mask", r"\(2, 6\)"),
    ],
)
def test_a_caption_that_cannot_be_encoded_is_named_with_its_value(text, mask, name, value):
    with pytest.raises(ValueError, match=name) as error:
        toy_model().encode_text(text, mask)
    assert error.match(value)


def test_conditions_for_a_model_that_takes_none_are_refused():
    model = toy_model(use_additional_conditions=False)
    with pytest.raises(ValueError, match=r"added_cond_kwargs.*aspect_ratio"):
        model(**toy_inputs())
    inputs = toy_inputs(use_additional_conditions=False)
    for nothing in (None, {}, {"resolution": None, "aspect_ratio": None}):  # what PixArt's pipelines pass
        assert model(**inputs, added_cond_kwargs=nothing).sample.shape == (2, 4, 16, 16)


WRONG_CONFIGS = {
    "no window": ({"window_size": 0}, "window_size", r"\b0\b"),
    "a negative window": ({"window_size": -4}, "window_size", "-4"),
    "half a window": ({"window_size": 2.5}, "window_size", "2.5"),
    "no patch": ({"patch_size": 0}, "patch_size", r"\b0\b"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads", r"\b0\b"),
    "no blocks": ({"num_layers": 0}, "num_layers", r"\b0\b"),
    "a head that RoPE cannot halve twice": (
        {"num_attention_heads": 6, "attention_head_dim": 6},
        "attention_head_dim",
        r"\b6\b",
    ),
    "a width that is not three thirds": (
        {"num_attention_heads": 2, "attention_head_dim": 8},
        "use_additional_conditions",
        r"\b16\b",
    ),
    "a full block behind the last": ({"full_attention_layers": (0, 4)}, "full_attention_layers", r"\b4\b"),
    "a full block before the first": ({"full_attention_layers": (-1,)}, "full_attention_layers", "-1"),
    "a full block between blocks": ({"full_attention_layers": (0.5,)}, "full_attention_layers", "0.5"),
    "dropout of more than everything": ({"dropout": 1.5}, "dropout", "1.5"),
    "no interpolation": ({"interpolation_scale": 0.0}, "interpolation_scale", r"0\.0"),
}


@pytest.mark.parametrize(("config", "name", "value"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_wrong_config_is_named_with_its_value(config, name, value):
    with pytest.raises(ValueError, match=name) as error:
        LocalDiTTransformer2DModel(**TOY | config)
    assert error.match(value)


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 6, "attention_head_dim": 6, "rope": False},
        {"num_attention_heads": 2, "attention_head_dim": 8, "use_additional_conditions": False},
        {"full_attention_layers": [0, 3]},  # as a config file holds it
        {"out_channels": None},
    ],
    ids=str,
)
def test_a_rule_binds_only_where_it_applies(config):
    model = toy_model(**config)
    inputs = toy_inputs(use_additional_conditions=model.config.use_additional_conditions)
    assert model(**inputs).sample.shape == (2, 4, 16, 16)
