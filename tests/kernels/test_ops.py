"""Every op on CUDA: against the CPU's integers exactly, against float64 within the CPU tests' tolerances, without a
copy to the host, under graph capture, and on a stream and a device other than the current one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.helpers import (
    DTYPES,
    MASKS,
    OPS,
    assert_accurate,
    double,
    make_mask,
    make_qkv,
    make_selection,
    output_floor,
    poison,
    same_dtype_attention,
    sample_tensors,
    score_floor,
    selected_mask,
)
from zipvl import ops, reference
from zipvl.support import support


def cuda(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.cuda() for t in tensors]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Any synchronising call inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


UNDER_INITCHECK = os.environ.get("ZIPVL_SANITIZER") == "initcheck"  # tools/gpu_check.py


def seen_as_written(out: Tensor, rows: Tensor) -> Tensor:
    """Attention outputs ``out [B, H, N, D]`` as a test may read them: under initcheck only those of the tokens ``rows
    [B, N]``, which threads write. The copy engine writes the zeros of the others, and the tool does not see that."""
    return out.transpose(1, 2)[rows] if UNDER_INITCHECK else out


def poison_free_memory() -> None:
    """Fills what the caching allocator will hand out next with NaN, so that an unwritten output shows."""
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in (64, 1 << 10, 1 << 16, 1 << 20)]
    del blocks


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 5000, 70001])
def test_probe_index_is_the_cpus(N: int, mask: str) -> None:
    q = torch.empty(3, 1, N, 8)
    token_mask = make_mask(mask, 3, N)
    for num_recent, num_random, seed in ((64, 64, 0), (0, 7, 1), (5, 0, 2), (3, 300, 2**40 + 9)):
        keywords = {"num_recent": num_recent, "num_random": num_random, "seed": seed}
        expected = ops.probe_index(q, token_mask=token_mask, **keywords)
        q_gpu, mask_gpu = cuda(q, token_mask)
        poison_free_memory()
        with no_host_sync():
            actual = ops.probe_index(q_gpu, token_mask=mask_gpu, **keywords)
        assert torch.equal(actual.cpu(), expected)


def test_probe_index_reads_a_strided_mask() -> None:
    wide = torch.rand(4, 3000) < 0.5
    expected = ops.probe_index(torch.empty(2, 1, 1000, 8), token_mask=wide[::2, ::3].contiguous())
    assert torch.equal(
        ops.probe_index(torch.empty(2, 1, 1000, 8).cuda(), token_mask=wide.cuda()[::2, ::3]).cpu(), expected
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_scores(dtype: torch.dtype, mask: str) -> None:
    q, k, _ = make_qkv(3, 6, 2, 777, 80, dtype)
    token_mask = make_mask(mask, 3, 777)
    probes = reference.probe_index(q, token_mask=token_mask)
    exact = reference.probe_scores(*double(q, k), probes, token_mask=token_mask)
    baseline = reference.probe_scores(q.float(), k.float(), probes, token_mask=token_mask)
    arguments = cuda(q, k, probes, token_mask)
    poison_free_memory()
    with no_host_sync():
        actual = ops.probe_scores(*arguments[:3], token_mask=arguments[3])
    for score, truth, base in zip(actual, exact, baseline, strict=True):
        assert_accurate(score.cpu(), truth, base, score_floor(q, k, truth))


@pytest.mark.parametrize("mask", MASKS)
def test_select_tokens_is_the_cpus_on_exact_scores(mask: str) -> None:
    # Multiples of 2**-10 below 1: every sum of 3,000 of them is exact, so that the order of summing cannot matter.
    budget, rank = (torch.randint(1, 1024, (3, 3000)) / 1024 for _ in range(2))
    token_mask, keep_mask = make_mask(mask, 3, 3000), torch.rand(3, 3000) < 0.05
    for keywords in ({"tau": 0.9}, {"tau": 1.0}, {"ratio": 0.3}, {"tau": 0.1, "min_tokens": 700}):
        expected = ops.select_tokens(budget, rank, keep_mask=keep_mask, token_mask=token_mask, **keywords)
        arguments = cuda(budget, rank, keep_mask, token_mask)
        with no_host_sync():
            actual = ops.select_tokens(*arguments[:2], keep_mask=arguments[2], token_mask=arguments[3], **keywords)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_select_tokens_keeps_all_on_bad_scores(bad: float) -> None:
    score = torch.rand(2, 500).cuda()
    broken = score.clone()
    broken[0, 17] = bad
    if bad == 0.0:
        broken[0] = 0
    for arguments in ((broken, score), (score, broken)):
        index, count = ops.select_tokens(*arguments, tau=0.5)
        assert count[0] == 500 and count[1] < 500
        assert torch.equal(index[0].cpu(), torch.arange(500, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_kv(dtype: torch.dtype) -> None:
    _, k, v = make_qkv(3, 2, 2, 321, 96, dtype)
    index, count = make_selection(3, 321)
    arguments = cuda(k, v, index, count)
    with no_host_sync():
        packed = ops.pack_kv(*arguments)
    for b in range(3):
        T = index[b, : count[b]].long()
        for whole, rows in zip((k, v), packed, strict=True):
            assert torch.equal(rows[b, :, : len(T)].cpu(), whole[b][:, T])


@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_attn(dtype: torch.dtype, causal: bool, all_queries: bool) -> None:
    q, k, v = make_qkv(3, 6, 2, 650, 64, dtype)
    index, count = make_selection(3, 650)
    count[2] = 0
    outside = ~selected_mask(index, count)
    keywords: dict[str, Any] = {"causal": causal, "all_queries": all_queries}
    arguments = cuda(q if all_queries else poison(q, outside), poison(k, outside), poison(v, outside), index, count)
    poison_free_memory()
    with no_host_sync():
        out = ops.sparse_attn(*arguments, **keywords)
    assert out.transpose(1, 2).is_contiguous()
    exact = reference.sparse_attn(*double(q, k, v), index, count, **keywords)
    baseline = same_dtype_attention(q, k, v, index, count, **keywords)
    assert_accurate(out.cpu(), exact, baseline, output_floor(q, k, v))
    if not all_queries:
        assert bool((out.cpu().transpose(1, 2)[outside] == 0).all())


def test_sparse_attn_survives_garbage_in_the_index() -> None:
    q, k, v, index, count = cuda(*make_qkv(2, 2, 2, 300, 64), *make_selection(2, 300))
    inside = ops.sparse_attn(q, k, v, index, count)
    for b, n in enumerate(count.tolist()):
        index[b, n:] = torch.randint(-(2**31), 2**31 - 1, (300 - n,), dtype=torch.int32)
    assert torch.equal(ops.sparse_attn(q, k, v, index, count), inside)
    count.fill_(2**31 - 1)
    assert ops.sparse_attn(q, k, v, index, count).shape == q.shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attn(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(4, 6, 2, 500, 128, dtype)
    q = q[:, :, -1:]
    lengths = torch.tensor([500, 1, 0, 333], dtype=torch.int32)
    beyond = torch.arange(500)[None] >= lengths[:, None]
    arguments = cuda(q, poison(k, beyond), poison(v, beyond), lengths)
    poison_free_memory()
    with no_host_sync():
        out, lse = ops.decode_attn(*arguments)
    exact_out, exact_lse = reference.decode_attn(*double(q, k, v), lengths)
    base_out, base_lse = reference.decode_attn(q, k, v, lengths)
    assert_accurate(out.cpu(), exact_out, base_out, output_floor(q, k, v))
    some = lengths > 0
    assert_accurate(lse.cpu()[some], exact_lse[some], base_lse[some].float(), score_floor(q, k, exact_lse[some]))
    assert bool((lse[2] == -torch.inf).all()) and bool((out[2] == 0).all())


@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_zipvl_attn(mask: str, all_queries: bool) -> None:
    q, k, v = make_qkv(3, 6, 2, 700, 64)
    token_mask = make_mask(mask, 3, 700)
    arguments = cuda(q, k, v, token_mask)
    with no_host_sync():
        out, index, count = ops.zipvl_attn(
            *arguments[:3], ratio=0.3, keep_recent=5, all_queries=all_queries, token_mask=arguments[3]
        )
    real = torch.ones(3, 700, dtype=torch.bool) if token_mask is None else token_mask
    assert torch.equal(count.cpu(), (0.3 * real.sum(1).double()).ceil().clamp(min=5).minimum(real.sum(1)).int())
    exact = reference.sparse_attn(*double(q, k, v), index.cpu(), count.cpu(), all_queries=all_queries)
    baseline = same_dtype_attention(q, k, v, index.cpu(), count.cpu(), all_queries=all_queries)
    for scores in (exact, baseline):
        scores.mul_(real[:, None, :, None])
    assert_accurate(out.cpu(), exact, baseline, output_floor(q, k, v))


def whole(op: str) -> Callable[..., Any]:
    """The op, called so that its whole result is defined: packed rows past the count are not."""
    return partial(getattr(ops, op), **({"tau": 1.0} if op == "zipvl_prefill" else {}))


def dtype_of(op: str) -> torch.dtype:
    """Of inputs for a test of every op: one of them takes 16 bits alone on CUDA."""
    return torch.float16 if op == "decode_attn_quantized" else torch.float32


@pytest.mark.parametrize("op", OPS)
def test_graph_replay_is_eager(op: str) -> None:
    inputs = cuda(*sample_tensors(op, dtype=dtype_of(op)).values())
    run = whole(op)
    expected = run(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs)
    for tensor in captured if isinstance(captured, tuple) else (captured,):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    pairs = zip(captured, expected, strict=True) if isinstance(captured, tuple) else ((captured, expected),)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_repeats(op: str) -> None:
    inputs = cuda(*sample_tensors(op, N=900, dtype=dtype_of(op)).values())
    first = whole(op)(*inputs)
    for _ in range(20):
        again = whole(op)(*inputs)
        pairs = zip(again, first, strict=True) if isinstance(first, tuple) else ((again, first),)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_devices_must_agree() -> None:
    q, k, v = make_qkv(1, 2, 2, 40, 64)
    with pytest.raises(RuntimeError, match=r"zipvl_attn: k must be on cuda:0 like the other tensors, got cpu"):
        ops.zipvl_attn(q.cuda(), k, v)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one() -> None:
    q, k, v = (t.to("cuda:1") for t in make_qkv(1, 2, 2, 400, 64))
    expected = ops.zipvl_attn(q.cpu(), k.cpu(), v.cpu(), ratio=0.5)
    actual = ops.zipvl_attn(q, k, v, ratio=0.5)
    assert all(t.device == q.device for t in actual)
    assert torch.equal(actual[2].cpu(), expected[2])


@pytest.mark.parametrize("op", OPS)
def test_the_library_says_what_runs(op: str) -> None:
    """The answer of ``explain`` is what the ops do: native for what their kernels take, and why not elsewhere."""
    assert support(op, "cuda").state == "native", support(op, "cuda").reason
    for head_dim in (64, 96, 128, 256):
        assert support(op, "cuda", None, head_dim).state == "native"


@pytest.mark.parametrize(
    ("op", "dtype", "head_dim", "state", "reason"),
    [
        ("decode_attn", torch.float32, 128, "fallback", "float16 and bfloat16"),
        ("decode_attn", torch.float16, 128, "native", ""),
        ("decode_attn_quantized", torch.bfloat16, 32, "unavailable", "head_dim 64, 96, 128 and 256, got 32"),
        ("sparse_attn", torch.float32, 64, "fallback", "float16 and bfloat16"),
        ("probe_scores", torch.float16, 80, "fallback", "head_dim 64, 96, 128 and 256, got 80"),
        ("zipvl_layer", torch.bfloat16, 80, "fallback", "head_dim 64, 96, 128 and 256, got 80"),
        ("project_queries", torch.float32, 64, "fallback", "float16 and bfloat16"),
        ("pack_kv", torch.float32, 80, "native", ""),
        ("pack_paged", torch.float32, 80, "native", ""),
    ],
)
def test_the_library_says_why_not(op: str, dtype: torch.dtype, head_dim: int, state: str, reason: str) -> None:
    found = support(op, "cuda", dtype, head_dim)
    assert found.state == state and reason in (found.reason or "")
