"""Appends results to ``benchmarks/results/NAME.jsonl``, each with the device, versions and sources it came from."""

from __future__ import annotations

import hashlib
import json
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from zipvl.app.machine import device_description, versions

__all__ = ["append", "csrc_sha256", "environment"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def append(name: str, payload: dict[str, Any], device: torch.device | str = "cpu") -> Path:
    """Adds one line, the environment and ``payload``, to the results called ``name``; returns their file.

    Args:
        name: of the file, without ``.jsonl``.
        payload: what was measured; its keys must not be those of :func:`environment`.
        device: what it was measured on.
    """
    line = environment(device)
    if clash := line.keys() & payload.keys():
        raise ValueError(f"append: payload must not set {sorted(clash)}, which the environment does")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | payload) + "\n")
    return path


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where and when a result was measured, and what the code was."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_description(device),
        "versions": versions(),
        "commit": _commit(),
        "csrc_sha256": csrc_sha256(),
    }


def csrc_sha256() -> str | None:
    """One digest of the names and contents of every file of ``csrc/``, sorted by name; None where there is no ``csrc``.

    It tells which kernels a result belongs to, also where there is no git or the working tree was not committed.
    """
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _commit() -> str | None:
    """HEAD, with ``+changes`` where ``csrc/`` or ``zipvl/`` differ from it; None without git."""
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+changes" if commit and _git("status", "--porcelain", "--", "csrc", "zipvl") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
