"""How pictures leave a pipeline with a VAE: whole, streamed in bands, or in diffusers' tiles."""

from typing import Any

import numpy as np
import pytest
import torch
from test_ledit_pipeline import run as run_ledit
from test_ledit_pipeline import toy_pipeline as toy_ledit_pipeline
from toy_pipeline import generators, run, toy_pipeline, toy_vae
from toy_sparse_pipeline import run_sparse, toy_sparse_pipeline

from localdit.pipelines import LocalDiTPipeline, NonFiniteError

SMALL = {"max_bytes": 2**15, "max_pixels": 500}


def latents(batch: int = 1, height: int = 6, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, height, width)


@pytest.mark.parametrize(
    ("make", "run"),
    [(toy_pipeline, run), (toy_sparse_pipeline, run_sparse), (toy_ledit_pipeline, run_ledit)],
    ids=["LocalDiT", "SparseDiT", "LEDiT"],
)
def test_a_streamed_picture_is_the_picture(make, run):
    """Of each kind, in every pipeline; and once streaming is disabled, to the bit."""
    pipe = make()

    def pictures(kind: str) -> np.ndarray:
        made = run(pipe, output_type=kind, generator=generators(0)[0])
        return np.stack([np.asarray(picture) for picture in made])

    plain = {kind: pictures(kind) for kind in ("pt", "np", "pil")}
    pipe.enable_vae_streaming(**SMALL)
    for kind in ("pt", "np"):
        np.testing.assert_allclose(pictures(kind), plain[kind], rtol=0, atol=2e-5)
    streamed = pictures("pil")
    assert streamed.dtype == np.uint8
    assert np.abs(streamed.astype(int) - plain["pil"]).max() <= 1  # where rounding tips over
    assert (streamed != plain["pil"]).mean() < 0.01
    assert plain["pt"].std() > 0.05
    pipe.disable_vae_streaming()
    assert np.array_equal(pictures("pt"), plain["pt"])


def test_a_picture_to_start_from_is_streamed_too(pipe):
    """Encoded and decoded, without a step between."""
    picture = torch.rand(1, 3, 48, 64)
    plain = run(pipe, image=picture, strength=0, output_type="pt", generator=generators(0)[0])
    pipe.enable_vae_streaming(**SMALL)
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("a whole picture"))
    streamed = run(pipe, image=picture, strength=0, output_type="pt", generator=generators(0)[0])
    torch.testing.assert_close(streamed, plain, rtol=0, atol=2e-5)


def test_rows_are_handed_out_from_the_top(pipe):
    """Of all pictures of a batch; they and the rounding are those of PIL images."""
    x = latents(2)
    plain = pipe.decode_pictures(x, "pil")
    pipe.enable_vae_streaming(**SMALL)
    rows = list(pipe.decode_rows(x))
    assert len(rows) > 3
    below = 0
    for top, band in rows:
        assert top == below
        assert band.dtype == np.uint8
        assert (band.shape[0], band.shape[2:]) == (2, (64, 3))
        assert band.shape[1] <= 12
        below += band.shape[1]
    assert below == 48
    stacked = np.concatenate([band for _, band in rows], axis=1)
    assert np.abs(stacked.astype(int) - np.stack([np.asarray(picture) for picture in plain])).max() <= 1
    pictures = pipe.decode_pictures(x, "pil")
    assert [picture.size for picture in pictures] == [(64, 48)] * 2
    assert np.abs(np.stack([np.asarray(picture) for picture in pictures]).astype(int) - stacked).max() <= 1


def test_streamed_pil_images_are_made_of_rows_alone(pipe, monkeypatch):
    """Nothing that holds the whole picture in floating point is called."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a whole picture")

    pipe.enable_vae_streaming(**SMALL)
    monkeypatch.setattr(pipe.vae, "decode", refuse)
    monkeypatch.setattr(pipe.image_processor, "postprocess", refuse)
    assert len(pipe.decode_pictures(latents(2), "pil")) == 2


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_streamed_pictures_are_finite_or_an_error(pipe, output_type):
    pipe.enable_vae_streaming(**SMALL)
    pipe.vae.decoder.conv_out.bias.data[1] = torch.nan
    with pytest.raises(NonFiniteError, match="the VAE's decoder"):
        pipe.decode_pictures(latents(), output_type)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_float16_vae_that_overflows_streams_in_float32(force_upcast):
    pipe = toy_pipeline(vae=toy_vae(force_upcast=force_upcast).half())
    seen = set()
    pipe.vae.decoder.conv_out.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    pipe.enable_vae_streaming(**SMALL)
    pipe.decode_pictures(latents(), "pil")
    assert seen == {torch.float32 if force_upcast else torch.float16}
    assert pipe.vae.dtype == torch.float16


def test_what_cannot_be_streamed_is_refused_when_it_is_asked_for(pipe):
    with pytest.raises(ValueError, match="rows come of a streamed vae"):
        next(pipe.decode_rows(latents()))
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        pipe.enable_vae_streaming(max_pixels=0)
    with pytest.raises(ValueError, match="got NoneType"):
        LocalDiTPipeline().enable_vae_streaming()


def test_diffusers_tiles_decode_what_a_pipeline_makes(pipe):
    """Nearly, as a tile has statistics of its own. 16 x 12 latents are 6 tiles of 8 x 8 or less."""
    tiles = []
    exact = run(pipe, height=128, width=96, output_type="pt", generator=generators(0)[0])
    pipe.vae.enable_tiling()
    pipe.vae.decoder.register_forward_pre_hook(lambda _, args: tiles.append(args[0].shape[2:]))
    tiled = run(pipe, height=128, width=96, output_type="pt", generator=generators(0)[0])
    assert len(tiles) == 6
    assert max(max(tile) for tile in tiles) == 8
    assert tiled.shape == exact.shape
    assert 0 < (tiled - exact).abs().mean() < 0.1


def test_streaming_does_not_tile(pipe):
    x = latents(1, 16, 12)
    exact = pipe.decode_latents(x)
    pipe.vae.enable_tiling()
    pipe.enable_vae_streaming(**SMALL)
    torch.testing.assert_close(pipe.decode_latents(x), exact, rtol=0, atol=1e-4)
