"""ZipVL attention for vision-language models (arXiv 2410.08584).

Importing this package loads ``torch.ops.zipvl`` and, where transformers is installed, registers
``attn_implementation="zipvl"``.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from zipvl import ops
from zipvl._library import ops_library_path
from zipvl.config import ZipVLConfig

try:
    __version__ = version("zipvl")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["ZipVLConfig", "__version__", "ops", "ops_library_path"]

if find_spec("transformers") is not None:
    from zipvl.cache import ZipVLCache
    from zipvl.integrations.transformers import configure, sparse
    from zipvl.stats import Stats

    __all__ += ["Stats", "ZipVLCache", "configure", "sparse"]
