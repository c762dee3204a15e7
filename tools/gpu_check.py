"""Proves the kernels on a GPU: all of tests/kernels, then compute-sanitizer's tools over its small shapes.

Both append a line to ``benchmarks/results/gpu_tests.jsonl``: the tests ``{"tests": {passed, failed, skipped}}``, the
tools ``{"sanitizers": {tool: Findings}}``. Exit code: 0 where every test passed and no tool reported anything in
zipvl's kernels, 1 where not, 2 where there is no GPU or no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import _record

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "sanitizer"
PYTEST = [sys.executable, "-m", "pytest", "tests/kernels", "--continue-on-collection-errors"]
# Of each GPU: the tests wait for float64 references more than for their kernels, and workers take turns to begin with
# another GPU (tests/kernels/conftest.py). A tool has its GPU to itself: shared, it takes many times as long.
MAX_WORKERS = 6

# A real error has a report for every thread; the kernels are read from the reports, so that no few may hide the others.
MAX_REPORTS = 10_000
COMMON = ["--target-processes", "application-only", "--check-exit-code", "no", "--show-backtrace", "device",
          "--print-limit", str(MAX_REPORTS)]  # fmt: skip
WATCHED = ["--kernel-name", "kns=zipvl"]  # a part of the mangled name
# Without a check of the device's heap, modules are loaded when they are first used, and not all of torch's at once.
NO_HEAP = ["--check-device-heap", "no"]
OPTIONS = {
    # A failing call of the CUDA API fails the test that makes it.
    "memcheck": [*WATCHED, *NO_HEAP, "--report-api-errors", "no"],
    "racecheck": WATCHED,
    # Every kernel and every copy, so that what they write counts as written.
    "initcheck": NO_HEAP,
    "synccheck": WATCHED,
}
# Torch's grouped product is theirs. racecheck itself fails at it ("failed to handle a hardware exception"); our kernels
# beside it have no shared memory. initcheck does not see what it writes, by the copy engine from shared memory, and
# reports every read of its rows.
_PROJECTIONS = ("tests/kernels/test_small_shapes.py::test_projections",)
LEFT_OUT = {"racecheck": _PROJECTIONS, "initcheck": _PROJECTIONS}
WATCH_ALLOCATIONS = ("memcheck", "initcheck")  # torch's allocator would hide them
NO_SANITIZER = (
    "gpu-check: compute-sanitizer is not on the PATH, beside nvcc or in /usr/local/cuda: it comes with the CUDA "
    "toolkit or 'pip install nvidia-cuda-sanitizer-api'; --only tests does without"
)

_SUMMARY = re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error")
_UNPRINTED = re.compile(r"ERROR SUMMARY: (?P<errors>\d+) errors were not printed")
_RACES = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+) warning")
_REPORT = re.compile(r"^========= (?! )", re.MULTILINE)
_PLACE = re.compile(r"(?:^=========\s+at |Device Frame: ?|\baccess at )(?P<place>.+?)\+0x[0-9a-f]+", re.MULTILINE)
_BY_HOST = re.compile(r"\bHost API\b|\bon access by cu(?:da)?Mem")
_TESTS = re.compile(r"(?P<counts>\d+ [a-z]+(?:, \d+ [a-z]+)*) in [\d.]+s")


@dataclass
class Findings:
    """What one tool reported, in numbers of reports."""

    errors: int = 0
    """In zipvl's kernels, and those that name no kernel."""
    warnings: int = 0
    kernels: dict[str, int] = field(default_factory=dict)
    """Errors and warnings by zipvl's kernel."""
    elsewhere: int = 0
    """Errors in other kernels, and in copies to the host."""
    tests: int = 0
    """That passed under the tool."""
    broken: str | None = None
    """Why the numbers above are not the whole truth."""

    @property
    def clean(self) -> bool:
        return not (self.errors or self.warnings or self.broken)


def kernel_name(place: str) -> str:
    """``sparse_attn_sm90`` of ``void zipvl::cuda::sparse_attn::sm90::sparse_attn_sm90<Traits<64>>(Params)``, and of
    functions that were cloned for it (``[clone void zipvl::...sparse_attn_sm90<...>(...)] name(...)``)."""
    place = place.removeprefix("[clone ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    return re.split(r"[<(]", place)[0].split("::")[-1].strip()


def read_logs(tool: str, tests: str) -> Findings:
    """What a tool found, from its log and that of the tests that ran under it."""
    findings = Findings()
    reports = _REPORT.split(tool)
    places = [_PLACE.findall(report) for report in reports]
    ours = [[place for place in report if "zipvl::" in place] for report in places]
    # The last place of a report is the kernel, those before it are functions it calls; a race has two, of one kernel.
    findings.kernels = dict(Counter(kernel_name(report[-1]) for report in ours if report))
    findings.elsewhere = sum(
        bool(any_place or _BY_HOST.search(report)) and not zipvl
        for report, any_place, zipvl in zip(reports, places, ours, strict=True)
    )
    if found := _RACES.search(tool):
        findings.errors, findings.warnings = int(found["errors"]), int(found["warnings"])
    elif found := _SUMMARY.search(tool):
        findings.errors = int(found["errors"]) - findings.elsewhere
        if unprinted := _UNPRINTED.search(tool):
            findings.errors -= int(unprinted["errors"])
            findings.broken = f"{unprinted['errors']} reports were not printed"
    else:
        findings.broken = "the tool wrote no summary"
    counts = _TESTS.findall(tests)
    passed = re.search(r"(\d+) passed", counts[-1]) if counts else None
    findings.tests = int(passed[1]) if passed else 0
    if findings.broken is None and (findings.tests == 0 or re.search(r"failed|error", counts[-1])):
        findings.broken = f"tests: {counts[-1]}" if counts else "no tests ran"
    return findings


def find_sanitizer() -> Path | None:
    """compute-sanitizer: on the PATH, beside nvcc, in the usual folder of the toolkit, or from a Python package."""
    nvcc = shutil.which("nvcc")
    toolkits = [Path(nvcc).resolve().parents[1]] if nvcc else []
    toolkits.append(Path("/usr/local/cuda"))
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*"))
    on_path = shutil.which("compute-sanitizer")
    candidates = [Path(on_path)] if on_path else []
    candidates += [toolkit / "bin" / "compute-sanitizer" for toolkit in toolkits]
    candidates += [folder / "compute-sanitizer" / "compute-sanitizer" for folder in (*toolkits, *packages)]
    return next((path for path in candidates if os.access(path, os.X_OK) and path.is_file()), None)


def run_tests() -> bool:
    """All of tests/kernels, in a few processes; tests/kernels/conftest.py records the outcome. Whether all passed."""
    workers = max(1, min(MAX_WORKERS * torch.cuda.device_count(), (os.cpu_count() or 1) // 2))
    return subprocess.run([*PYTEST, "-n", str(workers)], cwd=ROOT, check=False).returncode == 0


def run_tool(sanitizer: Path, tool: str, limit_s: float) -> Findings:
    """The tests marked ``sanitizer`` under one tool; the logs stay in build/sanitizer."""
    log, tests_log = LOGS / f"{tool}.log", LOGS / f"{tool}.tests.log"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "ZIPVL_RECORD_GPU_TESTS": "0", "ZIPVL_SANITIZER": tool}
    if tool in WATCH_ALLOCATIONS:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = [
        str(sanitizer),
        "--tool",
        tool,
        *COMMON,
        *OPTIONS[tool],
        "--log-file",
        str(log),
        *PYTEST,
        "-m",
        "sanitizer",
        *(f"--deselect={test}" for test in LEFT_OUT.get(tool, ())),
    ]
    with tests_log.open("w", encoding="utf-8") as output:
        # A session of its own, so that the tests end with the tool.
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            code = running.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            code = None
    findings = read_logs(log.read_text(errors="replace") if log.exists() else "", tests_log.read_text(errors="replace"))
    if code is None:
        findings.broken = f"not done after {limit_s:.0f} s"
    elif code != 0 and findings.broken is None:
        findings.broken = f"exit code {code}"
    return findings


def table(found: dict[str, Findings]) -> str:
    """A line a tool, and under it a line a kernel that it names."""
    lines = [f"{'':10} {'errors':>7} {'warnings':>9} {'elsewhere':>10} {'tests':>6}"]
    for tool, findings in found.items():
        verdict = "clean" if findings.clean else findings.broken or "see the log"
        lines.append(
            f"{tool:10} {findings.errors:7} {findings.warnings:9} {findings.elsewhere:10} {findings.tests:6}  {verdict}"
        )
        lines += [f"{count:18} {name}" for name, count in sorted(findings.kernels.items())]
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.partition("\n")[0])
    parts = ["tests", *OPTIONS]
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts, metavar="PART", help=f"of {', '.join(parts)}"
    )
    parser.add_argument("--limit-s", type=float, default=900.0, help="seconds one tool may run (900)")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU; make cuda-check compiles the kernels without one", file=sys.stderr)
        return 2
    tools = [tool for tool in OPTIONS if tool in arguments.only]
    sanitizer = find_sanitizer()
    if tools and sanitizer is None:
        print(NO_SANITIZER, file=sys.stderr)
        return 2
    passed = run_tests() if "tests" in arguments.only else True
    if sanitizer is None or not tools:
        return 0 if passed else 1
    LOGS.mkdir(parents=True, exist_ok=True)
    found = {}
    for tool in tools:
        print(f"gpu-check: {tool}", flush=True)
        found[tool] = run_tool(sanitizer, tool, arguments.limit_s)
    _record.append("gpu_tests", {"sanitizers": {tool: asdict(each) for tool, each in found.items()}}, device="cuda")
    print(f"{table(found)}\nlogs: {LOGS.relative_to(ROOT)}")
    return 0 if passed and all(findings.clean for findings in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
