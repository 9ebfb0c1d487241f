"""What the LEDiT transformer computes: published sizes, its masks, a naive twin, diffusers' DiT as its limit,
and where its sense of place comes from."""

import math
from typing import Any, NoReturn

import pytest
import torch
from ledit_toys import LEDIT_TOY, dit_of, ledit_inputs, naive_kinds, naive_ledit, naive_mask, toy_ledit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import redraw, relative_error, run

from localdit.models.ledit import (
    LEDiTAttention,
    LEDiTTransformer2DModel,
    LocalityConv,
    attention_kinds,
    cached_mask,
    causal_block_mask,
    causal_mask,
)

VARIANTS = ("raster", "rectangle", "neighborhood", "corner")
TOLERANCE = 1e-5  # the angles of timesteps, up to 1000 radians, are rounded to float32


# --- Sizes

# Blocks, width, heads; parameters with the full convolution, the depthwise one, and none.
SIZES = {
    "S/2": ((12, 384, 6), (34_192_544, 32_868_896, 32_865_056)),
    "B/2": ((12, 768, 12), (135_624_992, 130_323_488, 130_315_808)),
    "L/2": ((24, 1024, 16), (467_278_880, 457_850_912, 457_840_672)),
    "XL/2": ((28, 1152, 16), (686_779_808, 674_846_240, 674_834_720)),
}


@pytest.mark.parametrize(("size", "counts"), SIZES.values(), ids=SIZES)
def test_every_published_size_has_its_exact_number_of_parameters(size, counts):
    layers, dim, heads = size
    convolutions = {"conv_groups": 1}, {"conv_groups": dim}, {"conv_kernel_size": 0}
    for convolution, count in zip(convolutions, counts):
        with torch.device("meta"):
            model = LEDiTTransformer2DModel(
                num_layers=layers,
                num_attention_heads=heads,
                attention_head_dim=dim // heads,
                **convolution,
            )
        assert model.num_parameters() == count


def test_the_defaults_are_the_published_xl_and_a_norm_after_the_convolution_adds_two_widths():
    with torch.device("meta"):
        assert LEDiTTransformer2DModel().num_parameters() == 686_779_808
        assert LEDiTTransformer2DModel(conv_norm=True).num_parameters() == 686_779_808 + 2 * 1152


def test_no_tensor_depends_on_the_size_of_the_picture():
    shapes = [
        {name: tensor.shape for name, tensor in toy_ledit(sample_size=size).state_dict().items()}
        for size in (8, 64)
    ]
    assert shapes[0] == shapes[1]
    model = toy_ledit()
    before = model.state_dict().keys()
    run(model, ledit_inputs((7, 5)))
    assert model.state_dict().keys() == before == dict(model.named_parameters()).keys()


# --- Masks


def test_the_corner_mask_of_nine_tokens_is_the_recorded_one():
    rows = "111100100 111110110 111111111 111111100 111111110 111111111 111111111 111111111 111111111"
    expected = [[digit == "1" for digit in row] for row in rows.split()]
    assert causal_mask("corner", 3, 3, "cpu").tolist() == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", [(3, 3), (1, 6), (6, 1), (4, 7), (7, 4)])
def test_every_mask_is_its_formula_pair_by_pair(variant, grid):
    assert torch.equal(causal_mask(variant, *grid, "cpu"), naive_mask(variant, *grid))


@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (32, 24)])
def test_every_token_sees_the_counted_number_of_keys(grid):
    height, width = grid
    r, c = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    counts = {
        "raster": r * width + c + 1,
        "rectangle": (r + 1) * (c + 1),
        "corner": height * width - (height - 1 - r) * (width - 1 - c),
    }
    for variant, count in counts.items():
        assert torch.equal(causal_mask(variant, height, width, "cpu").sum(1), count)
    for variant in VARIANTS:
        mask = causal_mask(variant, height, width, "cpu")
        assert mask.diagonal().all()
        assert mask.dtype == torch.bool
        if variant != "raster":  # rows and columns play the same part
            turned = mask.view(height, width, height, width).permute(1, 0, 3, 2).reshape(mask.shape)
            assert torch.equal(turned, causal_mask(variant, width, height, "cpu"))


@pytest.mark.parametrize(
    ("side", "shares"),
    [(16, (0.50195, 0.28223, 0.29985, 0.78027)), (32, (0.50049, 0.26587, 0.27051, 0.76538))],
)
def test_every_mask_shows_the_recorded_share_of_pairs(side, shares):
    for variant, share in zip(VARIANTS, shares):
        assert causal_mask(variant, side, side, "cpu").float().mean() == pytest.approx(share, abs=5e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_for_flex_attention_is_the_same_mask(variant):
    mask = causal_block_mask(variant, 5, 7, "cpu")
    query, key = torch.arange(35)[:, None], torch.arange(35)[None, :]
    assert torch.equal(mask.mask_mod(None, None, query, key), causal_mask(variant, 5, 7, "cpu"))


@pytest.mark.parametrize("variant", [*VARIANTS, None])
def test_one_attention_hears_of_exactly_the_tokens_that_it_sees(variant):
    """Perturb each token in turn: the outputs of those that see it change, and no others."""
    grid, tokens = (3, 5), 15
    attention = LEDiTAttention(24, 2, is_raster=variant == "raster").eval()
    redraw(attention)
    mask = None if variant in ("raster", None) else causal_mask(variant, *grid, "cpu")
    visible = torch.ones(tokens, tokens, dtype=torch.bool) if variant is None else naive_mask(variant, *grid)
    x = torch.randn(2, tokens, 24)
    with torch.no_grad():
        before = attention(x, mask)
        for key in range(tokens):
            moved = x.clone()
            moved[0, key] += 1
            after = attention(moved, mask)
            assert torch.equal((after[0] != before[0]).any(-1), visible[:, key])
            assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_the_variance_of_a_causal_output_falls_with_position(mean):
    """Theorem 3.1 with the constant set right: 2 / (i + 1) at the i-th token, whatever the values' mean."""
    samples, tokens = 8_000, 64
    positions = torch.tensor([1, 4, 16, 64]) - 1
    scores = torch.empty(samples, len(positions), tokens).exponential_().log()
    seen = causal_mask("raster", 1, tokens, "cpu")[positions]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    outputs = torch.einsum("sqk,sk->sq", weights, mean + torch.randn(samples, tokens))
    assert torch.allclose(outputs.var(0), 2 / (positions + 2), rtol=0.1)


# --- The naive twin


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (6, 2), (1, 5)])
def test_every_grid_and_mask_equals_the_naive_twin(grid, variant):
    model = toy_ledit(causal_variant=variant, seed=sum(grid))
    inputs = ledit_inputs(grid, batch=3, seed=grid[0])
    assert relative_error(run(model, inputs), naive_ledit(model, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"attention_pattern": "ca_sa"},
        {"attention_pattern": "ca_first"},
        {"attention_pattern": "sa_first"},
        {"attention_pattern": "none"},
        {"attention_pattern": ["sa", "ca", "sa", "sa"]},
        {"conv_kernel_size": 0},
        {"conv_kernel_size": 5},
        {"conv_groups": 24},
        {"conv_groups": 3},
        {"conv_norm": True},
        {"scale_attention": False},
        {"sample_size": 32},
        {"norm_eps": 1e-2},
        {"mlp_ratio": 1.5},
        {"patch_size": 1},
        {"patch_size": 4, "in_channels": 3, "out_channels": 5, "sample_size": 16},
        {"num_attention_heads": 3, "attention_head_dim": 8},
    ],
    ids=str,
)
def test_every_config_field_equals_the_naive_twin(config):
    model, inputs = toy_ledit(**config), ledit_inputs((3, 5), **config)
    assert relative_error(run(model, inputs), naive_ledit(model, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        *({"attention_pattern": pattern} for pattern in ("ca_sa", "ca_first", "sa_first", "none")),
        *({"causal_variant": variant} for variant in VARIANTS[:3]),
        {"scale_attention": False},
        {"sample_size": 32},
        {"norm_eps": 1e-2},
    ],
    ids=str,
)
def test_each_switch_changes_the_prediction_by_far_more_than_the_tolerance(config):
    """Toy weights under which a switch does not matter would prove nothing about it."""
    inputs = ledit_inputs((3, 5))
    assert relative_error(run(toy_ledit(**config), inputs), run(toy_ledit(), inputs)) > 1e-3


@pytest.mark.parametrize("dilation", [2, 3])
def test_a_dilated_convolution_equals_the_naive_twin(dilation):
    model, inputs = toy_ledit(), ledit_inputs((6, 7))
    expected = naive_ledit(model, inputs, dilation)
    assert relative_error(run(model, inputs, dilation=dilation), expected) < TOLERANCE


@pytest.mark.parametrize("pattern", ["sa_ca", "ca_sa", "ca_first", "sa_first", "none"])
def test_a_pattern_is_its_list(pattern):
    assert list(attention_kinds(pattern, 6)) == naive_kinds(pattern, 6)
    assert attention_kinds(naive_kinds(pattern, 6), 6) == attention_kinds(pattern, 6)
    causal = [block.causal for block in toy_ledit(attention_pattern=pattern).transformer_blocks]
    assert causal == [kind == "ca" for kind in naive_kinds(pattern, 4)]


def test_the_published_order_has_fourteen_of_each_and_an_odd_number_begins_and_ends_with_sa():
    assert attention_kinds("sa_ca", 28).count("ca") == 14
    assert attention_kinds("sa_ca", 5) == ("sa", "ca", "sa", "ca", "sa")
    assert attention_kinds("ca_first", 5).count("ca") == attention_kinds("sa_first", 5).count("ca") == 2


# --- The known limit: a DiT


@pytest.mark.parametrize("positions", [False, True])
def test_without_mask_and_convolution_it_is_diffusers_dit(positions):
    """Whose position table is zero, or is added to our patches."""
    model = toy_ledit(attention_pattern="none", conv_kernel_size=0)
    dit = dit_of(model)
    if positions:
        table = dit.pos_embed.pos_embed[0].T.unflatten(1, (4, 4))  # (D, h, w)
        model.patch_embed.register_forward_hook(lambda module, args, out: out + table)
    else:
        dit.pos_embed.pos_embed.zero_()
    inputs = ledit_inputs(batch=3)
    expected = run(dit, inputs)
    assert relative_error(run(model, inputs), expected) < 1e-5


def test_a_convolution_that_is_the_identity_changes_nothing():
    model = toy_ledit()
    plain = toy_ledit(conv_kernel_size=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    nn.init.dirac_(model.locality_conv.weight)
    nn.init.zeros_(model.locality_conv.bias)
    inputs = ledit_inputs((3, 5))
    for dilation in (1, 2):
        assert relative_error(run(model, inputs, dilation=dilation), run(plain, inputs)) < 1e-6


def test_an_untrained_model_predicts_zero():
    model = LEDiTTransformer2DModel(**LEDIT_TOY).eval()
    assert not run(model, ledit_inputs((3, 5))).any()


def test_the_weights_start_as_dit_starts_them():
    model = LEDiTTransformer2DModel(**LEDIT_TOY | {"num_attention_heads": 16, "num_layers": 1})
    state, dim = model.state_dict(), 192
    for name in ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder"):
        assert state[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1)
    for name in ("transformer_blocks.0.modulation", "modulation_out", "proj_out"):
        assert not state[f"{name}.weight"].any()
    bounds = {  # Xavier: sqrt(6 / (inputs + outputs)), of the convolution in all nine taps
        "patch_embed": 16 + dim,
        "locality_conv": 9 * 2 * dim,
        "transformer_blocks.0.attn1.to_q": 2 * dim,
        "transformer_blocks.0.ff.net.0.proj": 5 * dim,
    }
    for name, fans in bounds.items():
        assert state[f"{name}.weight"].abs().max() == pytest.approx(math.sqrt(6 / fans), rel=0.02)
    assert not any(tensor.any() for name, tensor in state.items() if name.endswith("bias"))


# --- Where the sense of place comes from


@pytest.mark.parametrize(
    ("config", "blind"),
    [
        ({"attention_pattern": "none", "conv_kernel_size": 0}, True),
        ({"attention_pattern": "none"}, False),
        ({"attention_pattern": ["sa", "ca", "sa", "sa"], "conv_kernel_size": 0}, False),
        ({}, False),
    ],
    ids=str,
)
def test_position_comes_from_mask_and_padding_alone(config, blind):
    """Without both, a permutation of the patches permutes the prediction and does no more."""
    model, inputs = toy_ledit(**config), ledit_inputs((4, 6))
    order = torch.randperm(24)

    def permute(x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 2, stride=2)[:, :, order]
        return nn.functional.fold(patches, x.shape[2:], 2, stride=2)

    permuted = run(model, inputs | {"hidden_states": permute(inputs["hidden_states"])})
    error = relative_error(permuted, permute(run(model, inputs)))
    assert error < 1e-5 if blind else error > 1e-3


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_the_convolution_is_dilated_in_training_alone(prob, training):
    """The tokens that hear of one patch, two rows away with dilation, beside it without."""
    model = toy_ledit(attention_pattern="none", multi_dilation_prob=prob, multi_dilation=2)
    seen = {}
    model.locality_conv.register_forward_hook(lambda module, args, out: seen.update(out=out))
    model.train(training)
    inputs = ledit_inputs((7, 7), batch=1)
    moved = inputs | {"hidden_states": inputs["hidden_states"].clone()}
    run(model, inputs)
    before = seen["out"]
    moved["hidden_states"][0, :, 6:8, 6:8] += 1  # the token in the middle
    run(model, moved)
    reached = (seen["out"] != before)[0].any(0).nonzero() - 3
    step = 2 if training and prob else 1
    assert reached.tolist() == [[step * i, step * j] for i in (-1, 0, 1) for j in (-1, 0, 1)]


@pytest.mark.parametrize("config", [{}, {"conv_kernel_size": 0}, {"multi_dilation_prob": 0.0}], ids=str)
def test_nothing_is_drawn_where_nothing_is_to_be_decided(config):
    model, inputs = toy_ledit(**config), ledit_inputs()
    state = torch.get_rng_state()
    run(model, inputs)
    if config:
        run(model.train(), inputs)
    run(model.train(), inputs, dilation=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dilation_is_drawn_once_a_call_at_its_probability_and_a_seed_repeats_it():
    model, inputs = toy_ledit(multi_dilation_prob=0.3).train(), ledit_inputs((3, 3), batch=1)
    dilations: list[int] = []
    model.locality_conv.register_forward_pre_hook(lambda module, args: dilations.append(args[1]))
    counts = []
    for _ in range(2):
        torch.manual_seed(5)
        dilations.clear()
        for _ in range(60):
            run(model, inputs)
        counts.append(list(dilations))
    assert counts[0] == counts[1]
    assert 8 <= counts[0].count(2) <= 28
    assert set(counts[0]) == {1, 2}


# --- Larger than trained on


@pytest.mark.parametrize(
    ("tokens", "trained", "factor"),
    [
        (576, 256, 1.07063),
        (784, 256, 1.09628),
        (768, 256, 1.09459),
        (1024, 256, 1.11803),
        (4096, 256, 1.22474),
        (64, 256, 0.86603),
        (2304, 1024, 1.05688),
        (3136, 1024, 1.07772),
        (4096, 1024, 1.09545),
    ],
)
def test_attention_is_scaled_by_the_recorded_factors(tokens, trained, factor):
    model = toy_ledit(sample_size=2 * math.isqrt(trained))
    scale = model._attention_scale(tokens, None, torch.device("cpu"), traced=False)
    assert scale.item() == pytest.approx(factor, abs=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (16, 12), (12, 16), (4, 8)])
def test_any_size_runs_without_new_parameters_and_only_other_sizes_are_scaled(size):
    scaled, plain = toy_ledit(), toy_ledit(scale_attention=False)
    inputs = ledit_inputs((size[0] // 2, size[1] // 2))
    prediction = run(scaled, inputs)
    assert prediction.shape == (2, 8, *size)
    assert prediction.isfinite().all()
    same = torch.equal(prediction, run(plain, inputs))
    assert same == (size == (8, 8))
    factor = math.sqrt(math.log(size[0] * size[1] / 4) / math.log(16))
    assert relative_error(run(plain, inputs, attention_scale=factor), prediction) < 1e-6
    assert torch.equal(run(scaled, inputs, attention_scale=1.0), run(plain, inputs))


def test_the_factor_is_the_one_of_the_softmax():
    """Of Jin et al.: 1 / sqrt(d) becomes sqrt(log_T N / d), in causal and in other blocks."""
    attention = LEDiTAttention(24, 2).eval()
    redraw(attention)
    x, scale = torch.randn(2, 9, 24), torch.tensor(1.3)
    with torch.no_grad():
        q, k, v = (y.transpose(1, 2) for y in attention.project(x))
        expected = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.3 / math.sqrt(12))
        expected = attention.to_out[0](expected.transpose(1, 2).flatten(2))
        assert relative_error(attention(x, None, scale), expected) < 1e-6


# --- Inputs


def test_a_scalar_timestep_stands_for_the_whole_batch():
    model, inputs = toy_ledit(), ledit_inputs(batch=3)
    batched = run(model, inputs | {"timestep": torch.full((3,), 421)})
    for scalar in (421, 421.0, torch.tensor(421), torch.tensor([421])):
        assert torch.equal(run(model, inputs | {"timestep": scalar}), batched)


def test_a_batch_equals_its_members_alone():
    model, inputs = toy_ledit(), ledit_inputs((3, 5), batch=3)
    together = run(model, inputs)
    for i in range(3):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        assert relative_error(run(model, alone), together[i : i + 1]) < 1e-5


def test_every_label_and_the_missing_one_has_a_row_of_its_own():
    model, inputs = toy_ledit(), ledit_inputs(batch=1)
    outputs = [run(model, inputs | {"class_labels": torch.tensor([label])}) for label in range(11)]
    for i, output in enumerate(outputs):
        assert all(relative_error(output, other) > 1e-3 for other in outputs[:i])


def test_a_tuple_holds_what_the_output_object_holds():
    model, inputs = toy_ledit(), ledit_inputs()
    with torch.no_grad():
        (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, run(model, inputs))


WRONG_INPUTS = {
    "latents without a batch": ({"hidden_states": torch.zeros(4, 8, 8)}, r"hidden_states .* \(4, 8, 8\)"),
    "latents of 3 channels": ({"hidden_states": torch.zeros(2, 3, 8, 8)}, r"\(batch, 4, height, width\)"),
    "odd height": ({"hidden_states": torch.zeros(2, 4, 7, 8)}, "height must be a multiple of 2, got 7"),
    "odd width": ({"hidden_states": torch.zeros(2, 4, 8, 9)}, "width must be a multiple of 2, got 9"),
    "no height": ({"hidden_states": torch.zeros(2, 4, 0, 8)}, "height must be a multiple of 2, got 0"),
    "timesteps for another batch": ({"timestep": torch.arange(3)}, r"timestep must be .* got \(3,\)"),
    "labels for another batch": ({"class_labels": torch.arange(3)}, r"class_labels must be \(2,\) .*\(3,\)"),
    "labels that are no integers": (
        {"class_labels": torch.zeros(2)},
        "class_labels must be .* torch.float32",
    ),
    "no dilation": ({"dilation": 0}, "dilation must be at least 1 or None, got 0"),
    "unknown attention argument": ({"attention_kwargs": {"gligen": 1}}, r"attention_kwargs .*\['gligen'\]"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_a_wrong_input_is_named_with_its_value_before_anything_is_computed(wrong, message):
    model = toy_ledit()

    def fail(*_: Any) -> NoReturn:
        pytest.fail("a layer ran before the check")

    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=message):
        model(**ledit_inputs() | wrong)


WRONG_CONFIGS = {
    "no patch": ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
    "half a head": ({"num_attention_heads": 2.5}, "num_attention_heads must be .* got 2.5"),
    "no feed-forward": ({"mlp_ratio": 0.0}, "mlp_ratio must be positive, got 0.0"),
    "an even convolution": ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, or 0 .* got 4"),
    "a negative convolution": ({"conv_kernel_size": -3}, "conv_kernel_size must be odd, or 0 .* got -3"),
    "groups that do not divide": ({"conv_groups": 5}, "conv_groups must divide .* 24, got 5"),
    "a share above one": ({"multi_dilation_prob": 1.5}, "multi_dilation_prob must be .* got 1.5"),
    "no dilation": ({"multi_dilation": 0}, "multi_dilation must be a positive integer, got 0"),
    "an unknown mask": ({"causal_variant": "diagonal"}, "causal_variant must be one of .* got 'diagonal'"),
    "an unknown pattern": ({"attention_pattern": "ca"}, "attention_pattern must be one of .* got 'ca'"),
    "a pattern too short": ({"attention_pattern": ["sa", "ca"]}, r"each of 4 blocks, got \['sa', 'ca'\]"),
    "a pattern of other names": ({"attention_pattern": ["sa"] * 3 + ["xa"]}, r"each of 4 .*'xa'\]"),
    "one token": ({"sample_size": 2}, "sample_size must be at least 2 patches .* got 2"),
}


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_wrong_config_is_named_with_its_value(config, message):
    with pytest.raises(ValueError, match=message):
        LEDiTTransformer2DModel(**LEDIT_TOY | config)


# --- Tables


def test_turning_the_picture_gives_what_a_fresh_model_gives():
    """3 x 8 and 8 x 3 have equally many tokens and nothing else in common."""
    model = toy_ledit()
    for grid in [(3, 8), (8, 3), (3, 8)]:
        inputs = ledit_inputs(grid)
        assert relative_error(run(model, inputs), naive_ledit(model, inputs)) < TOLERANCE


def test_the_mask_of_a_size_is_made_once_for_all_models_and_the_number_of_masks_is_bounded():
    models = toy_ledit(), toy_ledit(num_layers=2)
    cached_mask.cache_clear()
    for model in models * 2:
        run(model, ledit_inputs((5, 7)))
    assert cached_mask.cache_info().misses == 1
    for width in range(1, 20):
        run(models[0], ledit_inputs((3, width), batch=1))
    assert cached_mask.cache_info().currsize <= 8


@pytest.mark.parametrize("config", [{"causal_variant": "raster"}, {"attention_pattern": "none"}], ids=str)
def test_no_mask_is_made_where_none_is_needed(config):
    cached_mask.cache_clear()
    run(toy_ledit(**config), ledit_inputs((5, 7)))
    assert cached_mask.cache_info().misses == 0


def test_a_model_first_used_in_inference_mode_can_be_trained_afterwards():
    model, inputs = toy_ledit(), ledit_inputs((6, 11))
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).sample.square().mean().backward()
    assert model.patch_embed.weight.grad.abs().sum() > 0


def test_a_dry_run_on_fake_tensors_leaves_nothing_behind():
    """Tools that plan memory or count operations run the model on tensors without data."""
    model, inputs = toy_ledit(), ledit_inputs((7, 9))
    cached_mask.cache_clear()
    with FakeTensorMode():
        dry = LEDiTTransformer2DModel(**LEDIT_TOY).train()
        assert run(dry, ledit_inputs((7, 9))).shape == (2, 8, 14, 18)
    assert relative_error(run(model, inputs), naive_ledit(model, inputs)) < TOLERANCE


# --- Training


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "config", [{}, {"conv_norm": True, "conv_groups": 24, "causal_variant": "raster"}], ids=str
)
def test_gradients_reach_every_parameter_but_the_rows_of_other_labels(config):
    model, inputs = toy_ledit(**config).train(), ledit_inputs((5, 7))
    found = gradients(model, inputs)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    used = set(inputs["class_labels"].tolist())
    assert {i for i, row in enumerate(found["class_embedder.weight"]) if row.any()} == used


def test_gradient_checkpointing_changes_no_gradient_and_draws_no_second_dilation():
    model, inputs = toy_ledit(multi_dilation_prob=0.5).train(), ledit_inputs((5, 7))
    convolved: list[int] = []
    model.locality_conv.register_forward_pre_hook(lambda module, args: convolved.append(args[1]))
    torch.manual_seed(0)
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    checkpointed = gradients(model, inputs)
    assert len(calls) == 2  # once forward, once again for the gradient
    assert convolved[0] == convolved[1]
    assert len(convolved) == 2
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_a_depthwise_convolution_is_one_of_many_groups():
    conv = LocalityConv(6, 6, 3, groups=6)
    x = torch.randn(2, 6, 5, 4)
    expected = torch.cat(
        [nn.functional.conv2d(x[:, i : i + 1], conv.weight[i : i + 1], padding=1) for i in range(6)], dim=1
    )
    torch.testing.assert_close(conv(x), expected + conv.bias[:, None, None])
