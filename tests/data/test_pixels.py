"""Pixels straight from a source: the crop and the caption of each sample."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.data.pixels import Pixels
from localdit.data.records import Record

CAPTIONS = ("one", "two", "three")


class Ramps:
    """Pictures whose red says x, from 0 to 255."""

    bad, shards = (), None

    def __init__(self, *sizes: tuple[int, int]):
        self.sizes = np.array(sizes, dtype=np.int32)  # width and height

    def __len__(self) -> int:
        return len(self.sizes)

    def record(self, i: int) -> Record:
        width, height = self.sizes[i].tolist()
        return Record(f"ramp-{i}", width, height, CAPTIONS, (1.0, 1.0, 0.0), str(i))

    def read(self, i: int) -> bytes:
        width, height = self.sizes[i].tolist()
        ramp = np.zeros((height, width, 3), dtype=np.uint8)
        ramp[..., 0] = np.linspace(0, 255, width)
        buffer = io.BytesIO()
        Image.fromarray(ramp).save(buffer, format="PNG")
        return buffer.getvalue()


def test_every_picture_gives_the_square_in_its_middle_where_squares_are_asked_for():
    pixels = Pixels(Ramps((256, 64), (64, 100), (128, 128)), 64, square=True)
    assert pixels.groups.tolist() == [0, 0, 0]
    batch = pixels.collate([pixels[index, 10 + index] for index in range(3)])
    assert batch["pixels"].shape == (3, 3, 64, 64)
    assert batch["pixels"].float().mean((2, 3))[:, 0].tolist() == pytest.approx([127.5] * 3, abs=2)
    assert torch.equal(pixels[0, 0]["pixels"], pixels[0, 1]["pixels"])


def test_otherwise_crops_lie_anywhere_in_the_picture_by_position():
    pixels = Pixels(Ramps((2000, 64)), 64)
    height, width = pixels.buckets[pixels.groups[0]]
    assert width == 4 * height
    means = {float(pixels[0, position]["pixels"][0].float().mean()) for position in range(12)}
    assert len(means) == 12
    assert torch.equal(pixels[0, 5]["pixels"], pixels[0, 5]["pixels"])


def test_captions_are_drawn_by_weight_and_pictures_mirrored_by_position():
    pixels = Pixels(Ramps((64, 64)), 64, flips=True)
    drawn = [pixels[0, position] for position in range(40)]
    assert {sample["caption"] for sample in drawn} == {"one", "two"}
    left = [float(sample["pixels"][0, :, 0].float().mean()) for sample in drawn]
    assert {round(value / 255) for value in left} == {0, 1}
