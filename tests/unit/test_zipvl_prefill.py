"""zipvl_prefill: zipvl_attn that also gives the packed keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zipvl import ops, reference

from .helpers import DTYPES, LAYOUTS, MASKS, make_mask, make_qkv, poison


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """The op is ``zipvl_attn`` and ``pack_kv``, bit for bit. Returns ``count``."""
    out, index, count, k_packed, v_packed = ops.zipvl_prefill(q, k, v, **keywords)
    expected = ops.zipvl_attn(q, k, v, **keywords)
    assert all(torch.equal(a, b) for a, b in zip((out, index, count), expected, strict=True))
    assert k_packed.shape == k.shape and k_packed.is_contiguous() and k_packed.dtype == k.dtype
    assert v_packed.shape == v.shape and v_packed.is_contiguous() and v_packed.dtype == v.dtype
    for b, kept in enumerate(count.tolist()):
        T = index[b, :kept].long()
        assert torch.equal(k_packed[b, :, :kept], k[b, :, T]) and torch.equal(v_packed[b, :, :kept], v[b, :, T])
    return count


@pytest.mark.parametrize("all_queries", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_zipvl_attn_and_pack_kv(dtype: torch.dtype, mask: str, all_queries: bool) -> None:
    check(
        *make_qkv(3, 6, 2, 160, 64, dtype),
        tau=0.8,
        keep_mask=torch.rand(3, 160) < 0.1,
        token_mask=make_mask(mask, 3, 160),
        all_queries=all_queries,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
def test_layouts(layout: str, causal: bool) -> None:
    check(*make_qkv(2, 6, 2, 150, 80, layout=layout), ratio=0.3, causal=causal, scale=0.2)


@pytest.mark.parametrize("N", [1, 2, 127, 128, 129, 1000])
def test_lengths(N: int) -> None:
    check(*make_qkv(1, 3, 1, N, 64), ratio=0.25, keep_recent=4, min_tokens=3, seed=3, num_recent=8, num_random=8)


@pytest.mark.parametrize("mask", MASKS)
def test_the_reference_gives_the_same(mask: str) -> None:
    q, k, v = make_qkv(3, 4, 2, 120, 64)
    keywords = {"ratio": 0.3, "keep_mask": torch.rand(3, 120) < 0.1, "token_mask": make_mask(mask, 3, 120)}
    out, index, count, k_packed, v_packed = ops.zipvl_prefill(q, k, v, **keywords)
    expected = reference.zipvl_prefill(q, k, v, **keywords)
    assert torch.equal(index, expected[1]) and torch.equal(count, expected[2])
    torch.testing.assert_close(out, expected[0])
    for b, kept in enumerate(count.tolist()):
        assert torch.equal(k_packed[b, :, :kept], expected[3][b, :, :kept])
        assert torch.equal(v_packed[b, :, :kept], expected[4][b, :, :kept])


def test_nan_in_padding_is_not_read() -> None:
    mask = make_mask("inner", 2, 200)
    assert mask is not None
    q, k, v = make_qkv(2, 4, 2, 200, 64)
    clean = ops.zipvl_prefill(q, k, v, tau=0.7, token_mask=mask)
    dirty = ops.zipvl_prefill(*(poison(t, ~mask) for t in (q, k, v)), tau=0.7, token_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(clean[:3], dirty[:3], strict=True))


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty(B: int, N: int) -> None:
    q, k, v = make_qkv(B, 4, 2, N, 64)
    out, index, count, k_packed, v_packed = ops.zipvl_prefill(q, k, v)
    assert out.shape == (B, 4, N, 64) and index.shape == (B, N) and count.tolist() == [0] * B
    assert k_packed.shape == v_packed.shape == (B, 2, N, 64)
