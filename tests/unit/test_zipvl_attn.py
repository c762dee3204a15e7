"""zipvl_attn: probe, score, select and attend in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zipvl import ops, reference

from .helpers import (
    DTYPES,
    LAYOUTS,
    MASKS,
    assert_accurate,
    assert_selection_within_rounding,
    double,
    make_mask,
    make_qkv,
    output_floor,
    poison,
    same_dtype_attention,
    score_floor,
    selected_mask,
    tolerance,
)


def keep_set(token_mask: Tensor | None, keep_mask: Tensor | None, keep_recent: int, B: int, N: int) -> Tensor:
    keep = torch.zeros(B, N, dtype=torch.bool) if keep_mask is None else keep_mask.clone()
    real = torch.ones(B, N, dtype=torch.bool) if token_mask is None else token_mask
    from_the_end = real.flip(1).cumsum(dim=1).flip(1)
    return (keep | (from_the_end <= keep_recent)) & real


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The selection against that of exact scores, up to rounding; the output against that of the op's own selection."""
    B, _, N, _ = q.shape
    token_mask, causal, scale = keywords.get("token_mask"), keywords.get("causal", True), keywords.get("scale")
    all_queries = keywords.get("all_queries", False)
    out, index, count = ops.zipvl_attn(q, k, v, **keywords)
    assert out.shape == q.shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    assert index.shape == (B, N) and count.shape == (B,) and index.dtype == count.dtype == torch.int32

    draw = {name: keywords[name] for name in ("num_recent", "num_random", "seed") if name in keywords}
    probes = reference.probe_index(q, **draw, token_mask=token_mask)
    how = {"scale": scale, "causal": causal, "token_mask": token_mask}
    exact = reference.probe_scores(*double(q, k), probes, **how)
    rounded = reference.probe_scores(q, k, probes, **how)
    errors = [tolerance(e, r, torch.float32, score_floor(q, k, e, scale)) for e, r in zip(exact, rounded, strict=True)]
    assert_selection_within_rounding(
        index,
        count,
        exact,
        (errors[0], errors[1]),
        tau=keywords.get("tau", 0.975),
        ratio=keywords.get("ratio"),
        min_tokens=keywords.get("min_tokens", 1),
        keep_mask=keep_set(token_mask, keywords.get("keep_mask"), keywords.get("keep_recent", 1), B, N),
        token_mask=token_mask,
    )

    attend = {"scale": scale, "causal": causal, "all_queries": all_queries}
    exact_out = reference.sparse_attn(*double(q, k, v), index, count, **attend)
    baseline = same_dtype_attention(q, k, v, index, count, **attend)
    if token_mask is not None:
        exact_out, baseline = (t.masked_fill(~token_mask[:, None, :, None], 0) for t in (exact_out, baseline))
    assert_accurate(out, exact_out, baseline, output_floor(q, k, v, scale))
    zero = ~selected_mask(index, count) if not all_queries else (False if token_mask is None else ~token_mask)
    assert bool((out.transpose(1, 2)[zero] == 0).all())
    return out, index, count


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_head_dims(dtype: torch.dtype, group: int, D: int) -> None:
    check(*make_qkv(2, 2 * group, 2, 150, D, dtype), num_recent=16, num_random=16)


@pytest.mark.parametrize("N", [1, 2, 15, 64, 127, 128, 129, 130, 1000, 2049, 3001])
@pytest.mark.parametrize("limit", [{}, {"tau": 0.5}, {"ratio": 0.25}])
def test_lengths(N: int, limit: dict[str, float]) -> None:
    check(*make_qkv(1, 3, 1, N, 64), **limit)


@pytest.mark.parametrize("all_queries", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_modes(dtype: torch.dtype, mask: str, causal: bool, all_queries: bool) -> None:
    q, k, v = make_qkv(3, 6, 2, 160, 64, dtype)
    check(q, k, v, tau=0.8, token_mask=make_mask(mask, 3, 160), causal=causal, all_queries=all_queries)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(*make_qkv(2, 6, 2, 150, 80, layout=layout), tau=0.7, token_mask=make_mask("left", 2, 150))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "keywords",
    [
        {"keep_recent": 0},
        {"keep_recent": 5},
        {"keep_recent": 500},
        {"keep_recent": 2**63 - 1},
        {"min_tokens": 60},
        {"num_recent": 0, "num_random": 16, "seed": 9},
        {"num_recent": 16, "num_random": 0},
        {"scale": 0.3},
        {"tau": 1.0},
        {"ratio": 1.0},
    ],
    ids=str,
)
def test_keywords(keywords: dict[str, Any], mask: str) -> None:
    q, k, v = make_qkv(3, 4, 2, 120, 64)
    check(q, k, v, **{"tau": 0.3, "token_mask": make_mask(mask, 3, 120)} | keywords)


def test_keep_mask() -> None:
    q, k, v = make_qkv(2, 4, 2, 120, 64)
    keep, mask = torch.rand(2, 120) < 0.3, make_mask("inner", 2, 120)
    kept_before = keep.clone()
    check(q, k, v, ratio=0.4, keep_mask=keep, token_mask=mask)
    check(q, k, v, ratio=0.1, keep_mask=keep, keep_recent=3)
    assert torch.equal(keep, kept_before), "arguments are not written to"


def test_tau_one_is_dense_attention() -> None:
    q, k, v = make_qkv(2, 6, 2, 300, 64)
    out, index, count = ops.zipvl_attn(q, k, v, tau=1.0)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    assert count.tolist() == [300, 300] and torch.equal(index, torch.arange(300, dtype=torch.int32).expand(2, 300))


@pytest.mark.parametrize("D", [1, 7, 72, 100])
def test_any_head_dim(D: int) -> None:
    check(*make_qkv(2, 6, 2, 90, D), tau=0.7, num_recent=16, num_random=16)


@pytest.mark.parametrize("all_queries", [True, False])
def test_expanded_inputs(all_queries: bool) -> None:
    """Strides of 0: one row for the whole batch, one key/value head shown as two, one query for every token."""
    q, k, v = make_qkv(1, 6, 1, 90, 64)
    shown = q[:, :, :1].expand(3, 6, 90, 64), k.expand(3, 2, 90, 64), v.expand(3, 2, 90, 64)
    check(*shown, tau=0.7, all_queries=all_queries)


def test_equals_its_stages() -> None:
    q, k, v = make_qkv(2, 6, 2, 400, 64, torch.bfloat16)
    mask = make_mask("left", 2, 400)
    out, index, count = ops.zipvl_attn(q, k, v, tau=0.9, keep_recent=4, seed=5, token_mask=mask)
    probes = ops.probe_index(q, seed=5, token_mask=mask)
    scores = ops.probe_scores(q, k, probes, token_mask=mask)
    staged = ops.select_tokens(*scores, tau=0.9, keep_mask=keep_set(mask, None, 4, 2, 400), token_mask=mask)
    assert torch.equal(index, staged[0]) and torch.equal(count, staged[1])
    assert torch.equal(out, ops.sparse_attn(q, k, v, *staged))


def test_nan_in_padding_is_not_read() -> None:
    mask = make_mask("inner", 2, 200)
    assert mask is not None
    q, k, v = make_qkv(2, 4, 2, 200, 64)
    for all_queries in (False, True):
        clean = ops.zipvl_attn(q, k, v, tau=0.7, token_mask=mask, all_queries=all_queries)
        poisoned = [poison(t, ~mask) for t in (q, k, v)]
        dirty = ops.zipvl_attn(*poisoned, tau=0.7, token_mask=mask, all_queries=all_queries)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_select_every_real_token_of_their_row(bad: float) -> None:
    mask = make_mask("left", 2, 200)
    assert mask is not None
    q, k, v = make_qkv(2, 4, 2, 200, 64)
    clean = ops.zipvl_attn(q, k, v, ratio=0.25, token_mask=mask)
    k[0, 0, 150] = bad
    out, index, count = ops.zipvl_attn(q, k, v, ratio=0.25, token_mask=mask)
    assert count[0] == mask[0].sum() and torch.equal(selected_mask(index, count)[0], mask[0])
    assert (
        torch.equal(count[1], clean[2][1]) and torch.equal(index[1], clean[1][1]) and torch.equal(out[1], clean[0][1])
    )


@pytest.mark.usefixtures("all_threads")
def test_same_bits_every_time_and_for_a_row_alone() -> None:
    q, k, v = make_qkv(3, 14, 2, 700, 128, torch.bfloat16)
    mask = make_mask("right", 3, 700)
    assert mask is not None
    together = ops.zipvl_attn(q, k, v, tau=0.9, token_mask=mask)
    again = ops.zipvl_attn(q, k, v, tau=0.9, token_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    for b in range(3):
        row = slice(b, b + 1)
        alone = ops.zipvl_attn(q[row], k[row], v[row], tau=0.9, token_mask=mask[row])
        assert all(torch.equal(a, t[row]) for a, t in zip(alone, together, strict=True))


def test_another_seed_probes_other_tokens() -> None:
    q, k, v = make_qkv(1, 4, 2, 600, 64)
    one, other = (ops.zipvl_attn(q, k, v, ratio=0.2, num_recent=0, num_random=4, seed=seed) for seed in (1, 2))
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [True, False])
def test_empty(B: int, N: int, masked: bool) -> None:
    q, k, v = make_qkv(B, 4, 2, N, 64)
    mask = torch.ones(B, N, dtype=torch.bool) if masked else None
    out, index, count = ops.zipvl_attn(q, k, v, token_mask=mask)
    assert out.shape == (B, 4, N, 64) and index.shape == (B, N) and count.tolist() == [0] * B


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_threads_that_share_the_heads_out(kv_heads: int) -> None:
    """Heads may run on other threads, where the caller's inference mode is off."""
    q, k, v = make_qkv(2, 4, kv_heads, 300, 64)
    mask = make_mask("left", 2, 300)
    alone = ops.zipvl_attn(q, k, v, ratio=0.4, token_mask=mask)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            shared = ops.zipvl_attn(q.clone(), k.clone(), v.clone(), ratio=0.4, token_mask=mask.clone())
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(shared[0], alone[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(shared[1], alone[1]) and torch.equal(shared[2], alone[2])
