"""From which length on a layer is sparse: what the configuration says, or where it pays on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zipvl import ZipVLConfig, ops, policy

LONGVA = {"query_heads": 28, "head_dim": 128}


class States:
    """The dtype and device of tensors on a GPU that need not be there."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype, self.device = dtype, torch.device("cuda")


def below(states: Any, heads: int = 28, **config: Any) -> int:
    return policy.dense_below(ZipVLConfig.paper(**config), heads, 128, states)


@pytest.mark.parametrize("given", [0, 1, 100, 5000])
def test_a_number_is_meant(given: int) -> None:
    assert below(States(), dense_below=given) == given == below(torch.empty(1), dense_below=given)


def test_on_a_cpu_nothing_was_measured() -> None:
    assert below(torch.empty(1)) == policy.SHORTEST == 256


def test_on_a_gpu_the_cost_model_decides() -> None:
    assert below(States()) == policy.pays_from(**LONGVA)
    assert below(States(), tau=0.6) == policy.pays_from(**LONGVA, tau=0.6)
    assert below(States(), ratio=0.25) == policy.pays_from(**LONGVA, ratio=0.25)
    assert below(States(), ratio=0.25, all_queries=True) == policy.pays_from(**LONGVA, ratio=0.25, all_queries=True)
    assert below(States(), heads=4096, ratio=0.01) == 256, "never below what the probes need"
    assert below(States(dtype=torch.float32)) == 256, "no kernel takes float32"


def test_a_key_made_beforehand_says_the_same() -> None:
    for settings in (ZipVLConfig.paper(), ZipVLConfig.paper(ratio=0.25), ZipVLConfig.paper(tau=0.6, all_queries=True)):
        key = policy.cost_key(settings)
        assert policy.dense_below(settings, 28, 128, States(), key) == policy.dense_below(settings, 28, 128, States())  # type: ignore[arg-type]


def test_numbers_of_any_kind() -> None:
    half = torch.tensor(0.5).numpy()[()]
    assert below(States(), ratio=half, tau=half) == below(States(), ratio=0.5, tau=0.5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("config", [{"ratio": 0.25}, {"tau": 0.6}], ids=str)
def test_the_compiler_takes_it_for_a_constant(config: dict[str, float], dynamic: bool) -> None:
    states, settings = States(), ZipVLConfig.paper(**config)
    key = policy.cost_key(settings)

    def added(x: torch.Tensor) -> torch.Tensor:
        return x + policy.dense_below(settings, 28, 128, states, key)  # type: ignore[arg-type]

    compiled = torch.compile(added, fullgraph=True, dynamic=dynamic, backend="eager")
    assert int(compiled(torch.zeros(()))) == below(states, **config)


@pytest.mark.parametrize("bad", ["automatic", "256", -1, 2.5, True, None])
def test_bad_values_are_errors(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"ZipVLConfig: dense_below must be .*integer of at least 0, got"):
        ZipVLConfig(dense_below=bad)


@pytest.mark.parametrize("ratio", [1e-6, 0.07, 0.25, 0.3, 0.48, 1 / 3, 0.999, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_no_selection_is_larger_than_known_before(ratio: float, masked: bool) -> None:
    for tokens in (1, 10, 99, 100, 1024, 4099):
        for fewest in ({}, {"min_tokens": 30}, {"keep_recent": 17}):
            config = ZipVLConfig.paper(ratio=ratio, **fewest)
            most = policy.max_kept(config, tokens, 40, masked)
            assert most is not None and most <= tokens
            assert most <= math.ceil(ratio * tokens) + 1 + max(30, 40 * masked)
            scores = torch.rand(2, tokens) + 0.1
            mask = (torch.arange(tokens) >= torch.tensor([[tokens - 39], [0]])).contiguous() if masked else None
            recent = torch.arange(tokens) >= tokens - config.keep_recent
            keep = recent.expand(2, tokens) if mask is None else mask & (recent | torch.tensor([[True], [False]]))
            _, count = ops.select_tokens(
                scores, scores, ratio=ratio, min_tokens=config.min_tokens, keep_mask=keep, token_mask=mask
            )
            assert int(count.max()) <= most


def test_what_the_device_decides_is_not_known_before() -> None:
    assert policy.max_kept(ZipVLConfig.paper(tau=0.5), 1000, 256, False) is None
    assert policy.max_kept(ZipVLConfig.paper(ratio=0.5), 1000, 256, False, added=True) is None


def test_a_ceiling_is_known_before_and_what_comes_on_top() -> None:
    config = ZipVLConfig.paper(tau=0.9, max_ratio=0.25, local_window=64, num_sinks=4)
    assert policy.max_kept(config, 1000, 256, False) == 250 + 1 + 64 + 4
    assert policy.max_kept(config.replace(ratio=0.1), 1000, 256, False) in (169, 170)
    assert policy.max_kept(config, 100, 256, False) == 94


# ---------------------------------------------------------------------------------------------------------------------
# The cost model
# ---------------------------------------------------------------------------------------------------------------------


def within_bound(tokens: int, **shape: int) -> bool:
    """Whether the largest selection of tau 0.975 costs no more than the bound allows."""
    cost = policy.layer_cost(**shape, tokens=tokens, share=0.975, by_tau=True)
    return cost.zipvl_us <= policy.MAX_FACTOR * cost.dense_us + policy.MAX_EXTRA_US


def test_constants_are_those_of_the_recorded_measurements() -> None:
    """``python -m benchmarks.layer_cost`` prints what stands in zipvl/policy.py, and it fits."""
    layer_cost = pytest.importorskip("benchmarks.layer_cost")
    for name, (constants, error) in layer_cost.constants().items():
        assert getattr(policy, name) == pytest.approx(constants, rel=1e-3, abs=1e-9)
        assert error < 0.2


def test_costs_by_hand() -> None:
    cost = policy.layer_cost(query_heads=10, head_dim=100, tokens=1000, batch=2, share=0.5, by_tau=True)
    numbers, pairs = 2e-3, 2.0
    assert cost.dense_us == pytest.approx(5.47 + 2536 * numbers + 3.398 * pairs)
    assert cost.zipvl_us == pytest.approx(4.906 + 24.47 + 1739 * numbers + 3.377 * pairs / 4)


def test_costs_of_a_window_and_a_chunk_by_hand() -> None:
    shape = {"query_heads": 10, "head_dim": 100, "tokens": 1000, "share": 0.5}
    numbers = 1e-3
    zipvl = 40 + 24.47 + 1739 * numbers + 3.377 * (numbers * 1000 / 4 + 2.0 * numbers * (200 + 200))
    assert policy.layer_cost(**shape, window=200).zipvl_us == pytest.approx(zipvl)
    assert policy.layer_cost(**shape, window=200).dense_us == policy.layer_cost(**shape).dense_us
    cost, pairs = policy.layer_cost(**shape, queries=400), 0.4e-3 * (400 + 2 * 600)
    assert cost.dense_us == pytest.approx(5.47 + 2536 * 0.4e-3 + 3.398 * pairs)
    assert cost.zipvl_us == pytest.approx(24.47 + 1739 * numbers + 3.377 * pairs / 4)
    assert policy.layer_cost(**shape, queries=1000) == policy.layer_cost(**shape)


def test_a_window_and_a_short_chunk_pay_later() -> None:
    whole = policy.pays_from(**LONGVA, ratio=0.25)
    assert (
        whole < policy.pays_from(**LONGVA, ratio=0.25, window=128) < policy.pays_from(**LONGVA, ratio=0.25, window=512)
    )
    assert policy.pays_from(**LONGVA, ratio=0.25, queries=512) > whole
    assert below(States(), ratio=0.25, local_window=128) == policy.pays_from(**LONGVA, ratio=0.25, window=128)
    chunk = policy.dense_below(ZipVLConfig.paper(ratio=0.25), 28, 128, States(), queries=512)  # type: ignore[arg-type]
    assert chunk == policy.pays_from(**LONGVA, ratio=0.25, queries=512)


def test_costs_grow_with_the_work() -> None:
    cost = policy.layer_cost(**LONGVA, tokens=8192, share=0.5)
    for more in ({"tokens": 8200}, {"query_heads": 32}, {"head_dim": 256}, {"batch": 2}):
        other = policy.layer_cost(**LONGVA | {"tokens": 8192, "share": 0.5} | more)  # type: ignore[arg-type]
        assert other.dense_us > cost.dense_us and other.zipvl_us > cost.zipvl_us
    assert policy.layer_cost(**LONGVA, tokens=8192, share=0.6).zipvl_us > cost.zipvl_us
    assert policy.layer_cost(**LONGVA, tokens=8192, share=0.5, all_queries=True).zipvl_us > cost.zipvl_us
    assert policy.layer_cost(**LONGVA, tokens=8192, share=0.6).dense_us == cost.dense_us


@pytest.mark.parametrize("heads", [7, 14, 28, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_from_there_on_it_is_never_slower(heads: int, head_dim: int) -> None:
    shape = {"query_heads": heads, "head_dim": head_dim}
    first = policy.pays_from(**shape)
    assert 64 <= first < 32768
    assert all(within_bound(tokens, **shape) for tokens in range(first, 131073, 1024))
    assert not within_bound(first - 64, **shape)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_a_known_ratio_pays_from_where_it_is_faster(ratio: float) -> None:
    first = policy.pays_from(**LONGVA, ratio=ratio)

    def faster(tokens: int) -> bool:
        cost = policy.layer_cost(**LONGVA, tokens=tokens, share=ratio)
        return cost.zipvl_us <= cost.dense_us

    assert all(faster(tokens) for tokens in range(first, 131073, 1024)) and not faster(first - 64)
    assert first <= policy.pays_from(**LONGVA, ratio=ratio + 0.1)
    assert policy.pays_from(**LONGVA, tau=0.975) < policy.pays_from(**LONGVA, ratio=0.975), "the largest may cost more"
    assert policy.pays_from(**LONGVA, tau=0.5) < policy.pays_from(**LONGVA) < policy.pays_from(**LONGVA, tau=1.0)
    assert first <= policy.pays_from(**LONGVA, ratio=ratio, all_queries=True)


def test_more_heads_pay_earlier() -> None:
    lengths = [policy.pays_from(query_heads=heads, head_dim=128) for heads in (4, 8, 16, 32, 64)]
    assert lengths == sorted(lengths, reverse=True)


def test_where_a_layer_is_too_small_it_never_pays() -> None:
    assert policy.pays_from(query_heads=1, head_dim=1, ratio=0.9) == policy.NEVER_PAYS


@pytest.mark.parametrize("bad", [{"share": -0.1}, {"share": 1.1}, {"share": math.nan}, {"head_dim": 0}], ids=str)
def test_bad_costs_are_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]|sizes must"):
        policy.layer_cost(**LONGVA | {"tokens": 64} | bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.5, math.nan])
@pytest.mark.parametrize("name", ["ratio", "tau"])
def test_bad_shares_of_the_model_are_errors(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"pays_from: {name} must be in \(0, 1\], got"):
        policy.pays_from(**LONGVA, **{name: bad})
