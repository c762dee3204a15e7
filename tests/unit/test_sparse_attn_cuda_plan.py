"""Which CUDA kernel runs a sparse_attn, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipvl import _plan

SIZES: dict[str, Any] = {"batch": 1, "query_heads": 28, "kv_heads": 4, "tokens": 4096, "head_dim": 128}


def test_hopper_packs_and_others_gather() -> None:
    hopper = _plan.plan_sparse_attn_cuda(**SIZES)
    assert hopper.kernel == _plan.SparseAttnKernel.SM90 and hopper.capacity == 4096 and hopper.reason == ""
    assert hopper.workspace_bytes == 2 * 4 * 4096 * 128 * 2 and not hopper.seen_tokens
    other = _plan.plan_sparse_attn_cuda(**SIZES, hopper=False)
    assert other.kernel == _plan.SparseAttnKernel.SM80 and other.workspace_bytes == 0


@given(
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 32),
    group=st.integers(1, 8),
    tokens=st.integers(1, 2**20),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    all_queries=st.booleans(),
)
def test_workspace_is_the_packed_keys_and_values(
    batch: int, kv_heads: int, group: int, tokens: int, head_dim: int, all_queries: bool
) -> None:
    plan = _plan.plan_sparse_attn_cuda(
        batch=batch,
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        tokens=tokens,
        head_dim=head_dim,
        all_queries=all_queries,
    )
    assert plan.capacity % 128 == 0 and tokens <= plan.capacity < tokens + 128
    assert plan.seen_tokens == all_queries
    packed = 2 * batch * kv_heads * plan.capacity * head_dim * 2
    assert plan.workspace_bytes == packed + (4 * batch * tokens if all_queries else 0)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({"half_precision": False}, "float16 and bfloat16"),
        ({"head_dim": 80}, "head_dim 64, 96, 128 and 256, got 80"),
        ({"aligned": False}, "multiples of 16 bytes"),
        ({"scale": -1.0}, "scale above 0, got -1"),
        ({"batch": 65}, "64 batch rows, got 65"),
        ({"tokens": 2**20 + 1}, "1048576 tokens, got 1048577"),
    ],
)
def test_the_rest_says_why(problem: dict[str, Any], reason: str) -> None:
    plan = _plan.plan_sparse_attn_cuda(**{**SIZES, **problem})
    assert plan.kernel == _plan.SparseAttnKernel.ATEN and reason in plan.reason and reason in str(plan)
