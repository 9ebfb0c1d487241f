"""Pictures and captions straight from a source, for a training on pixels, or one that encodes as it goes."""

import random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from localdit.data.buckets import bucket_sizes, fit, nearest_buckets
from localdit.data.images import decode_image
from localdit.data.samples import Samples
from localdit.data.sources import Source


class Pixels(Samples):
    """A source's pictures, resized and cropped to their buckets, each with one of its captions.

    `pixels[index, position]` is {"pixels": (3, H, W) uint8, "caption": str}. Where the crop lies, whether the
    picture is mirrored and which caption is taken follow from seed and position.

    Args:
        source: Of captioned pictures.
        resolution: A picture goes to the bucket of about resolution² pixels that is nearest in ratio.
        flips: Mirror every other picture.
        seed: Of crops, flips and captions.
        square: Crop the square in the middle of every picture, and no other.
    """

    def __init__(
        self, source: Source, resolution: int, flips: bool = False, seed: int = 0, square: bool = False
    ):
        self.source, self.flips, self.seed, self.square = source, flips, seed, square
        self.buckets = bucket_sizes(resolution, square)
        self.groups: NDArray[np.integer] = nearest_buckets(source.sizes, self.buckets)
        self.shards = source.shards

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        rng = random.Random(f"{self.seed}/{position}")
        flip = rng.random() < 0.5 and self.flips
        record = self.source.record(index)
        (caption,) = rng.choices(record.captions, record.weights)
        size, place = self.buckets[self.groups[index]], None if self.square else rng
        picture = fit(decode_image(self.source.read(index)), size, place)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return {"pixels": pixels.flip(-1) if flip else pixels, "caption": caption}

    def name(self, index: int) -> str:
        return self.source.record(index).name
