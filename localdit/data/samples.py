"""What a training set is to the loop, wherever its samples come from."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate


class Samples(Dataset[dict[str, Any]]):
    """A training set: `samples[index, position]` is a dictionary of tensors and texts, without a batch axis.

    `position` is the sample's place in the endless order of a run. Whatever is random about a sample (its
    crop, its caption) depends on the seed and the position alone; nothing else may change between two
    readings. A sample that cannot be used raises `localdit.data.images.BadSample`.
    """

    # The group of each sample, (n,): those of a batch share one. None: any may stand together.
    groups: NDArray[np.integer] | None = None
    # The shard that holds each sample, (n,), where reading from few at a time is faster. None: no matter.
    shards: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a person calls sample `index`."""
        return str(index)

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples of one group as a batch."""
        return default_collate(items)


class Part(Samples):
    """Some of a training set's samples."""

    def __init__(self, whole: Samples, indices: NDArray[np.integer]):
        self.whole, self.indices = whole, indices
        self.groups = None if whole.groups is None else whole.groups[indices]
        self.shards = None if whole.shards is None else whole.shards[indices]
        self.collate = whole.collate  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        return self.whole[int(self.indices[index]), position]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))


def split(whole: Samples, apart: int) -> tuple[Samples, Samples]:
    """Keep so many samples apart, always the same ones. Returns the others, and these.

    Raises:
        ValueError: None would be left.
    """
    if apart >= len(whole):
        raise ValueError(f"{apart} samples cannot be kept apart: there are {len(whole)}")
    shuffled = np.random.default_rng(0).permutation(len(whole))
    return Part(whole, np.sort(shuffled[apart:])), Part(whole, np.sort(shuffled[:apart]))
