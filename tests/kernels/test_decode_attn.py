"""decode_attn, quantize_kv and decode_attn_quantized on CUDA: against float64 with NaN in what must not be read, by the
bytes of the CPU, the same bits on every run, and in captured graphs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import no_host_sync, poison_free_memory
from tests.unit.helpers import (
    LAYOUTS,
    assert_accurate,
    logit_rounding,
    make_mask,
    make_qkv,
    make_selection,
    output_floor,
    poison,
)
from zipvl import ops, reference, reference_cache

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
BITS = [(4, (4, 2)), (4, 2), (2, 8), ((4, 2), 4)]


def in_dtype(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One row's attention ``[Hq, 1, D]`` with every intermediate in q's dtype, on q's device."""
    group = q.shape[0] // k.shape[0]
    keys, values = (t.to(q.dtype).repeat_interleave(group, dim=0) for t in (k, v))
    return ((q @ keys.transpose(1, 2)) * scale).softmax(dim=-1) @ values


def check_row(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """One row's results (on the CPU) against float64 over its tokens ``k, v [Hkv, tokens, D]``."""
    if k.shape[1] == 0:
        assert bool((out == 0).all()) and bool((lse == -math.inf).all())
        return
    tokens = torch.tensor([k.shape[1]], dtype=torch.int32)
    exact, exact_lse = reference.decode_attn(q[None].double(), k[None].double(), v[None].double(), tokens, scale=scale)
    _, base_lse = reference.decode_attn(q[None].float(), k[None].float(), v[None].float(), tokens, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    baseline = in_dtype(q.cuda(), k.cuda(), v.cuda(), factor).cpu()
    assert_accurate(out, exact[0], baseline, output_floor(q, k, v, scale))
    assert_accurate(lse, exact_lse[0], base_lse[0], logit_rounding(q, k, scale))


def check(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None) -> None:
    given = torch.tensor(lengths, dtype=torch.int32)
    unused = torch.arange(k.shape[2])[None, :] >= given[:, None]
    arguments = [t.cuda() for t in (q, poison(k, unused), poison(v, unused), given)]
    poison_free_memory()
    with no_host_sync():
        out, lse = ops.decode_attn(*arguments, scale=scale)
    assert out.transpose(1, 2).is_contiguous()
    for b, length in enumerate(lengths):
        check_row(out[b].cpu(), lse[b].cpu(), q[b], k[b, :, :length], v[b, :, :length], scale)
    again = ops.decode_attn(*arguments, scale=scale)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def case(
    B: int, Hq: int, Hkv: int, S: int, D: int, dtype: torch.dtype, layout: str = "bnhd"
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_qkv(B, Hq, Hkv, S, D, dtype, layout)
    return q[:, :, S // 2 : S // 2 + 1], k, v


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 8, 20])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_heads_and_head_dims(dtype: torch.dtype, group: int, D: int) -> None:
    check(*case(3, 2 * group, 2, 333, D, dtype), [333, 0, 57])


@pytest.mark.parametrize("S", [1, 2, 15, 16, 17, 127, 128, 129, 1000, 30011])
def test_lengths(S: int) -> None:
    check(*case(4, 14, 2, S, 128, torch.bfloat16), [S, S - 1, (S + 1) // 2, 0])


def test_many_ragged_rows() -> None:
    lengths = [(37 * i) % 201 for i in range(70)]
    check(*case(70, 6, 2, 200, 64, torch.bfloat16), [min(n, 200) for n in lengths])


@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "S"), [(1, 7, 1, 30000), (2, 14, 2, 9000), (5, 64, 32, 300), (33, 28, 4, 600)]
)
def test_rows_of_about_the_same_length(B: int, Hq: int, Hkv: int, S: int) -> None:
    """Items with blocks of their own and, on 132 multiprocessors, more items than that; more partial results of a head
    than are loaded at once, and more heads than have large combining blocks."""
    q, k, v = case(B, Hq, Hkv, S, 128, torch.bfloat16)
    check(q, k, v, [S] * B)
    check(q, k, v, [S - 7 * b % 20 for b in range(B)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.9, 0.0, -0.3])
def test_layouts_and_scales(scale: float | None, layout: str) -> None:
    """``sliced`` rows begin at odd places: that goes over ATen."""
    check(*case(2, 6, 2, 140, 64, torch.bfloat16, layout), [140, 33], scale)


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 128), (torch.bfloat16, 80)])
def test_what_no_kernel_takes(dtype: torch.dtype, D: int) -> None:
    check(*case(2, 6, 2, 140, D, dtype), [140, 33])


def test_lengths_are_clamped() -> None:
    q, k, v = (t.cuda() for t in case(3, 4, 2, 50, 64, torch.float16))
    wild = torch.tensor([2**31 - 1, -(2**31), 51], dtype=torch.int32, device="cuda")
    out, lse = ops.decode_attn(q, k, v, wild)
    expected = ops.decode_attn(q, k, v, torch.tensor([50, 0, 50], dtype=torch.int32, device="cuda"))
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_graph_with_changing_lengths() -> None:
    """One captured graph serves every length, and unused slots of the cache are not read."""
    q, k, v = (t.cuda() for t in case(2, 14, 2, 700, 128, torch.bfloat16))
    lengths = torch.tensor([1, 1], dtype=torch.int32, device="cuda")
    ops.decode_attn(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.decode_attn(q, k, v, lengths)
    for current in ([700, 1], [0, 699], [33, 512], [0, 0], [700, 700]):
        lengths.copy_(torch.tensor(current, dtype=torch.int32))
        graph.replay()
        expected = ops.decode_attn(q, k, v, lengths)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


# ---------------------------------------------------------------------------------------------------------------------
# Quantised
# ---------------------------------------------------------------------------------------------------------------------


def on_gpu(*tensors: Tensor) -> Any:
    return tuple(t.cuda() for t in tensors)


@pytest.mark.parametrize("mask", ["none", "left", "inner", "row_empty"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float32])
def test_quantize_kv_gives_the_cpus_bytes(dtype: torch.dtype, D: int, bits: tuple[Any, Any], mask: str) -> None:
    _, k, v = make_qkv(2, 2, 2, 300, D, dtype)
    token_mask = make_mask(mask, 2, 300)
    scores = torch.rand(2, 300)
    index, count = ops.select_tokens(scores, scores, ratio=0.4, token_mask=token_mask)
    check_bytes(k, v, index, count, token_mask, bits)


@pytest.mark.parametrize("N", [1, 63, 64, 65, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_kv_lengths_and_layouts(layout: str, N: int) -> None:
    _, k, v = make_qkv(2, 2, 2, N, 64, torch.bfloat16, layout)
    check_bytes(k, v, *make_selection(2, N), None, (4, (4, 2)))
    check_bytes(k, v, *make_selection(2, N, share=1.0), None, (4, (4, 2)))


def check_bytes(
    k: Tensor, v: Tensor, index: Tensor, count: Tensor, token_mask: Tensor | None, bits: tuple[Any, Any]
) -> None:
    keywords: dict[str, Any] = {"high_bits": bits[0], "low_bits": bits[1]}
    expected = ops.quantize_kv(k, v, index, count, token_mask=token_mask, **keywords)
    gpu_mask = None if token_mask is None else token_mask.cuda()
    arguments = on_gpu(k, v, index, count)
    poison_free_memory()
    with no_host_sync():
        made = ops.quantize_kv(*arguments, token_mask=gpu_mask, **keywords)
    for i in (1, 3, 4):
        assert torch.equal(made[i].cpu(), expected[i])
    for i in (0, 2):
        assert made[i].shape == expected[i].shape
        for b in range(k.shape[0]):
            used = int(expected[i + 1][b])
            assert torch.equal(made[i][b, :, :used].cpu(), expected[i][b, :, :used])
    given = ops.quantize_kv(*arguments, token_mask=gpu_mask, v_factor=made[4] * 2, **keywords)
    assert torch.equal(given[4], made[4] * 2)


def check_quantized(q: Tensor, made: tuple[Tensor, ...], recent: tuple[Tensor, ...] = (), **keywords: Any) -> None:
    """The op on CPU tensors moved to the GPU, against float64 over what the bytes hold."""
    high, high_blocks, low, low_blocks, v_factor = made
    names = ("k_recent", "v_recent", "recent_lengths")
    given: dict[str, Any] = dict(zip(names, on_gpu(*recent), strict=False))
    decode = partial(ops.decode_attn_quantized, *on_gpu(q, *made), **given, **keywords)
    poison_free_memory()
    with no_host_sync():
        out, lse = decode()
    segments = [
        reference_cache.dequantize_kv(packed, blocks, v_factor, bits=keywords.get(name, bits), dtype=q.dtype)
        for packed, blocks, name, bits in (
            (high, high_blocks, "high_bits", (4, 4)),
            (low, low_blocks, "low_bits", (4, 2)),
        )
    ]
    for b in range(q.shape[0]):
        keys, values = (torch.cat([segment[b][part] for segment in segments], dim=1) for part in (0, 1))
        if recent:
            length = int(recent[2][b])
            keys = torch.cat([keys, recent[0][b, :, :length].float()], dim=1)
            values = torch.cat([values, recent[1][b, :, :length].float()], dim=1)
        out_row, lse_row = out[b].cpu(), lse[b].cpu()
        check_quantized_row(out_row, lse_row, q[b], keys, values, keywords.get("scale"))
    again = decode()
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def check_quantized_row(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """As :func:`check_row`; the scaled queries are rounded to q's dtype, as keys are in PyTorch: logits may be off by
    one such rounding of each product, and so may lse."""
    if k.shape[1] == 0:
        assert bool((out == 0).all()) and bool((lse == -math.inf).all())
        return
    tokens = torch.tensor([k.shape[1]], dtype=torch.int32)
    exact, exact_lse = reference.decode_attn(q[None].double(), k[None].double(), v[None].double(), tokens, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    baseline = in_dtype(q.cuda(), k.cuda(), v.cuda(), factor).cpu()
    assert_accurate(out, exact[0], baseline, output_floor(q, k, v, scale))
    rounded = k.to(q.dtype).double()
    _, base_lse = reference.decode_attn(q[None].double(), rounded[None], v[None].double(), tokens, scale=scale)
    unit = torch.finfo(q.dtype).eps
    root = math.sqrt(q.shape[-1]) * abs(factor) * float(q.float().abs().max()) * float(k.abs().max())
    assert (
        float((lse.double() - exact_lse[0]).abs().max()) <= 2 * float((base_lse - exact_lse).abs().max()) + unit * root
    )


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 7, 9])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_decode_quantized(dtype: torch.dtype, bits: tuple[Any, Any], group: int, D: int) -> None:
    q, k, v = make_qkv(2, 2 * group, 2, 450, D, dtype)
    keywords: dict[str, Any] = {"high_bits": bits[0], "low_bits": bits[1]}
    made = ops.quantize_kv(k, v, *make_selection(2, 450), **keywords)
    lengths = torch.tensor([40, 0], dtype=torch.int32)
    beyond = torch.arange(450)[None] >= lengths[:, None]
    check_quantized(q[:, :, 9:10], made, **keywords)
    check_quantized(q[:, :, 9:10], made, (poison(k, beyond), poison(v, beyond), lengths), scale=0.1, **keywords)


@pytest.mark.parametrize("N", [1, 64, 65, 20000])
def test_decode_quantized_lengths(N: int) -> None:
    q, k, v = make_qkv(1, 14, 2, N, 128, torch.bfloat16)
    check_quantized(q[:, :, :1], ops.quantize_kv(k, v, *make_selection(1, N, share=0.25)))


def test_decode_quantized_appended_blocks_and_empty_rows() -> None:
    q, k, v = make_qkv(2, 6, 2, 230, 64, torch.bfloat16)
    first = ops.quantize_kv(k[:, :, :130], v[:, :, :130], *make_selection(2, 130))
    second = ops.quantize_kv(k[:, :, 130:], v[:, :, 130:], *make_selection(2, 100, seed=1), v_factor=first[4])
    storage = []
    for i in (0, 2):
        packed = torch.full((2, 2, 6, first[i].shape[3]), 255, dtype=torch.uint8)
        blocks = torch.zeros(2, dtype=torch.int32)
        old, new = int(first[i + 1][0]), int(second[i + 1][0])
        packed[0, :, :old], packed[0, :, old : old + new] = first[i][0, :, :old], second[i][0, :, :new]
        blocks[0] = old + new
        storage += [packed, blocks]
    check_quantized(q[:, :, :1], (*storage, first[4]))


def test_decode_quantized_in_a_graph() -> None:
    """A captured step serves block counts and lengths that change."""
    q, k, v = make_qkv(1, 14, 2, 1000, 128, torch.bfloat16)
    made = on_gpu(*ops.quantize_kv(k, v, *make_selection(1, 1000, share=0.25)))
    query, recent = q[:, :, :1].cuda(), (k[:, :, :100].cuda(), v[:, :, :100].cuda())
    lengths = torch.tensor([3], dtype=torch.int32, device="cuda")
    keywords: dict[str, Any] = {"k_recent": recent[0], "v_recent": recent[1], "recent_lengths": lengths}
    ops.decode_attn_quantized(query, *made, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = ops.decode_attn_quantized(query, *made, **keywords)
    for high, low, length in ((4, 12, 100), (1, 3, 0), (0, 0, 7), (0, 12, 50)):
        for tensor, value in ((made[1], high), (made[3], low), (lengths, length)):
            tensor.fill_(value)
        graph.replay()
        expected = ops.decode_attn_quantized(query, *made, **keywords)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
