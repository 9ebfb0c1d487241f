"""The Triton twin of `window_attention_reference`: one program for a tile of slots and one head.

A tile is one window, or as many whole windows as fit in 16 slots, the least that a tensor core multiplies.
With windows of 4 x 4 tokens one warp holds it all in registers: no barrier, no shared softmax, each token
read once and written once, wherever in the picture it stands. Heads are the fastest axis of the grid:
neighbours share 32-byte sectors of memory.

Products accumulate in float32, in which the softmax is too. Offsets of tokens are int64. Strides of tokens
that are multiples of 16 elements, as those of 16 heads are, make every access to them 16 bytes wide.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from localdit.kernels import interpreted
from localdit.kernels.window_attention import Attended

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, so that a row that sees nothing stays finite too. Such rows are never stored.
NEVER = tl.constexpr(-1e30)


@triton.jit
def _codes(slots_ptr, tile, count, SLOTS: tl.constexpr, TILE: tl.constexpr):
    """What the table says of the tile's slots, (TILE,); -1 for those that no window of the tile fills."""
    whole: tl.constexpr = TILE // SLOTS * SLOTS
    slot = tl.arange(0, TILE)
    index = tile * whole + slot
    return tl.load(slots_ptr + index, mask=(slot < whole) & (index < count), other=-1)


@triton.jit
def _load(ptr, rows, present, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Channels START .. START + WIDTH of the tile's tokens, zero beyond the head and for absent tokens."""
    column = START + tl.arange(0, WIDTH)
    mask = present[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    return tl.load(ptr + rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, x, rows, present, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    column = START + tl.arange(0, WIDTH)
    mask = present[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] + column[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies bfloat16 as if it were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # float32 stays float32, not TF32


@triton.jit
def _probabilities(
    q, q_tail, k, k_tail, codes, bias_ptr, head,
    HEAD_DIM: tl.constexpr, TAIL: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax of the tile's scores, (TILE, TILE) float32, in powers of two."""
    scores = _dot(q, tl.trans(k), UPCAST)
    if TAIL:
        scores += _dot(q_tail, tl.trans(k_tail), UPCAST)
    scores *= HEAD_DIM**-0.5 * LOG2E
    slot = tl.arange(0, TILE)
    if bias_ptr is not None:
        row, column = (slot % SLOTS)[:, None], (slot % SLOTS)[None, :]
        bias = tl.load(bias_ptr + (head * SLOTS + row) * SLOTS + column)
        scores += bias.to(tl.float32) * LOG2E
    part = slot // SLOTS * 4 + (codes & 3)  # window of the tile, region of the window
    seen = (codes >= 0)[None, :] & (part[:, None] == part[None, :])
    scores = tl.where(seen, scores, NEVER)
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, bias_ptr, q_token, k_token, v_token, codes, head,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile's outputs: their first MAIN channels, and the TAIL beyond (or the first, without one)."""
    present, token, first = codes >= 0, (codes >> 2).to(tl.int64), head * HEAD_DIM
    q_rows, k_rows, v_rows = token * q_token + first, token * k_token + first, token * v_token + first
    q = _load(q_ptr, q_rows, present, 0, MAIN, HEAD_DIM)
    k = _load(k_ptr, k_rows, present, 0, MAIN, HEAD_DIM)
    v = _load(v_ptr, v_rows, present, 0, MAIN, HEAD_DIM)
    q_tail, k_tail, v_tail = q, k, v
    if TAIL:
        q_tail = _load(q_ptr, q_rows, present, MAIN, TAIL, HEAD_DIM)
        k_tail = _load(k_ptr, k_rows, present, MAIN, TAIL, HEAD_DIM)
        v_tail = _load(v_ptr, v_rows, present, MAIN, TAIL, HEAD_DIM)
    p = _probabilities(q, q_tail, k, k_tail, codes, bias_ptr, head, HEAD_DIM, TAIL, SLOTS, TILE, UPCAST)
    p = p.to(v.dtype)
    out = _dot(p, v, UPCAST)
    out_tail = out
    if TAIL:
        out_tail = _dot(p, v_tail, UPCAST)
    return out, out_tail


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, q2_ptr, k2_ptr, v2_ptr, bias2_ptr, slots_ptr, out_ptr,
    q_batch, q_token, k_batch, k_token, v_batch, v_token,
    q2_batch, q2_token, k2_batch, k2_token, v2_batch, v2_token, out_batch, out_token, count,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of one head of one sample. Without a second attention its pointers are None.

    `*_batch` and `*_token` are strides in elements; a token's heads follow each other. `count` is G * S.
    """
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch = tl.program_id(1).to(tl.int64)
    codes = _codes(slots_ptr, tile, count, SLOTS, TILE)
    out, out_tail = _attend(
        q_ptr + batch * q_batch, k_ptr + batch * k_batch, v_ptr + batch * v_batch, bias_ptr,
        q_token, k_token, v_token, codes, head, HEAD_DIM, MAIN, TAIL, SLOTS, TILE, UPCAST,
    )  # fmt: skip
    if q2_ptr is not None:
        second, second_tail = _attend(
            q2_ptr + batch * q2_batch, k2_ptr + batch * k2_batch, v2_ptr + batch * v2_batch, bias2_ptr,
            q2_token, k2_token, v2_token, codes, head, HEAD_DIM, MAIN, TAIL, SLOTS, TILE, UPCAST,
        )  # fmt: skip
        out, out_tail = (out + second) * 0.5, (out_tail + second_tail) * 0.5
    present = codes >= 0
    rows = (codes >> 2).to(tl.int64) * out_token + head * HEAD_DIM
    _store(out_ptr + batch * out_batch, out, rows, present, 0, MAIN, HEAD_DIM)
    if TAIL:
        _store(out_ptr + batch * out_batch, out_tail, rows, present, MAIN, TAIL, HEAD_DIM)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, slots_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, grad_batch, grad_token, out_batch, out_token,
    count, weight,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of `weight` times one attention's output, for one tile of one head of one sample.

    Windows do not overlap, so every row has one writer. The bias, which all windows share, gets each
    program's part, (B, tiles, HEADS, TILE, TILE), to be summed in a fixed order: nothing here is atomic.
    """
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    batch = tl.program_id(1).to(tl.int64)
    q_ptr, k_ptr, v_ptr = q_ptr + batch * q_batch, k_ptr + batch * k_batch, v_ptr + batch * v_batch
    codes = _codes(slots_ptr, tile, count, SLOTS, TILE)
    present, token, first = codes >= 0, (codes >> 2).to(tl.int64), head * HEAD_DIM
    q_rows, k_rows, v_rows = token * q_token + first, token * k_token + first, token * v_token + first
    grad_rows = batch * grad_batch + token * grad_token + first
    q = _load(q_ptr, q_rows, present, 0, MAIN, HEAD_DIM)
    k = _load(k_ptr, k_rows, present, 0, MAIN, HEAD_DIM)
    v = _load(v_ptr, v_rows, present, 0, MAIN, HEAD_DIM)
    grad = _load(grad_ptr, grad_rows, present, 0, MAIN, HEAD_DIM)
    q_tail, k_tail, v_tail, grad_tail = q, k, v, grad
    if TAIL:
        q_tail = _load(q_ptr, q_rows, present, MAIN, TAIL, HEAD_DIM)
        k_tail = _load(k_ptr, k_rows, present, MAIN, TAIL, HEAD_DIM)
        v_tail = _load(v_ptr, v_rows, present, MAIN, TAIL, HEAD_DIM)
        grad_tail = _load(grad_ptr, grad_rows, present, MAIN, TAIL, HEAD_DIM)

    p = _probabilities(q, q_tail, k, k_tail, codes, bias_ptr, head, HEAD_DIM, TAIL, SLOTS, TILE, UPCAST)
    dp = _dot(grad, tl.trans(v), UPCAST)
    if TAIL:
        dp += _dot(grad_tail, tl.trans(v_tail), UPCAST)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * weight
    if dbias_ptr is not None:
        slot = tl.arange(0, TILE)
        program = batch * tl.num_programs(0) + tl.program_id(0)
        tl.store(dbias_ptr + (program * TILE + slot[:, None]) * TILE + slot[None, :], ds)

    p = tl.trans((p * weight).to(v.dtype))
    ds = (ds * HEAD_DIM**-0.5).to(v.dtype)
    rows = batch * out_batch + token * out_token + first
    _store(dv_ptr, _dot(p, grad, UPCAST), rows, present, 0, MAIN, HEAD_DIM)
    _store(dq_ptr, _dot(ds, k, UPCAST), rows, present, 0, MAIN, HEAD_DIM)
    _store(dk_ptr, _dot(tl.trans(ds), q, UPCAST), rows, present, 0, MAIN, HEAD_DIM)
    if TAIL:
        _store(dv_ptr, _dot(p, grad_tail, UPCAST), rows, present, MAIN, TAIL, HEAD_DIM)
        _store(dq_ptr, _dot(ds, k_tail, UPCAST), rows, present, MAIN, TAIL, HEAD_DIM)
        _store(dk_ptr, _dot(tl.trans(ds), q_tail, UPCAST), rows, present, MAIN, TAIL, HEAD_DIM)


def constants(heads: int, head_dim: int, slots: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a variant of the kernels is compiled for: its constants, and the warps of a program."""
    tile = max(16, triton.next_power_of_2(slots))
    # 72 = 64 + 8: one tile of 64 channels, one of 16 that is half empty, where a tile of 128 would be.
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0,
        "SLOTS": slots,
        "TILE": tile,
        "UPCAST": dtype == torch.bfloat16 and interpreted(),
        # Without tensor cores, and twice as wide: one warp would spill. (In windows of 8 x 8, eight do too.)
        "num_warps": min(tile // 4, 8) if dtype == torch.float32 else tile // 16,
    }


def launch_grid(q: Tensor, slots: Tensor, tile: int) -> tuple[int, int]:
    """Heads times tiles, then the batch."""
    return q.shape[2] * triton.cdiv(len(slots), tile // slots.shape[1]), len(q)


def _aligned(x: Tensor) -> Tensor:
    """x, (B, N, A, d), copied where its heads do not follow each other. Views of packed projections do."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


@custom_op("localdit::window_attention", mutates_args=())
def _forward(
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q2: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    bias2: Tensor | None,
) -> Tensor:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    second = [None if x is None else _aligned(x) for x in (q2, k2, v2)]
    out = q.new_empty(q.shape)
    fixed = constants(q.shape[2], q.shape[3], slots.shape[1], q.dtype)
    with torch.cuda.device_of(q):
        forward_kernel[launch_grid(q, slots, fixed["TILE"])](
            q, k, v, bias, *second, bias2, slots, out,
            *_strides(q, k, v, *second, out), slots.numel(), **fixed,
        )  # fmt: skip
    return out


@_forward.register_fake
def _(slots: Tensor, q: Tensor, *rest: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("localdit::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    weight: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, (B, N, A, d), and of the bias, (A, S, S), or (0,) where nobody asks."""
    grad, q, k, v = _aligned(grad), _aligned(q), _aligned(k), _aligned(v)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    heads, size = q.shape[2], slots.shape[1]
    fixed = constants(heads, q.shape[3], size, q.dtype)
    tile = fixed["TILE"]
    grid = launch_grid(q, slots, tile)
    parts = None
    if bias_gradient:
        parts = q.new_empty((grid[0] * grid[1] // heads, heads, tile, tile), dtype=torch.float32)
    with torch.cuda.device_of(q):
        backward_kernel[grid](
            q, k, v, bias, grad, slots, dq, dk, dv, parts,
            *_strides(q, k, v, grad, dq), slots.numel(), weight, **fixed,
        )  # fmt: skip
    if parts is None or bias is None:
        return dq, dk, dv, q.new_empty(0)
    # Each window of a tile has its scores on the diagonal.
    whole = tile // size * size
    parts = parts.sum(0)[:, :whole, :whole].unflatten(2, (-1, size)).unflatten(1, (-1, size))
    dbias = parts.diagonal(dim1=1, dim2=3).sum(-1)  # (A, S, S)
    return dq, dk, dv, dbias.to(bias.dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    weight: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0) if bias is None or not bias_gradient else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), dbias


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    slots, *rest = ctx.saved_tensors
    attentions = [rest[:4]] if rest[4] is None else [rest[:4], rest[4:]]
    gradients: list[Tensor | None] = []
    for index, (q, k, v, bias) in enumerate(attentions):
        wanted = ctx.needs_input_grad[4 * index + 4]
        *inputs, dbias = _backward(grad, slots, q, k, v, bias, 1 / len(attentions), wanted)
        gradients += [*inputs, dbias if wanted else None]
    return None, *gradients, *[None] * (8 - len(gradients))


_forward.register_autograd(_differentiate, setup_context=_save)


def window_attention_triton(slots: Tensor, local: Attended, context: Attended | None = None) -> Tensor:
    """`window_attention_reference`, except that tokens that stand in no slot are not written."""

    def plain(attended: Attended) -> list[Tensor | None]:
        q, k, v, bias = attended
        # Autocast leaves normalised queries and keys in float32.
        return [q.to(v.dtype), k.to(v.dtype), v, None if bias is None else bias.contiguous()]

    second: list[Tensor | None] = [None] * 4 if context is None else plain(context)
    return _forward(slots, *plain(local), *second)
