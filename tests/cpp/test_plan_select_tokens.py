"""The plan of select_tokens on CUDA, without a GPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipvl import _plan

H100 = {"num_sms": 132, "shared_bytes": 227 * 1024, "clusters": True}
A100 = {"num_sms": 108, "shared_bytes": 163 * 1024, "clusters": False}
L40 = {"num_sms": 142, "shared_bytes": 99 * 1024, "clusters": False}
BLOCK_BYTES = 16 * 1024  # histogram of ranks, lists, sums, result
CLUSTER_BYTES = 3 * 2048 * 12 + 2 * 8 * 1024 * 4 + 1024  # histograms, lists, records


@given(
    batch=st.integers(0, 64),
    tokens=st.integers(0, 2**21),
    num_sms=st.integers(1, 200),
    device=st.sampled_from([H100, A100, L40]),
)
def test_blocks_cover_the_row_and_fit(batch: int, tokens: int, num_sms: int, device: dict[str, int]) -> None:
    plan = _plan.plan_select_tokens(**{**device, "batch": batch, "tokens": tokens, "num_sms": num_sms})
    if plan.team == _plan.SelectTeam.NONE:
        assert tokens > min(2**20, 16384 * num_sms) or num_sms < 2
        assert plan.reason in str(plan) and plan.reason
        return
    assert plan.reason == ""
    assert plan.tokens_per_block in (4096, 8192, 16384)
    assert plan.blocks_per_row * plan.tokens_per_block >= tokens
    exchange = CLUSTER_BYTES if plan.team == _plan.SelectTeam.CLUSTER else 0
    assert plan.tokens_per_block // 4096 * 16384 + BLOCK_BYTES + exchange <= device["shared_bytes"]
    if plan.team == _plan.SelectTeam.CLUSTER:
        assert device["clusters"] and plan.blocks_per_row <= 8, "the most that every sm_90 device takes"
    if plan.team == _plan.SelectTeam.GRID:
        assert plan.row_groups >= 1 and plan.row_groups * plan.blocks_per_row <= num_sms, "all blocks resident"
        assert plan.workspace_bytes == batch * (128 + 3 * 2048 * 12 + 2 * 1024 * 4 + 2 * 16 * plan.blocks_per_row)
    else:
        assert plan.workspace_bytes == 0


@pytest.mark.parametrize("device", [H100, A100, L40])
@pytest.mark.parametrize("tokens", [1, 4096, 4097, 2**14, 49_152, 49_153, 2**17, 2**17 + 1, 2**20])
def test_real_devices_take_every_length(tokens: int, device: dict[str, int]) -> None:
    plan = _plan.plan_select_tokens(batch=64, tokens=tokens, **device)
    assert plan.team != _plan.SelectTeam.NONE
    assert plan.workspace_bytes <= 64 * 2**20
    assert f"{plan.blocks_per_row} blocks" in str(plan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 2**20 + 1}, "the kernels take at most 1048576 tokens, got 1048577"),
        ({"shared_bytes": 32767}, "a block takes 32768 bytes of shared memory, and the device has 32767"),
        (
            {"tokens": 2**20, "num_sms": 63},
            "a row of 1048576 tokens takes 64 blocks at once, and the device has 63 multiprocessors",
        ),
    ],
    ids=str,
)
def test_why_no_kernel_takes_a_row(change: dict[str, int], reason: str) -> None:
    plan = _plan.plan_select_tokens(**{"batch": 1, "tokens": 4096, **H100, **change})
    assert plan.team == _plan.SelectTeam.NONE
    assert plan.reason == reason
    assert str(plan) == f"select_tokens on CUDA: over ATen, because {reason}"


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="tokens -1, num_sms 132"):
        _plan.plan_select_tokens(batch=1, tokens=-1, **H100)
