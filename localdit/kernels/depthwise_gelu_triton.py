"""The Triton twin of `depthwise_gelu_reference`: one program for a tile of the map and some channels.

A program goes down its columns row by row. It reads each row three times, a column to the left, in place and
to the right (all but the first out of the cache), and adds it to the three rows of results that need it: a
result is complete when the row below has been read. Sums are one line per tile, added up afterwards in order:
nothing is atomic.

Arithmetic is float32. Offsets of rows and samples are int64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op


@triton.jit
def _line(table_ptr, index, length):
    """A line's entry in one of the tables of `encode_lines`; -1 beyond the map's edges."""
    return tl.load(table_ptr + index, mask=(index >= 0) & (index < length), other=-1)


@triton.jit
def _read(ptr, row, column, channel, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """A row of tokens, (COLUMNS, CHANNELS) in float32, zero where there are none."""
    inside = (row >= 0) & (column >= 0)[:, None]
    if DIM % CHANNELS:
        inside = inside & (channel < DIM)[None, :]
    start = ptr + row.to(tl.int64) * DIM
    return tl.load(start + (column * DIM)[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(ptr, x, row, column, channel, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    inside = (row >= 0) & (column >= 0)[:, None]
    if DIM % CHANNELS:
        inside = inside & (channel < DIM)[None, :]
    start = ptr + row.to(tl.int64) * DIM
    tl.store(start + (column * DIM)[:, None] + channel[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tap(taps_ptr, index, channel, DIM: tl.constexpr):
    return tl.load(taps_ptr + index * DIM + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normal(u):
    """The normal distribution's cumulative function and density at u, both to 1e-7.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.2.17. With a library's erf, which computes
    the exponential once more, the loops below are a third longer.
    """
    d = 1 + 0.2316419 * tl.abs(u)
    t = tl.rsqrt(d * d)  # a quotient costs twice as much
    poly = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * u * u)
    tail = density * poly
    return tl.where(u < 0, tail, 1 - tail), density


@triton.jit
def convolve_kernel(
    rows_ptr, columns_ptr, x_ptr, taps_ptr, out_ptr, sums_ptr, grad_ptr, grad_sums_ptr,
    height, across, tokens,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS of the map, of one sample. What of the convolution u is written:

    with `sums_ptr`, GELU(u), and its sum over the tile, (B, tiles, D);
    with `grad_ptr`, the gradient at u, made of that at GELU(u), and of that at its sums, (B, D);
    with neither, u itself, of taps in reverse order: the gradient at x, if x is that at u.
    """
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    tile = tl.program_id(0) // blocks
    strips = tl.cdiv(across, COLUMNS)
    first, batch = tile // strips * ROWS, tl.program_id(1).to(tl.int64)
    column = tile % strips * COLUMNS + tl.arange(0, COLUMNS)
    left = _line(columns_ptr, column - 1, across)
    here = _line(columns_ptr, column, across)
    right = _line(columns_ptr, column + 1, across)
    x_ptr += batch * tokens * DIM
    out_ptr += batch * tokens * DIM
    reverse: tl.constexpr = sums_ptr is None and grad_ptr is None
    start: tl.constexpr = 8 if reverse else 0
    step: tl.constexpr = -1 if reverse else 1
    above_left = _tap(taps_ptr, start, channel, DIM)
    above = _tap(taps_ptr, start + step, channel, DIM)
    above_right = _tap(taps_ptr, start + 2 * step, channel, DIM)
    own_left = _tap(taps_ptr, start + 3 * step, channel, DIM)
    own = _tap(taps_ptr, start + 4 * step, channel, DIM)
    own_right = _tap(taps_ptr, start + 5 * step, channel, DIM)
    below_left = _tap(taps_ptr, start + 6 * step, channel, DIM)
    below = _tap(taps_ptr, start + 7 * step, channel, DIM)
    below_right = _tap(taps_ptr, start + 8 * step, channel, DIM)
    if grad_ptr is not None:
        grad_ptr += batch * tokens * DIM
        grad_sums = tl.load(grad_sums_ptr + batch * DIM + channel, mask=channel < DIM, other=0.0)[None, :]

    row = _line(rows_ptr, first - 1, height)
    a = _read(x_ptr, row, left, channel, DIM, CHANNELS)
    b = _read(x_ptr, row, here, channel, DIM, CHANNELS)
    c = _read(x_ptr, row, right, channel, DIM, CHANNELS)
    u = a * above_left + b * above + c * above_right
    row = _line(rows_ptr, first, height)
    a = _read(x_ptr, row, left, channel, DIM, CHANNELS)
    b = _read(x_ptr, row, here, channel, DIM, CHANNELS)
    c = _read(x_ptr, row, right, channel, DIM, CHANNELS)
    u = u + a * own_left + b * own + c * own_right
    next_u = a * above_left + b * above + c * above_right
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for index in range(ROWS):
        next_row = _line(rows_ptr, first + index + 1, height)
        a = _read(x_ptr, next_row, left, channel, DIM, CHANNELS)
        b = _read(x_ptr, next_row, here, channel, DIM, CHANNELS)
        c = _read(x_ptr, next_row, right, channel, DIM, CHANNELS)
        u = u + a * below_left + b * below + c * below_right
        if sums_ptr is not None:
            u *= _normal(u)[0]
            total += tl.where((row >= 0) & (here >= 0)[:, None], u, 0.0)
        if grad_ptr is not None:
            grad = _read(grad_ptr, row, here, channel, DIM, CHANNELS) + grad_sums
            cumulative, density = _normal(u)
            u = grad * (cumulative + u * density)
        _write(out_ptr, u, row, here, channel, DIM, CHANNELS)
        u = next_u + a * own_left + b * own + c * own_right
        next_u = a * above_left + b * above + c * above_right
        row = next_row
    if sums_ptr is not None:
        sums = tl.sum(total, 0)
        line = batch * (tl.num_programs(0) // blocks) + tile
        tl.store(sums_ptr + line * DIM + channel, sums, mask=channel < DIM)


@triton.jit
def _write_tap(parts_ptr, index, x, channel, DIM: tl.constexpr):
    tl.store(parts_ptr + index * DIM + channel, tl.sum(x, 0), mask=channel < DIM)


@triton.jit
def weight_kernel(
    rows_ptr, columns_ptr, x_ptr, grad_ptr, parts_ptr, height, across, tokens,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The taps' gradients from a tile of x and the gradient at the convolution, (B, tiles, 9, D)."""
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    tile = tl.program_id(0) // blocks
    strips = tl.cdiv(across, COLUMNS)
    first, batch = tile // strips * ROWS, tl.program_id(1).to(tl.int64)
    column = tile % strips * COLUMNS + tl.arange(0, COLUMNS)
    left = _line(columns_ptr, column - 1, across)
    here = _line(columns_ptr, column, across)
    right = _line(columns_ptr, column + 1, across)
    x_ptr += batch * tokens * DIM
    grad_ptr += batch * tokens * DIM
    above_left = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    above = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    above_right = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    own_left = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    own = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    own_right = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    below_left = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    below = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    below_right = tl.zeros((COLUMNS, CHANNELS), tl.float32)

    row = _line(rows_ptr, first - 1, height)
    grad_above = _read(grad_ptr, row, here, channel, DIM, CHANNELS)
    row = _line(rows_ptr, first, height)
    grad = _read(grad_ptr, row, here, channel, DIM, CHANNELS)
    for index in range(ROWS):
        next_row = _line(rows_ptr, first + index + 1, height)
        grad_below = _read(grad_ptr, next_row, here, channel, DIM, CHANNELS)
        # A row of x is the row above to the results below it, and the other way round.
        x = _read(x_ptr, row, left, channel, DIM, CHANNELS)
        above_left += x * grad_below
        own_left += x * grad
        below_left += x * grad_above
        x = _read(x_ptr, row, here, channel, DIM, CHANNELS)
        above += x * grad_below
        own += x * grad
        below += x * grad_above
        x = _read(x_ptr, row, right, channel, DIM, CHANNELS)
        above_right += x * grad_below
        own_right += x * grad
        below_right += x * grad_above
        grad_above, grad, row = grad, grad_below, next_row

    parts_ptr += (batch * (tl.num_programs(0) // blocks) + tile) * 9 * DIM
    _write_tap(parts_ptr, 0, above_left, channel, DIM)
    _write_tap(parts_ptr, 1, above, channel, DIM)
    _write_tap(parts_ptr, 2, above_right, channel, DIM)
    _write_tap(parts_ptr, 3, own_left, channel, DIM)
    _write_tap(parts_ptr, 4, own, channel, DIM)
    _write_tap(parts_ptr, 5, own_right, channel, DIM)
    _write_tap(parts_ptr, 6, below_left, channel, DIM)
    _write_tap(parts_ptr, 7, below, channel, DIM)
    _write_tap(parts_ptr, 8, below_right, channel, DIM)


# Each thread gets four channels of one token: with eight, its taps alone would take 72 registers.
COLUMNS, CHANNELS, WARPS = 16, 64, 8
MOST_ROWS = {convolve_kernel: 8, weight_kernel: 16}  # of a tile; two (one) more are read


def constants(kernel: Any, dim: int, height: int) -> dict[str, int]:
    """What a kernel is compiled for at so many channels and rows of the map, and the warps of a program."""
    rows = min(MOST_ROWS[kernel], triton.next_power_of_2(height))
    return {"DIM": dim, "ROWS": rows, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS, "num_warps": WARPS}


def tiles(kernel: Any, rows: Tensor, columns: Tensor) -> int:
    """How many tiles cover the map."""
    height = len(rows)
    return triton.cdiv(height, constants(kernel, 0, height)["ROWS"]) * triton.cdiv(len(columns), COLUMNS)


def _launch(kernel: Any, rows: Tensor, columns: Tensor, x: Tensor, *rest: Tensor | None) -> None:
    batch, tokens, dim = x.shape
    grid = (triton.cdiv(dim, CHANNELS) * tiles(kernel, rows, columns), batch)
    sizes = len(rows), len(columns), tokens
    with torch.cuda.device_of(x):
        kernel[grid](rows, columns, x, *rest, *sizes, **constants(kernel, dim, len(rows)))


def _taps(weight: Tensor) -> Tensor:
    """(D, 1, 3, 3) -> (9, D), so that a tap's channels follow each other."""
    return weight.flatten(1).t().contiguous()


@custom_op("localdit::depthwise_gelu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    parts = x.new_empty((len(x), tiles(convolve_kernel, rows, columns), x.shape[2]), dtype=torch.float32)
    _launch(convolve_kernel, rows, columns, x, _taps(weight), out, parts, None, None)
    return out, parts.sum(1)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((len(x), x.shape[2]), dtype=torch.float32)


@custom_op("localdit::depthwise_gelu_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_sums: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the weight, which is empty where nobody asks."""
    x, taps = x.contiguous(), _taps(weight)
    convolved, dx = torch.empty_like(x), torch.empty_like(x)
    # Computed again: the convolution's output is not kept.
    _launch(
        convolve_kernel, rows, columns, x, taps, convolved, None, grad.contiguous(), grad_sums.contiguous()
    )
    _launch(convolve_kernel, rows, columns, convolved, taps, dx, None, None, None)
    if not weight_gradient:
        return dx, weight.new_empty(0)
    shape = (len(x), tiles(weight_kernel, rows, columns), 9, x.shape[2])
    parts = x.new_empty(shape, dtype=torch.float32)
    _launch(weight_kernel, rows, columns, x, convolved, parts)
    dweight = parts.sum((0, 1)).t().contiguous()
    return dx, dweight.view(weight.shape).to(weight.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    grad_sums: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_gradient else 0)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[1]
    dx, dweight = _backward(grad, grad_sums, *ctx.saved_tensors, wanted)
    return dx, dweight if wanted else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def depthwise_gelu_triton(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`depthwise_gelu_reference`. Where autocast would convolve in 16 bits, x is cast to those."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _forward(x, weight, rows, columns)
