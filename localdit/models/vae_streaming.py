"""`AutoencoderKL` in bands of rows: pictures of any size, decoded and encoded in bounded memory.

A VAE holds whole feature maps: SDXL's, at the widest, 3 x 256 numbers for each pixel, 52 GB for 4096 x 4096
in float32. Here a map is a stream of bands, from the top down. A 3 x 3 convolution remembers the last rows of
the band before. GroupNorm resists: its mean and variance are those of the whole map, so that each costs a
pass over its input before a row can be normalised. A map within a budget of bytes is kept for the passes to
come; a larger one is made anew in each of them, from the last one that was kept. So memory is what is asked
for, and the price is time: with a budget of 512 bytes for each pixel, to decode with SDXL's VAE in float32
takes 1.5 times the arithmetic, with 256 bytes 3.3 times, with 128 7 times, and with 32, the least, 10 times.

Nothing is approximated: the numbers differ from those of the VAE as sums in another order do.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

# B batch   C channels   H W of a map   N = H*W   R rows of a band   G groups of channels   A heads   d = C/A

SCORES = 2**30  # of attention at a time, where a backend that is not fused holds them


def stream_decode(
    vae: AutoencoderKL, latents: Tensor, *, max_bytes: int = 2**32, max_pixels: int = 2**16
) -> Iterator[Tensor]:
    """The picture that `vae.decode(latents)` gives, in bands (B, C, R, W) from the top, of the VAE's dtype.

    Args:
        vae: `AutoencoderKL` of the standard blocks, as SDXL's is. Whether it slices or tiles is ignored.
        latents: (B, C, h, w), as `vae.decode` takes them.
        max_bytes: Of the maps that are kept at a time. The attention keeps three of the latents' size,
            whatever they take. Some ten bands come on top.
        max_pixels: Of a band at any resolution, which has a row or two at least. A map that is not kept may
            end in a band of some rows more: each convolution holds one back.

    Raises:
        ValueError: For a VAE of other blocks, or whose weights are not there (offloaded layer by layer).
    """
    check_streaming(vae, max_bytes, max_pixels)
    return _decode(vae, latents, max_bytes, max_pixels)


def stream_encode(
    vae: AutoencoderKL, pixels: Tensor, *, max_bytes: int = 2**32, max_pixels: int = 2**16
) -> Tensor:
    """`vae.encode(pixels).latent_dist.parameters`, (B, 2C, h, w), of pictures (B, C, H, W) of its dtype.

    The arguments are those of `stream_decode`, and so are the errors.
    """
    check_streaming(vae, max_bytes, max_pixels)
    return _encode(vae, pixels, max_bytes, max_pixels)


def check_streaming(vae: Any, max_bytes: int, max_pixels: int) -> None:
    """Raise the ValueError that `stream_decode` and `stream_encode` would."""
    for name, value in (("max_bytes", max_bytes), ("max_pixels", max_pixels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    kind: Any = type(vae).__name__
    if isinstance(vae, AutoencoderKL):
        kind = sorted({*vae.config.down_block_types, *vae.config.up_block_types})
    if kind != ["DownEncoderBlock2D", "UpDecoderBlock2D"]:
        raise ValueError(
            "vae must be an AutoencoderKL of DownEncoderBlock2D and UpDecoderBlock2D to be streamed, "
            f"got {kind}"
        )
    if any(weight.is_meta for weight in vae.parameters()):
        raise ValueError("vae must be offloaded whole to be streamed, got weights on the meta device")


@torch.no_grad()
def _decode(vae: AutoencoderKL, latents: Tensor, max_bytes: int, max_pixels: int) -> Iterator[Tensor]:
    _bring(vae)
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    decoder = vae.decoder
    streaming = _Streaming(latents, max_bytes, max_pixels)

    x = streaming.middle(_convolved(streaming.given(latents), decoder.conv_in), decoder.mid_block)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = streaming.resnet(x, resnet)
        for upsampler in block.upsamplers or ():
            x = streaming.upsampled(x, upsampler.conv)
    yield from _ended(x, decoder)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor, max_bytes: int, max_pixels: int) -> Tensor:
    _bring(vae)
    encoder = vae.encoder
    streaming = _Streaming(pixels, max_bytes, max_pixels)

    x = streaming.kept(_convolved(streaming.given(pixels), encoder.conv_in))
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = streaming.resnet(x, resnet)
        for downsampler in block.downsamplers or ():
            x = streaming.downsampled(x, downsampler)
    x = streaming.middle(x, encoder.mid_block)
    moments = torch.cat(list(_ended(x, encoder)), dim=2)
    return moments if vae.quant_conv is None else vae.quant_conv(moments)


@apply_forward_hook
def _bring(vae: AutoencoderKL) -> None:
    """An offloaded VAE to its device, by the hook that its own `encode` and `decode` call."""


class _Map(NamedTuple):
    """A map (B, C, H, W) that can be read any number of times, from the top, in bands of any height.

    `read(True)` is the last time: what was kept to read it from is freed on the way.
    """

    read: Callable[[bool], Iterator[Tensor]]
    shape: tuple[int, ...]
    source: int = 0  # numbers that are kept to read it from

    @property
    def numbers(self) -> int:
        return prod(self.shape)


class _Streaming:
    """The layers that choose whether to keep a map, each a function of maps."""

    def __init__(self, like: Tensor, max_bytes: int, max_pixels: int):
        self.like = like  # of the dtype and on the device of all maps
        self.max_numbers = max_bytes // like.itemsize
        self.max_pixels = max_pixels

    def given(self, x: Tensor) -> _Map:
        """What a coder begins with, which is the caller's to keep."""
        return _Map(lambda last: self.cut(iter((x,)), x.shape[3]), x.shape)

    def kept(self, x: _Map, beside: _Map | None = None) -> _Map:
        """x with its bands in memory if they fit, else x itself, which is made anew each time.

        What x is made from is freed, unless there is a map that will be read besides: then both are to fit.
        """
        if x.numbers + (0 if beside is None else beside.source) > self.max_numbers:
            return x
        # Contiguous, as a view would keep more than its rows.
        bands = deque(map(Tensor.contiguous, x.read(beside is None)))

        def read(last: bool) -> Iterator[Tensor]:
            return self.cut(_drained(bands) if last else iter(bands), x.shape[3])

        return _Map(read, x.shape, x.numbers)

    def cut(self, bands: Iterator[Tensor], width: int) -> Iterator[Tensor]:
        """The same rows in bands that would have `max_pixels` at most if they were `width` wide."""
        rows = max(1, self.max_pixels // width)
        return chain.from_iterable(band.split(rows, dim=2) for band in bands)

    def middle(self, x: _Map, block: Any) -> _Map:
        """`UNetMidBlock2D`. Its maps are the smallest, and are kept in any case."""
        self.max_numbers = max(self.max_numbers, x.numbers)
        x = self.resnet(self.kept(x), block.resnets[0])
        for attn, resnet in zip(block.attentions, block.resnets[1:]):
            if attn is not None:
                x = self.attention(x, attn)
            x = self.resnet(x, resnet)
        return x

    def resnet(self, x: _Map, block: Any) -> _Map:
        """`ResnetBlock2D`."""
        batch, _, height, width = x.shape
        norm1 = _measured(x, block.norm1)

        def first_half(bands: Iterator[Tensor]) -> Iterator[Tensor]:
            return _through(bands, norm1, block.nonlinearity, _Convolution(block.conv1, height))

        shape = batch, block.conv1.out_channels, height, width
        anew = _Map(lambda last: first_half(x.read(last)), shape, x.source)
        h = self.kept(anew, beside=x)
        norm2 = _measured(h, block.norm2)

        def read(last: bool) -> Iterator[Tensor]:
            if h is anew:
                skipped: deque[Tensor] = deque()  # x is read once, for both ways

                def skip(band: Tensor) -> Tensor:
                    skipped.append(band)
                    return band

                bands, around = first_half(map(skip, x.read(last))), _drained(skipped)
            else:
                bands, around = h.read(last), x.read(last)
            conv2 = _Convolution(block.conv2, height)
            return _through(bands, norm2, block.nonlinearity, conv2, _Addition(around, block.conv_shortcut))

        return self.kept(_Map(read, shape, x.source))

    def attention(self, x: _Map, attn: Any) -> _Map:
        """`Attention` over the whole map: keys and values of all tokens, and queries a band at a time."""
        batch, _, height, width = x.shape
        norm = _measured(x, attn.group_norm)

        def project(band: Tensor, *layers: nn.Module) -> Iterator[Tensor]:
            tokens = norm(band).flatten(2).transpose(1, 2)  # (B, R*W, C)
            for layer in layers:
                yield layer(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)  # (B, A, R*W, d)

        size = batch, attn.heads, height * width, attn.inner_dim // attn.heads
        k, v = self.like.new_empty(size), self.like.new_empty(size)
        end = 0
        for band in x.read(False):
            start, end = end, end + band.shape[2] * width
            k[:, :, start:end], v[:, :, start:end] = project(band, attn.to_k, attn.to_v)
        queries = max(1, SCORES // (batch * attn.heads * height * width))

        def attend(band: Tensor) -> Tensor:
            (q,) = project(band, attn.to_q)
            out = [F.scaled_dot_product_attention(part, k, v) for part in q.split(queries, dim=2)]
            tokens = torch.cat(out, 2).transpose(1, 2).flatten(2)  # (B, R*W, C)
            return band + attn.to_out[0](tokens).transpose(1, 2).unflatten(2, (-1, width))

        return self.kept(_Map(lambda last: map(attend, x.read(last)), x.shape, x.source))

    def upsampled(self, x: _Map, conv: nn.Conv2d) -> _Map:
        """`Upsample2D`: twice the size by nearest neighbour, then a convolution."""
        batch, channels, height, width = x.shape
        shape = batch, channels, 2 * height, 2 * width

        def double(band: Tensor) -> Tensor:
            return F.interpolate(band, scale_factor=2.0, mode="nearest")

        def read(last: bool) -> Iterator[Tensor]:
            return map(double, self.cut(x.read(last), 4 * width))

        return self.kept(_convolved(_Map(read, shape, x.source), conv))

    def downsampled(self, x: _Map, layer: nn.Module) -> _Map:
        """`Downsample2D`: a convolution at every second row and column."""
        batch, channels, height, width = x.shape
        shape = batch, channels, height // 2, width // 2
        return self.kept(_Map(lambda last: _through(x.read(last), _Halving(layer, height)), shape, x.source))


def _convolved(x: _Map, conv: nn.Conv2d) -> _Map:
    batch, _, height, width = x.shape
    shape = batch, conv.out_channels, height, width
    return _Map(lambda last: _through(x.read(last), _Convolution(conv, height)), shape, x.source)


def _ended(x: _Map, coder: Any) -> Iterator[Tensor]:
    """The last three layers of a decoder or encoder."""
    norm = _measured(x, coder.conv_norm_out)
    return _through(x.read(True), norm, coder.conv_act, _Convolution(coder.conv_out, x.shape[2]))


def _through(bands: Iterator[Tensor], *layers: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Bands after layers. Of `map` and `filter`, which hold no band that they have handed on."""
    for layer in layers:
        bands = filter(lambda band: band.shape[2], map(layer, bands))
    return bands


def _drained(bands: deque[Tensor]) -> Iterator[Tensor]:
    while bands:
        yield bands.popleft()


class _Convolution:
    """A 3 x 3 convolution of a map that is given in bands: as many rows as can be known so far.

    The layer itself is called, on a row more on each side than it gives; its padding serves at the edges.
    """

    def __init__(self, conv: nn.Module, height: int):
        self.conv = conv
        self.missing = height  # rows that are to be given to it
        self.window: Tensor | None = None  # rows that what comes next depends on
        self.begun = False

    def __call__(self, band: Tensor) -> Tensor:
        window = band if self.window is None else torch.cat((self.window, band), dim=2)
        self.missing -= band.shape[2]
        rows = self.conv(window)[:, :, int(self.begun) : window.shape[2] - (self.missing > 0)]
        self.begun |= rows.shape[2] > 0
        self.window = window[:, :, -2:].clone() if self.missing else None
        return rows


class _Halving:
    """`Downsample2D` of a map that is given in bands. Row i is made of rows 2i to 2i + 2."""

    def __init__(self, layer: nn.Module, height: int):
        self.layer = layer
        self.missing = height
        self.window: Tensor | None = None

    def __call__(self, band: Tensor) -> Tensor:
        window = band if self.window is None else torch.cat((self.window, band), dim=2)
        self.missing -= band.shape[2]
        known = (window.shape[2] - (self.missing > 0)) // 2
        self.window = window[:, :, 2 * known :].clone()
        return self.layer(window)[:, :, :known] if known else window[:, :, :0]


class _Addition:
    """A branch, given in bands, and what went around it, in bands that are cut otherwise."""

    def __init__(self, around: Iterator[Tensor], shortcut: nn.Module | None):
        self.around = around
        self.shortcut = shortcut
        self.rest: Tensor | None = None  # read, and not yet added

    def __call__(self, band: Tensor) -> Tensor:
        rows = band.shape[2]
        x = next(self.around) if self.rest is None else self.rest
        while x.shape[2] < rows:
            x = torch.cat((x, next(self.around)), dim=2)
        self.rest = x[:, :, rows:]
        x = x[:, :, :rows]
        return (x if self.shortcut is None else self.shortcut(x)) + band


def _measured(x: _Map, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    """The normalisation of x, for its bands. Statistics are float32 in a band, and joined in float64."""
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    shares, moments = [], []
    for band in x.read(False):
        groups = band.to(dtype).unflatten(1, (norm.num_groups, -1))  # (B, G, C/G, R, W)
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0)  # (B, G)
        moments.append(torch.stack((mean, variance + mean**2)))
        shares.append(band.shape[2] / x.shape[2])
    joined = torch.stack(moments, dim=-1).cpu().double() @ torch.tensor(shares, dtype=torch.float64)
    mean, square = joined.repeat_interleave(norm.num_channels // norm.num_groups, dim=2)[..., None, None]
    scale = norm.weight.cpu().double()[:, None, None] / (square - mean**2 + norm.eps).sqrt()  # (B, C, 1, 1)
    shift = norm.bias.cpu().double()[:, None, None] - mean * scale
    scale, shift = (x.to(norm.weight.device, dtype) for x in (scale, shift))
    return lambda band: torch.addcmul(shift, band.to(dtype), scale).to(band.dtype)
