"""A part of a picture painted anew: the rest stays, and the transformer computes no more than it must."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from test_schedulers import build, every_scheduler, install_oracle, is_flow, levels
from torch import Tensor
from toy_pipeline import generators, run, spy, toy_pipeline, toy_transformer

from localdit.pipelines import LocalDiTPipeline
from localdit.pipelines.common import resize_images
from localdit.pipelines.inpainting import read_masks, resize_masks

SIZE = (96, 160)  # 12 x 20 latents, 6 x 10 tokens


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def mask(top: int = 40, bottom: int = 60, left: int = 21, right: int = 50, size: Any = SIZE) -> np.ndarray:
    """White rows top to bottom, columns left to right: (H, W) bool."""
    white = np.zeros(size, dtype=bool)
    white[top:bottom, left:right] = True
    return white


def local_pipeline(**config: Any) -> LocalDiTPipeline:
    """Windows of 2, so that a picture of 6 x 10 tokens has room for a part."""
    config = {"global_context": False, "window_size": 2} | config
    return toy_pipeline(transformer=toy_transformer(**config))


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


# --- What stays


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_pixels_outside_the_mask_stay_to_the_bit(strength):
    pipe, image, white = local_pipeline(), picture(), mask()
    kwargs: dict[str, Any] = {"image": image, "mask": white, "strength": strength}
    pixels = run(pipe, **kwargs, generator=generators(0)[0], output_type="pt")[0]
    assert torch.equal(pixels[:, ~white], pixels_of(image)[:, ~white])
    assert (pixels - pixels_of(image))[:, white].abs().mean() > 0.1
    array = run(pipe, **kwargs, generator=generators(0)[0], output_type="np")[0]
    assert np.array_equal(array, pixels.permute(1, 2, 0).numpy())
    pil = run(pipe, **kwargs, generator=generators(0)[0], output_type="pil")[0]
    assert np.array_equal(np.array(pil)[~white], np.array(image)[~white])
    assert np.array_equal(np.array(pil), (array * 255).round().astype(np.uint8))


def test_a_single_white_pixel_is_painted_and_no_other_changes():
    image, white = picture(), mask(37, 38, 90, 91)
    pixels = run(local_pipeline(), image=image, mask=white, strength=1.0, output_type="pt")[0]
    changed = (pixels != pixels_of(image)).any(dim=0)
    assert changed.nonzero().tolist() == [[37, 90]]


def test_a_white_mask_is_image_to_image(pipe):
    kwargs = {"image": picture(), "strength": 0.7, "output_type": "pt"}
    expected = run(pipe, **kwargs, generator=generators(1)[0])
    white = Image.new("L", (160, 96), 255)
    assert torch.equal(run(pipe, **kwargs, mask=white, generator=generators(1)[0]), expected)


def test_at_full_strength_nothing_is_left_of_what_was_under_the_mask():
    pipe, image, white = local_pipeline(), torch.randn(4, 12, 20), mask(40, 64, 16, 48)
    other = image.clone()
    other[:, 5:8, 2:6] += 10  # the latents of the mask
    one, two = (
        run(pipe, image=x, mask=white, strength=1.0, generator=generators(0)[0])[0] for x in (image, other)
    )
    assert torch.equal(one, two)
    partly = run(pipe, image=other, mask=white, strength=0.7, generator=generators(0)[0])[0]
    assert not torch.equal(
        partly, run(pipe, image=image, mask=white, strength=0.7, generator=generators(0)[0])[0]
    )


def test_around_the_mask_a_stretched_picture_is_what_it_is_stretched_to():
    image, white = picture(size=(50, 83)), mask(20, 30, 40, 47, size=(50, 83))
    pixels = run(local_pipeline(), image=image, mask=white, height=96, width=160, output_type="pt")
    stretched = resize_images([pixels_of(image)], 96, 160)
    outside = ~resize_masks(read_masks(white), 96, 160)[0, 0]
    assert torch.equal(pixels[..., outside], stretched[..., outside])
    assert not torch.equal(pixels[..., ~outside], stretched[..., ~outside])


# --- What the transformer sees and computes


@every_scheduler
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_outside_the_mask_is_the_picture_at_the_noise_of_each_time(name, config, strength):
    """And inside, the oracle's picture comes out. In all calls, those in the middle of a step included."""
    pipe, flow = build(name, config), is_flow(name, config)
    image, noise, wanted = (0.5 * torch.randn(3, 4, 6, 8)).unbind()
    calls = install_oracle(pipe, wanted, flow)
    white = mask(10, 30, 20, 40, (48, 64))
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:4, 2:5] = True
    latents = run(
        pipe, image=image, mask=white, strength=strength, latents=noise[None], num_inference_steps=10
    )[0]
    # The times of some schedulers are whole numbers, and their levels those between.
    tolerance = 0.02 if "use_flow_sigmas" in config else 3e-3
    for call in calls:
        share, noise_share = levels(call["timestep"][0], flow)
        expected = share * image + noise_share * noise
        seen = call["hidden_states"][0]
        torch.testing.assert_close(seen[:, ~inside], expected[:, ~inside].float(), rtol=0, atol=tolerance)
    assert torch.equal(latents[:, ~inside], image[:, ~inside])
    torch.testing.assert_close(latents[:, inside], wanted[:, inside], rtol=0, atol=max(tolerance, 1e-3))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_the_part_alone_gives_the_latents_of_the_whole(name, monkeypatch):
    pipe = build(name, {})
    pipe.transformer = toy_transformer(global_context=False, window_size=2)
    calls = spy(pipe)
    kwargs: dict[str, Any] = {"image": picture(), "mask": mask(), "strength": 1.0}
    alone = run(pipe, **kwargs, generator=generators(0)[0])
    assert len({id(call["region"]) for call in calls}) == 1  # one plan for all steps
    assert calls[0]["region"].share < 0.5
    calls.clear()
    monkeypatch.setattr(pipe.transformer, "plan_region", lambda *_: None)
    whole = run(pipe, **kwargs, generator=generators(0)[0])
    assert "region" not in calls[0]
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)


def test_with_global_context_only_a_halo_saves_work():
    pipe = local_pipeline(global_context=True)
    calls = spy(pipe)
    kwargs: dict[str, Any] = {"image": picture(), "mask": mask(), "num_inference_steps": 1, "strength": 1.0}
    run(pipe, **kwargs)
    run(pipe, **kwargs, mask_halo=1)
    assert "region" not in calls[0]
    # The mask touches the tokens of rows 2 and 3 and columns 1 to 3; a window is 2 tokens.
    assert calls[1]["region"].share == 6 * 6 / 60


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_picture_of_a_batch_is_the_one_made_alone(guidance):
    """With pictures and masks of their own, though the transformer computes one part for all."""
    pipe = local_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler()
    images, masks = [picture(1), picture(2)], [mask(), mask(0, 7, 150, 160)]
    prompts = ["a blue star", "a red circle"]
    kwargs: dict[str, Any] = {"guidance_scale": guidance, "strength": 0.8}
    batch = run(
        pipe,
        prompts,
        image=images,
        mask=masks,
        num_images_per_prompt=2,
        generator=generators(0, 1, 2, 3),
        **kwargs,
    )
    for i in range(4):
        alone = run(
            pipe,
            prompts[i // 2],
            image=images[i // 2],
            mask=masks[i // 2],
            generator=generators(i)[0],
            **kwargs,
        )
        torch.testing.assert_close(batch[i], alone[0], rtol=0, atol=1e-4 * alone.abs().max().item())
    shared = run(pipe, prompts, image=images[0], mask=masks[1], generator=generators(0, 1), **kwargs)
    alone = run(pipe, prompts[1], image=images[0], mask=masks[1], generator=generators(1)[0], **kwargs)
    torch.testing.assert_close(shared[1], alone[0], rtol=0, atol=1e-4 * alone.abs().max().item())


def test_a_callback_sees_the_picture_around_the_mask_and_may_stop_the_call():
    pipe, image, white, seen = local_pipeline(), picture(), mask(), []

    def stop(pipe: LocalDiTPipeline, index: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        pipe._interrupt = index == 1
        return tensors

    pixels = run(pipe, image=image, mask=white, strength=1.0, callback_on_step_end=stop, output_type="pt")[0]
    assert len(seen) == 2
    assert torch.equal(pixels[:, ~white], pixels_of(image)[:, ~white])


# --- Masks


def test_masks_of_every_kind_are_read_alike():
    white = mask()
    grey = np.where(white, 128, 127).astype(np.uint8)  # the edge between white and black
    pil = Image.fromarray(white)
    tensor = torch.from_numpy(white)
    kinds = [white, grey, white[:, :, None], white * 1.0, white[None, :, :, None], pil]
    kinds += [pil.convert("L"), pil.convert("RGB"), tensor, tensor[None], tensor[None, None].float(), [pil]]
    for kind in kinds:
        (read,) = read_masks(kind)
        assert torch.equal(read, tensor[None])


@pytest.mark.parametrize("size", [(12, 20), (96, 160), (7, 9), (101, 333)])
def test_no_white_pixel_is_lost_in_stretching(size):
    for seed in range(3):
        white = np.zeros(SIZE, dtype=bool)
        row, column = np.random.default_rng(seed).integers((0, 0), SIZE)
        white[row, column] = True
        small = resize_masks(read_masks(white), *size)
        assert small.shape == (1, 1, *size)
        where = small[0, 0].nonzero()
        low = torch.tensor([row * size[0] // SIZE[0], column * size[1] // SIZE[1]])
        assert (where == low).all(dim=1).any()
        assert ((where - low) * torch.tensor(SIZE) <= torch.tensor(size) + torch.tensor(SIZE)).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image": None}, "mask must come with image"),
        ({"mask": mask(size=(96, 159))}, r"the image's height and width, \(96, 160\), got \(96, 159\)"),
        ({"image": torch.randn(4, 6, 10)}, r"height and width, \(48, 80\), got \(96, 160\)"),
        ({"mask": [mask(), mask(), mask()]}, "mask must be one or 1, one for each prompt, got 3"),
        ({"mask": mask().astype(np.uint8)}, "mask must have a white pixel"),  # 1 of 255
        (
            {"mask": mask().astype(np.int64)},
            "mask must be bool, uint8, uint16 or floating point, got torch.int64",
        ),
        ({"mask": mask() * 255.0}, r"mask must lie in \[0, 1\]"),
        ({"mask": "mask.png"}, "mask must be a PIL image, an array, a tensor or a list of these, got str"),
        ({"mask": None, "mask_halo": 1}, "mask_halo must be None without a mask, got 1"),
        ({"mask_halo": -1}, "mask_halo must be a number of windows from 0, or None, got -1"),
        ({"mask_halo": 0.5}, "mask_halo must be a number of windows from 0, or None, got 0.5"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_before_the_transformer_runs(pipe, kwargs, message):
    calls = spy(pipe)
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"image": picture(), "mask": mask()} | kwargs)
    assert not calls
