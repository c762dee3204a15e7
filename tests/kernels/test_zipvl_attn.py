"""The layer as one sequence of kernels: the bits of the ops one by one, in every mode, captured, on any stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import seen_as_written
from tests.unit.helpers import MASKS, make_mask, make_qkv, selected_mask
from zipvl import ops

LENGTHS = [1, 2, 63, 128, 129, 1000, 4096, 4097, 20000, 60001]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Any synchronising call inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def poison_free_memory(size: int) -> None:
    """Fills what the caching allocator will hand out next with NaN, so that whatever is not written shows."""
    blocks = [torch.full((s,), torch.nan, device="cuda") for s in (64, 1 << 10, 1 << 16, 1 << 20, size, size)]
    del blocks


def inputs(
    B: int, Hq: int, Hkv: int, N: int, D: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v as a model passes them: transposed views of ``[B, N, H, D]``, made on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        (1.5 * torch.randn(B, N, H, D, generator=generator, device="cuda")).to(dtype).transpose(1, 2)
        for H in (Hq, Hkv, Hkv)
    )
    return q, k, v


def keep_set(token_mask: Tensor | None, keep_mask: Tensor | None, keep_recent: int, B: int, N: int) -> Tensor:
    keep = torch.zeros(B, N, dtype=torch.bool, device="cuda") if keep_mask is None else keep_mask.clone()
    real = torch.ones(B, N, dtype=torch.bool, device="cuda") if token_mask is None else token_mask
    from_the_end = real.flip(1).cumsum(dim=1).flip(1)
    return (keep | (from_the_end <= keep_recent)) & real


def composed(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
    """zipvl_prefill from the ops, one by one."""
    B, _, N, _ = q.shape
    mask = keywords.get("token_mask")
    draw = {name: keywords[name] for name in ("num_recent", "num_random", "seed") if name in keywords}
    attend = {name: keywords[name] for name in ("scale", "causal") if name in keywords}
    budget = {name: keywords[name] for name in ("tau", "ratio", "min_tokens") if name in keywords}
    probes = ops.probe_index(q, **draw, token_mask=mask)
    scores = ops.probe_scores(q, k, probes, **attend, token_mask=mask)
    keep = keep_set(mask, keywords.get("keep_mask"), keywords.get("keep_recent", 1), B, N)
    index, count = ops.select_tokens(*scores, **budget, keep_mask=keep, token_mask=mask)
    all_queries = keywords.get("all_queries", False)
    out = ops.sparse_attn(q, k, v, index, count, **attend, all_queries=all_queries)
    if all_queries and mask is not None:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out, index, count, *ops.pack_kv(k, v, index, count)


def check(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    """Both ops against the ops one by one, bit for bit, from poisoned memory and without a copy to the host."""
    expected = composed(q, k, v, **keywords)
    poison_free_memory(max(q.numel(), 2 * k.numel()) // 2)
    with no_host_sync():
        prefill = ops.zipvl_prefill(q, k, v, **keywords)
    poison_free_memory(max(q.numel(), 2 * k.numel()) // 2)
    with no_host_sync():
        attn = ops.zipvl_attn(q, k, v, **keywords)
    for out, index, count, *_ in (prefill, attn):
        assert out.transpose(1, 2).is_contiguous() and index.is_contiguous()
        assert torch.equal(count, expected[2]), (count, expected[2])
        assert torch.equal(index, expected[1])
        rows = selected_mask(index.cpu(), count.cpu()).cuda()
        assert torch.equal(seen_as_written(out, rows), seen_as_written(expected[0], rows))
    for packed, expected_packed in zip(prefill[3:], expected[3:], strict=True):
        assert packed.is_contiguous() and packed.shape == k.shape
        for b, kept in enumerate(expected[2].tolist()):
            assert torch.equal(packed[b, :, :kept], expected_packed[b, :, :kept])
    return expected[2]


@pytest.fixture(params=["sm90", "sm80"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPVL_FORCE_SM80", "1" if request.param == "sm80" else "0")


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("limit", [{}, {"tau": 0.5}, {"tau": 1.0}, {"ratio": 0.25}, {"ratio": 1.0}], ids=str)
@pytest.mark.parametrize("N", LENGTHS)
def test_lengths(N: int, limit: dict[str, Any]) -> None:
    check(*inputs(1, 14, 2, N, 128), **limit)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("all_queries", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_modes(mask: str, all_queries: bool, causal: bool) -> None:
    token_mask = make_mask(mask, 3, 777)
    count = check(
        *inputs(3, 8, 2, 777, 64),
        tau=0.8,
        token_mask=None if token_mask is None else token_mask.cuda(),
        keep_mask=(torch.rand(3, 777) < torch.tensor([0.05, 0.2, 0.6])[:, None]).cuda(),
        all_queries=all_queries,
        causal=causal,
    )
    assert mask == "row_empty" or mask == "one_real" or len(set(count.tolist())) > 1, "counts differ by row"


@pytest.mark.parametrize(("B", "N"), [(1, 3000), (4, 700), (9, 333)])
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_dims_and_batches(dtype: torch.dtype, D: int, B: int, N: int) -> None:
    mask = make_mask("left", B, N)
    assert mask is not None
    check(*inputs(B, 6, 2, N, D, dtype), ratio=0.3, token_mask=mask.cuda())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "keywords",
    [
        {"keep_recent": 0},
        {"keep_recent": 5},
        {"keep_recent": 3000},
        {"keep_recent": 2**63 - 1},
        {"min_tokens": 600},
        {"num_recent": 0, "num_random": 16, "seed": 9},
        {"num_recent": 16, "num_random": 0},
        {"num_recent": 56, "num_random": 200, "seed": 2**40 + 9},
        {"scale": 0.3},
    ],
    ids=str,
)
def test_keywords(keywords: dict[str, Any], mask: str) -> None:
    token_mask = make_mask(mask, 3, 2000)
    token_mask = None if token_mask is None else token_mask.cuda()
    check(*inputs(3, 4, 2, 2000, 64), **{"tau": 0.3, "token_mask": token_mask} | keywords)


@pytest.mark.parametrize("N", [129, 190, 256, 257])
def test_nearly_every_token_a_probe(N: int) -> None:
    check(*inputs(2, 6, 2, N, 128), tau=0.8, num_recent=100, num_random=156, seed=3)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "fused"])
def test_layouts_and_strided_masks(layout: str) -> None:
    wide = torch.rand(4, 3000, device="cuda") < 0.7
    q, k, v = (t.cuda() for t in make_qkv(2, 6, 2, 1000, 128, torch.bfloat16, layout))
    check(q, k, v, token_mask=wide[::2, ::3], keep_mask=wide[1::2, 1::3], ratio=0.2)


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 64), (torch.bfloat16, 80)])
def test_what_no_kernel_takes_goes_step_by_step(dtype: torch.dtype, D: int) -> None:
    mask = make_mask("left", 2, 500)
    assert mask is not None
    check(*inputs(2, 4, 2, 500, D, dtype), tau=0.8, token_mask=mask.cuda(), keep_recent=3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_select_every_real_token_of_their_row(bad: float) -> None:
    mask = make_mask("left", 2, 600)
    assert mask is not None
    mask = mask.cuda()
    q, k, v = inputs(2, 4, 2, 600, 64)
    k[0, 0, 400] = bad
    _, index, count = ops.zipvl_attn(q, k, v, ratio=0.25, token_mask=mask)
    assert torch.equal(selected_mask(index.cpu(), count.cpu())[0], mask[0].cpu())
    assert count[1] < mask[1].sum()


@pytest.mark.parametrize("op", [ops.zipvl_attn, ops.zipvl_prefill])
@pytest.mark.parametrize("N", [1500, 6000, 60001])
def test_captured_and_replayed_with_other_inputs(op: Any, N: int) -> None:
    """A graph serves every input of its shape: counts differ from replay to replay."""
    mask = make_mask("left", 2, N)
    assert mask is not None
    static = [*inputs(2, 4, 2, N, 64), mask.cuda()]

    def call(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> Any:
        return op(q, k, v, tau=0.9, token_mask=token_mask)

    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call(*static)
            graph = torch.cuda.CUDAGraph()
            side.synchronize()
            with torch.cuda.graph(graph, stream=side):
                captured = call(*static)
        counts = []
        for seed in (1, 2, 3):
            other = make_mask(("inner", "right", "left")[seed - 1], 2, N)
            assert other is not None
            q, k, v = inputs(2, 4, 2, N, 64, seed=seed)
            fresh = [q, k * seed, v]  # sharper attention, fewer tokens
            for target, source in zip(static, [*fresh, other.cuda()], strict=True):
                target.copy_(source)
            expected = call(*static)
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(captured[:3], expected[:3], strict=True))
            counts.append(tuple(captured[2].tolist()))
        assert len(set(counts)) > 1


def test_side_streams_do_not_meet() -> None:
    """Layers on two streams at once, each with its own workspace, give what each gives alone."""
    cases = [inputs(1, 8, 2, N, 128) for N in (5000, 3000)]
    expected = [ops.zipvl_attn(*case, tau=0.8) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results: list[list[Any]] = [[], []]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(ops.zipvl_attn(*cases[i], tau=0.8))
    torch.cuda.synchronize()
    for one, got in zip(expected, results, strict=True):
        assert all(torch.equal(a, b) for result in got for a, b in zip(one, result, strict=True))


def test_back_to_back_layers_share_memory_safely() -> None:
    """A layer's workspace is the next one's at once: programmatic launches must not let one write where one reads."""
    cases = [inputs(1, 8, 2, N, 128, seed=N) for N in (700, 2100, 5000, 9000)]
    expected = [ops.zipvl_prefill(*case, ratio=0.4) for case in cases]
    torch.cuda.synchronize()
    for _ in range(4):
        got = [ops.zipvl_prefill(*case, ratio=0.4) for case in cases]
        torch.cuda.synchronize()
        for one, result in zip(expected, got, strict=True):
            kept = int(one[2][0])
            assert all(torch.equal(a, b) for a, b in zip(one[:3], result[:3], strict=True))
            assert all(torch.equal(a[:, :, :kept], b[:, :, :kept]) for a, b in zip(one[3:], result[3:], strict=True))


@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_rows_outside_a_selection_that_is_all_in_one_place(where: str) -> None:
    """One gap of thousands of tokens is zeroed by all, and rows beside it are not."""
    B, N, kept = 2, 9000, 300
    q, k, v = inputs(B, 4, 2, N, 64)
    start = {"first": 0, "last": N - kept, "middle": 4001}[where]
    index = torch.full((B, N), N, dtype=torch.int32, device="cuda")
    index[:, :kept] = torch.arange(start, start + kept, device="cuda").int()
    count = torch.full((B,), kept, dtype=torch.int32, device="cuda")
    poison_free_memory(q.numel() // 2)
    out = ops.sparse_attn(q, k, v, index, count)
    inside = slice(start, start + kept)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, inside], k[:, :, inside], v[:, :, inside], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, inside], dense, rtol=2e-2, atol=2e-2)
    outside = torch.ones(N, dtype=torch.bool, device="cuda")
    outside[inside] = False
    assert bool((out[:, :, outside] == 0).all())
