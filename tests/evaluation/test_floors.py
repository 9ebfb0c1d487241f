"""The least time of a forward: numbers worked out by hand, at 790 TFLOP/s and 4.3 TB/s, in bfloat16."""

import pytest

from localdit.evaluation import floors
from localdit.evaluation.floors import Shape, Work

SPEEDS = (790e12, 4.3e12)


def milliseconds(kernels: list[Work]) -> float:
    return 1e3 * floors.seconds(kernels, *SPEEDS)


def shape(size: int, batch: int, depth: int = 18, text_tokens: int = 120, pixels: int = 16) -> Shape:
    return Shape((size // pixels) ** 2, batch, 1152, depth, text_tokens)


@pytest.mark.parametrize(
    ("size", "batch", "local", "with_global", "pixart"),
    [
        (512, 1, 1.03, 1.39, 1.72),
        (1024, 1, 4.14, 5.56, 8.93),
        (2048, 1, 16.6, 22.3, 68.6),
        (4096, 1, 66.2, 89.0, 801),
        (512, 2, 2.07, 2.78, 3.44),
        (1024, 2, 8.28, 11.1, 17.9),
        (2048, 2, 33.1, 44.5, 137),
        (4096, 2, 132, 178, 1601),
    ],
)
def test_the_least_times_are_those_worked_out_by_hand(size, batch, local, with_global, pixart):
    found = shape(size, batch)
    assert milliseconds(floors.local_dit(found, global_context=False)) == pytest.approx(local, rel=0.005)
    assert milliseconds(floors.local_dit(found, global_context=True)) == pytest.approx(with_global, rel=0.005)
    assert milliseconds(floors.pixart(shape(size, batch, depth=28))) == pytest.approx(pixart, rel=0.005)


def test_sana_s_least_time_is_that_worked_out_by_hand_with_the_text_in_every_forward():
    small = shape(1024, 2, depth=28, text_tokens=300, pixels=32)
    text = 28 * [Shape(300, 2, 1152, 28, 0).product(1, 2)]
    assert milliseconds(floors.sana(small) + text) == pytest.approx(3.51, rel=0.005)
    large, its_text = (Shape(tokens, 2, 2240, 20, 300) for tokens in (1024, 300))
    assert milliseconds(floors.sana(large) + 20 * [its_text.product(1, 2)]) == pytest.approx(8.43, rel=0.005)


def test_a_forward_moves_as_much_as_worked_out_by_hand():
    gigabytes = {
        context: sum(work.bytes for work in floors.local_dit(shape(1024, 2), global_context=context)) / 1e9
        for context in (False, True)
    }
    assert gigabytes == pytest.approx({False: 13.2, True: 20.2}, rel=0.005)


def test_a_kernel_takes_the_longer_of_its_products_and_its_memory():
    assert floors.seconds([Work(10, 1), Work(1, 30)], 5, 10) == 2 + 3
