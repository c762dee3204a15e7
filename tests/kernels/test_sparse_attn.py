"""sparse_attn on CUDA, both kernel families, against float64 on the GPU; NaN wherever the op must not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_ops import UNDER_INITCHECK, no_host_sync, seen_as_written
from tests.unit.helpers import assert_accurate, output_floor, selected_mask
from zipvl import ops

HALVES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)
LAYOUTS = ("bhnd", "bnhd", "fused", "padded", "sliced")
MODES = tuple({"causal": causal, "all_queries": every} for causal in (True, False) for every in (False, True))
GARBAGE = (-(2**31), -1, 2**31 - 1, 2**30, -12345)


@pytest.fixture(params=["sm90", "sm80"], autouse=True)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that run, where the device has them."""
    major = torch.cuda.get_device_capability()[0]
    if request.param == "sm80":
        monkeypatch.setenv("ZIPVL_FORCE_SM80", "1")
        if major < 8:
            pytest.skip("the portable kernels need compute capability 8.0")
    else:
        monkeypatch.delenv("ZIPVL_FORCE_SM80", raising=False)
        if major != 9:
            pytest.skip("Hopper's kernels need compute capability 9.0")
    return str(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def make_qkv(
    B: int, Hq: int, Hkv: int, N: int, D: int, dtype: torch.dtype = torch.bfloat16, layout: str = "bnhd"
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal inputs on the GPU. ``padded`` has aligned gaps between rows, heads and batches, ``sliced`` odd ones no
    16-byte access can read; NaN stands in both."""

    def normal(*shape: int) -> Tensor:
        return (1.5 * torch.randn(shape, device="cuda")).to(dtype)

    if layout == "fused":
        qkv = normal(B, N, Hq + 2 * Hkv, D).transpose(1, 2)
        return qkv[:, :Hq], qkv[:, Hq : Hq + Hkv], qkv[:, Hq + Hkv :]

    def tensor(H: int) -> Tensor:
        if layout == "bhnd":
            return normal(B, H, N, D)
        if layout == "bnhd":
            return normal(B, N, H, D).transpose(1, 2)
        gap = 8 if layout == "padded" else 5
        surrounding = torch.full((B, H + 1, N + 3, D + 2 * gap), torch.nan, dtype=dtype, device="cuda")
        view = surrounding[:, 1:, 2 : N + 2, gap : D + gap]
        view.copy_(normal(B, H, N, D))
        return view

    return tensor(Hq), tensor(Hkv), tensor(Hkv)


def make_selection(N: int, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Random tokens, so many in each batch row; garbage in the places after them."""
    index = torch.tensor(GARBAGE, dtype=torch.int32, device="cuda").repeat(len(counts), N // len(GARBAGE) + 1)[:, :N]
    index = index.contiguous()
    for b, count in enumerate(counts):
        index[b, :count] = torch.randperm(N, device="cuda")[:count].sort().values.int()
    return index, torch.tensor(counts, dtype=torch.int32, device="cuda")


def outside_of(index: Tensor, count: Tensor) -> Tensor:
    """``[B, N]``: the tokens that are not selected."""
    return ~selected_mask(index.cpu(), count.cpu()).cuda()


def poisoned(tensor: Tensor, where: Tensor) -> Tensor:
    """A copy with the same strides and NaN at the tokens of ``where [B, N]``."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)
    return copy.masked_fill_(where[:, None, :, None], torch.nan)


def poison_free_memory(elements: int) -> None:
    """Fills what the allocator hands out next with NaN, so that an unwritten output or workspace shows."""
    blocks = [torch.full((elements,), torch.nan, device="cuda") for _ in range(3)]
    del blocks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    dtype: torch.dtype,
    *,
    scale: float | None = None,
    causal: bool = True,
    all_queries: bool = False,
) -> Tensor:
    """docs/ops.md, step 5, with every intermediate in ``dtype``, all heads at once."""
    B, Hq, N, D = q.shape
    group = Hq // k.shape[1]
    out = torch.zeros(B, Hq, N, D, dtype=dtype, device="cuda")
    for b, selected in enumerate(count.tolist()):
        T = index[b, :selected].long()
        rows = torch.arange(N, device="cuda") if all_queries else T
        k_rows, v_rows = (x[b, :, T].to(dtype).repeat_interleave(group, dim=0) for x in (k, v))
        logits = (q[b, :, rows].to(dtype) @ k_rows.transpose(1, 2)) * (D**-0.5 if scale is None else scale)
        blocked = T[None, :] > rows[:, None] if causal else torch.zeros_like(logits[0], dtype=torch.bool)
        weights = logits.masked_fill(blocked, -torch.inf).softmax(dim=-1).masked_fill(blocked, 0)
        out[b, :, rows] = weights @ v_rows
    return out


def check(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, **keywords: Any) -> Tensor:
    """The op against float64, with NaN in what it must not read and in the memory that it gets."""
    outside = outside_of(index, count)
    given = (q if keywords.get("all_queries") else poisoned(q, outside), poisoned(k, outside), poisoned(v, outside))
    poison_free_memory(q.numel())
    with no_host_sync():
        out: Tensor = ops.sparse_attn(*given, index, count, **keywords)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous(), "a transposed view of [B, N, Hq, D]"
    exact = attention(q, k, v, index, count, torch.float64, **keywords)
    baseline = attention(q, k, v, index, count, q.dtype, **keywords)
    rows = torch.ones_like(outside) if keywords.get("all_queries") else ~outside
    outputs = (seen_as_written(t, rows) for t in (out, exact, baseline))
    assert_accurate(*outputs, output_floor(q, k, v, keywords.get("scale")))
    if not keywords.get("all_queries") and not UNDER_INITCHECK:
        assert bool((out.transpose(1, 2)[outside] == 0).all()), "rows outside T are exactly 0"
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Right
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize(("Hq", "Hkv"), [(2, 2), (6, 2), (14, 2), (16, 2), (5, 1)])
@pytest.mark.parametrize("dtype", HALVES)
def test_heads_and_head_dims(dtype: torch.dtype, Hq: int, Hkv: int, D: int) -> None:
    check(*make_qkv(2, Hq, Hkv, 333, D, dtype), *make_selection(333, [140, 201]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_modes(D: int, mode: dict[str, bool]) -> None:
    check(*make_qkv(2, 6, 2, 600, D), *make_selection(600, [301, 130]), **mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "counts",
    [
        [0, 1, 700],
        [63, 64, 65],
        [127, 128, 129],
        [191, 192, 193],
        [255, 256, 257],
        [383, 384, 385],
        [0, 0, 0],
        [699, 2, 383],
    ],
)
@pytest.mark.parametrize("D", [64, 128])  # blocks of 192 query rows and of 128
def test_counts(D: int, counts: list[int], mode: dict[str, bool]) -> None:
    check(*make_qkv(3, 2, 1, 700, D), *make_selection(700, counts), **mode)


@pytest.mark.parametrize("D", [64, 96, 256])
def test_counts_at_tile_edges_of_other_head_dims(D: int) -> None:
    counts = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300]
    check(*make_qkv(len(counts), 2, 1, 300, D), *make_selection(300, counts))


@pytest.mark.parametrize("N", [1, 2, 15, 63, 64, 65, 127, 128, 129, 1000, 3000])
def test_lengths(N: int) -> None:
    check(*make_qkv(1, 3, 1, N, 64), *make_selection(N, [max(1, N // 4)]))
    check(*make_qkv(1, 2, 1, N, 128), *make_selection(N, [max(1, N // 2)]), all_queries=True)


@pytest.mark.parametrize("where", ["first", "last", "both ends"])
@pytest.mark.parametrize("all_queries", [False, True])
def test_long_gaps(where: str, all_queries: bool) -> None:
    """Whole query blocks that see no key, or every key."""
    N = 2000
    head, tail = torch.arange(100), torch.arange(N - 100, N)
    T = {"first": head, "last": tail, "both ends": torch.cat((head, tail))}[where].int().cuda()
    index = torch.full((1, N), N, dtype=torch.int32, device="cuda")
    index[0, : len(T)] = T
    check(*make_qkv(1, 4, 2, N, 128), index, torch.tensor([len(T)], dtype=torch.int32).cuda(), all_queries=all_queries)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [MODES[0], MODES[1]])
@pytest.mark.parametrize("D", [64, 128])
def test_layouts(D: int, mode: dict[str, bool], layout: str) -> None:
    check(*make_qkv(2, 6, 2, 400, D, layout=layout), *make_selection(400, [170, 133]), **mode)


def test_strided_selection() -> None:
    q, k, v = make_qkv(3, 4, 2, 300, 128)
    index, count = make_selection(300, [100, 7, 290])
    plain = ops.sparse_attn(q, k, v, index, count)
    wide = torch.full((6, 611), 1, dtype=torch.int32, device="cuda")
    wide[::2, 5:605:2] = index
    counts = torch.full((3, 2), 1, dtype=torch.int32, device="cuda")
    counts[:, 1] = count
    assert torch.equal(ops.sparse_attn(q, k, v, wide[::2, 5:605:2], counts[:, 1]), plain)


@pytest.mark.parametrize(("dtype", "D"), [(torch.float32, 128), (torch.float32, 80), (torch.bfloat16, 80)])
def test_what_no_kernel_takes_is_computed_all_the_same(dtype: torch.dtype, D: int) -> None:
    check(*make_qkv(2, 4, 2, 200, D, dtype), *make_selection(200, [90, 31]))


@pytest.mark.parametrize("scale", [0.3, 1.7, 0.0, -0.2])
def test_scale(scale: float) -> None:
    check(*make_qkv(1, 4, 2, 300, 64), *make_selection(300, [150]), scale=scale)


def test_the_default_scale() -> None:
    q, k, v = make_qkv(1, 4, 2, 300, 64)
    selection = make_selection(300, [150])
    assert torch.equal(ops.sparse_attn(q, k, v, *selection), ops.sparse_attn(q, k, v, *selection, scale=0.125))


def test_large_logits_do_not_overflow() -> None:
    q, k, v = make_qkv(1, 2, 1, 400, 64)
    assert bool(check(20 * q, 20 * k, v, *make_selection(400, [211])).isfinite().all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_all_tokens_give_dense_attention(D: int, causal: bool) -> None:
    q, k, v = make_qkv(1, 6, 2, 1111, D)
    out = check(q, k, v, *make_selection(1111, [1111]), causal=causal)
    exact, baseline = (
        torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
        for inputs in ([x.double() for x in (q, k, v)], (q, k, v))
    )
    assert_accurate(out, exact, baseline, output_floor(q, k, v))


def test_sixty_four_batch_rows() -> None:
    counts = [(37 * b) % 301 for b in range(64)]
    check(*make_qkv(64, 4, 2, 300, 64), *make_selection(300, counts))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile inputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [64, 128])
def test_garbage_positions_never_leave_the_tensors(D: int, mode: dict[str, bool]) -> None:
    """What comes out is unspecified; an access outside the tensors is an error here, or under compute-sanitizer."""
    N = 500
    q, k, v = make_qkv(2, 4, 2, N, D)
    inputs = [x.clone() for x in (q, k, v)]
    index = torch.empty(2, N, dtype=torch.int32, device="cuda")
    index[0] = torch.randint(-(2**31), 2**31 - 1, (N,), device="cuda").int()
    index[1] = torch.randint(-10, N + 10, (N,), device="cuda").int()
    for count in ([N, N], [2**31 - 1, 300], [1, 2]):
        out = ops.sparse_attn(q, k, v, index, torch.tensor(count, dtype=torch.int32).cuda(), **mode)
        torch.cuda.synchronize()
        assert out.shape == q.shape
    assert all(torch.equal(x, before) for x, before in zip((q, k, v), inputs, strict=True))


@pytest.mark.parametrize(("count", "means"), [(-1, 0), (-(2**31), 0), (301, 300), (2**31 - 1, 300)])
def test_counts_are_clamped(count: int, means: int) -> None:
    q, k, v = make_qkv(1, 4, 2, 300, 128)
    index, _ = make_selection(300, [300])
    actual, expected = (
        ops.sparse_attn(q, k, v, index, torch.tensor([c], dtype=torch.int32).cuda()) for c in (count, means)
    )
    assert torch.equal(actual, expected)


def test_a_nan_that_the_selection_names_is_not_hidden_and_stays_where_it_is_seen() -> None:
    q, k, v = make_qkv(2, 4, 2, 200, 128)
    index, count = make_selection(200, [200, 200])
    clean = ops.sparse_attn(q, k, v, index, count)
    k[0, 1, 150] = torch.nan
    broken = ops.sparse_attn(q, k, v, index, count)
    assert bool(broken[0, 2:, 150:].isnan().all())
    assert torch.equal(broken[0, 2:, :150], clean[0, 2:, :150]), "rows before it"
    assert torch.equal(broken[0, :2], clean[0, :2]), "heads of the other key/value head"
    assert torch.equal(broken[1], clean[1])


# ---------------------------------------------------------------------------------------------------------------------
# Repeatable, capturable
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [64, 128])
def test_same_bits_every_time_and_for_a_row_alone(D: int, mode: dict[str, bool]) -> None:
    q, k, v = make_qkv(3, 14, 2, 1500, D)
    index, count = make_selection(1500, [700, 1500, 33])
    together = ops.sparse_attn(q, k, v, index, count, **mode)
    for _ in range(5):
        assert torch.equal(ops.sparse_attn(q, k, v, index, count, **mode), together)
    for b in range(3):
        row = slice(b, b + 1)
        assert torch.equal(ops.sparse_attn(q[row], k[row], v[row], index[row], count[row], **mode), together[row])


@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_graph_replay_with_changing_count(D: int, all_queries: bool) -> None:
    q, k, v = make_qkv(2, 4, 2, 900, D)
    index, count = make_selection(900, [900, 400])
    ops.sparse_attn(q, k, v, index, count, all_queries=all_queries)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sparse_attn(q, k, v, index, count, all_queries=all_queries)
    for counts in ([900, 400], [0, 900], [1, 129], [64, 0]):
        new_index, new_count = make_selection(900, counts)
        index.copy_(new_index)
        count.copy_(new_count)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, ops.sparse_attn(q, k, v, index, count, all_queries=all_queries))


def test_on_a_side_stream() -> None:
    q, k, v = make_qkv(1, 4, 2, 2000, 128)
    index, count = make_selection(2000, [900])
    expected = ops.sparse_attn(q, k, v, index, count)
    side = torch.cuda.Stream()
    late = [torch.zeros_like(x) for x in (q, k, v, index, count)]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.sparse_attn(*late)  # whose lines a multiprocessor's cache may keep
        torch.cuda._sleep(20_000_000)
        for target, source in zip(late, (q, k, v, index, count), strict=True):
            target.copy_(source)  # the op must run after these, on the same stream
        out = ops.sparse_attn(*late)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Large
# ---------------------------------------------------------------------------------------------------------------------


def test_offsets_beyond_32_bits() -> None:
    """q and out have more than 2**31 elements, and tokens lie at the far end."""
    B, Hq, Hkv, N, D = 1, 33, 3, 2**20, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    q, k, v = (torch.empty(B, N, H, D, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
               for H in (Hq, Hkv, Hkv))  # fmt: skip
    assert q.numel() > 2**31
    T = torch.cat((torch.arange(0, N - 500, 700), torch.arange(N - 500, N))).int().cuda()
    index = torch.full((B, N), -1, dtype=torch.int32, device="cuda")
    index[0, : len(T)] = T
    out = ops.sparse_attn(q, k, v, index, torch.tensor([len(T)], dtype=torch.int32).cuda())
    rows, dense = T.long(), torch.arange(len(T), dtype=torch.int32, device="cuda")[None]
    packed = [x[:, :, rows] for x in (q, k, v)]
    count = torch.tensor([len(T)], dtype=torch.int32).cuda()
    assert_accurate(
        out[:, :, rows],
        attention(*packed, dense, count, torch.float64),
        attention(*packed, dense, count, torch.bfloat16),
        output_floor(*packed),
    )
    out.index_fill_(2, rows, 0)
    assert int(out.count_nonzero()) == 0, "rows outside T are exactly 0"
