"""probe_scores: accumulated and normalised attention of the probes (Eq. A)."""

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
    double,
    make_mask,
    make_qkv,
    peak_growth,
    poison,
    score_floor,
    strided,
)


def check(q: Tensor, k: Tensor, probes: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Both scores against the float64 reference; the baseline is the reference in float32."""
    scores: tuple[Tensor, Tensor] = ops.probe_scores(q, k, probes, **keywords)
    exact = reference.probe_scores(*double(q, k), probes, **keywords)
    baseline = reference.probe_scores(q, k, probes, **keywords)
    for actual, exact_one, baseline_one in zip(scores, exact, baseline, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == (q.shape[0], q.shape[2])
        assert_accurate(actual, exact_one, baseline_one, score_floor(q, k, exact_one, keywords.get("scale")))
    return scores


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_head_dims(dtype: torch.dtype, group: int, D: int) -> None:
    q, k, _ = make_qkv(2, 2 * group, 2, 133, D, dtype)
    accumulated, _ = check(q, k, reference.probe_index(q, num_recent=20, num_random=13))
    torch.testing.assert_close(accumulated.sum(dim=1), torch.full((2,), 33.0), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("N", [1, 2, 15, 63, 64, 65, 127, 128, 129, 1000, 2049, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths(dtype: torch.dtype, N: int) -> None:
    q, k, _ = make_qkv(1, 6, 2, N, 64, dtype)
    check(q, k, reference.probe_index(q))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_and_layouts(layout: str, mask: str, causal: bool) -> None:
    q, k, _ = make_qkv(3, 6, 2, 150, 80, layout=layout)
    token_mask = make_mask(mask, 3, 150)
    probes = reference.probe_index(q, num_recent=30, num_random=30, token_mask=token_mask)
    accumulated, normalized = check(q, k, probes, causal=causal, token_mask=token_mask)
    if token_mask is not None:
        assert bool((accumulated[~token_mask] == 0).all()) and bool((normalized[~token_mask] == 0).all())


def test_scale() -> None:
    q, k, _ = make_qkv(1, 4, 2, 90, 64)
    probes = reference.probe_index(q, num_recent=8, num_random=8)
    default = check(q, k, probes)
    explicit = check(q, k, probes, scale=0.125)
    assert torch.equal(default[0], explicit[0]) and torch.equal(default[1], explicit[1])
    uniform, _ = check(q, k, probes[:, -1:].clone(), scale=0.0)
    torch.testing.assert_close(uniform, torch.full((1, 90), 1 / 90))


def test_large_logits_do_not_overflow() -> None:
    q, k, _ = make_qkv(1, 2, 1, 70, 64)
    accumulated, _ = check(100 * q, 100 * k, reference.probe_index(q, num_recent=8, num_random=8))
    assert bool(accumulated.isfinite().all())


@pytest.mark.parametrize("garbage", [-1, -7, 70, 71, 2**31 - 1, -(2**31)])
def test_entries_that_are_no_position_are_no_probes(garbage: int) -> None:
    q, k, _ = make_qkv(2, 4, 2, 70, 64, layout="sliced")
    clean = torch.tensor([[3, 20, 69], [0, 1, 44]], dtype=torch.int32)
    hole = torch.full((2, 1), garbage, dtype=torch.int32)
    dirty = torch.cat([hole, clean[:, :2], hole, clean[:, 2:], hole], dim=1)
    exact = reference.probe_scores(*double(q, k), clean)
    baseline = reference.probe_scores(q, k, clean)
    for actual, exact_one, baseline_one in zip(ops.probe_scores(q, k, dirty), exact, baseline, strict=True):
        assert_accurate(actual, exact_one, baseline_one, score_floor(q, k, exact_one))


def test_strided_probes_and_mask() -> None:
    q, k, _ = make_qkv(3, 4, 2, 70, 64)
    mask = make_mask("inner", 3, 70)
    assert mask is not None
    probes = reference.probe_index(q, num_recent=7, num_random=6, token_mask=mask)
    plain = ops.probe_scores(q, k, probes, token_mask=mask)
    assert all(map(torch.equal, ops.probe_scores(q, k, strided(probes), token_mask=strided(mask)), plain))


def test_no_probe_at_all_scores_zero() -> None:
    q, k, _ = make_qkv(2, 4, 2, 33, 64)
    for score in ops.probe_scores(q, k, torch.full((2, 5), -1, dtype=torch.int32)):
        assert torch.equal(score, torch.zeros(2, 33))


def test_nan_in_padding_is_not_read() -> None:
    mask = make_mask("inner", 2, 100)
    assert mask is not None
    q, k, _ = make_qkv(2, 4, 2, 100, 64)
    probes = reference.probe_index(q, num_recent=9, num_random=9, token_mask=mask)
    clean = ops.probe_scores(q, k, probes, token_mask=mask)
    poisoned = ops.probe_scores(poison(q, ~mask), poison(k, ~mask), probes, token_mask=mask)
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1], poisoned[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_keys_give_scores_that_are_not_finite(bad: float) -> None:
    """So that selection sees them and takes every token; rows of the batch without them are untouched."""
    q, k, _ = make_qkv(2, 4, 2, 60, 64)
    probes = reference.probe_index(q, num_recent=9, num_random=9)
    clean = ops.probe_scores(q, k, probes)
    k[0, 1, 5] = bad
    broken = ops.probe_scores(q, k, probes)
    for clean_one, broken_one in zip(clean, broken, strict=True):
        assert not bool(broken_one[0].isfinite().all())
        assert torch.equal(broken_one[1], clean_one[1])


@pytest.mark.usefixtures("all_threads")
def test_same_bits_every_time_and_for_a_row_alone() -> None:
    q, k, _ = make_qkv(3, 14, 2, 777, 128, torch.bfloat16)
    mask = make_mask("left", 3, 777)
    assert mask is not None
    probes = reference.probe_index(q, token_mask=mask)
    together = ops.probe_scores(q, k, probes, token_mask=mask)
    for _ in range(3):
        again = ops.probe_scores(q, k, probes, token_mask=mask)
        assert torch.equal(together[0], again[0]) and torch.equal(together[1], again[1])
    for b in range(3):
        row = slice(b, b + 1)
        alone = ops.probe_scores(q[row], k[row], probes[row], token_mask=mask[row])
        assert torch.equal(alone[0], together[0][row]) and torch.equal(alone[1], together[1][row])


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0), (0, 0)])
def test_empty(B: int, N: int) -> None:
    q, k, _ = make_qkv(B, 4, 2, N, 64)
    for score in ops.probe_scores(q, k, torch.zeros(B, 3, dtype=torch.int32)):
        assert torch.equal(score, torch.zeros(B, N)) and score.dtype == torch.float32


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_tokens() -> None:
    """The peak grows by less than a ``[P, N]`` tensor of bytes, the smallest there is; the reference's by more."""
    P, N = 2048, 2**14  # at twice the tokens glibc keeps 45 to 74 MB of freed blocks, by chance, where 67 are allowed
    program = """
        import torch
        from zipvl import ops, reference

        P, N = {P}, {N}
        q, k = torch.randn(1, 1, 1, 64).expand(1, 1, N, 64), torch.randn(1, 1, N, 64)
        probes = ops.probe_index(q, num_recent=P // 2, num_random=P // 2)

        def run(small):
            n = 512 if small else N
            {module}.probe_scores(q[:, :, :n], k[:, :, :n], probes)
    """
    assert peak_growth(program.format(P=P, N=N, module="ops")) < P * N
    assert peak_growth(program.format(P=P, N=N // 4, module="reference")) > P * N // 4
