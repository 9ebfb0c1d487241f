"""The alignment of tokens with the features of another network: its errors, its head, and the network."""

from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, T5Config

from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.training.alignment import (
    Alignment,
    AlignmentConfig,
    AlignmentHead,
    FeatureNetwork,
    alignment_errors,
)
from localdit.training.flow import flow_errors, model_time, noisy_sample


def test_the_published_heads_have_the_published_size():
    """With the text model's, the published count is 1,311,388,547."""
    with torch.device("meta"):
        head = AlignmentHead(1536, 2048)
        model = PixelDiTTextTransformer2DModel()
        class_head = AlignmentHead(1152, 1152)
    count = sum(p.numel() for p in head.parameters())
    assert count == 8_917_760
    assert count + sum(p.numel() for p in model.parameters()) == 1_311_388_547
    assert [tuple(p.shape) for p in class_head.parameters() if p.ndim == 2] == [
        (1152, 1152),
        (1152, 1152),
        (768, 1152),
    ]


def test_alignment_is_one_minus_the_cosine():
    features = torch.randn(2, 6, 5)
    grid = (2, 3)
    assert alignment_errors(3 * features, grid, features, grid).abs().max() < 1e-6
    torch.testing.assert_close(alignment_errors(-features, grid, features, grid), torch.full((2,), 2.0))
    other = torch.randn(2, 6, 5)
    by_hand = [
        sum(1 - a @ b / (a.norm() * b.norm()) for a, b in zip(*tokens)) / 6 for tokens in zip(other, features)
    ]
    torch.testing.assert_close(alignment_errors(other, grid, features, grid), torch.stack(by_hand))


def test_tokens_on_another_grid_are_pooled_or_interpolated():
    """On a finer grid four tokens count as their mean; on a coarser one neighbours are mixed."""
    fine = torch.randn(1, 2, 2, 3, 2, 5)  # (B, h, 2, w, 2, F)
    coarse = fine.mean((2, 4)).flatten(1, 2)
    tokens = fine.flatten(3, 4).flatten(1, 3)
    assert alignment_errors(tokens, (4, 6), coarse, (2, 3)) < 1e-6
    two = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # a row of two tokens
    four = torch.tensor([[[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]])
    assert alignment_errors(two, (1, 2), four, (1, 4)) < 1e-6


@pytest.mark.parametrize("direction", ["data", "noise"])
def test_alignment_reads_the_block_that_is_asked_for_and_trains_it(direction):
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8,
             "num_pixel_layers": 1, "pixel_dim": 4}  # fmt: skip
    model: Any
    if direction == "data":
        model = PixelDiTTransformer2DModel(**sizes, num_classes=5)
        condition = {"class_labels": torch.tensor([1, 2])}
    else:
        model = PixelDiTTextTransformer2DModel(
            **sizes,
            pixel_num_attention_heads=1,
            pixel_attention_head_dim=8,
            caption_channels=6,
            max_text_tokens=4,
        )
        condition = {"encoder_hidden_states": torch.randn(2, 4, 6)}
    data, noise, sigma = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), torch.tensor([0.4, 0.7])
    features, head = torch.randn(2, 6, 7), AlignmentHead(16, 10, 7)
    plain = flow_errors(model, data, noise, sigma, direction, **condition)
    tokens = model(
        noisy_sample(data, noise, sigma), model_time(sigma, direction), return_hidden_state_of=2, **condition
    ).hidden_state
    extra = alignment_errors(head(tokens), (2, 3), features, (2, 3))
    head.attach(model)
    alignment = Alignment(block=2, features=features, grid=(2, 3))
    whole = flow_errors(model, data, noise, sigma, direction, alignment, **condition)
    torch.testing.assert_close(whole, plain + 0.5 * extra)
    whole.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    assert model.transformer_blocks[0].modulation.weight.grad.abs().max() > 0
    later = model.transformer_blocks[2].modulation.weight.grad
    assert later is None or not later.any()  # the prediction is zero still, and this block comes after


@pytest.mark.parametrize(
    ("projected", "features", "message"),
    [
        ((2, 5, 3), (2, 6, 3), r"projected must be \(batch, 2 \* 3, channels\) .* got \(2, 5, 3\)"),
        ((2, 6, 3), (2, 7, 3), r"features must be .* got \(2, 7, 3\)"),
        ((2, 6, 3), (2, 6, 4), r"must agree in batch and channels, got \(2, 6, 3\) and \(2, 6, 4\)"),
        ((1, 6, 3), (2, 6, 3), "must agree in batch and channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(projected, features, message):
    with pytest.raises(ValueError, match=message):
        alignment_errors(torch.randn(projected), (2, 3), torch.randn(features), (2, 3))


# --- The network


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A small random DINOv2, on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def network(folder, patch_size: int = 4, **config: Any) -> FeatureNetwork:
    return FeatureNetwork(AlignmentConfig(str(folder), block=1, **config), patch_size, torch.device("cpu"))


def test_features_are_the_networks_own_of_the_normalised_picture(dinov2):
    """Patches of 14 as the network's, so that nothing is resized; what it says of the class is left out."""
    pictures = torch.rand(2, 3, 28, 42)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        states = (
            Dinov2Model.from_pretrained(dinov2)
            .eval()(((pictures.movedim(1, -1) - mean) / std).movedim(-1, 1))
            .last_hidden_state
        )
    features, grid = network(dinov2, patch_size=14)(2 * pictures - 1)
    assert grid == (2, 3)
    torch.testing.assert_close(features, states[:, 1:], rtol=1e-4, atol=1e-4)


def test_the_picture_is_resized_smoothly_so_that_the_grids_match(dinov2):
    """Bicubic weights keep a ramp a ramp: 32 pixels become 28, for 2 patches of 14 as there are 2 of 16."""
    seen, shrinking = [], network(dinov2, patch_size=16)
    shrinking.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    ramp = ((torch.arange(32) + 0.5) / 32).expand(1, 3, 48, 32)
    assert shrinking(2 * ramp - 1)[1] == (3, 2)
    shown = seen[0] * shrinking.std + shrinking.mean
    assert shown.shape == (1, 3, 42, 28)
    expected = ((torch.arange(28) + 0.5) / 28).expand_as(shown)
    torch.testing.assert_close(shown[..., 3:-3], expected[..., 3:-3], rtol=0, atol=2e-3)


def test_the_published_sizes_give_the_published_grids(dinov2):
    """The class model's pictures shrink by 14/16, so that the grids match; the text model's are shown at one
    size, whatever theirs."""
    assert network(dinov2, patch_size=16)(torch.zeros(1, 3, 256, 256))[1] == (16, 16)
    features, grid = network(dinov2, patch_size=16, picture_size=224)(torch.zeros(1, 3, 64, 128))
    assert (grid, features.shape) == ((16, 16), (1, 256, 12))


def test_a_network_that_is_none_or_brings_code_is_refused(dinov2, tmp_path):
    with pytest.raises(ValueError, match=r"alignment\.features must be a folder that exists, or OWNER/NAME"):
        network("nowhere")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="must be a vision transformer with a patch_size, got t5"):
        network(tmp_path / "t5")
    with pytest.raises(ValueError, match="picture_size must be a multiple of 14, the network's patches"):
        network(dinov2, picture_size=100)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Net"}}'
    )
    (tmp_path / "code" / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        network(tmp_path / "code")
