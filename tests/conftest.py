"""Settings every test directory shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples on every run, so that a failure can be run again; no deadline, because machines share their cores.
settings.register_profile("zipvl", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("zipvl")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
    yield
