"""The EDM loss against recorded numbers, against a model that predicts zero, and over kept tokens alone."""

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from toy_sparse import TOY, pseudo_random, recorded_model, toy_sparse

from localdit.models.sparse_dit import SparseDiTTransformer2DModel
from localdit.schedulers.edm_heun import EDMHeunScheduler
from localdit.training.edm import EDM, edm_loss, edm_sigma, kept_mean
from localdit.training.objectives import build_objective
from localdit.training.order import Draws

DATA = {"source": "scenes:4", "cache": "nowhere", "pipeline": "SparseDiTPipeline"}
HEUN = {"_class_name": "EDMHeunScheduler", "sigma_data": 0.9}


def objective(**fields: Any) -> EDM:
    found = build_objective({"name": "edm", "data": DATA, "scheduler": HEUN, **fields})
    assert isinstance(found, EDM)
    return found


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed, range(count), torch.device("cpu"))


def recorded(**kwargs: Any) -> Tensor:
    latents, noise = (3 * pseudo_random(i, (2, 4, 8, 8)).float() for i in (1001, 1006))
    text = 2 * pseudo_random(1002, (2, 1, 5, 24))[:, 0].float()
    sigma = edm_sigma(2 * pseudo_random(1005, (2, 1, 1, 1)).flatten().float(), -0.6, 1.2)
    assert sigma.tolist() == pytest.approx([0.577138, 0.192673], abs=1e-6)
    return edm_loss(recorded_model().train(), latents, sigma, noise, encoder_hidden_states=text, **kwargs)


def test_the_recorded_losses_come_out():
    assert recorded().shape == (2,)
    assert recorded().mean().item() == pytest.approx(1.192814, rel=1e-4)
    mask_noise = pseudo_random(1003, (2, 16)).float() + 0.5
    masked = recorded(mask_ratio=0.75, mask_noise=mask_noise)
    assert masked.mean().item() == pytest.approx(1.106300, rel=1e-4)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize(("mean", "std"), [(-0.6, 1.2), (0.0, 0.6)])
def test_a_fresh_model_scores_one(mean, std, mask_ratio):
    """Whatever the noise, on latents of variance 0.81."""
    small = {"hidden_size": 16, "num_layers": 2, "mixer_num_layers": 0, "caption_channels": 4}
    model = SparseDiTTransformer2DModel(**TOY | small).train()
    latents, noise = 0.9 * torch.randn(4096, 4, 8, 8), torch.randn(4096, 4, 8, 8)
    sigma = edm_sigma(torch.randn(4096), mean, std)
    text = torch.randn(4096, 1, 4)
    with torch.no_grad():
        parts = [
            edm_loss(model, x, s, n, encoder_hidden_states=y, mask_ratio=mask_ratio)
            for x, s, n, y in zip(*(whole.chunk(8) for whole in (latents, sigma, noise, text)))
        ]
    assert torch.cat(parts).mean().item() == pytest.approx(1.0, abs=0.02)


def test_a_perfect_model_scores_nothing():
    """One that knows the clean latents, whatever is done to them by the preconditioning."""
    latents, noise = torch.randn(3, 4, 6, 10), torch.randn(3, 4, 6, 10)
    sigma = edm_sigma(torch.randn(3), -0.6, 1.2)

    def oracle(x: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        level = (4 * timestep).exp()[:, None, None, None]
        total = level**2 + 0.25
        noisy = x * total.sqrt()
        torch.testing.assert_close(noisy, latents + level * noise)
        return ((latents - 0.25 / total * noisy) * total.sqrt() / (0.5 * level),)

    assert edm_loss(oracle, latents, sigma, noise, sigma_data=0.5).max().item() < 1e-10


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_the_mean_is_over_the_kept_tokens_of_each_sample(patch):
    error, mask = torch.rand(3, 4, 2 * patch, 5 * patch), torch.zeros(3, 10)
    mask[0, 1:] = mask[1, :4] = 1
    mask[2, 9] = 1
    samples = []
    for b in range(3):
        tokens = [
            error[b, :, patch * (i // 5) :, patch * (i % 5) :][:, :patch, :patch].mean() for i in range(10)
        ]
        samples.append(torch.stack([token for token, gone in zip(tokens, mask[b]) if not gone]).mean())
    torch.testing.assert_close(kept_mean(error, mask), torch.stack(samples))
    torch.testing.assert_close(kept_mean(error, 0 * mask), error.mean((1, 2, 3)))
    torch.testing.assert_close(kept_mean(error, None), error.mean((1, 2, 3)))


def test_dropped_patches_of_the_target_do_not_count():
    error = torch.rand(2, 4, 8, 8)
    mask = (torch.rand(2, 16).argsort(1) >= 4).float()
    spoiled = error + 100 * mask.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(kept_mean(spoiled, mask), kept_mean(error, mask))
    assert (kept_mean(spoiled, None) > kept_mean(error, None) + 50).all()


def test_the_levels_of_training_are_log_normal_and_those_of_validation_their_deciles():
    edm = objective(sigma_mean=-0.6, sigma_std=1.2)
    log_sigma = edm.levels(draws(4000)).log()
    assert log_sigma.shape == (4000,)
    assert log_sigma.mean().item() == pytest.approx(-0.6, abs=0.06)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.04)
    measured = edm.validation_levels()
    assert list(measured)[:2] == ["sigma 0.0762", "sigma 0.158"]
    below = (log_sigma.exp() < torch.tensor(list(measured.values()))[:, None]).float().mean(1)
    torch.testing.assert_close(below, torch.arange(0.05, 1, 0.1), atol=0.02, rtol=0)


def test_the_model_is_masked_in_training_alone_and_by_the_draws():
    model = toy_sparse().train()
    edm = objective(mask_ratio=0.75)
    edm.patch_size = 2
    inputs = torch.randn(3, 4, 6, 10), torch.randn(3, 4, 6, 10), torch.rand(3) + 0.1
    text = torch.randn(3, 5, 24)
    found = edm.errors(model, *inputs, draws(3), encoder_hidden_states=text)
    clean, noise, sigma = inputs
    by_hand = {"mask_ratio": 0.75, "mask_noise": draws(3).uniform(15), "encoder_hidden_states": text}
    assert torch.equal(found, edm_loss(model, clean, sigma, noise, **by_hand))
    assert torch.equal(found, edm.errors(model, *inputs, draws(3), encoder_hidden_states=text))
    assert not torch.equal(found, edm.errors(model, *inputs, draws(3, seed=1), encoder_hidden_states=text))
    model.eval()
    whole = edm.errors(model, *inputs, draws(3), encoder_hidden_states=text)
    assert torch.equal(whole, edm_loss(model, clean, sigma, noise, encoder_hidden_states=text))


def test_what_cannot_be_trained_or_sampled_together_is_an_error():
    objective().use_scheduler(EDMHeunScheduler(sigma_data=0.9))
    with pytest.raises(
        ValueError, match=r"scheduler\.sigma_data must be objective\.sigma_data, 0\.9, got 0\.5"
    ):
        objective().use_scheduler(EDMHeunScheduler())
    for other in (
        EDMHeunScheduler(sigma_data=0.9, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(),
    ):
        with pytest.raises(
            ValueError, match=r"scheduler must be an EDM scheduler with the prediction_type eps"
        ):
            objective().use_scheduler(other)
    with pytest.raises(ValueError, match=r"mask_ratio must be at least 0 and below 1, got 1\.0"):
        objective(mask_ratio=1)
    with pytest.raises(ValueError, match=r"sigma_data must be positive, got 0\.0"):
        objective(sigma_data=0.0)
