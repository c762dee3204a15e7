"""CUDA kernels on a CPU, thread by thread: what can be wrong with them without a GPU (``cuda_on_cpu.h``).

The programs run the library's own launches on random shapes and compare with float64. They need g++ and CUDA's headers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.compiled import KEPT, compiled

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = KEPT / "csrc"
PROGRAMS = {
    "attention": [],
    "attention_sm90": ["cuda/pack_kv/pack_kv.cu", "cuda/sparse_attn/all_queries.cu"],
    "decode_attn": ["cuda/decode_attn/plan.cpp"],
    "probe_scores_sm90": [
        "cuda/probe_scores/plan.cpp",
        "cuda/probe_index/probe_index.cu",
        "cuda/probe_scores/rows.cu",
    ],
    "quantize_kv": ["cuda/quantize_kv/split_tokens.cu"],
    "selection": [
        "cuda/probe_scores/plan.cpp",
        "cuda/pack_kv/pack_kv.cu",
        "cuda/pack_paged/pack_paged.cu",
        "cuda/probe_index/probe_index.cu",
        "cuda/probe_scores/rows.cu",
    ],
    "selection_sm90": [],
    "window_sm90": ["cuda/pack_kv/pack_kv.cu", "cuda/sparse_attn/all_queries.cu", "cuda/sparse_attn/row_ranges.cu"],
}
# Parts of every program that no sanitizer slows down: they read a kernel's memory only where they check it themselves.
OWN = ("blocks", "products", "reference")
# What lies outside a tensor, and vectors not aligned to their size. Some compilers come without their libraries.
# To compile takes longer than to run, so checks are calls and traps, not code in place, and -Og is optimised enough.
SANITIZERS = ["-fsanitize=address,alignment", "-fsanitize-undefined-trap-on-error"]
SANITIZERS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# Of random cases; ZIPVL_SIMULATOR_SEEDS=10 asks for more.
SEEDS = [str(seed + 1) for seed in range(int(os.environ.get("ZIPVL_SIMULATOR_SEEDS", "2")))]


def cuda_headers() -> Path | None:
    """The folder of ``cuda_fp16.h``: the toolkit's, or that of the wheels of a CUDA build of torch."""
    nvcc = shutil.which("nvcc")
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders = [
        *([Path(nvcc).resolve().parents[1] / "include"] if nvcc else []),
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",
        *site.glob("*/include"),
    ]
    return next((f for f in folders if (f / "cuda_fp16.h").exists() and (f / "cuda_runtime_api.h").exists()), None)


LAUNCH = re.compile(r"([\w:]+(?:<\w+>)?)\s*<<<(.+?)>>>\((.+?)\);", re.DOTALL)


def translate() -> None:
    """Makes ``CSRC`` a copy of ``csrc`` in which launches are calls that any C++ compiler knows."""
    sources = {path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for path in [path for path in CSRC.rglob("*") if path.is_file() and path.relative_to(CSRC) not in sources]:
        path.unlink()
    for name in sources:
        text = (ROOT / "csrc" / name).read_text()
        if name.suffix in (".cu", ".cuh"):
            text = LAUNCH.sub(r"launch_of(\1, \2, \3);", text)
        if not (CSRC / name).exists() or (CSRC / name).read_text() != text:
            (CSRC / name).parent.mkdir(parents=True, exist_ok=True)
            (CSRC / name).write_text(text)


@cache
def sanitizers_work() -> bool:
    """Whether a program built with ``SANITIZERS`` runs here."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() { return 0; }")
        built = subprocess.run(["g++", *SANITIZERS, str(source), "-o", str(target)], capture_output=True, check=False)
        return built.returncode == 0 and subprocess.run([target], capture_output=True, check=False).returncode == 0


HEADERS = cuda_headers()
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the programs with"),
    pytest.mark.skipif(HEADERS is None, reason="no headers of CUDA"),
    pytest.mark.skipif(platform.system() != "Linux", reason="threads of a block are ucontext's"),
]


@pytest.fixture(scope="session")
def translated(built: Callable[[str, Callable[[Path], None]], Path]) -> None:
    built("simulator-csrc", lambda _: translate())


def build(name: str, folder: Path) -> Path:
    """The program ``name``, linked in ``folder``."""
    # An extern thread_local is shared memory here, and has no initialiser to call. Nothing throws.
    flags = ["-std=c++20", "-w", "-Wno-psabi", "-pthread", "-fno-exceptions", "-fno-extern-tls-init"]
    flags += [f"-I{path}" for path in (HERE / "include", HERE, CSRC, HEADERS)]
    # The sanitizer knows the stacks of blocks.h where they change without its help.
    sanitized = platform.machine() == "x86_64" and sanitizers_work()
    chosen = ["-Og", *SANITIZERS] if sanitized else ["-O2"]
    device_code = ["-include", "cuda_on_cpu.h"]
    objects = [compiled("g++", HERE / f"{name}.cpp", flags + chosen + device_code)]
    for source in PROGRAMS[name]:
        objects.append(compiled("g++", CSRC / source, flags + chosen + device_code * source.endswith(".cu")))
    objects += [compiled("g++", HERE / f"{own}.cpp", [*flags, "-O3", "-fopenmp-simd"]) for own in OWN]
    subprocess.run(["g++", "-pthread", *chosen, *map(str, objects), "-o", str(folder / name)], check=True)
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("probe_scores_sm90", 1),
        ("selection", 4),
        ("attention_sm90", 2),
        ("window_sm90", 2),
        ("selection_sm90", 8),
        ("decode_attn", 1),
        ("attention", 1),
        ("quantize_kv", 2),
    ],
)
def test_kernels(translated: None, name: str, cases: int, tmp_path: Path) -> None:
    program = build(name, tmp_path)
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    for seed in SEEDS:
        done = subprocess.run(
            [program, str(cases), seed], capture_output=True, text=True, check=False, env=environment, timeout=240
        )
        assert done.returncode != -signal.SIGILL, "an address is not aligned: " + done.stdout[-4000:]
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        assert done.stdout.splitlines()[-1] == "0 wrong"
