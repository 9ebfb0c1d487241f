"""What holds for every test: no network, one thread, a seed of its own, and Triton in its interpreter."""

import os
import sys
from pathlib import Path

# Read by the libraries when they are imported, so set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Toy sizes gain nothing from threads, and the processes of pytest-xdist would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import zlib

import pytest
import torch
from accelerate.utils import set_seed

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


sys.path.append(str(Path(__file__).parent / "pipelines"))  # for the toy pipeline, which other folders use too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Random inputs differ between tests, and are the same whenever one test runs, alone or among others."""
    set_seed(zlib.crc32(request.node.nodeid.encode()))
