"""probe_scores' CUDA kernels, both families: against float64 within the CPU tests' tolerances, on hostile inputs, and
the same bits whatever else is in the batch, on the stream, or on its second run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import cuda, no_host_sync, poison_free_memory
from tests.unit.helpers import MASKS, assert_accurate, double, make_mask, make_qkv, poison, score_floor, strided
from zipvl import ops, reference

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)
# Query and key/value heads. On Hopper short inputs take one kernel for both passes, and two where 16 heads ask for more
# clusters than it takes (and at D 256).
FORMS = [(6, 2), (16, 16)]

pytestmark = pytest.mark.usefixtures("family")


@pytest.fixture(params=["native", "sm80"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device's own kernels, and the portable ones."""
    monkeypatch.setenv("ZIPVL_FORCE_SM80", "1" if request.param == "sm80" else "0")
    yield request.param


def inputs(
    B: int,
    Hq: int,
    Hkv: int,
    N: int,
    D: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "bnhd",
    mask: str = "none",
    num_recent: int = 64,
    num_random: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``q, k, probes, token_mask`` on the GPU, with the memory layout that ``make_qkv`` gives them."""
    q, k, _ = make_qkv(B, Hq, Hkv, N, D, dtype, layout)
    token_mask = make_mask(mask, B, N)
    probes = reference.probe_index(q, num_recent=num_recent, num_random=num_random, token_mask=token_mask)
    on_gpu = []
    for tensor in (q, k):
        # The whole storage, so that strides, offset and surroundings are those of the CPU's view.
        storage = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage()).cuda()
        on_gpu.append(storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
    return (*on_gpu, *cuda(probes, token_mask))


def check(q: Tensor, k: Tensor, probes: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Both scores against the float64 reference; the baseline is the reference in float32. All on the GPU."""
    poison_free_memory()
    with no_host_sync():
        scores: tuple[Tensor, Tensor] = ops.probe_scores(q, k, probes, **keywords)
    exact = reference.probe_scores(*double(q, k), probes, **keywords)
    baseline = reference.probe_scores(q, k, probes, **keywords)
    for actual, exact_one, baseline_one in zip(scores, exact, baseline, strict=True):
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        assert_accurate(actual, exact_one, baseline_one, score_floor(q, k, exact_one, keywords.get("scale")))
    return scores


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize(("Hq", "Hkv"), [(2, 2), (9, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_head_dims(dtype: torch.dtype, Hq: int, Hkv: int, D: int) -> None:
    q, k, probes, _ = inputs(2, Hq, Hkv, 777, D, dtype)
    accumulated, _ = check(q, k, probes)
    torch.testing.assert_close(accumulated.sum(dim=1), torch.full((2,), 128.0, device="cuda"), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("D", [64, 256])
def test_every_length(D: int) -> None:
    for N in range(1, 301):
        q, k, probes, _ = inputs(1, 2, 1, N, D, num_recent=20, num_random=13)
        check(q, k, probes)
        if N % 128 in (0, 1, 63, 64, 65, 127):
            q, k, probes, _ = inputs(1, 16, 16, N, D, num_recent=20, num_random=13)
            check(q, k, probes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("Hq", "Hkv"), [(3, 1), (16, 16)])
@pytest.mark.parametrize("N", [511, 512, 513, 1023, 1024, 1025, 2047, 2049, 4095, 4096, 4097, 8193])
def test_tile_edges(N: int, Hq: int, Hkv: int, causal: bool) -> None:
    q, k, probes, _ = inputs(1, Hq, Hkv, N, 128)
    check(q, k, probes, causal=causal)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("D", "most"), [(64, 8192), (96, 4096), (128, 4096)])
def test_the_longest_inputs_of_one_kernel(D: int, most: int, masked: bool) -> None:
    """And the shortest of two; 28/4 heads fill the clusters."""
    for N in (most, most + 1):
        q, k, probes, token_mask = inputs(1, 28, 4, N, D, mask="inner" if masked else "none")
        check(q, k, probes, token_mask=token_mask)


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (10, 10), (12, 4), (7, 1), (28, 4), (16, 1), (30, 15), (15, 5)])
def test_units_of_rows_in_a_cluster(Hq: int, Hkv: int) -> None:
    """1 to 5 of them, as many in each cluster of a head or not."""
    for P in (128, 70):
        q, k, probes, _ = inputs(2, Hq, Hkv, 1500, 64, num_recent=P // 2, num_random=P // 2)
        check(q, k, probes)


@pytest.mark.parametrize("P", [1, 2, 63, 64, 65, 127, 129, 255, 256, 257])
def test_numbers_of_probes(P: int) -> None:
    """257 is more than the kernels take, and runs over ATen."""
    for Hq, Hkv in FORMS:
        q, k, probes, _ = inputs(2, Hq, Hkv, 600, 64, num_recent=P // 2, num_random=P - P // 2)
        check(q, k, probes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_masks(Hq: int, Hkv: int, D: int, mask: str, causal: bool) -> None:
    q, k, probes, token_mask = inputs(3, Hq, Hkv, 450, D, mask=mask, num_recent=30, num_random=70)
    clean = check(q, k, probes, causal=causal, token_mask=token_mask)
    if token_mask is None:
        return
    assert bool((clean[0][~token_mask] == 0).all()) and bool((clean[1][~token_mask] == 0).all())
    hidden = (poison(q.cpu(), ~token_mask.cpu()).cuda(), poison(k.cpu(), ~token_mask.cpu()).cuda())
    assert same(clean, ops.probe_scores(*hidden, probes, causal=causal, token_mask=token_mask)), "NaN leaks"


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "fused", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_layouts(Hq: int, Hkv: int, dtype: torch.dtype, layout: str) -> None:
    """``sliced`` is aligned to nothing: as k it runs over ATen, as q it is gathered in pieces of 2 bytes. Its
    surroundings are NaN."""
    q, k, probes, token_mask = inputs(3, Hq, Hkv, 300, 128, dtype, layout, mask="left")
    check(q, k, probes, token_mask=token_mask)
    check(q.contiguous(), k, probes, token_mask=token_mask)
    check(q, k.contiguous(), strided_on_gpu(probes), token_mask=strided_on_gpu(token_mask))


def strided_on_gpu(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    view = strided(tensor.cpu())
    storage = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).cuda()
    return storage.as_strided(view.shape, view.stride(), view.storage_offset())


def test_keys_that_share_memory() -> None:
    """Expanded heads have a stride of 0, which the copy engine cannot read."""
    q, k, probes, _ = inputs(2, 6, 1, 300, 64)
    check(q, k.expand(2, 3, 300, 64), probes)
    check(q, k[:1].expand(2, 1, 300, 64), probes)


@pytest.mark.parametrize("scale", [0.0, -0.09, 0.3, 1e-30])
@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_scales(Hq: int, Hkv: int, scale: float) -> None:
    q, k, probes, token_mask = inputs(2, Hq, Hkv, 500, 128, mask="inner")
    check(q, k, probes, scale=scale, token_mask=token_mask)


def test_large_logits_do_not_overflow() -> None:
    q, k, probes, _ = inputs(1, 6, 2, 500, 128)
    check(30 * q, 30 * k, probes)


@pytest.mark.parametrize("garbage", [-1, -7, 500, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_entries_that_are_no_position_are_no_probes(Hq: int, Hkv: int, garbage: int) -> None:
    q, k, probes, _ = inputs(2, Hq, Hkv, 500, 128)
    probes[:, ::3] = garbage
    check(q, k, probes)
    for score in ops.probe_scores(q, k, torch.full_like(probes, garbage)):
        assert torch.equal(score, torch.zeros(2, 500, device="cuda"))


@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_probes_in_any_order(Hq: int, Hkv: int) -> None:
    q, k, probes, _ = inputs(2, Hq, Hkv, 1500, 128)
    check(q, k, probes[:, torch.randperm(128)].contiguous())


@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_probes_that_see_nothing_count_for_nothing(Hq: int, Hkv: int) -> None:
    """Probes among padding at the start: their rows have no real key."""
    q, k, _, token_mask = inputs(3, Hq, Hkv, 700, 64, mask="left")
    probes = torch.randint(0, 700, (3, 100), dtype=torch.int32, device="cuda").sort(dim=1).values
    accumulated, _ = ops.probe_scores(q, k, probes, token_mask=token_mask)
    assert token_mask is not None
    seeing = torch.stack([(probes[b] >= token_mask[b].nonzero()[0]).sum() for b in range(3)])
    torch.testing.assert_close(accumulated.sum(dim=1), seeing.float(), rtol=1e-5, atol=0.0)
    check(q, k, probes, token_mask=token_mask)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "probe"])
@pytest.mark.parametrize(("Hq", "Hkv"), FORMS)
def test_bad_numbers_give_scores_that_are_not_finite(Hq: int, Hkv: int, where: str, bad: float) -> None:
    """So that selection sees them and takes every token; rows of the batch without them are untouched."""
    q, k, probes, _ = inputs(2, Hq, Hkv, 400, 128)
    clean = ops.probe_scores(q, k, probes)
    if where == "key":
        k[0, 1, 5] = bad
    else:
        q[0, 1, probes[0, 7].long()] = bad
    broken = ops.probe_scores(q, k, probes)
    for clean_one, broken_one in zip(clean, broken, strict=True):
        assert not bool(broken_one[0].isfinite().all())
        assert torch.equal(broken_one[1], clean_one[1])


def test_one_key_with_all_the_mass_and_keys_all_alike() -> None:
    q, k, probes, _ = inputs(1, 4, 2, 1000, 64)
    q.fill_(1.0)
    k.fill_(0.25)
    accumulated, normalized = check(q, k, probes)
    k[:, :, 0] = 8.0
    accumulated, normalized = check(q, k, probes)
    # A logit of 64 is rounded to 2**-18 of its logarithm's base 2, which moves weights by 3e-6.
    torch.testing.assert_close(accumulated[0, 0], torch.tensor(128.0, device="cuda"), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(normalized[0, 0], torch.tensor(1.0, device="cuda"), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("N", "D"), [(3333, 128), (5000, 128), (3333, 256)])
def test_same_bits_every_time_and_for_a_row_alone(N: int, D: int) -> None:
    q, k, probes, token_mask = inputs(3, 14, 2, N, D, mask="left")
    together = ops.probe_scores(q, k, probes, token_mask=token_mask)
    for _ in range(100):
        assert same(together, ops.probe_scores(q, k, probes, token_mask=token_mask))
    assert token_mask is not None
    for b in range(3):
        row = slice(b, b + 1)
        alone = ops.probe_scores(q[row], k[row], probes[row], token_mask=token_mask[row])
        assert torch.equal(alone[0], together[0][row]) and torch.equal(alone[1], together[1][row])


@pytest.mark.parametrize("N", [2048, 4096, 4097])
def test_graph_replay_is_eager_also_on_new_values(N: int) -> None:
    q, k, probes, _ = inputs(1, 28, 4, N, 128)
    ops.probe_scores(q, k, probes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.probe_scores(q, k, probes)
    for turn in range(3):
        k.copy_(torch.randn_like(k))
        probes.copy_(torch.randperm(N)[:128].sort().values if turn else probes)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, ops.probe_scores(q, k, probes))


@pytest.mark.parametrize("N", [4096, 4097])
def test_side_streams_do_not_meet(N: int) -> None:
    q, k, probes, _ = inputs(1, 28, 4, N, 128)
    expected = [ops.probe_scores(q, k * factor, probes) for factor in (1.0, 0.5)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    halves = [k * 1.0, k * 0.5]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, keys in zip(streams, halves, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.probe_scores(q, keys, probes))
    torch.cuda.synchronize()
    assert all(same(scores, expected[i % 2]) for i, scores in enumerate(found))


def test_a_row_of_a_large_batch() -> None:
    """More clusters than the chip holds at once: those of later batch rows wait for those of earlier ones."""
    q, k, probes, _ = inputs(64, 4, 2, 260, 64)
    check(q, k, probes)
    q, k, probes, _ = inputs(6, 28, 4, 1300, 128)
    check(q, k, probes)


def test_memory_is_what_the_plan_says() -> None:
    """Also that no float32 scores are written: ``[P, N]`` of them alone would be more."""
    _plan = pytest.importorskip("zipvl._plan")
    B, Hq, Hkv, N, D = 1, 28, 4, 131072, 128
    q, k = (torch.randn(B, N, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for H in (Hq, Hkv))
    probes = ops.probe_index(q)
    plan = _plan.plan_probe_scores_cuda(batch=B, query_heads=Hq, kv_heads=Hkv, tokens=N, probes=128, head_dim=D)
    assert plan.workspace_bytes <= 64 * 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = ops.probe_scores(q, k, probes)
    growth = torch.cuda.max_memory_allocated() - before
    assert growth <= plan.workspace_bytes + 2 * N * 4 + 2**21
    assert growth < 128 * N * 4
    torch.testing.assert_close(scores[0].sum(), torch.tensor(128.0, device="cuda"), rtol=1e-5, atol=0.0)


def test_a_million_tokens() -> None:
    N = 2**20
    q, k = (torch.randn(1, N, H, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for H in (4, 2))
    check(q, k, ops.probe_index(q, num_recent=8, num_random=8))
