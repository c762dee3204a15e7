"""The layer from hidden states on CUDA: the bits of the ops one by one, captured, with given scores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import seen_as_written
from tests.kernels.test_zipvl_attn import inputs, keep_set, no_host_sync, poison_free_memory
from tests.unit.helpers import MASKS, assert_accurate, double, make_mask, selected_mask
from tests.unit.test_zipvl_layer import KINDS, make_hidden
from zipvl import ops, reference

BF16 = torch.bfloat16


def cuda(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in given.items()}


def case(
    B: int,
    Hq: int,
    Hkv: int,
    N: int,
    D: int,
    dtype: torch.dtype = BF16,
    kind: str = "bias",
    C: int = 256,
    outputs: int = 128,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """k, v and the layer's other tensors."""
    _, k, v = inputs(B, Hq, Hkv, N, D, dtype)
    given = make_hidden(B, N, Hq, D, dtype, kind, C)
    given["o_weight"] = (torch.randn(outputs, Hq * D) * (Hq * D) ** -0.5).to(dtype)
    return k, v, cuda(given)


def queries(given: dict[str, Tensor], index: Tensor, count: Tensor | None = None) -> Tensor:
    names = ("hidden", "q_weight", "q_bias", "cos", "sin")
    return ops.project_queries(
        *(given.get(name) for name in names), index, count, norm_weight=given.get("q_norm_weight")
    )  # type: ignore[arg-type]


def composed(k: Tensor, v: Tensor, given: dict[str, Tensor], **keywords: Any) -> tuple[Tensor, ...]:
    """zipvl_layer from the ops, one by one."""
    mask = keywords.get("token_mask")
    budget = {name: keywords[name] for name in ("tau", "ratio") if name in keywords}
    probes = ops.probe_index(k, token_mask=mask)
    scores = ops.probe_scores(queries(given, probes), k, probes, token_mask=mask)
    keep = keep_set(mask, keywords.get("keep_mask"), keywords.get("keep_recent", 1), k.shape[0], k.shape[2])
    index, count = ops.select_tokens(*scores, **budget, keep_mask=keep, token_mask=mask)
    out = ops.sparse_attn(queries(given, index, count), k, v, index, count)
    rows = out.transpose(1, 2).flatten(2)
    return ops.project_outputs(rows, given["o_weight"], index, count), index, count, *ops.pack_kv(k, v, index, count)


def check(k: Tensor, v: Tensor, given: dict[str, Tensor], **keywords: Any) -> None:
    """The op against the ops one by one, bit for bit, from poisoned memory and without a copy to the host."""
    expected = composed(k, v, given, **keywords)
    poison_free_memory(2 * given["hidden"].numel() + k.numel())
    with no_host_sync():
        out, index, count, *packed = ops.zipvl_layer(None, k, v, **given, **keywords, pack=True)
    assert torch.equal(count, expected[2]) and torch.equal(index, expected[1])
    rows = selected_mask(index.cpu(), count.cpu()).cuda()[:, :, None]
    assert torch.equal(torch.where(rows, out, 0), out), "rows that are not selected are 0"
    assert torch.equal(out, expected[0])
    for ours, theirs in zip(packed, expected[3:], strict=True):
        for b, kept in enumerate(count.tolist()):
            assert torch.equal(ours[b, :, :kept], theirs[b, :, :kept])


@pytest.fixture(params=["sm90", "sm80"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPVL_FORCE_SM80", "1" if request.param == "sm80" else "0")


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("limit", [{}, {"ratio": 0.25}], ids=str)
@pytest.mark.parametrize("N", [1, 129, 1000, 4097, 20000])
def test_lengths(N: int, limit: dict[str, Any]) -> None:
    check(*case(1, 14, 2, N, 128), **limit)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_projections(kind: str, dtype: torch.dtype, D: int) -> None:
    check(*case(2, 6, 2, 777, D, dtype, kind), tau=0.8)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    token_mask = make_mask(mask, 3, 777)
    check(
        *case(3, 8, 2, 777, 64),
        tau=0.8,
        token_mask=None if token_mask is None else token_mask.cuda(),
        keep_mask=(torch.rand(3, 777) < 0.05).cuda(),
        keep_recent=7,
    )


def test_float32_runs_step_by_step() -> None:
    check(*case(1, 6, 2, 300, 64, torch.float32), tau=0.8)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_all_queries(mask: str) -> None:
    k, v, given = case(2, 6, 2, 500, 64)
    token_mask = make_mask(mask, 2, 500)
    wide = {name: tensor.cpu().double() for name, tensor in given.items()}
    keywords = {"tau": 1.0, "all_queries": True}
    exact = reference.zipvl_layer(None, *double(k.cpu(), v.cpu()), **wide, **keywords, token_mask=token_mask)[0]
    host = {name: tensor.cpu() for name, tensor in given.items()}
    baseline = reference.zipvl_layer(None, k.cpu(), v.cpu(), **host, **keywords, token_mask=token_mask)[0]
    on_gpu = None if token_mask is None else token_mask.cuda()
    with no_host_sync():
        out = ops.zipvl_layer(None, k, v, **given, **keywords, token_mask=on_gpu)[0]
    assert_accurate(out.cpu(), exact, baseline, floor=0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_given_scores(masked: bool) -> None:
    """The same bits as without, where the scores are those that the op would have computed."""
    k, v, given = case(2, 6, 2, 900, 128)
    token_mask = torch.rand(2, 900, device="cuda") < 0.9 if masked else None
    probes = ops.probe_index(k, token_mask=token_mask)
    budget, rank = ops.probe_scores(queries(given, probes), k, probes, token_mask=token_mask)
    keywords = {"tau": 0.8, "token_mask": token_mask, "keep_recent": 3}
    with no_host_sync():
        out, index, count, *_ = ops.zipvl_layer(None, k, v, **given, **keywords, budget_score=budget, rank_score=rank)
    expected = ops.zipvl_layer(None, k, v, **given, **keywords)
    assert torch.equal(count, expected[2]) and torch.equal(index, expected[1]) and torch.equal(out, expected[0])
    q, *_ = inputs(2, 6, 2, 900, 128)
    given_q = ops.zipvl_layer(q, k, v, **keywords, budget_score=budget, rank_score=rank)
    assert torch.equal(given_q[1], index)
    rows = selected_mask(index.cpu(), count.cpu()).cuda()
    attended = ops.sparse_attn(q, k, v, index, count)
    assert torch.equal(seen_as_written(given_q[0], rows), seen_as_written(attended, rows))


def test_captured() -> None:
    k, v, given = case(1, 14, 2, 5000, 128)
    inputs_of_graph = [k, v, given["hidden"]]
    run = lambda: ops.zipvl_layer(None, k, v, **given, ratio=0.3)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(2):
        for tensor in inputs_of_graph:
            tensor.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results[:3], run()[:3], strict=True))


LAUNCHES = """
import itertools, json, os, sys
import torch
from tests.kernels.test_zipvl_attn import inputs
from tests.kernels.test_zipvl_layer import case, launched
from zipvl import ops
found = {}
for family, source, masked in itertools.product(("sm90", "sm80"), ("queries", "hidden"), (False, True)):
    os.environ["ZIPVL_FORCE_SM80"] = str(int(family == "sm80"))
    k, v, given = case(2, 8, 2, 1000, 64)
    q, *_ = inputs(2, 8, 2, 1000, 64)
    mask = torch.rand(2, 1000, device="cuda") < 0.9 if masked else None
    call = dict(given, q=None) if source == "hidden" else {"q": q}
    run = lambda: ops.zipvl_layer(k=k, v=v, **call, token_mask=mask, pack=True)
    found[f"{family} {source} {masked}"] = launched(run)
print(json.dumps(found))
"""


def launched(run: Callable[[], object]) -> list[str]:
    """The kernels and copies that a call launches, by name."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_every_launch_is_a_kernel_of_ours_or_a_product() -> None:
    """Nothing else runs over ATen between the kernels. A layer that fell back to the ops one by one has the same bits.

    In a process of its own: a profiler that was used once watches CUDA graphs ever after.
    """
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", LAUNCHES], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 8
    for name, kernels in found.items():
        assert sum("sparse_attn_sm" in kernel for kernel in kernels) == 1, (name, kernels)
        assert not [kernel for kernel in kernels if "at::native" in kernel], (name, kernels)
        assert "queries" not in name or len(kernels) <= 10, (name, kernels)


@pytest.mark.usefixtures("family")
def test_zeros_are_those_of_the_projection() -> None:
    """With an output projection attention writes its zeros, over NaN, and without one those of its own output."""
    k, v, given = case(1, 8, 2, 4096, 128)
    q, *_ = inputs(1, 8, 2, 4096, 128)
    weight = given["o_weight"]
    poison_free_memory(q.numel())
    out, index, count, *_ = ops.zipvl_layer(q, k, v, ratio=0.25, o_weight=weight)
    heads, *_ = ops.zipvl_layer(q, k, v, ratio=0.25)
    rows = selected_mask(index.cpu(), count.cpu()).cuda()[:, :, None]
    assert torch.equal(torch.where(rows, out, 0), out)
    assert torch.equal(torch.where(rows[:, None], heads, 0), heads)
    assert torch.equal(out, ops.project_outputs(heads.transpose(1, 2).flatten(2), weight, index, count))


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("all_queries", [False, True])
def test_outputs_in_the_places_of_the_queries(all_queries: bool) -> None:
    """From hidden states without an output projection: the bits of projected queries through the same op."""
    k, v, given = case(3, 8, 2, 3000, 128)
    del given["o_weight"]
    keywords = {"tau": 0.8, "all_queries": all_queries}
    out, index, count, *_ = ops.zipvl_layer(None, k, v, **given, **keywords)
    every = torch.arange(3000, dtype=torch.int32, device="cuda").expand(3, -1).contiguous()
    expected = ops.sparse_attn(queries(given, every), k, v, index, count, all_queries=all_queries)
    if all_queries:  # one product of every query, whose last bits may be another's
        assert (out - expected).abs().max() <= 2.0**-6 * expected.abs().max()
    else:
        assert torch.equal(out, ops.sparse_attn(queries(given, index, count), k, v, index, count))


def test_memory_is_one_workspace() -> None:
    """Beside results and inputs a call holds queries, attention outputs, packed rows and an eighth of a projection."""
    B, Hq, Hkv, N, D, C = 1, 28, 4, 32768, 128, 3584
    k, v, given = case(B, Hq, Hkv, N, D, C=C, outputs=C)
    run = lambda: ops.zipvl_layer(None, k, v, **given, ratio=0.25, pack=True)  # noqa: E731
    results = run()
    del results
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    peak = torch.cuda.max_memory_allocated() - before
    row = N * Hq * D * 2
    kept = sum(t.numel() * t.element_size() for t in results)
    assert peak < kept - row + 2 * row + row // 2, (peak, kept, row)
