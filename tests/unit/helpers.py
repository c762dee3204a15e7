"""Inputs and tolerances that the tests of the CPU ops share."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from typing import Any

import torch
from torch import Tensor

from zipvl import ops, reference, reference_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("bhnd", "bnhd", "fused", "sliced")
MASKS = ("none", "left", "right", "inner", "one_real", "row_empty")

# The op may be at most so many times further from the float64 reference than the same computation in PyTorch is.
ERROR_FACTOR = 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def make_qkv(
    B: int,
    Hq: int,
    Hkv: int,
    N: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "bnhd",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal ``q [B, Hq, N, D]`` and ``k, v [B, Hkv, N, D]`` with a unit last stride and a chosen memory layout.

    ``bhnd`` is contiguous, ``bnhd`` a transposed view (what models pass), ``fused`` a view of one projection that holds
    all three, and ``sliced`` a view with odd strides and an odd offset whose surroundings are NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (1.5 * torch.randn(shape, generator=generator)).to(dtype)

    if layout == "fused":
        qkv = normal(B, N, Hq + 2 * Hkv, D).transpose(1, 2)
        return qkv[:, :Hq], qkv[:, Hq : Hq + Hkv], qkv[:, Hq + Hkv :]

    def tensor(H: int) -> Tensor:
        if layout == "bhnd":
            return normal(B, H, N, D)
        if layout == "bnhd":
            return normal(B, N, H, D).transpose(1, 2)
        assert layout == "sliced", layout
        surrounding = torch.full((B, H + 1, N + 3, D + 5), torch.nan, dtype=dtype)
        view = surrounding[:, 1:, 2 : N + 2, 3 : D + 3]
        view.copy_(normal(B, H, N, D))
        return view

    return tensor(Hq), tensor(Hkv), tensor(Hkv)


def make_mask(kind: str, B: int, N: int) -> Tensor | None:
    """``token_mask [B, N]`` of a kind in :data:`MASKS`, different in every row; None for ``none``."""
    if kind == "none":
        return None
    mask = torch.ones(B, N, dtype=torch.bool)
    for b in range(B):
        width = min(N, (b + 1) * N // (B + 2))
        if kind == "left":
            mask[b, :width] = False
        elif kind == "right":
            mask[b, N - width :] = False
        elif kind == "inner":
            mask[b, b + 1 :: 3] = False
            mask[b, N // 3 : N // 3 + width // 2] = False
        elif kind == "one_real":
            mask[b] = False
            mask[b, (N // 2 + b) % N] = True
        else:
            assert kind == "row_empty", kind
            mask[b] = b % 2 == 1
    return mask


def make_selection(B: int, N: int, share: float = 0.4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random ``index [B, N], count [B]`` with about ``share * N`` tokens, another number in each row."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((B, N), N, dtype=torch.int32)
    count = torch.zeros(B, dtype=torch.int32)
    for b in range(B):
        size = min(N, max(1, round(share * N)) + b)
        chosen = torch.randperm(N, generator=generator)[:size].sort().values
        index[b, : len(chosen)] = chosen.to(torch.int32)
        count[b] = len(chosen)
    return index, count


def all_tokens(B: int, N: int) -> tuple[Tensor, Tensor]:
    """The selection of every token."""
    return torch.arange(N, dtype=torch.int32).repeat(B, 1), torch.full((B,), N, dtype=torch.int32)


def selected_mask(index: Tensor, count: Tensor) -> Tensor:
    """``[B, N]`` bool, true for the tokens of a well-formed selection."""
    B, N = index.shape
    mask = torch.zeros(B, N, dtype=torch.bool)
    for b in range(B):
        mask[b, index[b, : int(count[b])].long()] = True
    return mask


def strided(tensor: Tensor) -> Tensor:
    """The values of ``tensor [rows, columns]`` as a view with gaps between the rows, an offset, and junk all around."""
    rows, columns = tensor.shape
    junk = torch.nan if tensor.dtype.is_floating_point else 1
    surrounding = torch.full((2 * rows + 1, columns + 11), junk, dtype=tensor.dtype)
    view = surrounding[1::2, 4 : columns + 4]
    view.copy_(tensor)
    return view


def poison(tensor: Tensor, where: Tensor) -> Tensor:
    """A copy of ``tensor [B, H, N, D]``, strides kept, with NaN at the tokens of ``where [B, N]``."""
    poisoned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
    return poisoned.masked_fill_(where[:, None, :, None], torch.nan)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# Tolerances
# ---------------------------------------------------------------------------------------------------------------------


def assert_accurate(actual: Tensor, exact: Tensor, baseline: Tensor, floor: float) -> None:
    """``actual`` is as close to ``exact`` as PyTorch's own arithmetic gets.

    Its largest error is at most :data:`ERROR_FACTOR` times that of ``baseline`` (the same computation in PyTorch, in
    the op's precision), plus one rounding of the largest result in ``actual``'s dtype, plus ``floor``: what one
    rounding of the logits can do (:func:`logit_rounding`), because the baseline may have been lucky. ``exact`` and
    ``baseline`` must be finite.
    """
    assert actual.shape == exact.shape == baseline.shape
    assert exact.dtype == torch.float64
    assert bool(exact.isfinite().all()) and bool(baseline.isfinite().all()), "the test's own numbers must be finite"
    if exact.numel() == 0:
        return
    error = float((actual.double() - exact).abs().max())
    allowed = tolerance(exact, baseline, actual.dtype, floor)
    assert error <= allowed, f"largest error {error:.3e}, allowed {allowed:.3e}"


def tolerance(exact: Tensor, baseline: Tensor, dtype: torch.dtype, floor: float) -> float:
    """The largest error :func:`assert_accurate` allows."""
    baseline_error = float((baseline.double() - exact).abs().max())
    return ERROR_FACTOR * baseline_error + torch.finfo(dtype).eps * float(exact.abs().max()) + floor


def logit_rounding(q: Tensor, k: Tensor, scale: float | None = None) -> float:
    """One float32 rounding (logits are summed in float32 for every dtype) of the largest logit there can be.

    By Cauchy-Schwarz no partial sum of ``scale * q . k`` is larger than ``scale * |q| * |k|``. A logit off by ``d``
    moves ``lse`` by at most ``d``, and a softmax weight by at most ``2 * d`` of itself: so ``2 * d`` of the largest
    value is what it does to attention outputs, and ``2 * d`` of the score to a probe score.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    largest_q, largest_k = (float(t.float().norm(dim=-1).max()) if t.numel() else 0.0 for t in (q, k))
    return torch.finfo(torch.float32).eps * abs(scale) * largest_q * largest_k


def output_floor(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> float:
    """What one rounding of the logits can do to attention outputs."""
    return 2 * logit_rounding(q, k, scale) * float(v.float().abs().max()) if v.numel() else 0.0


def score_floor(q: Tensor, k: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """What one rounding of the logits can do to probe scores."""
    return 2 * logit_rounding(q, k, scale) * float(exact.abs().max()) if exact.numel() else 0.0


def same_dtype_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    all_queries: bool = False,
    **neighbourhood: Any,
) -> Tensor:
    """``sparse_attn`` written in PyTorch with every intermediate in q's dtype: the baseline of the error bound."""
    B, Hq, n, D = q.shape
    group = Hq // k.shape[1]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    if causal and (neighbourhood or n < k.shape[2]):
        seen = seen_keys(index, count, n, all_queries=all_queries, **neighbourhood)
        for b in range(B):
            for h in range(Hq):
                logits = (q[b, h] @ k[b, h // group].T) * scale
                weights = logits.masked_fill(~seen[b], -torch.inf).softmax(dim=-1).masked_fill(~seen[b], 0)
                out[b, h] = weights @ v[b, h // group]
        return out
    for b in range(B):
        T = index[b, : int(count[b])].long()
        rows = torch.arange(n) if all_queries else T
        blocked = (T[None, :] > rows[:, None]) if causal else torch.zeros(len(rows), len(T), dtype=torch.bool)
        for h in range(Hq):
            logits = (q[b, h, rows] @ k[b, h // group, T].T) * scale
            weights = logits.masked_fill(blocked, -torch.inf).softmax(dim=-1).masked_fill(blocked, 0)
            out[b, h, rows] = weights @ v[b, h // group, T]
    return out


def seen_keys(
    index: Tensor,
    count: Tensor,
    n: int,
    *,
    all_queries: bool = False,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    last_key: Tensor | None = None,
) -> Tensor:
    """``[B, n, S]`` bool: the keys that each of the last ``n`` tokens attends to, set by set (steps 5b to 5d)."""
    B, S = index.shape
    seen = torch.zeros(B, n, S, dtype=torch.bool)
    for b in range(B):
        T = set(index[b, : int(count[b])].tolist())
        real = [s for s in range(S) if token_mask is None or bool(token_mask[b, s])]
        sinks = set(real[:num_sinks])
        for i in range(n):
            t = S - n + i
            end = t if last_key is None else int(last_key[b, i])
            keys = set(T) if all_queries or t in T else set()
            if local_window > 0:
                keys |= sinks | {s for s in real if s > t - local_window}
            if t in set(real):
                seen[b, i, [s for s in keys if s <= end]] = True
    return seen


def make_ends(B: int, n: int, S: int, seed: int = 0) -> Tensor:
    """``last_key [B, n]``: rows that see less than their own position, more, nothing, and impossible numbers."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.arange(S - n, S).repeat(B, 1) + torch.randint(-S // 2, S // 2 + 1, (B, n), generator=generator)
    ends[:, ::5] = torch.arange(S - n, S)[::5]
    ends[0, n // 2] = -1
    ends[-1, -1] = 2**31 - 1
    ends[-1, 0] = -(2**31)
    return ends.to(torch.int32)


def assert_selection_within_rounding(
    index: Tensor,
    count: Tensor,
    exact: tuple[Tensor, Tensor],
    tolerance: tuple[float, float],
    *,
    tau: float,
    ratio: float | None = None,
    min_tokens: int = 1,
    keep_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> None:
    """A selection made from rounded scores differs from that of the exact ones only where rounding decides.

    ``exact`` are the float64 budget and rank scores ``[B, N]``; ``tolerance`` bounds the error of each score that the
    selection saw. ``p`` selected budget scores may miss or overshoot the threshold by the rounding of at most ``N``
    scores; a token clearly above the cut is in, and one clearly below is out.
    """
    budget, rank = exact
    B, N = budget.shape
    for b in range(B):
        real = torch.arange(N) if token_mask is None else token_mask[b].nonzero()[:, 0]
        T = index[b, : int(count[b])].long()
        keep = torch.zeros(N, dtype=torch.bool)
        if keep_mask is not None:
            keep = keep_mask[b].clone()
        keep &= torch.zeros(N, dtype=torch.bool).index_fill(0, real, True)
        chosen = torch.zeros(N, dtype=torch.bool).index_fill(0, T, True)
        assert bool((T.diff() > 0).all()), "T is ascending"
        assert bool(torch.isin(T, real).all()), "T holds real tokens only"
        assert bool((index[b, int(count[b]) :] == N).all()), "places after T hold N"
        assert bool((keep <= chosen).all()), "T holds the keep set"
        if len(real) == 0:
            continue

        least = min(max(int(keep.sum()), min_tokens), len(real))
        if ratio is not None:
            p = math.ceil(ratio * len(real))
            assert len(T) == min(max(p, least), len(real))
        else:
            mass = budget[b, real].sort(descending=True).values.cumsum(dim=0)
            slack = len(real) * tolerance[0]
            p_low = int((mass < tau * mass[-1] - slack).sum()) + 1
            p_high = min(int((mass < tau * mass[-1] + slack).sum()) + 1, len(real))
            assert min(max(p_low, least), len(real)) <= len(T) <= min(max(p_high, least), len(real))

        free = real[~keep[real]]
        by_rank = rank[b, free].sort(descending=True).values
        taken = len(T) - int(keep.sum())
        if 0 < taken < len(free):
            assert bool(chosen[free][rank[b, free] > by_rank[taken - 1] + 2 * tolerance[1]].all()), (
                "a clear winner is out"
            )
            assert not bool(chosen[free][rank[b, free] < by_rank[taken - 1] - 2 * tolerance[1]].any()), "a loser is in"


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def peak_growth(program: str) -> int:
    """Bytes by which the peak of resident memory grows when a process of its own calls ``run()``.

    ``program`` defines ``run`` and makes its inputs; ``run`` is called on small inputs (``run(small=True)``) first, so
    that what libraries allocate once is not counted. The peak is ``VmHWM``, which belongs to the process alone
    (``ru_maxrss`` starts at what the parent had).
    """
    measured = f"""
import re
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

{textwrap.dedent(program)}
run(small=True)
before = peak()
run(small=False)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True)
    return int(done.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Every op once
# ---------------------------------------------------------------------------------------------------------------------

OPS = ops.NAMES
REFERENCE = {op: getattr(reference, op, None) or getattr(reference_cache, op) for op in OPS}

# Every keyword of every op with its default, as docs/ops.md states them.
_LAYER: dict[str, Any] = {
    "tau": 0.975,
    "ratio": None,
    "num_recent": 64,
    "num_random": 64,
    "seed": 0,
    "keep_recent": 1,
    "min_tokens": 1,
    "all_queries": False,
    "scale": None,
    "causal": True,
    "keep_mask": None,
    "token_mask": None,
    "local_window": 0,
    "num_sinks": 0,
    "extra_mask": None,
    "last_key": None,
    "max_ratio": 1.0,
}
KEYWORDS: dict[str, dict[str, Any]] = {
    "probe_index": {"num_recent": 64, "num_random": 64, "seed": 0, "token_mask": None, "k": None},
    "probe_scores": {"scale": None, "causal": True, "token_mask": None, "last_key": None},
    "select_tokens": {
        "tau": 0.975,
        "ratio": None,
        "min_tokens": 1,
        "keep_mask": None,
        "token_mask": None,
        "local_window": 0,
        "num_sinks": 0,
        "extra_mask": None,
        "max_ratio": 1.0,
    },
    "pack_kv": {},
    "pack_paged": {"capacity": None, "first_slot": None},
    "sparse_attn": {
        "scale": None,
        "causal": True,
        "all_queries": False,
        "token_mask": None,
        "local_window": 0,
        "num_sinks": 0,
        "last_key": None,
    },
    "zipvl_attn": _LAYER,
    "zipvl_prefill": _LAYER,
    "zipvl_layer": {
        "hidden": None,
        "q_weight": None,
        "q_bias": None,
        "q_norm_weight": None,
        "q_norm_eps": 1e-6,
        "cos": None,
        "sin": None,
        "o_weight": None,
        "budget_score": None,
        "rank_score": None,
        **_LAYER,
        "pack": False,
    },
    "decode_attn": {"scale": None},
    "project_queries": {"norm_weight": None, "norm_eps": 1e-6},
    "project_outputs": {},
    "quantize_kv": {"high_bits": (4, 4), "low_bits": (4, 2), "v_factor": None, "token_mask": None},
    "decode_attn_quantized": {
        "high_bits": (4, 4),
        "low_bits": (4, 2),
        "k_recent": None,
        "v_recent": None,
        "recent_lengths": None,
        "scale": None,
    },
}


def sample_tensors(
    op: str, B: int = 2, N: int = 40, Hq: int = 6, Hkv: int = 2, D: int = 64, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Valid tensor arguments of an op, by name and in order. Selections name every token: outputs are defined then."""
    q, k, v = make_qkv(B, Hq, Hkv, N, D, dtype)
    index, count = all_tokens(B, N)
    scores = torch.rand(B, N)
    if op == "decode_attn_quantized":
        names = ("high", "high_blocks", "low", "low_blocks", "v_factor")
        segments = (
            reference_cache.quantize_kv(k, v, *make_selection(B, N)) if B * N else ops.quantize_kv(k, v, index, count)
        )
        return {"q": q[:, :, -1:], **dict(zip(names, segments, strict=True))}
    return {
        "probe_index": {"q": q},
        "probe_scores": {"q": q, "k": k, "probe_index": reference.probe_index(q, num_recent=4, num_random=4)},
        "select_tokens": {"budget_score": scores, "rank_score": scores.flip(1)},
        "pack_kv": {"k": k, "v": v, "index": index, "count": count},
        "pack_paged": {
            "k": k,
            "v": v,
            "index": index,
            "count": count,
            "block_table": torch.arange(3 * B, dtype=torch.int32).flip(0).reshape(B, 3),
            "k_cache": torch.randn(3 * B + 1, 16, Hkv, D).to(dtype),
            "v_cache": torch.randn(3 * B + 1, 16, Hkv, D).to(dtype),
        },
        "sparse_attn": {"q": q, "k": k, "v": v, "index": index, "count": count},
        "zipvl_attn": {"q": q, "k": k, "v": v},
        "zipvl_prefill": {"q": q, "k": k, "v": v},
        "zipvl_layer": {"q": q, "k": k, "v": v},
        "decode_attn": {
            "q": q[:, :, -1:],
            "k_cache": k,
            "v_cache": v,
            "lengths": torch.arange(N, N - B, -1, dtype=torch.int32).clamp(min=0),
        },
        "project_queries": {
            "x": torch.randn(B, N, 48),
            "weight": torch.randn(Hq * D, 48),
            "bias": torch.randn(Hq * D),
            "cos": torch.randn(B, N, D),
            "sin": torch.randn(B, N, D),
            "index": index,
            "count": count,
        },
        "project_outputs": {
            "x": torch.randn(B, N, Hq * D),
            "weight": torch.randn(48, Hq * D),
            "index": index,
            "count": count,
        },
        "quantize_kv": {"k": k, "v": v, "index": index, "count": count},
    }[op]
