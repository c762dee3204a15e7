"""The layout of a kernel of the Hub, and the package ``kernels`` loading the ops from it beside the installed ones."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools import hub_kernel
from zipvl import _library, ops

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import torch
from pathlib import Path
from kernels import get_local_kernel, get_loaded_kernels
import zipvl

kernel = get_local_kernel(Path({folder!r}))
(loaded,) = get_loaded_kernels()
name = loaded.metadata.id
assert loaded.metadata.name.python_name == "zipvl" and name == {namespace!r} and name != "zipvl"
registered = {{op.partition("::")[2] for op in torch._C._dispatch_get_all_op_names() if op.startswith(name + "::")}}
assert registered == {{*zipvl.ops.NAMES, "explain"}}, registered
assert str(kernel.pack_kv.__module__).startswith(name)

q, k, v = (torch.randn(1, heads, 300, 64) for heads in (4, 2, 2))
ours, theirs = (module.zipvl_attn(q, k, v, ratio=0.5) for module in (zipvl.ops, kernel))
assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

called = []
def backend(graph, inputs):
    called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph
compiled = torch.compile(lambda *t: kernel.zipvl_attn(*t, ratio=0.5), backend=backend, fullgraph=True)
assert torch.equal(compiled(q, k, v)[0], ours[0])
assert any(target.startswith(name) for target in called), called

try:
    kernel.zipvl_attn(q.requires_grad_(), k, v, ratio=0.5)
except RuntimeError as error:
    assert "zipvl is inference only" in str(error)
else:
    raise AssertionError("a gradient was not refused")
print("works")
"""


def test_the_layout_is_that_of_the_hub(tmp_path: Path) -> None:
    libraries = _library.ops_library_path().parent
    folder = hub_kernel.lay_out(libraries, "_zipvl_cpu_0123456", tmp_path)
    assert folder.parent == tmp_path / "build"
    assert re.fullmatch(r"torch-stable-abi210-(cpu|cu\d+)-\w+-linux", folder.name)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["id"] == "_zipvl_cpu_0123456" and metadata["name"] == "zipvl"
    files = {path.name: path for path in folder.iterdir() if path.name != "metadata.json"}
    assert {"__init__.py", "_ops.py", "ops.py", "libzipvl_ops.so"} <= files.keys() == metadata["digest"]["files"].keys()
    for name, digest in metadata["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256(files[name].read_bytes()).digest()
    assert "torch.ops._zipvl_cpu_0123456" in files["_ops.py"].read_text()
    assert all(f'"{op}"' in files["__init__.py"].read_text() for op in ops.NAMES)


def test_a_cuda_build_is_a_variant_of_its_own() -> None:
    info = {"oldest_torch": "2.10", "cuda_archs": "80;90a;100f", "cuda_compiler": "13.0.88"}
    assert hub_kernel.variant(info).startswith("torch-stable-abi210-cu130-")
    assert hub_kernel.capabilities(info) == ["8.0+PTX", "9.0a", "10.0f"]
    assert hub_kernel.capabilities({**info, "cuda_archs": ""}) == []


def test_other_sources_have_another_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {hub_kernel.namespace("cpu"), hub_kernel.namespace("cuda")}
    assert all(re.fullmatch(r"_zipvl_(cpu|cuda)_[0-9a-f]{7}", name) for name in names) and len(names) == 2
    for file in ("csrc/ops/register.h", "CMakeLists.txt", "zipvl/ops.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    monkeypatch.setattr(hub_kernel, "ROOT", tmp_path)
    names.add(hub_kernel.namespace("cpu"))
    (tmp_path / "csrc" / "ops" / "register.h").write_text("2")
    names.add(hub_kernel.namespace("cpu"))
    assert len(names) == 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("kernels") is None, reason="needs the package kernels: make hub-check")
def test_kernels_loads_the_ops_beside_the_installed_ones(built: Callable[[str, Callable[[Path], None]], Path]) -> None:
    def fill(folder: Path) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "tools.hub_kernel", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PATH": path})

    code = SCRIPT.format(folder=str(built("hub-kernel", fill)), namespace=hub_kernel.namespace("cpu"))
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "works"
