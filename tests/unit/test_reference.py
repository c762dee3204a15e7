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
def test_defaults_are_those_of_the_spec(op: str) -> None:
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
