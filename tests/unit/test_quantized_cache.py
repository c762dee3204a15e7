"""quantize_kv and decode_attn_quantized: bytes against the reference, attention against float64 on what they hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zipvl import ops, reference, reference_cache

from .helpers import (
    DTYPES,
    LAYOUTS,
    MASKS,
    assert_accurate,
    logit_rounding,
    make_mask,
    make_qkv,
    make_selection,
    output_floor,
    poison,
)

BITS = [(4, (4, 2)), (4, 2), (8, 4), ((4, 2), 8)]


def quantized(k: Tensor, v: Tensor, index: Tensor, count: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
    """The op, which must give the reference's bytes."""
    made = ops.quantize_kv(k, v, index, count, **keywords)
    expected = reference_cache.quantize_kv(k, v, index, count, **keywords)
    for name, one, other in zip(("high", "high_blocks", "low", "low_blocks", "v_factor"), made, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    return made


@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_the_references(dtype: torch.dtype, bits: tuple[Any, Any], D: int) -> None:
    _, k, v = make_qkv(2, 2, 2, 150, D, dtype)
    quantized(k, v, *make_selection(2, 150), high_bits=bits[0], low_bits=bits[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_layouts_and_masks(mask: str, layout: str) -> None:
    """Padding goes to neither segment, and a NaN in it nowhere."""
    _, k, v = make_qkv(3, 2, 2, 140, 64, torch.bfloat16, layout)
    token_mask = make_mask(mask, 3, 140)
    real = torch.ones(3, 140, dtype=torch.bool) if token_mask is None else token_mask
    scores = torch.rand(3, 140)
    index, count = ops.select_tokens(scores, scores, ratio=0.3, token_mask=token_mask)
    made = quantized(poison(k, ~real), poison(v, ~real), index, count, token_mask=token_mask)
    assert not bool(made[4].isnan().any())
    for b in range(3):
        rows = [
            reference_cache.dequantize_kv(made[i], made[i + 1], made[4], bits=n, dtype=k.dtype)[b]
            for i, n in ((0, (4, 4)), (2, (4, 2)))
        ]
        assert [r[0].shape[1] for r in rows] == [int(count[b]), int(real[b].sum()) - int(count[b])]


@pytest.mark.parametrize("bits", [(2, 2), (4, 2), (4, 4), (8, 8)])
def test_error_is_at_most_half_a_step(bits: tuple[int, int]) -> None:
    """Keys: half of a channel's step in its block, and the roundings of the stored scale and zero; values likewise."""
    _, k, v = make_qkv(1, 2, 2, 128, 64)
    everything = torch.arange(128, dtype=torch.int32)[None], torch.tensor([128], dtype=torch.int32)
    high, blocks, _, none, factor = quantized(k, v, *everything, high_bits=bits)
    assert none.tolist() == [0] and blocks.tolist() == [2]
    ((k_again, v_again),) = reference_cache.dequantize_kv(high, blocks, factor, bits=bits, dtype=torch.float32)
    parts = k[0].unflatten(1, (2, 64))
    step = (parts.amax(2, keepdim=True) - parts.amin(2, keepdim=True)) / (2 ** bits[0] - 1)
    assert bool(((k_again.unflatten(1, (2, 64)) - parts).abs() <= 0.5001 * step + 1e-6).all())
    normalised = v[0] / factor[0][:, None]
    step = (normalised.amax(2, keepdim=True) - normalised.amin(2, keepdim=True)) / (2 ** bits[1] - 1)
    assert bool(((v_again / factor[0][:, None] - normalised).abs() <= 0.5001 * step + 1e-6).all())
    torch.testing.assert_close(factor[0], v[0].abs().amax(1).sqrt())


@pytest.mark.parametrize(("bits", "share"), [((2, 2), 0.149), ((4, 2), 0.211), ((4, 4), 0.274), ((8, 8), 0.524)])
def test_a_block_takes_the_bytes_of_its_codes_and_ranges(bits: tuple[int, int], share: float) -> None:
    """A block of 64 tokens, D 128, 16-bit elements: 784 bytes of header and ranges, and the codes."""
    assert reference_cache.block_bytes(128, bits, torch.bfloat16) == 784 + 64 * 128 * sum(bits) // 8
    _, k, v = make_qkv(1, 2, 2, 128, 128, torch.bfloat16)
    high, *_ = ops.quantize_kv(k, v, *make_selection(1, 128), high_bits=bits)
    assert high.shape[3] == reference_cache.block_bytes(128, bits, torch.bfloat16)
    assert high.shape[3] / (2 * 64 * 128 * 2) == pytest.approx(share, abs=5e-4)


def test_keys_and_values_of_a_block_do_not_know_each_others_bits() -> None:
    """The keys of (4, 2) are the keys of 4, its values the values of 2: byte for byte."""
    _, k, v = make_qkv(2, 2, 2, 150, 64, torch.bfloat16)
    both, keys, values = (
        ops.quantize_kv(k, v, *make_selection(2, 150), high_bits=bits)[0] for bits in ((4, 2), (4, 4), (2, 2))
    )
    ranges = 16 + 2 * 2 * (64 + 64)
    value_ranges = ranges - 2 * 2 * 64
    codes = ranges + 64 * 64 * 4 // 8
    assert torch.equal(both[..., :value_ranges], keys[..., :value_ranges])
    assert torch.equal(both[..., value_ranges:ranges], values[..., value_ranges:ranges])
    assert torch.equal(both[..., ranges:codes], keys[..., ranges:codes])
    assert torch.equal(both[..., codes:], values[..., -64 * 64 * 2 // 8 :])


def test_constant_channels_and_zero_values_are_exact() -> None:
    k, v = torch.full((1, 1, 70, 32), 3.0), torch.zeros(1, 1, 70, 32)
    made = quantized(k, v, *make_selection(1, 70))
    assert bool((made[4] == 1).all())
    for packed, blocks, bits in ((made[0], made[1], (4, 4)), (made[2], made[3], (4, 2))):
        ((k_again, v_again),) = reference_cache.dequantize_kv(packed, blocks, made[4], bits=bits, dtype=torch.float32)
        assert bool((k_again == 3).all()) and bool((v_again == 0).all())


@given(count=st.lists(st.integers(-3, 80), min_size=2, max_size=2), data=st.data())
@settings(max_examples=20)
def test_bad_positions_and_counts(count: list[int], data: st.DataObject) -> None:
    """Counts are clamped and positions outside the tokens skipped."""
    _, k, v = make_qkv(2, 2, 2, 70, 32)
    entries = st.lists(st.integers(-5, 75), min_size=70, max_size=70, unique=True)
    index = torch.tensor([sorted(data.draw(entries)) for _ in range(2)], dtype=torch.int32)
    quantized(k, v, index, torch.tensor(count, dtype=torch.int32))


def same_dtype_decode(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention of one row to dequantised tokens with every intermediate in q's dtype; k, v ``[Hkv, tokens, D]``."""
    group = q.shape[1] // k.shape[0]
    keys, values = (t.to(q.dtype).repeat_interleave(group, dim=0) for t in (k, v))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    return ((q[0] @ keys.transpose(1, 2)) * factor).softmax(dim=-1) @ values


def check_decode(
    q: Tensor, made: tuple[Tensor, ...], recent: tuple[Tensor, Tensor, Tensor] | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """The op against float64 on the dequantised cache, in each row the tokens of both segments and the recent ones."""
    high, high_blocks, low, low_blocks, v_factor = made
    given_recent: dict[str, Any] = (
        {} if recent is None else dict(zip(("k_recent", "v_recent", "recent_lengths"), recent, strict=True))
    )
    out, lse = ops.decode_attn_quantized(q, high, high_blocks, low, low_blocks, v_factor, **given_recent, **keywords)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    segments = [
        reference_cache.dequantize_kv(packed, blocks, v_factor, bits=keywords.get(name, bits), dtype=q.dtype)
        for packed, blocks, name, bits in (
            (high, high_blocks, "high_bits", (4, 4)),
            (low, low_blocks, "low_bits", (4, 2)),
        )
    ]
    scale = keywords.get("scale")
    exact_out, exact_lse = reference_cache.attend(q.double(), segments, **given_recent, scale=scale)
    for b in range(q.shape[0]):
        keys, values = (torch.cat([segment[b][part] for segment in segments], dim=1) for part in (0, 1))
        if recent is not None:
            length = int(recent[2][b])
            keys = torch.cat([keys, recent[0][b, :, :length].float()], dim=1)
            values = torch.cat([values, recent[1][b, :, :length].float()], dim=1)
        if keys.shape[1] == 0:
            assert bool((out[b] == 0).all()) and bool((lse[b] == -math.inf).all())
            continue
        row = q[b : b + 1]
        baseline = same_dtype_decode(row, keys, values, scale)
        assert_accurate(out[b], exact_out[b], baseline, output_floor(row, keys, values, scale))
        tokens = torch.tensor([keys.shape[1]], dtype=torch.int32)
        _, baseline_lse = reference.decode_attn(row.float(), keys[None], values[None], tokens, scale=scale)
        assert_accurate(lse[b], exact_lse[b], baseline_lse[0], logit_rounding(row, keys, scale))
    return out, lse


@pytest.mark.parametrize("D", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype: torch.dtype, group: int, D: int) -> None:
    q, k, v = make_qkv(2, 2 * group, 2, 150, D, dtype)
    made = ops.quantize_kv(k, v, *make_selection(2, 150))
    recent = (
        poison(k, torch.arange(150)[None] >= torch.tensor([[9], [0]])),
        v,
        torch.tensor([9, 0], dtype=torch.int32),
    )
    check_decode(q[:, :, 3:4], made)
    check_decode(q[:, :, 3:4], made, recent, scale=0.2)


@pytest.mark.parametrize("bits", BITS)
def test_decode_bits(bits: tuple[Any, Any]) -> None:
    q, k, v = make_qkv(2, 6, 2, 200, 64, torch.bfloat16)
    keywords: dict[str, Any] = {"high_bits": bits[0], "low_bits": bits[1]}
    check_decode(q[:, :, :1], ops.quantize_kv(k, v, *make_selection(2, 200), **keywords), **keywords)


def test_nothing_to_attend_to() -> None:
    q, k, v = make_qkv(2, 6, 2, 70, 64)
    made = ops.quantize_kv(
        k,
        v,
        torch.zeros(2, 70, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        token_mask=torch.tensor([[True], [False]]).expand(2, 70),
    )
    assert made[1].tolist() == [0, 0] and made[3].tolist() == [2, 0]
    check_decode(q[:, :, :1], made)


def test_blocks_are_appended() -> None:
    """New blocks behind a partial one, quantised with the first call's factor; unused blocks hold junk."""
    q, k, v = make_qkv(2, 6, 2, 230, 64, torch.bfloat16)
    first = ops.quantize_kv(k[:, :, :130], v[:, :, :130], *make_selection(2, 130))
    second = quantized(k[:, :, 130:], v[:, :, 130:], *make_selection(2, 100, seed=1), v_factor=first[4])
    assert torch.equal(second[4], first[4])
    storage = []
    for i in (0, 2):
        packed = torch.full((2, 2, 6, first[i].shape[3]), 255, dtype=torch.uint8)
        for b in range(2):
            old, new = int(first[i + 1][b]), int(second[i + 1][b])
            packed[b, :, :old], packed[b, :, old : old + new] = first[i][b, :, :old], second[i][b, :, :new]
        storage += [packed, first[i + 1] + second[i + 1]]
    check_decode(q[:, :, :1], (*storage, first[4]))


def test_block_counts_are_clamped() -> None:
    q, k, v = make_qkv(1, 4, 2, 128, 64)
    high, _, low, _, factor = ops.quantize_kv(
        k, v, torch.arange(128, dtype=torch.int32)[None], torch.tensor([128], dtype=torch.int32)
    )
    low.zero_()
    counts = [torch.tensor([n], dtype=torch.int32) for n in (99, -4, 2, 0)]
    out, _ = ops.decode_attn_quantized(q[:, :, :1], high, counts[0], low, counts[1], factor)
    assert torch.equal(out, ops.decode_attn_quantized(q[:, :, :1], high, counts[2], low, counts[3], factor)[0])


def test_error_of_the_layer_falls_with_the_bits() -> None:
    """Attention over the quantised cache comes closer to that over the whole one with every bit."""
    q, k, v = make_qkv(1, 6, 2, 400, 64)
    exact, _ = reference.decode_attn(q[:, :, :1], k, v, torch.tensor([400], dtype=torch.int32))
    errors = []
    for bits in ((2, 2), (4, 2), (4, 4), (8, 8)):
        made = ops.quantize_kv(k, v, *make_selection(1, 400), high_bits=bits, low_bits=bits)
        out, _ = ops.decode_attn_quantized(q[:, :, :1], *made, high_bits=bits, low_bits=bits)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors[3] < 0.02 < 2 * errors[2] < errors[1] < errors[0]
