"""The launch plans of csrc/plan, without Torch and without a GPU."""

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
    assert 1 <= plan.heads_per_block <= group and 1 <= plan.probes_per_block <= probes
    blocks = ceil_div(group, plan.heads_per_block) * ceil_div(probes, plan.probes_per_block)
    assert plan.blocks == batch * kv_heads * blocks
    # A fixed 4 Mi scores' worth, or one row where a row is longer: O(N) whatever the heads and probes.
    rows = plan.heads_per_block * plan.probes_per_block
    assert rows == 1 or rows * tokens <= 2**20
    assert plan.workspace_bytes <= 9 * max(2**20, tokens) + tokens * 64 * 4


def test_probe_flops_are_counted() -> None:
    plan = _plan.plan_probe_scores(**SIZES, probes=128)
    assert plan.flops == 2 * 28 * 128 * 4096 * 128
    assert str(plan.blocks) in str(plan)


def test_sparse_attention_is_one_product_where_the_host_knows_the_count() -> None:
    plan = _plan.plan_sparse_attn(**SIZES, keys=1024)
    assert not plan.masked and plan.mask_bytes == 0
    assert plan.flops == pytest.approx(2 * 28 * 128 * 1024**2)


@pytest.mark.parametrize("keywords", [{"all_queries": True}, {"count_on_host": False}])
def test_masks_stay_within_16_mib(keywords: dict[str, bool]) -> None:
    for keys in (1, 1000, 4096, 2**20):
        plan = _plan.plan_sparse_attn(**SIZES | {"tokens": 2**20}, keys=keys, **keywords)
        assert plan.masked and 1 <= plan.rows_per_block <= 512
        assert plan.mask_bytes == plan.rows_per_block * keys <= 2**24


def test_all_queries_without_causal_needs_no_mask() -> None:
    assert not _plan.plan_sparse_attn(**SIZES, keys=1024, causal=False, all_queries=True).masked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_heads": 7}, "query_heads 7, kv_heads 4"),
        ({"tokens": -1}, "tokens -1"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"keys": 5000}, r"keys must be in \[0, 4096\], got 5000"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan.plan_sparse_attn(**{**SIZES, "keys": 1024, **change})


def test_build_info_says_what_was_built() -> None:
    info = _plan.build_info()
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
