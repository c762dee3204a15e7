"""pack_kv: the selected keys and values, moved to the front."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl import ops, reference

from .helpers import DTYPES, LAYOUTS, make_qkv, make_selection, poison, selected_mask, strided


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 80, 256])
def test_rows_are_copied_bit_for_bit(D: int, dtype: torch.dtype, layout: str) -> None:
    B, N = 3, 150
    _, k, v = make_qkv(B, 4, 2, N, D, dtype, layout)
    index, count = make_selection(B, N)
    outside = ~selected_mask(index, count)
    packed = ops.pack_kv(poison(k, outside), poison(v, outside), index, count)
    expected = reference.pack_kv(k, v, index, count)
    for actual, expected_one in zip(packed, expected, strict=True):
        assert actual.dtype == dtype and actual.shape == k.shape and actual.is_contiguous()
        for b in range(B):
            assert torch.equal(actual[b, :, : count[b]], expected_one[b, :, : count[b]])


def test_strided_index() -> None:
    _, k, v = make_qkv(3, 2, 2, 70, 64)
    index, count = make_selection(3, 70)
    plain, packed = ops.pack_kv(k, v, index, count), ops.pack_kv(k, v, strided(index), count)
    for b in range(3):
        assert torch.equal(packed[0][b, :, : count[b]], plain[0][b, :, : count[b]])
        assert torch.equal(packed[1][b, :, : count[b]], plain[1][b, :, : count[b]])


@given(N=st.integers(1, 40), data=st.data())
def test_any_selection(N: int, data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, N - 1))))
    _, k, v = make_qkv(1, 1, 1, N, 64)
    index = torch.tensor([chosen + [N] * (N - len(chosen))], dtype=torch.int32)
    k_packed, v_packed = ops.pack_kv(k, v, index, torch.tensor([len(chosen)], dtype=torch.int32))
    assert torch.equal(k_packed[:, :, : len(chosen)], k[:, :, chosen])
    assert torch.equal(v_packed[:, :, : len(chosen)], v[:, :, chosen])


@pytest.mark.parametrize("count", [-5, -(2**31), 61, 2**31 - 1])
def test_counts_are_clamped(count: int) -> None:
    _, k, v = make_qkv(1, 2, 2, 60, 64, layout="sliced")
    index = torch.arange(60, dtype=torch.int32)[None]
    k_packed, v_packed = ops.pack_kv(k, v, index, torch.tensor([count], dtype=torch.int32))
    if count > 0:
        assert torch.equal(k_packed, k) and torch.equal(v_packed, v)


def test_garbage_positions_are_skipped() -> None:
    """What lies between may be anything; the valid entries land in their places and nothing outside is read."""
    N = 50
    _, k, v = make_qkv(1, 2, 2, N, 64, layout="sliced")
    index = torch.randint(-(2**31), 2**31 - 1, (1, N), dtype=torch.int32)
    valid = torch.tensor([0, 7, 8, 30, 49])
    index[0, valid] = torch.tensor([49, 3, 3, 0, 12], dtype=torch.int32)
    k_packed, v_packed = ops.pack_kv(k, v, index, torch.tensor([N], dtype=torch.int32))
    assert torch.equal(k_packed[:, :, valid], k[:, :, [49, 3, 3, 0, 12]])
    assert torch.equal(v_packed[:, :, valid], v[:, :, [49, 3, 3, 0, 12]])


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0)])
def test_empty(B: int, N: int) -> None:
    _, k, v = make_qkv(B, 2, 2, N, 64)
    index, count = torch.zeros(B, N, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    for packed in ops.pack_kv(k, v, index, count):
        assert packed.shape == (B, 2, N, 64) and packed.dtype == torch.float32
