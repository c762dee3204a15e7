"""probe_index: which tokens are probed (Sec. A), and the hash that draws them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl import ops, reference

from .helpers import MASKS, make_mask, strided


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 0, 1), 0x73B4946B),
        ((0, 1, 100), 0x49CBD607),
        ((1, 0, 100), 0x0E8B55E5),
        ((-1, 5, 1000), 0x5B9AD1BF),
        ((2**63 - 1, 63, 2**20), 0x765232B2),
    ],
)
def test_hash_is_pinned(arguments: tuple[int, int, int], expected: int) -> None:
    assert reference.hash32(*arguments) == expected


def test_hash_words_are_mixed_in_order() -> None:
    """The documented chain, written out once more by hand for one value."""

    def fmix32(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    low, high, i, R = 0x89ABCDEF, 0x1234567, 41, 70_001
    h = 0
    for word in (low, high, i, R):
        h = fmix32(((h ^ word) + 0x9E3779B9) % 2**32)
    assert reference.hash32((high << 32) + low, i, R) == h


def test_draw_is_uniform_within_a_stratum() -> None:
    """Pearson's chi-square over seeds: 19 degrees of freedom, and 45 is exceeded with probability 0.0007."""
    R, r, draws = 80, 4, 4000
    counts = torch.zeros(r, R // r)
    for seed in range(draws):
        for i in range(r):
            low = i * R // r
            counts[i, (reference.hash32(seed, i, R) * (R // r)) >> 32] += 1
            assert low + ((reference.hash32(seed, i, R) * (R // r)) >> 32) < low + R // r
    expected = draws / (R // r)
    assert float(((counts - expected) ** 2 / expected).sum(dim=1).max()) < 45


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("num_random", [1, 3, 64, 200])
def test_draws_agree_with_python(seed: int, num_random: int) -> None:
    for N in (5, 64, 65, 129, 1000, 4097, 100_003, 2**20):
        q = torch.empty(1, 1, 1, 64).expand(1, 1, N, 64)
        keywords = {"num_recent": 4, "num_random": num_random, "seed": seed}
        assert torch.equal(ops.probe_index(q, **keywords), reference.probe_index(q, **keywords))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("N", [1, 2, 5, 127, 128, 129, 700])
@pytest.mark.parametrize("numbers", [(64, 64), (0, 16), (16, 0), (1, 1), (130, 5)])
def test_agrees_with_the_reference(N: int, mask: str, numbers: tuple[int, int]) -> None:
    B = 3
    q = torch.empty(B, 2, N, 64)
    keywords = {"num_recent": numbers[0], "num_random": numbers[1], "seed": 11, "token_mask": make_mask(mask, B, N)}
    probes = ops.probe_index(q, **keywords)
    assert probes.dtype == torch.int32 and probes.shape == (B, sum(numbers))
    assert torch.equal(probes, reference.probe_index(q, **keywords))


@given(
    real=st.lists(st.booleans(), max_size=60),
    num_recent=st.integers(0, 20),
    num_random=st.integers(0, 20),
    seed=st.integers(0, 2**63 - 1),
)
def test_properties(real: list[bool], num_recent: int, num_random: int, seed: int) -> None:
    if num_recent + num_random == 0:
        num_random = 1
    q = torch.empty(1, 1, len(real), 64)
    mask = torch.tensor([real], dtype=torch.bool)
    probes = ops.probe_index(q, num_recent=num_recent, num_random=num_random, seed=seed, token_mask=mask)[0].tolist()
    positions = [j for j, is_real in enumerate(real) if is_real]
    chosen = [p for p in probes if p != -1]
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(positions)
    assert probes == chosen + [-1] * (num_recent + num_random - len(chosen)), "-1 fills the end only"
    assert len(chosen) == min(len(positions), num_recent + num_random) or len(positions) < num_recent + num_random
    assert positions[max(len(positions) - num_recent, 0) :] == (chosen[-num_recent:] if num_recent else [])
    earlier = positions[: max(len(positions) - num_recent, 0)]
    drawn = chosen[: len(chosen) - min(num_recent, len(positions))]
    if len(earlier) <= num_random:
        assert drawn == earlier
    else:
        ranks = [earlier.index(p) for p in drawn]
        strata = [(i * len(earlier) // num_random, (i + 1) * len(earlier) // num_random) for i in range(num_random)]
        assert all(low <= rank < high for rank, (low, high) in zip(ranks, strata, strict=True))


def test_padding_does_not_change_the_draw() -> None:
    """Tensor-parallel ranks, and a prompt with or without padding, probe the same real tokens."""
    plain = ops.probe_index(torch.empty(1, 1, 500, 64), num_recent=8, num_random=8, seed=3)
    mask = torch.zeros(1, 620, dtype=torch.bool)
    mask[:, 100:600] = True
    padded = ops.probe_index(torch.empty(1, 7, 620, 128), num_recent=8, num_random=8, seed=3, token_mask=mask)
    assert torch.equal(padded - 100, plain)


def test_row_alone_equals_row_in_a_batch() -> None:
    mask = make_mask("inner", 3, 400)
    assert mask is not None
    q = torch.empty(3, 1, 400, 64)
    together = ops.probe_index(q, token_mask=mask)
    for b in range(3):
        assert torch.equal(ops.probe_index(q[b : b + 1], token_mask=mask[b : b + 1]), together[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 2, 5, 64), (2, 2, 0, 64), (0, 2, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    probes = ops.probe_index(torch.empty(shape), num_recent=3, num_random=2)
    assert probes.shape == (shape[0], 5) and probes.dtype == torch.int32
    assert bool((probes == -1).all())


def test_strided_mask() -> None:
    mask = torch.rand(3, 90) > 0.3
    q = torch.empty(3, 1, 90, 64)
    probes = ops.probe_index(q, num_recent=5, num_random=9, token_mask=strided(mask))
    assert torch.equal(probes, ops.probe_index(q, num_recent=5, num_random=9, token_mask=mask))
