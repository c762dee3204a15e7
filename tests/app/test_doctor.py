"""``zipvl doctor`` and the support predicates it shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from zipvl import _library, ops
from zipvl.app import doctor
from zipvl.support import OPS, Support, can_run_native, explain, support, why_not
from zipvl.vllm import versions

Zipvl = Callable[..., Result]


def test_healthy(zipvl: Zipvl) -> None:
    result = zipvl("doctor")
    assert result.exit_code == 0, result.output
    for part in ("torch", "transformers", "op library", "CUDA library", "probe_scores", "native", "healthy"):
        assert part in result.stdout


def test_it_imports_no_transformers() -> None:
    code = """
import sys
from zipvl.app.cli import app
try:
    app(["doctor"])
except SystemExit as end:
    print(end.code, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith("\n0 False\n"), done.stdout


def test_json(zipvl: Zipvl) -> None:
    result = zipvl("doctor", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["healthy"] is True and facts["torch"] == torch.__version__
    assert facts["op_library"]["loaded"] is True and facts["build"]["compiler"]
    assert {(row["op"], row["device"].split(":")[0]) for row in facts["ops"]} == {
        (op, device) for op in OPS for device in ("cpu", "cuda")
    }
    for row in facts["ops"]:
        if row["device"] == "cpu":
            assert (row["state"], row["reason"], row["check"]) == ("native", None, "ok")
        else:
            assert (row["state"] == "native") == (row["reason"] is None)


@pytest.mark.parametrize(
    ("found", "problem"), [(None, None), ("0.32.1", None), ("0.40.0", "tested with vLLM 0.26 or .*this is vLLM 0.40.0")]
)
def test_vllm(zipvl: Zipvl, monkeypatch: pytest.MonkeyPatch, found: str | None, problem: str | None) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    facts = json.loads(zipvl("doctor", "--json").stdout)
    assert facts["vllm"]["version"] == found and facts["vllm"]["tested"] == versions.RANGE
    assert re.search(problem, facts["vllm"]["problem"]) if problem else facts["vllm"]["problem"] is None
    shown = " ".join(zipvl("doctor").stdout.split())
    assert ("not installed (the plugin" if found is None else f"vllm │ {found}: ") in shown


def test_a_wrong_op_is_found(zipvl: Zipvl, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_attn
    monkeypatch.setattr(ops, "sparse_attn", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    result = zipvl("doctor")
    assert result.exit_code == 1
    assert "broken" in result.stdout and "wrong" in result.stdout
    assert doctor.self_check("sparse_attn", "cpu").startswith("wrong: output 0 differs from the reference by")


def test_an_op_that_fails_is_found(zipvl: Zipvl, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(ops, "decode_attn", fail)
    facts = json.loads(zipvl("doctor", "--json").stdout)
    assert facts["healthy"] is False
    assert [row["check"] for row in facts["ops"] if row["op"] == "decode_attn" and row["device"] == "cpu"] == [
        "failed: no such kernel"
    ]


def test_an_op_library_that_does_not_load(zipvl: Zipvl, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == "zipvl.ops":
            raise ImportError("the package was not built")
        return import_module(name)

    monkeypatch.setattr("zipvl.app.doctor.import_module", load)
    monkeypatch.setattr(torch.ops, "zipvl", torch.ops.zipvl_that_nobody_built)
    result = zipvl("doctor")
    assert result.exit_code == 1
    assert "not loaded: the package was not built" in result.stdout and "broken" in result.stdout
    facts = json.loads(zipvl("doctor", "--json").stdout)
    assert facts["healthy"] is False and {row["state"] for row in facts["ops"]} == {"unavailable"}


@pytest.mark.parametrize("op", OPS)
def test_cpu_is_native(op: str) -> None:
    assert can_run_native(op, "cpu", torch.float32, 64) and why_not(op) is None
    assert support(op).state == "native"


@pytest.mark.parametrize("op", OPS)
def test_cuda_without_its_library_says_why(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr("zipvl._library.cuda_library_error", lambda: "it lies elsewhere")
    assert support(op, "cuda").state == "unavailable"
    assert why_not(op, "cuda") == "the CUDA library is not loaded: it lies elsewhere"


@pytest.mark.parametrize(
    ("answer", "state", "reason"),
    [
        ("sm90", "native", None),
        ("sm80", "native", None),
        (
            "aten: the kernels take float16 and bfloat16",
            "fallback",
            "the kernels take float16 and bfloat16: runs over ATen's ops on the GPU",
        ),
        ("unavailable: the kernels take head_dim 64", "unavailable", "the kernels take head_dim 64"),
    ],
)
def test_what_the_library_answers(answer: str, state: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/kernels/test_ops.py asks a GPU's library; here its answers are given."""
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("zipvl.support.explain", lambda *given: answer)
    for op in OPS:
        assert support(op, "cuda") == Support(state, reason)
        assert can_run_native(op, "cuda") == (state == "native")


@pytest.mark.parametrize("op", OPS)
def test_the_library_explains_every_op(op: str) -> None:
    assert explain(op, torch.device("cpu"), None, None) == "cpu"


def test_explain_checks_its_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"explain: op must name an op of torch\.ops\.zipvl, got softmax"):
        torch.ops.zipvl.explain("softmax", torch.zeros(1, 1, 1, 64))
    with pytest.raises(RuntimeError, match=r"explain: q must have 4 dimensions \[B, H, N, D\], got shape \[64\]"):
        torch.ops.zipvl.explain("sparse_attn", torch.zeros(64))


def recorded(path: Path, monkeypatch: pytest.MonkeyPatch, **info: str) -> None:
    """A build that recorded ``info``."""
    path.write_text(json.dumps(info))
    monkeypatch.setattr(_library, "_BUILD_INFO", path)


def test_a_gpu_older_than_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    recorded(tmp_path / "build_info.json", monkeypatch, cuda_archs="80;90a")
    assert support("probe_index", "cuda").state == "unavailable"
    assert why_not("probe_index", "cuda") == "built for compute capability 8.0 and newer, and this GPU has 7.5"


def test_the_build_says_what_it_is() -> None:
    info = _library.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "build_type",
        "built_against_torch",
        "oldest_torch",
        "cuda_archs",
        "cuda_compiler",
    }
    assert info["build_type"] == "Release" and info["oldest_torch"] == "2.10" and info["compiler"].split()[1]


def test_a_build_without_its_record(zipvl: Zipvl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor says so, and no GPU counts as too old for architectures that nobody knows."""
    monkeypatch.setattr(_library, "_BUILD_INFO", tmp_path / "build_info.json")
    facts = json.loads(zipvl("doctor", "--json").stdout)
    assert facts["healthy"] is True and set(facts["build"]) == {"missing"}
    assert facts["build"]["missing"].startswith(f"{tmp_path / 'build_info.json'} does not exist")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("zipvl.support.explain", lambda *given: "sm80")
    assert support("probe_index", "cuda").state == "native"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("sparse_attn", "cpu", torch.float64), "dtype must be float16 or bfloat16 or float32, got float64"),
        (("select_tokens", "cpu", torch.float16), "dtype must be float32, got float16"),
        (("sparse_attn", "cpu", torch.float32, 0), "head_dim must be at least 1, got 0"),
        (("pack_kv", "mps"), "zipvl runs on cpu and cuda, not on mps"),
    ],
)
def test_asked_silently_and_loudly(args: tuple[object, ...], reason: str) -> None:
    assert why_not(*args) == reason and not can_run_native(*args)
    with pytest.raises(NotImplementedError, match=f"{args[0]} does not run natively on {args[1]}: {reason}"):
        can_run_native(*args, raise_error=True)


def test_an_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"op must be one of probe_index, .*, got 'softmax'"):
        why_not("softmax")
