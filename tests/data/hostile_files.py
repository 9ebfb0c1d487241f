"""Pictures and tar files for the tests, good ones and every kind of bad one."""

import io
import random
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def pixels(height: int, width: int, *channels: int) -> np.ndarray:
    """Random values of 8 bits, of the global seed."""
    rng = np.random.default_rng(random.getrandbits(32))
    return rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(width: int = 9, height: int = 7, kind: str = "PNG", **options) -> bytes:
    """An RGB picture of noise."""
    return encoded(Image.fromarray(pixels(height, width, 3)), kind, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    """A PNG of any header; `data` are its scanlines before compression, each with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    data = bytearray(picture(16, 16, "JPEG"))
    start = data.index(b"\xff\xc0")  # frame header: marker, length, bits, height, width
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of(width: int, height: int) -> bytes:
    """An animated WEBP of one pixel on a canvas of another size."""

    def part(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    frame = encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    body = b"WEBP" + part(b"VP8X", b"\x02\0\0\0" + three(width - 1) + three(height - 1))
    body += part(b"ANIM", b"\xff\xff\xff\xff\0\0") + part(b"ANMF", bytes(12) + three(100) + b"\0" + frame)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def fits_bomb() -> bytes:
    """A FITS file that says it is compressed, of 50,000 x 50,000 pixels."""
    cards = [
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   =                    2",
    ]
    cards += [
        "NAXIS1  =                50000",
        "NAXIS2  =                50000",
        "ZCMPTYPE= 'GZIP_1  '",
        "END",
    ]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + zlib.compress(bytes(10**6))


BOMBS = {
    "png": lambda: png(50_000, 50_000, bytes(10**6)),
    "png-warned-of": lambda: png(12_000, 12_000, bytes(10**6)),
    "png-just-above": lambda: png(8193, 8192, bytes(10**6)),
    "jpeg": lambda: jpeg_of(65_500, 65_500),
    "webp": lambda: webp_of(2**16, 2**16 - 1),
    "webp-16383": lambda: webp_of(16_383, 16_383),
    "fits": fits_bomb,
}

UNREADABLE = {  # by the header
    "zero-byte": (lambda: b"", "is empty"),
    "text": (lambda: b"I am a picture, honestly.", "is not a picture in the format JPEG or PNG or WEBP"),
    "gif": (lambda: picture(kind="GIF"), "is not a picture in the format"),
    "tiff": (lambda: picture(kind="TIFF"), "is not a picture in the format"),
    "bmp": (lambda: picture(kind="BMP"), "is not a picture in the format"),
    "png-header-cut": (lambda: picture()[:20], "is damaged"),
    "jpeg-header-cut": (lambda: picture(kind="JPEG")[:100], "is damaged"),
    "webp-header-cut": (lambda: picture(kind="WEBP")[:25], "is damaged"),
}

TRUNCATED = {  # found when the pixels are decoded
    kind: lambda kind=kind: (data := picture(64, 48, kind))[: len(data) * 2 // 3] for kind in ("PNG", "JPEG")
}


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, end: bool = True) -> bytes:
    """A tar file of (name, content), or of headers alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            file.addfile(info, io.BytesIO(member[1]))
        length = file.offset
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def sample(key: str, caption: str = "a picture", **options) -> list[tuple[str, bytes]]:
    """The members of a sample in a tar file."""
    return [(f"{key}.png", picture(**options)), (f"{key}.txt", caption.encode())]


def raw_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header alone, whose size may be anything."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)
