"""What the SparseDiT transformer computes: recorded numbers, the naive twin's, and who takes which token."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from naive_sparse_dit import naive_sparse_dit, one_hot_experts
from torch import Tensor, nn
from toy_sparse import TOY, pseudo_random, recorded_model, redraw, released_shapes, sparse_inputs, toy_sparse
from toys import cast, relative_error, run

from localdit.models.sparse_dit import (
    SparseDiTExperts,
    SparseDiTTransformer2DModel,
    add_rows,
    block_shapes,
    position_table,
    take_rows,
)
from localdit.models.sparse_dit_single_file import to_released

# Ten times what rounding to float32 leaves.
TOLERANCE = 3e-6
TINY: dict[str, Any] = {
    "hidden_size": 512,
    "num_layers": 16,
    "attention_head_dim": 32,
    "mixer_num_layers": 4,
    "mixer_hidden_size": 512,
}
SEED: dict[str, Any] = {"ffn_inner_factor": 1.0, "qk_norm_affine": True}


def on_meta(**config: Any) -> SparseDiTTransformer2DModel:
    with torch.device("meta"):
        return SparseDiTTransformer2DModel(**config)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def naive(
    model: SparseDiTTransformer2DModel, inputs: dict[str, Any], dtype: torch.dtype = torch.float64
) -> Tensor:
    """The naive twin with the model's weights, computed in `dtype`."""
    state = {name: tensor.to(dtype) for name, tensor in to_released(model.state_dict()).items()}
    return naive_sparse_dit(state, model.config, **inputs)


# --- Sizes


@pytest.mark.parametrize(
    ("config", "parameters", "used"),
    [
        ({}, 1_165_442_320, 712_457_488),
        ({"in_channels": 16}, 1_165_540_672, 712_555_840),
        (TINY, 200_692_752, 120_476_688),
        (TINY | {"in_channels": 16}, 200_741_952, 120_525_888),
        ({"caption_channels": 4096}, 1_168_588_048, None),
        (TINY | {"caption_channels": 4096}, 202_265_616, None),
        (SEED, 1_214_325_264, None),
        (TINY | SEED, 207_416_208, None),
    ],
    ids=["XL", "XL, 16 channels", "Tiny", "Tiny, 16 channels", "XL, T5", "Tiny, T5", "1.2B", "Tiny of 1.2B"],
)
def test_the_configurations_have_the_published_sizes(config, parameters, used):
    """And, with two of eight experts for a token, the published number of parameters in use."""
    model = on_meta(**config)
    assert size(model) == parameters
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts_" in name)
    if used is not None:
        assert parameters - experts * 6 // 8 == used


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {},
            {
                "patch_embed": 17_408,
                "time_embed": 1_574_912,
                "caption_projection": 2_100_224,
                "caption_refiner": 12_847_104,
                "pooled_projection": 2_100_224,
                "mixer_blocks": 184_084_992,
                "mixer_in": 787_456,
                "mixer_out": 787_200,
                "mixer_context": 787_456,
                "transformer_blocks": 958_238_720,
            },
        ),
        (
            TINY,
            {
                "patch_embed": 8_704,
                "time_embed": 525_312,
                "caption_projection": 787_968,
                "caption_refiner": 3_408_896,
                "pooled_projection": 525_824,
                "mixer_blocks": 52_979_712,
                "mixer_in": 0,
                "mixer_out": 0,
                "mixer_context": 0,
                "transformer_blocks": 141_922_304,
            },
        ),
    ],
    ids=["XL", "Tiny"],
)
def test_every_part_has_the_published_size(config, expected):
    model = on_meta(**config)
    assert {name: size(getattr(model, name)) for name in expected} == expected
    final = size(model.norm_out) + size(model.adaln_out) + size(model.proj_out)
    assert final == (534_032 if config else 2_116_624)


@pytest.mark.parametrize(("config", "tensors"), [({}, 478), (TINY, 290)], ids=["XL", "Tiny"])
def test_the_released_layout_has_the_published_number_of_tensors(config, tensors):
    assert len(to_released(on_meta(**config).state_dict())) + 2 == tensors  # and two buffers


def test_the_widths_grow_as_published():
    mixer, backbone = block_shapes(on_meta().config)
    assert [shape.attention_dim for shape in backbone] == [
        512,
        *[640] * 6,
        *[768] * 7,
        *[896] * 7,
        *[1024] * 7,
    ]
    dense = [shape.ff_dim for shape in backbone if not shape.experts]
    assert dense == [
        512, 768, 768, 1024, 1280, 1280, 1536, 1792, 1792, 2048, 2304, 2304, 2560, 2816, 2816
    ]  # fmt: skip
    assert [shape.ff_dim for shape in backbone if shape.experts] == list(range(768, 3841, 256))
    assert [i for i, shape in enumerate(backbone) if shape.experts] == list(range(1, 26, 2))
    assert [shape.ff_dim for shape in mixer] == [2048, 3072] * 3
    assert {(shape.dim, shape.attention_dim) for shape in mixer} == {(768, 768)}

    mixer, backbone = block_shapes(on_meta(**TINY).config)
    assert [shape.attention_dim for shape in backbone] == [
        256,
        *[320] * 3,
        *[384] * 4,
        *[448] * 4,
        *[512] * 4,
    ]
    dense = [shape.ff_dim for shape in backbone if not shape.experts]
    assert dense == [256, 512, 512, 768, 1024, 1024, 1280, 1536, 1536]
    assert [shape.ff_dim for shape in backbone if shape.experts] == list(range(512, 2049, 256))
    assert [shape.ff_dim for shape in mixer] == [1536, 2048] * 2


def test_ratios_may_be_given_for_each_block():
    config = {"attention_ratio": [0.5, 1.0, 0.75, 1.0], "ffn_ratio": [4.0, 3.0, 2.0, 1.0]}
    _, backbone = block_shapes(on_meta(**TOY | config).config)
    assert [shape.attention_dim for shape in backbone] == [32, 64, 64, 64]  # even numbers of heads
    assert [shape.ff_dim for shape in backbone] == [192, 192, 96, 64]
    model, inputs = toy_sparse(**config), sparse_inputs()
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


def test_the_toy_has_the_recorded_size_and_layout():
    model = recorded_model()
    assert size(model) == 648_288
    shapes = released_shapes()
    assert len(shapes) == 114
    found = {name: tuple(tensor.shape) for name, tensor in to_released(model.state_dict()).items()}
    assert found == {name: shape for name, shape in shapes.items() if name not in ("pos_embed", "mask_token")}


# --- The recorded numbers


def recorded_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": 3 * pseudo_random(1001, (2, 4, 8, 8)).float(),
        "encoder_hidden_states": 2 * pseudo_random(1002, (2, 1, 5, 24))[:, 0].float(),
        "timestep": torch.tensor([0.5, 4.0]).log() / 4,
    }


def test_the_recorded_tensors_are_made_as_described():
    assert pseudo_random(0, (4,)).tolist() == pytest.approx(
        [-0.317084, 0.240085, 0.064395, -0.045251], abs=1e-6
    )
    assert pseudo_random(7, (3,)).tolist() == pytest.approx([-0.165475, 0.473216, -0.296988], abs=1e-6)


def test_the_model_computes_what_was_recorded():
    sample = run(recorded_model(), recorded_inputs())
    assert sample.sum().item() == pytest.approx(6.90314, abs=1e-4)
    assert sample.norm().item() == pytest.approx(13.79962, abs=1e-4)
    assert sample[0, 0, 0, :4].tolist() == pytest.approx([0.26460, 1.48705, -0.07287, 0.09812], abs=1e-4)


def test_the_masked_model_computes_what_was_recorded():
    noise = pseudo_random(1003, (2, 16)).float() + 0.5
    with torch.no_grad():
        output = recorded_model().train()(**recorded_inputs(), mask_ratio=0.75, mask_noise=noise)
    kept = [{6, 4, 5, 11}, {2, 14, 7, 15}]
    assert [{i for i in range(16) if not row[i]} for row in output.mask] == kept
    assert output.mask.unique().tolist() == [0, 1]
    assert output.sample.sum().item() == pytest.approx(-8.88675, abs=1e-4)
    assert output.sample.norm().item() == pytest.approx(6.48497, abs=1e-4)
    assert output.sample.count_nonzero() == 128
    tokens = output.sample.unfold(2, 2, 2).unfold(3, 2, 2).abs().sum((1, 4, 5)).flatten(1)  # (B, N)
    assert [set(row.nonzero().flatten().tolist()) for row in tokens] == kept


def test_guidance_gives_what_was_recorded():
    model, inputs = recorded_model(), recorded_inputs()
    null = inputs | {"encoder_hidden_states": torch.zeros(2, 5, 24)}
    guided = run(model, null).lerp(run(model, inputs), 5.0)
    assert guided.sum().item() == pytest.approx(55.2651, abs=1e-3)
    assert guided.norm().item() == pytest.approx(61.4186, abs=1e-3)


def test_a_batch_of_one_is_its_row_of_two():
    model, inputs = recorded_model(), recorded_inputs()
    both = run(model, inputs)
    for i in (0, 1):
        alone = run(model, {name: value[i : i + 1] for name, value in inputs.items()})
        assert relative_error(alone, both[i : i + 1]) < 1e-5


def test_the_naive_twin_computes_what_was_recorded():
    """So that agreement with the twin, at sizes nobody recorded, means something."""
    sample = naive(recorded_model(), recorded_inputs())
    assert sample.sum().item() == pytest.approx(6.90314, abs=1e-4)
    assert sample.norm().item() == pytest.approx(13.79962, abs=1e-4)
    masked = {"mask_ratio": 0.75, "mask_noise": pseudo_random(1003, (2, 16)) + 0.5}
    assert naive(recorded_model(), recorded_inputs() | masked).sum().item() == pytest.approx(
        -8.88675, abs=1e-4
    )


# --- The naive twin's numbers


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 7), (6, 2)])
def test_every_grid_equals_the_naive_twin(grid):
    model, inputs = toy_sparse(seed=sum(grid)), sparse_inputs(grid, batch=3, seed=grid[0])
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"interpolation_scale": 2.0},
        {"patch_size": 1},
        {"patch_size": 4, "in_channels": 3, "out_channels": 5},
        {"mixer_num_layers": 0},
        {"mixer_num_layers": 1},
        {"mixer_hidden_size": 64},
        {"mixer_hidden_size": 80, "mixer_attention_ratio": 0.5, "mixer_ffn_ratio": 1.5},
        {"num_layers": 1},
        {"num_experts": 3, "expert_capacity": 1.3},
        {"num_experts": 2, "expert_capacity": 5.0},
        {"num_experts": 30, "expert_capacity": 0.1},
        {"moe_every_n": 1},
        {"moe_every_n": 3},
        {"use_bias": True},
        {"norm_eps": 1e-1},
        {"qk_norm_affine": True},
        {"ffn_inner_factor": 1.0},
        {"attention_head_dim": 8, "timestep_embed_dim": 32},
    ],
    ids=str,
)
def test_every_config_field_equals_the_naive_twin(config):
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5), **config)
    assert relative_error(run(model, inputs), naive(model, inputs)) < TOLERANCE


@pytest.mark.parametrize("mask_ratio", [0.3, 0.5, 0.75, 0.9])
def test_every_mask_ratio_equals_the_naive_twin(mask_ratio):
    model, inputs = toy_sparse().train(), sparse_inputs((3, 5), batch=3)
    masked = inputs | {"mask_ratio": mask_ratio, "mask_noise": torch.rand(3, 15)}
    assert relative_error(run(model, masked), naive(model, masked)) < TOLERANCE


def test_a_text_mask_equals_the_naive_twin_and_hides_the_padding():
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = inputs | {"encoder_attention_mask": mask}
    sample = run(model, masked)
    assert relative_error(sample, naive(model, masked)) < TOLERANCE
    assert relative_error(sample[0], plain[0]) > 1e-3
    assert relative_error(sample[1], plain[1]) < 1e-5
    moved = masked | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    moved["encoder_hidden_states"][0, 3:] += 100.0
    assert relative_error(run(model, moved), sample) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_stays_near(dtype):
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    whole = run(model, inputs)
    half = run(model.to(dtype), cast(inputs, dtype))
    assert half.dtype == dtype
    assert half.isfinite().all()
    assert relative_error(half, whole) < 0.15  # an expert may take another token


def test_a_scalar_time_stands_for_the_whole_batch():
    model, inputs = toy_sparse(), sparse_inputs(batch=3)
    batched = run(model, inputs | {"timestep": torch.full((3,), -0.7)})
    for scalar in (-0.7, torch.tensor(-0.7), torch.tensor([-0.7])):
        assert torch.equal(run(model, inputs | {"timestep": scalar}), batched)


def test_a_tuple_holds_what_the_output_object_holds():
    model, inputs = toy_sparse().train(), sparse_inputs()
    (sample,) = model(**inputs, return_dict=False)
    assert torch.equal(sample, model(**inputs).sample)
    masked = inputs | {"mask_ratio": 0.5, "mask_noise": torch.rand(2, 16)}
    sample, mask = model(**masked, return_dict=False)
    assert torch.equal(sample, model(**masked).sample)
    assert torch.equal(mask, model(**masked).mask)


def test_no_text_is_one_learned_vector_at_every_place():
    """A caption of zeros does not vanish: the biases make something of it."""
    model = toy_sparse()
    with torch.no_grad():
        text = model.encode_text(torch.zeros(1, 5, 24)).text
    torch.testing.assert_close(text, text[:, :1].expand_as(text))
    assert text.abs().max() > 0.1
    fresh = SparseDiTTransformer2DModel(**TOY)
    with torch.no_grad():
        assert not fresh.encode_text(torch.zeros(1, 5, 24)).text.any()


# --- Positions and times


def test_positions_are_the_recorded_ones():
    recorded = {
        1.0: [0.909297, 0.019999, -0.416147, 0.9998, 0.841471, 0.01, 0.540302, 0.99995],
        2.0: [0.841471, 0.01, 0.540302, 0.99995, 0.479426, 0.005, 0.877583, 0.999988],
    }
    for scale, expected in recorded.items():
        table = position_table((4, 4), 8, scale, torch.device("cpu"))
        assert table[1 * 4 + 2].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("grid", "scale"), [(16, 1.0), (32, 2.0), (5, 1.5)])
def test_positions_are_diffusers_on_square_grids(grid, scale):
    table = position_table((grid, grid), 32, scale, torch.device("cpu"))
    theirs = get_2d_sincos_pos_embed(32, grid, base_size=grid, interpolation_scale=scale, output_type="pt")
    torch.testing.assert_close(table.double(), theirs.double(), rtol=0, atol=1e-6)


def test_times_are_the_recorded_sinusoids():
    model = toy_sparse(timestep_embed_dim=8)
    expected = [0.877583, 0.99875, 0.999987, 1, 0.479426, 0.049979, 0.005, 0.0005]
    assert model.time_proj(torch.tensor([0.5]))[0].tolist() == pytest.approx(expected, abs=1e-6)


# --- Experts


def recorded_experts() -> SparseDiTExperts:
    layer = SparseDiTExperts(8, 16, num_experts=4, capacity=2.0)
    state = {
        "experts_in": pseudo_random(1, (4, 8, 16)),
        "experts_out": pseudo_random(2, (4, 16, 8)),
        "router.weight": 4 * pseudo_random(3, (4, 8)),
    }
    layer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return layer


def random_experts(dim: int, hidden: int, experts: int, capacity: float) -> SparseDiTExperts:
    layer = SparseDiTExperts(dim, hidden, experts, capacity)
    redraw(layer)
    return layer


def test_the_recorded_tokens_are_taken():
    layer, x = recorded_experts(), 4 * pseudo_random(4, (2, 8, 8)).float()
    with torch.no_grad():
        gates, tokens = layer.route(x)
        y = layer(x)
    assert tokens.tolist() == [
        [[5, 4, 7, 3], [0, 6, 7, 1], [2, 0, 3, 4], [1, 6, 3, 7]],
        [[7, 1, 5, 6], [6, 5, 4, 3], [0, 4, 1, 7], [2, 3, 4, 6]],
    ]
    assert gates[0, 0].tolist() == pytest.approx([0.99992, 0.70675, 0.65102, 0.19114], abs=1e-5)
    assert y.sum().item() == pytest.approx(0.43260, abs=1e-4)
    assert y.norm().item() == pytest.approx(5.24838, abs=1e-4)


@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "hidden", "experts", "capacity"),
    [
        (2, 8, 8, 16, 4, 2.0),
        (3, 13, 5, 7, 3, 1.7),
        (1, 1, 4, 4, 8, 2.0),
        (2, 9, 6, 3, 2, 9.0),
        (3, 33, 8, 8, 8, 0.5),
    ],
)
def test_values_and_gradients_equal_the_one_hot_reference(batch, tokens, dim, hidden, experts, capacity):
    layer = random_experts(dim, hidden, experts, capacity)
    x, target = torch.randn(batch, tokens, dim), torch.randn(batch, tokens, dim)
    leaves = [x, layer.router.weight, layer.experts_in, layer.experts_out]
    mine = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = torch.func.functional_call(
        layer, {"router.weight": mine[1], "experts_in": mine[2], "experts_out": mine[3]}, (mine[0],)
    )
    reference, gates, chosen = one_hot_experts(*twins, capacity)
    assert torch.equal(layer.route(x)[1], chosen)
    torch.testing.assert_close(layer.route(x)[0].double(), gates)
    assert relative_error(y, reference) < 1e-5
    ours = torch.autograd.grad((y * target).sum(), mine)
    theirs = torch.autograd.grad((reference * target).sum(), twins)
    for gradient, expected in zip(ours, theirs):
        assert relative_error(gradient, expected) < 1e-5


def test_a_token_that_nobody_takes_gets_zero_and_one_taken_twice_gets_both():
    layer, x = random_experts(8, 16, 4, 1.0), torch.randn(3, 20, 8)
    with torch.no_grad():
        gates, tokens = layer.route(x)
        y = layer(x)
        takers = F.one_hot(tokens, 20).sum((1, 2))  # (B, N)
        assert torch.equal(y.abs().sum(-1) == 0, takers == 0)
        assert (takers == 0).any()
        assert (takers > 1).any()
        b, n = (takers > 1).nonzero()[0].tolist()
        expected = torch.zeros(8)
        for e, j in (tokens[b] == n).nonzero().tolist():
            hidden = F.gelu(x[b, n] @ layer.experts_in[e])
            expected += gates[b, e, j] * (hidden @ layer.experts_out[e])
    torch.testing.assert_close(y[b, n], expected)


@pytest.mark.parametrize(
    ("tokens", "taken"), [(256, 64), (64, 16), (1024, 256), (1, 1), (3, 1), (7, 1), (10, 2)]
)
def test_every_expert_takes_its_share(tokens, taken):
    layer = random_experts(4, 4, 8, 2.0)
    gates, chosen = layer.route(torch.randn(2, tokens, 4))
    assert gates.shape == chosen.shape == (2, 8, taken)
    assert (gates.diff(dim=-1) <= 0).all()
    for rows in chosen.flatten(0, 1).tolist():
        assert len(set(rows)) == taken  # no token twice


def test_an_image_is_routed_by_itself():
    layer, x = random_experts(8, 16, 4, 2.0), torch.randn(5, 12, 8)
    with torch.no_grad():
        whole, order = layer(x), torch.randperm(5)
        torch.testing.assert_close(layer(x[order]), whole[order])
        for i in range(5):
            torch.testing.assert_close(layer(x[i : i + 1]), whole[i : i + 1])


def test_the_first_of_equal_tokens_is_taken():
    layer, x = random_experts(8, 16, 4, 2.0), torch.randn(2, 1, 8).expand(2, 12, 8)
    assert torch.equal(layer.route(x)[1], torch.arange(6).expand(2, 4, 6))


def test_one_expert_that_takes_everything_is_a_plain_feed_forward():
    layer, x = random_experts(8, 16, 1, 1.0), torch.randn(3, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.gelu(x @ layer.experts_in[0]) @ layer.experts_out[0])


def test_the_router_computes_in_float32_whatever_surrounds_it():
    layer, x = random_experts(64, 32, 4, 2.0), torch.randn(2, 40, 64)
    expected = layer.route(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        gates, tokens = layer.route(x.bfloat16())
    assert gates.dtype == torch.float32
    assert torch.equal(gates, expected[0])
    assert torch.equal(tokens, expected[1])
    assert layer.bfloat16().route(x.bfloat16())[0].dtype == torch.float32


def test_autocast_runs_the_experts_in_bfloat16_and_trains_them():
    layer, x = random_experts(64, 32, 4, 2.0), torch.randn(2, 40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert relative_error(y.detach(), layer(x).detach()) < 0.02
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_rows_are_taken_and_added_as_transposes():
    """Where rows repeat between experts; the sum of half precision is kept in float32."""
    x, rows = torch.randn(6, 3), torch.tensor([[0, 2, 5], [2, 3, 0]])
    y = torch.randn(2, 3, 3)
    matrix = F.one_hot(rows, 6).float()  # (E, S, R)
    torch.testing.assert_close(take_rows(x, rows), matrix @ x)
    torch.testing.assert_close(add_rows(y, rows, 6), torch.einsum("esr,esd->rd", matrix, y))
    half = add_rows(y.bfloat16(), rows, 6)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.einsum("esr,esd->rd", matrix, y.bfloat16().float()))


def test_training_repeats_bit_by_bit():
    layer, x = random_experts(16, 16, 4, 3.0), torch.randn(3, 50, 16)
    results = []
    for _ in range(3):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.gpu
def test_training_repeats_bit_by_bit_on_a_gpu():
    """Where sums by atomic additions do not."""
    layer = random_experts(256, 256, 8, 4.0).cuda()
    x, results = torch.randn(8, 1024, 256, device="cuda"), []
    for _ in range(5):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# --- Dropped tokens


def test_the_backbone_sees_kept_tokens_alone():
    """Deferred masking: what is dropped reaches the output through the mixer, and without one not at all."""
    noise = torch.rand(1, 16)
    for mixer_num_layers in (2, 0):
        model = toy_sparse(mixer_num_layers=mixer_num_layers).train()
        inputs = sparse_inputs(batch=1) | {"mask_ratio": 0.75, "mask_noise": noise}
        output = model(**inputs)
        moved = inputs | {"hidden_states": inputs["hidden_states"].clone()}
        token = int(output.mask[0].nonzero()[0])
        row, column = 2 * (token // 4), 2 * (token % 4)
        moved["hidden_states"][0, :, row : row + 2, column : column + 2] += 1
        assert torch.equal(run(model, moved), output.sample) == (mixer_num_layers == 0)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 4), (0.5, 8), (0.9, 1), (0.01, 15)])
def test_the_tokens_of_lowest_noise_are_kept(mask_ratio, kept):
    model, noise = toy_sparse().train(), torch.rand(3, 16)
    output = model(**sparse_inputs(batch=3), mask_ratio=mask_ratio, mask_noise=noise)
    expected = torch.ones(3, 16).scatter(1, noise.argsort(1)[:, :kept], 0.0)
    assert torch.equal(output.mask, expected)


def test_the_mask_counts_in_float32_whatever_the_model_computes_in():
    """Sums of 16-bit numbers round from 257 tokens on."""
    model, inputs = toy_sparse().bfloat16().train(), cast(sparse_inputs(), torch.bfloat16)
    assert model(**inputs, mask_ratio=0.5).mask.dtype == torch.float32


def test_masks_are_drawn_anew_for_every_sample_and_call():
    model, inputs = toy_sparse().train(), sparse_inputs(batch=4)
    masks = [model(**inputs, mask_ratio=0.5).mask for _ in range(2)]
    assert not torch.equal(*masks)
    assert len({tuple(row) for mask in masks for row in mask.tolist()}) > 4
    torch.manual_seed(3)
    first = model(**inputs, mask_ratio=0.5).mask
    torch.manual_seed(3)
    assert torch.equal(model(**inputs, mask_ratio=0.5).mask, first)


def test_the_order_of_the_kept_tokens_does_not_matter():
    model, inputs, noise = toy_sparse().train(), sparse_inputs(), torch.rand(2, 16)
    kept = noise <= noise.sort(1).values[:, 7:8]
    other = torch.where(kept, torch.rand(2, 16), 1 + noise)  # the same eight, in another order
    first, second = (run(model, inputs | {"mask_ratio": 0.5, "mask_noise": x}) for x in (noise, other))
    assert relative_error(second, first) < 1e-5


# --- Initialisation


def test_a_fresh_model_predicts_zero():
    model = SparseDiTTransformer2DModel(**TOY).eval()
    assert not run(model, sparse_inputs((3, 5))).any()


def stds(model: nn.Module, *ends: str) -> dict[str, float]:
    return {name: p.std().item() for name, p in model.named_parameters() if name.endswith(ends)}


WIDE: dict[str, Any] = TOY | {"hidden_size": 128, "mixer_hidden_size": 96, "attention_head_dim": 16}


@pytest.mark.parametrize(
    ("config", "mixer", "backbone"),
    [
        ({}, [8, 8], [2, 4, 6, 8]),
        ({"depth_scaled_init": False}, [8, 8], [8, 8, 8, 8]),
        # The 1.2B variant.
        ({"residual_init_denominator": 3, "mixer_depth_scaled_init": True}, [3, 6], [9, 12, 15, 18]),
    ],
    ids=str,
)
def test_layers_that_write_to_the_residual_stream_start_smaller_with_depth(config, mixer, backbone):
    model = SparseDiTTransformer2DModel(**WIDE | config)
    for blocks, squares in ((model.mixer_blocks, mixer), (model.transformer_blocks, backbone)):
        for block, square in zip(blocks, squares):
            written = stds(block, "to_out.0.weight", "up_proj.weight", "down_proj.weight", "experts_out")
            assert len(written) == (3 if hasattr(block.ff, "router") else 4)
            for name, std in written.items():
                assert std == pytest.approx(0.02 / square**0.5, rel=0.1), name


def test_the_other_layers_start_as_published():
    model = SparseDiTTransformer2DModel(**WIDE)
    read = ("to_q.weight", "to_k.weight", "to_v.weight", "gate_proj.weight", "experts_in", "router.weight")
    projections = ("time_embed", "caption_projection", "pooled_projection")
    small = stds(model, *read) | {
        f"{part}.{name}": p.std().item()
        for part in projections
        for name, p in getattr(model, part).named_parameters()
        if name.startswith("linear") and name.endswith("weight")
    }
    for name, std in small.items():
        assert std == pytest.approx(0.02, rel=0.2 if "router" in name else 0.06), name
    assert stds(model.caption_refiner, "up_proj.weight")["ff.up_proj.weight"] == pytest.approx(0.02, rel=0.06)

    zero = {name for name, p in model.named_parameters() if not p.any()}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {f"{name}.bias" for name in linears if f"{name}.bias" in dict(model.named_parameters())} <= zero
    weights = {"adaln_out.weight", "proj_out.weight", "caption_refiner.attn1.to_out.0.weight"}
    weights |= {"caption_refiner.ff.down_proj.weight"}
    blocks = [f"mixer_blocks.{i}" for i in range(2)] + [f"transformer_blocks.{i}" for i in range(4)]
    assert {name for name in zero if name.endswith("weight")} == weights | {
        f"{b}.adaln.weight" for b in blocks
    }
    # Xavier, uniform: the convolution as a linear layer on patches.
    for weight in (model.patch_embed.proj.weight.flatten(1), model.mixer_in.proj.weight):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert model.patch_embed.proj.bias.abs().max().item() == pytest.approx(0.25, rel=0.1)  # 1 / sqrt(C p p)
    norms = {name: p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name}
    assert all((p == 1).all() for p in norms.values())
    assert len(norms) == 2 + 2 + 3 * 6 + 3 + 1  # projections, refiner, blocks, bridges, output


# --- Training


def gradients(model: nn.Module, inputs: dict[str, Any], target: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (model(**inputs).sample - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_two_steps_wake_every_parameter():
    """At first the final linear alone learns, since everything before it is multiplied by its zeros."""
    model = SparseDiTTransformer2DModel(**TOY).train()
    inputs, target = sparse_inputs(), torch.randn(2, 4, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    awake = [name for name, gradient in gradients(model, inputs, target).items() if gradient.any()]
    assert awake == ["proj_out.weight", "proj_out.bias"]
    for _ in range(2):
        optimizer.step()
        found = gradients(model, inputs, target)
    asleep = [name for name, gradient in found.items() if not gradient.any()]
    assert asleep == []
    assert found.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("config", [{}, {"use_bias": True, "qk_norm_affine": True}], ids=str)
def test_every_gradient_equals_the_naive_twins(config):
    model, inputs = toy_sparse(**config).train(), sparse_inputs((3, 5))
    inputs |= {"mask_ratio": 0.5, "mask_noise": torch.rand(2, 15)}
    target = torch.randn(2, 4, 6, 10)
    ours = gradients(model, inputs, target)
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    sample = naive_sparse_dit(to_released(leaves), model.config, **inputs)
    theirs = torch.autograd.grad((sample - target).square().mean(), list(leaves.values()))
    assert ours.keys() == leaves.keys()
    for name, gradient in zip(leaves, theirs):
        assert relative_error(ours[name], gradient) < 5e-5, name


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_gradient(mask_ratio):
    model, inputs = toy_sparse().train(), sparse_inputs((3, 5))
    inputs |= {"mask_ratio": mask_ratio, "mask_noise": torch.rand(2, 15) if mask_ratio else None}
    target = torch.zeros(2, 4, 6, 10)
    plain = gradients(model, inputs, target)
    model.enable_gradient_checkpointing()
    calls = []
    for block in (model.mixer_blocks[0], model.transformer_blocks[0]):
        block.ff.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, inputs, target)
    assert len(calls) == 4  # each once forward, once again for the gradient
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


# --- The caption, once per prompt


def with_context(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the caption encoded."""
    inputs = dict(inputs)
    context = model.encode_text(
        inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask", None)
    )
    return inputs | {"encoder_hidden_states": context}


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_encoded_caption_gives_the_same_bits(dtype, mask):
    model, inputs = toy_sparse().to(dtype), cast(sparse_inputs((3, 5), batch=3), dtype)
    inputs["encoder_attention_mask"] = mask
    encoded = with_context(model, inputs)
    assert encoded["encoder_hidden_states"].batch_size == 3
    for step in (0, 1):
        now = {"timestep": inputs["timestep"] - step}
        assert torch.equal(run(model, encoded | now), run(model, inputs | now))


def test_an_encoded_caption_trains_like_the_caption():
    model, inputs = toy_sparse(), sparse_inputs()
    plain = gradients(model, inputs, torch.zeros(2, 4, 8, 8))
    model.zero_grad()
    model(**with_context(model, inputs)).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, plain[name]) < 1e-5, name


def test_the_config_is_json():
    assert json.loads(SparseDiTTransformer2DModel(**TOY).to_json_string())["ffn_inner_factor"] == 2 / 3
