"""The autoencoder's objective and its crops."""

import pytest
import torch
from diffusers import AutoencoderKL

from localdit.data.scenes import scene
from localdit.training.autoencoder import Autoencoding, SceneCrops, autoencoder_loss, edge_error


def test_the_edge_error_sees_edges_and_not_levels():
    images = torch.randn(2, 3, 16, 16)
    assert edge_error(images, images) == 0
    assert edge_error(images + 0.5, images) == pytest.approx(0, abs=1e-6)
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    assert edge_error(step, torch.zeros_like(step)) > 0.01


def test_the_loss_is_the_sum_of_its_weighted_terms_and_reaches_every_parameter():
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 16, 16)

    def loss(**weights):
        return autoencoder_loss(model, images, noise, **weights)

    plain = loss(kl_weight=0.0, edge_weight=0.0)
    with_kl = loss(kl_weight=2.0, edge_weight=0.0)
    posterior = model.encode(images).latent_dist
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    assert (with_kl - plain).item() == pytest.approx(2 * divergence.item(), rel=1e-4)
    assert loss(kl_weight=0.0, edge_weight=1.0) > plain

    with_kl.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_crop_depends_on_its_index_alone_and_shows_an_object():
    crops, again = (SceneCrops(50, seed=3, picture_size=64, crop_size=32) for _ in range(2))
    for i in (0, 7, 49):
        images = crops[i, 0]["images"]
        assert images.shape == (3, 32, 32)
        assert images.min() >= -1
        assert images.max() <= 1
        assert torch.equal(images, again[i, 5]["images"])
        assert len(images.flatten(1).unique(dim=1).T) > 1, scene(i, seed=3)
    assert not torch.equal(crops[0, 0]["images"], SceneCrops(50, 4, 64, 32)[0, 0]["images"])


def test_training_starts_from_a_narrow_posterior(tmp_path):
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    Autoencoding(scenes=2).prepare(model, tmp_path, None, None)
    posterior = model.encode(torch.rand(1, 3, 16, 16)).latent_dist
    assert posterior.std.mean() < 0.3
