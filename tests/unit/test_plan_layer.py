"""The layer's plan: one workspace, whose two phases share their bytes."""

from __future__ import annotations

from typing import Any

import pytest

_plan = pytest.importorskip("zipvl._plan")

LONGVA = {"batch": 1, "query_heads": 28, "kv_heads": 4, "head_dim": 128}
SELECTION = ("probe_index", "keep_from", "accumulated", "normalized", "probe_scores", "select_tokens")
ATTENTION = ("k_packed", "v_packed", "seen")


def sizes(tokens: int, **changes: Any) -> dict[str, int]:
    """Bytes each part must have at least."""
    shape = LONGVA | {"probes": 128, "masked": False, "all_queries": False, "returns_packed": False} | changes
    B, P, Hq, Hkv, D = (shape[n] for n in ("batch", "probes", "query_heads", "kv_heads", "head_dim"))
    scores = _plan.plan_probe_scores_cuda(
        batch=B,
        query_heads=Hq,
        kv_heads=Hkv,
        tokens=tokens,
        probes=P,
        head_dim=D,
        masked=shape["masked"],
        clusters=shape.get("hopper", True),
    )
    select = _plan.plan_select_tokens(
        batch=B, tokens=tokens, num_sms=132, shared_bytes=232448, clusters=shape.get("hopper", True)
    )
    clustered = scores.cluster_blocks > 0 and select.team == _plan.SelectTeam.BLOCK
    summed = clustered and 4 * Hkv * scores.row_splits * tokens <= 160 * 1024
    ahead = shape["masked"] or scores.cluster_blocks == 0
    packed = 0 if shape["returns_packed"] or not shape.get("hopper", True) else 2 * B * Hkv * tokens * D
    return {
        "probe_index": 4 * B * P if ahead else 0,
        "keep_from": 4 * B if shape["masked"] else 0,
        "accumulated": 0 if summed else 4 * B * tokens,
        "normalized": 0 if summed else 4 * B * tokens,
        "probe_scores": scores.workspace_bytes,
        "select_tokens": select.workspace_bytes,
        "k_packed": packed,
        "v_packed": packed,
        "seen": 4 * B * tokens if shape["all_queries"] and shape.get("hopper", True) else 0,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 5, "masked": True},
        {"all_queries": True},
        {"returns_packed": True},
        {"hopper": False},
        {"probes": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 127, 128, 1000, 4097, 131072, 2**20])
def test_parts_do_not_overlap_within_a_phase(tokens: int, changes: dict[str, Any]) -> None:
    plan = _plan.plan_layer(**LONGVA | changes, tokens=tokens)
    need = sizes(tokens, **changes)
    assert plan.native
    assert plan.selects_sums == (need["accumulated"] == 0)
    assert plan.draws_ahead == (need["probe_index"] > 0)
    for phase, end in ((SELECTION, plan.selection_bytes), (ATTENTION, plan.attention_bytes)):
        begins = [plan.offsets[name] for name in phase]
        assert begins[0] == 0 and all(begin % 256 == 0 for begin in begins)
        for name, begin, following in zip(phase, begins, [*begins[1:], end], strict=True):
            assert following - begin >= need[name], name
    assert plan.workspace_bytes == max(plan.selection_bytes, plan.attention_bytes)


def test_the_phases_share_their_bytes() -> None:
    plan = _plan.plan_layer(**LONGVA, tokens=131072)
    assert plan.workspace_bytes == plan.attention_bytes == 2 * 4 * 131072 * 128 * 2
    returned = _plan.plan_layer(**LONGVA, tokens=131072, returns_packed=True)
    assert returned.attention_bytes == 0 and returned.workspace_bytes == plan.selection_bytes


@pytest.mark.parametrize(
    ("changes", "selects_sums"),
    [
        ({"tokens": 128}, False),  # one block's keys: no cluster
        ({"tokens": 2048}, True),
        ({"tokens": 2048, "batch": 16, "masked": True}, True),
        ({"tokens": 131072}, False),  # no one kernel for both passes
        ({"tokens": 2048, "hopper": False}, False),
        ({"tokens": 2048, "query_heads": 32, "kv_heads": 32}, False),  # more clusters than the chip holds
    ],
    ids=str,
)
def test_when_the_selection_reads_the_probes_sums(changes: dict[str, int], selects_sums: bool) -> None:
    plan = _plan.plan_layer(**LONGVA | changes)
    assert plan.selects_sums == selects_sums
    assert ("selection from the probes' sums" in str(plan)) == selects_sums


def test_steps_without_a_kernel() -> None:
    for changes in ({"half_precision": False}, {"head_dim": 80}, {"hopper": False, "shared_bytes": 1024}):
        plan = _plan.plan_layer(**LONGVA | changes, tokens=100000)
        assert not plan.native and "step by step" in str(plan)


def test_printed() -> None:
    assert str(_plan.plan_layer(**LONGVA, tokens=2048)).startswith(
        "zipvl_layer on CUDA: no kernel for the draw; selection from the probes' sums; 4194304 bytes of workspace"
    )


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"probes": 0}, {"kv_heads": 3}], ids=str)
def test_bad_sizes_are_errors(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        _plan.plan_layer(**LONGVA | {"tokens": 64} | bad)
