"""`make gpu-check` where there is no GPU: what it reads, what it says, and that tests/kernels is there to be run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_check
from tools.gpu_check import Findings, kernel_name, read_logs

ROOT = Path(__file__).resolve().parents[3]
PASSED = "===== 88 passed, 1841 deselected in 71.20s (0:01:11) ====="

CLEAN = """========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
ROWS = "void zipvl::cuda::probe_rows_sm90<zipvl::cuda::RowTraits<(int)128>>(zipvl::cuda::ProbeScoresParams)"
MEMCHECK = f"""========= COMPUTE-SANITIZER
========= Invalid __shared__ write of size 4096 bytes
=========     at zipvl::cuda::select::(anonymous namespace)::by_cluster(zipvl::cuda::SelectTokensParams)+0x5f60
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x401 is out of bounds
=========
========= Invalid __global__ read of size 16 bytes
=========     at zipvl::cuda::copy(unsigned char *, int)+0xb0 in rows.cuh:39
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f20 is misaligned
=========         Device Frame: {ROWS}+0x30 in rows.cuh:44
=========
========= Invalid __global__ read of size 16 bytes
=========     at {ROWS}+0x130
=========     by thread (4,0,0) in block (0,0,0)
=========     Address 0x7f24 is misaligned
=========
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at void zipvl::cuda::select::<unnamed>::by_block(Params)+0x90
=========     and Write access at void zipvl::cuda::select::<unnamed>::by_block(Params)+0x100 [508 hazards]
=========
========= WARNING: Race reported between Write access at void zipvl::cuda::select::<unnamed>::by_grid(Params)+0xf0
=========     and Read access at void zipvl::cuda::select::<unnamed>::by_grid(Params)+0x280 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""
INITCHECK = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, zipvl_like>(int, T2, T3)+0x60
=========     by thread (122,0,0) in block (0,0,0)
=========     Address 0x7f936fa001e8
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void zipvl::cuda::decode_attn::sm80::combine_kernel<__half>(zipvl::cuda::DecodeAttnParams)+0x60
=========     by thread (2,0,0) in block (0,0,0)
=========     Address 0x7f936fa001e8
=========
========= Host API memory access error at host access to 0x7f936fa00000 of size 460,800 bytes
=========     Uninitialized access to 0x7f936fa001e8 on access by cudaMemcpy source
=========
========= ERROR SUMMARY: 3 errors
"""
SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block.
=========     at [clone zipvl::cuda::probe_index_kernel(zipvl::cuda::ProbeIndexParams)] outlineSync()+0x11f0 in x.cu:42
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (CLEAN, Findings(tests=88)),
        (MEMCHECK, Findings(errors=3, kernels={"by_cluster": 1, "probe_rows_sm90": 2}, tests=88)),
        (RACECHECK, Findings(errors=1, warnings=1, kernels={"by_block": 1, "by_grid": 1}, tests=88)),
        (INITCHECK, Findings(errors=1, kernels={"combine_kernel": 1}, elsewhere=2, tests=88)),
        (SYNCCHECK, Findings(errors=1, kernels={"probe_index_kernel": 1}, tests=88)),
    ],
)
def test_reports_are_counted_by_kernel(log: str, expected: Findings) -> None:
    found = read_logs(log, PASSED)
    assert found == expected
    assert found.clean == (log == CLEAN)


def test_reports_that_were_not_printed_are_nobodys_but_not_clean() -> None:
    more = "========= ERROR SUMMARY: 47 errors were not printed. Use --print-limit option to adjust the number\n"
    found = read_logs(INITCHECK.replace("3 errors", "50 errors") + more, PASSED)
    assert found.errors == 1 and found.broken == "47 reports were not printed" and not found.clean


@pytest.mark.parametrize(
    ("log", "tests", "why"),
    [
        ("", PASSED, "no summary"),
        ("========= Error: Target application terminated before first instrumented API call\n", PASSED, "no summary"),
        (CLEAN, "", "no tests ran"),
        (CLEAN, "===== no tests ran in 0.01s =====", "no tests ran"),
        (CLEAN, "===== 88 skipped in 0.40s =====", "88 skipped"),
        (CLEAN, "===== 1 failed, 87 passed in 70.00s (0:01:10) =====", "1 failed"),
        (CLEAN, "===== 87 passed, 1 error in 70.00s =====", "1 error"),
    ],
)
def test_a_run_that_says_nothing_is_not_clean(log: str, tests: str, why: str) -> None:
    found = read_logs(log, tests)
    assert found.broken is not None and why in found.broken and not found.clean


def test_what_a_tool_leaves_out_is_there() -> None:
    for test in (test for tests in gpu_check.LEFT_OUT.values() for test in tests):
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text()


def test_names_of_kernels() -> None:
    assert (
        kernel_name("void zipvl::cuda::sparse_attn::sm90::sparse_attn_sm90<T<(int)64>, (bool)1>(P)")
        == "sparse_attn_sm90"
    )
    assert kernel_name("zipvl::cuda::(anonymous namespace)::emit_kernel(zipvl::cuda::P)") == "emit_kernel"


def test_the_table_names_kernels_and_what_broke() -> None:
    found = {"memcheck": read_logs(MEMCHECK, PASSED), "synccheck": Findings(broken="not done after 900 s")}
    lines = gpu_check.table(found).splitlines()
    assert re.fullmatch(r"memcheck +3 +0 +0 +88 +see the log", lines[1])
    assert [line.split() for line in lines[2:4]] == [["1", "by_cluster"], ["2", "probe_rows_sm90"]]
    assert lines[4].endswith("not done after 900 s")


@pytest.mark.parametrize("arguments", [[], ["--only", "tests"], ["--only", "memcheck", "racecheck"]])
def test_without_a_gpu_it_says_so(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU" in said


def test_the_sanitizer_is_found_beside_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(
        gpu_check.shutil, "which", lambda name: str(tmp_path / "bin" / name) if name == "nvcc" else None
    )
    assert gpu_check.find_sanitizer() == tmp_path / "bin" / "compute-sanitizer"


def test_small_shapes_launch_every_kernel() -> None:
    """The table of tests/kernels/test_small_shapes.py, and the kernels in the sources."""
    kernels = set()
    for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"):
        text = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", path.read_text())
        found = re.findall(r"__global__\s+void\s+(\w+)\(", text)
        assert len(found) == text.count("__global__"), path
        kernels.update(found)
    source = (ROOT / "tests" / "kernels" / "test_small_shapes.py").read_text()
    table = dict(re.findall(r'^    "(\w+)": "(test_\w+)",$', source, re.MULTILINE))
    assert set(table) == kernels
    assert set(table.values()) <= set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))


COLLECT = """
import sys
from importlib.machinery import PathFinder

MISSING = {"zipvl._plan", "transformers"}
find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name in MISSING else find_spec(name, *rest))

import pytest

code = pytest.main(["tests/kernels", "--collect-only", "-q", "-p", "no:cacheprovider"])
assert not MISSING & set(sys.modules)
sys.exit(code)
"""
NEED_TRANSFORMERS = {"test_answers.py", "test_generate.py", "test_mlp.py", "test_multi_gpu.py"}


@pytest.mark.slow
def test_every_file_of_the_kernel_tests_is_collected() -> None:
    """Also where zipvl was built for another Python and without transformers, and without nvcc: an import at the top of
    one file would keep all of them from running."""
    environment = {**os.environ, "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    files = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    collected = set(re.findall(r"^tests/kernels/(test_\w+\.py)::", done.stdout, re.MULTILINE))
    assert files - collected == NEED_TRANSFORMERS
    plans = [name for name in NEED_TRANSFORMERS if "_plan" in (ROOT / "tests" / "kernels" / name).read_text()]
    assert not plans, "they would not be collected without zipvl._plan"
