"""pack_paged: selected keys and values into the blocks of a paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl import ops, reference

from .helpers import DTYPES, LAYOUTS, make_qkv, make_selection, poison, sample_tensors, selected_mask, strided

Tensor = torch.Tensor
CACHES = ("plain", "heads first", "interleaved", "stacked")


def make_cache(
    blocks: int, block_size: int, H: int, D: int, dtype: torch.dtype, layout: str = "plain"
) -> tuple[Tensor, Tensor]:
    """Views ``[blocks, block_size, H, D]`` of the keys and the values of a cache full of NaN, as engines have it."""
    if layout == "plain":  # two tensors
        k, v = torch.full((2, blocks, block_size, H, D), torch.nan, dtype=dtype).unbind()
        return k.clone(), v.clone()
    if layout == "heads first":
        both = torch.full((2, blocks, H, block_size, D), torch.nan, dtype=dtype)
        return both[0].transpose(1, 2), both[1].transpose(1, 2)
    if layout == "interleaved":  # a token's key and value lie together
        both = torch.full((blocks, H, block_size, 2 * D), torch.nan, dtype=dtype).transpose(1, 2)
        return both[..., :D], both[..., D:]
    both = torch.full((blocks, 2, block_size, H, D), torch.nan, dtype=dtype)  # stacked
    return both[:, 0], both[:, 1]


def make_table(B: int, M: int, blocks: int, seed: int = 0) -> Tensor:
    """``[B, M]`` different blocks."""
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))[: B * M]
    return order.reshape(B, M).to(torch.int32)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits up to what NaN is: slots that nothing was written to hold NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check(k: Tensor, v: Tensor, index: Tensor, count: Tensor, table: Tensor, cache: Any, **keywords: Tensor) -> Tensor:
    """Caches and result are the reference's, what nothing was written to included. Returns the result."""
    expected_cache = [x.clone() for x in cache]
    expected = reference.pack_paged(k, v, index, count, table, *expected_cache, **keywords)
    stored = ops.pack_paged(k, v, index, count, table, *cache, **keywords)
    assert torch.equal(stored, expected) and stored.dtype == torch.int32
    for ours, theirs in zip(cache, expected_cache, strict=True):
        assert same(ours, theirs)
    return stored


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 80])
def test_rows_are_copied_bit_for_bit(D: int, dtype: torch.dtype, cache_layout: str, layout: str) -> None:
    B, N, block_size = 3, 150, 16
    _, k, v = make_qkv(B, 4, 2, N, D, dtype, layout)
    index, count = make_selection(B, N)
    outside = ~selected_mask(index, count)
    cache = make_cache(40, block_size, 2, D, dtype, cache_layout)
    table = make_table(B, 10, 40)
    stored = check(poison(k, outside), poison(v, outside), index, count, table, cache)
    assert torch.equal(stored, count)
    for b in range(B):  # what stands in the slots, without the reference
        slots = torch.arange(int(count[b]))
        at = table[b][slots // block_size].long(), slots % block_size
        chosen = index[b, : count[b]].long()
        assert torch.equal(cache[0][at].transpose(0, 1), k[b][:, chosen])
        assert torch.equal(cache[1][at].transpose(0, 1), v[b][:, chosen])


@given(data=st.data())
def test_any_slots(data: st.DataObject) -> None:
    B, N, M = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5))
    block_size = data.draw(st.integers(1, 7))
    blocks = B * M + 2
    _, k, v = make_qkv(B, 1, 1, N, 4)
    index, count = make_selection(B, N)
    any_int = st.one_of(st.integers(-3, M * block_size + 3), st.sampled_from([-(2**31), 2**31 - 1]))
    vector = st.lists(any_int, min_size=B, max_size=B).map(lambda values: int32(*values))
    keywords = {name: data.draw(vector) for name in ("capacity", "first_slot") if data.draw(st.booleans())}
    check(k, v, index, count, make_table(B, M, blocks), make_cache(blocks, block_size, 1, 4, k.dtype), **keywords)


def test_the_last_ones_that_fit_are_stored() -> None:
    N, block_size = 60, 8
    _, k, v = make_qkv(2, 2, 2, N, 64)
    index, count = torch.arange(N, dtype=torch.int32).repeat(2, 1), int32(N, 20)
    cache = make_cache(20, block_size, 2, 64, k.dtype)
    table = make_table(2, 10, 20)
    stored = check(k, v, index, count, table, cache, capacity=int32(11, 1000), first_slot=int32(3, 70))
    assert stored.tolist() == [11, 10]  # the second row has 80 slots
    assert torch.equal(cache[0][table[0, 0].long(), 3], k[0, :, N - 11])
    assert torch.equal(cache[1][table[0, 1].long(), 5], v[0, :, N - 1])
    assert bool(cache[0][table[0, 0].long(), :3].isnan().all()) and bool(cache[0][table[0, 1].long(), 6:].isnan().all())
    assert torch.equal(cache[0][table[1, 9].long(), 7], k[1, :, 19])


def test_a_decoding_step() -> None:
    """One token a row, each behind what its row holds; a row of padding is passed over."""
    _, k, v = make_qkv(4, 2, 2, 1, 64)
    cache, table = make_cache(9, 4, 2, 64, k.dtype), make_table(4, 2, 9)
    here, one = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    stored = check(k, v, here, one, table, cache, first_slot=int32(0, 6, -1, 7))
    assert stored.tolist() == [1, 1, 0, 1]
    assert torch.equal(cache[1][table[1, 1].long(), 2], v[1, :, 0])
    assert int((~cache[0].isnan()).any(dim=(2, 3)).sum()) == 3


def test_strided_index_and_table() -> None:
    _, k, v = make_qkv(3, 2, 2, 70, 64)
    index, count = make_selection(3, 70)
    check(k, v, strided(index), count, strided(make_table(3, 9, 30)), make_cache(30, 8, 2, 64, k.dtype))


@pytest.mark.parametrize("count", [-5, -(2**31), 61, 2**31 - 1])
def test_counts_are_clamped(count: int) -> None:
    _, k, v = make_qkv(1, 2, 2, 60, 64, layout="sliced")
    index = torch.arange(60, dtype=torch.int32)[None]
    stored = check(k, v, index, int32(count), make_table(1, 9, 9), make_cache(9, 8, 2, 64, k.dtype))
    assert stored.tolist() == [60 if count > 0 else 0]


def test_garbage_positions_and_blocks_are_skipped() -> None:
    """They take a slot each, which keeps what it held; nothing outside is read or written."""
    N = 50
    _, k, v = make_qkv(1, 2, 2, N, 64, layout="sliced")
    index = torch.randint(-(2**31), 2**31 - 1, (1, N), dtype=torch.int32)
    index[0, [0, 7, 8, 30, 49]] = int32(49, 3, 3, 0, 12)
    table = torch.tensor([[5, -1, 2**31 - 1, 9, 0, 10, -(2**31)]], dtype=torch.int32)
    surrounded = torch.full((2, 12, 8, 2, 64), torch.nan)
    cache = surrounded[0, 1:11], surrounded[1, 1:11]
    stored = check(k, v, index, int32(N), table, cache)
    assert stored.tolist() == [N]
    assert torch.equal(cache[0][5, 0], k[0, :, 49]) and torch.equal(cache[0][9, 6], k[0, :, 0])
    assert bool(surrounded[:, [0, 11]].isnan().all())


@pytest.mark.parametrize(("B", "N", "M", "blocks"), [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_empty(B: int, N: int, M: int, blocks: int) -> None:
    _, k, v = make_qkv(B, 2, 2, N, 64)
    index, count = torch.zeros(B, N, dtype=torch.int32), torch.full((B,), N, dtype=torch.int32)
    cache = make_cache(blocks, 4, 2, 64, k.dtype)
    table = torch.zeros(B, M, dtype=torch.int32)
    stored = check(k, v, index, count, table, cache)
    assert stored.tolist() == [0] * B


@pytest.mark.parametrize("name", ["capacity", "first_slot"])
def test_vectors_are_checked(name: str) -> None:
    tensors = sample_tensors("pack_paged")
    for value, expected in (
        (torch.zeros(2), "dtype int32.*float32"),
        (int32(1, 2, 3), r"shape \[2\].*\[3\]"),
        (int32(1, 2).to("meta"), "cpu.*meta"),
    ):
        with pytest.raises(RuntimeError, match=f"pack_paged: {name} must .*{expected}"):
            ops.pack_paged(*tensors.values(), **{name: value})


@pytest.mark.parametrize("inference", [True, False])
def test_in_place_under_inference_mode(inference: bool) -> None:
    """The caches' version is counted up, so that Autograd and functionalisation see the write."""
    _, k, v = make_qkv(1, 2, 2, 40, 64)
    index, count = make_selection(1, 40)
    cache = make_cache(6, 8, 2, 64, k.dtype)
    with torch.inference_mode(inference):
        ops.pack_paged(k, v, index, count, make_table(1, 5, 6), *cache)
    assert int((~cache[0].isnan()).any(dim=(2, 3)).sum()) == int(count)


def test_compiled_around_other_writes() -> None:
    """Order with other writes to the same cache is kept when a graph is made of it."""
    _, k, v = make_qkv(1, 2, 2, 40, 64)
    index, count = make_selection(1, 40)
    table = make_table(1, 5, 6)

    def step(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        k_cache.zero_()
        ops.pack_paged(k, v, index, count, table, k_cache, v_cache)
        return k_cache * 2

    plain, traced = make_cache(6, 8, 2, 64, k.dtype), make_cache(6, 8, 2, 64, k.dtype)
    doubled = step(*plain)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*traced), doubled)
    assert torch.equal(traced[0], plain[0]) and same(traced[1], plain[1])
    assert torch.equal(doubled, 2 * plain[0]) and bool(plain[0].any())
