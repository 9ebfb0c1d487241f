"""Encoded pictures: every kind that is allowed becomes upright RGB, and no other reaches a decoder."""

import io
import random
import resource
import subprocess
import sys
import textwrap
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hostile_files import (
    BOMBS,
    TRUNCATED,
    UNREADABLE,
    chunk,
    encoded,
    jpeg_of,
    picture,
    pixels,
    png,
    webp_of,
)
from PIL import ExifTags, Image, ImageOps

from localdit.data.images import MAX_PIXELS, BadSample, decode_image, open_image, upright_size

# Pillow warns of damaged EXIF data, wherever it stumbles over it.
DAMAGED = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.size == upright_size(open_image(data))
    return np.asarray(image)


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Floating point, of 8 bit values; alpha (h, w)."""
    weight = alpha[..., None] / 255
    return color * weight + 255 * (1 - weight)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(9, 7), (1, 1), (1, 10_000), (10_000, 1)])
def test_lossless_pictures_come_back_as_they_were(kind, width, height):
    values = pixels(height, width, 3)
    assert (decoded(encoded(Image.fromarray(values), kind, lossless=True)) == values).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_as_pillow_decodes_them(mode):
    data = encoded(Image.fromarray(pixels(31, 45, 3)).convert(mode), "JPEG")
    assert (decoded(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = picture(13, 6, kind, exif=exif)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (decoded(data) == np.asarray(reference)).all()


@DAMAGED
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff"]
)
def test_damaged_exif_data_counts_as_none(exif):
    data = picture(13, 6, "JPEG", exif=exif)
    assert (decoded(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_of_sixteen_bits_the_upper_eight_are_kept():
    gray = pixels(5, 7, 2)  # big-endian
    assert (
        decoded(encoded(Image.fromarray(gray.view(">u2")[..., 0].astype(np.uint16)))) == gray[..., :1]
    ).all()

    color = pixels(5, 7, 3, 2)
    lines = b"".join(b"\0" + line.tobytes() for line in color)
    assert (decoded(png(7, 5, lines, depth=16)) == color[..., 0]).all()


def test_transparency_is_laid_over_white():
    color, alpha = pixels(8, 11, 3), pixels(8, 11)
    layers = Image.fromarray(np.dstack((color, alpha)))
    for data in (encoded(layers), encoded(layers, "WEBP", lossless=True, exact=True)):
        assert np.abs(decoded(data) - over_white(color, alpha)).max() <= 1
    gray = Image.fromarray(color[..., 0])
    gray.putalpha(Image.fromarray(alpha))
    assert np.abs(decoded(encoded(gray)) - over_white(color[..., :1], alpha)).max() <= 1


def test_a_palette_may_be_transparent_in_part():
    image = Image.fromarray(pixels(8, 11, 3)).quantize(16)
    opacity = bytes(random.choices(range(256), k=16))
    data = encoded(image, transparency=opacity)
    alpha = np.frombuffer(opacity, np.uint8)[np.asarray(image)]
    assert np.abs(decoded(data) - over_white(np.asarray(image.convert("RGB")), alpha)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_one_color_may_be_the_transparent_one(mode):
    """PNG's tRNS chunk."""
    image = Image.fromarray(pixels(6, 9, 3)).convert(mode)
    first = image.getpixel((0, 0))
    result = decoded(encoded(image, transparency=first))
    plain = np.asarray(image.convert("RGB"))
    assert (result == np.where((plain == plain[0, 0]).all(-1, keepdims=True), 255, plain)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_taken(kind):
    frames = [Image.fromarray(pixels(8, 11, 3)) for _ in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decoded(data) == np.asarray(frames[0])).all()


@pytest.mark.parametrize(("make", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_allowed_picture_is_refused(make, reason):
    for function in (open_image, decode_image):
        with pytest.raises(BadSample, match=reason):
            function(make())


@pytest.mark.parametrize("make", TRUNCATED.values(), ids=TRUNCATED)
def test_a_picture_that_is_cut_off_has_a_size_and_no_pixels(make):
    data = make()
    assert upright_size(open_image(data)) == (64, 48)
    with pytest.raises(BadSample, match="is damaged"):
        decode_image(data)


@DAMAGED
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_or_flipped_anywhere_a_picture_decodes_or_is_a_bad_sample(kind):
    """A thousand damaged files of each format: no other exception, no warning, no picture of another size."""
    whole = picture(8, 8, kind)
    damaged = [whole[:length] for length in range(len(whole))]
    for _ in range(1000 - len(damaged)):
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        damaged.append(bytes(data))
    for data in damaged:
        with suppress(BadSample):
            size = upright_size(open_image(data, max_pixels=4096))
            assert decode_image(data, max_pixels=4096).size == size


def test_the_limit_counts_pixels():
    data = picture(20, 5)
    assert open_image(data, max_pixels=100).size == (20, 5)
    for function in (open_image, decode_image):
        with pytest.raises(BadSample, match="has 20x5 pixels, more than the 99 that are read"):
            function(data, max_pixels=99)
    assert MAX_PIXELS == 8192**2


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_decompression_bombs_are_refused(make):
    assert len(make()) < 100_000
    with pytest.raises(BadSample, match=r"pixels|is not a picture"):
        decode_image(make())


def test_bombs_take_no_memory(tmp_path):
    """The peak of the process grows by less than 50 MB over all of them (R16)."""
    for name, make in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    growth = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), *map(str, tmp_path.iterdir())],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout
    assert int(growth) < 50_000  # kilobytes


_MEASURE = """
    import io, resource, sys
    from PIL import Image
    from localdit.data.images import BadSample, decode_image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    decode_image(buffer.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sys.argv[1:]:
        try:
            decode_image(open(path, "rb").read())
        except BadSample:
            continue
        raise AssertionError(path)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_bomb_beside_the_pixels_does_no_harm(name):
    """Texts and profiles of a PNG are compressed too."""
    packed = zlib.compress(bytes(10**8), level=1)
    extra = chunk(name, b"x\0" + (b"\1\0\0\0" if name == b"iTXt" else b"\0") + packed)
    data = png(2, 1, b"\0" + bytes(6), extra=extra)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(BadSample):
        assert decode_image(data).size == (2, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_headers_of_tests_are_what_they_say():
    """The bombs are refused for their size: with a small one they open."""
    assert open_image(jpeg_of(30, 20)).size == (30, 20)
    assert decode_image(webp_of(30, 20)).size == (30, 20)
