"""The plan of select_tokens on CUDA, without a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipvl import _plan

H100 = {"multiprocessors": 132, "clusters": True}
A100 = {"multiprocessors": 108, "clusters": False}
LEAST_SHARED_BYTES = 99 * 1024  # that a block may have: sm_86 and sm_89
HOPPER_SHARED_BYTES = 227 * 1024


@given(
    batch=st.integers(0, 64),
    tokens=st.integers(0, 2**20),
    multiprocessors=st.integers(1, 200),
    clusters=st.booleans(),
)
def test_blocks_cover_the_row_and_fit(batch: int, tokens: int, multiprocessors: int, clusters: bool) -> None:
    plan = _plan.plan_select_tokens(batch=batch, tokens=tokens, multiprocessors=multiprocessors, clusters=clusters)
    if plan.team == _plan.SelectTeam.NONE:
        assert tokens > 9 * 1024 * multiprocessors or multiprocessors < 2
        return
    assert plan.tokens_per_block % 1024 == 0
    assert plan.blocks_per_row * plan.tokens_per_block >= tokens
    if plan.team == _plan.SelectTeam.CLUSTER:
        assert clusters and plan.blocks_per_row == 8 and 8 * plan.tokens_per_block + 34_000 <= HOPPER_SHARED_BYTES
    else:
        assert 8 * plan.tokens_per_block + 18_000 <= LEAST_SHARED_BYTES
    if plan.team == _plan.SelectTeam.GRID:
        assert plan.row_groups >= 1 and plan.row_groups * plan.blocks_per_row <= multiprocessors, "all blocks resident"
        assert plan.workspace_bytes == batch * (128 + 6 * 2048 * 8 + 3 * 32 * plan.blocks_per_row)
    else:
        assert plan.workspace_bytes == 0


@pytest.mark.parametrize("device", [H100, A100])
@pytest.mark.parametrize("tokens", [1, 4096, 4097, 2**15, 2**17, 2**17 + 1, 2**20])
def test_real_devices_take_every_length(tokens: int, device: dict[str, int]) -> None:
    plan = _plan.plan_select_tokens(batch=64, tokens=tokens, **device)
    assert plan.team != _plan.SelectTeam.NONE
    assert plan.workspace_bytes <= 64 * 2**20
    assert f"{plan.blocks_per_row} blocks" in str(plan)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="tokens -1, multiprocessors 132"):
        _plan.plan_select_tokens(batch=1, tokens=-1, **H100)
