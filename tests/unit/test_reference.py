"""The reference is the truth of every other test, so it is checked against things that are simpler still."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

from zipvl import reference

from .helpers import KEYWORDS, MASKS, OPS, REFERENCE, all_tokens, double, make_mask, make_qkv, make_selection

F64 = torch.float64


@pytest.mark.parametrize("op", OPS)
def test_defaults_are_those_of_the_page(op: str) -> None:
    parameters = inspect.signature(REFERENCE[op]).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == KEYWORDS[op]


@pytest.mark.parametrize("causal", [True, False])
def test_all_tokens_give_dense_attention(causal: bool) -> None:
    q, k, v = make_qkv(2, 6, 2, 37, 16, F64)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    index, count = all_tokens(2, 37)
    out = reference.sparse_attn(q, k, v, index, count, causal=causal)
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)
    full, full_index, full_count = reference.zipvl_attn(q, k, v, tau=1.0, causal=causal)
    assert torch.equal(full, out) and torch.equal(full_index, index) and torch.equal(full_count, count)


@pytest.mark.parametrize("all_queries", [True, False])
def test_sparse_attention_is_dense_attention_under_a_mask(all_queries: bool) -> None:
    B, N = 2, 31
    q, k, v = make_qkv(B, 4, 2, N, 16, F64)
    index, count = make_selection(B, N)
    out = reference.sparse_attn(q, k, v, index, count, all_queries=all_queries)
    for b in range(B):
        T = index[b, : count[b]].long()
        allowed = torch.zeros(N, N, dtype=torch.bool).index_fill(1, T, True).tril()
        dense = torch.nn.functional.scaled_dot_product_attention(q[b], k[b], v[b], attn_mask=allowed, enable_gqa=True)
        computed = torch.zeros(N, dtype=torch.bool).index_fill(0, torch.arange(N) if all_queries else T, True)
        computed &= allowed.any(dim=1)
        torch.testing.assert_close(out[b, :, computed], dense[:, computed], rtol=1e-12, atol=1e-12)
        assert bool((out[b, :, ~computed] == 0).all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_probe_scores_by_the_definition(mask: str, causal: bool) -> None:
    B, Hq, Hkv, N, D = 2, 4, 2, 19, 8
    q, k, _ = make_qkv(B, Hq, Hkv, N, D, F64)
    token_mask = make_mask(mask, B, N)
    probes = reference.probe_index(q, num_recent=3, num_random=4, token_mask=token_mask)
    accumulated, normalized = reference.probe_scores(q, k, probes, causal=causal, token_mask=token_mask)
    real = torch.ones(B, N, dtype=torch.bool) if token_mask is None else token_mask
    for b in range(B):
        expected, may = [0.0] * N, [0] * N
        for i in probes[b].tolist():
            allowed = [j for j in range(N) if i >= 0 and real[b, j] and (j <= i or not causal)]
            for j in allowed:
                may[j] += 1
            for h in range(Hq):
                weights = {j: math.exp(float(q[b, h, i] @ k[b, h // 2, j]) * D**-0.5) for j in allowed}
                for j in allowed:
                    expected[j] += weights[j] / sum(weights.values()) / Hq
        torch.testing.assert_close(accumulated[b], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-14)
        means = [e / m if m else 0.0 for e, m in zip(expected, may, strict=True)]
        torch.testing.assert_close(normalized[b], torch.tensor(means, dtype=F64), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(float(accumulated[b].sum()), float((probes[b] >= 0).sum()))


def select(budget: list[float], rank: list[float], **keywords: object) -> list[int]:
    index, count = reference.select_tokens(
        torch.tensor([budget], dtype=F64), torch.tensor([rank], dtype=F64), **keywords
    )  # type: ignore[arg-type]
    chosen = index[0, : int(count)].tolist()
    assert index[0, int(count) :].tolist() == [len(budget)] * (len(budget) - len(chosen))
    return chosen


def mask_of(*tokens: int, N: int = 6) -> Tensor:
    return torch.zeros(1, N, dtype=torch.bool).index_fill(1, torch.tensor(tokens, dtype=torch.int64), True)


BUDGET = [4.0, 0.0, 1.0, 2.0, 0.0, 1.0]
RANK = [0.0, 3.0, 3.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"tau": 0.5}, [1]),
        ({"tau": 0.5 + 2**-40}, [1, 2]),
        ({"tau": 0.75}, [1, 2]),
        ({"tau": 0.875}, [1, 2, 4]),
        ({"tau": 1.0 - 2**-50}, [1, 2, 3, 4]),
        ({"tau": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"tau": 0.5, "min_tokens": 5}, [0, 1, 2, 3, 4]),
        ({"tau": 0.5, "min_tokens": 50}, [0, 1, 2, 3, 4, 5]),
        ({"ratio": 0.5}, [1, 2, 4]),
        ({"ratio": 0.5 + 2**-40}, [1, 2, 3, 4]),
        ({"ratio": 2**-40}, [1]),
        ({"ratio": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"ratio": 0.5, "keep_mask": mask_of(0)}, [0, 1, 2]),
        ({"ratio": 0.5, "keep_mask": mask_of(0, 3, 5)}, [0, 3, 5]),
        ({"ratio": 0.5, "keep_mask": mask_of(0, 2, 3, 5)}, [0, 2, 3, 5]),
        ({"ratio": 0.5, "token_mask": mask_of(0, 1, 3, 5)}, [1, 3]),
        ({"ratio": 0.5, "token_mask": mask_of(0, 1, 3, 5), "keep_mask": mask_of(2, 5)}, [1, 5]),
        ({"ratio": 1.0, "token_mask": mask_of(0, 1, 3, 5)}, [0, 1, 3, 5]),
        ({"tau": 0.5, "token_mask": mask_of(1, 4)}, [1, 4]),
        ({"tau": 0.5, "token_mask": mask_of()}, []),
    ],
)
def test_selection_by_hand(keywords: dict[str, object], expected: list[int]) -> None:
    assert select(BUDGET, RANK, **keywords) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_score_that_is_not_finite_selects_every_real_token(bad: float, where: int) -> None:
    scores = [list(BUDGET), list(RANK)]
    scores[where][2] = bad
    assert select(*scores, ratio=0.2) == [0, 1, 2, 3, 4, 5]
    assert select(*scores, ratio=0.2, token_mask=mask_of(0, 2, 3)) == [0, 2, 3]
    assert select(*scores, ratio=0.2, token_mask=mask_of(0, 1, 3)) == [1], "padding has no say"


# ---------------------------------------------------------------------------------------------------------------------
# The layer, against the steps composed here
# ---------------------------------------------------------------------------------------------------------------------


def projection(B: int, N: int, Hq: int, D: int, bias: bool, norm: bool) -> dict[str, Tensor]:
    """``hidden`` and the query projection of a layer, float64."""
    angle = torch.randn(B, N, D // 2, dtype=F64).repeat(1, 1, 2)
    tensors = {"hidden": torch.randn(B, N, 12, dtype=F64), "q_weight": torch.randn(Hq * D, 12, dtype=F64) / 3}
    tensors |= {"cos": angle.cos(), "sin": angle.sin()}
    tensors |= {"q_bias": torch.randn(Hq * D, dtype=F64)} if bias else {}
    return tensors | ({"q_norm_weight": torch.rand(D, dtype=F64) + 0.5} if norm else {})


def projected(given: dict[str, Tensor], eps: float = 1e-6) -> Tensor:
    """The queries of every token, ``[B, Hq, N, D]``, written out."""
    B, N, D = given["cos"].shape
    q = torch.nn.functional.linear(given["hidden"], given["q_weight"], given.get("q_bias")).view(B, N, -1, D)
    if "q_norm_weight" in given:
        q = torch.nn.functional.rms_norm(q, (D,), given["q_norm_weight"], eps)
    low, high = q.chunk(2, dim=-1)
    return (q * given["cos"][:, :, None] + torch.cat([-high, low], -1) * given["sin"][:, :, None]).transpose(1, 2)


def steps(
    q: Tensor, k: Tensor, v: Tensor, keep_mask: Tensor, token_mask: Tensor | None, **keywords: bool
) -> list[Tensor]:
    """Out, index, count, packed keys and values by the steps, with tau 0.6, a few probes and ``keep_recent`` 2."""
    B, _, N, _ = q.shape
    real = torch.ones(B, N, dtype=torch.bool) if token_mask is None else token_mask
    probes = reference.probe_index(q, num_recent=5, num_random=3, seed=7, token_mask=token_mask)
    causal = keywords.get("causal", True)
    scores = reference.probe_scores(q, k, probes, scale=0.2, causal=causal, token_mask=token_mask)
    keep = keep_mask | (real & (real.flip(1).cumsum(1).flip(1) <= 2))
    index, count = reference.select_tokens(*scores, tau=0.6, keep_mask=keep, token_mask=token_mask)
    out = reference.sparse_attn(q, k, v, index, count, scale=0.2, **keywords)
    packed = reference.pack_kv(k, v, index, count)
    return [out * real[:, None, :, None], index, count, *packed]


LAYER = {"tau": 0.6, "num_recent": 5, "num_random": 3, "seed": 7, "keep_recent": 2, "scale": 0.2}


def assert_same(actual: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keywords", [{}, {"all_queries": True}, {"causal": False}], ids=str)
def test_the_layer_is_its_steps(keywords: dict[str, bool], mask: str) -> None:
    B, N = 3, 33
    q, k, v = make_qkv(B, 4, 2, N, 8, F64)
    masks = {"keep_mask": torch.rand(B, N) < 0.1, "token_mask": make_mask(mask, B, N)}
    expected = steps(q, k, v, **masks, **keywords)
    actual = reference.zipvl_layer(q, k, v, **LAYER, **masks, **keywords, pack=True)
    assert_same(actual, expected)
    assert_same(reference.zipvl_prefill(q, k, v, **LAYER, **masks, **keywords), expected)
    assert_same(reference.zipvl_attn(q, k, v, **LAYER, **masks, **keywords), expected[:3])
    unpacked = reference.zipvl_layer(q, k, v, **LAYER, **masks, **keywords)
    assert_same(unpacked[:3], expected[:3])
    assert unpacked[3].shape == unpacked[4].shape == (0,) and unpacked[3].dtype == F64


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True)])
def test_the_layer_projects_its_queries(bias: bool, norm: bool, all_queries: bool, mask: str) -> None:
    """Those of probes and ``T`` alone, or all, and the outputs of the rows that are computed."""
    B, N, Hq, D = 2, 29, 4, 8
    given, o_weight = projection(B, N, Hq, D, bias, norm), torch.randn(10, Hq * D, dtype=F64)
    _, k, v = make_qkv(B, Hq, 2, N, D, F64)
    masks = {"keep_mask": torch.rand(B, N) < 0.1, "token_mask": make_mask(mask, B, N)}
    expected = steps(projected(given), k, v, **masks, all_queries=all_queries)
    actual = reference.zipvl_layer(None, k, v, **given, **LAYER, **masks, all_queries=all_queries, pack=True)
    assert_same(actual, expected)
    out, index, count, _, _ = reference.zipvl_layer(
        None, k, v, **given, o_weight=o_weight, **LAYER, **masks, all_queries=all_queries
    )
    assert_same((out, index, count), [expected[0].transpose(1, 2).flatten(2) @ o_weight.T, *expected[1:3]])


def test_the_layer_takes_scores_as_they_are() -> None:
    """No probes are drawn: their number has no say, and NaN stands in the queries outside ``T``."""
    B, N = 2, 40
    q, k, v = make_qkv(B, 4, 2, N, 8, F64)
    budget, rank = torch.rand(B, N), torch.rand(B, N)
    keep = (torch.arange(N) == N - 1).expand(B, N)
    index, count = reference.select_tokens(budget, rank, tau=0.4, keep_mask=keep)
    outside = torch.ones(B, N, dtype=torch.bool)
    for b in range(B):
        outside[b, index[b, : count[b]].long()] = False
    q = q.masked_fill(outside[:, None, :, None], math.nan)
    actual = reference.zipvl_layer(q, k, v, budget_score=budget, rank_score=rank, tau=0.4, num_recent=1, num_random=0)
    assert_same(actual[:3], [reference.sparse_attn(q, k, v, index, count), index, count])


def test_pack_kv_by_hand() -> None:
    k = torch.arange(1.0, 7.0).view(1, 1, 6, 1)
    index = torch.tensor([[1, -3, 4, 6, 5, 0]], dtype=torch.int32)
    packed, _ = reference.pack_kv(k, -k, index, torch.tensor([5], dtype=torch.int32))
    assert packed.flatten().tolist() == [2.0, 0.0, 5.0, 0.0, 6.0, 0.0]


def test_decode_is_the_last_row_of_dense_attention() -> None:
    q, k, v = make_qkv(3, 6, 2, 29, 16, F64)
    lengths = torch.tensor([29, 12, 40], dtype=torch.int32)
    out, lse = reference.decode_attn(q[:, :, -1:], k, v, lengths)
    for b, length in enumerate((29, 12, 29)):
        row, keys, values = q[b, :, -1:], k[b, :, :length], v[b, :, :length]
        dense = torch.nn.functional.scaled_dot_product_attention(row, keys, values, enable_gqa=True)
        torch.testing.assert_close(out[b], dense, rtol=1e-12, atol=1e-12)
        logits = torch.einsum("hqd,hkd->hqk", row, keys.repeat_interleave(3, dim=0)) / 4
        torch.testing.assert_close(lse[b], logits.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)


def test_precision_follows_the_input() -> None:
    q, k, v = make_qkv(1, 2, 1, 9, 16)
    for dtype, scores in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        q_, k_, v_ = q.to(dtype), k.to(dtype), v.to(dtype)
        accumulated, normalized = reference.probe_scores(q_, k_, reference.probe_index(q_))
        assert accumulated.dtype == normalized.dtype == scores
        out, lse = reference.decode_attn(q_[:, :, -1:], k_, v_, torch.tensor([9], dtype=torch.int32))
        assert (out.dtype, lse.dtype) == (dtype, scores)
        assert reference.zipvl_attn(q_, k_, v_)[0].dtype == dtype
    exact = reference.sparse_attn(*double(q, k, v), *all_tokens(1, 9))
    torch.testing.assert_close(reference.sparse_attn(q, k, v, *all_tokens(1, 9)).double(), exact, rtol=1e-5, atol=1e-5)
