"""What ``make cuda-check`` reads out of ptxas' report and the sources, and how kernels' machine code is compared."""

from __future__ import annotations

from pathlib import Path

from tools import cuda_check, kernel_text

ROOT = Path(__file__).resolve().parents[2]

# A kernel that spills and calls a function that does not, and one that does neither.
LOG = """\
ptxas info    : Compiling entry function 'by_grid' for 'sm_90a'
ptxas info    : Function properties for by_grid
    32 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 32 bytes cumulative stack size
ptxas info    : Function properties for load_apart
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'by_block' for 'sm_80'
ptxas info    : Function properties for by_block
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers
"""


def test_a_functions_frame_does_not_hide_its_kernels() -> None:
    assert cuda_check.resources(LOG) == {
        ("by_grid", "sm_90a"): {"stack": 32, "stores": 24, "loads": 16, "registers": 128},
        ("by_block", "sm_80"): {"stack": 0, "stores": 0, "loads": 0, "registers": 72},
    }


def test_only_the_facade_names_cute_and_writes_assembly() -> None:
    assert cuda_check.outside_ptx(ROOT / "csrc") == []


def test_lines_outside_the_facade_are_found(tmp_path: Path) -> None:
    for name in ("cuda/ptx/a.cuh", "cuda/common/smem_layout.cpp", "cuda/pack_kv/a.cuh"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("#include <cute/arch/mma_sm80.hpp>\nasm(x);\n// asm\nusing cutlass::arch;\n")
    found = cuda_check.outside_ptx(tmp_path)
    assert [line.split(" ")[0] for line in found] == [f"cuda/pack_kv/a.cuh:{number}:" for number in (1, 2, 4)]


def test_renamed_kernels_are_matched_by_their_bytes() -> None:
    before = {"sm_80": {"copy": "0", "merge": "1"}, "sm_90a": {"copy": "2"}}
    after = {"sm_80": {"copy_rows": "0", "merge": "1"}, "sm_90a": {"copy_rows": "2"}}
    assert kernel_text.compare(before, after) == []


def test_every_kernel_that_differs_is_named() -> None:
    before = {"sm_80": {"copy": "0", "merge": "1", "pack": "5"}, "sm_90a": {"copy": "2"}}
    after = {"sm_80": {"copy": "9", "combine": "8", "again": "5", "twice": "5"}}
    assert kernel_text.compare(before, after) == [
        "sm_80 changed: copy",
        "sm_80 new: combine",
        "sm_80 new: twice",
        "sm_80 gone: merge",
        "sm_90a gone: copy",
    ]
