"""Where each op runs natively, and why not elsewhere; asked silently, or loudly with ``raise_error=True``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zipvl.ops import NAMES as OPS

__all__ = ["DTYPES", "OPS", "Support", "can_run_native", "support", "why_not"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_PROJECTION_KERNELS = frozenset({"project_queries", "project_outputs"})
# The ops with CUDA kernels (csrc/cuda/ops/register_cuda.cpp). The others run over ATen there.
_CUDA_KERNELS = (
    frozenset({"probe_index", "probe_scores", "select_tokens", "pack_kv", "sparse_attn", "zipvl_attn", "zipvl_prefill"})
    | {"zipvl_layer", "decode_attn", "quantize_kv", "decode_attn_quantized"}
    | _PROJECTION_KERNELS
)
# Of these, the ones that multiply on tensor cores, and what their kernels take (csrc/cuda/*/plan.cpp).
_TENSOR_CORE_KERNELS = frozenset(
    {
        "probe_scores",
        "sparse_attn",
        "zipvl_attn",
        "zipvl_prefill",
        "zipvl_layer",
        "decode_attn",
        "decode_attn_quantized",
    }
)
_NO_FALLBACK = frozenset({"decode_attn_quantized"})  # on CUDA: an error where there is no kernel
_KERNEL_DTYPES, _KERNEL_HEAD_DIMS = (torch.float16, torch.bfloat16), (64, 96, 128, 256)
_SCORE_OPS = frozenset({"select_tokens"})  # their inputs are float32 scores, whatever the model's dtype


@dataclass(frozen=True)
class Support:
    """How one op runs on one kind of input.

    Attributes:
        state: ``native``, ``fallback`` (correct, but over ATen's ops) or ``unavailable``.
        reason: why it is not native; ``None`` where it is.
    """

    state: Literal["native", "fallback", "unavailable"]
    reason: str | None = None


def support(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, head_dim: int | None = None
) -> Support:
    """How ``op`` runs on inputs of this kind.

    Args:
        op: a name of ``OPS``.
        device: of the inputs.
        dtype: of ``q``, ``k`` and ``v`` (of the scores, for ``select_tokens``); ``None``: any that the op takes.
        head_dim: ``D``; ``None``: any that the op takes.

    Raises:
        ValueError: there is no such op.
    """
    if op not in OPS:
        raise ValueError(f"support: op must be one of {', '.join(OPS)}, got {op!r}")
    device = torch.device(device)
    problem = _bad_input(op, dtype, head_dim) or _not_registered(op, device)
    if problem is None and device.type == "cuda" and op in _CUDA_KERNELS:
        problem = _too_old(device)
    if problem is not None:
        return Support("unavailable", problem)
    if device.type == "cuda" and op not in _CUDA_KERNELS:
        return Support("fallback", "no CUDA kernel of its own yet: runs over ATen's ops on the GPU")
    if device.type == "cuda" and op in _PROJECTION_KERNELS and (reason := _not_for_tensor_cores(dtype, None)):
        return Support("fallback", reason)
    if device.type == "cuda" and op in _TENSOR_CORE_KERNELS and (reason := _not_for_tensor_cores(dtype, head_dim)):
        return Support("unavailable", reason.partition(":")[0]) if op in _NO_FALLBACK else Support("fallback", reason)
    if device.type == "cuda" and op == "decode_attn" and (dtype == torch.float16 or head_dim not in (None, 128)):
        return Support("fallback", "no GPU run has checked this kernel yet: runs over ATen's ops on the GPU")
    return Support("native")


def why_not(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Why ``op`` does not run natively on inputs of this kind; ``None`` where it does. Arguments as ``support``."""
    return support(op, device, dtype, head_dim).reason


def can_run_native(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    *,
    raise_error: bool = False,
) -> bool:
    """Whether ``op`` runs natively on inputs of this kind. Arguments as ``support``.

    Raises:
        NotImplementedError: it does not, and ``raise_error`` is set; the message says why.
    """
    reason = why_not(op, device, dtype, head_dim)
    if reason is not None and raise_error:
        raise NotImplementedError(f"{op} does not run natively on {torch.device(device)}: {reason}")
    return reason is None


def _bad_input(op: str, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    taken = (torch.float32,) if op in _SCORE_OPS else DTYPES
    if dtype is not None and dtype not in taken:
        names = " or ".join(str(t).removeprefix("torch.") for t in taken)
        return f"dtype must be {names}, got {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and head_dim < 1:
        return f"head_dim must be at least 1, got {head_dim}"
    return None


def _not_for_tensor_cores(dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    if dtype is not None and dtype not in _KERNEL_DTYPES:
        return "the CUDA kernels take float16 and bfloat16: runs over ATen's ops on the GPU"
    if head_dim is not None and head_dim not in _KERNEL_HEAD_DIMS:
        dims = ", ".join(map(str, _KERNEL_HEAD_DIMS))
        return f"the CUDA kernels take head_dim {dims}, got {head_dim}: runs over ATen's ops on the GPU"
    return None


def _not_registered(op: str, device: torch.device) -> str | None:
    from zipvl import _library

    if device.type not in ("cpu", "cuda"):
        return f"zipvl runs on cpu and cuda, not on {device.type}"
    if not hasattr(torch.ops.zipvl, op):
        return f"the op library {_library.ops_library_path()} is not loaded"
    key = "CUDA" if device.type == "cuda" else "CPU"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"zipvl::{op}", key):
        return None
    if device.type == "cpu":
        return f"the op library {_library.ops_library_path()} does not hold it"
    error = _library.cuda_library_error()
    return f"the CUDA library is not loaded: {error}" if error else "the CUDA library does not hold it"


def _too_old(device: torch.device) -> str | None:
    """Why this GPU cannot run the kernels that were built; ``None`` where it can, or where the build left no record."""
    from zipvl import _library

    built_for = _library.build_info().get("cuda_archs", "")
    archs = [int(arch.rstrip("af")) for arch in built_for.split(";") if arch]
    major, minor = torch.cuda.get_device_capability(device)
    if archs and 10 * major + minor < min(archs):
        oldest = f"{min(archs) // 10}.{min(archs) % 10}"
        return f"built for compute capability {oldest} and newer, and this GPU has {major}.{minor}"
    return None
