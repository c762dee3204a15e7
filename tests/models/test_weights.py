"""LoRA adapters and weights quantised by torchao and bitsandbytes: sparse, and at tau 1 what dense attention gives.

The packages are in ``.venv/weights``, where ``make test`` installs them, or in the environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.weights_worker import KINDS, SETTINGS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(sys.prefix) / "weights"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_right(kind: str) -> None:
    """Errors are held against those of another dense attention: quantised activations round what they are given."""
    package = kind.split()[0]
    if not (PACKAGES / package).exists() and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    path = os.pathsep.join([str(ROOT), str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.weights_worker", kind],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(SETTINGS)
    for row in rows:
        assert row["active"] and 0.1 < row["ratio"] < 0.5, row
        assert row["error"] <= 2 * row["noise"] + 1e-3 and row["same_tokens"], row
        assert row["changed"] > 1, row
