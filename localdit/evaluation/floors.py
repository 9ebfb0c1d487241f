"""The least that a forward of a transformer can take: each kernel bound by its products or by its memory.

The plan behind it: every kernel reads its inputs once and writes its outputs once; norms, modulation, gates
and residuals are fused into the fewest passes; keys and values of the text are there already. A machine that
moves so many bytes and does so many operations a second then needs

    sum over the kernels of max(operations / operations per second, bytes / bytes per second)

Small parts that no model is decided by are left out: embeddings, output, squeeze-excite.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one kernel has to do."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Shape:
    """What the cost of a forward follows from."""

    tokens: int  # of one picture
    batch: int
    width: int
    depth: int  # blocks
    text_tokens: int
    itemsize: int = 2  # bytes of a number

    def maps(self, count: float, flops_per_token: float = 0) -> Work:
        """A kernel that reads and writes `count` maps of all tokens, weights aside."""
        rows = self.batch * self.tokens
        return Work(flops_per_token * rows, count * self.itemsize * self.width * rows)

    def product(self, inputs: float, outputs: float, also_read: float = 0) -> Work:
        """A linear layer on every token, from and to so many times the width."""
        work = self.maps(inputs + outputs + also_read, 2 * inputs * outputs * self.width**2)
        return Work(work.flops, work.bytes + self.itemsize * inputs * outputs * self.width**2)

    def around(self) -> list[Work]:
        """What the blocks of all these models share: linear layers of both attentions, the attention to text,
        norms, modulation, gates and residuals."""
        return [
            self.maps(4),  # the residual before, norm, modulation
            self.product(1, 3),
            self.product(1, 1),
            self.maps(3),  # gate, residual
            self.product(1, 1),
            self.maps(2, 4 * self.text_tokens * self.width),
            self.product(1, 1),
            self.maps(4),  # residual, norm, modulation
        ]


def local_dit(shape: Shape, *, global_context: bool, window: int = 4) -> list[Work]:
    """The kernels of a forward of LocalDiT."""
    attention = 4 * window**2 * shape.width  # operations of a token: scores and sums
    block = [*shape.around(), shape.maps(4, attention), shape.product(1, 4), shape.product(4, 1)]
    if global_context:
        features = [shape.maps(2, 18 * shape.width), shape.product(1, 1, also_read=1)]
        block += [shape.maps(4), *features, *features, shape.product(1, 2), shape.maps(3, attention)]
    return shape.depth * block


def pixart(shape: Shape) -> list[Work]:
    """The kernels of a forward of PixArt."""
    attention = shape.maps(4, 4 * shape.tokens * shape.width)
    return shape.depth * [*shape.around(), attention, shape.product(1, 4), shape.product(4, 1)]


def sana(shape: Shape, *, head_dim: int = 32) -> list[Work]:
    """The kernels of a forward of Sana: linear attention, a gated feed-forward with a 3 x 3 convolution."""
    attention = shape.maps(4, 4 * head_dim * shape.width)
    feed_forward = [shape.product(1, 5), shape.maps(7.5, 90 * shape.width), shape.product(2.5, 1)]
    return shape.depth * [*shape.around(), attention, *feed_forward]


def seconds(kernels: Sequence[Work], flops_per_second: float, bytes_per_second: float) -> float:
    """The least time for these kernels, one after the other."""
    return sum(max(work.flops / flops_per_second, work.bytes / bytes_per_second) for work in kernels)
