"""The ops as a kernel of the Hub: ``python -m tools.hub_kernel FOLDER`` builds them and lays FOLDER out.

``kernels.get_local_kernel(Path(FOLDER))`` then loads them, beside an installed zipvl and beside other builds: the ops
are ``torch.ops._zipvl_<cpu or cuda>_<digest of the sources>``. A variant serves one backend and any torch::

    FOLDER/build/torch-stable-abi210-<cpu or cuMAJORMINOR>-x86_64-linux/
        __init__.py      the functions of ops.py
        _ops.py          loads the libraries; `ops` is their namespace
        ops.py           zipvl/ops.py as it is: types, fakes, the check that nothing is differentiated
        libzipvl_ops.so  and, for cuda, libzipvl_cuda.so
        metadata.json    name, id (the namespace), license, backend, a digest of every file
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from zipvl.ops import NAMES

ROOT = Path(__file__).resolve().parents[1]

INIT = """\"\"\"The ops of zipvl as functions.\"\"\"

from .ops import {names}

__all__ = [{quoted}]
"""
OPS = """\"\"\"Loads the op libraries of this folder.\"\"\"

from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
torch.ops.load_library(_FOLDER / "libzipvl_ops.so")
if (_FOLDER / "libzipvl_cuda.so").exists() and torch.cuda.is_available():
    torch.ops.load_library(_FOLDER / "libzipvl_cuda.so")

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    \"\"\"The name of an op of this build, as torch.library takes it.\"\"\"
    return f"{namespace}::{{op_name}}"
"""


def namespace(backend: str) -> str:
    """The namespace of the ops that this checkout builds for ``cpu`` or ``cuda``: other sources, another name."""
    files = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in (*files, ROOT / "CMakeLists.txt", ROOT / "zipvl" / "ops.py"):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return f"_zipvl_{backend}_{digest.hexdigest()[:7]}"


def build(backend: str, folder: Path, work: Path) -> None:
    """Compiles the libraries in ``work`` and installs them and ``build_info.json`` in ``folder``/lib."""
    settings = {
        "Python_EXECUTABLE": sys.executable,
        "ZIPVL_CUDA": "on" if backend == "cuda" else "off",
        "ZIPVL_OP_NAMESPACE": namespace(backend),
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *defined], check=True)
    subprocess.run(["cmake", "--build", str(work), "--parallel", jobs], check=True)
    subprocess.run(["cmake", "--install", str(work), "--prefix", str(folder), "--strip"], check=True)


def variant(info: dict[str, str]) -> str:
    """The variant's folder for a build with this record (``build_info.json``)."""
    stable_abi = info["oldest_torch"].replace(".", "")
    backend = "cu" + "".join(info["cuda_compiler"].split(".")[:2]) if info["cuda_archs"] else "cpu"
    return f"torch-stable-abi{stable_abi}-{backend}-{platform.machine()}-linux"


def capabilities(info: dict[str, str]) -> list[str]:
    """The GPUs of a build as the Hub names them, 9.0a for 90a. PTX of the first architecture serves later ones."""
    archs = [re.sub(r"(\d)([a-z]?)$", r".\1\2", arch) for arch in info["cuda_archs"].split(";") if arch]
    return [f"{archs[0]}+PTX", *archs[1:]] if archs else []


def lay_out(libraries: Path, name: str, folder: Path) -> Path:
    """Fills ``folder``/build with the variant of ``libraries``.

    Args:
        libraries: a folder that CMake installed into: ``libzipvl_*.so`` and ``build_info.json``.
        name: the namespace that the libraries were compiled with.
        folder: what ``kernels.get_local_kernel`` is given.

    Returns:
        The variant's folder, made anew.
    """
    info: dict[str, str] = json.loads((libraries / "build_info.json").read_text())
    target = folder / "build" / variant(info)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for library in libraries.glob("libzipvl_*.so"):
        shutil.copy2(library, target)
    shutil.copy2(ROOT / "zipvl" / "ops.py", target)
    names = list(NAMES)
    init = INIT.format(names=", ".join(names), quoted=", ".join(f'"{op}"' for op in names))
    (target / "__init__.py").write_text(init)
    (target / "_ops.py").write_text(OPS.format(namespace=name))
    backend: dict[str, Any] = {"type": "cuda", "archs": capabilities(info)} if info["cuda_archs"] else {"type": "cpu"}
    files = {
        path.name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for path in target.iterdir()
    }
    metadata = {
        "name": "zipvl",
        "id": name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": dict(sorted(files.items()))},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="hub_kernel", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    work = ROOT / "build" / f"hub-cmake-{given.backend}"
    build(given.backend, work / "installed", work)
    print(lay_out(work / "installed" / "lib", namespace(given.backend), given.folder))
