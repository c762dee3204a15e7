"""pack_paged on CUDA: bytes, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_ops import cuda, no_host_sync, poison_free_memory
from tests.kernels.test_pack_kv import as_view_on_gpu
from tests.unit.helpers import DTYPES, LAYOUTS, all_tokens, make_qkv, make_selection, poison, selected_mask, strided
from tests.unit.test_pack_paged import CACHES, int32, make_cache, make_table, same
from zipvl import ops, reference

Tensor = torch.Tensor


def on_gpu(cache: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The two views on the GPU, of one storage where they share one."""
    k, v = cache
    if k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr():
        return as_view_on_gpu(k), as_view_on_gpu(v)
    elements = k.untyped_storage().nbytes() // k.element_size()
    whole = k.as_strided((elements,), (1,), 0).cuda()
    return tuple(whole.as_strided(x.shape, x.stride(), x.storage_offset()) for x in cache)  # type: ignore[return-value]


def check(
    k: Tensor, v: Tensor, index: Tensor, count: Tensor, table: Tensor, cache: tuple[Tensor, Tensor], **keywords: Tensor
) -> Tensor:
    """Caches and result are the reference's, what nothing was written to included; what is not selected is NaN."""
    outside = ~selected_mask(index.clamp(max=k.shape[2] - 1), count)
    expected_cache = tuple(x.clone() for x in cache)
    expected = reference.pack_paged(k, v, index, count, table, *expected_cache, **keywords)
    tensors = [as_view_on_gpu(poison(x, outside)) for x in (k, v)] + cuda(index, count, table)
    moved, given = on_gpu(cache), {name: value.cuda() for name, value in keywords.items()}
    poison_free_memory()
    with no_host_sync():
        stored = ops.pack_paged(*tensors, *moved, **given)
    assert torch.equal(stored.cpu(), expected)
    for ours, theirs in zip(moved, expected_cache, strict=True):
        assert same(ours.cpu(), theirs)
    return stored


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 33, 64, 80, 128, 256, 513])
def test_rows_are_copied_bit_for_bit(D: int, dtype: torch.dtype, cache_layout: str, layout: str) -> None:
    _, k, v = make_qkv(3, 4, 2, 150, D, dtype, layout)
    check(k, v, *make_selection(3, 150), make_table(3, 10, 40), make_cache(40, 16, 2, D, dtype, cache_layout))


@pytest.mark.parametrize("N", [1, 7, 32, 33, 1000, 4097])
@pytest.mark.parametrize("H", [1, 3, 40])
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_lengths_heads_and_blocks(block_size: int, H: int, N: int) -> None:
    _, k, v = make_qkv(1, H, H, N, 16, torch.bfloat16)
    M = -(-N // block_size)
    for index, count in (make_selection(1, N, share=0.3), all_tokens(1, N)):
        check(k, v, index, count, make_table(1, M, M + 3), make_cache(M + 3, block_size, H, 16, k.dtype))


def test_room() -> None:
    """Of more than fit the last are stored; a row that begins below 0 is passed over."""
    N = 300
    _, k, v = make_qkv(5, 2, 2, N, 64, torch.float16)
    index, count = all_tokens(5, N)
    count[:] = int32(300, 300, 7, 0, 300)
    keywords = {"capacity": int32(100, 1000, 5, 9, -3), "first_slot": int32(3, 310, 0, 0, 0)}
    cache = make_cache(110, 16, 2, 64, k.dtype)
    stored = check(k, v, index, count, make_table(5, 20, 110), cache, **keywords)
    assert stored.tolist() == [100, 10, 5, 0, 0]
    keywords["first_slot"] = int32(-1, -(2**31), 2**31 - 1, 320, 319)
    stored = check(k, v, index, count, make_table(5, 20, 110), cache, **keywords)
    assert stored.tolist() == [0, 0, 0, 0, 0]


def test_garbage_is_skipped() -> None:
    N = 5000
    _, k, v = cuda(*make_qkv(1, 2, 2, N, 64))
    index = torch.randint(-(2**31), 2**31 - 1, (1, N), dtype=torch.int32)
    valid = torch.tensor([0, 7, 8, 30, N - 1])
    index[0, valid] = int32(N - 1, 3, 3, 0, 12)
    table = torch.randint(-(2**31), 2**31 - 1, (1, 313), dtype=torch.int32)
    table[0, [0, 1, 312]] = int32(2, 0, 1)
    surrounded = torch.full((2, 5, 16, 2, 64), torch.nan, device="cuda")
    cache = surrounded[0, 1:4], surrounded[1, 1:4]
    stored = ops.pack_paged(k, v, *cuda(index, int32(2**31 - 1), table), *cache)
    assert stored.tolist() == [N]
    assert torch.equal(cache[0][[2, 2, 2, 0, 1], [0, 7, 8, 14, 7]], k[0, :, [N - 1, 3, 3, 0, 12]].transpose(0, 1))
    assert bool(surrounded[:, [0, 4]].isnan().all())


def test_strided_arguments() -> None:
    _, k, v = make_qkv(3, 2, 2, 70, 64)
    index, count = make_selection(3, 70)
    table, cache = make_table(3, 9, 30), make_cache(30, 8, 2, 64, k.dtype)
    plain, moved = on_gpu(cache), on_gpu(cache)
    wide = torch.zeros(3, 3, dtype=torch.int32)
    wide[:, 1] = count
    ops.pack_paged(*cuda(k, v, index, count, table), *plain)
    ops.pack_paged(*cuda(k, v), strided(index).cuda(), wide.cuda()[:, 1], strided(table).cuda(), *moved)
    assert same(plain[0].cpu(), moved[0].cpu()) and same(plain[1].cpu(), moved[1].cpu())


def test_more_rows_than_a_grid_has() -> None:
    _, k, v = make_qkv(1, 1, 1, 2, 2, torch.float16)
    rows = 70_000
    k, v = (x.cuda().expand(rows, -1, -1, -1) for x in (k, v))
    index = torch.tensor([[1, 0]], dtype=torch.int32).cuda().expand(rows, -1)
    count = torch.tensor([2], dtype=torch.int32).cuda().expand(rows)
    table = torch.arange(rows, dtype=torch.int32).cuda()[:, None]
    cache = on_gpu(make_cache(rows, 2, 1, 2, torch.float16))
    assert bool((ops.pack_paged(k, v, index, count, table, *cache) == 2).all())
    assert torch.equal(cache[1], v.flip(2).transpose(1, 2))


def test_graph_replay_follows_count_and_table() -> None:
    """A decoding step and a prompt, captured once: counts, tables and places are read when the graph runs."""
    _, k, v = cuda(*make_qkv(2, 4, 4, 3000, 128, torch.bfloat16))
    index, count = cuda(*make_selection(2, 3000))
    table, cache = make_table(2, 40, 90).cuda(), on_gpu(make_cache(90, 128, 4, 128, k.dtype))
    first = torch.zeros(2, dtype=torch.int32, device="cuda")
    ops.pack_paged(k, v, index, count, table, *cache, first_slot=first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stored = ops.pack_paged(k, v, index, count, table, *cache, first_slot=first)
    for seed, most in ((1, 10), (2, 1000)):
        count.fill_(most)
        first.fill_(seed)
        table.copy_(make_table(2, 40, 90, seed))
        expected = tuple(x.fill_(torch.nan).cpu().clone() for x in cache)
        arguments = [x.cpu() for x in (k, v, index, count, table)]
        wanted = reference.pack_paged(*arguments, *expected, first_slot=first.cpu())
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(stored.cpu(), wanted)
        assert same(cache[0].cpu(), expected[0]) and same(cache[1].cpu(), expected[1])


def test_offsets_beyond_32_bits() -> None:
    """The last block starts beyond 2**32 elements."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    storage = torch.empty(9 * 2**29 + 64, dtype=torch.bfloat16, device="cuda")
    cache = storage.as_strided((2, 4, 1, 8), (9 * 2**29, 8, 8, 1))
    _, k, v = cuda(*make_qkv(1, 1, 1, 4, 8, torch.bfloat16))
    index, count = cuda(*all_tokens(1, 4))
    table = torch.tensor([[1]], dtype=torch.int32).cuda()
    values = torch.empty(2, 4, 1, 8, dtype=torch.bfloat16, device="cuda")
    ops.pack_paged(k, v, index, count, table, cache, values)
    assert torch.equal(cache[1, :, 0], k[0, 0]) and torch.equal(values[1, :, 0], v[0, 0])
