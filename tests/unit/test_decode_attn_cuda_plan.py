"""What decode_attn and decode_attn_quantized launch on CUDA, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipvl import _plan

HOPPER: dict[str, Any] = {"num_sms": 132, "shared_bytes": 232448}
SMALL: dict[str, Any] = {"num_sms": 82, "shared_bytes": 101376}
SIZES: dict[str, Any] = {"batch": 1, "query_heads": 28, "kv_heads": 4, "slots": 131072, "head_dim": 128}


@pytest.mark.parametrize("device", [HOPPER, SMALL])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_long_cache_fills_the_gpu(head_dim: int, device: dict[str, Any]) -> None:
    plan = _plan.plan_decode_attn_cuda(**{**SIZES, "head_dim": head_dim}, **device)
    assert (plan.reason, plan.blocks) == ("", device["num_sms"])
    assert plan.shared_bytes <= device["shared_bytes"]


@given(slots=st.integers(1, 2**20), group=st.integers(1, 64))
def test_short_caches_take_fewer_blocks(slots: int, group: int) -> None:
    """One at least for each key/value head, and none without 16 tokens of its own, but for those."""
    heads = {"query_heads": 4 * group, "kv_heads": 4}
    plan = _plan.plan_decode_attn_cuda(**{**SIZES, **heads, "slots": slots}, **HOPPER)
    units = 4 * plan.head_chunks
    assert min(units, HOPPER["num_sms"]) <= plan.blocks <= min(units * -(-slots // 16), HOPPER["num_sms"])
    assert plan.partials == plan.blocks + units


def test_why_not() -> None:
    def reason(**changes: Any) -> str:
        return str(_plan.plan_decode_attn_cuda(**{**SIZES, **HOPPER, **changes}).reason)

    assert "float16 and bfloat16" in reason(half_precision=False)
    assert "head_dim 64, 96, 128 and 256, got 80" in reason(head_dim=80)
    assert "multiples of 16 bytes" in reason(aligned=False)
    assert "tiles" in reason(batch=2**16, slots=2**20)
    assert "bytes of shared memory, the GPU has 49152" in reason(shared_bytes=49152)


@given(
    batch=st.integers(1, 64),
    kv_heads=st.integers(1, 32),
    group=st.integers(1, 64),
    slots=st.integers(0, 2**20),
    high=st.integers(0, 2**14),
    low=st.integers(0, 2**14),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    bits=st.sampled_from([((4, 4), (4, 2)), ((4, 4), (2, 2)), ((8, 8), (4, 4)), ((2, 2), (8, 8)), ((4, 2), (4, 2))]),
)
def test_a_place_for_every_partial_result(
    batch: int, kv_heads: int, group: int, slots: int, high: int, low: int, head_dim: int, bits: tuple[Any, Any]
) -> None:
    plan = _plan.plan_decode_attn_quantized_cuda(
        batch=batch,
        query_heads=kv_heads * group,
        kv_heads=kv_heads,
        slots=slots,
        head_dim=head_dim,
        high_blocks=high,
        low_blocks=low,
        high_bits=bits[0],
        low_bits=bits[1],
        **HOPPER,
    )
    assert 1 <= plan.blocks <= HOPPER["num_sms"]
    assert plan.blocks >= min(HOPPER["num_sms"], batch * kv_heads * plan.head_chunks * (slots + high + low > 0))
    assert plan.partials == plan.blocks + batch * kv_heads * plan.head_chunks
    assert plan.shared_bytes <= HOPPER["shared_bytes"]
    assert (plan.reason == "") == (batch * kv_heads * plan.head_chunks * (-(-slots // 16) + high + low) < 2**31)


def test_all_but_wide_heads_at_8_bits_fit_the_smallest_gpu() -> None:
    sizes = {**SIZES, "slots": 128, "high_blocks": 512, "low_blocks": 1536}
    for bits in ({}, {"high_bits": (8, 8)}, {"head_dim": 256}):
        assert _plan.plan_decode_attn_quantized_cuda(**{**sizes, **bits}, **SMALL).reason == ""
    wide = {**sizes, "head_dim": 256, "high_bits": (8, 8)}
    assert "shared memory" in _plan.plan_decode_attn_quantized_cuda(**wide, **SMALL).reason
