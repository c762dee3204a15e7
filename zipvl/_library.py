"""Finds and loads the op libraries that hold ``torch.ops.zipvl``."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_LIBRARIES = Path(__file__).resolve().parent / "lib"
_OPS = _LIBRARIES / "libzipvl_ops.so"
_CUDA = _LIBRARIES / "libzipvl_cuda.so"
_BUILD_INFO = _LIBRARIES / "build_info.json"
_cuda_error: str | None = "not loaded yet"


def ops_library_path() -> Path:
    """The library of schemas, checks and CPU ops: what a C++ program loads before it runs a model with zipvl's ops."""
    return _OPS


def cuda_library_path() -> Path | None:
    """The library of CUDA ops, or None where this build has none."""
    return _CUDA if _CUDA.exists() else None


def cuda_library_error() -> str | None:
    """Why the CUDA ops are not loaded; None when they are."""
    return _cuda_error


def build_info() -> dict[str, str]:
    """CMake's record of this build: versions, compilers, ``cuda_archs``.

    Where no record lies beside the libraries there is one entry, ``missing``, which says so.
    """
    if not _BUILD_INFO.exists():
        return {"missing": f"{_BUILD_INFO} does not exist: the libraries came here without their record"}
    info: dict[str, str] = json.loads(_BUILD_INFO.read_text())
    return info


def load() -> None:
    """Loads the op library, and the CUDA one where this build has it and ``torch.cuda`` has a device.

    Raises:
        ImportError: the op library is missing, or this torch cannot load it.
    """
    global _cuda_error
    if not _OPS.exists():
        raise ImportError(
            f"zipvl: {_OPS} does not exist: the package was not built. Run 'pip install --no-build-isolation -e .' in "
            "the checkout, or install a wheel, and do not import zipvl from a source folder that was not built."
        )
    try:
        torch.ops.load_library(_OPS)
    except OSError as error:
        raise ImportError(
            f"zipvl: torch {torch.__version__} cannot load {_OPS} (zipvl needs torch 2.10 or newer): {error}"
        ) from error
    _cuda_error = _load_cuda()


def _load_cuda() -> str | None:
    if not _CUDA.exists():
        return "this build has no CUDA library (build with ZIPVL_CUDA=on, or where nvcc and a CUDA torch are installed)"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    try:
        torch.ops.load_library(_CUDA)
    except OSError as error:
        return f"torch {torch.__version__} cannot load {_CUDA}: {error}"
    return None
