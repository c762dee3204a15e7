"""The launch plans of the CPU ops, without Torch and without a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipvl import _plan

SIZES = {"batch": 1, "query_heads": 28, "kv_heads": 4, "tokens": 4096, "head_dim": 128}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@given(
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 16),
    tokens=st.integers(1, 2**20),
    probes=st.integers(1, 256),
    batch=st.integers(1, 4),
)
def test_probe_blocks_cover_every_row_and_stay_small(
    kv_heads: int, group: int, tokens: int, probes: int, batch: int
) -> None:
    plan = _plan.plan_probe_scores(
        batch=batch, query_heads=group * kv_heads, kv_heads=kv_heads, tokens=tokens, probes=probes, head_dim=64
    )
    assert 1 <= plan.heads_per_block <= group and 1 <= plan.probes_per_block <= min(probes, 16)
    blocks = ceil_div(group, plan.heads_per_block) * ceil_div(probes, plan.probes_per_block)
    assert plan.blocks == batch * kv_heads * blocks
    # 2**20 scores, or one row where a row is longer: O(N) whatever the heads and probes.
    rows = plan.heads_per_block * plan.probes_per_block
    assert rows == 1 or rows * tokens <= 2**20
    assert plan.workspace_bytes <= 9 * max(2**20, tokens) + tokens * 64 * 4


def test_probe_flops_are_counted() -> None:
    plan = _plan.plan_probe_scores(**SIZES, probes=128)
    assert plan.flops == 2 * 28 * 128 * 4096 * 128
    assert str(plan.blocks) in str(plan)


@given(
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 16),
    tokens=st.integers(1, 2**20),
    share=st.floats(0, 1),
    all_queries=st.booleans(),
    on_host=st.booleans(),
)
def test_query_blocks_cover_every_row_and_stay_small(
    kv_heads: int, group: int, tokens: int, share: float, all_queries: bool, on_host: bool
) -> None:
    keys = round(share * tokens) if on_host else tokens
    plan = _plan.plan_sparse_attn(
        batch=1,
        query_heads=group * kv_heads,
        kv_heads=kv_heads,
        tokens=tokens,
        head_dim=64,
        keys=keys,
        all_queries=all_queries,
        count_on_host=on_host,
    )
    assert plan.blocks == ceil_div(tokens if all_queries else keys, plan.rows_per_block)
    scores = plan.rows_per_block * group * kv_heads * keys
    assert plan.rows_per_block == 1 or scores <= (2**21 if on_host else 2**24)
    assert 1 <= plan.rows_per_block <= (64 if on_host else 512)
    assert plan.workspace_bytes >= 8 * scores


def test_sparse_flops_are_the_squares() -> None:
    assert _plan.plan_sparse_attn(**SIZES, keys=1024).flops == 2 * 28 * 128 * 1024**2
    assert _plan.plan_sparse_attn(**SIZES, keys=1024, causal=False).flops == 4 * 28 * 128 * 1024**2


@pytest.mark.parametrize(
    ("kv_heads", "threads", "tasks"), [(4, 1, 1), (4, 2, 4), (4, 4, 4), (1, 2, 1), (3, 2, 1), (4, 8, 1), (9, 2, 9)]
)
def test_heads_are_shared_out_where_threads_share_them_evenly(kv_heads: int, threads: int, tasks: int) -> None:
    sizes = {
        "batch": 1,
        "query_heads": kv_heads,
        "kv_heads": kv_heads,
        "tokens": 99,
        "head_dim": 64,
        "threads": threads,
    }
    assert _plan.plan_sparse_attn(**sizes, keys=50).head_tasks == tasks
    assert _plan.plan_probe_scores(**sizes, probes=8).head_tasks == tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_heads": 7}, "query_heads 7, kv_heads 4"),
        ({"tokens": -1}, "tokens -1"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"keys": 5000}, r"keys must be in \[0, 4096\], got 5000"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan.plan_sparse_attn(**{**SIZES, "keys": 1024, **change})
