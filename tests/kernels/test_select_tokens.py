"""select_tokens on CUDA: to the token what the CPU selects, by every team of blocks the plan knows.

Scores are multiples of a power of two whose sums are exact in float64 in any order, except where a test says otherwise,
so that the two must agree everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import cuda, no_host_sync, poison_free_memory
from tests.unit.helpers import MASKS, assert_selection_within_rounding, make_mask, strided
from zipvl import ops

# Where the plan changes from one block to a cluster to a grid, where blocks fill up, and the longest prompt.
EDGES = (2049, 4095, 4096, 4097, 8192, 8193, 16384, 16385, 32768, 65536, 65537, 131072, 131073, 524289, 2**20)


@pytest.fixture(params=["device's own", "sm80"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ZIPVL_FORCE_SM80", "1" if request.param == "sm80" else "0")
    return str(request.param)


def integers(B: int, N: int, high: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Budget and rank scores in ``1 .. high``: many ties where ``high`` is small."""
    generator = torch.Generator().manual_seed(seed)
    budget, rank = (torch.randint(1, high + 1, (B, N), generator=generator).float() for _ in range(2))
    return budget, rank


def check(budget: Tensor, rank: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Selects on both devices, compares, and returns the CPU's."""
    expected = ops.select_tokens(budget, rank, **keywords)
    masks = {name: value.cuda() for name, value in keywords.items() if isinstance(value, Tensor)}
    scores = cuda(budget, rank)
    poison_free_memory()
    with no_host_sync():
        actual = ops.select_tokens(*scores, **{**keywords, **masks})
    assert actual[0].dtype == actual[1].dtype == torch.int32 and actual[0].is_contiguous()
    assert torch.equal(actual[1].cpu(), expected[1]), f"count {actual[1].tolist()}, expected {expected[1].tolist()}"
    assert torch.equal(actual[0].cpu(), expected[0])
    return expected


@pytest.mark.parametrize("first", range(1, 300, 50))
def test_every_short_length(first: int) -> None:
    for N in range(first, first + 51):
        scores = integers(2, N, 12, seed=N)
        check(*scores, tau=0.5)
        check(*scores, ratio=0.3, token_mask=make_mask("inner", 2, N))


@pytest.mark.parametrize("N", EDGES)
def test_lengths(N: int, family: str) -> None:
    B = 3 if N < 2**17 else 1
    scores = integers(B, N, 40, seed=N)
    keep, mask = torch.rand(B, N) < 0.01, torch.rand(B, N) < 0.8
    check(*scores, tau=0.875)
    check(*scores, tau=0.5, keep_mask=keep, token_mask=mask)
    check(*scores, ratio=0.25, min_tokens=N // 3, token_mask=mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("N", [517, 6000])
def test_masks_and_limits(N: int, mask: str, family: str) -> None:
    scores, token_mask = integers(3, N, 9), make_mask(mask, 3, N)
    for tau in (2**-20, 0.25, 0.875, 1 - 2**-20, 1.0):
        check(*scores, tau=tau, token_mask=token_mask)
    for ratio in (2**-20, 0.1, 1 / 3, 0.7, 1 - 2**-20, 1.0):
        check(*scores, ratio=ratio, token_mask=token_mask)
    for min_tokens in (0, 1, 400, N, 2**63 - 1):
        check(*scores, ratio=0.05, min_tokens=min_tokens, token_mask=token_mask)
    for share in (0.0, 0.02, 0.3, 1.0):
        check(*scores, ratio=0.1, token_mask=token_mask, keep_mask=torch.rand(3, N) < share)


@pytest.mark.parametrize("N", [1, 33, 4096, 4097, 50_000, 150_000])
def test_ties_over_all_tokens(N: int, family: str) -> None:
    for value in (1.0, 2.0**-140, 3.0e38):  # also denormal, and with a sum beyond float32
        ones = torch.full((1, N), value)
        index, count = check(ones, ones, ratio=0.25)
        assert torch.equal(index[0, : int(count)], torch.arange(int(count), dtype=torch.int32))
    ones = torch.ones(1, N)
    _, count = check(ones, ones, tau=0.75)
    assert int(count) == math.ceil(0.75 * N)


@pytest.mark.parametrize("N", [2, 100, 4096, 9000, 140_000])
def test_one_token_holds_all_the_mass(N: int, family: str) -> None:
    for place in (0, N // 2, N - 1):
        score = torch.zeros(1, N)
        score[0, place] = 0.3
        index, count = check(score, score, tau=0.975)
        assert int(count) == 1 and int(index[0, 0]) == place


def test_two_values_with_the_cut_in_either() -> None:
    for N in (1000, 20_000):
        score = torch.ones(1, N)
        score[0, ::7] = 2.0**20
        for tau in (0.5, 1 - 2**-18, 1 - 2**-24):
            check(score, score, tau=tau)


def test_zero_signs_and_negative_ranks() -> None:
    budget, rank = integers(2, 5000, 9)
    rank = rank - 5.25
    rank[:, ::3], rank[:, 1::6] = 0.0, -0.0
    for ratio in (0.1, 0.45, 0.55, 0.99):
        check(budget, rank, ratio=ratio)


def test_ratio_is_evaluated_in_float64() -> None:
    for ratio in (0.1, 0.2, 0.3, 0.6, 0.7, 0.9):
        for N in (10, 20, 30, 70, 100, 1000):
            _, count = check(*integers(1, N, 50), ratio=ratio)
            assert int(count) == math.ceil(ratio * N)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("N", [90, 6000])
def test_bad_scores_cost_speed_never_content(N: int, bad: float, family: str) -> None:
    mask = make_mask("inner", 3, N)
    assert mask is not None
    real, padding = mask[1].nonzero()[:, 0], (~mask[2]).nonzero()[:, 0]
    for which in (0, 1):
        scores = integers(3, N, 9)
        scores[which][1, real[7]] = bad
        scores[which][2, padding[3]] = bad
        limits: tuple[dict[str, Any], ...] = ({"tau": 0.5}, {"ratio": 0.1})
        for limit in limits:
            _, count = check(*scores, **limit, token_mask=mask)
            assert count[1] == mask[1].sum() and count[0] < mask[0].sum() and count[2] < mask[2].sum()


@pytest.mark.parametrize("N", [64, 6000])
def test_scores_that_sum_to_zero_select_every_real_token(N: int, family: str) -> None:
    mask = make_mask("left", 2, N)
    assert mask is not None
    for which in (0, 1):
        scores = integers(2, N, 9)
        scores[which][0, mask[0]] = 0.0
        scores[which][0, ~mask[0]] = 5.0
        limits: tuple[dict[str, Any], ...] = ({"tau": 0.5}, {"ratio": 0.1})
        for limit in limits:
            check(*scores, **limit, token_mask=mask)


@pytest.mark.parametrize("N", [64, 6000, 70_000])
@pytest.mark.parametrize("share", [0.1, 0.45, 0.9])
def test_negative_budget_scores(N: int, share: float, family: str) -> None:
    budget, rank = integers(3, N, 1000)
    budget[torch.rand(3, N) < share] *= -1
    mask = make_mask("inner", 3, N)
    check(budget, rank, tau=0.5, token_mask=mask)
    check(budget, rank, tau=0.999)
    check(budget, rank, ratio=0.25, token_mask=mask)


def test_magnitudes() -> None:
    """Sums are exact over the whole range of float32 as long as the scores are multiples of one power of two."""
    budget, rank = integers(2, 3000, 1000)
    for scale in (2.0**-149, 2.0**-126, 2.0**-60, 2.0**60, 2.0**100):
        check(budget * scale, rank * scale, tau=0.8125)


@pytest.mark.parametrize("N", [3000, 12_000, 60_000, 300_000])
def test_candidates_of_every_number(N: int, family: str) -> None:
    """Scores that lie so close that a descent goes one, two or all levels down, over lists and over all tokens."""
    for bits in (23, 20, 14, 9, 3):
        steps = [torch.randint(0, 2**bits, (1, N)).float() * 2.0**-23 for _ in range(2)]
        scores = 1 + steps[0], 1 + steps[1]
        check(*scores, tau=0.625)
        check(scores[0], scores[1] - 1.5, ratio=0.3)  # ranks of either sign


@pytest.mark.parametrize("N", [100, 4096, 40_000, 300_000])
def test_real_scores_flip_only_within_rounding(N: int, family: str) -> None:
    scores = torch.softmax(4 * torch.randn(2, N), dim=1), torch.softmax(4 * torch.randn(2, N), dim=1)
    exact = scores[0].double(), scores[1].double()
    # The kernel rounds the sum of each of its bins, to less than 2**-61 * N of the largest score.
    rounding = 2040 * 2.0**-61 * N * float(exact[0].max())
    for tau in (0.3, 0.9, 0.975, 0.999):
        index, count = (t.cpu() for t in ops.select_tokens(*cuda(*scores), tau=tau))
        assert_selection_within_rounding(index, count, exact, (rounding + 2.0**-50 / N, 0.0), tau=tau)


@pytest.mark.parametrize("N", [3000, 9000, 140_000])
def test_same_bits_on_repeats_and_in_any_batch(N: int, family: str) -> None:
    budget, rank = torch.rand(5, N, device="cuda"), torch.rand(5, N, device="cuda")
    index, count = ops.select_tokens(budget, rank, tau=0.8)
    for _ in range(100):
        again = ops.select_tokens(budget, rank, tau=0.8)
        assert torch.equal(again[0], index) and torch.equal(again[1], count)
    for rows in ([3], [4, 0], [2, 2, 1]):
        some = ops.select_tokens(budget[rows], rank[rows], tau=0.8)
        assert torch.equal(some[0], index[rows]) and torch.equal(some[1], count[rows])


@pytest.mark.parametrize("N", [700, 9000, 140_000])
def test_more_rows_than_fit_the_device(N: int, family: str) -> None:
    B = 200 if N < 1000 else 40
    scores = [t.cuda() for t in integers(B, N, 30)]
    index, count = ops.select_tokens(*scores, tau=0.75)
    for b in (0, 1, B // 2, B - 1):
        alone = ops.select_tokens(scores[0][b : b + 1], scores[1][b : b + 1], tau=0.75)
        assert torch.equal(alone[0][0], index[b]) and torch.equal(alone[1][0], count[b])


@pytest.mark.parametrize("N", [700, 9000, 140_000])
def test_graph_replay_follows_its_inputs(N: int, family: str) -> None:
    budget, rank = (t.cuda() for t in integers(2, N, 30))
    ops.select_tokens(budget, rank, tau=0.75)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.select_tokens(budget, rank, tau=0.75)
    for seed in (1, 2):
        fresh = integers(2, N, 30, seed=seed)
        budget.copy_(fresh[0])
        rank.copy_(fresh[1])
        graph.replay()
        expected = ops.select_tokens(*fresh, tau=0.75)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(captured, expected, strict=True))


@pytest.mark.parametrize("N", [700, 9000, 140_000])
def test_side_streams_do_not_meet(N: int, family: str) -> None:
    scores = [tuple(t.cuda() for t in integers(1, N, 30, seed=s)) for s in range(4)]
    expected = [ops.select_tokens(*pair, tau=0.75) for pair in scores]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in scores], []
    for _ in range(5):
        for stream, pair in zip(streams, scores, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.select_tokens(*pair, tau=0.75))
    torch.cuda.synchronize()
    for i, (index, count) in enumerate(results):
        assert torch.equal(index, expected[i % 4][0]) and torch.equal(count, expected[i % 4][1])


@pytest.mark.parametrize("N", [120, 9000])
def test_strided_inputs(N: int, family: str) -> None:
    budget, rank = integers(3, N, 9)
    keep, mask = torch.rand(3, N) < 0.1, torch.rand(3, N) < 0.8
    expected = ops.select_tokens(budget, rank, ratio=0.4, keep_mask=keep, token_mask=mask)
    wide = [torch.full((3, 3 * N), 99.0).cuda() for _ in range(2)]
    for target, source in zip(wide, (budget, rank), strict=True):
        target[:, 1::3] = source.cuda()
    views = [target[:, 1::3] for target in wide]
    keep_view, mask_view = (torch.ones(N, 4, dtype=torch.bool).cuda()[:, :3].T for _ in range(2))
    keep_view.copy_(keep)
    mask_view.copy_(mask)
    for arguments in ((*views, keep_view, mask_view), cuda(*map(strided, (budget, rank, keep, mask)))):
        actual = ops.select_tokens(*arguments[:2], ratio=0.4, keep_mask=arguments[2], token_mask=arguments[3])
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty(B: int, N: int) -> None:
    index, count = ops.select_tokens(torch.rand(B, N).cuda(), torch.rand(B, N).cuda())
    assert index.shape == (B, N) and count.tolist() == [0] * B and index.is_cuda and count.is_cuda


def test_bad_arguments_are_named_before_anything_runs() -> None:
    scores = torch.rand(2, 40).cuda()
    with pytest.raises(RuntimeError, match=r"select_tokens: tau must be in \(0, 1\], got 1.5"):
        ops.select_tokens(scores, scores, tau=1.5)
    with pytest.raises(RuntimeError, match=r"select_tokens: keep_mask must have shape \[2, 40\], got \[2, 39\]"):
        ops.select_tokens(scores, scores, keep_mask=torch.ones(2, 39, dtype=torch.bool).cuda())
