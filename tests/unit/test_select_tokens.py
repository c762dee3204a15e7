"""select_tokens: how many tokens are important, and which.

Scores here are small integers and ``tau`` a binary fraction, so that every sum is exact in float32 in any order and the
op must agree with the reference to the token; real scores are in test_zipvl_attn.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zipvl import ops, reference

from .helpers import MASKS, assert_selection_within_rounding, make_mask, strided


def integers(B: int, N: int, high: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Budget and rank scores in ``0 .. high``: many ties where ``high`` is small."""
    generator = torch.Generator().manual_seed(seed)
    budget, rank = (torch.randint(0, high + 1, (B, N), generator=generator).float() for _ in range(2))
    return budget, rank


def check(budget: Tensor, rank: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    index, count = ops.select_tokens(budget, rank, **keywords)
    expected_index, expected_count = reference.select_tokens(budget, rank, **keywords)
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(count, expected_count)
    assert torch.equal(index, expected_index)
    return index, count


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("high", [1, 5, 1000])
@pytest.mark.parametrize("tau", [2**-20, 0.25, 0.5, 0.875, 1 - 2**-20, 1.0])
def test_tau(tau: float, high: int, mask: str) -> None:
    check(*integers(3, 517, high), tau=tau, token_mask=make_mask(mask, 3, 517))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ratio", [2**-20, 0.1, 0.25, 0.3, 1 / 3, 0.7, 1 - 2**-20, 1.0])
def test_ratio(ratio: float, mask: str) -> None:
    check(*integers(3, 517, 9), ratio=ratio, token_mask=make_mask(mask, 3, 517))


@pytest.mark.parametrize("N", [1, 2, 3, 31, 32, 33, 255, 256, 257, 1000, 1024, 1025, 4999, 5000])
def test_lengths(N: int) -> None:
    budget, rank = integers(2, N, 12)
    check(budget + 1, rank + 1, tau=0.5)
    check(budget + 1, rank + 1, ratio=0.3)


def test_long_row() -> None:
    check(*integers(1, 2**18, 30), tau=0.75)


def test_ratio_is_evaluated_in_float64() -> None:
    """``0.1 * 10`` is 1 and ``0.7 * 10`` is 7 in float64, but above it in float32, where the ceiling is one more."""
    for ratio in (0.1, 0.2, 0.3, 0.6, 0.7, 0.9):
        for N in (10, 20, 30, 70, 100, 1000):
            _, count = check(*integers(1, N, 50), ratio=ratio)
            assert int(count) == math.ceil(ratio * N)


def test_ties_go_to_the_lower_position() -> None:
    ones = torch.ones(1, 100)
    index, _ = check(ones, ones, ratio=0.25)
    assert index[0, :25].tolist() == list(range(25))
    zero_signs = torch.zeros(1, 6)
    zero_signs[0, 1::2] = -0.0
    zero_signs[0, 5] = 1.0
    index, _ = check(torch.ones(1, 6), zero_signs, ratio=0.5)
    assert index[0, :3].tolist() == [0, 1, 5], "-0.0 and 0.0 are one value"


@pytest.mark.parametrize("min_tokens", [0, 1, 40, 100, 10_000, 2**63 - 1])
def test_min_tokens(min_tokens: int) -> None:
    _, count = check(*integers(2, 100, 9), ratio=0.05, min_tokens=min_tokens)
    assert count.tolist() == [min(max(5, min_tokens), 100)] * 2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_keep_mask(share: float, mask: str) -> None:
    B, N = 3, 300
    token_mask = make_mask(mask, B, N)
    keep = torch.rand(B, N) < share
    index, count = check(*integers(B, N, 9), ratio=0.1, keep_mask=keep, token_mask=token_mask)
    for b in range(B):
        kept = keep[b] if token_mask is None else keep[b] & token_mask[b]
        assert set(kept.nonzero()[:, 0].tolist()) <= set(index[b, : int(count[b])].tolist())


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("limit", [{"tau": 0.5}, {"ratio": 0.1}])
def test_bad_scores_cost_speed_never_content(limit: dict[str, float], which: int, bad: float) -> None:
    scores = integers(3, 90, 9)
    mask = make_mask("inner", 3, 90)
    assert mask is not None
    real, padding = mask[1].nonzero()[:, 0], (~mask[2]).nonzero()[:, 0]
    scores[which][1, real[7]] = bad
    scores[which][2, padding[3]] = bad
    _, count = check(*scores, **limit, token_mask=mask)
    assert count[1] == mask[1].sum(), "every real token of the row with the bad score"
    assert count[0] < mask[0].sum() and count[2] < mask[2].sum(), "and of no other row"


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("limit", [{"tau": 0.5}, {"ratio": 0.1}])
def test_scores_that_sum_to_zero_select_every_real_token(limit: dict[str, float], which: int) -> None:
    scores = integers(2, 64, 9)
    mask = make_mask("left", 2, 64)
    assert mask is not None
    scores[which][0, mask[0]] = 0.0
    scores[which][0, ~mask[0]] = 5.0
    _, count = check(*scores, **limit, token_mask=mask)
    assert count[0] == mask[0].sum() and count[1] < mask[1].sum()


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_negative_budget_scores(share: float) -> None:
    """A sum above 0 is a total like any other; a share of a negative one is no bound: every real token is selected."""
    budget, rank = integers(3, 200, 1000)
    budget[torch.rand(3, 200) < share] *= -1
    mask = make_mask("inner", 3, 200)
    assert mask is not None
    sums = torch.where(mask, budget, torch.zeros(())).sum(dim=1)
    _, count = check(budget, rank, tau=0.5, token_mask=mask)
    assert torch.equal(count == mask.sum(dim=1), sums < 0)
    _, count = check(budget, rank, ratio=0.25, token_mask=mask)
    assert bool((count < mask.sum(dim=1)).all()), "a ratio needs no total"


def test_one_row_of_tiny_scores() -> None:
    """Scores of long prompts are small; the smallest normal float is still a score."""
    tiny = torch.finfo(torch.float32).tiny
    budget, rank = integers(1, 80, 9)
    check(budget * tiny, rank * tiny, tau=0.5)


@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    B, N = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))

    def draw(elements: st.SearchStrategy[Any]) -> Tensor:
        return torch.tensor(data.draw(st.lists(elements, min_size=B * N, max_size=B * N))).view(B, N)

    scores = st.integers(0, 6).map(float) | st.sampled_from([0.0, 2.0**20])
    budget, rank = draw(scores).float(), draw(scores).float()
    token_mask = draw(st.booleans()).bool() if data.draw(st.booleans()) else None
    keep_mask = draw(st.booleans()).bool() if data.draw(st.booleans()) else None
    index, count = check(
        budget,
        rank,
        tau=data.draw(st.integers(1, 64)) / 64,
        ratio=data.draw(st.none() | st.integers(1, 64).map(lambda n: n / 64)),
        min_tokens=data.draw(st.integers(0, 50)),
        keep_mask=keep_mask,
        token_mask=token_mask,
    )
    for b in range(B):
        T = index[b, : int(count[b])]
        assert bool((T.diff() > 0).all()) and bool(((0 <= T) & (T < N)).all())
        assert bool((index[b, int(count[b]) :] == N).all())
        assert token_mask is None or bool(token_mask[b, T.long()].all())


@given(seed=st.integers(0, 2**32), step=st.integers(1, 63))
def test_a_larger_tau_selects_a_superset(seed: int, step: int) -> None:
    budget, rank = integers(1, 60, 20, seed)
    smaller, few = ops.select_tokens(budget + 1, rank + 1, tau=step / 64)
    larger, many = ops.select_tokens(budget + 1, rank + 1, tau=(step + 1) / 64)
    assert set(smaller[0, : int(few)].tolist()) <= set(larger[0, : int(many)].tolist())


@pytest.mark.parametrize("N", [100, 5000])
def test_real_scores_flip_only_within_rounding(N: int) -> None:
    """Scores given exactly, so only the float32 sums of the budget may differ from float64's."""
    scores = torch.softmax(4 * torch.randn(2, N), dim=1), torch.softmax(4 * torch.randn(2, N), dim=1)
    for tau in (0.3, 0.9, 0.975, 0.999):
        index, count = ops.select_tokens(*scores, tau=tau)
        exact = scores[0].double(), scores[1].double()
        rounding = torch.finfo(torch.float32).eps * float(exact[0].max())
        assert_selection_within_rounding(index, count, exact, (rounding, 0.0), tau=tau)


@pytest.mark.usefixtures("all_threads")
def test_same_bits_every_time_and_for_a_row_alone() -> None:
    budget, rank = torch.rand(4, 3000), torch.rand(4, 3000)
    index, count = ops.select_tokens(budget, rank, tau=0.8)
    for _ in range(3):
        again = ops.select_tokens(budget, rank, tau=0.8)
        assert torch.equal(again[0], index) and torch.equal(again[1], count)
    for b in range(4):
        alone = ops.select_tokens(budget[b : b + 1], rank[b : b + 1], tau=0.8)
        assert torch.equal(alone[0], index[b : b + 1]) and torch.equal(alone[1], count[b : b + 1])


def test_strided_inputs() -> None:
    budget, rank = integers(3, 120, 9)
    keep, mask = torch.rand(3, 120) < 0.1, torch.rand(3, 120) < 0.8

    index, count = check(strided(budget), strided(rank), ratio=0.4, keep_mask=strided(keep), token_mask=strided(mask))
    plain = ops.select_tokens(budget, rank, ratio=0.4, keep_mask=keep, token_mask=mask)
    assert torch.equal(index, plain[0]) and torch.equal(count, plain[1])


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty(B: int, N: int) -> None:
    index, count = check(torch.rand(B, N), torch.rand(B, N))
    assert index.shape == (B, N) and count.tolist() == [0] * B
