"""What the SparseDiT transformer refuses: each wrong value is named before anything is computed."""

from typing import Any, NoReturn

import pytest
import torch
from toy_sparse import TOY, sparse_inputs, toy_sparse

from localdit.models.sparse_dit import SparseDiTTransformer2DModel


def inputs_with(**changes: Any) -> dict[str, Any]:
    return sparse_inputs() | changes


# What is passed, the argument that the message must name, and the value that it must show.
WRONG_INPUTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "latents without a batch": (
        inputs_with(hidden_states=torch.randn(4, 8, 8)),
        "hidden_states",
        r"\(4, 8, 8\)",
    ),
    "latents of 3 channels": (inputs_with(hidden_states=torch.randn(2, 3, 8, 8)), "hidden_states", r"\b3\b"),
    "odd height": (inputs_with(hidden_states=torch.randn(2, 4, 7, 8)), "height", r"\b7\b"),
    "odd width": (inputs_with(hidden_states=torch.randn(2, 4, 8, 9)), "width", r"\b9\b"),
    "no height": (inputs_with(hidden_states=torch.randn(2, 4, 0, 8)), "height", r"\b0\b"),
    "text without a batch": (
        inputs_with(encoder_hidden_states=torch.randn(5, 24)),
        "encoder_hidden_states",
        r"\(5, 24\)",
    ),
    "text of another width": (
        inputs_with(encoder_hidden_states=torch.randn(2, 5, 23)),
        "encoder_hidden_states",
        r"\b23\b",
    ),
    "text for one of two samples": (
        inputs_with(encoder_hidden_states=torch.randn(1, 5, 24)),
        "encoder_hidden_states",
        r"\b1\b",
    ),
    "mask of another length": (
        inputs_with(encoder_attention_mask=torch.ones(2, 6)),
        "encoder_attention_mask",
        r"\(2, 6\)",
    ),
    "timesteps for another batch": (inputs_with(timestep=torch.zeros(3)), "timestep", r"\(3,\)"),
    "timesteps of rank 2": (inputs_with(timestep=torch.ones(2, 1)), "timestep", r"\(2, 1\)"),
    "a negative share": (inputs_with(mask_ratio=-0.1), "mask_ratio", r"-0\.1"),
    "everything dropped": (inputs_with(mask_ratio=1.0), "mask_ratio", r"1\.0"),
    "nearly everything dropped": (inputs_with(mask_ratio=0.95), "mask_ratio", r"16 tokens, got 0\.95"),
    "no share": (inputs_with(mask_ratio=float("nan")), "mask_ratio", "nan"),
    "noise of another length": (
        inputs_with(mask_ratio=0.5, mask_noise=torch.rand(2, 15)),
        "mask_noise",
        r"\(2, 15\)",
    ),
    "noise without masking": (
        inputs_with(mask_noise=torch.rand(2, 16)),
        "mask_noise",
        r"\(2, 16\) with 0\.0",
    ),
    "unknown attention argument": (inputs_with(attention_kwargs={"gligen": 1}), "attention_kwargs", "gligen"),
}


@pytest.mark.parametrize(("inputs", "name", "value"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_a_wrong_input_is_named_with_its_value_before_anything_is_computed(inputs, name, value):
    model = toy_sparse().train()

    def fail(*_: Any) -> NoReturn:
        pytest.fail("a layer ran before the check")

    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=name) as error:
        model(**inputs)
    assert error.match(value)


def test_dropping_tokens_outside_training_is_refused():
    with pytest.raises(ValueError, match=r"mask_ratio must be 0 in evaluation mode, got 0\.75"):
        toy_sparse()(**sparse_inputs(), mask_ratio=0.75)


def test_an_encoded_caption_for_another_batch_or_beside_a_mask_is_refused():
    model, inputs = toy_sparse(), sparse_inputs(batch=3)
    text = inputs["encoder_hidden_states"]
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*\b2\b.*\b3\b"):
        model(**inputs | {"encoder_hidden_states": model.encode_text(text[:2])})
    with pytest.raises(ValueError, match="encoder_attention_mask must be None"):
        model(
            **inputs | {"encoder_hidden_states": model.encode_text(text)},
            encoder_attention_mask=torch.ones(3, 5),
        )


@pytest.mark.parametrize(
    ("text", "mask", "name", "value"),
    [
        (torch.randn(2, 7, 15), None, "encoder_hidden_states", "15"),
        (torch.randn(2, 1, 7, 24), None, "encoder_hidden_states", r"\(2, 1, 7, 24\)"),
        (torch.randn(2, 7, 24), torch.ones(2, 6), "encoder_attention_mask", r"\(2, 6\)"),
    ],
)
def test_a_caption_that_cannot_be_encoded_is_named_with_its_value(text, mask, name, value):
    with pytest.raises(ValueError, match=name) as error:
        toy_sparse().encode_text(text, mask)
    assert error.match(value)


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no blocks": ({"num_layers": 0}, "num_layers", r"\b0\b"),
    "half an expert": ({"num_experts": 2.5}, "num_experts", r"2\.5"),
    "no output": ({"out_channels": 0}, "out_channels", r"\b0\b"),
    "a negative mixer": ({"mixer_num_layers": -1}, "mixer_num_layers", "-1"),
    "half a mixer": ({"mixer_num_layers": 1.5}, "mixer_num_layers", r"1\.5"),
    "a width of no whole heads": ({"hidden_size": 72}, "hidden_size", r"\b72\b"),
    "a mixer of no whole heads": ({"mixer_hidden_size": 40}, "mixer_hidden_size", r"\b40\b"),
    "a width that has no positions": (
        {"hidden_size": 6, "attention_head_dim": 3, "mixer_hidden_size": 6},
        "hidden_size must be a multiple of 4",
        r"\b6\b",
    ),
    "ratios for other blocks": ({"ffn_ratio": (1.0, 2.0, 3.0)}, "ffn_ratio", r"\(1\.0, 2\.0, 3\.0\)"),
    "a ratio of nothing": ({"attention_ratio": (0.0, 1.0)}, "attention_ratio", r"\(0\.0, 1\.0\)"),
    "one ratio": ({"ffn_ratio": 4.0}, "ffn_ratio", r"4\.0"),
    "no capacity": ({"expert_capacity": 0.0}, "expert_capacity", r"0\.0"),
    "no interpolation": ({"interpolation_scale": 0.0}, "interpolation_scale", r"0\.0"),
    "an epsilon of one": ({"norm_eps": 1.0}, "norm_eps", r"1\.0"),
    "a switch that is none": ({"use_bias": "no"}, "use_bias", "no"),
    "a world of experts": ({"num_experts": 10**9}, "parameters", r"num_experts=1000000000"),
    "a feed-forward without end": ({"ffn_ratio": (1.0, 1e9)}, "parameters", "hidden_size=64"),
}


@pytest.mark.parametrize(("config", "name", "value"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_wrong_config_is_named_with_its_value(config, name, value):
    with pytest.raises(ValueError, match=name) as error:
        SparseDiTTransformer2DModel(**TOY | config)
    assert error.match(value)


@pytest.mark.parametrize(
    "config", [{"attention_ratio": [0.5, 1.0]}, {"out_channels": None}, {"moe_every_n": 99}], ids=str
)
def test_what_a_config_file_holds_is_taken(config):
    assert toy_sparse(**config)(**sparse_inputs()).sample.shape == (2, 4, 8, 8)
