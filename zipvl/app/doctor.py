"""What is installed, what runs natively, and whether the ops compute what the reference computes."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from zipvl import _library, reference, reference_cache
from zipvl.errors import first_line
from zipvl.support import OPS, support
from zipvl.vllm import versions

__all__ = ["examine", "self_check"]

_PACKAGES = ("zipvl", "transformers", "typer", "rich", "matplotlib", "pillow", "safetensors")
_TOLERANCE = 1e-4  # float32 attention of 48 tokens; measured differences are near 1e-6


def examine() -> dict[str, Any]:
    """Everything ``zipvl doctor`` reports, ready for JSON. ``healthy``: all ops run on the CPU, and none is wrong."""
    op_library = _op_library()
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    ops = [row for device in devices for row in _examine_ops(device)]
    if "cuda:0" not in devices:
        ops += [{"op": op, "device": "cuda", **vars(support(op, "cuda")), "check": "not run"} for op in OPS]
    return {
        "healthy": all(row["check"] == "ok" or (row["check"] == "not run" and row["device"] != "cpu") for row in ops),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "vllm": _vllm(),
        "devices": [{"device": name, "name": _device_name(name)} for name in devices],
        "op_library": op_library,
        "cuda_library": _cuda_library(),
        "build": _library.build_info(),
        "ops": ops,
    }


def self_check(op: str, device: str) -> str:
    """``ok``, or how ``op`` on ``device`` differs from the reference on a tiny float32 input."""
    from zipvl import ops

    args, kwargs = _example(op, device)
    cpu_args = [_cpu_copy(value) for value in args]
    cpu_kwargs = {name: _cpu_copy(value) for name, value in kwargs.items()}
    try:
        got = getattr(ops, op)(*args, **kwargs)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"failed: {first_line(error)}"
    compute = getattr(reference if hasattr(reference, op) else reference_cache, op)
    expected = compute(*cpu_args, **cpu_kwargs)
    got, expected = (pair if isinstance(pair, tuple) else (pair,) for pair in (got, expected))
    if op == "pack_paged":  # its caches are results too
        got, expected = (*got, *args[5:7]), (*expected, *cpu_args[5:7])
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        difference = (ours.cpu().double() - theirs.double()).abs().max().item()
        if not difference <= (_TOLERANCE if ours.is_floating_point() else 0):
            return f"wrong: output {number} differs from the reference by {difference:g}"
    return "ok"


def _cpu_copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _example(op: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``op`` for 1 row, 4 query heads, 2 key/value heads, 48 tokens, head dim 16.

    Of the quantised cache's ops 64 tokens, half of them in each segment, with head dim 64 and float16, which their CUDA
    kernel takes: small numbers, so that rounding stays small too.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    q, k, v = normal(1, 4, 48, 16), normal(1, 2, 48, 16), normal(1, 2, 48, 16)
    index = torch.arange(48, dtype=torch.int32, device=device)[None]
    count = torch.tensor([48], dtype=torch.int32, device=device)
    both = index.expand(2, -1)
    few = {"num_recent": 4, "num_random": 4}
    projections = {"q_weight": normal(64, 16) / 4, "cos": v[:, 0], "sin": k[:, 0], "o_weight": normal(8, 64) / 8}
    k64, v64 = torch.randn(2, 1, 2, 64, 64, generator=generator).half() / 8
    half = torch.arange(64, dtype=torch.int32)[None], torch.tensor([32], dtype=torch.int32)
    to_quantize = tuple(t.to(device) for t in (k64, v64, *half))
    quantized = tuple(t.to(device) for t in reference_cache.quantize_kv(k64, v64, *half))
    examples: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "probe_index": ((q,), few),
        "probe_scores": ((q, k, index[:, 40:].contiguous()), {}),
        "select_tokens": ((q[:, 0, :, 0].abs(), k[:, 0, :, 0].abs()), {"tau": 0.8}),
        "pack_kv": ((k, v, index, count), {}),
        "pack_paged": ((k, v, index, count // 2, index[:, :3], *normal(2, 4, 16, 2, 16)), {}),
        "sparse_attn": ((q, k, v, index, count // 2), {}),
        "zipvl_attn": ((q, k, v), {"tau": 0.8, **few}),
        "zipvl_prefill": ((q, k, v), {"tau": 1.0, **few}),  # every packed row is defined
        "zipvl_layer": ((None, k, v), {"hidden": normal(1, 48, 16), **projections, "tau": 1.0, "pack": True, **few}),
        "decode_attn": ((q[:, :, :1], k, v, count // 2), {}),
        "quantize_kv": (to_quantize, {}),
        "decode_attn_quantized": ((normal(1, 4, 1, 64).half() / 8, *quantized), {}),
        "project_queries": ((k[0], normal(64, 16) / 4, normal(64), v[0], v[0], both, None), {}),
        "project_outputs": ((k[0], normal(8, 16) / 4, both, both[:, 24].contiguous()), {}),
    }
    return examples[op]


def _examine_ops(device: str) -> list[dict[str, Any]]:
    rows = []
    for op in OPS:
        how = support(op, device)
        check = "not run" if how.state == "unavailable" else self_check(op, device)
        rows.append({"op": op, "device": device, **vars(how), "check": check})
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _vllm() -> dict[str, Any]:
    """The vLLM that is installed, and why the plugin does not act in it; None where it does, or there is none."""
    found = versions.installed()
    return {"version": found, "tested": versions.RANGE, "problem": found and versions.problem(found)}


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    memory, capability = properties.total_memory / 2**30, f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {memory:.0f} GiB, compute capability {capability}"


def _op_library() -> dict[str, Any]:
    path, problem = _library.ops_library_path(), None
    try:
        import_module("zipvl.ops")
    except ImportError as error:
        problem = first_line(error)
    return {"path": str(path), "found": path.exists(), "loaded": problem is None, "error": problem}


def _cuda_library() -> dict[str, Any]:
    path, error = _library.cuda_library_path(), _library.cuda_library_error()
    return {"path": path and str(path), "found": path is not None, "loaded": error is None, "error": error}
