"""What the tests of the models share."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code and the count of recompilations belong to one test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def default_backend() -> Iterator[None]:
    """Diffusers makes the last backend that was set for any model the default of all: put it back."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)
