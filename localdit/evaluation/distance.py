"""FID and KID: how far the features of made pictures lie from those of real ones.

torchmetrics computes both distances, in float64, from features that are extracted once. The extractor is
the InceptionV3 of the FID paper (Heusel et al. 2017), as torch-fidelity took it over from TensorFlow. All
pictures come to it resized in the one way that Parmar et al. 2022 ("clean-fid") recommend; see `resize`.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from localdit.evaluation.folders import read_batches

SIZE = 299  # side of what InceptionV3 takes, in pixels
# Of the one file whose numbers can be compared, weights-inception-2015-12-05-6726825d.pth.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class Inception(nn.Module):
    """The 2048 pooled features of torch-fidelity's InceptionV3, of pictures that are resized already.

    The network's own `forward` takes bytes and resizes them itself, without antialiasing.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        # They stand in the order in which they run; the classifier comes last.
        self.layers = nn.Sequential(*[layer for name, layer in network.named_children() if name != "fc"])

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: (B, 3, 299, 299), from 0 to 255. Returns (B, 2048)."""
        return self.layers((pictures - 128) / 128).flatten(1)


def load_inception(weights: Path | None = None) -> Inception:
    """Load the published InceptionV3.

    Args:
        weights: The published file. None takes it from PyTorch's cache, or downloads it.

    Raises:
        ImportError: torchmetrics or torch-fidelity is not installed.
        ValueError: The weights are not there, cannot be downloaded, or are not the published ones.
    """
    if not all(importlib.util.find_spec(name) for name in ("torchmetrics", "torch_fidelity")):
        raise ImportError(
            "FID and KID need torchmetrics and torch-fidelity, of the extra 'eval': "
            "pip install 'localdit[eval]'"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = weights or Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2])
    if weights is None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=WEIGHTS_SHA256)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"InceptionV3's weights could not be downloaded ({error}): fetch {URL_INCEPTION_V3} "
                "elsewhere and name the file with --inception"
            ) from None
    if not path.is_file():
        raise ValueError(f"{path} is no file: it should hold InceptionV3's weights, {URL_INCEPTION_V3}")
    # torch-fidelity unpickles whatever the file holds, code included. This file holds none.
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WEIGHTS_SHA256:
            raise ValueError(
                f"{path} does not hold the published weights, with which alone numbers can be compared: "
                f"fetch {URL_INCEPTION_V3}"
            )
    return Inception(FeatureExtractorInceptionV3("inception", ["2048"], str(path))).eval()


def resize(picture: Image.Image) -> NDArray[np.float32]:
    """A picture as (3, 299, 299), from 0 to 255: bicubic, antialiased, and not rounded to bytes.

    The sides are scaled independently, as in every published FID: what is not square is squeezed.
    """
    bands = [
        band.convert("F").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for band in picture.convert("RGB").split()
    ]
    return np.stack([np.asarray(band) for band in bands])


@torch.no_grad()
def extract_features(
    paths: Sequence[Path],
    extractor: nn.Module,
    bad: dict[Path, str],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    title: str = "features",
) -> Tensor:
    """Features of pictures, (N, D), float32, on the CPU.

    Args:
        paths: The pictures.
        extractor: Makes (B, D) of (B, 3, 299, 299), from 0 to 255.
        bad: Takes the pictures that cannot be read, which have no features, and why.
        batch_size: Pictures at a time.
        device: Where the extractor runs.
        title: Of the progress bar.

    Raises:
        ValueError: Fewer than two of the pictures can be read.
    """
    extractor = extractor.to(device).eval()
    features: list[Tensor] = []
    # TF32, which cuDNN would choose, costs three of seven digits.
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        tqdm(total=len(paths), desc=title, unit="picture", disable=None) as bar,
    ):
        for found, batch in read_batches(paths, batch_size, resize, bad):
            features.append(extractor(torch.from_numpy(np.stack(batch)).to(device)).float().cpu())
            bar.update(len(found))
    if sum(map(len, features)) < 2:
        reasons = "; ".join(f"{path} {bad[path]}" for path in paths if path in bad)
        raise ValueError(f"fewer than 2 of {len(paths)} pictures can be read: {reasons}")
    return torch.cat(features)


class _Given(nn.Identity):
    """Stands for the extractor where torchmetrics is given features instead of pictures."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(reference: Tensor, made: Tensor) -> float:
    """FID of two sets of features, (N, D) and (M, D): between Gaussians of their means and covariances."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # One process has all the features: it must not wait for others to bring theirs.
    metric = FrechetInceptionDistance(feature=_Given(reference.shape[1]), sync_on_compute=False)
    for features, real in ((reference, True), (made, False)):
        for part in features.split(8192):
            metric.update(part.double(), real=real)
    return float(metric.compute())


def kernel_distance(reference: Tensor, made: Tensor) -> tuple[float, float | None]:
    """KID of two sets of features, (N, D) and (M, D), and its standard deviation over the subsets.

    The squared maximum mean discrepancy under the kernel (x·y / D + 1)^3 (Binkowski et al. 2018): the mean
    over 100 subsets of 1000 of each set, or of as many as the smaller set has. The draw is always the same.
    Subsets that are the whole set do not differ: then there is no deviation to tell, and it is None.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    smaller = min(len(reference), len(made))
    size = min(KID_SUBSET_SIZE, smaller)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")  # it keeps features
        metric = KernelInceptionDistance(
            feature=_Given(reference.shape[1]), subsets=KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
        metric.update(reference.double(), real=True)
        metric.update(made.double(), real=False)
        torch.default_generator.manual_seed(0)
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if smaller > size else None


def compare(
    reference: Sequence[Path],
    made: Sequence[Path],
    extractor: nn.Module,
    bad: dict[Path, str],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float | None], dict[str, Any], list[str]]:
    """Measure FID and KID between two sets of pictures. See `extract_features` for the arguments.

    Returns:
        `fid`, `kid` and `kid_std`; what they were computed with; and what has to be known of them.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "device": device}
    real = extract_features(reference, extractor, bad, title="reference", **options)
    ours = extract_features(made, extractor, bad, title="pictures", **options)
    kid, deviation = kernel_distance(real, ours)
    figures = {"fid": frechet_distance(real, ours), "kid": kid, "kid_std": deviation}
    computed_with = {
        "reference_pictures": len(real),
        "pictures": len(ours),
        "extractor": type(extractor).__name__,
        "extractor_weights_sha256": WEIGHTS_SHA256 if isinstance(extractor, Inception) else None,
        "features": real.shape[1],
        "resize": f"{SIZE}x{SIZE}, bicubic, antialiased (Pillow), not rounded, ratio not kept",
        "kid_subsets": KID_SUBSETS,
        "kid_subset_size": min(KID_SUBSET_SIZE, len(real), len(ours)),
    }
    return figures, computed_with, _small_sample(len(real), len(ours), real.shape[1])


def _small_sample(reference: int, made: int, features: int) -> list[str]:
    """What to say of an FID of so few pictures that it means little."""
    if min(reference, made) > features:
        return []
    return [
        f"FID of {made:,} pictures against {reference:,} comes out too large, by how much depends on these "
        f"numbers: below {features + 1:,} on each side the covariance of {features:,} features is singular. "
        "Compare it only with FIDs of as many pictures, or go by KID, which has no such bias"
    ]
