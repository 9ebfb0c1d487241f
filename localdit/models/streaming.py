"""Running LocalDiT in bands of rows: memory for one token map and a band, at any size.

A window sees itself alone, and all else in a block but the convolutions of the global context is done token
by token. So a block may take the rows of windows of its shifted map a few at a time, each band in the place
of its own input, and every number is what it is in the whole image.
`LocalDiTTransformer2DModel.enable_streaming` has the model do so. The blocks are the model's own, called on
bands:

- tables of the whole image are those of the windows alone, a few integers for each token. The position
  embedding and the rotary angles are computed for a band at its turn, from its rows and columns;
- the global context convolves queries, 3x3, twice: its map reaches two rows over the band's edges. Of the
  band above, which has its output by then, the last rows are kept as they were;
- each of its two squeeze-excites scales by a mean over the image, which is added up over bands beforehand.
  The queries are computed again each time, for to keep them would take a second map.

A block of full attention sees all of the image, and is computed whole.

Equal bits need matrix products that give a row the same bits whatever number of rows stand around it. On
the CPU those of float32 do (MKL; 1152 and 4608 columns, measured up to 8192 rows): with one thread from 16
rows on, with two from 640. PyTorch's attention to the text wants no fewer than 4 queries over a multiple of
32. Products in bfloat16 and those of a GPU choose their order of summation by the number of rows, and
differ by rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from localdit.kernels.window_attention import encode_slots
from localdit.models.layers import sincos_table
from localdit.models.local_dit import (
    GlobalContext,
    GlobalContextFeatures,
    KeysValues,
    LocalDiTAttention,
    LocalDiTAttnProcessor,
    LocalDiTBlock,
    LocalDiTTransformer2DModel,
    TextContext,
    TimestepContext,
    Windows,
    modulated_norm,
    picture_size,
    position_axis,
    rotary_of,
    shift_windows,
)

# B batch   h w token grid   n tokens of a band   D width   A heads   d = D/A head width   S tokens per window

CONTEXT_REACH = 2  # rows: two convolutions, 3x3


class Band(NamedTuple):
    """Some rows of windows of a shifted map."""

    lines: tuple[slice, ...]  # the image's rows, from the top of the map to the bottom; two where it wraps
    windows: Windows  # of these rows' tokens, counted from 0
    rotary: Tensor | None  # (n, d/2, 2), in the order of these tokens


@lru_cache(maxsize=8)
def cached_windows(height: int, width: int, window: int, device: torch.device) -> tuple[Windows, ...]:
    """`shift_windows` without rotary tables for each shift, once for a grid, for all blocks and steps."""
    with torch.inference_mode(False):
        return tuple(shift_windows(height, width, window, shift, None, device) for shift in range(window))


def split(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """0 .. rows in as few ranges as hold at most `most` rows, all of nearly the same length."""
    count = -(-rows // most)
    for i in range(count):
        yield rows * i // count, rows * (i + 1) // count


@dataclass(frozen=True)
class Shifted:
    """The map of one shift, to be cut in bands."""

    height: int
    width: int
    window: int
    shift: int
    windows: Windows  # all of them
    head_dim: int | None  # None without rotary positions

    def lines(self, first: int, last: int) -> tuple[slice, ...]:
        """The image's rows in the rows of windows `first` to `last` - 1; absent ones are left out."""
        padded = self.windows.grid[0] * self.window
        start, stop = first * self.window + self.shift, last * self.window + self.shift
        ends = (start, stop), (max(start - padded, 0), stop - padded)  # the map goes on at the image's top
        parts = (slice(begin, min(end, self.height)) for begin, end in ends)
        return tuple(part for part in parts if part.start < part.stop)

    def rotary(self, lines: tuple[slice, ...]) -> Tensor | None:
        """The rotary table of these rows, (n, d/2, 2)."""
        if self.head_dim is None:
            return None
        device = self.windows.slot_token.device
        rows = torch.cat([torch.arange(part.start, part.stop, device=device) for part in lines])
        return rotary_of(rows, torch.arange(self.width, device=device), self.head_dim)

    def band(self, first: int, last: int) -> Band:
        """The rows of windows `first` to `last` - 1."""
        across, size = self.windows.grid[1], self.window**2
        lines = self.lines(first, last)
        begin, end = first * across, last * across
        slots = slice(begin * size, end * size)

        # The rows follow each other around the image's edge: tokens are counted modulo N.
        start, count = lines[0].start * self.width, self.height * self.width
        slot_token = (self.windows.slot_token[slots] - start) % count
        present = self.windows.present
        if present is not None:
            present = present[slots]
            slot_token = torch.where(present[:, 0], slot_token, 0)
        token_slot = torch.cat(
            [self.windows.token_slot[rows.start * self.width : rows.stop * self.width] for rows in lines]
        )

        rotary = self.rotary(lines)
        table = self.windows.slots[begin:end]
        # Every field: what is added to `Windows` must be cut as well.
        windows = self.windows._replace(
            slot_token=slot_token,
            token_slot=token_slot - begin * size,
            present=present,
            attend=self.windows.attend[begin:end],
            rotary=None if rotary is None else rotary[slot_token],
            grid=(last - first, across),
            slots=encode_slots(slot_token.view_as(table), table & 3, table >= 0),
            lines=None,
        )
        return Band(lines, windows, rotary)


class TokenMap:
    """All tokens of a batch, (B, h, w, D), on the device or the host; bands are read to the device."""

    def __init__(self, shape: tuple[int, ...], like: Tensor, offload: bool):
        self.device = like.device
        self.samples = len(like)  # of the batch, that are there; the others come with their captions
        self.tokens = torch.empty(
            shape,
            dtype=like.dtype,
            device="cpu" if offload else like.device,
            pin_memory=offload and like.device.type == "cuda",
        )

    def read(self, lines: tuple[slice, ...]) -> Tensor:
        """A copy of these rows, (B, rows, w, D)."""
        shape = self.samples, _count(lines), *self.tokens.shape[2:]  # there may be no lines
        rows = self.tokens.new_empty(shape, device=self.device)
        for target, source in self._pairs(lines, rows):
            target.copy_(source, non_blocking=True)
        return rows

    def write(self, lines: tuple[slice, ...], tokens: Tensor) -> None:
        """Replace these rows by tokens, (B, n, D)."""
        for source, target in self._pairs(lines, tokens.unflatten(1, (-1, self.tokens.shape[2]))):
            target.copy_(source, non_blocking=True)

    def _pairs(self, lines: tuple[slice, ...], rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of these rows, (B, rows, w, D), and their place in the map: whole pieces of memory, which a
        device fetches and brings by itself and in order. Others PyTorch has the host copy once more, which
        does not wait for the device."""
        for part, some in zip(lines, rows.split([_count((part,)) for part in lines], dim=1)):
            yield from zip(some, self.tokens[:, part])  # one sample after the other


@dataclass(frozen=True)
class Streaming:
    """How a model is run in bands. The arguments are those of `enable_streaming`."""

    max_tokens: int
    offload: bool

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be a positive integer, got {self.max_tokens!r}")

    def check(self, model: LocalDiTTransformer2DModel) -> None:
        """Raise ValueError for a model that computes anything that bands might change."""
        for block in cast("list[LocalDiTBlock]", model.transformer_blocks):
            parts: list[tuple[Any, type, str]] = [(block, LocalDiTBlock, "forward")]
            if isinstance(block.attn1, LocalDiTAttention):
                parts.append((block.attn1, LocalDiTAttention, "forward"))
                parts.append((block.attn1.processor, LocalDiTAttnProcessor, "__call__"))
            for part, known, method in parts:
                if getattr(type(part), method) is not getattr(known, method):
                    raise ValueError(
                        f"streaming must know what {known.__name__} computes: {type(part).__name__} has a "
                        f"{method} of its own, which may look beyond a band; disable_streaming() with it"
                    )

    def _check_state(self, model: LocalDiTTransformer2DModel, device: torch.device) -> None:
        self.check(model)  # blocks and processors may have been replaced
        if torch.is_grad_enabled():
            raise ValueError(
                "streaming keeps nothing for a backward pass: call the model under torch.no_grad(), "
                "or disable_streaming() to train"
            )
        if model.is_cache_enabled:
            raise ValueError("streaming needs disable_cache(): a cache carries whole images past the blocks")
        if any(parameter.device != device for parameter in model.transformer_blocks.parameters()):
            raise ValueError(
                f"streaming needs all blocks on {device}, where the latents are: it calls each many times. "
                "Offload the token map instead, by enable_streaming(offload=True)"
            )

    def run(
        self,
        model: LocalDiTTransformer2DModel,
        hidden_states: Tensor,
        context: TextContext,
        timestep: Tensor | float | TimestepContext,
        added_cond_kwargs: dict[str, Tensor] | None,
    ) -> Tensor:
        """The model's `forward`, after its checks and its projection of the caption."""
        device = hidden_states.device
        self._check_state(model, device)
        _, dim, head_dim, rope, base_size, scale, patch = model._geometry_key
        height, width = (length // patch for length in hidden_states.shape[2:])

        size = picture_size(height, width, patch, device)
        conditioning, embedded, modulations = model.condition(
            timestep, added_cond_kwargs, size, hidden_states
        )
        batch = context.batch_size
        if len(conditioning) > 1:  # else samples that share captions are one until they meet them
            copies = batch // len(hidden_states)
            hidden_states = hidden_states.repeat(copies, 1, 1, 1)
            conditioning, embedded = conditioning.repeat(copies, 1), embedded.repeat(copies, 1)

        # Tokens.
        x = TokenMap((batch, height, width, dim), hidden_states, self.offload)
        rows_at_once = max(1, self.max_tokens // (batch * width))
        down, across = (position_axis(length, base_size, scale, device) for length in (height, width))
        for top, bottom in split(height, rows_at_once):
            position = sincos_table(down[top:bottom], across, dim).to(hidden_states.dtype)
            patches = hidden_states[:, :, top * patch : bottom * patch]
            x.write((slice(top, bottom),), model.pos_embed(patches).contiguous() + position)

        # Blocks.
        window = model.config.window_size
        shifts = cached_windows(height, width, window, device)
        for index, block in enumerate(cast("list[LocalDiTBlock]", model.transformer_blocks)):
            shift = block.shift
            shifted = Shifted(height, width, window, shift, shifts[shift], head_dim if rope else None)
            text = context.text if context.keys_values is None else context.keys_values[index]
            modulation = block.modulation(conditioning) if modulations is None else modulations[index]
            self._run_block(block, x, shifted, text, modulation, context.mask)
            x.samples = batch

        # Output.
        sample = hidden_states.new_empty(batch, model.out_channels, *hidden_states.shape[2:])
        for top, bottom in split(height, rows_at_once):
            patches = model.predict(x.read((slice(top, bottom),)).flatten(1, 2), embedded)
            sample[:, :, top * patch : bottom * patch] = model.to_latents(patches, (bottom - top, width))
        return sample

    def _run_block(
        self,
        block: LocalDiTBlock,
        x: TokenMap,
        shifted: Shifted,
        text: Tensor | KeysValues,
        modulation: Tensor,
        mask: Tensor | None,
    ) -> None:
        """Replace the tokens by the block's output."""
        if not isinstance(block.attn1, LocalDiTAttention):  # over the whole image: there are no bands
            everything = (slice(0, shifted.height),)
            tokens, rotary = x.read(everything).flatten(1, 2), shifted.rotary(everything)
            x.write(everything, block(tokens, text, modulation, shifted.windows, rotary, mask))
            return
        rows, across = shifted.windows.grid
        per_row = len(x.tokens) * across * shifted.window**2
        bands = list(split(rows, max(1, self.max_tokens // per_row)))
        context = block.attn1.global_context
        halo = 0 if context is None else -(-CONTEXT_REACH // shifted.window)  # rows of windows

        means: list[Tensor] = []  # of each squeeze-excite, (B, D)
        for features in (
            [] if context is None else cast("list[GlobalContextFeatures]", context.query_features)
        ):
            sums = []
            for first, last in bands:
                top, bottom = max(first - halo, 0), min(last + halo, rows)
                wide = shifted.band(top, bottom)
                q, present = _query_map(block, x.read(wide.lines), wide.windows, modulation, means)
                own = slice((first - top) * shifted.window, (last - top) * shifted.window)
                sums.append(features.convolve(q, present)[1][:, own])  # (B, rows, D)
            means.append(torch.cat(sums, dim=1).sum(1) / len(shifted.windows.token_slot))

        above = x.read(())  # the rows of windows from `top` to `first`, as they were
        for first, last in bands:
            top, bottom = max(first - halo, 0), min(last + halo, rows)
            band = shifted.band(first, last)
            tokens = torch.cat((above, x.read(shifted.lines(first, bottom))), dim=1)
            windows, rotary = band.windows, band.rotary
            if context is not None:
                around = shifted.band(top, bottom).windows
                q = _query_map(block, tokens, around, modulation, means)[0]
                q = q[:, (first - top) * shifted.window : (last - top) * shifted.window]
                windows = windows._replace(global_queries=context.to_slots(q, windows, block.attn1.heads))
                del q, around  # the block's own memory comes on top of what is held here
            begin, end = above.shape[1], above.shape[1] + _count(band.lines)
            above = tokens[:, end - _count(shifted.lines(max(last - halo, 0), last)) : end].clone()
            tokens = tokens[:, begin:end].flatten(1, 2)
            x.write(band.lines, block(tokens, text, modulation, windows, rotary, mask))


def _query_map(
    block: LocalDiTBlock, tokens: Tensor, windows: Windows, modulation: Tensor, means: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The map of queries after as many features as there are means, (B, rows, w, D), and where a token is."""
    attn = cast(LocalDiTAttention, block.attn1)
    shift, scale, *_ = modulation.unbind()
    y = modulated_norm(block.norm1, tokens.flatten(1, 2), shift, scale)
    q = attn.queries(y.index_select(1, windows.slot_token), windows.rotary)
    context = cast(GlobalContext, attn.global_context)
    x, present = context.to_map(q, windows)
    for features, mean in zip(cast("list[GlobalContextFeatures]", context.query_features), means):
        x = features.excite_by(mean, x, features.convolve(x, present)[0])
    return x, present


def _count(lines: tuple[slice, ...]) -> int:
    return sum(part.stop - part.start for part in lines)
