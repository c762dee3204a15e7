"""Counts the tests of this folder and records a run that had a GPU in benchmarks/results/gpu_tests.jsonl, unless
``ZIPVL_RECORD_GPU_TESTS`` is 0. tests/conftest.py registers it: the process that starts workers collects no folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


class Outcomes:
    """How many of these tests passed, failed and were skipped; a file that cannot be collected is one that failed."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and _is_here(report):
            self.counts["failed"] += 1

    def pytest_runtest_logreport(self, report: Any) -> None:
        if _is_here(report) and (report.when == "call" or report.failed):
            self.counts[report.outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # a worker of pytest-xdist: the process that started it counts the tests of all workers
        if os.environ.get("ZIPVL_RECORD_GPU_TESTS") == "0" or not sum(self.counts.values()):
            return
        if torch.cuda.is_available():
            from benchmarks import _record

            _record.append("gpu_tests", {"tests": self.counts}, device="cuda")


def _is_here(report: Any) -> bool:
    return str(HERE.relative_to(HERE.parent.parent)) in report.nodeid
