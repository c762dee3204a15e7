"""From which length on a layer is sparse: what the configuration says, or where it pays on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zipvl import ZipVLConfig, policy

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
