"""What the tests of the models share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code and the count of recompilations belong to one test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
