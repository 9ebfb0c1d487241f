"""Aspect-ratio buckets: PixArt's sizes, the one that crops least, and pictures that fill it."""

import random

import numpy as np
import pytest
from PIL import Image

from localdit.data.buckets import bucket_sizes, fit, nearest_buckets


def generator() -> np.random.Generator:
    return np.random.default_rng(random.getrandbits(32))


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_the_sizes_are_pixarts(resolution):
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha

    table = getattr(pipeline_pixart_alpha, f"ASPECT_RATIO_{resolution}_BIN")
    assert bucket_sizes(resolution) == [(int(height), int(width)) for height, width in table.values()]


@pytest.mark.parametrize("resolution", [64, 128, 192, 320, 768, 2048])
def test_other_resolutions_have_the_same_family_in_multiples_of_16(resolution):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes) <= 33
    assert all(height % 16 == width % 16 == 0 for height, width in sizes)
    ratios = [height / width for height, width in sizes]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == pytest.approx((0.25, 4), rel=0.01)
    # Rounding a side of 40 pixels moves it by a fifth.
    assert all(0.7 < height * width / resolution**2 < 1.3 for height, width in sizes)


@pytest.mark.parametrize("resolution", [0, -256, 48, 100, 500])
def test_a_resolution_must_suit_the_model(resolution):
    with pytest.raises(
        ValueError, match=f"resolution must be a multiple of 16, at least 64, got {resolution}"
    ):
        bucket_sizes(resolution)


def kept(size, bucket) -> float:
    """The share of a picture (width, height) that is left when it covers a bucket (height, width)."""
    scale = max(bucket[1] / size[0], bucket[0] / size[1])
    return bucket[0] * bucket[1] / (scale**2 * size[0] * size[1])


def test_the_nearest_bucket_crops_least():
    sizes = np.exp(generator().uniform(0, 9, (500, 2))).astype(np.int32)
    buckets = bucket_sizes(512)
    random.shuffle(buckets)
    chosen = nearest_buckets(sizes, buckets)
    for size, bucket in zip(sizes, chosen):
        best = max(kept(size, other) for other in buckets)
        assert kept(size, buckets[bucket]) == pytest.approx(best, rel=1e-12)


def test_portrait_and_landscape_are_treated_alike():
    buckets = [(32, 16), (16, 16), (16, 32)]
    sizes = generator().integers(1, 1000, (200, 2))
    assert (nearest_buckets(sizes, buckets) == 2 - nearest_buckets(sizes[:, ::-1], buckets)).all()


def test_no_picture_has_no_bucket():
    assert nearest_buckets(np.zeros((0, 2), dtype=np.int32), bucket_sizes(256)).shape == (0,)


def bands(height: int, width: int) -> Image.Image:
    """A picture whose red says x and whose green says y, from 0 to 255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("height", "width"), [(300, 100), (100, 300), (37, 53), (64, 32), (1, 999), (999, 1)]
)
def test_a_picture_fills_its_bucket_and_keeps_its_middle(height, width):
    size = 64, 32
    image = fit(bands(height, width), size)
    assert image.size == (32, 64)
    values = np.asarray(image).astype(float)
    share = [
        min(1, size[1] / size[0] * height / width),
        min(1, size[0] / size[1] * width / height),
    ]  # of x, y
    for channel, part in enumerate(share):
        side = (width, height)[channel]
        if side == 1:
            continue
        along = values[..., channel].mean(axis=channel)  # from end to end
        middle = (along[0] + along[-1]) / 2
        # The first and last pixels of the result lie half a pixel of each grid inside the crop.
        expected = 255 * part * (1 - 1 / len(along)) * side / (side - 1)
        assert middle == pytest.approx(127.5, abs=3)
        assert along[-1] - along[0] == pytest.approx(min(expected, 255), rel=0.04, abs=4)


def test_a_random_crop_lies_anywhere_and_follows_its_seed():
    image = bands(64, 640)
    starts = [np.asarray(fit(image, (64, 64), random.Random(seed)))[0, 0, 0] for seed in range(40)]
    again = [np.asarray(fit(image, (64, 64), random.Random(seed)))[0, 0, 0] for seed in range(40)]
    assert starts == again
    assert min(starts) < 30
    assert max(starts) > 200
