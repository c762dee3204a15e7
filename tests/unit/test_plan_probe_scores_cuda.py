"""The launch plan of probe_scores' CUDA kernels, without Torch and without a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipvl import _plan

LONGVA = {"query_heads": 28, "kv_heads": 4, "probes": 128, "head_dim": 128}
MIB = 2**20


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@given(
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 32),
    group=st.integers(1, 16),
    tokens=st.integers(1, 2**20),
    probes=st.integers(1, 256),
    masked=st.booleans(),
)
def test_items_cover_every_row_and_key(
    batch: int, kv_heads: int, group: int, tokens: int, probes: int, masked: bool
) -> None:
    sizes = {"query_heads": group * kv_heads, "kv_heads": kv_heads, "tokens": tokens, "probes": probes, "head_dim": 64}
    plan = _plan.plan_probe_scores_cuda(batch=batch, masked=masked, clusters=False, **sizes)
    assert plan.cluster_blocks == 0
    assert plan.rows == group * probes
    assert plan.rows <= plan.rows_padded < plan.rows + 128 and plan.rows_padded % 128 == 0
    assert plan.chunk_keys % 128 == 0 and (plan.splits - 1) * plan.chunk_keys < tokens <= plan.splits * plan.chunk_keys
    assert plan.first_items == batch * kv_heads * ceil_div(plan.rows, 256) * plan.splits
    assert 1 <= plan.row_splits <= plan.rows_padded // 128
    assert plan.second_items == batch * kv_heads * ceil_div(tokens, 256) * plan.row_splits
    # Gathered rows, partial sums, column sums; the rest is a few words a row or 32 tokens.
    parts = batch * kv_heads * (plan.rows * 64 * 2 + plan.splits * plan.rows_padded * 8 + plan.row_splits * tokens * 4)
    assert parts <= plan.workspace_bytes <= parts + batch * (kv_heads * plan.rows_padded * 12 + tokens // 8) + 4096
    alone = _plan.plan_probe_scores_cuda(batch=1, masked=masked, clusters=False, **sizes)
    assert (alone.chunk_keys, alone.row_splits) == (plan.chunk_keys, plan.row_splits), "batch rows stay independent"


@given(
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 32),
    group=st.integers(1, 16),
    tokens=st.integers(1, 10_000),
    probes=st.integers(1, 256),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    masked=st.booleans(),
)
def test_clusters_hold_every_row_and_key(
    batch: int, kv_heads: int, group: int, tokens: int, probes: int, head_dim: int, masked: bool
) -> None:
    sizes = {"query_heads": group * kv_heads, "kv_heads": kv_heads, "tokens": tokens, "probes": probes}
    plan = _plan.plan_probe_scores_cuda(batch=batch, masked=masked, head_dim=head_dim, **sizes)
    units = ceil_div(group * probes, 64)
    alone = _plan.plan_probe_scores_cuda(batch=1, masked=masked, head_dim=head_dim, **sizes)
    assert (alone.cluster_blocks, alone.row_splits) == (plan.cluster_blocks, plan.row_splits), "rows stay independent"
    if plan.cluster_blocks == 0:
        return
    assert tokens > 128, "a block's keys need no cluster"
    assert plan.cluster_blocks == min(8, ceil_div(tokens, 128)), "each block has a tile of keys"
    assert 1 <= plan.row_splits <= units <= 5 * plan.row_splits, "at most 5 units a cluster"
    assert kv_heads * plan.row_splits <= 15, "one wave"
    sums = batch * kv_heads * plan.row_splits * tokens * 4
    assert sums <= plan.workspace_bytes < sums + 256


def test_one_kernel_is_said_and_can_be_declined() -> None:
    said = str(_plan.plan_probe_scores_cuda(batch=1, tokens=2048, **LONGVA))
    assert "one kernel" in said and "clusters of 8 blocks" in said
    assert _plan.plan_probe_scores_cuda(batch=1, tokens=2048, clusters=False, **LONGVA).cluster_blocks == 0


@pytest.mark.parametrize("tokens", [4096, 32768, 131072])
def test_the_workspace_is_small(tokens: int) -> None:
    assert _plan.plan_probe_scores_cuda(batch=1, tokens=tokens, **LONGVA).workspace_bytes <= 64 * MIB


@pytest.mark.parametrize("tokens", [4096, 8192, 32768, 131072, 2**20])
def test_the_chip_is_full(tokens: int) -> None:
    plan = _plan.plan_probe_scores_cuda(batch=1, tokens=tokens, clusters=False, **LONGVA)
    assert plan.first_items >= 132 * 0.9 and plan.second_items >= 132 * 0.9


def test_work_is_counted() -> None:
    plan = _plan.plan_probe_scores_cuda(batch=2, tokens=4096, **LONGVA)
    assert plan.exponentials == 2 * 2 * 28 * 128 * 4096
    assert plan.flops == 2 * 128 * plan.exponentials
    assert str(plan.workspace_bytes) in str(plan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"half_precision": False}, "the kernels take float16 and bfloat16"),
        ({"head_dim": 80}, "the kernels take head_dim 64, 96, 128 and 256, got 80"),
        ({"aligned": False}, "the kernels take rows of k that begin at multiples of 16 bytes"),
        ({"probes": 256}, ""),
        ({"probes": 257}, "the kernels take at most 256 probes, got 257"),
        ({"batch": 65}, "the kernels take at most 64 batch rows, got 65"),
        ({"tokens": 2**20}, ""),
        ({"tokens": 2**20 + 1}, "the kernels take at most 1048576 tokens, got 1048577"),
    ],
    ids=str,
)
def test_what_the_kernels_take(change: dict[str, int], reason: str) -> None:
    plan = _plan.plan_probe_scores_cuda(**{"batch": 1, "tokens": 4096, **LONGVA, **change})
    assert plan.reason == reason
    assert (plan.workspace_bytes == 0) == (reason != "")
    assert str(plan).endswith(f"over ATen, because {reason}") == (reason != "")


@pytest.mark.parametrize("change", [{"tokens": 0}, {"probes": 0}, {"query_heads": 30}])
def test_bad_sizes_are_named(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        _plan.plan_probe_scores_cuda(**{"batch": 1, "tokens": 4096, **LONGVA, **change})
