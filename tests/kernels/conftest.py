"""CUDA tests are skipped where there is no device; a run with one is recorded in benchmarks/results/gpu_tests.jsonl,
unless ``ZIPVL_RECORD_GPU_TESTS`` is 0."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch


def _share_the_machine() -> None:
    """Workers of pytest-xdist begin with different GPUs, where there are several, and have their share of the cores for
    the references. To be done before anything asks CUDA for its devices."""
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    if not worker.startswith("gw"):
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))
    if torch.cuda.is_initialized() or (count := torch.cuda.device_count()) < 2:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    first = int(worker.removeprefix("gw")) % count
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first:] + visible[:first])


_share_the_machine()

from benchmarks import _record  # noqa: E402
from zipvl import _library  # noqa: E402

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None if torch.cuda.is_available() else "no CUDA device"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _cuda_library_is_loaded() -> None:
    """A device without zipvl's CUDA library is a broken installation, not a reason to skip."""
    assert _library.cuda_library_error() is None, _library.cuda_library_error()


class _Outcomes:
    """How many of these tests passed, failed and were skipped; a file that cannot be collected is one that failed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and _is_here(report):
            self.counts["failed"] += 1

    def pytest_runtest_logreport(self, report: Any) -> None:
        if _is_here(report) and (report.when == "call" or report.failed):
            self.counts[report.outcome] += 1


def _is_here(report: Any) -> bool:
    return str(HERE.relative_to(HERE.parent.parent)) in report.nodeid


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Outcomes(), "zipvl-gpu-outcomes")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # a worker of pytest-xdist: the process that started it counts the tests of all workers
    if os.environ.get("ZIPVL_RECORD_GPU_TESTS") == "0":
        return
    outcomes = session.config.pluginmanager.get_plugin("zipvl-gpu-outcomes")
    if torch.cuda.is_available() and outcomes is not None and sum(outcomes.counts.values()):
        _record.append("gpu_tests", {"tests": outcomes.counts}, device="cuda")
