"""PixelDiT a second time, as plainly as can be: published names, one picture, one head, one pixel at a time.

Written from the description of what the published program computes, and sharing no code with the package. It
works in the precision of the weights that it is given, and knows neither chunks nor batches.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """What the tensors do not tell."""

    patch: int
    eps: float = 1e-6
    theta: float = 10000.0
    extent: float = 16.0
    text_theta: float | None = 10000.0
    period: float = 10.0
    positions: bool = True


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rms(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def turn(x: Tensor, angles: list[float]) -> Tensor:
    """Rotate the adjacent pairs of one head's vector."""
    y = x.clone()
    for j, angle in enumerate(angles):
        a, b = x[2 * j], x[2 * j + 1]
        y[2 * j] = a * math.cos(angle) - b * math.sin(angle)
        y[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
    return y


def image_angles(h: int, w: int, head_dim: int, sizes: Sizes) -> list[list[float]]:
    """For each patch, the angle of each pair: even pairs by the column, odd ones by the row."""

    def place(i: int, count: int) -> float:
        return 0.0 if count == 1 else sizes.extent * i / (count - 1)

    tokens = []
    for row in range(h):
        for column in range(w):
            angles = []
            for k in range(head_dim // 4):
                frequency = sizes.theta ** (-4 * k / head_dim)
                angles += [place(column, w) * frequency, place(row, h) * frequency]
            tokens.append(angles)
    return tokens


def text_angles(tokens: int, head_dim: int, theta: float | None) -> list[list[float]]:
    if theta is None:
        return [[0.0] * (head_dim // 2)] * tokens
    return [[t * theta ** (-2 * k / head_dim) for k in range(head_dim // 2)] for t in range(tokens)]


def qkv(
    w: dict[str, Tensor], block: str, suffix: str, x: Tensor, angles: list[list[float]], eps: float
) -> list[list[Tensor]]:
    """Queries, keys and values of tokens (M, D): three lists of a (M, d) for each head."""
    norms = [w[f"{block}.attn.{side}_norm{suffix}.weight"] for side in "qk"]
    d = len(norms[0])
    parts: list[list[Tensor]] = []
    for i, part in enumerate(linear(w, f"{block}.attn.qkv{suffix}", x).chunk(3, dim=-1)):
        heads = list(part.split(d, dim=-1))
        if i < 2:
            heads = [y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * norms[i] for y in heads]
            heads = [torch.stack([turn(row, angle) for row, angle in zip(y, angles)]) for y in heads]
        parts.append(heads)
    return parts


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], keep: Tensor | None = None) -> Tensor:
    heads = []
    for one_q, one_k, one_v in zip(q, k, v):
        scores = one_q @ one_k.T / math.sqrt(one_q.shape[-1])
        if keep is not None:
            scores = scores.masked_fill(~keep[None], -math.inf)
        heads.append(scores.softmax(-1) @ one_v)
    return torch.cat(heads, dim=-1)


def swiglu(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.w2", silu(linear(w, f"{name}.w1", x)) * linear(w, f"{name}.w3", x))


def pixel_position(row: int, column: int, channels: int) -> Tensor:
    def half(position: int) -> list[float]:
        count = channels // 4
        angles = [position * 10000 ** (-k / count) for k in range(count)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return torch.tensor(half(column) + half(row), dtype=torch.float64)


def pixel_block(
    w: dict[str, Tensor], name: str, pixels: Tensor, cond: Tensor, h: int, width: int, sizes: Sizes
) -> Tensor:
    """pixels: (N, P, E); cond: (N, D)."""
    count, per_patch, channels = pixels.shape
    theta = linear(w, f"{name}.adaLN_modulation.0", cond)  # index = pixel * 6E + chunk * E + channel
    values = theta.reshape(count, per_patch, -1, channels)
    post = values.shape[2] == 4
    y = rms(w, f"{name}.norm1", pixels, sizes.eps)
    if not post:
        y = y * (1 + values[:, :, 1]) + values[:, :, 0]
    z = linear(w, f"{name}.compress_to_attn", y.reshape(count, -1))
    head_dim = len(w[f"{name}.attn.q_norm.weight"])
    z = attend(*qkv(w, name, "", z, image_angles(h, width, head_dim, sizes), sizes.eps))
    z = linear(w, f"{name}.attn.proj", z)
    z = linear(w, f"{name}.expand_from_attn", z).reshape(pixels.shape)

    def mlp(x: Tensor) -> Tensor:
        x = linear(w, f"{name}.mlp.fc1", x)
        return linear(w, f"{name}.mlp.fc2", x * (1 + torch.erf(x / math.sqrt(2))) / 2)

    if post:
        pixels = pixels + z * (1 + values[:, :, 0]) + values[:, :, 1]
        y = mlp(rms(w, f"{name}.norm2", pixels, sizes.eps))
        return pixels + y * (1 + values[:, :, 2]) + values[:, :, 3]
    pixels = pixels + values[:, :, 2] * z
    y = rms(w, f"{name}.norm2", pixels, sizes.eps) * (1 + values[:, :, 4]) + values[:, :, 3]
    return pixels + values[:, :, 5] * mlp(y)


def naive_pixeldit(
    w: dict[str, Tensor],
    sizes: Sizes,
    image: Tensor,
    time: float,
    label: int | None = None,
    text: Tensor | None = None,
    keep: Tensor | None = None,
    after: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The velocity for one picture, (3, H, W), and the tokens after block `after`, counted from 1.

    label, or text (T, channels) with which of it to keep, (T,) bool.
    """
    dtype = w["s_embedder.proj.weight"].dtype
    image = image.to(dtype)
    channels, height, width = image.shape
    p = sizes.patch
    h, columns = height // p, width // p

    # Patch tokens: channel first, then rows, then columns of the patch.
    cut = [image[:, r * p : r * p + p, c * p : c * p + p] for r in range(h) for c in range(columns)]
    s = linear(w, "s_embedder.proj", torch.stack([patch.reshape(-1) for patch in cut]))

    # Time: cosines, then sines.
    half = w["t_embedder.mlp.0.weight"].shape[1] // 2
    angles = [time * sizes.period ** (-k / half) for k in range(half)]
    wave = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=dtype)
    tau = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", wave)))

    stream = None
    if text is None:
        c = silu(tau + w["y_embedder.embedding_table.weight"][label])
    else:
        c = silu(tau)
        stream = rms(w, "y_embedder.norm", linear(w, "y_embedder.proj", text.to(dtype)), sizes.eps)
        stream = stream + w["y_pos_embedding"][0, : len(text)]
        everything = None
        if keep is not None:
            everything = torch.cat((keep, torch.ones(len(s), dtype=torch.bool)))

    reported = None
    blocks = {name.split(".")[1] for name in w if name.startswith("patch_blocks.")}
    for i in range(len(blocks)):
        name = f"patch_blocks.{i}"
        if stream is None:
            b1, g1, a1, b2, g2, a2 = linear(w, f"{name}.adaLN_modulation.0", c).chunk(6)
            head_dim = len(w[f"{name}.attn.q_norm.weight"])
            y = rms(w, f"{name}.norm1", s, sizes.eps) * (1 + g1) + b1
            y = attend(*qkv(w, name, "", y, image_angles(h, columns, head_dim, sizes), sizes.eps))
            s = s + a1 * linear(w, f"{name}.attn.proj", y)
            y = rms(w, f"{name}.norm2", s, sizes.eps) * (1 + g2) + b2
            s = s + a2 * swiglu(w, f"{name}.mlp", y)
        else:
            six = {x: linear(w, f"{name}.adaLN_modulation_{m}.0", c).chunk(6)
                   for x, m in (("x", "img"), ("y", "txt"))}  # fmt: skip
            head_dim = len(w[f"{name}.attn.q_norm_x.weight"])
            turns = {
                "x": image_angles(h, columns, head_dim, sizes),
                "y": text_angles(len(stream), head_dim, sizes.text_theta),
            }
            streams = {"x": s, "y": stream}
            parts = {}
            for x in "yx":
                b1, g1, *_ = six[x]
                y = rms(w, f"{name}.norm_{x}1", streams[x], sizes.eps) * (1 + g1) + b1
                parts[x] = qkv(w, name, f"_{x}", y, turns[x], sizes.eps)
            joint = [[torch.cat(pair) for pair in zip(parts["y"][i], parts["x"][i])] for i in range(3)]
            out = attend(*joint, keep=everything)
            outs = {"y": out[: len(stream)], "x": out[len(stream) :]}
            for x in "xy":
                _, _, a1, b2, g2, a2 = six[x]
                streams[x] = streams[x] + a1 * linear(w, f"{name}.attn.proj_{x}", outs[x])
                y = rms(w, f"{name}.norm_{x}2", streams[x], sizes.eps) * (1 + g2) + b2
                streams[x] = streams[x] + a2 * swiglu(w, f"{name}.mlp_{x}", y)
            s, stream = streams["x"], streams["y"]
        if i + 1 == after:
            reported = s

    cond = silu(tau + s)
    pixel_dim = w["pixel_embedder.proj.weight"].shape[0]
    patches = []
    for n in range(h * columns):
        row0, column0 = n // columns * p, n % columns * p
        for r in range(p):
            for q in range(p):
                token = linear(w, "pixel_embedder.proj", image[:, row0 + r, column0 + q])
                if sizes.positions:
                    token = token + pixel_position(row0 + r, column0 + q, pixel_dim).to(dtype)
                patches.append(token)
    pixels = torch.stack(patches).reshape(h * columns, p * p, pixel_dim)
    for i in range(len({name.split(".")[1] for name in w if name.startswith("pixel_blocks.")})):
        pixels = pixel_block(w, f"pixel_blocks.{i}", pixels, cond, h, columns, sizes)
    pixels = linear(w, "final_layer.linear", rms(w, "final_layer.norm", pixels, sizes.eps))

    result = torch.empty(channels, height, width, dtype=dtype)
    for n in range(h * columns):
        row0, column0 = n // columns * p, n % columns * p
        result[:, row0 : row0 + p, column0 : column0 + p] = pixels[n].T.reshape(channels, p, p)
    return result, reported
