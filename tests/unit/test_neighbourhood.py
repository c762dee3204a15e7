"""Neighbourhoods, queries of the last tokens, ends of rows and the ceiling (docs/ops.md, steps 5b to 5e)."""

from __future__ import annotations

import math
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
    MASKS,
    all_tokens,
    assert_accurate,
    assert_selection_within_rounding,
    double,
    make_ends,
    make_mask,
    make_qkv,
    make_selection,
    output_floor,
    peak_growth,
    poison,
    same_dtype_attention,
    score_floor,
    seen_keys,
    selected_mask,
    strided,
    tolerance,
)


def real_selection(B: int, S: int, token_mask: Tensor | None, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """A random selection of real tokens."""
    index, count = make_selection(B, S, share)
    chosen = selected_mask(index, count)
    if token_mask is not None:
        chosen &= token_mask
    index = torch.where(chosen, torch.arange(S), S).sort(dim=1).values.to(torch.int32)
    return index, chosen.sum(dim=1, dtype=torch.int32)


def check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, **keywords: Any) -> Tensor:
    """The op, with NaN in queries of padding and in every key and value that no row sees (without a window: outside of
    ``T``), against float64."""
    B, _, n, _ = q.shape
    S = k.shape[2]
    seen = seen_keys(index, count, n, **{name: kw for name, kw in keywords.items() if name != "scale"})
    unseen, idle = ~seen.any(dim=1), torch.zeros(B, n, dtype=torch.bool)
    if keywords.get("local_window", 0) == 0:
        unseen = ~selected_mask(index, count)
    if keywords.get("token_mask") is not None:
        idle = ~keywords["token_mask"][:, S - n :]
    out: Tensor = ops.sparse_attn(poison(q, idle), poison(k, unseen), poison(v, unseen), index, count, **keywords)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous(), "a transposed view of [B, n, Hq, D]"
    exact = reference.sparse_attn(*double(q, k, v), index, count, **keywords)
    baseline = same_dtype_attention(q, k, v, index, count, **keywords)
    assert_accurate(out, exact, baseline, output_floor(q, k, v, keywords.get("scale")))
    assert bool((out.transpose(1, 2)[~seen.any(dim=2)] == 0).all()), "rows that see nothing are exactly 0"
    return out


# ---------------------------------------------------------------------------------------------------------------------
# sparse_attn
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_window", [1, 2, 63, 64, 65, 127, 128, 129, 199, 200, 201, 2**40])
@pytest.mark.parametrize("all_queries", [False, True])
def test_windows(local_window: int, all_queries: bool) -> None:
    check(*make_qkv(2, 6, 2, 200, 64), *make_selection(2, 200), local_window=local_window, all_queries=all_queries)


@pytest.mark.parametrize("num_sinks", [1, 4, 50, 500])
@pytest.mark.parametrize("mask", MASKS)
def test_sinks_and_padding(num_sinks: int, mask: str) -> None:
    """Sinks inside and outside of the window and of T, among real tokens."""
    token_mask = make_mask(mask, 3, 140)
    for all_queries in (False, True):
        check(
            *make_qkv(3, 4, 2, 140, 64),
            *real_selection(3, 140, token_mask),
            token_mask=token_mask,
            local_window=20,
            num_sinks=num_sinks,
            all_queries=all_queries,
        )


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 149, 150])
@pytest.mark.parametrize("local_window", [0, 1, 30, 400])
@pytest.mark.parametrize("mask", ["none", "left", "right", "inner"])
def test_queries_of_the_last_tokens(n: int, local_window: int, mask: str) -> None:
    q, k, v = make_qkv(2, 4, 2, 150, 64)
    token_mask = make_mask(mask, 2, 150)
    selection = real_selection(2, 150, token_mask)
    how: dict[str, Any] = {"token_mask": token_mask, "local_window": local_window, "num_sinks": min(local_window, 3)}
    for all_queries in (False, True):
        some = check(q[:, :, 150 - n :], k, v, *selection, **how, all_queries=all_queries)
        every = ops.sparse_attn(q, k, v, *selection, **how, all_queries=all_queries)[:, :, 150 - n :]
        torch.testing.assert_close(some, every, rtol=0, atol=2 * output_floor(q, k, v) + 1e-6)


@pytest.mark.parametrize("local_window", [0, 1, 30, 400])
@pytest.mark.parametrize("mask", ["none", "inner"])
@pytest.mark.parametrize("n", [1, 40, 130])
def test_ends_of_rows(local_window: int, mask: str, n: int) -> None:
    """Rows that see past themselves, less than that, or nothing, and numbers outside of the tokens."""
    q, k, v = make_qkv(2, 4, 2, 130, 64)
    token_mask = make_mask(mask, 2, 130)
    for all_queries in (False, True):
        check(
            q[:, :, 130 - n :],
            k,
            v,
            *real_selection(2, 130, token_mask),
            token_mask=token_mask,
            local_window=local_window,
            num_sinks=min(local_window, 3),
            all_queries=all_queries,
            last_key=make_ends(2, n, 130),
        )


def test_own_positions_as_ends_change_nothing() -> None:
    q, k, v = make_qkv(2, 4, 2, 130, 64)
    selection, own = make_selection(2, 130), torch.arange(130, dtype=torch.int32).repeat(2, 1)
    for keywords in ({}, {"all_queries": True}, {"local_window": 17, "num_sinks": 2}):
        plain = ops.sparse_attn(q, k, v, *selection, **keywords)
        assert torch.equal(ops.sparse_attn(q, k, v, *selection, **keywords, last_key=own), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    q, k, v = make_qkv(2, 6, 2, 150, 80, dtype, layout)
    mask = make_mask("left", 2, 150)
    assert mask is not None
    selection = real_selection(2, 150, mask)
    check(q, k, v, *selection, token_mask=mask, local_window=20, num_sinks=2)
    ends = make_ends(2, 50, 150)
    how: dict[str, Any] = {"local_window": 20, "num_sinks": 2}
    check(q[:, :, 100:], k, v, *selection, token_mask=mask, last_key=ends, **how)
    plain = ops.sparse_attn(q[:, :, 100:], k, v, *selection, token_mask=mask, last_key=ends, **how)
    index = strided(selection[0])
    again = ops.sparse_attn(
        q[:, :, 100:], k, v, index, selection[1], token_mask=strided(mask), last_key=strided(ends), **how
    )
    assert torch.equal(again, plain)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("N", [1, 2, 65, 1000])
def test_heads_and_lengths(group: int, N: int) -> None:
    check(*make_qkv(1, 2 * group, 2, N, 64), *make_selection(1, N), local_window=33, num_sinks=4, scale=0.2)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries against all keys, causal from the end."""
    n, S = q.shape[2], k.shape[2]
    seen = torch.arange(S)[None] <= torch.arange(S - n, S)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("n", [1, 100, 200])
def test_a_window_over_everything_is_dense_attention(n: int) -> None:
    q, k, v = make_qkv(2, 6, 2, 200, 64)
    q = q[:, :, 200 - n :]
    expected = dense(q, k, v)
    for selection in (make_selection(2, 200), all_tokens(2, 200)):
        torch.testing.assert_close(ops.sparse_attn(q, k, v, *selection, local_window=200), expected)
    torch.testing.assert_close(ops.sparse_attn(q, k, v, *all_tokens(2, 200), local_window=3), expected)
    torch.testing.assert_close(ops.sparse_attn(q, k, v, *all_tokens(2, 200)), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1, 50, 100, 149])
def test_bad_values_stay_in_the_rows_that_see_them(bad: float, where: int) -> None:
    q, k, v = make_qkv(1, 4, 2, 150, 64)
    selection = make_selection(1, 150)
    for keywords in (
        {"local_window": 20},
        {"local_window": 20, "num_sinks": 2},
        {"local_window": 20, "all_queries": True, "last_key": make_ends(1, 150, 150)},
    ):
        clean = ops.sparse_attn(q, k, v, *selection, **keywords)
        for name in ("k", "v"):
            dirty = {"k": k.clone(), "v": v.clone()}
            dirty[name][0, :, where] = bad
            out = ops.sparse_attn(q, **dirty, index=selection[0], count=selection[1], **keywords)
            sees = seen_keys(*selection, 150, **keywords)[0, :, where]
            assert bool((~out[0, :, sees].isfinite()).any(dim=-1).all()) or (name == "k" and bad == torch.inf)
            torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees], rtol=0, atol=2 * output_floor(q, k, v))


def test_garbage_in_the_selection_is_skipped() -> None:
    q, k, v = make_qkv(1, 4, 2, 60, 64, layout="sliced")
    clean = torch.tensor([[2, 9, 10, 33, 59] + [60] * 55], dtype=torch.int32)
    dirty = clean.clone()
    dirty[0, :9] = torch.tensor([-(2**31), 2, -1, 9, 10, 60, 33, 2**31 - 1, 59])
    for n in (7, 60):
        how: dict[str, Any] = {"local_window": 5, "num_sinks": 1}
        out = ops.sparse_attn(q[:, :, 60 - n :], k, v, dirty, torch.tensor([9], dtype=torch.int32), **how)
        expected = ops.sparse_attn(q[:, :, 60 - n :], k, v, clean, torch.tensor([5], dtype=torch.int32), **how)
        assert torch.equal(out, expected)


@given(seed=st.integers(0, 2**32), count=st.integers(-3, 40), n=st.integers(1, 30), window=st.integers(0, 40))
def test_hostile_values_never_leave_the_tensors(seed: int, count: int, n: int, window: int) -> None:
    N = 30
    generator = torch.Generator().manual_seed(seed)
    q, k, v = make_qkv(1, 2, 1, N, 64, layout="sliced")
    wild = torch.randint(-(2**31), 2**31 - 1, (1, 2 * N), dtype=torch.int32, generator=generator)
    tame = torch.randint(-10, N + 10, (1, 2 * N), dtype=torch.int32, generator=generator)
    values = torch.where(torch.rand(1, 2 * N, generator=generator) < 0.2, wild, tame)
    counts = torch.tensor([count], dtype=torch.int32)
    ends = strided(values[:, N : N + n])
    out = ops.sparse_attn(q[:, :, N - n :], k, v, values[:, :N], counts, local_window=window, last_key=ends)
    assert out.shape == (1, 2, n, 64) and bool(out.isfinite().all())


@pytest.mark.usefixtures("all_threads")
def test_same_bits_every_time_and_for_a_row_alone() -> None:
    q, k, v = make_qkv(3, 14, 2, 300, 128, torch.bfloat16)
    index, count = make_selection(3, 300)
    how: dict[str, Any] = {"local_window": 40, "num_sinks": 4}
    together = ops.sparse_attn(q, k, v, index, count, **how)
    assert torch.equal(ops.sparse_attn(q, k, v, index, count, **how), together)
    for b in range(3):
        row = slice(b, b + 1)
        assert torch.equal(ops.sparse_attn(q[row], k[row], v[row], index[row], count[row], **how), together[row])
    with torch.inference_mode():
        assert torch.equal(ops.sparse_attn(q, k, v, index, count, **how), together)


@pytest.mark.parametrize(("B", "n", "S"), [(0, 5, 5), (2, 0, 0), (0, 0, 0), (2, 0, 5)])
def test_empty(B: int, n: int, S: int) -> None:
    q, k, v = make_qkv(B, 4, 2, S, 64, torch.float16)
    q = q[:, :, S - n :]
    index, count = torch.zeros(B, S, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    out = ops.sparse_attn(q, k, v, index, count, local_window=3)
    assert out.shape == (B, 4, n, 64) and out.dtype == torch.float16
    for window in (0, 3):
        layer = ops.zipvl_layer(q, k, v, local_window=window, num_sinks=window)
        assert layer[0].shape == (B, 4, n, 64) and layer[1].shape == (B, S) and layer[2].shape == (B,)
    assert ops.probe_index(q, k=k).shape == (B, 128)


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    N = 8192
    program = f"""
        import torch
        from zipvl import ops

        N = {N}
        q, k, v = torch.randn(3, 1, 1, N, 64)
        index, count = torch.arange(N, dtype=torch.int32)[None], torch.full((1,), N, dtype=torch.int32)

        def run(small):
            n = 512 if small else N
            rows = slice(0, n)
            ends = torch.full((1, n), n - 1, dtype=torch.int32)
            for keywords in ({{}}, {{"all_queries": True}}, {{"last_key": ends}}):
                ops.sparse_attn(
                    q[:, :, rows], k[:, :, rows], v[:, :, rows], index[:, rows], count,
                    local_window=128, num_sinks=4, **keywords,
                )
    """
    assert peak_growth(program) < N * N


# ---------------------------------------------------------------------------------------------------------------------
# probe_index, probe_scores, select_tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [1, 20, 99, 100])
def test_probes_are_drawn_among_the_queries(n: int, mask: str) -> None:
    _, k, _ = make_qkv(3, 2, 2, 100, 64)
    token_mask = make_mask(mask, 3, 100)
    how: dict[str, Any] = {"num_recent": 8, "num_random": 9, "seed": 3}
    probes = ops.probe_index(k[:, :, 100 - n :], **how, token_mask=token_mask, k=k)
    assert probes.dtype == torch.int32
    assert torch.equal(probes, reference.probe_index(k[:, :, 100 - n :], **how, token_mask=token_mask, k=k))
    among = None if token_mask is None else token_mask[:, 100 - n :]
    alone = ops.probe_index(k[:, :, 100 - n :], **how, token_mask=among)
    assert torch.equal(probes, torch.where(alone >= 0, alone + 100 - n, -1))


@pytest.mark.parametrize("mask", ["none", "left", "inner", "row_empty"])
@pytest.mark.parametrize("n", [1, 40, 120])
@pytest.mark.parametrize("ends", [False, True])
def test_probe_scores(n: int, mask: str, ends: bool) -> None:
    q, k, _ = make_qkv(2, 4, 2, 120, 64)
    q = q[:, :, 120 - n :]
    token_mask = make_mask(mask, 2, 120)
    last_key = make_ends(2, n, 120) if ends else None
    probes = reference.probe_index(q, num_recent=8, num_random=9, token_mask=token_mask, k=k)
    outside = torch.tensor([[0, 119 - n, 120, 2**31 - 1]], dtype=torch.int32).repeat(2, 1)  # of no query
    how: dict[str, Any] = {"token_mask": token_mask, "last_key": last_key}
    got = ops.probe_scores(q, k, torch.cat([probes, outside] if n < 120 else [probes], dim=1), **how)
    exact = reference.probe_scores(*double(q, k), probes, **how)
    for actual, wanted, rounded in zip(got, exact, reference.probe_scores(q, k, probes, **how), strict=True):
        assert actual.shape == (2, 120)
        assert_accurate(actual, wanted, rounded, score_floor(q, k, wanted))
    if not ends:
        valid = (probes >= 0).sum(dim=1)
        torch.testing.assert_close(got[0].sum(dim=1), valid.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("max_ratio", [0.01, 0.3, 1.0])
def test_what_a_selection_gains(mask: str, max_ratio: float) -> None:
    B, N = 3, 90
    budget, rank, token_mask = torch.rand(B, N), torch.rand(B, N), make_mask(mask, B, N)
    budget[-1, 5] = math.nan
    extra, keep = torch.rand(B, N) < 0.1, torch.rand(B, N) < 0.1
    how: dict[str, Any] = {"token_mask": token_mask, "keep_mask": keep, "max_ratio": max_ratio, "tau": 0.6}
    index, count = ops.select_tokens(budget, rank, **how)
    more = ops.select_tokens(budget, rank, **how, local_window=7, num_sinks=3, extra_mask=extra)
    exact = reference.select_tokens(budget, rank, **how, local_window=7, num_sinks=3, extra_mask=extra)
    assert all(torch.equal(a, b) for a, b in zip(more, exact, strict=True))
    expected = selected_mask(index, count)
    for b in range(B):
        real = torch.arange(N) if token_mask is None else token_mask[b].nonzero()[:, 0]
        expected[b, real[:3]] = True
        expected[b, real[-7:]] = True
        expected[b, real[extra[b, real]]] = True
        if b < B - 1:  # the ceiling holds but for what is kept
            assert int(count[b]) <= max(math.ceil(max_ratio * len(real)), int(keep[b, real].sum()), min(1, len(real)))
    assert torch.equal(selected_mask(*more), expected)
    for given_ratio in (0.2, 0.9):
        capped = ops.select_tokens(budget, rank, ratio=given_ratio, max_ratio=0.5, token_mask=token_mask)
        smaller = ops.select_tokens(budget, rank, ratio=min(given_ratio, 0.5), token_mask=token_mask)
        assert all(torch.equal(a, b) for a, b in zip(capped, smaller, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "left", "right", "inner", "row_empty"])
@pytest.mark.parametrize("n", [1, 50, 160])
@pytest.mark.parametrize("all_queries", [False, True])
def test_layer(mask: str, n: int, all_queries: bool) -> None:
    """The selection against that of exact scores, the output against that of the op's own selection."""
    B, S = 2, 160
    q, k, v = make_qkv(B, 4, 2, S, 64)
    q = q[:, :, S - n :]
    token_mask = make_mask(mask, B, S)
    attending: dict[str, Any] = {"token_mask": token_mask, "local_window": 12, "num_sinks": 2}
    attending |= {"last_key": make_ends(B, n, S), "all_queries": all_queries}
    extra = torch.rand(B, S) < 0.1
    how: dict[str, Any] = {"tau": 0.9, "num_recent": 8, "num_random": 8, "keep_recent": 3}
    how |= {"extra_mask": extra, "max_ratio": 0.6}
    out, index, count = ops.zipvl_attn(q, k, v, **how, **attending)

    probes = reference.probe_index(q, num_recent=8, num_random=8, token_mask=token_mask, k=k)
    scoring: dict[str, Any] = {"token_mask": token_mask, "last_key": attending["last_key"]}
    scores = ops.probe_scores(q, k, probes, **scoring)
    real = torch.ones(B, S, dtype=torch.bool) if token_mask is None else token_mask
    keep = real & (real.flip(1).cumsum(dim=1).flip(1) <= 3)
    chosen = ops.select_tokens(
        *scores,
        tau=0.9,
        keep_mask=keep,
        token_mask=token_mask,
        extra_mask=extra,
        max_ratio=0.6,
        local_window=12,
        num_sinks=2,
    )
    assert torch.equal(chosen[0], index) and torch.equal(chosen[1], count)
    assert torch.equal(ops.sparse_attn(q, k, v, index, count, **attending), out)
    check(q, k, v, index, count, **attending)

    prefill = ops.zipvl_prefill(q, k, v, **how, **attending)
    layer = ops.zipvl_layer(q, k, v, **how, **attending, pack=True)
    given = ops.zipvl_layer(q, k, v, budget_score=scores[0], rank_score=scores[1], **how, **attending)
    for other in (prefill, layer, given):
        assert all(torch.equal(a, b) for a, b in zip(other[:3], (out, index, count), strict=True))
    for packed, wanted in zip(prefill[3:], reference.pack_kv(k, v, index, count), strict=True):
        for b, kept in enumerate(count.tolist()):
            assert torch.equal(packed[b, :, :kept], wanted[b, :, :kept])


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("all_queries", [False, True])
def test_without_a_window_the_last_rows_are_those_of_the_selection(mask: str, all_queries: bool) -> None:
    q, k, v = make_qkv(2, 4, 2, 160, 64)
    q, token_mask = q[:, :, 100:], make_mask(mask, 2, 160)
    how: dict[str, Any] = {"tau": 0.7, "num_recent": 8, "num_random": 8, "token_mask": token_mask}
    out, index, count = ops.zipvl_attn(q, k, v, **how, all_queries=all_queries)
    exact = reference.zipvl_attn(*double(q, k, v), **how, all_queries=all_queries)
    scores = reference.probe_scores(
        *double(q, k),
        reference.probe_index(q, num_recent=8, num_random=8, token_mask=token_mask, k=k),
        token_mask=token_mask,
    )
    rounded = ops.probe_scores(
        q, k, ops.probe_index(q, num_recent=8, num_random=8, token_mask=token_mask, k=k), token_mask=token_mask
    )
    errors = [tolerance(e, r, torch.float32, score_floor(q, k, e)) for e, r in zip(scores, rounded, strict=True)]
    keep = torch.zeros(2, 160, dtype=torch.bool)
    keep[:, -1] = True
    assert_selection_within_rounding(
        index, count, scores, (errors[0], errors[1]), tau=0.7, keep_mask=keep, token_mask=token_mask
    )
    assert exact[0].shape == out.shape
    check(q, k, v, index, count, token_mask=token_mask, all_queries=all_queries)


@pytest.mark.parametrize("n", [1, 30, 80])
@pytest.mark.parametrize("keywords", [{}, {"local_window": 9, "num_sinks": 2}, {"all_queries": True}], ids=str)
@pytest.mark.parametrize("outputs", [False, True])
def test_layer_from_hidden_states(n: int, keywords: dict[str, Any], outputs: bool) -> None:
    """Every row of hidden states is projected; with queries of those rows given it is the same layer."""
    B, S, Hq, D = 2, 80, 4, 64
    _, k, v = make_qkv(B, Hq, 2, S, D)
    angle = torch.randn(1, n, D // 2).repeat(1, 1, 2)
    hidden = {"hidden": torch.randn(B, n, 48), "q_weight": torch.randn(Hq * D, 48) / 7}
    hidden |= {"cos": angle.cos(), "sin": angle.sin()}
    weight = {"o_weight": torch.randn(40, Hq * D)} if outputs else {}
    how: dict[str, Any] = {"tau": 0.8, "num_recent": 8, "num_random": 8, "token_mask": make_mask("left", B, S)}
    how |= keywords
    rows = torch.arange(n, dtype=torch.int32).repeat(B, 1)
    q = ops.project_queries(hidden["hidden"], hidden["q_weight"], None, hidden["cos"], hidden["sin"], rows)
    expected = ops.zipvl_layer(q, k, v, **how, **weight, pack=True)
    got = ops.zipvl_layer(None, k, v, **hidden, **how, **weight, pack=True)
    assert got[0].shape == ((B, n, 40) if outputs else (B, Hq, n, D))
    if n < S or keywords:
        assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))
    exact = reference.zipvl_layer(
        None, *double(k, v), **{name: t.double() for name, t in (hidden | weight).items()}, **how
    )
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-4, atol=1e-3)


def test_padding_is_not_read() -> None:
    q, k, v = make_qkv(2, 4, 2, 120, 64)
    mask = make_mask("inner", 2, 120)
    assert mask is not None
    how: dict[str, Any] = {"token_mask": mask, "local_window": 10, "num_sinks": 2, "num_recent": 8, "num_random": 8}
    for n in (30, 120):
        rows = slice(120 - n, 120)
        clean = ops.zipvl_attn(q[:, :, rows], k, v, **how)
        dirty = ops.zipvl_attn(poison(q, ~mask)[:, :, rows], poison(k, ~mask), poison(v, ~mask), **how)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_a_prompt_in_chunks_sees_what_came_before() -> None:
    """Each chunk's rows are those of a call that ends with the chunk."""
    q, k, v = make_qkv(1, 4, 2, 200, 64)
    how: dict[str, Any] = {"local_window": 16, "num_sinks": 2, "tau": 0.9, "num_recent": 8, "num_random": 8}
    for begin, end in ((0, 64), (64, 128), (128, 200)):
        out, index, count = ops.zipvl_attn(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], **how)
        check(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], index, count, local_window=16, num_sinks=2)
        assert out.shape[2] == end - begin
