"""From which length on a layer is sparse: what the configuration says, or where it pays on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zipvl import ZipVLConfig, ops, policy

_plan = pytest.importorskip("zipvl._plan")


class States:
    """The dtype and device of tensors on a GPU that need not be there."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype, self.device = dtype, torch.device("cuda")


def below(states: Any, heads: int = 28, **config: Any) -> int:
    return policy.dense_below(ZipVLConfig(**config), heads, 128, states)


@pytest.mark.parametrize("given", [0, 1, 100, 5000])
def test_a_number_is_meant(given: int) -> None:
    assert below(States(), dense_below=given) == given == below(torch.empty(1), dense_below=given)


def test_on_a_cpu_nothing_was_measured() -> None:
    assert below(torch.empty(1)) == policy.SHORTEST == 256


def test_on_a_gpu_the_cost_model_decides() -> None:
    assert below(States()) == _plan.dense_below(query_heads=28, head_dim=128)
    assert below(States(), tau=0.6) == _plan.dense_below(query_heads=28, head_dim=128, tau=0.6)
    assert below(States(), ratio=0.25) == _plan.dense_below(query_heads=28, head_dim=128, ratio=0.25)
    assert below(States(), ratio=0.25, all_queries=True) == _plan.dense_below(
        query_heads=28, head_dim=128, ratio=0.25, all_queries=True
    )
    assert below(States(), heads=4096, ratio=0.01) == 256, "never below what the probes need"
    assert below(States(dtype=torch.float32)) == 256, "no kernel takes float32"


def test_numbers_of_any_kind() -> None:
    half = torch.tensor(0.5).numpy()[()]
    assert below(States(), ratio=half, tau=half) == below(States(), ratio=0.5, tau=0.5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("config", [{"ratio": 0.25}, {"tau": 0.6}], ids=str)
def test_the_compiler_takes_it_for_a_constant(config: dict[str, float], dynamic: bool) -> None:
    states, settings = States(), ZipVLConfig(**config)

    def added(x: torch.Tensor) -> torch.Tensor:
        return x + policy.dense_below(settings, 28, 128, states)  # type: ignore[arg-type]

    compiled = torch.compile(added, fullgraph=True, dynamic=dynamic, backend="eager")
    assert int(compiled(torch.zeros(()))) == below(states, **config)


@pytest.mark.parametrize("bad", ["automatic", "256", -1, 2.5, True, None])
def test_bad_values_are_errors(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"ZipVLConfig: dense_below must be .*integer of at least 0, got"):
        ZipVLConfig(dense_below=bad)


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.01, float("nan")])
def test_bad_shares_are_errors(bad: float) -> None:
    with pytest.raises(ValueError, match=r"ZipVLConfig: dense_above must be in \(0, 1\], got"):
        ZipVLConfig(dense_above=bad)


@pytest.mark.parametrize("ratio", [1e-6, 0.07, 0.25, 0.3, 0.48, 1 / 3, 0.999, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_no_selection_is_larger_than_known_before(ratio: float, masked: bool) -> None:
    for tokens in (1, 10, 99, 100, 1024, 4099):
        for fewest in ({}, {"min_tokens": 30}, {"keep_recent": 17}):
            config = ZipVLConfig(ratio=ratio, **fewest)
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
    assert policy.max_kept(ZipVLConfig(tau=0.5), 1000, 256, False) is None
    assert policy.max_kept(ZipVLConfig(ratio=0.5, dense_above=0.9), 1000, 256, False) is None
