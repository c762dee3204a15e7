"""ZipVL attention for vision-language models (arXiv 2410.08584).

Importing this package loads ``torch.ops.zipvl``. ``zipvl.sparse``, ``configure`` and ``ZipVLCache`` are those
of :mod:`zipvl.transformers`, which their first use imports; that registers ``attn_implementation="zipvl"``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from zipvl import ops
from zipvl._library import ops_library_path
from zipvl.config import ZipVLConfig
from zipvl.stats import Stats

if TYPE_CHECKING:
    from zipvl.transformers import ZipVLCache, configure, sparse

try:
    __version__ = version("zipvl")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "Stats",
    "ZipVLCache",
    "ZipVLConfig",
    "__version__",
    "configure",
    "ops",
    "ops_library_path",
    "sparse",
]


def __getattr__(name: str) -> Any:
    if name in ("ZipVLCache", "configure", "sparse"):
        return getattr(import_module("zipvl.transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
