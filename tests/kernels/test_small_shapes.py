"""Every kernel at a small shape, in every family and dtype, by the checks of its own file. These tests are what
``make gpu-check`` runs under compute-sanitizer, where a launch takes a hundred times as long as alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.kernels.test_decode_attn import case, check_bytes, check_quantized
from tests.kernels.test_decode_attn import check as check_decode_attn
from tests.kernels.test_neighbourhood import last_queries
from tests.kernels.test_ops import UNDER_INITCHECK, cuda
from tests.kernels.test_pack_kv import check as check_pack_kv
from tests.kernels.test_pack_paged import check as check_pack_paged
from tests.kernels.test_probe_scores import check as check_probe_scores
from tests.kernels.test_probe_scores import inputs as probe_inputs
from tests.kernels.test_select_tokens import check as check_select_tokens
from tests.kernels.test_select_tokens import integers
from tests.kernels.test_sparse_attn import check as check_sparse_attn
from tests.kernels.test_sparse_attn import make_qkv as qkv_on_gpu
from tests.kernels.test_sparse_attn import make_selection as selection_on_gpu
from tests.kernels.test_zipvl_attn import check as check_zipvl_attn
from tests.kernels.test_zipvl_attn import inputs as layer_inputs
from tests.unit.helpers import assert_accurate, double, make_mask, make_qkv, make_selection, selected_mask
from tests.unit.test_pack_paged import int32, make_cache, make_table
from tests.unit.test_projections import projection, widened
from zipvl import ops, reference

pytestmark = pytest.mark.sanitizer

# Every kernel of csrc/cuda and the test that launches it (tests/unit/packaging/test_gpu_check.py compares the names).
LAUNCHED_BY = {
    "probe_index_kernel": "test_probe_index",
    "gather_rows_kernel": "test_probe_scores",
    "probe_rows_sm80": "test_probe_scores",
    "probe_rows_sm90": "test_probe_scores",
    "combine_rows_kernel": "test_probe_scores",
    "probe_columns_sm80": "test_probe_scores",
    "probe_columns_sm90": "test_probe_scores",
    "probe_cluster_sm90": "test_probe_scores",
    "finish_scores_kernel": "test_probe_scores",
    "by_block": "test_select_tokens",
    "by_block_of_sums": "test_zipvl_attn",
    "by_cluster": "test_select_tokens",
    "by_grid": "test_select_tokens",
    "pack_kv_kernel": "test_pack_kv",
    "pack_paged_kernel": "test_pack_paged",
    "extend_selection_kernel": "test_neighbourhoods",
    "row_ranges_kernel": "test_neighbourhoods",
    "ranged_attn_sm80": "test_neighbourhoods",
    "ranged_attn_sm90": "test_neighbourhoods",
    "window_attn_sm90": "test_neighbourhoods",
    "sparse_attn_sm80": "test_sparse_attn",
    "sparse_attn_sm90": "test_sparse_attn",
    "seen_tokens_kernel": "test_sparse_attn",
    "zero_padding_kernel": "test_zipvl_attn",
    "decode_attn_kernel": "test_decode_attn",
    "combine_kernel": "test_decode_attn",
    "count_kernel": "test_quantize_kv",
    "emit_kernel": "test_quantize_kv",
    "largest_kernel": "test_quantize_kv",
    "factor_kernel": "test_quantize_kv",
    "pack_kernel": "test_quantize_kv",
    "decode_attn_quantized_kernel": "test_decode_attn_quantized",
    "combine_quantized_kernel": "test_decode_attn_quantized",
    "copy_rows_kernel": "test_projections",
    "place_queries_kernel": "test_projections",
}
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)


@pytest.fixture(params=["native", "sm80"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own kernels (Hopper's, on Hopper), and the portable ones."""
    monkeypatch.setenv("ZIPVL_FORCE_SM80", "1" if request.param == "sm80" else "0")


@pytest.mark.parametrize("mask", ["none", "inner"])
def test_probe_index(mask: str) -> None:
    q, token_mask = torch.empty(3, 1, 300, 8), make_mask(mask, 3, 300)
    expected = ops.probe_index(q, token_mask=token_mask)
    q_gpu, mask_gpu = cuda(q, token_mask)
    assert torch.equal(ops.probe_index(q_gpu, token_mask=mask_gpu).cpu(), expected)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_scores(dtype: torch.dtype, D: int) -> None:
    """6/2 heads: on Hopper one kernel for both passes; 16 heads take two."""
    for Hq, Hkv in ((6, 2), (16, 16)):
        q, k, probes, token_mask = probe_inputs(2, Hq, Hkv, 300, D, dtype, mask="left")
        check_probe_scores(q, k, probes)
        check_probe_scores(q, k, probes, causal=False, token_mask=token_mask)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("N", [500, 6000, 9000, 20_000, 70_000])
def test_select_tokens(N: int) -> None:
    """One block; on Hopper clusters of 4 and 8, and a grid at 70,000 tokens; without clusters a grid from 20,000."""
    B = 2 if N < 10_000 else 1
    scores, mask = integers(B, N, 40), make_mask("inner", B, N)
    check_select_tokens(*scores, tau=0.875)
    check_select_tokens(*scores, ratio=0.25, token_mask=mask, keep_mask=torch.rand(B, N) < 0.01)


@pytest.mark.parametrize("layout", ["bnhd", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_kv(dtype: torch.dtype, layout: str) -> None:
    for D in (64, 128):
        _, k, v = make_qkv(2, 2, 2, 150, D, dtype, layout)
        check_pack_kv(k, v, *make_selection(2, 150))


@pytest.mark.parametrize("layout", ["heads first", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_paged(dtype: torch.dtype, layout: str) -> None:
    for D in (64, 128):
        _, k, v = make_qkv(2, 2, 2, 150, D, dtype)
        cache = make_cache(30, 16, 2, D, dtype, layout)
        room = {"capacity": int32(40, 200), "first_slot": int32(5, 0)}
        check_pack_paged(k, v, *make_selection(2, 150), make_table(2, 12, 30), cache, **room)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_attn(dtype: torch.dtype, D: int) -> None:
    tensors, selection = qkv_on_gpu(2, 6, 2, 300, D, dtype), selection_on_gpu(300, [0, 201])
    for causal in (True, False):
        for all_queries in (False, True):
            check_sparse_attn(*tensors, *selection, causal=causal, all_queries=all_queries)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zipvl_attn(dtype: torch.dtype, D: int, all_queries: bool) -> None:
    """The whole layer: each kernel starts before the one ahead of it has ended, and all share one workspace."""
    mask = make_mask("left", 2, 300)
    assert mask is not None
    check_zipvl_attn(*layer_inputs(2, 6, 2, 300, D, dtype), tau=0.8, token_mask=mask.cuda(), all_queries=all_queries)


@pytest.fixture
def seen_outputs() -> Iterator[None]:
    """initcheck does not see what the copy engine writes, the outputs of a window: under it torch fills new memory."""
    if UNDER_INITCHECK:
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("family", "seen_outputs")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbourhoods(dtype: torch.dtype, D: int, masked: bool) -> None:
    S = 200
    q, k, v = qkv_on_gpu(2, 4, 2, S, D, dtype)
    token_mask = make_mask("inner", 2, S).cuda() if masked else None
    extra = torch.zeros(2, S, dtype=torch.bool, device="cuda")
    extra[:, S // 3] = True
    last_key = torch.full((2, S // 2), S - 1, dtype=torch.int32, device="cuda")
    for queries, local_window, num_sinks in ((S, 64, 3), (S // 2, 64, 20), (S // 2, 0, 0)):
        for all_queries in (False, True):
            rows = last_queries(q, queries)
            out, index, count, k_packed, _ = ops.zipvl_layer(
                rows, k, v, ratio=0.3, local_window=local_window, num_sinks=num_sinks, token_mask=token_mask,
                extra_mask=extra, all_queries=all_queries, pack=True,
            )  # fmt: skip
            assert bool(out.isfinite().all()) and k_packed.shape == k.shape
            if queries < S:
                ends = ops.sparse_attn(
                    rows, k, v, index, count, local_window=local_window, num_sinks=num_sinks, token_mask=token_mask,
                    last_key=last_key, all_queries=all_queries,
                )  # fmt: skip
                assert bool(ends.isfinite().all())


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attn(dtype: torch.dtype, D: int) -> None:
    check_decode_attn(*case(3, 14, 2, 333, D, dtype), [333, 0, 57])


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_kv(dtype: torch.dtype, D: int) -> None:
    """More tokens than one block splits."""
    _, k, v = make_qkv(1, 2, 2, 1100, D, dtype)
    mask = make_mask("inner", 1, 1100)
    assert mask is not None
    index, count = ops.select_tokens(*torch.rand(2, 1, 1100), ratio=0.4, token_mask=mask)
    for bits in (((4, 4), (4, 2)), ((2, 2), (8, 8))):
        check_bytes(k, v, index, count, mask, bits)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attn_quantized(dtype: torch.dtype, D: int) -> None:
    q, k, v = make_qkv(2, 14, 2, 333, D, dtype)
    recent = (k[:, :, :50], v[:, :, :50], torch.tensor([50, 0], dtype=torch.int32))
    for high, low in (((4, 4), (4, 2)), ((2, 2), (8, 8))):
        bits: dict[str, Any] = {"high_bits": high, "low_bits": low}
        check_quantized(q[:, :, :1], ops.quantize_kv(k, v, *make_selection(2, 333), **bits), recent, **bits)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, N, C, H", [(2, 130, 96, 3), (3, 3000, 64, 1)], ids=["one chunk", "chunks"])
def test_projections(B: int, N: int, C: int, H: int, dtype: torch.dtype, D: int) -> None:
    tensors, keywords = projection(B, N, C, H, D, dtype, bias=True, norm=True)
    index, count = make_selection(B, N)
    chosen = selected_mask(index, count)
    wide, wide_keywords = widened(tensors, keywords)
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}
    queries = (
        ops.project_queries(*cuda(*tensors, index, count), **on_gpu).cpu(),
        reference.project_queries(*wide, index, count, **wide_keywords),
        reference.project_queries(*tensors, index, count, **keywords),
    )
    assert_accurate(*(q.transpose(1, 2)[chosen] for q in queries), floor=0.0)
    x, weight = torch.randn(B, N, H * D).to(dtype), (torch.randn(C, H * D) * (H * D) ** -0.5).to(dtype)
    out = ops.project_outputs(*cuda(x, weight, index, count)).cpu()
    exact = reference.project_outputs(*double(x, weight), index, count)
    assert_accurate(out, exact, reference.project_outputs(x, weight, index, count), floor=0.0)
