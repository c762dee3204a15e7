"""sparse_attn: attention among the selected tokens (Sec. 3, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zipvl import ops, reference

from .helpers import (
    DTYPES,
    LAYOUTS,
    all_tokens,
    assert_accurate,
    double,
    make_qkv,
    make_selection,
    output_floor,
    peak_growth,
    poison,
    same_dtype_attention,
    selected_mask,
    strided,
)


def check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, **keywords: Any) -> Tensor:
    """The op, with NaN in every key and value outside ``T`` (and query, where it is not computed), against float64."""
    outside = ~selected_mask(index, count)
    q_given = q if keywords.get("all_queries") else poison(q, outside)
    out: Tensor = ops.sparse_attn(q_given, poison(k, outside), poison(v, outside), index, count, **keywords)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous(), "a transposed view of [B, N, Hq, D]"
    exact = reference.sparse_attn(*double(q, k, v), index, count, **keywords)
    baseline = same_dtype_attention(q, k, v, index, count, **keywords)
    assert_accurate(out, exact, baseline, output_floor(q, k, v, keywords.get("scale")))
    if not keywords.get("all_queries"):
        assert bool((out.transpose(1, 2)[outside] == 0).all()), "rows outside T are exactly 0"
    return out


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_head_dims(dtype: torch.dtype, group: int, D: int) -> None:
    check(*make_qkv(2, 2 * group, 2, 133, D, dtype), *make_selection(2, 133))


@pytest.mark.parametrize("N", [1, 2, 15, 63, 64, 65, 127, 128, 129, 1000, 2049, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths(dtype: torch.dtype, N: int) -> None:
    check(*make_qkv(1, 3, 1, N, 64, dtype), *make_selection(1, N, share=0.25))


@pytest.mark.parametrize("all_queries", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_modes_and_layouts(dtype: torch.dtype, layout: str, causal: bool, all_queries: bool) -> None:
    q, k, v = make_qkv(2, 6, 2, 150, 80, dtype, layout)
    check(q, k, v, *make_selection(2, 150), causal=causal, all_queries=all_queries)


@pytest.mark.parametrize("causal", [True, False])
def test_all_tokens_give_dense_attention(causal: bool) -> None:
    q, k, v = make_qkv(2, 6, 2, 200, 64)
    out = check(q, k, v, *all_tokens(2, 200), causal=causal)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, dense)


def test_scale() -> None:
    q, k, v = make_qkv(1, 4, 2, 90, 64)
    selection = make_selection(1, 90)
    assert torch.equal(check(q, k, v, *selection), check(q, k, v, *selection, scale=0.125))
    check(q, k, v, *selection, scale=0.7)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = make_qkv(1, 2, 1, 70, 64)
    assert bool(check(100 * q, 100 * k, v, *make_selection(1, 70)).isfinite().all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("all_queries", [True, False])
def test_an_empty_selection_is_zero(all_queries: bool, causal: bool) -> None:
    q, k, v = make_qkv(2, 4, 2, 40, 64)
    index, count = torch.full((2, 40), 40, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    index[1, 0], count[1] = 25, 1
    out = check(q, k, v, index, count, all_queries=all_queries, causal=causal)
    assert bool((out[0] == 0).all())
    before = out[1, :, :25]
    assert bool((before == 0).all()) or (all_queries and not causal)


def test_bad_numbers_stay_in_the_rows_that_attend_to_them() -> None:
    q, k, v = make_qkv(2, 4, 2, 60, 64)
    index, count = all_tokens(2, 60)
    clean = ops.sparse_attn(q, k, v, index, count)
    k[0, 1, 59] = torch.nan
    broken = ops.sparse_attn(q, k, v, index, count)
    assert bool(broken[0, 2:, 59].isnan().all()), "a NaN that T names is not hidden"
    assert bool(broken[0, :2].isfinite().all()), "heads of the other key/value head"
    assert torch.equal(broken[1], clean[1])


@pytest.mark.parametrize("all_queries", [True, False])
def test_garbage_positions_are_skipped(all_queries: bool) -> None:
    N = 60
    q, k, v = make_qkv(1, 4, 2, N, 64, layout="sliced")
    clean = torch.tensor([[2, 9, 10, 33, 59] + [N] * (N - 5)], dtype=torch.int32)
    dirty = clean.clone()
    dirty[0, :9] = torch.tensor([-(2**31), 2, -1, 9, 10, N, 33, 2**31 - 1, 59])
    exact = reference.sparse_attn(*double(q, k, v), clean, torch.tensor([5]), all_queries=all_queries)
    out = ops.sparse_attn(q, k, v, dirty, torch.tensor([9], dtype=torch.int32), all_queries=all_queries)
    baseline = same_dtype_attention(q, k, v, clean, torch.tensor([5]), all_queries=all_queries)
    assert_accurate(out, exact, baseline, output_floor(q, k, v))


@pytest.mark.parametrize("count", [-1, -(2**31), 61, 2**31 - 1])
def test_counts_are_clamped(count: int) -> None:
    q, k, v = make_qkv(1, 4, 2, 60, 64, layout="sliced")
    index, full = all_tokens(1, 60)
    out = ops.sparse_attn(q, k, v, index, torch.tensor([count], dtype=torch.int32))
    if count < 0:
        assert bool((out == 0).all())
    else:
        assert torch.equal(out, ops.sparse_attn(q, k, v, index, full))


@pytest.mark.parametrize("all_queries", [True, False])
def test_strided_index(all_queries: bool) -> None:
    q, k, v = make_qkv(3, 4, 2, 70, 64)
    index, count = make_selection(3, 70)
    plain = ops.sparse_attn(q, k, v, index, count, all_queries=all_queries)
    assert torch.equal(ops.sparse_attn(q, k, v, strided(index), count, all_queries=all_queries), plain)


@given(seed=st.integers(0, 2**32), count=st.integers(-3, 40), all_queries=st.booleans(), causal=st.booleans())
def test_hostile_indices_never_leave_the_tensors(seed: int, count: int, all_queries: bool, causal: bool) -> None:
    """Unsorted, repeated and impossible positions: values are unspecified, but nothing around the tensors is read."""
    N = 30
    generator = torch.Generator().manual_seed(seed)
    q, k, v = make_qkv(1, 2, 1, N, 64, layout="sliced")
    index = torch.randint(-10, N + 10, (1, N), dtype=torch.int32, generator=generator)
    wild = torch.rand(1, N, generator=generator) < 0.2
    index[wild] = torch.randint(-(2**31), 2**31 - 1, (int(wild.sum()),), dtype=torch.int32, generator=generator)
    counts = torch.tensor([count], dtype=torch.int32)
    out = ops.sparse_attn(q, k, v, index, counts, all_queries=all_queries, causal=causal)
    assert out.shape == q.shape and bool(out.isfinite().all())


@pytest.mark.usefixtures("all_threads")
def test_same_bits_every_time_and_for_a_row_alone() -> None:
    q, k, v = make_qkv(3, 14, 2, 300, 128, torch.bfloat16)
    index, count = make_selection(3, 300)
    together = ops.sparse_attn(q, k, v, index, count)
    for _ in range(3):
        assert torch.equal(ops.sparse_attn(q, k, v, index, count), together)
    for b in range(3):
        row = slice(b, b + 1)
        assert torch.equal(ops.sparse_attn(q[row], k[row], v[row], index[row], count[row]), together[row])


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("all_queries", [True, False])
def test_empty(B: int, N: int, all_queries: bool) -> None:
    q, k, v = make_qkv(B, 4, 2, N, 64, torch.float16)
    index, count = torch.zeros(B, N, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    out = ops.sparse_attn(q, k, v, index, count, all_queries=all_queries)
    assert out.shape == (B, 4, N, 64) and out.dtype == torch.float16


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """The peak grows by less than an ``[N, N]`` tensor of bytes, the smallest there is; the reference's by more."""
    N = 8192
    program = """
        import torch
        from zipvl import ops, reference

        N = {N}
        q, k, v = torch.randn(3, 1, 1, N, 64)
        index, count = torch.arange(N, dtype=torch.int32)[None], torch.full((1,), N, dtype=torch.int32)

        def run(small):
            n = 512 if small else N
            rows = slice(0, n)
            for keywords in {keywords}:
                {module}.sparse_attn(q[:, :, rows], k[:, :, rows], v[:, :, rows], index[:, rows], count, **keywords)
    """
    both = [{}, {"all_queries": True}]
    assert peak_growth(program.format(N=N, module="ops", keywords=both)) < N * N
    assert peak_growth(program.format(N=N // 4, module="reference", keywords=[{}])) > (N // 4) ** 2


@pytest.mark.parametrize("all_queries", [False, True])
def test_an_index_out_of_order_is_no_error(all_queries: bool) -> None:
    """What comes out is unspecified; nothing outside the tensors is read, and nothing fails."""
    q, k, v = make_qkv(1, 2, 2, 300, 64)
    index = torch.randint(-5, 310, (1, 300), dtype=torch.int32).sort(descending=True).values
    out = ops.sparse_attn(q, k, v, index, torch.tensor([300], dtype=torch.int32), all_queries=all_queries)
    assert out.shape == q.shape and bool(out.isfinite().all())
