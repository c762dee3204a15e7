"""tools/import_layers.py lets the package pass and refuses what its layers forbid; importing zipvl imports little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.import_layers import check

ROOT = Path(__file__).resolve().parents[3]


def package(folder: Path, **modules: str) -> Path:
    """A package zipvl in ``folder`` of modules by name, ``__`` for a folder; every folder has an ``__init__``."""
    root = folder / "zipvl"
    for name, source in {"config": "", **modules}.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    for inner in (root, *(path for path in root.rglob("*") if path.is_dir())):
        if not (inner / "__init__.py").exists():
            (inner / "__init__.py").touch()
    return root


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "tools" / "import_layers.py"), str(folder)]
    return subprocess.run(program, capture_output=True, text=True)


def test_the_package_passes() -> None:
    done = run(ROOT / "zipvl")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    done = run(
        package(tmp_path, a="import zipvl.b", b="try:\n    from zipvl import c\nfinally: pass", c="from .a import x")
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("import each other" in line for line in lines)
    assert lines[1].startswith(f"{tmp_path}/zipvl/b.py:2: ") and lines[1].endswith(": from zipvl import c")


@pytest.mark.parametrize(
    "later",
    [
        "def f():\n    from zipvl import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from zipvl import a",
        "import typing\nif typing.TYPE_CHECKING:\n    import zipvl.a",
        "class C:\n    async def f(self):\n        import zipvl.a",
    ],
)
def test_what_is_imported_later_makes_no_cycle(tmp_path: Path, later: str) -> None:
    assert check(package(tmp_path, a="from zipvl import b", b=later)) == []


@pytest.mark.parametrize("form", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}", "class C:\n    {}"])
@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("ops", "import transformers"),
        ("ops", "from transformers.cache_utils import Cache"),
        ("ops", "from zipvl.transformers import cache"),
        ("ops", "from zipvl import app"),
        ("ops", "from .lmms_eval import plugin"),
        ("transformers__cache", "from zipvl.baselines import aim"),
        ("transformers__cache", "from ..app import cli"),
        ("baselines__aim", "import zipvl.app.cli"),
        ("app__run", "import zipvl.lmms_eval"),
        ("vllm__plugin", "import transformers"),
        ("vllm__plugin", "from zipvl.transformers.cache import ZipVLCache"),
        ("lmms_eval__plugin", "import benchmarks.paper"),
        ("app__run", "from tests import programs"),
        ("elsewhere__module", "import zipvl.config"),
    ],
)
def test_a_wrong_direction_is_refused(tmp_path: Path, module: str, statement: str, form: str) -> None:
    others = ("transformers__cache", "baselines__aim", "app__cli", "lmms_eval__plugin")
    root = package(tmp_path, **{**dict.fromkeys(others, ""), module: form.format(statement)})
    (problem,) = check(root)
    assert problem.startswith(str(root.joinpath(*module.split("__")))) and problem.endswith(f": {statement}")


def test_what_the_layers_allow(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        ops="import torch\nfrom zipvl.config import ZipVLConfig",
        transformers__cache="import transformers\nfrom zipvl import ops",
        baselines__aim="import transformers, zipvl\nfrom zipvl.transformers import cache",
        app__cli="from zipvl.baselines import aim\nfrom zipvl.transformers.cache import x\nfrom . import run",
        app__run="from zipvl import ZipVLConfig",
        lmms_eval__plugin="from zipvl import app, baselines, ops\nfrom zipvl.transformers import cache",
        vllm__plugin="import vllm\nfrom zipvl.ops import sparse_attn",
    )
    assert check(root) == []


def test_zipvl_names_transformers_lazily_alone(tmp_path: Path) -> None:
    root = package(tmp_path, transformers__cache="")
    main, init = root / "__main__.py", root / "__init__.py"
    (package(tmp_path, app__cli="") / "app" / "run.py").touch()
    main.write_text("from zipvl.app.cli import app\n")
    init.write_text("if TYPE_CHECKING:\n    from zipvl.transformers import sparse\n")
    assert check(root) == []
    init.write_text("from zipvl.transformers import sparse\n")
    assert len(check(root)) == 1
    init.write_text("")
    main.write_text("from zipvl.app import run\n")
    assert len(check(root)) == 1


def test_importing_zipvl_imports_no_transformers() -> None:
    program = "import zipvl, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_importing_zipvl_imports_torch_and_the_standard_library_alone() -> None:
    """So it takes little longer than importing torch."""
    program = """
import sys, torch
before = set(sys.modules)
import zipvl
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"zipvl", "torch", *sys.stdlib_module_names}, new
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
