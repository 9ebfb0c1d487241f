"""What the LocalDiT transformer computes: the published numbers, the naive twin's, and what a window sees."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from naive_local_dit import Architecture, naive_local_dit, published_layout, same_window
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import TOY, architecture, cast, naive, redraw, relative_error, run, toy_inputs, toy_model

from localdit.models.layers import RMSNorm
from localdit.models.local_dit import (
    GlobalContextFeatures,
    LocalDiTBlock,
    LocalDiTTransformer2DModel,
    cached_geometry,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
# Ten times what rounding to float32 leaves. An approximate GELU for the exact one already makes more.
TOLERANCE = 2e-6
CASES = [(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)]


def fixture_path(global_context: bool) -> Path:
    return FIXTURES / f"published_{'with_global_context' if global_context else 'local_only'}.safetensors"


def published(
    global_context: bool, case: int
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The configuration, the state dict, the inputs and the output that the first publication gave."""
    path = fixture_path(global_context)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    tensors = load_file(path)
    state = {key.removeprefix("model."): tensors[key] for key in tensors if key.startswith("model.")}
    tensors = {key: tensors[key] for key in tensors if key.startswith(f"case{case}.")}
    inputs = {key.split(".")[1]: tensor for key, tensor in tensors.items()}
    return meta, state, inputs, inputs.pop("output")


# --- The published numbers


@pytest.mark.parametrize(("global_context", "case"), CASES)
def test_the_naive_twin_computes_what_was_published(global_context, case):
    """So that agreement with the twin, at sizes nobody published, means something."""
    meta, state, inputs, output = published(global_context, case)
    arch = Architecture(
        meta["num_attention_heads"], window_size=meta["window_size"], sample_size=meta["sample_size"]
    )
    assert relative_error(naive_local_dit(state, arch, **inputs), output) < 1e-6
    double = {key: tensor.double() for key, tensor in state.items()}
    assert relative_error(naive_local_dit(double, arch, **inputs), output) < 1e-6


@pytest.mark.parametrize(("global_context", "case"), CASES)
def test_the_model_computes_what_was_published(global_context, case):
    meta, _, inputs, output = published(global_context, case)
    model = LocalDiTTransformer2DModel.from_single_file(
        fixture_path(global_context), window_size=meta["window_size"], sample_size=meta["sample_size"]
    ).eval()
    assert model.config.global_context is global_context
    added = {key: inputs.pop(key) for key in ("resolution", "aspect_ratio")}
    assert relative_error(run(model, inputs | {"added_cond_kwargs": added}), output) < 1e-5


@pytest.mark.parametrize(("global_context", "parameters"), [(False, 398_780_368), (True, 518_662_672)])
def test_the_default_configuration_has_the_published_size(global_context, parameters):
    with torch.device("meta"):
        model = LocalDiTTransformer2DModel(global_context=global_context)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_global_context_of_one_block_has_the_published_size():
    """6,660,128: two feature blocks, the key and value projection, and both bias tables."""
    sizes = []
    for global_context in (False, True):
        with torch.device("meta"):
            model = LocalDiTTransformer2DModel(global_context=global_context, num_layers=1)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] - sizes[0] == 6_660_128


# --- The naive twin's numbers

# Grids in tokens. With windows of 4: none padded, one direction padded, both, and smaller than a window.
GRIDS = [(8, 8), (8, 12), (16, 4), (8, 6), (5, 8), (5, 7), (3, 2), (1, 9)]


@pytest.mark.parametrize("global_context", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_equals_the_naive_twin(grid, global_context):
    """Four blocks in windows of 4 take the shifts 0 to 3; a fifth starts over."""
    model = toy_model(
        global_context=global_context, relative_position_bias=True, num_layers=5, seed=sum(grid)
    )
    inputs = toy_inputs(grid, batch=3, seed=grid[0])
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


@pytest.mark.parametrize("global_context", [False, True])
@pytest.mark.parametrize(
    ("window", "grid"),
    [(2, (4, 6)), (2, (5, 3)), (8, (8, 16)), (8, (9, 13)), (8, (5, 16)), (1, (3, 4)), (3, (7, 6))],
)
def test_every_window_and_shift_equals_the_naive_twin(window, grid, global_context):
    model = toy_model(
        window_size=window,
        num_layers=window,
        global_context=global_context,
        relative_position_bias=True,
        seed=window,
    )
    inputs = toy_inputs(grid, batch=2, seed=window)
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"rope": False},
        {"attention_residual": False},
        {"relative_position_bias": False},
        {"global_context": False},
        {"rope": False, "attention_residual": False, "global_context": False},
        {"interpolation_scale": 2.0},
        {"sample_size": 128},
        {"norm_eps": 1e-2},
        {"qk_norm_eps": 1e-1},
        {"patch_size": 1},
        {"patch_size": 4, "in_channels": 3, "out_channels": 5},
        {"num_attention_heads": 3, "attention_head_dim": 8},
        {"use_additional_conditions": False},
        {"use_additional_conditions": False, "num_attention_heads": 2, "attention_head_dim": 16},
    ],
    ids=str,
)
def test_every_config_field_equals_the_naive_twin(config):
    model = toy_model(**config)
    inputs = toy_inputs((5, 8), **config)
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    "config", [{"rope": False}, {"attention_residual": False}, {"qk_norm_eps": 1e-1}], ids=str
)
def test_each_switch_changes_the_prediction_by_far_more_than_the_tolerance(config):
    """Toy weights under which a switch does not matter would prove nothing about it."""
    plain, switched = toy_model(), toy_model(**config)
    switched.load_state_dict(plain.state_dict())
    inputs = toy_inputs((5, 8))
    assert relative_error(run(switched, inputs), run(plain, inputs)) > 1e-3


@pytest.mark.parametrize("global_context", [False, True])
@pytest.mark.parametrize(("window", "grid"), [(2, (4, 6)), (4, (8, 12)), (4, (5, 7)), (8, (9, 8))])
def test_bfloat16_is_no_further_from_the_truth_than_twice_a_naive_bfloat16(window, grid, global_context):
    model = toy_model(
        window_size=window, global_context=global_context, relative_position_bias=True
    ).bfloat16()
    inputs = cast(toy_inputs(grid, batch=3), torch.bfloat16)
    truth = naive(model, inputs)
    floor = relative_error(naive(model, inputs, torch.bfloat16), truth)
    prediction = run(model, inputs)
    assert prediction.dtype == torch.bfloat16
    assert relative_error(prediction, truth) < 2 * floor


def test_float16_is_closer_to_the_truth_than_bfloat16():
    model = toy_model()
    inputs = toy_inputs((5, 7))
    truth = naive(model, inputs)
    errors = [
        relative_error(run(model.to(dtype), cast(inputs, dtype)), truth)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert errors[0] < errors[1] < 0.1


def test_text_behind_the_mask_changes_nothing():
    model = toy_model()
    inputs = toy_inputs(batch=2)
    inputs["encoder_attention_mask"][0, 3:] = 0
    moved = dict(inputs, encoder_hidden_states=inputs["encoder_hidden_states"].clone())
    moved["encoder_hidden_states"][0, 3:] += 100.0
    assert torch.equal(run(model, moved), run(model, inputs))
    moved["encoder_hidden_states"][0, 2] += 1.0
    assert not torch.equal(run(model, moved)[0], run(model, inputs)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_text_mask_may_have_any_dtype(dtype):
    model, inputs = toy_model(), toy_inputs()
    typed = inputs | {"encoder_attention_mask": inputs["encoder_attention_mask"].to(dtype)}
    assert torch.equal(run(model, typed), run(model, inputs))


def test_no_text_mask_means_that_all_text_is_seen():
    model, inputs = toy_model(), toy_inputs()
    everything = inputs | {"encoder_attention_mask": torch.ones(2, 7)}
    nothing = inputs | {"encoder_attention_mask": None}
    assert relative_error(run(model, nothing), run(model, everything)) < 1e-6


def test_a_scalar_timestep_stands_for_the_whole_batch():
    model, inputs = toy_model(), toy_inputs(batch=3)
    batched = run(model, inputs | {"timestep": torch.full((3,), 421)})
    for scalar in (421, torch.tensor(421), torch.tensor([421])):
        assert torch.equal(run(model, inputs | {"timestep": scalar}), batched)


def test_left_out_conditions_are_read_off_the_latents():
    """The picture is eight times the latent, and the ratio is width over height."""
    model, inputs = toy_model(), toy_inputs((5, 8), batch=2)
    said = {"resolution": torch.tensor([[80.0, 128.0]] * 2), "aspect_ratio": torch.tensor([1.6] * 2)}
    left_out = {key: value for key, value in inputs.items() if key != "added_cond_kwargs"}
    assert torch.equal(run(model, left_out), run(model, inputs | {"added_cond_kwargs": said}))
    assert not torch.equal(run(model, left_out), run(model, inputs))


def test_a_batch_equals_its_members_alone():
    model, inputs = toy_model(), toy_inputs((5, 7), batch=3)
    together = run(model, inputs)
    for i in range(3):
        alone = {key: value[i : i + 1] for key, value in inputs.items() if key != "added_cond_kwargs"}
        alone["added_cond_kwargs"] = {key: v[i : i + 1] for key, v in inputs["added_cond_kwargs"].items()}
        assert relative_error(run(model, alone), together[i : i + 1]) < 1e-5


def test_a_tuple_holds_what_the_output_object_holds():
    model, inputs = toy_model(), toy_inputs()
    with torch.no_grad():
        (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, run(model, inputs))


# --- What a token sees


def reach(grid: tuple[int, int], window: int, blocks: int, full: tuple[int, ...] = ()) -> Tensor:
    """(N, N): whether the output at a row's token depends on the input at a column's token."""
    chain = torch.eye(grid[0] * grid[1])
    for i in range(blocks):
        seen = torch.ones_like(chain) if i in full else same_window(grid, window, i % window).float()
        chain = (seen @ chain > 0).float()
    return chain.bool()


def changed_tokens(
    model: nn.Module, inputs: dict[str, Any], token: int, grid: tuple[int, int], by: float
) -> Tensor:
    """(N,): where the prediction changes, in any bit, when one token of the first sample changes."""
    row, column = 2 * (token // grid[1]), 2 * (token % grid[1])
    moved = inputs | {"hidden_states": inputs["hidden_states"].clone()}
    moved["hidden_states"][0, :, row : row + 2, column : column + 2] += by
    difference = (run(model, moved) != run(model, inputs))[0].any(0)
    assert torch.equal(run(model, moved)[1:], run(model, inputs)[1:])
    return difference.unfold(0, 2, 2).unfold(1, 2, 2).any(-1).any(-1).flatten()


@pytest.mark.parametrize(
    ("window", "grid", "blocks", "full"),
    [
        (4, (8, 8), 1, ()),
        (4, (5, 7), 1, ()),
        (4, (5, 7), 2, ()),
        (4, (9, 10), 3, ()),
        (2, (5, 6), 2, ()),
        (8, (9, 11), 1, ()),
        (4, (9, 10), 2, (1,)),
    ],
)
def test_a_token_hears_of_its_chain_of_windows_and_of_nothing_else(window, grid, blocks, full):
    model = toy_model(
        window_size=window,
        num_layers=blocks,
        global_context=False,
        relative_position_bias=True,
        full_attention_layers=full,
    )
    inputs, expected = toy_inputs(grid), reach(grid, window, blocks, full)
    for token in range(0, grid[0] * grid[1], 3):
        assert torch.equal(changed_tokens(model, inputs, token, grid, by=1.0), expected[:, token])


@pytest.mark.parametrize("by", [1e-2, 1e6])
def test_with_global_context_every_token_hears_of_every_other(by):
    grid = (9, 10)
    model = toy_model(num_layers=1)
    for token in (0, 37, 89):
        assert changed_tokens(model.double(), cast(toy_inputs(grid), torch.float64), token, grid, by).all()


def test_a_band_of_rows_adds_up_to_the_same_bits_as_the_whole_map():
    """Each row of the convolution needs its two neighbours, and its sum nothing else."""
    features = GlobalContextFeatures(24)
    x = torch.randn(2, 11, 9, 24)
    with torch.no_grad():
        y, rows = features.convolve(x, None)
        for first, last in [(0, 4), (4, 5), (5, 11)]:
            halo = slice(max(first - 1, 0), last + 1)
            band_y, band_rows = features.convolve(x[:, halo], None)
            inner = slice(first - halo.start, first - halo.start + last - first)
            assert torch.equal(band_y[:, inner], y[:, first:last])
            assert torch.equal(band_rows[:, inner], rows[:, first:last])


@pytest.mark.parametrize("global_context", [False, True])
def test_memory_that_nobody_wrote_changes_nothing(global_context):
    """Windows that hang over the edge hold slots without a token; here fresh memory is NaN."""
    model = toy_model(global_context=global_context, relative_position_bias=True)
    inputs = toy_inputs((5, 7), batch=3)
    cached_geometry.cache_clear()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(8).isnan().all()
        prediction = run(model, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
        cached_geometry.cache_clear()
    assert relative_error(prediction, naive(model, inputs)) < TOLERANCE


# --- The known limits


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_one_window_over_the_whole_grid_is_full_attention(grid):
    """An unshifted window that holds the grid sees what a full-attention block sees."""
    local = toy_model(window_size=8, num_layers=1, global_context=False)
    full = toy_model(window_size=8, num_layers=1, global_context=False, full_attention_layers=(0,))
    full.load_state_dict(local.state_dict())
    inputs = toy_inputs(grid)
    assert relative_error(run(full, inputs), run(local, inputs)) < 1e-5


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
@pytest.mark.parametrize("use_additional_conditions", [False, True])
def test_full_attention_alone_is_diffusers_pixart(grid, use_additional_conditions):
    """With every block full and RoPE, global context and inner residual off, and with QK-norm put on both."""
    model = toy_model(
        full_attention_layers=(0, 1, 2, 3),
        rope=False,
        global_context=False,
        attention_residual=False,
        use_additional_conditions=use_additional_conditions,
    )
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=16,
        use_additional_conditions=use_additional_conditions,
    ).eval()
    for block in pixart.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q = nn.RMSNorm(12, eps=model.config.qk_norm_eps)
            attention.norm_k = nn.RMSNorm(12, eps=model.config.qk_norm_eps)
    pixart.load_state_dict(model.state_dict())

    inputs = toy_inputs(grid, batch=3, use_additional_conditions=use_additional_conditions)
    conditions = inputs.get("added_cond_kwargs", {"resolution": None, "aspect_ratio": None})
    expected = run(pixart, inputs | {"added_cond_kwargs": conditions})
    assert relative_error(run(model, inputs), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_hook_was_given_stays_as_it_was(dtype):
    """Though what nobody holds is changed in its place where no gradient is kept."""
    model, inputs = toy_model().to(dtype), cast(toy_inputs((5, 7)), dtype)
    expected, given = run(model, inputs), []
    for module in model.modules():
        module.register_forward_hook(lambda _, args, out: given.append((out, copy.deepcopy(out))))
    assert torch.equal(run(model, inputs), expected)
    tensors = [(x, before) for x, before in given if isinstance(x, Tensor)]
    assert len(tensors) > 100
    assert all(torch.equal(x, before) for x, before in tensors)


@pytest.mark.parametrize("eps", [None, 0.0, 1e-10, 1e-1])
def test_the_norm_of_heads_is_pytorchs_with_and_without_gradients(eps):
    """Of numbers so small that an epsilon is heard; none is none."""
    norm, plain = RMSNorm(12, eps=eps), nn.RMSNorm(12, eps=eps)
    norm.weight = plain.weight = nn.Parameter(1 + 0.3 * torch.randn(12))
    x = 1e-4 * torch.randn(3, 5, 2, 12)
    expected = plain(x)
    assert relative_error(norm(x), expected) < TOLERANCE
    with torch.no_grad():
        assert relative_error(norm(x), expected) < TOLERANCE


@pytest.mark.parametrize("eps", [1e-10, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_norm_of_heads_is_as_exact_as_pytorchs_in_any_precision_and_leaves_its_input(dtype, eps):
    norm, plain = RMSNorm(12, eps=eps), nn.RMSNorm(12, eps=eps)
    norm.weight = plain.weight = nn.Parameter((1 + 0.3 * torch.randn(12)).to(dtype))
    x = (1e-3 * torch.randn(3, 5, 2, 12)).to(dtype)
    before = x.clone()
    found, theirs = norm(x), plain(x)
    exact = plain.double()(x.double())
    assert found.dtype == dtype
    assert torch.equal(x, before)
    assert relative_error(found.double(), exact) <= 1.01 * relative_error(theirs.double(), exact) + 1e-7


@pytest.mark.parametrize("global_context", [False, True])
@pytest.mark.parametrize("full", [(1,), (0, 3), (0, 1, 2, 3)])
def test_a_mixture_of_full_and_windowed_blocks_equals_the_naive_twin(full, global_context):
    """A full block keeps RoPE and the inner residual; its index still counts for the shift of the others."""
    model = toy_model(full_attention_layers=full, global_context=global_context)
    inputs = toy_inputs((5, 7))
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


# --- Geometry


def test_turning_the_picture_gives_what_a_fresh_model_gives():
    """48 x 64 and 64 x 48 have equally many tokens and nothing else in common."""
    model = toy_model(num_layers=2)
    for grid in [(24, 32), (32, 24), (24, 32)]:
        inputs = toy_inputs(grid)
        assert torch.equal(run(model, inputs), run(toy_model(num_layers=2), inputs))


def test_models_of_different_geometry_do_not_disturb_each_other():
    configs: list[dict[str, Any]] = [
        {},
        {"window_size": 2},
        {"num_attention_heads": 1, "attention_head_dim": 24},
        {"sample_size": 32},
        {"interpolation_scale": 3.0},
        {"rope": False},
    ]
    models = [toy_model(**config) for config in configs]
    inputs = toy_inputs((5, 8))
    for model in models + models[::-1]:
        assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


def test_the_dtype_may_change_between_calls():
    model, inputs = toy_model(), toy_inputs((5, 7))
    before = run(model, inputs)
    model.bfloat16()
    run(model, cast(inputs, torch.bfloat16))
    model.float()
    redraw(model)
    assert torch.equal(run(model, inputs), before)


def test_a_model_first_used_in_inference_mode_can_be_trained_afterwards():
    """Tables that inference left behind must not be inference tensors, which autograd refuses to save."""
    model, inputs = toy_model(), toy_inputs((6, 11))
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).sample.square().mean().backward()
    assert model.pos_embed.proj.weight.grad.abs().sum() > 0


def test_the_tables_of_a_size_are_computed_once_and_their_number_is_bounded():
    model = toy_model(num_layers=2)
    cached_geometry.cache_clear()
    for _ in range(3):
        run(model, toy_inputs((5, 7)))
    assert cached_geometry.cache_info().misses == 1
    for width in range(1, 30):
        run(model, toy_inputs((3, width)))
    info = cached_geometry.cache_info()
    assert info.maxsize is not None
    assert info.currsize <= info.maxsize <= 32
    assert relative_error(run(model, toy_inputs((5, 7))), naive(model, toy_inputs((5, 7)))) < TOLERANCE


def test_a_dry_run_on_fake_tensors_leaves_nothing_behind():
    """Tools that plan memory or count operations run the model on tensors without data."""
    model, inputs = toy_model(), toy_inputs((7, 9))
    cached_geometry.cache_clear()
    with FakeTensorMode():
        dry = {key: value for key, value in toy_inputs((7, 9)).items() if key != "encoder_attention_mask"}
        assert run(LocalDiTTransformer2DModel(**TOY), dry).shape == (2, 4, 14, 18)
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


# --- The caption, once per prompt


def with_context(model: LocalDiTTransformer2DModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the caption encoded."""
    inputs = dict(inputs)
    context = model.encode_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    return inputs | {"encoder_hidden_states": context}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.no_grad()
def test_an_encoded_caption_gives_the_same_bits(batch, dtype):
    model, inputs = toy_model().to(dtype), cast(toy_inputs((5, 7), batch=batch), dtype)
    encoded = with_context(model, inputs)
    assert encoded["encoder_hidden_states"].batch_size == batch
    for step in (0, 1):
        now = {"timestep": inputs["timestep"] // (step + 1)}
        assert torch.equal(run(model, encoded | now), run(model, inputs | now))


@torch.no_grad()
def test_one_caption_for_two_samples_gives_the_same_bits():
    """As a pipeline does for two images per prompt: the caption repeats before it is encoded."""
    model, inputs = toy_model(), toy_inputs((5, 7), batch=2)
    for key in ("encoder_hidden_states", "encoder_attention_mask"):
        inputs[key] = inputs[key][:1].repeat_interleave(2, dim=0)
    assert torch.equal(run(model, with_context(model, inputs)), run(model, inputs))


@torch.no_grad()
def test_a_caption_without_a_mask_can_be_encoded():
    model, inputs = toy_model(), toy_inputs() | {"encoder_attention_mask": None}
    assert torch.equal(run(model, with_context(model, inputs)), run(model, inputs))


@torch.no_grad()
def test_padding_that_no_caption_keeps_is_left_out():
    """And the mask with it, where nothing is left to mask."""
    model, inputs = toy_model(), toy_inputs((5, 7), batch=2)
    mask = torch.zeros_like(inputs["encoder_attention_mask"])
    mask[0, :3], mask[1, :4] = 1, 1
    inputs["encoder_attention_mask"] = mask
    encoded = with_context(model, inputs)
    assert encoded["encoder_hidden_states"].text.shape[1] == 4
    assert relative_error(run(model, encoded), run(model, inputs)) < 1e-6
    mask[0, 3] = 1
    encoded = with_context(model, inputs)
    assert encoded["encoder_hidden_states"].mask is None
    assert relative_error(run(model, encoded), run(model, inputs)) < 1e-6


# --- Timesteps, once per run


@pytest.mark.parametrize("conditions", [True, False])
@torch.no_grad()
def test_timesteps_read_ahead_give_the_same_prediction(conditions):
    model, inputs = toy_model(use_additional_conditions=conditions), toy_inputs((5, 7), batch=3)
    sizes = None
    if conditions:
        sizes = {"resolution": torch.tensor([[80.0, 112.0]]), "aspect_ratio": torch.tensor([1.4])}
    times = torch.tensor([981.0, 3.5, 0.0])
    contexts = model.encode_timesteps(times, sizes)
    for t, context in zip(times, contexts):
        now = inputs | {"timestep": t, "added_cond_kwargs": None}
        if conditions:
            now["added_cond_kwargs"] = {name: size.expand(3, *size.shape[1:]) for name, size in sizes.items()}
        ahead = inputs | {"timestep": context, "added_cond_kwargs": None}
        assert relative_error(run(model, ahead), run(model, now)) < 1e-6


def test_timesteps_of_another_shape_or_without_sizes_are_refused():
    model = toy_model()
    with pytest.raises(ValueError, match=r"timesteps must be \(S,\), got \(1, 2\)"):
        model.encode_timesteps(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="added_cond_kwargs must hold resolution"):
        model.encode_timesteps(torch.zeros(2))
    context = toy_model(use_additional_conditions=False).encode_timesteps(torch.zeros(2))[0]
    with pytest.raises(ValueError, match="added_cond_kwargs must be None with a TimestepContext"):
        model(**toy_inputs() | {"timestep": context, "added_cond_kwargs": {}})


# --- One sample for several captions

SIZES = {"resolution": torch.tensor([[80.0, 112.0]]), "aspect_ratio": torch.tensor([1.4])}


def two_captions_each(model: Any, inputs: dict[str, Any], batch: int, kind: str) -> dict[str, Any]:
    """So many of the samples, twice as many captions, and one time: as it is, or made ahead of the run."""
    shared = with_context(model, inputs) | {"hidden_states": inputs["hidden_states"][:batch]}
    if kind == "context":
        step = model.encode_timesteps(torch.tensor([300.0]), SIZES)[0]
        return shared | {"added_cond_kwargs": None, "timestep": step}
    repeated = {name: size.expand(batch, *size.shape[1:]) for name, size in SIZES.items()}
    return shared | {"timestep": torch.full((batch,), 300.0), "added_cond_kwargs": repeated}


@pytest.mark.parametrize("kind", ["timestep", "context"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_samples_with_two_captions_each_are_predicted_as_if_they_were_repeated(batch, kind):
    """As guidance does: the first self-attention is computed once, since the text comes after it."""
    model, inputs = toy_model(), toy_inputs((5, 7), batch=2 * batch)
    shared = two_captions_each(model, inputs, batch, kind)
    seen = []
    hook = model.transformer_blocks[0].attn1.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    found = run(model, shared)
    hook.remove()
    assert seen == [batch if kind == "context" or batch == 1 else 2 * batch]
    inputs["hidden_states"] = inputs["hidden_states"][:batch].repeat(2, 1, 1, 1)
    inputs |= {"timestep": torch.full((2 * batch,), 300.0)}
    inputs["added_cond_kwargs"] = {
        name: size.expand(2 * batch, *size.shape[1:]) for name, size in SIZES.items()
    }
    assert relative_error(found, run(model, inputs)) < 1e-6


@pytest.mark.parametrize("kind", ["timestep", "context"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_subclass_or_a_cached_model_never_sees_a_shared_sample(batch, kind):
    class OtherBlock(LocalDiTBlock):
        pass

    class Other(LocalDiTTransformer2DModel):
        block_class = OtherBlock

    inputs, own = toy_inputs((5, 7), batch=2 * batch), toy_model()
    shared = two_captions_each(own, inputs, batch, kind)
    expected = run(own, shared)

    cached = toy_model()
    cached._cache_config = object()  # what diffusers' enable_cache sets
    other = Other(**TOY).eval()
    other.load_state_dict(own.state_dict())
    seen: list[int] = []
    for model in (other, cached):
        model.transformer_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        assert relative_error(run(model, shared), expected) < 1e-6
    assert seen == [2 * batch] * 2


def test_an_encoded_caption_trains_like_the_caption():
    model, inputs = toy_model(), toy_inputs((5, 7))
    gradients = []
    for encode in (False, True):
        model.zero_grad()
        model(**(with_context(model, inputs) if encode else inputs)).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


# --- Training


def gradients(model: nn.Module, inputs: dict[str, Any], target: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(**inputs).sample - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [{}, {"global_context": False}, {"full_attention_layers": (1,)}], ids=str)
def test_every_gradient_equals_the_naive_twins(config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    ours = gradients(model, inputs, target)
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    conditions = inputs.pop("added_cond_kwargs")
    loss = naive_local_dit(published_layout(leaves), architecture(model), **inputs, **conditions) - target
    theirs = torch.autograd.grad(loss.square().mean(), list(leaves.values()))
    assert ours.keys() == leaves.keys()
    for name, gradient in zip(leaves, theirs):
        assert relative_error(ours[name], gradient) < 2e-5, name


@pytest.mark.parametrize("global_context", [False, True])
def test_gradients_reach_every_parameter(global_context):
    model = toy_model(global_context=global_context, relative_position_bias=True, num_layers=3).train()
    inputs = toy_inputs((5, 7))
    for name, gradient in gradients(model, inputs, torch.zeros_like(inputs["hidden_states"])).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    model, inputs = toy_model(dropout=dropout).train(), toy_inputs((5, 7))
    target = torch.zeros_like(inputs["hidden_states"])
    torch.manual_seed(0)
    plain = gradients(model, inputs, target)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    calls = []
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    checkpointed = gradients(model, inputs, target)
    assert len(calls) == 2  # once forward, once again for the gradient
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_dropout_acts_in_training_alone():
    model, inputs = toy_model(dropout=0.5), toy_inputs()
    still = toy_model()
    assert torch.equal(run(model, inputs), run(still, inputs))
    assert not torch.equal(run(model.train(), inputs), run(still, inputs))


def test_an_untrained_model_predicts_zero_and_does_not_hear_the_text():
    """As in the published training: the final linear and the text's output projections start at zero."""
    torch.manual_seed(0)
    model, inputs = LocalDiTTransformer2DModel(**TOY).eval(), toy_inputs()
    assert not run(model, inputs).any()
    nn.init.normal_(model.proj_out.weight)
    other = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
    assert torch.equal(run(model, other), run(model, inputs))
    assert all(not p.any() for name, p in model.named_parameters() if "relative_position_bias" in name)
