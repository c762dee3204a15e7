"""Where each op runs natively, and why not elsewhere; asked silently, or loudly with ``raise_error=True``.

The op library answers (``torch.ops.zipvl.explain``); nothing here knows what a kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zipvl import _library
from zipvl.ops import NAMES as OPS

__all__ = ["DTYPES", "OPS", "Support", "can_run_native", "support", "why_not"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

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
    if problem is None and device.type == "cuda":
        problem = _too_old(device)
    if problem is not None:
        return Support("unavailable", problem)
    return _support(explain(op, device, dtype, head_dim))


def explain(op: str, device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str:
    """The op library's answer for ``op`` on inputs of this kind, by default bfloat16 with head dim 128.

    Returns:
        The implementation (``cpu``, ``sm90``, ``sm80``, ``aten`` or ``unavailable``), and behind ``: `` why it is not a
        native one.
    """
    default = torch.float32 if op in _SCORE_OPS else torch.bfloat16
    return torch.ops.zipvl.explain(op, torch.empty((1, 1, 1, head_dim or 128), dtype=dtype or default, device=device))


def _support(answer: str) -> Support:
    implementation, _, reason = answer.partition(": ")
    if implementation == "unavailable":
        return Support("unavailable", reason)
    if implementation == "aten":
        return Support("fallback", f"{reason}: runs over ATen's ops on the GPU")
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


def _not_registered(op: str, device: torch.device) -> str | None:
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
    built_for = _library.build_info().get("cuda_archs", "")
    archs = [int(arch.rstrip("af")) for arch in built_for.split(";") if arch]
    major, minor = torch.cuda.get_device_capability(device)
    if archs and 10 * major + minor < min(archs):
        oldest = f"{min(archs) // 10}.{min(archs) % 10}"
        return f"built for compute capability {oldest} and newer, and this GPU has {major}.{minor}"
    return None
