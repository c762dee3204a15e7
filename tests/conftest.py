"""Settings every test directory shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from tests.kernels.record import Outcomes

# The same examples on every run, so that a failure can be run again; no deadline, because machines share their cores.
settings.register_profile("zipvl", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("zipvl")

# Most inputs are small, and threads that wait for one another cost several times what the work does.
ALL_THREADS = torch.get_num_threads()
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in the processes that tests start
# Inductor compiles in this process, because each of its own would import torch, and not for speed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one dtype a test, and no test marked slow (make check)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(), "zipvl-gpu-outcomes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        items[:] = shared_out(items, getattr(config, "workerinput", {}).get("workercount", 1))
        return
    chosen: dict[object, object] = {}
    kept, left_out = [], []
    for item in items:
        assert isinstance(item, pytest.Function)
        dtype = item.callspec.params.get("dtype") if hasattr(item, "callspec") else None
        quick = chosen.setdefault(item.function, dtype) == dtype and not item.get_closest_marker("slow")
        (kept if quick else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def shared_out(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """An order in which each worker of pytest-xdist begins with its share of the slow tests, so that what it takes from
    another at the end is short: ``--dist worksteal`` cuts the list into one part a worker."""
    slow = [item for item in items if item.get_closest_marker("slow") is not None]
    fast = [item for item in items if item.get_closest_marker("slow") is None]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        own = slow[worker::workers]
        size = (len(items) - len(ordered)) // (workers - worker)
        taken = max(size - len(own), 0)
        ordered += own + fast[:taken]
        fast = fast[taken:]
    return ordered + fast


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)
    yield


@pytest.fixture
def all_threads() -> Iterator[None]:
    """For tests that ask whether threads change the result."""
    torch.set_num_threads(ALL_THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], None]], Path]:
    """``built(name, fill)`` is a folder that ``fill`` filled, once a run: the workers of pytest-xdist share it."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        target, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                target.mkdir(parents=True, exist_ok=True)
                fill(target)
                done.touch()
        return target

    return folder
