"""A fresh toy pipeline for every test of the pipelines."""

import pytest
from toy_pipeline import toy_pipeline

from localdit.pipelines import LocalDiTPipeline


@pytest.fixture
def pipe() -> LocalDiTPipeline:
    return toy_pipeline()
