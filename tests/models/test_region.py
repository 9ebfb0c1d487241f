"""A part of an image computed alone: the numbers of the whole, from no token more than they depend on."""

from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import Tensor
from toys import relative_error, run, toy_inputs, toy_model

from localdit.models.local_dit import LocalDiTTransformer2DModel, Windows, rotary_table, shift_windows
from localdit.models.region import Layout, Region, build_region, dilate, find_cone, restrict

LOCAL: dict[str, Any] = {"global_context": False, "relative_position_bias": True}
# Parts of a grid of 21 x 19 tokens, by the rows and columns of their rectangles.
PARTS = {
    "a token": [(10, 11, 9, 10)],
    "a corner": [(0, 1, 0, 2)],
    "the other corner": [(20, 21, 17, 19)],
    "a stripe along an edge": [(0, 21, 18, 19)],
    "two far apart": [(1, 3, 2, 5), (17, 19, 14, 16)],
    "two across the border": [(0, 1, 8, 9), (20, 21, 8, 10)],
}


def part(grid: tuple[int, int], rectangles: list[tuple[int, int, int, int]]) -> Tensor:
    tokens = torch.zeros(grid, dtype=torch.bool)
    for top, bottom, left, right in rectangles:
        tokens[top:bottom, left:right] = True
    return tokens


def latents_of(tokens: Tensor) -> Tensor:
    """The latents of tokens with patches of 2: (H, W) bool."""
    return tokens.repeat_interleave(2, 0).repeat_interleave(2, 1)


def planned(model: LocalDiTTransformer2DModel, tokens: Tensor, halo: int | None = None) -> Region:
    region = model.plan_region(tokens, halo)
    assert region is not None
    return region


# --- Exactness


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("window", "full"), [(4, ()), (3, ()), (2, (1,)), (8, ())], ids=["4", "3", "2 after full", "8"]
)
def test_a_part_alone_is_what_it_is_in_the_whole(name, window, full):
    """For all shifts, on a grid that pads. Matrix products of other heights may round otherwise."""
    layers = {2: 3, 8: 2}.get(window, window)
    model = toy_model(window_size=window, num_layers=layers, full_attention_layers=full, **LOCAL)
    inputs = toy_inputs((21, 19), batch=2)
    tokens = part((21, 19), PARTS[name])
    whole, alone = run(model, inputs), run(model, inputs, region=planned(model, tokens))
    inside = latents_of(tokens)
    torch.testing.assert_close(alone[..., inside], whole[..., inside], rtol=0, atol=1e-6)
    assert not alone[..., latents_of(~dilate(tokens, window))].any()


def test_an_encoded_caption_and_a_batch_of_other_texts_change_nothing_of_it():
    model, inputs = toy_model(num_layers=2, **LOCAL), toy_inputs((16, 12), batch=3)
    tokens = part((16, 12), [(7, 9, 1, 2)])
    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    encoded = inputs | {"encoder_hidden_states": context, "encoder_attention_mask": None}
    region = planned(model, tokens)
    assert relative_error(run(model, encoded, region=region), run(model, inputs, region=region)) < 1e-6


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("full", [(), (1,)], ids=["local", "a full block"])
def test_each_block_reads_what_the_part_depends_on_and_nothing_else(name, full):
    """The gradients of the whole image's prediction say what it depends on."""
    model = toy_model(num_layers=4, full_attention_layers=full, **LOCAL)
    grid, read = (21, 19), []

    def keep_gradient(_: Any, args: tuple[Any, ...]) -> None:
        args[0].retain_grad()
        read.append(args[0])

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(keep_gradient)
    tokens = part(grid, PARTS[name])
    sample = model(**toy_inputs(grid, batch=1)).sample[..., latents_of(tokens)]
    (sample * torch.randn_like(sample)).sum().backward()
    expected = [(x.grad != 0).any(dim=2)[0] for x in read]

    layouts = [
        Layout(shift_windows(*grid, 4, i, None, tokens.device), i in full, False)
        for i in range(model.config.num_layers)
    ]
    for found, wanted in zip(find_cone(tokens.flatten(), layouts), expected, strict=True):
        assert torch.equal(found, wanted)


def test_latents_outside_the_cone_are_never_read():
    model, inputs = toy_model(num_layers=3, **LOCAL), toy_inputs((24, 20))
    tokens = part((24, 20), [(11, 13, 3, 5)])
    region = planned(model, tokens)
    read = torch.zeros(24 * 20, dtype=torch.bool)
    read[region.blocks[0].keep] = True
    poisoned = inputs["hidden_states"].masked_fill(latents_of(~read.view(24, 20)), torch.nan)
    alone = run(model, inputs | {"hidden_states": poisoned}, region=region)
    assert torch.equal(alone, run(model, inputs, region=region))


# --- The tables


@pytest.mark.parametrize("shift", range(4))
def test_windows_of_all_tokens_are_the_windows(shift):
    rotary = rotary_table(9, 11, 8, torch.device("cpu"))
    windows = shift_windows(9, 11, 4, shift, rotary, torch.device("cpu"))
    for is_map in (False, True):
        same = restrict(windows, torch.ones(99, dtype=torch.bool), is_map)
        for name, table in zip(Windows._fields, same):
            if isinstance(table, Tensor):
                assert torch.equal(table, getattr(windows, name)), name
    assert same.grid == windows.grid


def test_every_table_of_windows_is_restricted():
    """A table that is added to `Windows` must be added to `restrict`."""
    assert Windows._fields == (
        "slot_token",
        "token_slot",
        "present",
        "attend",
        "rotary",
        "grid",
        "slots",
        "lines",
        "global_queries",  # of bands alone
    )


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("is_map", [False, True])
def test_a_restricted_table_for_kernels_says_what_the_others_say(shift, is_map):
    tokens = part((21, 19), PARTS["two far apart"]).flatten()
    windows = restrict(shift_windows(21, 19, 4, shift, None, tokens.device), tokens, is_map)
    present = windows.slots >= 0  # (G, S)
    assert present.sum() == tokens.sum()
    assert torch.equal((windows.slots >> 2)[present], windows.slot_token.view_as(present)[present])
    region = windows.slots & 3
    sees = present[:, None] & (region[:, :, None] == region[:, None])  # (G, S, S)
    assert torch.equal(sees[present], windows.attend[:, 0][present])


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("name", PARTS)
def test_a_map_of_windows_has_the_neighbours_of_the_whole_map(name, shift):
    """What a convolution sees beside a token is what it sees in the whole map, or absent."""
    tokens = dilate(part((21, 19), PARTS[name]), 2).flatten()
    windows = shift_windows(21, 19, 4, shift, None, tokens.device)
    place = tokens.nonzero()[:, 0]

    def neighbours(tables: Windows, count: int) -> set[tuple[int, int, int]]:
        """Pairs of tokens side by side (0) or one below the other (1), from the present slots of a map."""
        token = tables.slot_token if count == len(tokens) else place[tables.slot_token]
        if tables.present is not None:
            token = torch.where(tables.present[:, 0], token, -1)
        lines = token.view(*tables.grid, 4, 4).transpose(1, 2).flatten(0, 1).flatten(1)
        pairs = [(lines[:, :-1], lines[:, 1:], 0), (lines[:-1], lines[1:], 1)]
        return {
            (int(a), int(b), way)
            for first, second, way in pairs
            for a, b in zip(first.flatten(), second.flatten())
            if a >= 0 and b >= 0 and tokens[a] and tokens[b]
        }

    part_of_it = restrict(windows, tokens, is_map=True)
    assert neighbours(part_of_it, len(place)) == neighbours(windows, len(tokens))


@pytest.mark.parametrize("shift", range(4))
def test_with_global_context_a_block_sees_an_image_that_ends_where_the_part_does(shift):
    """Windows that start where the part does are those of a crop without shift, at its place in the image."""
    model = toy_model(num_layers=4, global_context=True)
    block = model.transformer_blocks[shift]
    grid, crop, start = (21, 19), (8, 12), 4 + shift
    tokens = part(grid, [(start, start + crop[0], shift, shift + crop[1])]).flatten()
    rotary = rotary_table(*grid, 12, tokens.device)
    whole = shift_windows(*grid, 4, shift, rotary, tokens.device)
    small = shift_windows(*crop, 4, 0, rotary[tokens], tokens.device)
    x, text, cond = torch.randn(2, 96, 24), torch.randn(2, 5, 24), torch.randn(2, 6 * 24)
    with torch.no_grad():
        expected = block(x, text, cond, small, None)
        alone = block(x, text, cond, restrict(whole, tokens, is_map=True), None)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


def test_dilation_goes_so_many_rows_and_columns():
    tokens = part((9, 8), [(4, 5, 6, 7)])
    assert torch.equal(dilate(tokens, 0), tokens)
    assert torch.equal(dilate(tokens, 2), part((9, 8), [(2, 7, 4, 8)]))


# --- Halo


def test_global_context_needs_the_whole_image_unless_there_is_a_halo():
    model, inputs = toy_model(num_layers=3, global_context=True), toy_inputs((24, 24))
    tokens = part((24, 24), [(10, 13, 11, 13)])
    assert model.plan_region(tokens) is None
    assert model.plan_region(tokens, halo=4) is None  # it covers all
    whole, errors, shares = run(model, inputs)[..., latents_of(tokens)], [], []
    for halo in (0, 1, 2):
        region = planned(model, tokens, halo)
        alone = run(model, inputs, region=region)
        errors.append(relative_error(alone[..., latents_of(tokens)], whole))
        shares.append(region.share)
    assert 0.2 > errors[0] > 10 * errors[1] > 20 * errors[2] > 0
    assert shares == pytest.approx([6 / 576, 110 / 576, 342 / 576])


def test_a_halo_as_wide_as_the_cone_changes_nothing():
    model = toy_model(num_layers=3, **LOCAL)
    tokens = part((24, 24), [(10, 13, 11, 13)])
    narrow, wide, free = (planned(model, tokens, halo) for halo in (1, 3, None))
    assert narrow.share < wide.share == free.share
    inputs = toy_inputs((24, 24))
    assert torch.equal(run(model, inputs, region=wide), run(model, inputs, region=free))


# --- Cost

# Of 18 blocks with windows of 4, the share of tokens computed for a square in the middle, by the image's side
# in pixels and the square's share of its area.
SHARES = {
    (1024, 1 / 64): 0.4396,
    (1024, 1 / 16): 0.5535,
    (1024, 1 / 4): 0.7960,
    (2048, 1 / 64): 0.2043,
    (2048, 1 / 16): 0.3219,
    (2048, 1 / 4): 0.5980,
    (4096, 1 / 64): 0.0813,
    (4096, 1 / 16): 0.1653,
    (4096, 1 / 4): 0.4270,
}


def share(side: int, area: float, layers: int = 18) -> float:
    tokens = side // 16
    square = round(tokens * area**0.5)
    start = (tokens - square) // 2
    wanted = part((tokens, tokens), [(start, start + square, start, start + square)])
    shifts = [shift_windows(tokens, tokens, 4, shift, None, wanted.device) for shift in range(4)]
    region = build_region(wanted, [Layout(shifts[i % 4], False, False) for i in range(layers)], None, None)
    return 1.0 if region is None else region.share


@pytest.mark.parametrize(("side", "area"), SHARES)
def test_the_cost_of_the_published_depth_is_as_counted(side, area):
    assert share(side, area) == pytest.approx(SHARES[side, area], abs=5e-5)


# --- What is refused


def test_a_region_for_another_size_is_refused():
    model = toy_model(**LOCAL, num_layers=1)
    region = planned(model, part((12, 8), [(0, 1, 0, 1)]))
    with pytest.raises(
        ValueError, match=r"region must be planned for \(8, 12\) tokens, got one for \(12, 8\)"
    ):
        run(model, toy_inputs((8, 12)), region=region)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(8, 8, dtype=torch.bool), torch.ones(8, 8), torch.ones(1, 8, 8, dtype=torch.bool)]
)
def test_a_part_without_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        toy_model(**LOCAL).plan_region(tokens)


def test_a_region_beside_a_cache_is_refused():
    model = toy_model(**LOCAL)
    region = planned(model, part((16, 16), [(0, 1, 0, 1)]))
    model.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500))
    with pytest.raises(ValueError, match="region must be None with a cache"):
        run(model, toy_inputs((16, 16)), region=region)
    assert model.plan_region(part((16, 16), [(0, 1, 0, 1)])) is None
