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


def test_one_block_a_multiprocessor() -> None:
    plan = _plan.plan_decode_attn_cuda(**SIZES, **HOPPER)
    assert plan.reason == "" and (plan.blocks, plan.warps, plan.head_chunks) == (132, 8, 1)
    assert plan.partials == 132 + 4 and plan.workspace_bytes == plan.partials * 8 * 129 * 4
    assert plan.shared_bytes == 8 * (8 * (2 * 128 + 16) + 2 * 16 * 128 * 4)


def test_short_caches_take_fewer_blocks() -> None:
    """A block is started for a tile of 16 tokens a warp, and one at least for each of four key/value heads."""
    assert _plan.plan_decode_attn_cuda(**{**SIZES, "slots": 1024}, **HOPPER).blocks == 4 * 64 // 8
    assert _plan.plan_decode_attn_cuda(**{**SIZES, "slots": 129}, **HOPPER).blocks == 4 * 2
    assert _plan.plan_decode_attn_cuda(**{**SIZES, "slots": 1}, **HOPPER).blocks == 4


@pytest.mark.parametrize(("group", "chunks"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_heads_go_eight_at_a_time(group: int, chunks: int) -> None:
    plan = _plan.plan_decode_attn_cuda(**{**SIZES, "query_heads": 4 * group}, **HOPPER)
    assert plan.head_chunks == chunks


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_less_shared_memory_is_half_the_warps(head_dim: int) -> None:
    plan = _plan.plan_decode_attn_cuda(**{**SIZES, "head_dim": head_dim}, **SMALL)
    assert plan.reason == "" and plan.warps == (2 if head_dim == 256 else 4)
    assert plan.shared_bytes <= SMALL["shared_bytes"]


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


def test_warps_of_quantised_segments() -> None:
    """12 a multiprocessor (8 with 256 channels), or the least number where shared memory does not hold their rings."""
    sizes = {**SIZES, "slots": 128, "high_blocks": 512, "low_blocks": 1536}
    for head_dim, bits, warps in ((64, 8, 12), (128, 4, 12), (128, 8, 12), (256, 4, 8), (256, 8, 4)):
        changes = {"head_dim": head_dim, "high_bits": (bits, bits)}
        plan = _plan.plan_decode_attn_quantized_cuda(**{**sizes, **changes}, **HOPPER)
        assert plan.reason == "" and (plan.blocks, plan.warps) == (132, warps)
    assert _plan.plan_decode_attn_quantized_cuda(**sizes, **SMALL).warps == 4


def test_all_but_wide_heads_at_8_bits_fit_the_smallest_gpu() -> None:
    sizes = {**SIZES, "slots": 128, "high_blocks": 512, "low_blocks": 1536}
    for bits in ({}, {"high_bits": (8, 8)}, {"head_dim": 256}):
        assert _plan.plan_decode_attn_quantized_cuda(**{**sizes, **bits}, **SMALL).reason == ""
    wide = {**sizes, "head_dim": 256, "high_bits": (8, 8)}
    assert "shared memory" in _plan.plan_decode_attn_quantized_cuda(**wide, **SMALL).reason
