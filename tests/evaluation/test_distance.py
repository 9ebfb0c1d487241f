"""FID and KID, held to computations of their own in float64, and how pictures come to the extractor."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from localdit.evaluation import distance
from localdit.evaluation.distance import (
    Inception,
    compare,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_inception,
    resize,
)
from localdit.evaluation.folders import find_pictures

pytest.importorskip("torchmetrics")


class Extractor(nn.Module):
    """A small random one, which sees the whole picture."""

    def __init__(self, features: int = 6):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 9, stride=9),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(72, features),
        )

    def forward(self, pictures):
        return self.layers(pictures / 16)


@pytest.fixture
def extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor()


def noise_pictures(folder: Path, count: int, low: int, high: int) -> list[Path]:
    """Pictures of coloured noise, of several sizes."""
    folder.mkdir()
    random = np.random.default_rng(high)
    paths = []
    for i in range(count):
        shape = random.integers(20, 60, 2)
        color = random.integers(low, high, 3)
        array = np.clip(color + random.integers(-40, 40, (*shape, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:02}.{'png' if i % 2 else 'webp'}")
        Image.fromarray(array).save(paths[-1], lossless=True)
    return paths


@pytest.fixture
def two_sets(tmp_path) -> tuple[list[Path], list[Path]]:
    return noise_pictures(tmp_path / "real", 13, 20, 200), noise_pictures(tmp_path / "made", 11, 60, 255)


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def plain_fid(x: np.ndarray, y: np.ndarray) -> float:
    """|m - n|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), with the covariances over N - 1."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    middle = root(root(a) @ b @ root(a))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * middle))


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy, term by term."""
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return within / (n * (n - 1)) - 2 * across / n**2


def plain_resize(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        array = np.asarray(picture.convert("RGB"), np.float32)
    bands = [Image.fromarray(np.ascontiguousarray(array[..., c]), "F") for c in range(3)]
    return np.stack([np.asarray(band.resize((299, 299), Image.Resampling.BICUBIC)) for band in bands])


def test_both_distances_are_those_of_the_formulas(two_sets, extractor):
    real, made = two_sets
    bad: dict[Path, str] = {}
    figures, how, warnings = compare(real, made, extractor, bad, batch_size=7)
    with torch.no_grad():
        x, y = (
            np.concatenate([extractor(torch.from_numpy(plain_resize(path)[None])).numpy() for path in paths])
            for paths in two_sets
        )
    x, y = x.astype(np.float64), y.astype(np.float64)
    assert figures["fid"] == pytest.approx(plain_fid(x, y), rel=1e-5)
    assert figures["fid"] > 0.01
    assert figures["kid_std"] is None
    assert (how["pictures"], how["reference_pictures"], how["kid_subset_size"]) == (11, 13, 11)
    assert how["extractor"] == "Extractor"
    assert how["extractor_weights_sha256"] is None
    assert (bad, warnings) == ({}, [])


@pytest.mark.parametrize("count", [9, 40])
def test_fid_is_that_of_its_formula_for_any_number_of_features(count):
    """With 9 of 16 the covariances are singular, and the figure is finite all the same."""
    x, y = (torch.randn(count, 16) * scale + shift for scale, shift in ((1.0, 0.0), (2.0, 0.5)))
    expected = plain_fid(x.double().numpy(), y.double().numpy())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_kid_is_that_of_its_formula():
    """Sets of one subset's worth: each subset is the whole set."""
    x, y = torch.randn(11, 5), 1.5 * torch.randn(11, 5)
    kid, deviation = kernel_distance(x, y)
    assert kid == pytest.approx(plain_kid(x.double().numpy(), y.double().numpy()), rel=1e-9)
    assert deviation is None


def test_kid_of_subsets_is_the_same_each_time_and_leaves_the_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(distance, "KID_SUBSET_SIZE", 20)
    x, y = torch.randn(60, 5), torch.randn(50, 5) + 0.5
    state = torch.get_rng_state()
    kid, deviation = kernel_distance(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert kernel_distance(x, y) == (kid, deviation)
    whole = plain_kid(x[:50].double().numpy(), y.double().numpy())
    assert kid == pytest.approx(whole, rel=0.5)
    assert deviation > 0


def test_pictures_come_as_clean_fid_resizes_them(tmp_path):
    """Each band alone, in float32, antialiased; nothing is rounded or clipped."""
    stripes = np.zeros((600, 450, 3), np.uint8)
    stripes[:, ::2, 1] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    with Image.open(tmp_path / "stripes.png") as picture:
        resized = resize(picture)
    assert resized.shape == (3, 299, 299)
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized, plain_resize(tmp_path / "stripes.png"))
    assert (
        95 < resized[1].min() < resized[1].max() < 160
    )  # grey on the whole, where plain bicubic has stripes
    assert (resized[1] % 1 != 0).any()


def test_what_cannot_be_read_is_listed_and_the_rest_is_measured(two_sets, extractor):
    real, _ = two_sets
    whole = extract_features(real, extractor, {})
    real[3].write_bytes(b"")
    real[5].write_bytes(real[5].read_bytes()[:60])
    real[8].write_text("no picture")
    bad: dict[Path, str] = {}
    kept = extract_features(real, extractor, bad, batch_size=4)
    assert bad.keys() == {real[3], real[5], real[8]}
    assert bad[real[3]] == "is empty"
    rest = [i for i in range(13) if i not in (3, 5, 8)]
    torch.testing.assert_close(kept, whole[rest])

    for path in real[1:]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"fewer than 2 of 13 pictures can be read: .*01\.png is empty; "):
        extract_features(real, extractor, {})


def test_too_few_pictures_for_an_fid_are_said_to_be_too_few(two_sets, extractor):
    real, made = two_sets
    warnings = compare(real, made[:6], extractor, {})[2]
    assert len(warnings) == 1
    assert warnings[0].startswith("FID of 6 pictures against 13 comes out too large")
    assert "below 7 on each side the covariance of 6 features is singular" in warnings[0]
    assert compare(real, made[:7], extractor, {})[2] == []


def test_a_folder_gives_all_its_pictures_and_nothing_else(tmp_path):
    for name in ("b.PNG", "a/c.jpeg", "a/d/e.webp", "f.tiff", "notes.txt", ".hidden.png", "a/._c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_pictures(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a/c.jpeg",
        "a/d/e.webp",
        "b.PNG",
        "f.tiff",
    ]
    with pytest.raises(
        ValueError, match=r"a/d must hold 2 pictures at least \(jpg, jpeg, png, webp\), got 1"
    ):
        find_pictures(tmp_path / "a/d")
    with pytest.raises(ValueError, match="missing is no folder"):
        find_pictures(tmp_path / "missing")


# --- The published extractor --------------------------------------------------------------------------------


def test_inception_is_torch_fidelitys_without_its_resizing(monkeypatch):
    """Random weights; at 299 x 299 pixels the network's own resizing changes nothing."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    network = module.FeatureExtractorInceptionV3("inception", ["2048"])
    pictures = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = Inception(network)(pictures.float()), network(pictures)[0]
    assert ours.shape == (2, 2048)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def torch_fidelity(monkeypatch, tmp_path):
    """Stands for torch-fidelity where it is not installed: notes what it is told to load."""
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.loaded = []
    module.URL_INCEPTION_V3 = "https://example.org/weights-6726825d.pth"

    class FeatureExtractorInceptionV3(nn.Module):
        def __init__(self, name, features, path):
            super().__init__()
            module.loaded.append(path)
            self.body, self.fc = nn.Conv2d(3, 4, 299), nn.Linear(4, 2)

    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(distance.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return module


def test_only_the_published_weights_are_opened(torch_fidelity, tmp_path, monkeypatch):
    """torch-fidelity unpickles them, so that another file could run anything."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold the published weights.*6726825d"):
        load_inception(weights)
    with pytest.raises(ValueError, match=r"missing\.pth is no file: it should hold InceptionV3's weights"):
        load_inception(tmp_path / "missing.pth")
    assert torch_fidelity.loaded == []

    digest = "ee0874170b7f6f32b8c2ac9573c428d35b575270a66b757c2c0185d2bd09718d"  # of b"anything"
    monkeypatch.setattr(distance, "WEIGHTS_SHA256", digest)
    inception = load_inception(weights)
    assert torch_fidelity.loaded == [str(weights)]
    assert inception(torch.rand(2, 3, 299, 299)).shape == (2, 4)


def test_weights_are_downloaded_once_and_checked(torch_fidelity, tmp_path, monkeypatch):
    def download(url, path, hash_prefix):
        assert (url, hash_prefix) == (torch_fidelity.URL_INCEPTION_V3, distance.WEIGHTS_SHA256)
        Path(path).write_bytes(b"anything")
        downloads.append(path)

    downloads: list[str] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(
        distance, "WEIGHTS_SHA256", "ee0874170b7f6f32b8c2ac9573c428d35b575270a66b757c2c0185d2bd09718d"
    )
    for _ in range(2):
        load_inception()
    cached = str(tmp_path / "hub/checkpoints/weights-6726825d.pth")
    assert (downloads, torch_fidelity.loaded) == ([cached], [cached, cached])


def test_without_network_the_message_says_what_to_fetch(torch_fidelity, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match=r"no route.*fetch https://example\.org.* with --inception"):
        load_inception()


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(distance.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"of the extra 'eval': pip install 'localdit\[eval\]'"):
        load_inception()
