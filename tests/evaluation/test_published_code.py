"""Ours against the passes of the first publication's code: the same numbers, fewer kernels, less time.

`published_attention.py` stands for a checkout, in the place where `--reference` looks for one.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from localdit.evaluation import contestants, speed
from localdit.evaluation.contestants import FAMILIES, Contestant, Picture
from localdit.evaluation.counting import Count, count
from localdit.evaluation.speed import without_blocks
from localdit.evaluation.timing import Setup
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.local_dit_single_file import to_published

PASSES = Path(__file__).parent / "published_attention.py"
H200 = (790e12, 4.3e12)  # operations and bytes a second


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    path = folder / "localdit/models/attentions.py"
    path.parent.mkdir(parents=True)
    shutil.copy(PASSES, path)
    return folder


def speaking_local_dit(config: dict[str, Any], picture: Picture, blocks: int, is_global: bool) -> Any:
    """A LocalDiT whose every layer has a part in the result."""
    model = LocalDiTTransformer2DModel(
        **config, num_layers=blocks, sample_size=picture.size // 8, global_context=is_global
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm_" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1 or "table" in name or "relative" in name:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


@pytest.mark.parametrize(("name", "is_global"), [("published", False), ("published-global", True)])
@torch.no_grad()
def test_ours_computes_what_the_published_passes_compute(monkeypatch, checkout, name, is_global):
    """In all shifts, on a grid of 8 x 8 tokens, with the weights of ours put in."""
    width = {"num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 32}
    monkeypatch.setattr(contestants, "WIDTH", width)
    picture = Picture(128, 2, False, torch.float32, torch.device("cpu"))
    ours = speaking_local_dit(width, picture, 5, is_global)
    published, inputs = FAMILIES[name].build(picture, 5, checkout)
    state = to_published(ours.state_dict())
    stale, branch = published.load_state_dict(state, strict=False)
    assert all(".attn1.to_" in key or ".attn2.to_kv" in key for key in stale)
    for key in branch:  # "transformer_blocks.0.attn1.processor.name"
        _, index, _, _, name = key.split(".", 4)
        owner, _, parameter = name.partition(".")
        processor = published.transformer_blocks[int(index)].attn1.processor
        place = getattr(processor, owner)
        (place.get_parameter(parameter) if parameter else place).copy_(state[key])
    expected = published(**inputs).sample
    found = ours(**inputs).sample
    assert (found - expected).norm() / expected.norm() < 1e-5


@cache
def costs(name: str, checkout: Path) -> tuple[Count, Count]:
    """A forward at 1024 pixels with guidance in bfloat16: with 4 blocks, and with none."""
    picture = Picture(1024, 1, True, torch.bfloat16, torch.device("meta"))
    model, forward = Contestant(name).build(picture, 4, checkout)
    forward()
    return count(forward), without_blocks(model, lambda: count(forward))


def test_the_passes_are_those_that_were_counted_in_the_published_code(checkout):
    """A forward: 2673 kernels, 75.4 GB; one of its 18 blocks: 148 kernels, 222 maps of all tokens."""
    whole, rest = costs("published-global", checkout)
    token_map = 2 * 1152 * 4096 * 2
    assert (len(whole.kernels) - len(rest.kernels)) / 4 == pytest.approx(148, rel=0.1)
    assert (whole.bytes - rest.bytes) / 4 / token_map == pytest.approx(222, rel=0.1)
    forward = rest.bytes + 18 * (whole.bytes - rest.bytes) / 4
    assert forward / 1e9 == pytest.approx(75.4, rel=0.1)


PAIRS = [("local", "published"), ("global", "published-global")]


@pytest.mark.parametrize(("ours", "published"), PAIRS)
def test_ours_moves_less_by_count(checkout, ours, published):
    """18 blocks against 18: bytes, kernels, and the time of each kernel at the speeds of an H200."""

    def of_all(name: str, what: Callable[[Count], float]) -> float:
        whole, rest = (what(found) for found in costs(name, checkout))
        return rest + 18 * (whole - rest) / 4

    def ratio(what: Callable[[Count], float]) -> float:
        return of_all(published, what) / of_all(ours, what)

    assert ratio(lambda found: found.bytes) > 1.6
    assert ratio(lambda found: len(found.kernels)) > 1.6
    assert ratio(lambda found: found.seconds(*H200)) > 1.4


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "published"), PAIRS)
def test_ours_is_faster_by_the_clock(checkout, ours, published):
    """18 blocks against 18 at 1024 pixels, on one core of a CPU, where nine tenths are matrix products."""
    setup = Setup(pairs=3, threads=1, device="cpu", cpu_time=True)
    (results,) = speed.benchmark(setup, models=[ours, published], reference=checkout)
    assert results[0].ratios[published].median > 1.05
