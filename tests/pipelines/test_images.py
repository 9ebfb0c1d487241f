"""Pictures of every usual kind become the same tensors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.pipelines.common import image_size, read_images, resize_images


@pytest.fixture
def pixels() -> np.ndarray:
    """A picture with no symmetry, (5, 7, 3) in uint8."""
    return torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8).numpy()


def read(image) -> torch.Tensor:
    (x,) = read_images(image, latent_channels=4)
    return x


def test_pil_arrays_and_tensors_of_one_picture_are_read_alike(pixels):
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    array = pixels.astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [
        Image.fromarray(pixels),
        pixels,
        pixels[None],
        array,
        array.astype(np.float64),
        tensor,
        tensor[None],
    ]
    kinds += [(tensor * 255).round().to(torch.uint8), pixels[:, ::-1][:, ::-1], [pixels], [tensor]]
    for image in kinds:
        x = read(image)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(read(tensor.half()), expected, rtol=0, atol=1e-3)


def test_batches_and_lists_keep_their_order(pixels):
    flipped = pixels[::-1].copy()
    for images in (
        [pixels, flipped],
        np.stack((pixels, flipped)),
        [Image.fromarray(pixels), flipped],
        (pixels, flipped),
    ):
        first, second = read_images(images, latent_channels=4)
        assert torch.equal(first, read(pixels))
        assert torch.equal(second, read(flipped))


def test_grey_is_spread_over_the_colors(pixels):
    grey = pixels[:, :, 0]
    expected = (torch.from_numpy(grey) / 255).expand(3, -1, -1)
    for image in (
        Image.fromarray(grey),
        grey,
        grey[:, :, None],
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
    ):
        assert torch.equal(read(image), expected)


def test_sixteen_bits_keep_their_range():
    grey = np.array([[0, 257, 65535], [32768, 1, 40000]], dtype=np.uint16)
    expected = (torch.from_numpy(grey.astype(np.float64)) / 65535).float().expand(3, -1, -1)
    png = io.BytesIO()
    Image.fromarray(grey).save(png, "png")
    for image in (grey, torch.from_numpy(grey), Image.open(png)):
        torch.testing.assert_close(read(image), expected, rtol=0, atol=1e-6)


def test_transparency_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = torch.tensor([[10, 255, 204], [20, 255, 204], [30, 255, 204]])[:, None] / 255
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.info["transparency"] = 1
    torch.testing.assert_close(read(rgba), expected)
    torch.testing.assert_close(read(Image.fromarray(rgba)), expected)
    torch.testing.assert_close(read(palette), expected[:, :, :2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pil_is_read_as_pil_converts_it(mode, pixels):
    image = Image.fromarray(pixels)
    image = image.convert("L").convert("LA") if mode == "LA" else image
    image = image if mode in ("LA", "LAB") else image.convert(mode)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.equal(read(image), expected)


def test_exif_orientation_is_applied(pixels):
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: the picture's top is at its right
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    assert torch.equal(read(Image.open(file)), read(np.rot90(pixels, k=-1)))


def test_latents_are_told_by_their_channels(pixels):
    latents = torch.randn(2, 4, 3, 5)
    for x, expected in zip(read_images(latents.double(), latent_channels=4), latents):
        assert torch.equal(x, expected)
    rgb = torch.rand(3, 5, 7)
    assert torch.equal(read_images(rgb, latent_channels=3)[0], rgb)
    # An array with four channels is RGBA.
    assert read(torch.rand(5, 7, 4).numpy()).shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("cat.png", "got str"),
        ([None], "got NoneType"),
        (np.zeros((5, 7, 2)), r"C = 1, 3 or 4, got \(5, 7, 2\)"),
        (torch.zeros(2, 2, 3, 5, 7), r"got \(2, 2, 3, 5, 7\)"),
        (torch.zeros(3, 0, 7), r"got \(3, 0, 7\)"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), "got torch.int64"),
        (np.full((5, 7, 3), -0.5), r"must lie in \[0, 1\], got \[-0.5, -0.5\]"),
        (torch.full((3, 5, 7), 255.0), r"got \[255, 255\]"),
        (torch.full((3, 5, 7), float("nan")), r"must lie in \[0, 1\]"),
        (torch.full((4, 5, 7), float("inf")), "finite"),
        (Image.new("F", (7, 5)), "PIL mode 'F'"),
    ],
)
def test_what_cannot_be_read_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_images(image, latent_channels=4)


def test_reading_leaves_the_original_alone(pixels):
    array = pixels.astype(np.float32) / 255
    before = array.copy()
    array.setflags(write=False)  # PyTorch warns of such an array if it shares its memory
    read(array).add_(1)
    assert np.array_equal(array, before)


def test_sizes_are_rounded_down_and_must_agree():
    assert image_size([torch.zeros(3, 47, 64), torch.zeros(3, 47, 64)], 16) == (32, 64)
    with pytest.raises(ValueError, match=r"height and width must be given .*\(16, 16\), \(16, 32\)"):
        image_size([torch.zeros(3, 16, 32), torch.zeros(3, 16, 16)], 16)
    with pytest.raises(ValueError, match="under 16 a side, got 100 x 15"):
        image_size([torch.zeros(3, 100, 15)], 16)


def test_resizing_keeps_what_has_the_size_and_blurs_before_it_shrinks():
    stripes = (torch.arange(64) % 2).float().expand(3, 64, 64)  # its mean is all that fits into 8 pixels
    ramp = torch.linspace(0, 1, 8).expand(3, 8, 8)
    small, same = resize_images([stripes, ramp], 8, 8)
    assert torch.equal(same, ramp)
    torch.testing.assert_close(small, torch.full((3, 8, 8), 0.5), rtol=0, atol=0.05)
    large = resize_images([(ramp > 0.5).float()], 40, 24)
    assert large.shape == (1, 3, 40, 24)
    assert 0 <= large.min() < large.max() <= 1  # bicubic overshoots: it is cut
