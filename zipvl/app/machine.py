"""Where a result was measured: the device, and the versions of what ran."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import torch

import zipvl

__all__ = ["device_description", "versions"]


def device_description(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The GPU's name, or the CPU's model with the number of threads PyTorch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "name": _cpu_model(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Of Python, torch, zipvl, and transformers where it is imported."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "zipvl": zipvl.__version__}
    if (transformers := sys.modules.get("transformers")) is not None:
        found["transformers"] = transformers.__version__
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
