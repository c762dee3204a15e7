"""pack_kv on CUDA: bytes, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_ops import cuda, no_host_sync, poison_free_memory
from tests.unit.helpers import DTYPES, LAYOUTS, all_tokens, make_qkv, make_selection, poison, selected_mask, strided
from zipvl import ops


def check(k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> None:
    """Packs on the GPU what only may be read there: everything outside the selection is NaN."""
    outside = ~selected_mask(index, count)
    # Moved as storages, so that views stay views.
    arguments = [as_view_on_gpu(poison(x, outside)) for x in (k, v)] + cuda(index, count)
    poison_free_memory()
    with no_host_sync():
        packed = ops.pack_kv(*arguments)
    for whole, rows in zip((k, v), packed, strict=True):
        assert rows.dtype == k.dtype and rows.shape == k.shape and rows.is_contiguous()
        for b in range(len(count)):
            T = index[b, : count[b]].long()
            assert torch.equal(rows[b, :, : len(T)].cpu(), whole[b][:, T])


def as_view_on_gpu(x: torch.Tensor) -> torch.Tensor:
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return moved.copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 3, 33, 64, 80, 96, 128, 256, 513])
def test_rows_are_copied_bit_for_bit(D: int, dtype: torch.dtype, layout: str) -> None:
    _, k, v = make_qkv(3, 4, 2, 150, D, dtype, layout)
    check(k, v, *make_selection(3, 150))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_any_alignment(offset: int, dtype: torch.dtype) -> None:
    """Views that start anywhere: only as wide a vector as all of them allow is moved."""
    storage = torch.randn(2, 300, 3, 72).to(dtype).cuda()
    k, v = (storage[..., offset : offset + 64].transpose(1, 2) for _ in range(2))
    index, count = cuda(*make_selection(2, 300))
    for rows in ops.pack_kv(k, v, index, count):
        for b in range(2):
            assert torch.equal(rows[b, :, : count[b]], k[b][:, index[b, : count[b]].long()])


@pytest.mark.parametrize("N", [1, 7, 8, 9, 31, 32, 33, 63, 65, 4096, 4097])
@pytest.mark.parametrize("H", [1, 3, 40])
def test_lengths_and_heads(H: int, N: int) -> None:
    _, k, v = make_qkv(1, H, H, N, 64, torch.bfloat16)
    for index, count in (make_selection(1, N, share=0.3), all_tokens(1, N)):
        check(k, v, index, count)


def test_counts_differ_and_may_be_zero() -> None:
    _, k, v = make_qkv(5, 2, 2, 300, 128, torch.float16)
    index, count = make_selection(5, 300)
    count[:] = torch.tensor([0, 300, 1, 129, 0])
    index[1] = torch.arange(300)
    for b in (0, 2, 3, 4):
        index[b] = torch.arange(300)
        index[b, count[b] :] = 300
    check(k, v, index, count)


def test_more_rows_than_a_grid_has() -> None:
    _, k, v = make_qkv(1, 1, 1, 2, 2, torch.float16)
    k, v = (x.cuda().expand(70_000, -1, -1, -1) for x in (k, v))
    index = torch.tensor([[1, 0]], dtype=torch.int32).cuda().expand(70_000, -1)
    count = torch.tensor([2], dtype=torch.int32).cuda().expand(70_000)
    for rows in ops.pack_kv(k, v, index, count):
        assert torch.equal(rows[[0, 65_535, 69_999]], rows[:1].expand(3, -1, -1, -1))
    assert torch.equal(rows[:1], v[:1].flip(2))


@pytest.mark.parametrize("count", [-5, -(2**31), 61, 2**31 - 1])
def test_counts_are_clamped(count: int) -> None:
    _, k, v = cuda(*make_qkv(1, 2, 2, 60, 64, layout="sliced"))
    index = torch.arange(60, dtype=torch.int32)[None].cuda()
    k_packed, v_packed = ops.pack_kv(k, v, index, torch.tensor([count], dtype=torch.int32).cuda())
    torch.cuda.synchronize()
    if count > 0:
        assert torch.equal(k_packed, k) and torch.equal(v_packed, v)


def test_garbage_positions_are_skipped() -> None:
    N = 5000
    _, k, v = cuda(*make_qkv(1, 2, 2, N, 64))
    index = torch.randint(-(2**31), 2**31 - 1, (1, N), dtype=torch.int32)
    valid = torch.tensor([0, 7, 8, 30, N - 1])
    index[0, valid] = torch.tensor([N - 1, 3, 3, 0, 12], dtype=torch.int32)
    k_packed, v_packed = ops.pack_kv(k, v, index.cuda(), torch.tensor([N], dtype=torch.int32).cuda())
    assert torch.equal(k_packed[:, :, valid.cuda()], k[:, :, [N - 1, 3, 3, 0, 12]])
    assert torch.equal(v_packed[:, :, valid.cuda()], v[:, :, [N - 1, 3, 3, 0, 12]])


def test_strided_index() -> None:
    _, k, v = cuda(*make_qkv(3, 2, 2, 70, 64))
    index, count = make_selection(3, 70)
    wide = torch.zeros(3, 3, dtype=torch.int32)
    wide[:, 1] = count
    packed = ops.pack_kv(k, v, strided(index).cuda(), wide.cuda()[:, 1])
    plain = ops.pack_kv(k, v, index.cuda(), count.cuda())
    for b in range(3):
        for a, e in zip(packed, plain, strict=True):
            assert torch.equal(a[b, :, : count[b]], e[b, :, : count[b]])


def test_offsets_beyond_32_bits() -> None:
    """The second head starts beyond 2**32 elements."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    storage = torch.empty(9 * 2**29 + 64, dtype=torch.bfloat16, device="cuda")
    k = storage.as_strided((1, 2, 4, 8), (0, 9 * 2**29, 8, 1))
    k[:, 0], k[:, 1] = 1.0, 2.0
    index = torch.tensor([[3, 0, 2, 1]], dtype=torch.int32).cuda()
    count = torch.tensor([4], dtype=torch.int32).cuda()
    for rows in ops.pack_kv(k, k, index, count):
        assert bool((rows[:, 0] == 1).all()) and bool((rows[:, 1] == 2).all())


def test_graph_replay_follows_count_and_repeats_are_equal() -> None:
    _, k, v = cuda(*make_qkv(2, 4, 4, 3000, 128, torch.bfloat16))
    index, count = cuda(*make_selection(2, 3000))
    expected = ops.pack_kv(k, v, index, count)
    n = count.tolist()
    for _ in range(100):
        again = ops.pack_kv(k, v, index, count)
        for b in range(2):
            assert all(torch.equal(a[b, :, : n[b]], e[b, :, : n[b]]) for a, e in zip(again, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.pack_kv(k, v, index, count)
    for most in (10, 1000):
        captured[0].fill_(torch.nan)
        count.fill_(most)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured[0][:, :, :most], expected[0][:, :, :most])
        assert bool(captured[0][:, :, most:].isnan().all()), "rows after count are left alone"
