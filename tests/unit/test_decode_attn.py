"""decode_attn: one new token against the cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zipvl import ops, reference

from .helpers import DTYPES, LAYOUTS, assert_accurate, double, logit_rounding, make_qkv, output_floor, poison


def same_dtype_decode(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The attention written in PyTorch with every intermediate in q's dtype: the baseline of ``out``'s error bound."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths):
        keys, values = (t[b, :, :length].repeat_interleave(group, dim=0) for t in (k, v))
        if length > 0:
            out[b] = ((q[b] @ keys.transpose(1, 2)) * scale).softmax(dim=-1) @ values
    return out


def check(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The op, with NaN in every slot at or after the length, against float64."""
    S = k.shape[2]
    given_lengths = torch.tensor(lengths, dtype=torch.int32)
    unused = torch.arange(S)[None, :] >= given_lengths[:, None]
    out: Tensor
    lse: Tensor
    out, lse = ops.decode_attn(q, poison(k, unused), poison(v, unused), given_lengths, scale=scale)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    exact_out, exact_lse = reference.decode_attn(*double(q, k, v), given_lengths, scale=scale)
    _, baseline_lse = reference.decode_attn(q, k, v, given_lengths, scale=scale)
    baseline_out = same_dtype_decode(q, k, v, lengths, q.shape[3] ** -0.5 if scale is None else scale)
    assert_accurate(out, exact_out, baseline_out, output_floor(q, k, v, scale))
    some = given_lengths > 0
    assert_accurate(lse[some], exact_lse[some], baseline_lse[some], logit_rounding(q, k, scale))
    assert bool((out[~some] == 0).all()) and bool((lse[~some] == -math.inf).all())
    return out, lse


def case(B: int, Hq: int, Hkv: int, S: int, D: int, dtype: torch.dtype = torch.float32, layout: str = "bhnd"):  # type: ignore[no-untyped-def]
    q, k, v = make_qkv(B, Hq, Hkv, S, D, dtype, layout)
    return q[:, :, S // 2 : S // 2 + 1], k, v


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_head_dims(dtype: torch.dtype, group: int, D: int) -> None:
    check(*case(3, 2 * group, 2, 133, D, dtype), [133, 0, 57])


@pytest.mark.parametrize("S", [1, 2, 15, 63, 64, 65, 127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths(dtype: torch.dtype, S: int) -> None:
    check(*case(4, 6, 2, S, 64, dtype), [S, S - 1, (S + 1) // 2, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    check(*case(2, 6, 2, 140, 80, dtype, layout), [140, 33])


def test_scale() -> None:
    q, k, v = case(1, 4, 2, 90, 64)
    default, explicit = check(q, k, v, [90]), check(q, k, v, [90], scale=0.125)
    assert torch.equal(default[0], explicit[0]) and torch.equal(default[1], explicit[1])
    check(q, k, v, [90], scale=0.9)
    _, lse = check(q, k, v, [90], scale=0.0)
    torch.testing.assert_close(lse, torch.full((1, 4, 1), math.log(90)))


@given(lengths=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 52), min_size=3, max_size=3))
def test_lengths_are_clamped(lengths: list[int]) -> None:
    q, k, v = case(3, 4, 2, 50, 64, layout="sliced")
    out, lse = ops.decode_attn(q, k, v, torch.tensor(lengths, dtype=torch.int32))
    clamped = torch.tensor([min(max(length, 0), 50) for length in lengths], dtype=torch.int32)
    expected_out, expected_lse = ops.decode_attn(q, k, v, clamped)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert bool(out.isfinite().all())


def test_parts_of_a_cache_combine_through_lse() -> None:
    """What lse is for: attention over two halves of a cache, merged, is attention over the whole."""
    q, k, v = case(2, 6, 2, 100, 64)
    whole, whole_lse = ops.decode_attn(q, k, v, torch.tensor([100, 100], dtype=torch.int32))
    half = torch.tensor([50, 50], dtype=torch.int32)
    (a, lse_a), (b, lse_b) = (ops.decode_attn(q, k[:, :, s], v[:, :, s], half) for s in (slice(50), slice(50, 100)))
    lse = torch.logaddexp(lse_a, lse_b)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(a * (lse_a - lse).exp()[..., None] + b * (lse_b - lse).exp()[..., None], whole)


@pytest.mark.usefixtures("all_threads")
def test_same_bits_every_time_and_for_a_row_alone() -> None:
    q, k, v = case(3, 14, 2, 500, 128, torch.bfloat16)
    lengths = torch.tensor([500, 17, 256], dtype=torch.int32)
    out, lse = ops.decode_attn(q, k, v, lengths)
    for _ in range(3):
        again = ops.decode_attn(q, k, v, lengths)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    for b in range(3):
        row = slice(b, b + 1)
        alone = ops.decode_attn(q[row], k[row], v[row], lengths[row])
        assert torch.equal(alone[0], out[row]) and torch.equal(alone[1], lse[row])


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0), (0, 0)])
def test_empty(B: int, S: int) -> None:
    q, k, v = torch.randn(B, 4, 1, 64), torch.randn(B, 2, S, 64), torch.randn(B, 2, S, 64)
    out, lse = ops.decode_attn(q, k, v, torch.full((B,), S, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(B, 4, 1, 64))
    assert torch.equal(lse, torch.full((B, 4, 1), -math.inf))
