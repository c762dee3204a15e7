"""Threads of the CPU tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

ALL_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Most inputs here are small, and threads that wait for one another cost several times what the work does."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(ALL_THREADS)


@pytest.fixture
def all_threads(_one_thread: None) -> None:
    """For tests that ask whether threads change the result."""
    torch.set_num_threads(ALL_THREADS)
