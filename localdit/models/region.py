"""Computing a part of an image alone: which tokens of each block it depends on, and the tables that say so.

Where attention is local, a token hears of its surroundings alone, a few tokens further with each block: what
is predicted for some tokens depends on a cone of them, which widens from the last block back to the first.
Outside the cone nothing needs to be computed, and inside it every number is what it is in the whole image.

Functions of tables. `plan_region` of `local_dit.py` says what they are made of, `forward` there uses them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from localdit.kernels.window_attention import encode_slots

if TYPE_CHECKING:
    from localdit.models.local_dit import Windows

# h w token grid   N = h*w tokens   n tokens of the region   G windows   S tokens per window   M = G*S slots


class RegionBlock(NamedTuple):
    """What one block reads: n tokens, in raster order, of those that the block before it read."""

    keep: Tensor | None  # (n,) their places among those; None where they are all of them
    windows: "Windows"  # of these tokens: it counts them from 0 to n-1
    rotary: Tensor | None  # (n, d/2, 2)


class Region(NamedTuple):
    """The part of an image that is computed: always less than all of it."""

    blocks: tuple[RegionBlock, ...]
    tokens: Tensor  # (n,) raster indices of the tokens that the last block reads, and the model predicts
    grid: tuple[int, int]  # of the whole image

    @property
    def share(self) -> float:
        """Of the tokens of all blocks, those that are computed."""
        computed = sum(len(block.windows.token_slot) for block in self.blocks)
        return computed / (len(self.blocks) * self.grid[0] * self.grid[1])


class Layout(NamedTuple):
    """What a block's attention reads."""

    windows: "Windows"
    is_global: bool  # every token depends on all: full attention, or a mean over the image
    is_map: bool  # its windows must be a rectangle, as convolutions run over them


def build_region(
    tokens: Tensor, layouts: Sequence[Layout], rotary: Tensor | None, halo: int | None
) -> Region | None:
    """The tables for `tokens`, (h, w) bool; None where all must be computed.

    Args:
        tokens: Those to predict.
        layouts: Of the blocks, from the first to the last.
        rotary: The rotary table of the whole image, (N, d/2, 2), in raster order.
        halo: No token further than so many tokens from those to predict is computed. None: no such bound.
    """
    within = torch.ones_like(tokens) if halo is None else dilate(tokens, halo)
    cone = [part & within.flatten() for part in find_cone(tokens.flatten(), layouts)]
    if cone[-1].all():
        return None
    blocks = []
    before = torch.ones_like(cone[0])
    for part, layout in zip(cone, layouts):
        index = part.nonzero()[:, 0]  # (n,)
        place = before.cumsum(0) - 1
        blocks.append(
            RegionBlock(
                keep=None if part.equal(before) else place[index],
                windows=restrict(layout.windows, part, layout.is_map),
                rotary=None if rotary is None else rotary[index],
            )
        )
        before = part
    return Region(tuple(blocks), index, (tokens.shape[0], tokens.shape[1]))


def find_cone(tokens: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """The tokens that each block must read, (N,) bool each, so that the last block's `tokens` come out right.

    A token needs those that it sees in its window, they need what they see in the block before, and so on.
    """
    cone = []
    for layout in reversed(layouts):
        tokens = torch.ones_like(tokens) if layout.is_global else seen_from(tokens, layout.windows)
        cone.append(tokens)
    return cone[::-1]


def seen_from(tokens: Tensor, windows: "Windows") -> Tensor:
    """The tokens, (N,) bool, that any of `tokens`, (N,) bool, attends to; each sees itself."""
    looking = _slots(tokens, windows).view(len(windows.attend), -1, 1)  # (G, S, 1)
    seen = (windows.attend[:, 0] & looking).any(dim=1)  # (G, S)
    return seen.flatten()[windows.token_slot]


def dilate(tokens: Tensor, reach: int) -> Tensor:
    """All within `reach` rows and columns of one of `tokens`, (h, w) bool. Returns (h, w) bool."""
    x = tokens.float()[None]
    for size in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        x = F.max_pool2d(x, size, stride=1, padding=(size[0] // 2, size[1] // 2))
    return x[0] > 0


def restrict(windows: "Windows", tokens: Tensor, is_map: bool) -> "Windows":
    """The windows that hold one of `tokens`, (N,) bool, alone; other tokens are absent from them.

    Args:
        windows: Of the whole image.
        tokens: To be counted from 0, in raster order.
        is_map: Make the windows a rectangle, as convolutions want them: some then hold no token at all.
    """
    slots = _slots(tokens, windows).view(len(windows.attend), -1)  # (G, S)
    chosen = slots.any(dim=1)  # (G,)
    grid = 1, int(chosen.sum())
    if is_map:
        needed = chosen.view(windows.grid)
        rows, columns = _apart(needed.any(dim=1)), _apart(needed.any(dim=0))
        chosen = (rows[:, None] & columns).flatten()
        grid = int(rows.sum()), int(columns.sum())

    def of_slots(x: Tensor) -> Tensor:  # (M, ...) -> those of the chosen windows
        return x.unflatten(0, slots.shape)[chosen].flatten(0, 1)

    place = tokens.cumsum(0) - 1  # (N,)
    window, within = windows.token_slot[tokens] // slots.shape[1], windows.token_slot[tokens] % slots.shape[1]
    itself = torch.eye(slots.shape[1], dtype=torch.bool, device=tokens.device)
    present, place_of_slots = (
        slots[chosen],
        of_slots(torch.where(slots.flatten(), place[windows.slot_token], 0)),
    )
    # Every field: what is added to `Windows` must be restricted as well.
    return windows._replace(
        slot_token=place_of_slots,
        token_slot=(chosen.cumsum(0) - 1)[window] * slots.shape[1] + within,
        present=None if present.all() else present.view(-1, 1),
        attend=((windows.attend[:, 0] & slots[:, None]) | itself)[chosen][:, None],
        rotary=None if windows.rotary is None else of_slots(windows.rotary),
        grid=grid,
        lines=None,
        slots=encode_slots(place_of_slots.view_as(present), windows.slots[chosen] & 3, present),
    )


def _slots(tokens: Tensor, windows: "Windows") -> Tensor:
    """Which slots hold one of `tokens`: (M,) bool."""
    slots = tokens[windows.slot_token]
    return slots if windows.present is None else slots & windows.present[:, 0]


def _apart(needed: Tensor) -> Tensor:
    """The lines `needed`, (n,) bool, and one after each run of them but the last: without it, a convolution
    would see the next run beside this one."""
    later = needed.flip(0).cumsum(0).flip(0) > 0
    after = F.pad(needed[:-1], (1, 0))
    return needed | (after & later)
