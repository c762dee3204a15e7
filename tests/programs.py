"""The programs of examples/cpp, for the tests that run them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from tests.compiled import compiled
from zipvl import _library

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "cpp"
TORCH = Path(torch.__file__).parent


def build(name: str, folder: Path) -> Path:
    """``examples/cpp/NAME.cpp``, built in ``folder`` by the compiler alone (``CXX``, g++)."""
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    cuda = ["-ltorch_cuda", "-lc10_cuda"] if torch.version.cuda else []
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,--no-as-needed"]
    libraries += ["-ltorch", "-ltorch_cpu", *cuda, "-lc10", "-ldl"]
    target, compiler = folder / name, os.environ.get("CXX", "g++")
    program = compiled(compiler, EXAMPLES / f"{name}.cpp", ["-std=c++20", "-O0", "-w", *includes])
    done = subprocess.run(
        [compiler, str(program), "-o", str(target), *libraries], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(
    program: Path, model: Path, tensors: list[Tensor], folder: Path, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    """``model`` on ``tensors`` by ``program``, which leaves what it found in ``folder / "outputs.pt"``."""
    torch.save([tensor.cpu() for tensor in tensors], folder / "inputs.pt")
    libraries = [str(_library.ops_library_path())]
    if device == "cuda":
        libraries.append(str(_library.cuda_library_path()))
    files = [model, folder / "inputs.pt", folder / "outputs.pt"]
    command = [str(program), ":".join(libraries), *map(str, files), device]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
