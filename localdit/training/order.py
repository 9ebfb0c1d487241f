"""Which samples make which optimizer step, and each sample's random numbers: functions of the seed alone.

Neither depends on how many processes, gradient accumulations or data workers share the work, nor on where a
run was taken up again: sample number p of a run (its *position*, counted from 0 over all steps) is the same
picture with the same crop, caption, noise and timestep everywhere.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

# B batch


class Order:
    """The endless order of a training set, in batches whose samples share a group (pictures of one size).

    Each group is shuffled anew each time it has been gone through, and its batches run on over the seam: no
    sample is left out or seen more often than another. Which group comes next is shuffled too, within a pass
    over the whole set.

    Args:
        groups: The group of each sample, (n,), from 0; None if all may stand together.
        count: n.
        batch: Samples of an optimizer step, over all processes.
        seed: Another seed, another order.
        shards: The shard that holds each sample, (n,). Where given, shards are shuffled, and samples only
            among `window` shards that follow each other, so that few shards are open at a time.
        window: In shards.

    Raises:
        ValueError: There is no sample.
    """

    def __init__(
        self,
        groups: NDArray[np.integer] | None,
        count: int,
        batch: int,
        seed: int,
        shards: NDArray[np.integer] | None = None,
        window: int = 8,
    ):
        _refuse_empty(count)
        self.batch, self.seed, self.shards, self.window = batch, seed, shards, window
        if groups is None:
            self.members = [np.arange(count)]
        else:
            self.members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self.sizes = [len(members) for members in self.members]
        self._permutation = lru_cache(maxsize=2 * len(self.members))(self._permute)

    def step(self, step: int) -> list[tuple[int, int]]:
        """The samples of an optimizer step, from 0: (index, position) of each."""
        group, number = self._batch_of(step)
        size = self.sizes[group]
        first = number * self.batch
        indices = []
        for place in range(first, first + self.batch):
            turn, offset = divmod(place, size)
            indices.append(int(self._permutation(group, turn)[offset]))
        return [(index, step * self.batch + j) for j, index in enumerate(indices)]

    def _batch_of(self, step: int) -> tuple[int, int]:
        """The group of a step, and how many batches of that group came before."""
        if len(self.members) == 1:
            return 0, step
        low, high = 0, 1  # the pass that holds the step: the last one with no more batches before it
        while self._batches_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= step else (low, middle)
        groups = self._schedule(low)
        place = step - self._batches_before(low)
        group = int(groups[place])
        return group, low * self.sizes[group] // self.batch + int((groups[:place] == group).sum())

    def _batches_before(self, turn: int) -> int:
        """Full batches in the passes before this one, over all groups."""
        return sum(turn * size // self.batch for size in self.sizes)

    def _schedule(self, turn: int) -> NDArray[np.integer]:
        """The groups of a pass's batches, in their order."""
        counts = [(turn + 1) * size // self.batch - turn * size // self.batch for size in self.sizes]
        groups = np.repeat(np.arange(len(counts)), counts)
        return _random(self.seed, turn).permutation(groups)

    def _permute(self, group: int, turn: int) -> NDArray[np.integer]:
        members, random = self.members[group], _random(self.seed, group, turn)
        shuffled = random.permutation(members)
        if self.shards is None:
            return shuffled
        rank = _random(self.seed, turn).permutation(int(self.shards.max()) + 1)  # the same for all groups
        return shuffled[np.argsort(rank[self.shards[shuffled]] // self.window, kind="stable")]


class Resampled:
    """An endless order in which every sample of a batch is drawn anew from all, with replacement.

    A batch's group is drawn by the number of its samples. So every sample is as likely as any other, whatever
    its group and its shard.

    Args:
        groups, count, batch, seed: As of `Order`.
        shards: The shard that holds each sample, (n,). Where given, `window` shards are drawn, by the number
            of their samples; batches come from these until as many samples were taken as they hold on
            average, then others are drawn. Only a group of which they hold less than a batch comes from all.
        window: In shards.

    Raises:
        ValueError: There is no sample.
    """

    def __init__(
        self,
        groups: NDArray[np.integer] | None,
        count: int,
        batch: int,
        seed: int,
        shards: NDArray[np.integer] | None = None,
        window: int = 8,
    ):
        _refuse_empty(count)
        self.batch, self.seed, self.window = batch, seed, window
        group, shard = (
            np.zeros(count, dtype=np.int64) if of is None else np.unique(of, return_inverse=True)[1]
            for of in (groups, shards)
        )
        self.order = np.lexsort((group, shard))  # by shard, and in each by group
        sizes = shard.max() + 1, group.max() + 1
        self.counts = np.bincount(shard * sizes[1] + group, minlength=sizes[0] * sizes[1]).reshape(sizes)
        self.starts = (self.counts.cumsum() - self.counts.ravel()).reshape(sizes)  # in the order
        self.ends = self.counts.sum(1).cumsum()  # of the shards, in the order
        self.rare = window * self.counts.mean(0) < batch  # of each group: a window holds less than a batch
        self.samples_of_window = max(1, window * count // sizes[0])

    def step(self, step: int) -> list[tuple[int, int]]:
        """The samples of an optimizer step, from 0: (index, position) of each."""
        random, first = _random(self.seed, step, 1), step * self.batch
        window = self._window(first // self.samples_of_window)
        held = self.counts[window]
        odds = held / held.sum(1, keepdims=True)  # of each group in each shard of the window
        group = random.choice(odds.shape[1], p=odds.mean(0))
        shards, likely = window, odds[:, group]
        if self.rare[group]:
            shards, likely = np.arange(len(self.counts)), self.counts[:, group]
        drawn = random.choice(shards, self.batch, p=likely / likely.sum())
        places = self.starts[drawn, group] + random.integers(self.counts[drawn, group])
        return [(int(index), first + j) for j, index in enumerate(self.order[places])]

    def _window(self, number: int) -> NDArray[np.integer]:
        """The shards of a window, from 0; a large one may be there more than once."""
        places = _random(self.seed, number, 2).integers(len(self.order), size=self.window)
        return np.searchsorted(self.ends, places, side="right")


class ProcessBatches(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, for a data loader: lists of (index, position).

    Args:
        order: The order of the whole run, whose `batch` is size x world x accumulation.
        steps: The optimizer steps to go through.
        size: Samples of a micro-batch.
        rank, world: This process, and how many there are.
    """

    def __init__(self, order: Order | Resampled, steps: range, size: int, rank: int, world: int):
        self.order, self.steps, self.size, self.rank, self.world = order, steps, size, rank, world

    def __len__(self) -> int:
        return len(self.steps) * self.order.batch // (self.size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            samples = self.order.step(step)
            for start in range(self.rank * self.size, len(samples), self.world * self.size):
                yield samples[start : start + self.size]


class Draws:
    """Random numbers for the samples of a batch: each sample's depend on the seed and its position alone.

    They are drawn on the CPU, so that they are the same on every device.

    Attributes:
        step: The optimizer step that they are for, from 0: what a run changes on its way goes by it.
    """

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device, step: int = 0):
        self.device, self.step, self._seed = device, step, seed
        self.generators = [torch.Generator().manual_seed(self.seed(seed, position)) for position in positions]

    @staticmethod
    def seed(*words: int) -> int:
        """A seed for PyTorch, scattered evenly however alike the words are."""
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)

    def of_step(self) -> float:
        """A uniform number in [0, 1) that all samples of the step share, whichever process has them."""
        generator = torch.Generator().manual_seed(self.seed(self._seed, self.step, 0))
        return torch.rand((), generator=generator).item()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)


def _refuse_empty(count: int) -> None:
    if count < 1:
        raise ValueError("the training set is empty")


def _random(*words: int) -> np.random.Generator:
    return np.random.default_rng(words)
