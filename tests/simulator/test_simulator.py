"""CUDA kernels on a CPU, thread by thread: what can be wrong with them without a GPU (``cuda_on_cpu.h``).

The programs run the library's own launches on random shapes and compare with float64. They need g++ and CUDA's headers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
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
# What lies outside a tensor, and vectors not aligned to their size. Some compilers come without their libraries.
SANITIZERS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"]
# A product of Hopper's is thousands of reads of shared memory, which the address sanitizer makes seven times as slow.
UNSANITIZED = ("attention_sm90", "window_sm90")


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


def translated(folder: Path) -> None:
    """Leaves a copy of ``csrc`` in which launches are calls that any C++ compiler knows in ``folder``."""
    target = folder / "csrc"
    shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True)
    for path in [*target.rglob("*.cu"), *target.rglob("*.cuh")]:
        path.write_text(LAUNCH.sub(r"launch_of(\1, \2, \3);", path.read_text()))


def works(folder: Path, flags: list[str]) -> bool:
    """Whether a program built with ``flags`` runs here."""
    source, target = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }")
    built = subprocess.run(["g++", *flags, str(source), "-o", str(target)], capture_output=True, check=False)
    return built.returncode == 0 and subprocess.run([target], capture_output=True, check=False).returncode == 0


HEADERS = cuda_headers()
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the programs with"),
    pytest.mark.skipif(HEADERS is None, reason="no headers of CUDA"),
    pytest.mark.skipif(platform.system() != "Linux", reason="threads of a block are ucontext's"),
]


@pytest.fixture(scope="session")
def program(built: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """Builds a program, once each."""

    def build(name: str, folder: Path) -> None:
        csrc = built("simulator-csrc", translated) / "csrc"
        # An extern thread_local is shared memory here, and has no initialiser to call.
        flags = ["-std=c++20", "-w", "-pthread", "-fno-extern-tls-init", "-include", "cuda_on_cpu.h"]
        flags += [f"-I{path}" for path in (HERE / "include", HERE, csrc, HEADERS)]
        chosen = ["-O2"] if name in UNSANITIZED else ["-O1", *(SANITIZERS if works(folder, SANITIZERS) else [])]

        def compiled(source: Path) -> Path:
            target = folder / f"{'_'.join(source.parts[-3:])}.o"
            done = subprocess.run(
                ["g++", *flags, *chosen, "-x", "c++", "-c", str(source), "-o", str(target)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, [HERE / f"{name}.cpp", *(csrc / source for source in PROGRAMS[name])]))
        subprocess.run(["g++", "-pthread", *chosen, *map(str, objects), "-o", str(folder / name)], check=True)

    return lambda name: built(f"simulator-{name}", lambda folder: build(name, folder)) / name


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("attention", 1),
        ("attention_sm90", 2),
        ("decode_attn", 1),
        ("probe_scores_sm90", 1),
        ("quantize_kv", 2),
        ("selection", 4),
        ("selection_sm90", 8),
        ("window_sm90", 2),
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kernels(program: Callable[[str], Path], name: str, cases: int, seed: int) -> None:
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done = subprocess.run(
        [program(name), str(cases), str(seed)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.splitlines()[-1] == "0 wrong"
