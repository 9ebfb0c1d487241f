"""Encoded pictures in, RGB out. Format and size are checked by the header, before memory is taken for pixels.

Imports neither PyTorch nor NumPy, so that a command can look at its files before it loads anything slow.
"""

import io

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 8192 * 8192  # of a picture
MAX_BYTES = 2**28  # of an encoded picture

# Endings of names that say "a picture": those that are read, and those that somebody may expect to be.
SUFFIXES = ("jpg", "jpeg", "png", "webp")
OTHER_SUFFIXES = ("avif", "bmp", "fit", "fits", "gif", "heic", "heif", "jp2", "jxl", "tif", "tiff")

_TURNS = {  # by the EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(ValueError):
    """A sample that cannot be used. The message is the reason in words that follow the sample's name."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an encoded picture; nothing is decoded yet.

    Args:
        data: A JPEG, PNG or WEBP file.
        max_pixels: Width times height that the picture may have.

    Raises:
        BadSample: It is of no allowed format, too large, or its header is damaged.
    """
    if not data:
        raise BadSample("is empty")
    reader = _reader(data)
    if reader is None:
        raise BadSample(f"is not a picture in the format {' or '.join(FORMATS)}")
    try:
        # Not Image.open: it warns above a limit that is the process's own, and ours is lower.
        image = reader(io.BytesIO(data))
    except Image.DecompressionBombError:  # WEBP's reader looks itself
        raise BadSample(f"has more pixels than the {max_pixels:,} that are read") from None
    except Exception as error:  # a hostile header can raise anything
        raise BadSample(f"is damaged: {_words(error)}") from None
    if image.width * image.height > max_pixels:
        raise BadSample(
            f"has {image.width}x{image.height} pixels, more than the {max_pixels:,} that are read"
        )
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of an `open_image`, once its EXIF orientation is applied."""
    turned = _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to upright RGB of 8 bits.

    Of 16 bits the upper 8 are kept, of an animation the first picture; transparency is laid over white, the
    EXIF orientation is applied, colour profiles are not.

    Args:
        data: A JPEG, PNG or WEBP file.
        max_pixels: Width times height that the picture may have.

    Raises:
        BadSample: As `open_image`, or the pixels are damaged or cut off.
    """
    image = open_image(data, max_pixels)
    turn = _TURNS.get(_orientation(image))
    try:
        image.load()
    except Exception as error:  # a hostile file can raise anything
        raise BadSample(f"is damaged: {_words(error)}") from None
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _reader(data: bytes) -> type[ImageFile] | None:
    """Pillow's class for the format that the first bytes announce."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    return None


def _orientation(image: Image.Image) -> int:
    """By the EXIF data before the pixels, from 1 to 8; 1 where there is none, or none that can be read."""
    try:
        # Not PNG's own method, which decodes all pixels to look behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data can raise anything, and the picture is good without it
        return 1
    return orientation if isinstance(orientation, int) else 1


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
