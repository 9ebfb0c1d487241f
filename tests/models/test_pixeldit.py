"""What the PixelDiT transformers compute: the published sizes and layouts, and the naive twin's numbers."""

from typing import Any

import pytest
import torch
from pixeldit_toys import TOYS, cast, naive, redraw, relative_error, run, toy_inputs, toy_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from localdit.models.pixeldit import (
    PixelDiTPixelBlock,
    PixelDiTTransformer2DModel,
    build_geometry,
    cached_geometry,
    patchify,
    rotary_table,
    unpatchify,
)
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel

# Ten times what rounding to float32 leaves. The text model's times reach 1000: their sinusoids round more.
TOLERANCE = {PixelDiTTransformer2DModel: 4e-6, PixelDiTTextTransformer2DModel: 5e-5}
both = pytest.mark.parametrize("cls", TOYS, ids=["class", "text"])


# --- Sizes


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("cls", "config", "count"),
    [
        (
            PixelDiTTransformer2DModel,
            {"num_layers": 12, "num_pixel_layers": 2, "num_attention_heads": 12, "attention_head_dim": 64},
            184_749_155,
        ),
        (PixelDiTTransformer2DModel, {"num_layers": 22, "attention_head_dim": 64}, 569_648_963),
        (PixelDiTTransformer2DModel, {}, 797_383_203),
        (PixelDiTTransformer2DModel, {"pixel_post_modulation": True}, 759_601_699),
        (PixelDiTTextTransformer2DModel, {}, 1_302_470_787),
        (
            PixelDiTTextTransformer2DModel,
            {"pixel_num_attention_heads": None, "pixel_attention_head_dim": None},
            1_317_021_283,
        ),
    ],
    ids=["B", "L", "XL", "XL post-modulation", "text", "text, pixels as wide as patches"],
)
def test_the_published_configurations_have_the_published_sizes(cls, config, count):
    with torch.device("meta"):
        model = cls(**config)
    assert parameters(model) == count
    with torch.device("meta"):
        other = cls(**config | {"sample_size": 48})
    assert {name: x.shape for name, x in other.state_dict().items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }


@pytest.mark.parametrize(("cls", "count"), list(zip(TOYS, [340_019, 395_699])), ids=["class", "text"])
def test_the_small_configurations_have_the_recorded_sizes(cls, count):
    assert parameters(toy_model(cls)) == count


def test_one_block_of_each_level_has_the_published_size():
    with torch.device("meta"):
        class_model, text_model = PixelDiTTransformer2DModel(), PixelDiTTextTransformer2DModel()
    assert parameters(class_model.transformer_blocks[0]) == 23_898_384
    assert parameters(class_model.pixel_blocks[0]) == 43_090_432
    assert parameters(text_model.transformer_blocks[0]) == 84_962_560
    assert parameters(text_model.pixel_blocks[0]) == 52_527_616


@pytest.mark.parametrize(("side", "gflops"), [(256, 311.19), (512, 1352.24)])
def test_a_forward_of_xl_costs_what_was_published(side, gflops):
    """Two operations for each multiplication and addition in the layers and in attention."""
    with torch.device("meta"):
        model = PixelDiTTransformer2DModel()
        inputs = torch.empty(1, 3, side, side), torch.empty(1), torch.empty(1, dtype=torch.int64)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.01)


# --- Layouts


def test_rotary_angles_are_normalised_and_alternate_between_column_and_row():
    table = rotary_table(2, 3, 16, 10000.0, 16.0, torch.device("cpu"))
    angles = torch.atan2(table[..., 1], table[..., 0])
    expected = {
        1: [8, 0, 0.8, 0, 0.08, 0, 0.008, 0],  # row 0, column 1
        3: [0, 16, 0, 1.6, 0, 0.16, 0, 0.016],  # row 1, column 0
    }
    for token, values in expected.items():
        turned = torch.tensor(values, dtype=torch.float64)
        turned = torch.atan2(turned.sin(), turned.cos()).float()
        torch.testing.assert_close(angles[token], turned, rtol=0, atol=2e-6)


def test_the_corners_of_every_picture_have_the_same_angles():
    tables = [
        rotary_table(h, w, 16, 10000.0, 16.0, torch.device("cpu")) for h, w in ((4, 4), (10, 4), (3, 7))
    ]
    for table, (h, w) in zip(tables, ((4, 4), (10, 4), (3, 7))):
        corners = table.unflatten(0, (h, w))[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert torch.equal(corners, tables[0].unflatten(0, (4, 4))[[0, 0, -1, -1], [0, -1, 0, -1]])


def geometry(h: int, w: int, patch: int, position_dim: int = 8) -> Any:
    rope = (10000.0, 16.0)
    return build_geometry(
        h, w, 0, patch, 16, 16, rope, None, position_dim, torch.float32, torch.device("cpu")
    )


def test_pixels_have_absolute_positions_column_first():
    tables = geometry(3, 2, patch=2)
    rows = tables.rows.flatten()[: 6 * 4].view(6, 4)
    columns = tables.columns.flatten().view(4, 4)
    whole = torch.cat((columns[None].expand(6, 4, 4), rows[:, None].expand(6, 4, 4)), dim=-1)  # (H, W, E)
    one, small = torch.tensor(1.0), torch.tensor(0.01)
    half = torch.stack((one.sin(), small.sin(), one.cos(), small.cos()))
    still = torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(whole[0, 1], torch.cat((half, still)))
    torch.testing.assert_close(whole[1, 0], torch.cat((still, half)))
    torch.testing.assert_close(whole[5, 3, 4:6], torch.tensor([5.0, 0.05]).sin())


def test_time_is_cosines_then_sines_of_a_period_of_ten():
    from diffusers.models.embeddings import get_timestep_embedding

    wave = get_timestep_embedding(
        torch.tensor([1.0]), 8, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=10
    )
    expected = [0.5403, 0.8460, 0.9504, 0.9842, 0.8415, 0.5332, 0.3110, 0.1769]
    torch.testing.assert_close(wave[0], torch.tensor(expected), rtol=0, atol=1e-4)
    model, seen = toy_model(), []
    model.time_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, toy_inputs(model, batch=1) | {"timestep": 1.0})
    angles = 10 ** (-torch.arange(128) / 128)
    torch.testing.assert_close(seen[0][0], torch.cat((angles.cos(), angles.sin())))


def test_patches_are_read_channel_first_and_laid_back():
    image = torch.arange(48.0).view(1, 3, 4, 4)
    patches = patchify(image, 2)
    assert patches[0, 0].flatten().tolist() == [0, 1, 4, 5, 16, 17, 20, 21, 32, 33, 36, 37]
    oblong = torch.randn(2, 3, 6, 10)
    assert torch.equal(unpatchify(patchify(oblong, 2).transpose(2, 3), (3, 5), 2), oblong)


# --- The naive twin's numbers


@both
@pytest.mark.parametrize("grid", [(4, 6), (1, 3), (5, 2)], ids=str)
def test_every_grid_equals_the_naive_twin(cls, grid):
    model = toy_model(cls, seed=grid[0])
    inputs = toy_inputs(model, grid, seed=grid[1])
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE[cls]


CONFIGS: list[dict[str, Any]] = [
    {"pixel_post_modulation": True},
    {"pixel_position": False},
    {"pixel_position": False, "pixel_dim": 6},
    {"rope_extent": 3.0},
    {"rope_theta": 100.0},
    {"timestep_period": 1000.0},
    {"norm_eps": 0.1},
    {"mlp_ratio": 2.5},
    {"pixel_mlp_ratio": 1.5},
    {"pixel_num_attention_heads": 3, "pixel_attention_head_dim": 8},
    {"in_channels": 4, "patch_size": 2},
]


@both
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_field_equals_the_naive_twin(cls, config):
    model = toy_model(cls, **config)
    inputs = toy_inputs(model, (2, 3))
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE[cls]


@pytest.mark.parametrize("config", [{"text_rope": False}, {"text_rope_theta": 50.0}], ids=str)
def test_the_texts_config_fields_equal_the_naive_twin(config):
    model = toy_model(PixelDiTTextTransformer2DModel, **config)
    inputs = toy_inputs(model, (2, 3))
    assert relative_error(run(model, inputs), naive(model, inputs)) < 5e-5
    plain = toy_model(PixelDiTTextTransformer2DModel)
    assert relative_error(run(model, inputs), run(plain, inputs)) > 1e-3


@both
@pytest.mark.parametrize(
    "config",
    [{"pixel_position": False}, {"rope_extent": 3.0}, {"rope_theta": 100.0}, {"timestep_period": 1000.0}],
    ids=str,
)
def test_each_switch_changes_the_prediction_by_far_more_than_the_tolerance(cls, config):
    """Toy weights under which a switch does not matter would prove nothing about it."""
    plain, switched = toy_model(cls), toy_model(cls, **config)
    inputs = toy_inputs(plain)
    assert relative_error(run(switched, inputs), run(plain, inputs)) > 1e-3


@both
@pytest.mark.parametrize("block", [1, 2])
def test_the_tokens_of_a_block_can_be_asked_for(cls, block):
    model = toy_model(cls)
    inputs = toy_inputs(model, (2, 3))
    with torch.no_grad():
        output = model(**inputs, return_hidden_state_of=block)
        as_tuple = model(**inputs, return_hidden_state_of=block, return_dict=False)
        plain = model(**inputs)
        alone = model(**inputs, return_dict=False)
    assert output.hidden_state.shape == (2, 6, 64)
    assert relative_error(output.hidden_state, naive(model, inputs, after=block)) < TOLERANCE[cls]
    assert torch.equal(output.sample, plain.sample)
    assert plain.hidden_state is None
    assert len(alone) == 1
    assert torch.equal(as_tuple[1], output.hidden_state)


@both
def test_bfloat16_is_no_further_from_the_truth_than_twice_a_naive_bfloat16(cls):
    model = toy_model(cls).bfloat16()
    inputs = cast(toy_inputs(model, (3, 4), batch=3), torch.bfloat16)
    if "encoder_hidden_states" in inputs:
        inputs["timestep"] = inputs["timestep"] / 1000  # the naive twin rounds the angles of large times
    truth = naive(model, inputs)
    floor = relative_error(naive(model, inputs, torch.bfloat16), truth)
    prediction = run(model, inputs)
    assert prediction.dtype == torch.bfloat16
    assert relative_error(prediction, truth) < 2 * floor


def test_large_times_keep_their_precision_in_bfloat16():
    """1000 and 999 are one number in bfloat16; the time of the text model must not be rounded so."""
    model = toy_model(PixelDiTTextTransformer2DModel).bfloat16()
    inputs = cast(toy_inputs(model, batch=1), torch.bfloat16)
    seen: list[Tensor] = []
    model.time_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for time in (1000.0, 999.0):
        run(model, inputs | {"timestep": torch.tensor([time])})
    assert (seen[0] - seen[1]).abs().max() > 0.5


@both
def test_a_batch_equals_its_members_alone(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model, (3, 5), batch=3)
    together = run(model, inputs)
    for i in range(3):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        assert relative_error(run(model, alone), together[i : i + 1]) < 1e-5


@both
def test_a_scalar_timestep_stands_for_the_whole_batch(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model, batch=3)
    batched = run(model, inputs | {"timestep": torch.full((3,), 0.25)})
    for scalar in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        assert torch.equal(run(model, inputs | {"timestep": scalar}), batched)


@both
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (4, 10), (10, 4)], ids=str)
def test_the_same_weights_run_at_any_size(cls, grid):
    model = toy_model(cls)
    sample = run(model, toy_inputs(model, grid))
    assert sample.shape == (2, 3, 4 * grid[0], 4 * grid[1])
    assert sample.isfinite().all()


# --- What hears what


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_pixel_wise_modulation_is_local_and_attention_is_not(post):
    """With attention silent a pixel hears itself and its patch's condition, and no other."""
    block = toy_model(pixel_post_modulation=post).pixel_blocks[0]
    nn.init.zeros_(block.expand.weight)
    nn.init.zeros_(block.expand.bias)
    x, cond = torch.randn(1, 6, 16, 8), torch.randn(1, 6, 64)
    x[0, 2, 5] = x[0, 2, 4]  # two pixels of a patch with one token
    rotary = geometry(2, 3, patch=4).pixel_rotary
    with torch.no_grad():
        plain = block(x, cond, rotary)
        moved = x.clone()
        moved[0, 4, 7] += 1
        pixel = (block(moved, cond, rotary) != plain).any(-1)[0]
        other = cond.clone()
        other[0, 1] += 1
        patch = (block(x, other, rotary) != plain).any(-1)[0]
    assert pixel.nonzero().tolist() == [[4, 7]]
    assert patch.all(1).tolist() == [False, True, False, False, False, False]
    assert not patch[[0, 2, 3, 4, 5]].any()
    assert (plain[0, 2, 5] - plain[0, 2, 4]).abs().max() > 1e-3
    redraw(block)
    with torch.no_grad():
        assert (block(moved, cond, rotary) != block(x, cond, rotary)).flatten(2).any(-1).all()


def test_padding_of_text_is_heard_without_a_mask_and_not_with_one():
    model = toy_model(PixelDiTTextTransformer2DModel)
    inputs = toy_inputs(model)
    mask = torch.ones(2, 7)
    mask[:, 4:] = 0
    moved = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    moved["encoder_hidden_states"][:, 4:] += 1
    assert relative_error(run(model, moved), run(model, inputs)) > 1e-3
    masked = run(model, inputs, encoder_attention_mask=mask)
    assert torch.equal(run(model, moved, encoder_attention_mask=mask), masked)
    with_mask = inputs | {"encoder_attention_mask": mask}
    assert relative_error(masked, naive(model, with_mask)) < 5e-5
    everything = run(model, inputs, encoder_attention_mask=torch.ones(2, 7, dtype=torch.bool))
    assert relative_error(everything, run(model, inputs)) < 1e-6


def test_no_class_is_a_label_of_its_own():
    model = toy_model()
    inputs = toy_inputs(model)
    first, none = (run(model, inputs | {"class_labels": torch.tensor([label] * 2)}) for label in (9, 10))
    assert relative_error(first, none) > 1e-3


# --- Memory


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and not x._is_view():
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_chunks_of_patches_change_no_number_and_bound_the_memory(post, monkeypatch):
    """Whatever the picture's size: at most four values for each pixel channel of a chunk's patches, or one
    for those of the picture."""
    model = toy_model(pixel_post_modulation=post)
    block, rotary = model.pixel_blocks[0], geometry(9, 15, patch=4).pixel_rotary
    x, cond = torch.randn(2, 135, 16, 8), torch.randn(2, 135, 64)
    made = {}
    with torch.no_grad():
        for chunk in (7, 1024):
            monkeypatch.setattr(PixelDiTPixelBlock, "chunk_size", chunk)
            with LargestTensor() as largest:
                made[chunk] = block(x, cond, rotary)
            assert largest.numbers == max(x.numel(), 4 * min(chunk, 270) * 16 * 8)
    assert relative_error(made[7], made[1024]) < 1e-6


def test_chunks_of_patches_change_no_gradient(monkeypatch):
    model = toy_model()
    inputs = toy_inputs(model, (3, 5))
    plain = gradients(model, inputs)
    monkeypatch.setattr(PixelDiTPixelBlock, "chunk_size", 4)
    for name, gradient in gradients(model, inputs).items():
        assert relative_error(gradient, plain[name]) < 1e-5, name


def test_the_tables_of_a_size_are_computed_once_and_their_number_is_bounded():
    model = toy_model()
    cached_geometry.cache_clear()
    for _ in range(3):
        run(model, toy_inputs(model, (3, 5)))
    assert cached_geometry.cache_info().misses == 1
    for width in range(1, 12):
        run(model, toy_inputs(model, (1, width), batch=1))
    info = cached_geometry.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize <= 16
    inputs = toy_inputs(model, (5, 3))
    assert relative_error(run(model, inputs), naive(model, inputs)) < 4e-6


def test_models_of_different_geometry_do_not_disturb_each_other():
    configs: list[dict[str, Any]] = [{}, {"rope_extent": 3.0}, {"pixel_position": False}, {"patch_size": 2}]
    models = [toy_model(**config) for config in configs]
    for model in models + models[::-1]:
        inputs = toy_inputs(model, (2, 3))
        assert relative_error(run(model, inputs), naive(model, inputs)) < 4e-6


# --- Training


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The text's stream of the last block is thrown away after its part in attention.
SILENT = ("to_add_out", "add_q_proj", "norm_added_q", "norm2_context", "ff_context")


def heard(model: Any, name: str) -> bool:
    last = f"transformer_blocks.{model.config.num_layers - 1}."
    return not (name.startswith(last) and any(part in name for part in SILENT))


@both
@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_an_untrained_model_predicts_zero_and_comes_alive_layer_by_layer(cls, post):
    """First the final layer, behind it the gates, then what they gate, last the patch level's text."""
    torch.manual_seed(0)
    model = cls(**TOYS[cls], pixel_post_modulation=post)
    inputs = toy_inputs(model)
    assert not run(model, inputs).any()
    target = torch.randn_like(inputs["hidden_states"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    alive: set[str] = set()
    for _ in range(5):
        optimizer.zero_grad()
        (model(**inputs).sample - target).square().mean().backward()
        alive |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert alive == {name for name, _ in model.named_parameters() if heard(model, name)}


@both
def test_the_initial_weights_are_drawn_as_published(cls):
    torch.manual_seed(0)
    model = cls(**TOYS[cls])
    bound = (6 / (64 + 48)) ** 0.5  # Xavier
    assert 0.9 * bound < model.patch_embed.weight.abs().max() <= bound
    assert not model.patch_embed.bias.any()
    for layer in (model.time_embed.linear_1, model.time_embed.linear_2):
        assert 0.019 < layer.weight.std() < 0.021
    zero = {name for name, p in model.named_parameters() if not p.any()}
    modulations = {name for name, _ in model.named_parameters() if "modulation" in name}
    assert zero == modulations | {"patch_embed.bias", "proj_out.weight", "proj_out.bias"}
    if cls is PixelDiTTransformer2DModel:
        assert 0.018 < model.class_embed.weight.std() < 0.022
    else:
        assert 0.9 < model.caption_position.std() < 1.1
    started = cls(**TOYS[cls] | {"zero_init_modulation": False})
    assert all(p.any() for name, p in started.named_parameters() if "modulation" in name)


@both
def test_gradients_reach_every_parameter_that_the_prediction_hears(cls):
    model = toy_model(cls).train()
    grads = gradients(model, toy_inputs(model))
    for name, _ in model.named_parameters():
        alive = name in grads and bool(grads[name].abs().max() > 0)
        assert alive == heard(model, name), name
    assert all(gradient.isfinite().all() for gradient in grads.values())


@both
def test_gradient_checkpointing_changes_no_gradient(cls):
    model = toy_model(cls).train()
    inputs = toy_inputs(model)
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls: list[str] = []
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append("patch"))
    model.pixel_blocks[0].ff.register_forward_hook(lambda *_: calls.append("pixel"))
    checkpointed = gradients(model, inputs)
    assert sorted(calls) == ["patch"] * 2 + ["pixel"] * 2  # once forward, once again for the gradient
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_a_model_first_used_in_inference_mode_can_be_trained_afterwards():
    model = toy_model()
    inputs = toy_inputs(model, (6, 11))
    with torch.inference_mode():
        model(**inputs)
    assert gradients(model, inputs)["patch_embed.weight"].abs().sum() > 0


# --- What is refused

GOOD: dict[str, Any] = {"timestep": torch.rand(2), "class_labels": torch.tensor([1, 2])}
PICTURE = torch.randn(2, 3, 8, 12)
WRONG_INPUTS = {
    "250 rows": ({"hidden_states": torch.randn(2, 3, 250, 256)}, "height must be a multiple of 4, got 250"),
    "odd width": ({"hidden_states": torch.randn(2, 3, 8, 9)}, "width must be a multiple of 4, got 9"),
    "no batch": ({"hidden_states": torch.randn(3, 8, 8)}, r"hidden_states must be .* got \(3, 8, 8\)"),
    "four channels": ({"hidden_states": torch.randn(2, 4, 8, 8)}, r"hidden_states must be \(batch, 3, "),
    "times for another batch": ({"timestep": torch.rand(3)}, r"timestep must be .* got \(3,\)"),
    "times of rank 2": ({"timestep": torch.rand(2, 1)}, r"timestep must be .* got \(2, 1\)"),
    "labels for another batch": ({"class_labels": torch.tensor([1])}, r"class_labels must be .* \(1,\)"),
    "labels of fractions": ({"class_labels": torch.rand(2)}, "class_labels must be .* torch.float32"),
    "block 0": ({"return_hidden_state_of": 0}, "return_hidden_state_of must be .* got 0"),
    "block 3 of 2": ({"return_hidden_state_of": 3}, "return_hidden_state_of must be .* got 3"),
    "unknown argument": ({"attention_kwargs": {"gligen": 1}}, "attention_kwargs holds .*gligen"),
}
WRONG_TEXTS = {
    "11 of 10 tokens": ({"encoder_hidden_states": torch.randn(2, 11, 32)}, r"1 to 10 tokens, got \(2, 11"),
    "no tokens": ({"encoder_hidden_states": torch.randn(2, 0, 32)}, r"1 to 10 tokens, got \(2, 0"),
    "another width": ({"encoder_hidden_states": torch.randn(2, 5, 31)}, r"\(batch, tokens, 32\)"),
    "another batch": ({"encoder_hidden_states": torch.randn(1, 5, 32)}, "has batch 1, hidden_states has"),
    "another mask": ({"encoder_attention_mask": torch.ones(2, 6)}, r"encoder_attention_mask .* \(2, 6\)"),
}


def refuse(*_: Any) -> None:
    pytest.fail("a layer ran before the check")


@pytest.mark.parametrize(("wrong", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_a_wrong_input_is_named_with_its_value_before_anything_is_computed(wrong, message):
    model = toy_model()
    for module in model.children():
        module.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        model(**{"hidden_states": PICTURE} | GOOD | wrong)


@pytest.mark.parametrize(("wrong", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_a_wrong_text_is_named_with_its_value(wrong, message):
    model = toy_model(PixelDiTTextTransformer2DModel)
    good = {"hidden_states": PICTURE, "timestep": 1.0, "encoder_hidden_states": torch.randn(2, 5, 32)}
    with pytest.raises(ValueError, match=message):
        model(**good | wrong)


WRONG_CONFIGS = {
    "no patch": ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
    "half a block": ({"num_pixel_layers": 1.5}, "num_pixel_layers must be a positive integer, got 1.5"),
    "heads of 10": ({"attention_head_dim": 10}, "attention_head_dim must be a multiple of 4, got 10"),
    "pixel heads of 6": ({"pixel_attention_head_dim": 6}, "pixel_attention_head_dim must be a multiple"),
    "no pixel heads": ({"pixel_num_attention_heads": 0}, "pixel_num_attention_heads must be a positive"),
    "pixels of 6": ({"pixel_dim": 6}, "pixel_dim must be a multiple of 4 with pixel_position, got 6"),
    "no period": ({"timestep_period": 0.0}, "timestep_period must be positive, got 0.0"),
}


@both
@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_wrong_config_is_named_with_its_value(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**TOYS[cls] | config)


def test_classes_and_text_are_sizes_too():
    with pytest.raises(ValueError, match="num_classes must be a positive integer, got 0"):
        toy_model(num_classes=0)
    with pytest.raises(ValueError, match="max_text_tokens must be a positive integer, got -1"):
        toy_model(PixelDiTTextTransformer2DModel, max_text_tokens=-1)
