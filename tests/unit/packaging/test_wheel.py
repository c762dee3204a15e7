"""A wheel builds, installs into a clean environment and works there, away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

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
    assert not wheel.stem.endswith("-any")
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
    ran = subprocess.run(
        [environment / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
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
