"""Files of CUDA tests are skipped where there is no device; the workers of a run share its GPUs and cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import ALL_THREADS


def _share_the_gpus() -> None:
    """Workers of pytest-xdist begin with different GPUs, where there are several. To be done before anything asks CUDA
    for its devices."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker.startswith("gw"):
        return
    if torch.cuda.is_initialized() or (count := torch.cuda.device_count()) < 2:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    first = int(worker.removeprefix("gw")) % count
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first:] + visible[:first])


_share_the_gpus()

from zipvl import _library  # noqa: E402

HERE = Path(__file__).parent
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


class NoDevice(pytest.Module):
    """A file of which nothing can run: one skip, and no time to import it and to draw up its thousands of cases."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("no CUDA device", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if torch.cuda.is_available() or parent.config.getoption("collectonly"):
        return None
    return NoDevice.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session", autouse=True)
def _cuda_library_is_loaded() -> None:
    """A device without zipvl's CUDA library is a broken installation, not a reason to skip."""
    assert _library.cuda_library_error() is None, _library.cuda_library_error()


@pytest.fixture(autouse=True)
def _share_of_the_cores() -> Iterator[None]:
    """The references are large."""
    torch.set_num_threads(max(1, ALL_THREADS // WORKERS))
    yield
    torch.set_num_threads(1)
