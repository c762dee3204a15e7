"""The way the ops go on a device whose counts the host may not read, walked on the CPU: what a GPU runs where it has no
kernel. The op tests run again in a process that forbids host reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPS = (
    "probe_scores",
    "sparse_attn",
    "pack_kv",
    "decode_attn",
    "zipvl_attn",
    "zipvl_prefill",
    "projections",
    "neighbourhood",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_host_reads() -> None:
    # --quick: one dtype a test, because what the host may not read are counts, whatever is counted; no memory tests,
    # which bound the CPU's blocks: a device's are larger.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--quick"]
    done = subprocess.run(
        [*command, *(str(HERE / f"test_{op}.py") for op in OPS)],
        env={**os.environ, "ZIPVL_NO_HOST_READS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
