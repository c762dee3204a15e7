"""LoRA adapters and weights quantised by torchao and bitsandbytes: sparse, and at tau 1 what dense attention gives.

The packages are in ``.venv/weights``, where ``make test`` installs them, or in the environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.weights_worker import KINDS, SETTINGS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(sys.prefix) / "weights"


@pytest.fixture(scope="module")
def answers(built: Callable[[str, Callable[[Path], None]], Path]) -> tuple[list[dict[str, Any]], str]:
    """What every kind gave, and what went wrong: all in one process, whose imports take longest."""

    def run(folder: Path) -> None:
        path = os.pathsep.join([str(ROOT), str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-m", "tests.models.weights_worker", *filter(is_there, KINDS)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        (folder / "said").write_text(done.stdout)
        (folder / "errors").write_text(done.stderr)

    folder = built("weights", run)
    lines = [line for line in (folder / "said").read_text().splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines], (folder / "errors").read_text()


def is_there(kind: str) -> bool:
    package = kind.split()[0]
    return (PACKAGES / package).exists() or importlib.util.find_spec(package) is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_right(kind: str, answers: tuple[list[dict[str, Any]], str]) -> None:
    """Errors are held against those of another dense attention: quantised activations round what they are given."""
    if not is_there(kind):
        pytest.skip(f"{kind.split()[0]} is not installed")
    rows = [row for row in answers[0] if row["kind"] == kind]
    assert len(rows) == len(SETTINGS), answers[1][-4000:]
    for row in rows:
        assert row["active"] and 0.1 < row["ratio"] < 0.5, row
        bound = 2 * row["noise"] + 1e-3
        assert row["error"] <= bound and row["same_tokens"], row
        assert row["changed"] > 1 + bound, row
