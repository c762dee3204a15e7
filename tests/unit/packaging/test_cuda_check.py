"""What ``make cuda-check`` reads out of ptxas' report."""

from __future__ import annotations

from tools import cuda_check

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
