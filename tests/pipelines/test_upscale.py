"""`pipe.upscale`: Lanczos, then image to image at the large size through streaming, and nothing changed."""

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from toy_pipeline import generators, spy, toy_pipeline

from localdit import MINI, LocalDiTPipeline
from localdit.models.local_dit import LocalDiTAttnProcessor, LocalDiTTransformer2DModel
from localdit.pipelines.common import enlarge_images, read_images


def picture(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = torch.randint(
        0, 256, (4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BILINEAR)


def enlarged(image: Image.Image, height: int, width: int) -> list[torch.Tensor]:
    return enlarge_images(read_images(image, 4), height, width)


def test_enlarging_is_pillows_lanczos():
    """But for the rounding to 8 bits that Pillow does with a picture."""
    image = picture()
    (ours,) = enlarged(image, 70, 90)
    pillows = read_images(image.resize((90, 70), Image.Resampling.LANCZOS), 4)[0]
    assert ours.shape == (3, 70, 90)
    assert (ours - pillows).abs().max() < 1.5 / 255
    assert ours.min() >= 0
    assert ours.max() <= 1


OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}


@pytest.mark.parametrize(("scale", "size"), [(2, (64, 80)), (3.3, (96, 128))])
def test_upscaling_is_image_to_image_at_the_large_size(pipe, monkeypatch, scale, size):
    """Bit for bit, though the transformer runs in bands."""
    image = picture()
    enable = LocalDiTTransformer2DModel.enable_streaming
    monkeypatch.setattr(LocalDiTTransformer2DModel, "enable_streaming", lambda self: enable(self, 1))
    out = pipe.upscale(image, scale, 0.5, prompt="a red circle", generator=generators(3)[0], **OPTIONS).images
    pipe.enable_vae_streaming()
    whole = pipe(
        "a red circle",
        image=enlarged(image, *size),
        strength=0.5,
        generator=generators(3)[0],
        **OPTIONS,
    ).images
    assert out.shape[-2:] == size
    assert torch.equal(out, whole)


def test_the_embedded_pipeline_upscales_bit_for_bit():
    pipe = LocalDiTPipeline.from_pretrained(MINI)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_streaming(max_tokens=64)
    image, options = picture(64, 48), {"num_inference_steps": 4, "output_type": "pt"}
    out = pipe.upscale(image, 2, prompt="a red circle", generator=generators(0)[0], **options).images
    pipe.transformer.disable_streaming()
    pipe.enable_vae_streaming()
    whole = pipe(
        "a red circle", image=enlarged(image, 96, 128), strength=0.3, generator=generators(0)[0], **options
    ).images
    assert torch.equal(out, whole)


def test_every_argument_of_a_call_is_handed_on(pipe):
    pipe.scheduler = DDIMScheduler()
    calls, seen = spy(pipe), []
    images = pipe.upscale(
        [picture(), picture(seed=1)],
        prompt=["a red circle", "a blue square"],
        negative_prompt="grey",
        num_inference_steps=10,
        strength=0.25,
        guidance_scale=2.0,
        eta=0.5,
        generator=generators(0, 1),
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(i),
    ).images
    assert [image.size for image in images] == [(80, 64)] * 2
    assert len(calls) == len(seen) == 2  # of ten, a quarter
    assert calls[0]["hidden_states"].shape == (2, 4, 8, 10)


@pytest.mark.parametrize("fails", [False, True])
def test_transformer_and_vae_are_left_as_they_were_found(pipe, fails):
    options = OPTIONS | ({"prompt": 5} if fails else {"prompt": "a star"})

    def upscale() -> None:
        if fails:
            with pytest.raises(ValueError, match="prompt"):
                pipe.upscale(picture(), **options)
        else:
            pipe.upscale(picture(), **options)

    upscale()
    assert not pipe.transformer.is_streaming
    assert pipe._vae_streaming is None
    pipe.transformer.enable_streaming(77)
    pipe.enable_vae_streaming(max_bytes=10**6)
    own = pipe.transformer._streaming, pipe._vae_streaming
    upscale()
    assert (pipe.transformer._streaming, pipe._vae_streaming) == own


def test_a_vae_that_tiles_goes_on_to_tile(pipe, monkeypatch):
    pipe.vae.enable_tiling()
    streamed = []
    monkeypatch.setattr(type(pipe), "enable_vae_streaming", lambda self: streamed.append(self))
    pipe.upscale(picture(), prompt="a star", **OPTIONS)
    assert pipe.vae.use_tiling
    assert not streamed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 1}, "scale must be above 1 and at most 8, got 1"),
        ({"scale": 8.5}, "scale must be above 1 and at most 8, got 8.5"),
        ({"scale": float("nan")}, "scale must be above 1 and at most 8, got nan"),
        ({"height": 64}, "height must be left to scale when a picture is enlarged, got 64"),
        ({"image": None}, "image must be a PIL image"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "image must be pictures to be enlarged, got latents"),
        ({"image": Image.new("RGB", (2100, 16)), "scale": 8}, "width must be from 16 to 16384 when enlarged"),
        ({"image": Image.new("RGB", (20, 7))}, "height must be from 16 to 16384 when enlarged, got 0"),
        (
            {"image": [picture(), picture(48)]},
            "height and width must be given with images of different sizes",
        ),
        ({"strength": 1.5}, "strength must be between 0 and 1, got 1.5"),
        ({"prompt": None}, "prompt must be a text"),
    ],
)
def test_bad_input_is_refused_before_a_model_runs(pipe, arguments, message):
    calls = spy(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.upscale(**{"image": picture(), "prompt": "a star"} | arguments)
    assert not calls


@pytest.mark.parametrize("missing", ["vae", "transformer"])
def test_a_missing_part_is_named(missing):
    with pytest.raises(ValueError, match=f"{missing} must be loaded to enlarge a picture"):
        toy_pipeline(**{missing: None}).upscale(picture(), prompt="a star")


def test_a_transformer_that_cannot_be_streamed_says_why(pipe):
    class OwnProcessor(LocalDiTAttnProcessor):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe.transformer.transformer_blocks[0].attn1.set_processor(OwnProcessor())
    with pytest.raises(ValueError, match="OwnProcessor"):
        pipe.upscale(picture(), prompt="a star")
    assert not pipe.transformer.is_streaming
