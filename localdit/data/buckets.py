"""Aspect-ratio buckets: the sizes that pictures of any shape are brought to, so that a batch has one size."""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# Height and width in sixteenths of the resolution, of about the same area: those of PixArt-alpha's tables.
_FAMILY = (
    *((8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21)),
    *((12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16)),
    *((16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11)),
    *((23, 11), (24, 10), (25, 10), (27, 9), (32, 8)),
)


def bucket_sizes(resolution: int, square: bool = False) -> list[tuple[int, int]]:
    """The sizes of a resolution, (height, width) in pixels: from 1:4 to 4:1, of about resolution² pixels, or
    the square alone.

    At multiples of 256 these are PixArt's 33; elsewhere the sides are rounded to multiples of 16, and sizes
    that coincide are one.

    Raises:
        ValueError: The resolution is no multiple of 16, or below 64.
    """
    if resolution < 64 or resolution % 16:
        raise ValueError(f"resolution must be a multiple of 16, at least 64, got {resolution}")
    if square:
        return [(resolution, resolution)]
    sizes = [(_pixels(height, resolution), _pixels(width, resolution)) for height, width in _FAMILY]
    return list(dict.fromkeys(sizes))


def nearest_buckets(sizes: NDArray[np.integer], buckets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The bucket whose ratio is nearest to each picture's, so that least is cropped.

    Nearest by the quotient of the ratios, which treats portrait and landscape alike (PixArt takes the
    difference).

    Args:
        sizes: Width and height of each picture, (n, 2).
        buckets: Height and width of each bucket.

    Returns:
        Indices into `buckets`, (n,).
    """
    ratios = np.log([height / width for height, width in buckets])
    order = np.argsort(ratios)
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(middles, np.log(sizes[:, 1] / sizes[:, 0]))]


def fit(image: Image.Image, size: tuple[int, int], rng: random.Random | None = None) -> Image.Image:
    """Resize a picture to cover a size, and crop what sticks out.

    Args:
        image: A picture.
        size: Height and width in pixels.
        rng: Where the crop lies along the side that is too long; in the middle without.
    """
    centring = (rng.random(), rng.random()) if rng else (0.5, 0.5)
    return ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS, centering=centring)


def _pixels(sixteenths: int, resolution: int) -> int:
    return 16 * round(sixteenths * resolution / 256)
