"""Neighbourhoods, chunks and row ends on CUDA (docs/ops.md, steps 5b to 5e), both kernel families, against float64 on
the GPU; NaN wherever the ops must not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import UNDER_INITCHECK, no_host_sync
from tests.kernels.test_sparse_attn import (
    HALVES,
    HEAD_DIMS,
    LAYOUTS,
    family,  # noqa: F401  (a fixture)
    make_qkv,
    make_selection,
    poison_free_memory,
    poisoned,
)
from tests.unit.helpers import assert_accurate, output_floor, score_floor
from zipvl import ops, reference

WINDOWS = (1, 63, 64, 65, 127, 128, 129, 300, 5000)
MASKS = ("none", "left", "right", "inside")


def make_mask(kind: str, B: int, S: int) -> Tensor | None:
    """``[B, S]``: so many tokens less in each row; ``inside``: a third of them anywhere."""
    if kind == "none":
        return None
    mask = torch.ones(B, S, dtype=torch.bool, device="cuda")
    for b in range(B):
        if kind == "inside":
            mask[b] = torch.rand(S, device="cuda") > 0.3
        else:
            padding = (b * 97 + 5) % S
            mask[b, slice(None, padding) if kind == "left" else slice(S - padding, None)] = False
    return mask


def among(mask: Tensor | None, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The selection without the tokens that are not real."""
    if mask is None:
        return index, count
    index, count = index.clone(), count.clone()
    for b in range(len(count)):
        T = index[b, : int(count[b])].long()
        T = T[mask[b, T]]
        index[b, : len(T)] = T.int()
        count[b] = len(T)
    return index, count


def visible(
    index: Tensor,
    count: Tensor,
    queries: int,
    *,
    all_queries: bool = False,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    last_key: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees, ``[B, n, S]``: steps 5 to 5d."""
    B, S = index.shape
    at = torch.arange(S, device="cuda")
    own = at[S - queries :]
    seen = torch.zeros(B, queries, S, dtype=torch.bool, device="cuda")
    for b in range(B):
        real = torch.ones(S, dtype=torch.bool, device="cuda") if token_mask is None else token_mask[b]
        last = own if last_key is None else last_key[b].long().clamp(-1, S - 1)
        chosen = torch.zeros(S, dtype=torch.bool, device="cuda")
        chosen[index[b, : int(count[b])].long()] = True
        row_of_T = torch.ones_like(own, dtype=torch.bool) if all_queries else chosen[own]
        sinks = real & (real.cumsum(0) <= num_sinks)
        near = real & (own[:, None] - local_window < at) if local_window else torch.zeros_like(seen[b])
        near = near | (sinks if local_window else torch.zeros_like(sinks))
        seen[b] = ((chosen & row_of_T[:, None]) | near) & (at <= last[:, None])
        if token_mask is not None and (local_window or queries < S or last_key is not None or all_queries):
            seen[b] &= real[own][:, None]
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax over what each row sees; 0 where that is nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    logits = (q.to(dtype) @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    hidden = ~seen[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0) @ v


BLOCK = 128  # keys that a tile of rows reads at once: their values are multiplied with weights of 0


def unread(index: Tensor, count: Tensor, seen: Tensor, token_mask: Tensor | None) -> Tensor:
    """``[B, S]``: tokens outside T that are padding, or further than a block from all that any row sees."""
    B, S = index.shape
    outside = torch.ones(B, S, dtype=torch.bool, device="cuda")
    for b in range(B):
        outside[b, index[b, : int(count[b])].long()] = False
    near = torch.nn.functional.max_pool1d(seen.any(1).float()[:, None], 2 * BLOCK + 1, 1, BLOCK)[:, 0] > 0
    return outside & (~near if token_mask is None else ~near | ~token_mask)


def check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, **keywords: Any) -> Tensor:
    """The op against float64, with NaN in keys that no row sees, in values that it must not read, and in the memory
    that it gets."""
    seen = visible(index, count, q.shape[2], **keywords)
    given = (
        q,
        poisoned(k, ~seen.any(dim=1)),
        poisoned(v, unread(index, count, seen, keywords.get("token_mask"))),
    )
    poison_free_memory(q.numel())
    with no_host_sync():
        out: Tensor = ops.sparse_attn(*given, index, count, **keywords)
    assert out.shape == q.shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    exact, baseline = attention(q, k, v, seen, torch.float64), attention(q, k, v, seen, q.dtype)
    assert_accurate(out, exact, baseline, output_floor(q, k, v))
    rows = seen.any(dim=-1)[:, None, :, None].expand_as(out)
    if not UNDER_INITCHECK:
        assert bool((out[~rows] == 0).all()), "rows that see nothing are exactly 0"
    return out


def last_queries(q: Tensor, queries: int) -> Tensor:
    return q[:, :, q.shape[2] - queries :]


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize(("Hq", "Hkv"), [(2, 2), (14, 2)])
@pytest.mark.parametrize("dtype", HALVES)
def test_heads_and_head_dims(dtype: torch.dtype, Hq: int, Hkv: int, D: int, all_queries: bool) -> None:
    check(
        *make_qkv(2, Hq, Hkv, 777, D, dtype),
        *make_selection(777, [140, 401]),
        local_window=128,
        num_sinks=4,
        all_queries=all_queries,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_sinks", [0, 4, 70])
@pytest.mark.parametrize("local_window", WINDOWS)
@pytest.mark.parametrize("D", [64, 128])
def test_windows_and_sinks(D: int, local_window: int, num_sinks: int, mask: str) -> None:
    q, k, v = make_qkv(3, 6, 2, 700, D)
    token_mask = make_mask(mask, 3, 700)
    selection = among(token_mask, *make_selection(700, [0, 350, 700]))
    for all_queries in (False, True):
        check(
            q,
            k,
            v,
            *selection,
            local_window=local_window,
            num_sinks=num_sinks,
            token_mask=token_mask,
            all_queries=all_queries,
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 2, 63, 128, 129, 500, 699, 700])
@pytest.mark.parametrize("local_window", [0, 64])
@pytest.mark.parametrize("all_queries", [False, True])
def test_queries_of_the_last_tokens(all_queries: bool, local_window: int, queries: int, mask: str) -> None:
    q, k, v = make_qkv(2, 4, 2, 700, 128)
    token_mask = make_mask(mask, 2, 700)
    check(
        last_queries(q, queries),
        k,
        v,
        *among(token_mask, *make_selection(700, [200, 555])),
        local_window=local_window,
        num_sinks=4 if local_window else 0,
        token_mask=token_mask,
        all_queries=all_queries,
    )


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("local_window", [0, 100])
@pytest.mark.parametrize("all_queries", [False, True])
def test_row_ends(all_queries: bool, local_window: int, D: int) -> None:
    """Two images whose tokens see each other; and ends anywhere, the first and none among them."""
    q, k, v = make_qkv(2, 4, 2, 640, D)
    last_key = torch.arange(640, dtype=torch.int32, device="cuda").repeat(2, 1)
    last_key[0, 30:250], last_key[0, 300:500] = 249, 499
    last_key[1] = torch.randint(-1, 640, (640,), device="cuda").int()
    for rows in (640, 200):
        check(
            last_queries(q, rows),
            k,
            v,
            *make_selection(640, [320, 64]),
            local_window=local_window,
            num_sinks=3 if local_window else 0,
            last_key=last_key[:, 640 - rows :],
            all_queries=all_queries,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    check(*make_qkv(2, 6, 2, 333, 128, dtype, layout), *make_selection(333, [100, 200]), local_window=50, num_sinks=2)


def test_keys_that_are_expanded_over_batch_and_heads() -> None:
    q, k, v = make_qkv(2, 4, 2, 300, 128)
    k, v = (x[:1, :1].expand(2, 2, -1, -1) for x in (k, v))
    selection = make_selection(300, [100, 200])
    out = ops.sparse_attn(q, k, v, *selection, local_window=50, num_sinks=2)
    assert torch.equal(
        out, ops.sparse_attn(q, k.contiguous(), v.contiguous(), *selection, local_window=50, num_sinks=2)
    )


def test_queries_that_are_expanded_over_batch_and_heads() -> None:
    q, k, v = make_qkv(2, 4, 2, 300, 128)
    q = q[:1, :1].expand(2, 4, -1, -1)
    selection = make_selection(300, [100, 200])
    out = ops.sparse_attn(q, k, v, *selection, local_window=50, num_sinks=2)
    contiguous = ops.sparse_attn(q.contiguous(), k, v, *selection, local_window=50, num_sinks=2)
    torch.testing.assert_close(out, contiguous, atol=2e-2, rtol=2e-2)


def test_a_window_over_everything_is_dense_attention() -> None:
    q, k, v = make_qkv(2, 4, 2, 500, 128)
    out = ops.sparse_attn(q, k, v, *make_selection(500, [100, 3]), local_window=500)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("queries", [500, 123])
def test_the_same_bits_again_and_in_other_batches(queries: int) -> None:
    q, k, v = make_qkv(3, 4, 2, 500, 128)
    q = last_queries(q, queries)
    index, count = make_selection(500, [100, 300, 200])
    keywords: dict[str, Any] = {"local_window": 128, "num_sinks": 4}
    first = ops.sparse_attn(q, k, v, index, count, **keywords)
    assert torch.equal(first, ops.sparse_attn(q, k, v, index, count, **keywords))
    for b in range(3):
        one = (x[b : b + 1] for x in (q, k, v, index, count))
        assert torch.equal(first[b : b + 1], ops.sparse_attn(*one, **keywords))


def test_nothing_is_lost_where_the_selection_has_the_neighbourhood_already() -> None:
    """Sinks and windows inside and outside of T: each key counts once."""
    q, k, v = make_qkv(1, 2, 1, 400, 128)
    everything = make_selection(400, [400])
    check(q, k, v, *everything, local_window=64, num_sinks=8)
    index = torch.full((1, 400), 400, dtype=torch.int32, device="cuda")
    index[0, :3] = torch.tensor([1, 5, 399])
    check(q, k, v, index, torch.tensor([3], dtype=torch.int32, device="cuda"), local_window=64, num_sinks=8)


# ---------------------------------------------------------------------------------------------------------------------
# Probes and selection
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 64, 130, 777, 3000])
def test_probes_of_the_last_tokens(queries: int, mask: str) -> None:
    q, k, _ = make_qkv(2, 2, 1, 3000, 64)
    token_mask = make_mask(mask, 2, 3000)
    q = last_queries(q, queries)
    drawn = ops.probe_index(q, token_mask=token_mask, k=k)
    assert torch.equal(drawn, reference.probe_index(q, token_mask=token_mask, k=k))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("queries", [40, 300, 900])
@pytest.mark.parametrize(("Hq", "D"), [(6, 128), (16, 64), (2, 256)])
def test_scores_of_the_last_tokens(Hq: int, D: int, queries: int, ends: bool, mask: str) -> None:
    q, k, _ = make_qkv(2, Hq, 2, 900, D)
    token_mask = make_mask(mask, 2, 900)
    q = last_queries(q, queries)
    last_key = torch.randint(-1, 900, (2, queries), device="cuda").int() if ends else None
    probes = ops.probe_index(q, token_mask=token_mask, k=k)
    probes[:, 0] = 900 - queries - 1  # a token without a query
    keywords: dict[str, Any] = {"token_mask": token_mask, "last_key": last_key}
    scores = ops.probe_scores(q, k, probes, **keywords)
    exact = reference.probe_scores(q.double(), k.double(), probes, **keywords)
    baseline = reference.probe_scores(q, k, probes, **keywords)
    for actual, exact_one, baseline_one in zip(scores, exact, baseline, strict=True):
        assert_accurate(actual, exact_one, baseline_one, score_floor(q, k, exact_one))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("S", [1, 5, 300, 4095, 4097, 20000])
def test_what_a_neighbourhood_adds_to_the_selection(S: int, mask: str) -> None:
    scores = torch.rand(2, S, device="cuda")
    token_mask = make_mask(mask, 2, S)
    extra = torch.rand(2, S, device="cuda") < 0.01
    keep = torch.rand(2, S, device="cuda") < 0.01
    for keywords in (
        {"local_window": 128, "num_sinks": 4},
        {"local_window": 7, "extra_mask": extra},
        {"extra_mask": extra, "keep_mask": keep},
        {"max_ratio": 0.1, "keep_mask": keep},
        {"max_ratio": 0.3, "local_window": 2 * S},
        {"max_ratio": 0.3, "tau": 1.0},
    ):
        for budget in ({"ratio": 0.2}, {}):
            given: dict[str, Any] = {"token_mask": token_mask, **budget, **keywords}
            index, count = ops.select_tokens(scores, scores, **given)
            expected = reference.select_tokens(scores, scores, **given)
            if "tau" in keywords or budget:  # sums of float32 may differ in their last bit
                assert torch.equal(count, expected[1]) and torch.equal(index, expected[0])
            else:
                assert bool(((count - expected[1]).abs() <= 1).all())


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


def layer_of_steps(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The layer from the ops one by one."""
    mask, ends = keywords.get("token_mask"), keywords.get("last_key")
    near = {name: keywords.get(name, 0) for name in ("local_window", "num_sinks")}
    probes = ops.probe_index(q, token_mask=mask, k=k)
    scores = ops.probe_scores(q, k, probes, token_mask=mask, last_key=ends)
    S = k.shape[2]
    real = torch.ones(k.shape[0], S, dtype=torch.bool, device="cuda") if mask is None else mask
    recent = real & (real.sum(-1, keepdim=True) - real.cumsum(-1) < 1)
    index, count = ops.select_tokens(
        *scores,
        ratio=keywords.get("ratio"),
        max_ratio=keywords.get("max_ratio", 1.0),
        extra_mask=keywords.get("extra_mask"),
        keep_mask=recent,
        token_mask=mask,
        **near,
    )
    out = ops.sparse_attn(
        q, k, v, index, count, token_mask=mask, last_key=ends, all_queries=keywords.get("all_queries", False), **near
    )
    return out, index, count


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1500, 400])
@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("local_window", [0, 128])
def test_the_layer_is_its_steps(local_window: int, all_queries: bool, queries: int, mask: str) -> None:
    q, k, v = make_qkv(2, 6, 2, 1500, 128)
    q = last_queries(q, queries)
    extra = torch.rand(2, 1500, device="cuda") < 0.02
    keywords: dict[str, Any] = {
        "local_window": local_window,
        "num_sinks": 4 if local_window else 0,
        "all_queries": all_queries,
        "token_mask": make_mask(mask, 2, 1500),
        "extra_mask": extra,
        "max_ratio": 0.5,
    }
    expected = layer_of_steps(q, k, v, **keywords)
    poison_free_memory(q.numel())
    with no_host_sync():
        out, index, count, k_packed, v_packed = ops.zipvl_layer(q, k, v, **keywords, pack=True)
    for actual, one in zip((out, index, count), expected, strict=True):
        assert torch.equal(actual, one)
    for packed, tensor in ((k_packed, k), (v_packed, v)):
        for b in range(2):
            T = index[b, : int(count[b])].long()
            assert torch.equal(packed[b, :, : len(T)], tensor[b, :, T])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("queries", [700, 300])
@pytest.mark.parametrize("local_window", [0, 64])
def test_the_layer_from_hidden_states(local_window: int, queries: int, projected: bool) -> None:
    B, Hq, Hkv, S, D, C = 2, 4, 2, 700, 128, 256
    _, k, v = make_qkv(B, Hq, Hkv, S, D)
    hidden = torch.randn(B, queries, C, device="cuda").bfloat16()
    weight = (torch.randn(Hq * D, C, device="cuda") * C**-0.5).bfloat16()
    angles = torch.rand(1, queries, D // 2, device="cuda").repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    o_weight = (torch.randn(96, Hq * D, device="cuda") * 0.05).bfloat16() if projected else None
    rows = torch.arange(queries, dtype=torch.int32, device="cuda").repeat(B, 1)
    q = ops.project_queries(hidden, weight, None, cos, sin, rows)
    keywords: dict[str, Any] = {"local_window": local_window, "num_sinks": 2 if local_window else 0, "ratio": 0.3}
    out, index, count, _, _ = ops.zipvl_layer(
        None, k, v, hidden=hidden, q_weight=weight, cos=cos, sin=sin, o_weight=o_weight, **keywords
    )
    expected, other_index, other_count, _, _ = ops.zipvl_layer(q, k, v, **keywords)
    if o_weight is not None:
        expected = torch.nn.functional.linear(expected.transpose(1, 2).flatten(2), o_weight)
    assert torch.equal(count, other_count)
    if local_window or queries < S:
        assert torch.equal(index, other_index) and torch.equal(out, expected)
    else:  # the usual layer projects chosen rows alone, whose sums another product may round otherwise
        torch.testing.assert_close(out, expected, atol=3e-2, rtol=3e-2)


def test_row_ends_of_a_layer_from_hidden_states_leave_no_row_unwritten() -> None:
    B, Hq, S, D, C = 1, 4, 500, 64, 128
    _, k, v = make_qkv(B, Hq, Hq, S, D)
    hidden = torch.randn(B, S, C, device="cuda").bfloat16()
    weight, o_weight = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((Hq * D, C), (64, Hq * D)))
    tables = torch.ones(1, S, D, device="cuda").bfloat16()
    last_key = torch.arange(S, dtype=torch.int32, device="cuda")[None]
    poison_free_memory(B * Hq * S * D)
    out, index, count, _, _ = ops.zipvl_layer(
        None, k, v, hidden=hidden, q_weight=weight, cos=tables, sin=0 * tables, o_weight=o_weight, ratio=0.2,
        last_key=last_key,
    )  # fmt: skip
    chosen = torch.zeros(S, dtype=torch.bool, device="cuda")
    chosen[index[0, : int(count[0])].long()] = True
    assert bool((out[0, ~chosen] == 0).all()) and bool(out.isfinite().all())


def test_a_graph_replays_with_other_counts() -> None:
    q, k, v = make_qkv(1, 4, 2, 900, 128)
    index, count = make_selection(900, [300])
    keywords: dict[str, Any] = {"local_window": 128, "num_sinks": 4}
    ops.sparse_attn(q, k, v, index, count, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sparse_attn(q, k, v, index, count, **keywords)
    other_index, other_count = make_selection(900, [711])
    index.copy_(other_index)
    count.copy_(other_count)
    graph.replay()
    assert torch.equal(out, ops.sparse_attn(q, k, v, other_index, other_count, **keywords))


def test_counts_and_entries_out_of_range_touch_nothing_outside() -> None:
    q, k, v = make_qkv(2, 4, 2, 500, 128)
    index = torch.full((2, 500), 2**31 - 1, dtype=torch.int32, device="cuda")
    index[1] = -(2**31)
    for count in ([500, 500], [-5, 10**6]):
        for queries in (500, 77):
            out = ops.sparse_attn(
                last_queries(q, queries), k, v, index, torch.tensor(count, dtype=torch.int32, device="cuda"),
                local_window=64, num_sinks=4,
            )  # fmt: skip
            assert out.shape[2] == queries
    torch.cuda.synchronize()
