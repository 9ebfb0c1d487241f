"""An AutoencoderKL in bands: the numbers of `vae.decode` and `vae.encode`, in the memory that is given."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from localdit import MINI
from localdit.models import vae_streaming
from localdit.models.vae_streaming import stream_decode, stream_encode

# Each differs from the first in what it says.
VAES: dict[str, dict[str, Any]] = {
    "plain": {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1},
    "one block": {"block_out_channels": (8,), "norm_num_groups": 2},
    "deep": {"block_out_channels": (4, 8, 12, 20), "norm_num_groups": 2, "layers_per_block": 2},
    "no attention": {"mid_block_add_attention": False},
    "no convolutions beside": {"use_post_quant_conv": False, "use_quant_conv": False},
    "another activation": {"act_fn": "gelu"},
}


def vae_of(**config: Any) -> AutoencoderKL:
    """A VAE whose norms do something."""
    config = VAES["plain"] | config
    blocks = len(config["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **config,
    ).eval()
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, mean=1, std=0.5)
            nn.init.normal_(module.bias, std=0.5)
    return vae


@pytest.fixture
def mini_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MINI, subfolder="vae", torch_dtype=torch.float32)


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


def streamed(vae: AutoencoderKL, latents: Tensor, **options: int) -> Tensor:
    return torch.cat(list(stream_decode(vae, latents, **options)), dim=2)


def assert_streaming_is_the_decoder(vae: AutoencoderKL, latents: Tensor, **options: int) -> None:
    """In float64, where rounding hides nothing."""
    vae.double()
    latents = latents.double()
    expected = decoded(vae, latents)
    torch.testing.assert_close(streamed(vae, latents, **options), expected, rtol=0, atol=1e-11)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", VAES)
def test_streaming_is_the_decoder(kind):
    """Some maps are kept, and others made anew."""
    assert_streaming_is_the_decoder(
        vae_of(**VAES[kind]), torch.randn(2, 4, 5, 3), max_bytes=40_000, max_pixels=70
    )


@pytest.mark.parametrize("max_bytes", [1, 30_000, 2**30])  # no map is kept, some or all
@pytest.mark.parametrize(("height", "width", "max_pixels"), [(5, 4, 60), (1, 3, 1), (4, 2, 1), (3, 5, 2**17)])
def test_neither_budget_nor_bands_change_a_number(height, width, max_pixels, max_bytes):
    assert_streaming_is_the_decoder(
        vae_of(), torch.randn(1, 4, height, width), max_bytes=max_bytes, max_pixels=max_pixels
    )


@torch.no_grad()
def assert_streaming_is_the_encoder(vae: AutoencoderKL, pixels: Tensor, **options: int) -> None:
    vae.double()
    pixels = pixels.double()
    expected = vae.encode(pixels).latent_dist.parameters
    torch.testing.assert_close(stream_encode(vae, pixels, **options), expected, rtol=0, atol=1e-11)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", VAES)
def test_streaming_is_the_encoder(kind):
    """Of pictures whose size is no multiple of anything."""
    pixels = torch.randn(2, 3, 45, 27)
    assert_streaming_is_the_encoder(vae_of(**VAES[kind]), pixels, max_bytes=40_000, max_pixels=150)


@pytest.mark.parametrize("max_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize(
    ("height", "width", "max_pixels"), [(22, 17, 60), (4, 5, 1), (15, 6, 1), (9, 20, 2**17)]
)
def test_an_encoding_depends_on_neither_budget_nor_bands(height, width, max_pixels, max_bytes):
    pixels = torch.randn(1, 3, height, width)
    assert_streaming_is_the_encoder(vae_of(), pixels, max_bytes=max_bytes, max_pixels=max_pixels)


def test_the_mini_streams(mini_vae):
    assert_streaming_is_the_decoder(mini_vae, torch.randn(1, 4, 9, 11), max_bytes=2**20, max_pixels=2000)
    assert_streaming_is_the_encoder(mini_vae, torch.randn(1, 3, 72, 88), max_bytes=2**20, max_pixels=2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_rounds_as_the_decoder_does(mini_vae, dtype):
    """It is as far from float64 as the decoder is. Sums in another order make them differ by no more."""
    latents = torch.randn(2, 4, 8, 9).to(dtype)
    exact = decoded(mini_vae.double(), latents.double())
    mini_vae.to(dtype)
    plain, stream = decoded(mini_vae, latents), streamed(mini_vae, latents, max_bytes=2**18, max_pixels=500)
    assert stream.dtype == dtype
    error, allowed = (stream - exact).std(), (plain - exact).std()
    assert 0 < error < 1.2 * allowed
    assert allowed < 100 * torch.finfo(dtype).eps * exact.std()


def test_bands_come_from_the_top_and_are_as_small_as_asked(mini_vae):
    """Bands of 16 rows; a convolution moves each cut by a row, and the last band has what is left."""
    latents = torch.randn(1, 4, 12, 8)
    bands = list(stream_decode(mini_vae, latents, max_pixels=16 * 64))
    heights = [band.shape[2] for band in bands]
    assert sum(heights) == 96
    assert len(heights) >= 6
    assert max(heights) <= 17


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.seen:
            return
        self.seen.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self.seen.discard(address)
            self.now -= size

        weakref.finalize(storage, freed)


def test_memory_is_what_is_asked_for():
    """Four times the rows take plain decoding four times the memory, and streaming none to speak of."""
    vae, budget = vae_of(mid_block_add_attention=False), 2**18
    peaks = {}
    for rows in (16, 64):
        latents = torch.randn(1, 4, rows, 8)
        with LiveBytes() as plain:
            decoded(vae, latents)
        with LiveBytes() as live:
            for _ in stream_decode(vae, latents, max_bytes=budget, max_pixels=128):
                pass
        peaks[rows] = plain.peak, live.peak
    assert peaks[64][0] > 3.9 * peaks[16][0]
    assert peaks[64][0] > 4 * budget
    widest = 16 * 128 * 4  # bytes of a band
    assert peaks[64][1] < budget + 10 * widest


def test_attention_keeps_three_maps_of_the_latents_size():
    """Input, keys and values, each (1, 16, 128, 8), and no scores, which would be 64 times as large."""
    vae = vae_of(block_out_channels=(16,))
    latents = torch.randn(1, 4, 128, 8)
    with LiveBytes() as live:
        for _ in stream_decode(vae, latents, max_bytes=1, max_pixels=32):
            pass
    one = 16 * 128 * 8 * 4
    assert live.peak < 3.7 * one


def test_attention_is_cut_where_its_scores_would_be_too_many(monkeypatch):
    """Five queries at a time."""
    latents = torch.randn(2, 4, 5, 4)
    monkeypatch.setattr(vae_streaming, "SCORES", 2 * 20 * 5)
    calls = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[2])
        return attend(q, k, v)

    monkeypatch.setattr(vae_streaming.F, "scaled_dot_product_attention", watched)
    streamed(vae_of(), latents, max_pixels=28)  # bands of 7 rows or so
    assert calls
    assert max(calls) == 5
    monkeypatch.undo()
    monkeypatch.setattr(vae_streaming, "SCORES", 2 * 20 * 5)
    assert_streaming_is_the_decoder(vae_of(), latents)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (AutoencoderTiny(), "vae must be an AutoencoderKL of .* got AutoencoderTiny"),
        (AutoencoderKL(up_block_types=("AttnUpDecoderBlock2D",)), "got .'AttnUpDecoderBlock2D', 'DownEnc"),
        (AutoencoderKL().to("meta"), "vae must be offloaded whole"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(vae, message):
    with pytest.raises(ValueError, match=message):
        stream_decode(vae, torch.randn(1, 4, 2, 2))


def test_an_offloaded_vae_is_brought_to_its_device():
    """By the hook that `enable_model_cpu_offload` sets, before any layer is called."""
    vae, brought = vae_of(), []
    vae._hf_hook = SimpleNamespace(pre_forward=brought.append)
    streamed(vae, torch.randn(1, 4, 2, 2))
    assert brought == [vae]


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels"])
def test_budgets_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        stream_decode(vae_of(), torch.randn(1, 4, 2, 2), **{name: 0})
