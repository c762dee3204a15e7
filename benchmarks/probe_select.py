"""Probe scores, token selection and packing on a GPU: each against its bound and its peers.

``python -m benchmarks.probe_select``. Times are replays of a CUDA graph of many calls, whose inputs are rotated so that
they do not stay in the second-level cache; peers run in the same process on the same inputs. Bounds come from the
device's own ceilings, measured first: a matrix product and a copy.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import _record
from zipvl import ops, reference

PROBES = 128
BLOCK = 16  # tokens of a block of a paged cache
CACHE_BYTES = 512 << 20  # inputs in turn take this much together, several times any second-level cache


@dataclass(frozen=True)
class Shape:
    """One attention layer; bf16, causal."""

    B: int
    Hq: int
    Hkv: int
    N: int
    D: int

    def __str__(self) -> str:
        return f"B {self.B}, {self.Hq}/{self.Hkv} heads, N {self.N:,}, D {self.D}"


MAIN = [Shape(1, 28, 4, N, 128) for N in (4096, 32768, 131072, 2**20)]
OTHERS = [
    Shape(1, 32, 32, 4096, 128),
    Shape(1, 9, 3, 2048, 64),
    Shape(1, 16, 2, 32768, 128),
    Shape(16, 28, 4, 4096, 128),
]


@dataclass
class Timing:
    """Microseconds of one call."""

    median: float
    low_quartile: float
    high_quartile: float


@dataclass
class Ceilings:
    """What this device does at best: FLOPs and bytes (read and written) a second."""

    flops: float
    bytes: float


def time_calls(calls: Sequence[Callable[[], Any]], repeats: int = 15, graph: bool = True) -> Timing:
    """The time of a call, the calls run in turn: of a replayed graph, or where one cannot be captured, of a stream."""
    rounds = max(1, 20 // len(calls))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    replay: Callable[[], None] = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
    replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (rounds * len(calls)))
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), low, high)


def measure_ceilings() -> Ceilings:
    """A bf16 matrix product of 8,192 cubed, and a copy of 256 MiB by a kernel."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / time_calls([lambda: a @ b]).median * 1e6
    source = torch.randn(64 << 20, device="cuda")
    target = torch.empty_like(source)
    # An addition of nothing is a kernel; copy_ is a copy engine's command inside a graph.
    copied = time_calls([lambda: torch.add(source, 0, out=target)]).median
    return Ceilings(flops, 2 * source.numel() * 4 / copied * 1e6)


def rotations(bytes_per_call: int) -> int:
    return max(1, min(16, CACHE_BYTES // max(1, bytes_per_call)))


def make_qk(shape: Shape) -> tuple[Tensor, Tensor]:
    """Normal bf16 q, k ``[B, H, N, D]`` as a model passes them: transposed views of ``[B, N, H, D]``."""
    q, k = (
        torch.randn(shape.B, shape.N, H, shape.D, device="cuda", dtype=torch.bfloat16) for H in (shape.Hq, shape.Hkv)
    )
    return q.transpose(1, 2), k.transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------


def eager_probe_scores(q: Tensor, k: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """``probe_scores`` as the paper's code would write it: the matrix of weights, and its sums."""
    B, Hq, N, D = q.shape
    G = Hq // k.shape[1]
    rows = probes.long()[:, None, :, None].expand(B, Hq, -1, D)
    logits = torch.gather(q, 2, rows) @ k.repeat_interleave(G, 1).transpose(2, 3) * D**-0.5
    visible = torch.arange(N, device=q.device) <= probes[:, :, None]
    weights = torch.softmax(logits.masked_fill(~visible[:, None], -torch.inf), dim=-1, dtype=torch.float32)
    accumulated = weights.sum(dim=2).mean(dim=1)
    return accumulated, accumulated / visible.sum(dim=1)


def flash_colreduce_scores(q: Tensor, k: Tensor, probes: Tensor) -> Tensor:
    """Column sums only, of each head; the probes as if they were the last rows. A head's group shares its keys."""
    from flash_colreduce import flash_colreduce

    B, Hq, _, D = q.shape
    Hkv, N = k.shape[1:3]
    rows = torch.gather(q, 2, probes.long()[:, None, :, None].expand(B, Hq, -1, D))
    keys = k.reshape(B * Hkv, 1, N, D).expand(-1, Hq // Hkv, -1, -1)
    return flash_colreduce(rows.reshape(B * Hkv, Hq // Hkv, -1, D), keys, "sum", is_causal=True)


def sorted_selection(budget: Tensor, rank: Tensor) -> Tensor:
    """``select_tokens`` by sort, cumsum, top-k and sort, with the number of tokens copied to the host for top-k."""
    mass = torch.sort(budget, dim=1, descending=True).values.cumsum(dim=1)
    p = int((mass < 0.975 * mass[:, -1:]).sum()) + 1
    return torch.topk(rank, p, dim=1, sorted=False).indices.sort(dim=1).values


# ---------------------------------------------------------------------------------------------------------------------
# The three ops
# ---------------------------------------------------------------------------------------------------------------------


def check_against_reference() -> None:
    """Small inputs must come out as the float64 reference says, or nothing is timed."""
    q, k = make_qk(Shape(2, 4, 2, 700, 64))
    probes = reference.probe_index(q)
    actual = ops.probe_scores(q, k, probes)
    exact = reference.probe_scores(q.double(), k.double(), probes)
    for score, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(score.double(), truth, rtol=1e-3, atol=1e-5)
    budget, rank = (torch.randint(1, 1024, (2, 5000), device="cuda").float() for _ in range(2))
    index, count = ops.select_tokens(budget, rank, tau=0.75)
    expected = reference.select_tokens(budget, rank, tau=0.75)
    assert torch.equal(index, expected[0]) and torch.equal(count, expected[1]), "select_tokens differs"
    _, v = make_qk(Shape(2, 4, 2, 5000, 64))
    for rows in ops.pack_kv(v, v, index, count):
        for b in range(2):
            assert torch.equal(rows[b, :, : count[b]], v[b][:, index[b, : count[b]].long()]), "pack_kv differs"


def bench_probe_scores(shape: Shape, ceilings: Ceilings, peers: bool) -> dict[str, Any]:
    n = rotations(2 * shape.B * shape.Hkv * shape.N * shape.D)
    inputs = [make_qk(shape) for _ in range(n)]
    probes = ops.probe_index(inputs[0][0], num_recent=PROBES // 2, num_random=PROBES // 2)
    time = time_calls([partial(ops.probe_scores, q, k, probes) for q, k in inputs])
    # Two passes over the products of the probes with the keys they may attend to; k read and the scores written once.
    pairs = float((probes + 1).sum()) * shape.Hq
    flops = 2 * 2 * pairs * shape.D
    moved = 2 * shape.B * shape.Hkv * shape.N * shape.D + 8 * shape.B * shape.N
    row = _row(
        "probe_scores", shape, time, max(flops / ceilings.flops, moved / ceilings.bytes), flops=flops, bytes=moved
    )
    if peers and shape.B * shape.Hq * shape.N <= 28 * 131072:
        row["peers"]["eager"] = time_calls([lambda: eager_probe_scores(*inputs[0], probes)]).median
        if shape.B == 1 and importlib.util.find_spec("flash_colreduce") is not None:
            call = [partial(flash_colreduce_scores, q, k, probes) for q, k in inputs]
            row["peers"]["flash-colreduce"] = time_calls(call, graph=False).median
    return row


def bench_select_tokens(shape: Shape, ceilings: Ceilings, peers: bool) -> dict[str, Any]:
    scores = [
        tuple(torch.softmax(4 * torch.randn(shape.B, shape.N, device="cuda"), dim=1) for _ in range(2))
        for _ in range(4)
    ]
    time = time_calls([partial(ops.select_tokens, *pair) for pair in scores])
    moved = 12 * shape.B * shape.N
    row = _row("select_tokens", shape, time, moved / ceilings.bytes, bytes=moved)
    if peers and shape.B == 1:
        call = [partial(sorted_selection, *pair) for pair in scores]
        row["peers"]["sort + cumsum + topk + sort"] = time_calls(call, graph=False).median
    return row


def bench_pack_kv(shape: Shape, ceilings: Ceilings, peers: bool, ratio: float = 0.25) -> dict[str, Any]:
    return _bench_pack("pack_kv", shape, ceilings, peers, ratio)


def bench_pack_paged(shape: Shape, ceilings: Ceilings, peers: bool, ratio: float = 0.25) -> dict[str, Any]:
    return _bench_pack("pack_paged", shape, ceilings, peers, ratio)


def _bench_pack(op: str, shape: Shape, ceilings: Ceilings, peers: bool, ratio: float) -> dict[str, Any]:
    """``pack_kv``, or ``pack_paged`` into blocks in a drawn order, of keys and values in the layout of each."""
    kept = int(ratio * shape.N)
    moved = 2 * 2 * 2 * shape.B * shape.Hkv * kept * shape.D
    inputs = [
        (make_qk(shape)[1], make_qk(shape)[1]) for _ in range(rotations(4 * shape.B * shape.Hkv * shape.N * shape.D))
    ]
    rank = torch.rand(shape.B, shape.N, device="cuda")
    index, count = ops.select_tokens(rank, rank, ratio=ratio)
    if op == "pack_kv":
        calls = [partial(ops.pack_kv, k, v, index, count) for k, v in inputs]
    else:
        blocks = math.ceil(kept / BLOCK)
        table = torch.randperm(shape.B * blocks, device="cuda").int().view(shape.B, blocks)
        cache = [k.new_empty(2, shape.B * blocks, BLOCK, shape.Hkv, shape.D) for k, _ in inputs]
        calls = [
            partial(ops.pack_paged, k, v, index, count, table, *c) for (k, v), c in zip(inputs, cache, strict=True)
        ]
    time = time_calls(calls)
    row = _row(op, shape, time, moved / ceilings.bytes, bytes=moved)
    if peers:
        copies = [(torch.randn(moved // 8, device="cuda"), torch.empty(moved // 8, device="cuda")) for _ in inputs]
        call = [partial(torch.add, a, 0, out=b) for a, b in copies]
        row["peers"]["contiguous copy of as many bytes"] = time_calls(call).median
    return row


def _row(op: str, shape: Shape, time: Timing, bound_s: float, **counts: float) -> dict[str, Any]:
    return {
        "op": op,
        "shape": asdict(shape),
        "us": time.median,
        "quartiles_us": [time.low_quartile, time.high_quartile],
        "bound_us": 1e6 * bound_s,
        "counts": counts,
        "peers": {},
    }


BENCHES: dict[str, Callable[[Shape, Ceilings, bool], dict[str, Any]]] = {
    "probe_scores": bench_probe_scores,
    "select_tokens": bench_select_tokens,
    "pack_kv": bench_pack_kv,
    "pack_paged": bench_pack_paged,
}


def as_table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("", "shape", "us", "quartiles", "bound us", "of bound", "peers, us (times as long)", title=title)
    for row in rows:
        shape = str(Shape(**row["shape"]))
        low, high = row["quartiles_us"]
        peers = ", ".join(f"{name} {us:.1f} ({us / row['us']:.1f}x)" for name, us in row["peers"].items())
        share = f"{row['bound_us'] / row['us']:.0%}"
        table.add_row(
            row["op"], shape, f"{row['us']:.1f}", f"{low:.1f}-{high:.1f}", f"{row['bound_us']:.1f}", share, peers
        )
    return table


def main(
    only: Annotated[list[str] | None, typer.Option("--op", help=f"of {', '.join(BENCHES)}. [all]")] = None,
    longest: Annotated[int, typer.Option(min=1, help="Leave out longer prompts.")] = 2**20,
    others: Annotated[bool, typer.Option(help="Also the other models' shapes.")] = True,
    peers: Annotated[bool, typer.Option(help="Also time the peers.")] = True,
    record: Annotated[bool, typer.Option(help="Append to benchmarks/results/probe_select.jsonl.")] = True,
) -> None:
    """Times probe_scores, select_tokens, pack_kv and pack_paged on the current GPU (bf16, causal, 128 probes)."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("benchmarks.probe_select needs a CUDA device, and torch.cuda finds none")
    torch.manual_seed(0)
    with torch.inference_mode():
        check_against_reference()
        ceilings = measure_ceilings()
        shapes = [shape for shape in MAIN + (OTHERS if others else []) if shape.N <= longest]
        rows = [BENCHES[op](shape, ceilings, peers) for op in only or BENCHES for shape in shapes]
    console = Console(width=200)
    title = (
        f"{torch.cuda.get_device_name()}: {ceilings.flops / 1e12:.0f} TFLOP/s, copies {ceilings.bytes / 1e12:.2f} TB/s"
    )
    console.print(as_table(rows, title))
    if record:
        payload = {"ceilings": asdict(ceilings), "rows": rows}
        console.print(f"recorded in {_record.append('probe_select', payload, device='cuda')}")


if __name__ == "__main__":
    typer.run(main)
