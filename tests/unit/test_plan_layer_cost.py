"""The cost model: what was measured, and the decisions that follow from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_plan = pytest.importorskip("zipvl._plan")

ROOT = Path(__file__).resolve().parents[2]
LONGVA = {"query_heads": 28, "head_dim": 128}


def within_bound(tokens: int, **changes: int) -> bool:
    """Whether the largest selection of tau 0.975 costs no more than the bound allows."""
    cost = _plan.layer_cost(**LONGVA | changes, tokens=tokens, share=0.975, by_tau=True)
    return bool(cost.zipvl_us <= _plan.MOST_FACTOR * cost.dense_us + _plan.MOST_EXTRA_US)


def test_constants_are_those_of_the_recorded_measurements() -> None:
    """``python -m benchmarks.layer_cost`` prints what stands in csrc/plan/layer_cost.cpp, and it fits."""
    layer_cost = pytest.importorskip("benchmarks.layer_cost")
    source = (ROOT / "csrc" / "plan" / "layer_cost.cpp").read_text()
    for kind, (constants, error) in layer_cost.constants().items():
        for term, value in zip(layer_cost.TERMS[kind], constants, strict=True):
            written = re.search(rf"\bk{kind}{term} = ([\d.e+-]+)[,;]", source)
            assert written is not None and float(written.group(1)) == pytest.approx(value, rel=1e-3, abs=1e-9)
        assert error < 0.2


def test_costs_grow_with_the_work() -> None:
    cost = _plan.layer_cost(**LONGVA, tokens=8192, share=0.5)
    for more in ({"tokens": 8200}, {"query_heads": 32}, {"head_dim": 256}, {"batch": 2}):
        other = _plan.layer_cost(**LONGVA | {"tokens": 8192, "share": 0.5} | more)
        assert other.dense_us > cost.dense_us and other.zipvl_us > cost.zipvl_us
    assert _plan.layer_cost(**LONGVA, tokens=8192, share=0.6).zipvl_us > cost.zipvl_us
    assert _plan.layer_cost(**LONGVA, tokens=8192, share=0.5, all_queries=True).zipvl_us > cost.zipvl_us
    assert _plan.layer_cost(**LONGVA, tokens=8192, share=0.6).dense_us == cost.dense_us


@pytest.mark.parametrize("heads", [7, 14, 28, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_from_dense_below_on_it_is_never_slower(heads: int, head_dim: int) -> None:
    shape = {"query_heads": heads, "head_dim": head_dim}
    first = _plan.dense_below(**shape)
    assert 64 <= first < 32768
    assert all(within_bound(tokens, **shape) for tokens in range(first, 131073, 1024))
    assert not within_bound(first - 64, **shape)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_a_known_ratio_pays_from_where_it_is_faster(ratio: float) -> None:
    first = _plan.dense_below(**LONGVA, ratio=ratio)

    def faster(tokens: int) -> bool:
        cost = _plan.layer_cost(**LONGVA, tokens=tokens, share=ratio)
        return bool(cost.zipvl_us <= cost.dense_us)

    assert all(faster(tokens) for tokens in range(first, 131073, 1024)) and not faster(first - 64)
    assert first <= _plan.dense_below(**LONGVA, ratio=ratio + 0.1)
    assert first < _plan.dense_below(**LONGVA), "less is known with tau"
    assert _plan.dense_below(**LONGVA, tau=0.5) < _plan.dense_below(**LONGVA) < _plan.dense_below(**LONGVA, tau=1.0)
    assert first <= _plan.dense_below(**LONGVA, ratio=ratio, all_queries=True)


def test_more_heads_pay_earlier() -> None:
    lengths = [_plan.dense_below(query_heads=heads, head_dim=128) for heads in (4, 8, 16, 32, 64)]
    assert lengths == sorted(lengths, reverse=True)


def test_printed() -> None:
    assert str(_plan.layer_cost(**LONGVA, tokens=4096, share=0.25)).startswith("dense ")


@pytest.mark.parametrize("bad", [{"share": -0.1}, {"share": 1.1}, {"share": float("nan")}, {"head_dim": 0}], ids=str)
def test_bad_costs_are_errors(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]|sizes must"):
        _plan.layer_cost(**LONGVA | {"tokens": 64} | bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.5, float("nan")])
def test_bad_ratios_are_errors(bad: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\], got"):
        _plan.dense_below(**LONGVA, ratio=bad)
