"""Compiles the CUDA library for every architecture and checks what came out; needs nvcc, no GPU.

Checked: nothing but ``csrc/cuda/ptx`` and the proof of the shared-memory layouts names CuTe or CUTLASS or writes
assembly; every symbol the library needs is in torch (a CPU torch lacks a known few); it holds machine code for every
architecture asked for and PTX for later ones; no kernel but those of ``SPILLS`` spills registers or has a stack frame
beyond the return address of a function that it calls.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tools.kernel_text import cuobjdump

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda-check"
ARCHS = os.environ.get("ZIPVL_CUDA_ARCHS", "80;90a")
# The shims of torch/csrc/inductor/aoti_torch/c/shim.h that exist where torch was built with CUDA.
OF_CUDA_TORCH = {"aoti_torch_get_current_cuda_stream"}
# Part of a kernel's name, and the bytes of its stack frame at most. select_tokens with 16,384 tokens a block, which is
# for inputs beyond 262,144 tokens or without clusters: the keys of a thread are 64 of its 128 registers.
SPILLS = {"by_blockILi32E": 64, "by_gridILi32E": 64}
RETURN_ADDRESS = 8  # bytes
# Beside csrc/cuda/ptx: compares the layouts in shared memory with CuTe's.
LAYOUTS = Path("cuda", "common", "smem_layout.cpp")
# What only those may say.
_PTX = re.compile(r"\b(?:cute|cutlass)(?:::|/)|\basm\b")
_COMMENT = re.compile(r"//.*")
_KERNEL = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>\w+)'")
_PROPERTIES = re.compile(r"Function properties for (?P<name>\S+)")
_FRAME = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_USED = re.compile(r"Used (?P<registers>\d+) registers")


def outside_ptx(csrc: Path) -> list[str]:
    """Lines of ``csrc`` that name CuTe or CUTLASS or write assembly where only ``cuda/ptx`` and ``LAYOUTS`` may."""
    found = []
    for path in sorted(csrc.rglob("*.*")):
        if path.parent != csrc / "cuda" / "ptx" and path != csrc / LAYOUTS:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if _PTX.search(_COMMENT.sub("", line)):
                    found.append(f"{path.relative_to(csrc)}:{number}: {line.strip()}")
    return found


def compile_library() -> str:
    """Builds ``zipvl_ops`` and ``zipvl_cuda`` from scratch for the CUDA part; returns what the compilers said."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        sys.exit("cuda-check: nvcc is not on the PATH: install the CUDA toolkit (13.0 is tested)")
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), "-DZIPVL_CUDA=on", "-DZIPVL_WERROR=ON",
                 f"-DZIPVL_CUDA_ARCHS={ARCHS}", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-DCMAKE_CUDA_COMPILER={nvcc}"]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    for library in BUILD.glob("CMakeFiles/zipvl_cuda.dir/**/*.cu.o"):
        library.unlink()  # ptxas reports a kernel only when it compiles it
    build = subprocess.run(
        ["cmake", "--build", str(BUILD), "--target", "zipvl_ops", "zipvl_cuda", "--verbose"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if build.returncode != 0:
        sys.exit(f"cuda-check: the build failed\n{build.stdout}")
    return build.stdout


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """``{(kernel, architecture): {registers, stack, stores, loads}}`` out of ``ptxas -v``."""
    kernels: dict[tuple[str, str], dict[str, int]] = {}
    current: dict[str, int] = {}
    kernel = ""
    for line in log.splitlines():
        if found := _KERNEL.search(line):
            kernel = found["name"]
            current = kernels.setdefault((kernel, found["arch"]), {})
        elif found := _PROPERTIES.search(line):  # of the kernel, then of the functions that it calls
            current = current if found["name"] == kernel else {}
        for pattern in (_FRAME, _USED):
            if found := pattern.search(line):
                current.update({name: int(value) for name, value in found.groupdict().items()})
    return kernels


def check_symbols(library: Path) -> None:
    """Every symbol the library needs is found with this torch, except those that only a CUDA torch exports."""
    torch_libraries = Path(torch.__file__).parent / "lib"
    path = f"{torch_libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    found = subprocess.run(["ldd", "-r", str(library)], capture_output=True, text=True, check=True,
                           env={**os.environ, "LD_LIBRARY_PATH": path})  # fmt: skip
    missing = set(re.findall(r"undefined symbol: (\w+)", found.stdout + found.stderr))
    if torch.version.cuda is None:
        missing -= OF_CUDA_TORCH
    if missing:
        sys.exit(f"cuda-check: {library.name} needs symbols that torch {torch.__version__} lacks: {sorted(missing)}")


def check_architectures(library: Path) -> None:
    """Machine code of every architecture and PTX of the first, as cuobjdump lists them."""
    listed = subprocess.run([cuobjdump(), "--list-elf", "--list-ptx", str(library)], capture_output=True, text=True,
                            check=True).stdout  # fmt: skip
    for arch in ARCHS.split(";"):
        if f"sm_{arch}.cubin" not in listed:
            sys.exit(f"cuda-check: {library.name} holds no machine code for sm_{arch}:\n{listed}")
    if f"sm_{ARCHS.split(';')[0]}.ptx" not in listed:
        sys.exit(f"cuda-check: {library.name} holds no PTX for later architectures:\n{listed}")


def main() -> None:
    if lines := outside_ptx(ROOT / "csrc"):
        sys.exit(
            f"cuda-check: only csrc/cuda/ptx and {LAYOUTS} name CuTe and CUTLASS or write assembly\n" + "\n".join(lines)
        )
    log = compile_library()
    library = BUILD / "libzipvl_cuda.so"
    check_symbols(library)
    check_architectures(library)
    kernels = resources(log)
    if not kernels:
        sys.exit("cuda-check: ptxas reported no kernel")
    spilled = False
    for (name, arch), used in sorted(kernels.items()):
        print(f"{arch:8} {used['registers']:4} registers  {used['stack']:5} B stack  "
              f"{used['stores'] + used['loads']:5} B spilled  {name}")  # fmt: skip
        allowed = max((size for part, size in SPILLS.items() if part in name), default=RETURN_ADDRESS)
        may_spill = allowed > RETURN_ADDRESS
        spilled |= used["stack"] > allowed or (used["stores"] + used["loads"] > 0 and not may_spill)
    if spilled:
        sys.exit("cuda-check: a kernel spills registers or keeps a stack frame")
    print(f"cuda-check: {len(kernels)} kernel builds, none with spills that it should not have")


if __name__ == "__main__":
    main()
