"""A model that runs in bands of rows computes, bit for bit, what it computes of the whole image."""

from typing import Any

import pytest
import torch
from architectures import with_lora
from subclasses import GatedLocalDiT, PosedLocalDiT, SharpLocalDiT
from torch.utils._python_dispatch import TorchDispatchMode
from toys import cast, relative_error, run, toy_inputs, toy_model

from localdit.models.local_dit import rotary_table, shift_windows
from localdit.models.streaming import Shifted, TokenMap, split

CPU = torch.device("cpu")


@torch.no_grad()
def streamed(model: Any, inputs: dict[str, Any], max_tokens: int, **kwargs: Any) -> torch.Tensor:
    model.enable_streaming(max_tokens, **kwargs)
    try:
        return run(model, inputs)
    finally:
        model.disable_streaming()


# Grids that are whole windows, that pad, that are a window or less, wide and tall. None leaves a single
# query over PyTorch's blocks of 32, which would go another way to the text.
@pytest.mark.parametrize("global_context", [False, True])
@pytest.mark.parametrize(
    ("window", "grid"),
    [
        (4, (16, 8)),
        (4, (17, 6)),
        (4, (9, 7)),
        (4, (3, 3)),
        (4, (2, 9)),
        (2, (9, 7)),
        (1, (8, 6)),
        (8, (17, 9)),
    ],
)
def test_bands_of_every_size_and_shift_give_the_same_bits(window, grid, global_context):
    model = toy_model(window_size=window, num_layers=max(window, 2), global_context=global_context)
    inputs = toy_inputs(grid)
    whole = run(model, inputs)
    for max_tokens in (1, 100, 10_000):  # a row of windows; some; all
        assert torch.equal(streamed(model, inputs, max_tokens), whole)


@pytest.mark.parametrize(
    "config",
    [
        {"rope": False},
        {"relative_position_bias": False},
        {"global_context": False, "relative_position_bias": True},
        {"attention_residual": False},
        {"patch_size": 1, "in_channels": 3, "out_channels": 6},
        {"interpolation_scale": 2.5, "sample_size": 64},
    ],
)
def test_every_config_field_gives_the_same_bits(config):
    model, inputs = toy_model(**config), toy_inputs((9, 7), **config)
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


@pytest.mark.parametrize("rope", [False, True])
def test_blocks_of_full_attention_are_computed_whole_among_the_others(rope):
    model, inputs = toy_model(full_attention_layers=(0, 2), rope=rope), toy_inputs((9, 7))
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


def test_left_out_conditions_are_those_of_the_whole_picture():
    model, inputs = toy_model(), toy_inputs((9, 7)) | {"added_cond_kwargs": None}
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


def test_the_true_width_gives_the_same_bits():
    """Two blocks of the published size, on one thread."""
    config = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 2}
    model, inputs = toy_model(**config), toy_inputs((20, 12), batch=1, **config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(model, inputs)
        assert torch.equal(streamed(model, inputs, 100), whole)
    finally:
        torch.set_num_threads(threads)


def test_an_encoded_caption_gives_the_same_bits():
    model, inputs = toy_model(), toy_inputs((9, 7))
    text, mask = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    inputs["encoder_hidden_states"] = model.encode_text(text, mask)
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_guidance_shares_and_a_run_makes_ahead_gives_the_same_bits(batch):
    """Two captions for each sample, and the modulations of all steps."""
    model, inputs = toy_model(), toy_inputs((9, 7), batch=2 * batch)
    text, mask = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    inputs["encoder_hidden_states"] = model.encode_text(text, mask)
    inputs["hidden_states"] = inputs["hidden_states"][:batch]
    sizes = {name: x[:1] for name, x in inputs.pop("added_cond_kwargs").items()}
    inputs["timestep"] = model.encode_timesteps(torch.tensor([900.0, 20.0]), sizes)[1]
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


def test_every_sample_of_shared_captions_may_have_a_time_of_its_own():
    model, inputs = toy_model(), toy_inputs((9, 7), batch=4)
    text, mask = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    inputs = {name: x[:2] for name, x in inputs.items() if name != "added_cond_kwargs"}
    inputs["encoder_hidden_states"] = model.encode_text(text, mask)
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


def test_a_token_map_on_the_host_gives_the_same_bits():
    model, inputs = toy_model(), toy_inputs((9, 7))
    assert torch.equal(streamed(model, inputs, 1, offload=True), run(model, inputs))


class Copies(TorchDispatchMode):
    """The two sides of each copy."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.sides += args[:2]
        return func(*args, **(kwargs or {}))


def test_a_token_map_moves_whole_pieces_of_memory():
    """Between two devices PyTorch copies others twice, and waits for it or reads what is not there yet."""
    tokens = TokenMap((3, 5, 4, 6), torch.empty(2), offload=True)
    all_rows = torch.randn(3, 20, 6)
    with Copies() as copies:
        tokens.write((slice(3, 5), slice(0, 3)), all_rows)
        tokens.samples = 3
        found = tokens.read((slice(4, 5), slice(0, 2)))
        assert tokens.read(()).shape == (3, 0, 4, 6)
    expected = all_rows.unflatten(1, (5, 4))[:, [1, 2, 3]]
    assert torch.equal(found, expected)
    assert len(copies.sides) == 2 * 3 * (2 + 2)
    assert all(side.is_contiguous() for side in copies.sides)


def test_fused_projections_give_the_same_bits():
    model, inputs = toy_model(), toy_inputs((9, 7))
    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


def test_a_lora_is_heard_in_bands():
    model, inputs = with_lora(toy_model()), toy_inputs((9, 7))
    assert torch.equal(streamed(model, inputs, 1), run(model, inputs))


def test_the_kernels_way_through_the_windows_is_streamed(monkeypatch):
    """Tables for kernels are cut, too: their plain definition stands for them here."""
    from localdit.models import local_dit

    model, inputs = toy_model(), toy_inputs((9, 7))
    whole = run(model, inputs)
    monkeypatch.setattr(local_dit, "triton_computes", lambda *_: True)
    model.set_kernels("torch")
    assert relative_error(streamed(model, inputs, 1), whole) < 1e-6


def test_bfloat16_differs_by_rounding_alone():
    model, inputs = toy_model(), toy_inputs((17, 6))
    exact = run(model, inputs)
    model.bfloat16()
    inputs = cast(inputs, torch.bfloat16)
    whole = run(model, inputs)
    assert relative_error(streamed(model, inputs, 1), exact) < 2 * relative_error(whole, exact)


def test_a_changed_model_is_streamed_as_it_is_then():
    """Nothing of the weights is kept from call to call."""
    model, inputs = toy_model(), toy_inputs((9, 7))
    model.enable_streaming(1)
    before = run(model, inputs)
    with torch.no_grad():
        model.transformer_blocks[1].attn1.global_context.query_features[1].depthwise.weight.mul_(2)
    after = run(model, inputs)
    model.disable_streaming()
    assert not torch.equal(before, after)
    assert torch.equal(after, run(model, inputs))


class LargestTensor(TorchDispatchMode):
    """Numbers of the largest floating point tensor that is made, but for the latents and maps of all tokens,
    which are told apart."""

    def __init__(self, token_map: torch.Size, latents: torch.Size):
        super().__init__()
        self.token_map, self.latents, self.largest = token_map, latents, 0
        self.maps: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                if x.shape == self.token_map:
                    self.maps.add(x.data_ptr())
                elif x.untyped_storage().nbytes() == x.nbytes and x.shape != self.latents:  # a part of none
                    self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("global_context", [False, True])
def test_but_for_one_map_of_tokens_memory_does_not_grow_with_the_image(global_context):
    model = toy_model(global_context=global_context)
    largest = []
    for height in (32, 96):
        inputs = toy_inputs((height, 8), batch=1)
        with LargestTensor(torch.Size((1, height, 8, 24)), inputs["hidden_states"].shape) as counter:
            streamed(model, inputs, 64)
        assert len(counter.maps) == 1
        largest.append(counter.largest)
    assert largest[0] == largest[1]


@pytest.mark.parametrize("grid", [(8, 8), (9, 7), (3, 5)])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_bands_partition_the_image_and_see_what_its_windows_see(grid, shift):
    """Tables of bands against those of the whole image, token by token."""
    windows = shift_windows(*grid, 4, shift, None, CPU)
    shifted = Shifted(*grid, 4, shift, windows, head_dim=8)
    rotary = rotary_table(*grid, 8, CPU)
    raster = torch.arange(grid[0] * grid[1]).view(grid)
    seen = []
    for first, last in split(windows.grid[0], 1):
        band = shifted.band(first, last)
        tokens = torch.cat([raster[rows] for rows in band.lines]).flatten()
        seen.append(tokens)
        assert torch.equal(band.rotary, rotary[tokens])
        slots = slice(first * windows.grid[1] * 16, last * windows.grid[1] * 16)
        present = torch.ones(slots.stop - slots.start).bool()
        if windows.present is not None:
            present = windows.present[slots, 0]
            assert torch.equal(band.windows.present[:, 0], present)
        assert torch.equal(tokens[band.windows.slot_token][present], windows.slot_token[slots][present])
        assert torch.equal(band.windows.slot_token[band.windows.token_slot], torch.arange(len(tokens)))
        encoded = band.windows.slots.flatten()
        assert torch.equal(encoded >= 0, present)
        assert torch.equal(encoded[present] >> 2, band.windows.slot_token[present].int())
    assert torch.equal(torch.cat(seen).sort().values, raster.flatten())


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (7, 3), (8, 3), (5, 9)])
def test_ranges_are_few_and_of_nearly_one_length(rows, most):
    ranges = list(split(rows, most))
    lengths = [stop - start for start, stop in ranges]
    assert [place for start, stop in ranges for place in range(start, stop)] == list(range(rows))
    assert len(ranges) == -(-rows // most)
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1


def test_streaming_is_off_until_enabled_and_after():
    model = toy_model()
    assert not model.is_streaming
    model.enable_streaming()
    assert model.is_streaming
    model.disable_streaming()
    assert not model.is_streaming


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, -1, 2.0, True])
def test_a_band_must_hold_a_number_of_tokens(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be a positive integer, got {max_tokens}"):
        toy_model().enable_streaming(max_tokens)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (GatedLocalDiT, "GatedLocalDiTBlock"),
        (PosedLocalDiT, "PosedLocalDiTBlock"),
        (SharpLocalDiT, "SharpLocalDiTProcessor"),
    ],
)
def test_a_subclass_that_computes_otherwise_is_refused_by_name(cls, name):
    model = toy_model(cls)
    with pytest.raises(ValueError, match=name):
        model.enable_streaming()
    assert not model.is_streaming


def test_a_processor_that_is_set_later_is_refused():
    model = toy_model()
    model.enable_streaming()
    model.transformer_blocks[1].attn1.set_processor(
        toy_model(SharpLocalDiT).transformer_blocks[0].attn1.processor
    )
    with pytest.raises(ValueError, match="SharpLocalDiTProcessor"):
        run(model, toy_inputs())


def test_training_is_refused():
    model = toy_model()
    model.enable_streaming()
    with pytest.raises(ValueError, match="call the model under torch"):
        model(**toy_inputs())


def test_blocks_that_are_elsewhere_are_refused():
    model = toy_model()
    model.enable_streaming()
    model.transformer_blocks.to("meta")
    with pytest.raises(ValueError, match="streaming needs all blocks on cpu"):
        run(model, toy_inputs())


def test_a_region_is_refused_and_none_is_planned():
    model, part = toy_model(global_context=False), torch.zeros(20, 12, dtype=torch.bool)
    part[0, 0] = True
    region = model.plan_region(part)
    model.enable_streaming()
    assert model.plan_region(part) is None
    with pytest.raises(ValueError, match="region must be None while streaming"):
        run(model, toy_inputs((20, 12)), region=region)


def test_wrong_inputs_are_refused_as_by_the_whole_model():
    model = toy_model()
    model.enable_streaming()
    with pytest.raises(ValueError, match="hidden_states' height must be a multiple of 2"):
        run(model, toy_inputs() | {"hidden_states": torch.zeros(2, 4, 7, 8)})
    with pytest.raises(ValueError, match="attention_kwargs"):
        run(model, toy_inputs(), attention_kwargs={"pose": torch.zeros(2, 3)})
