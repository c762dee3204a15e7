"""A wheel builds, installs into a clean environment and works there, away from the checkout; its name and its label."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Command

from tools import wheel_check

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import torch, zipvl
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from zipvl import ZipVLConfig, _library, ops, policy, reference
assert Path(zipvl.__file__).is_relative_to({environment!r}), zipvl.__file__
q, k, v = (torch.randn(1, heads, 300, 64) for heads in (4, 2, 2))
out, index, count = ops.zipvl_attn(q, k, v, ratio=0.5)
exact = reference.sparse_attn(q.double(), k.double(), v.double(), index, count)
assert count.tolist() == [150] and torch.allclose(out.double(), exact, atol=1e-5)
assert (Path(zipvl.__file__).parent / "app" / "page.html").is_file()
assert _library.build_info()["version"] == zipvl.__version__
assert find_spec("zipvl._plan") is None
on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
assert policy.dense_below(ZipVLConfig.paper(dense_below="auto"), 28, 128, on_a_gpu) == policy.pays_from(28, 128) > 256
print("works")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "PATH": path})
    (built,) = folder.glob("zipvl-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment that sees this one's torch but not this one's zipvl, with the wheel installed."""
    target = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(target, with_pip=False)
    (site,) = target.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    # Everything torch needs, by folder: linked one by one, so that this environment's editable zipvl stays out.
    for package in Path(torch.__file__).parents[1].iterdir():
        if not package.name.startswith(("zipvl", "__editable__")) and not (site / package.name).exists():
            (site / package.name).symlink_to(package)
    return target


@pytest.mark.slow
def test_a_wheel_is_of_one_platform_and_holds_no_plans(wheel: Path) -> None:
    """``zipvl._plan`` is for tests alone; the record of the build is for everyone."""
    assert re.fullmatch(r"zipvl-[\w.+]+-py3-none-linux_\w+", wheel.stem)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = json.loads(archive.read("zipvl/lib/build_info.json"))
    compiled = {name for name in names if name.endswith(".so")}
    assert "zipvl/lib/libzipvl_ops.so" in compiled
    assert compiled <= {"zipvl/lib/libzipvl_ops.so", "zipvl/lib/libzipvl_cuda.so"}
    assert ("zipvl/lib/libzipvl_cuda.so" in compiled) == bool(info["cuda_archs"])


@pytest.mark.slow
def test_a_wheel_works_in_a_clean_environment(environment: Path, tmp_path: Path) -> None:
    code = SCRIPT.format(environment=str(environment))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [environment / "bin" / "python", "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "works"


def test_a_source_folder_that_was_not_built_says_so(tmp_path: Path) -> None:
    (tmp_path / "zipvl").mkdir()
    for source in (ROOT / "zipvl").glob("*.py"):
        (tmp_path / "zipvl" / source.name).write_text(source.read_text())
    ran = subprocess.run(
        [sys.executable, "-c", "import zipvl.ops"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode != 0
    assert "was not built" in ran.stderr and "pip install --no-build-isolation" in ran.stderr


NVCC = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\n"
CPU = {"cuda_archs": "", "cuda_compiler": "", "built_against_torch": "2.13.0"}
CUDA = {"cuda_archs": "80;90a", "cuda_compiler": "13.0.88", "built_against_torch": "2.13.0"}
OPS, CUDA_OPS = "zipvl/lib/libzipvl_ops.so", "zipvl/lib/libzipvl_cuda.so"


def test_labels_are_those_of_torch() -> None:
    local_version = runpy.run_path(str(ROOT / "setup.py"))["local_version"]
    assert local_version("off", NVCC) == local_version("off", None) == "+cpu"
    assert local_version("on", NVCC) == "+cu130"
    assert local_version("on", NVCC.replace("13.0", "14.12")) == "+cu1412"
    with pytest.raises(SystemExit, match=r"ZIPVL_LABEL=on needs ZIPVL_CUDA=on or ZIPVL_CUDA=off, got ZIPVL_CUDA=auto"):
        local_version("auto", NVCC)
    for nothing in (None, "no compiler"):
        with pytest.raises(SystemExit, match="needs an nvcc that tells its release"):
            local_version("on", nothing)


def backend(hook: str, folder: Path, source: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a hook of the build backend in ``source``, as pip does."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(folder)!r}))"
    given = {name: value for name, value in os.environ.items() if not name.startswith("ZIPVL_")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=given, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("environment", "label"),
    [
        ({}, ""),
        ({"ZIPVL_LABEL": "on", "ZIPVL_CUDA": "off"}, "+cpu"),
        ({"ZIPVL_LABEL": "on", "ZIPVL_CUDA": "on"}, "+cu130"),
        ({"ZIPVL_LABEL": "off", "ZIPVL_CUDA": "on"}, ""),
    ],
)
def test_a_label_is_in_the_metadata(environment: dict[str, str], label: str, tmp_path: Path) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\ncat <<'END'\n{NVCC}END\n")
    compiler.chmod(0o755)
    (tmp_path / "metadata").mkdir()
    made = backend("prepare_metadata_for_build_wheel", tmp_path / "metadata", **environment, CUDACXX=str(compiler))
    assert made.returncode == 0, made.stderr
    assert re.fullmatch(rf"\d+\.\d+\.\d+{re.escape(label)}", version_in(tmp_path / "metadata"))


def version_in(folder: Path) -> str:
    """The version in the metadata that a hook of the build backend wrote to ``folder``."""
    (metadata,) = folder.glob("zipvl-*.dist-info/METADATA")
    (version,) = re.findall(r"^Version: (.+)$", metadata.read_text(), flags=re.MULTILINE)
    return version


def test_a_label_that_is_neither_is_an_error(tmp_path: Path) -> None:
    made = backend("prepare_metadata_for_build_wheel", tmp_path, ZIPVL_LABEL="cu130")
    assert made.returncode != 0 and "ZIPVL_LABEL must be on or off, got 'cu130'" in made.stderr


def test_the_tag_names_no_python() -> None:
    setup = runpy.run_path(str(ROOT / "setup.py"))
    wheel: Command = setup["PlatformWheel"](setup["BinaryDistribution"]({"name": "zipvl", "version": "1"}))
    wheel.ensure_finalized()
    assert wheel.get_tag()[:2] == ("py3", "none") and wheel.get_tag()[2].startswith("linux_")


def test_the_source_distribution_holds_what_a_build_reads(tmp_path: Path) -> None:
    made = backend("build_sdist", tmp_path)
    assert made.returncode == 0, made.stderr
    with tarfile.open(tmp_path / made.stdout.split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    needed = [path for folder in ("csrc", "zipvl") for path in (ROOT / folder).rglob("*")]
    sources = {".h", ".cpp", ".cu", ".cuh", ".in", ".py", ".html"}
    expected = {path.relative_to(ROOT).as_posix() for path in needed if path.suffix in sources}
    assert len(expected) > 100 and expected | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if ".so" in name]
    (unpacked,) = (folder for folder in tmp_path.glob("zipvl-*") if folder.is_dir())
    (tmp_path / "metadata").mkdir()
    labelled = backend(
        "prepare_metadata_for_build_wheel", tmp_path / "metadata", unpacked, ZIPVL_LABEL="on", ZIPVL_CUDA="off"
    )
    assert labelled.returncode == 0 and version_in(tmp_path / "metadata") == f"{unpacked.name.partition('-')[2]}+cpu"


def packed(folder: Path, name: str, build: dict[str, str], *libraries: str) -> Path:
    """A file with the name of a wheel, the record of a build and empty libraries."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("zipvl/lib/build_info.json", json.dumps(build))
        for library in libraries:
            archive.writestr(library, b"")
    return folder / name


@pytest.mark.parametrize(
    ("label", "build", "libraries"),
    [("+cpu", CPU, (OPS,)), ("+cu130", CUDA, (OPS, CUDA_OPS)), ("", CPU, (OPS,)), ("", CUDA, (OPS, CUDA_OPS))],
)
def test_a_wheel_of_its_build_passes(
    label: str, build: dict[str, str], libraries: tuple[str, ...], tmp_path: Path
) -> None:
    name = f"zipvl-0.1.0{label}-py3-none-manylinux_2_28_x86_64.whl"
    assert wheel_check.examine(packed(tmp_path, name, build, *libraries)) == build


@pytest.mark.parametrize(
    ("name", "build", "libraries", "problem"),
    [
        (
            "zipvl-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
            CPU,
            (OPS,),
            "expected zipvl-<version>-py3-none-manylinux",
        ),
        ("zipvl-0.1.0-py3-none-linux_x86_64.whl", CPU, (OPS,), "expected zipvl-<version>-py3-none-manylinux"),
        ("zipvl-0.1.0+cpu-py3-none-manylinux_2_28_x86_64.whl", CUDA, (OPS, CUDA_OPS), r"label is \+cpu, .* be \+cu130"),
        ("zipvl-0.1.0+cu120-py3-none-manylinux_2_28_x86_64.whl", CUDA, (OPS, CUDA_OPS), "and this build's would be"),
        ("zipvl-0.1.0+cu130-py3-none-manylinux_2_28_x86_64.whl", CUDA, (OPS,), "expected the libraries"),
        (
            "zipvl-0.1.0+cpu-py3-none-manylinux_2_28_x86_64.whl",
            CPU,
            (OPS, "zipvl/_plan.cpython-311-x86_64-linux-gnu.so"),
            "got .*_plan",
        ),
    ],
)
def test_a_wheel_that_is_not_what_its_name_says_is_refused(
    name: str, build: dict[str, str], libraries: tuple[str, ...], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(wheel_check.WrongError, match=problem):
        wheel_check.examine(packed(tmp_path, name, build, *libraries))


def test_where_no_other_python_is_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheel_check, "pythons", lambda: iter([sys.executable, "/bin/false"]))
    monkeypatch.setattr(sys, "argv", ["wheel_check"])
    assert wheel_check.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("wheel-check: NOT RUN.") and f"no Python but {sys.version_info[0]}." in said


def test_another_python_is_of_another_minor_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = []
    for version in ("3 9", f"3 {sys.version_info[1]}", "3 99", "3 98"):
        fakes.append(tmp_path / version.replace(" ", "."))
        fakes[-1].write_text(f"#!/bin/sh\necho {version}\n")
        fakes[-1].chmod(0o755)
    monkeypatch.setattr(wheel_check, "pythons", lambda: map(str, fakes))
    assert wheel_check.another_python() == str(fakes[2])
