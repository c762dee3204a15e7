"""One layer of ZipVL's prefill against dense cuDNN attention: ``python -m benchmarks.layer``.

``zipvl_attn`` with 28 query and 4 key/value heads, head dim 128, bfloat16, causal, batch 1, against cuDNN's
``scaled_dot_product_attention`` on the same tensors in the same process. Eager calls and CUDA graph replays; the host's
time for a call; and each step alone. Every case is checked against the ops one by one, bit for bit, before it is timed.

``tau`` is timed on two kinds of attention: *concentrated*, where a tenth of the tokens draws nearly all of it, and
*uniform*, where every token draws the same, so that ZipVL keeps nearly all and can only lose: its worst case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import _record
from zipvl import ops

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # LongVA-7B's
GOALS = {  # times as fast as dense, by ratio and tokens
    0.25: {2048: 2.0, 4096: 3.5, 8192: 6.0, 32768: 13.0, 131072: 17.0},
    0.5: {2048: 1.5, 4096: 1.9, 8192: 2.6, 32768: 3.7, 131072: 4.0},
}
LENGTHS = (2048, 4096, 8192, 32768, 131072)
MODEL_LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
CALLS_UNSEEN = 8  # calls whose launches fit the stream's queue, so that the host never waits for the GPU
GRAPHED_US = 20_000.0  # longer calls gain nothing by a graph: eager times stand for both


class Part(str, Enum):
    goals = "goals"
    distributions = "distributions"
    model = "model"


class Attention(str, Enum):
    normal = "normal"
    concentrated = "concentrated"
    uniform = "uniform"


@dataclass(frozen=True)
class Case:
    N: int
    ratio: float | None = None
    tau: float = 0.975
    attention: Attention = Attention.normal
    goal: float | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        return {"tau": self.tau, "ratio": self.ratio}

    @property
    def label(self) -> str:
        return f"r {self.ratio}" if self.ratio is not None else f"tau {self.tau}, {self.attention.value}"


CASES: dict[Part, list[Case]] = {
    Part.goals: [
        Case(N, ratio=ratio, goal=goal) for ratio, by_length in GOALS.items() for N, goal in by_length.items()
    ],
    Part.distributions: [
        Case(N, attention=attention) for attention in (Attention.concentrated, Attention.uniform) for N in LENGTHS
    ],
    # What the constants of zipvl/policy.py are fitted to (benchmarks/layer_cost.py).
    Part.model: [Case(N, ratio=ratio) for N in MODEL_LENGTHS for ratio in (0.25, 0.5, 1.0)]
    + [Case(N, attention=Attention.uniform) for N in MODEL_LENGTHS],
}


def make_inputs(case: Case, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[B, H, N, D]`` as a model passes them: transposed views of ``[B, N, H, D]``."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, case.N, H, HEAD_DIM, generator=generator, device="cuda") for H in (HEADS, KV_HEADS, KV_HEADS)
    )
    if case.attention is Attention.uniform:
        q = 0.01 * q
    if case.attention is Attention.concentrated:
        heavy = torch.rand(batch, case.N, 1, 1, generator=generator, device="cuda") < 0.1
        q[..., 0] += 10
        k[..., 0] += 12 * heavy[..., 0]  # logits of the heavy tokens 10 higher, of standard deviation 1
    q, k, v = (x.bfloat16().transpose(1, 2) for x in (q, k, v))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def steps(
    case: Case, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Callable[[], Any]], tuple[Tensor, Tensor, Tensor]]:
    """Each step as a call of its own on what the steps before it gave; and the layer's results from them."""
    probes = ops.probe_index(q)
    scores = ops.probe_scores(q, k, probes)
    keep = torch.zeros(q.shape[0], case.N, dtype=torch.bool, device="cuda")
    keep[:, -1] = True
    index, count = ops.select_tokens(*scores, **case.keywords, keep_mask=keep)
    calls = {
        "probe_index": lambda: ops.probe_index(q),
        "probe_scores": lambda: ops.probe_scores(q, k, probes),
        "select_tokens": lambda: ops.select_tokens(*scores, **case.keywords, keep_mask=keep),
        "pack_kv": lambda: ops.pack_kv(k, v, index, count),
        "sparse_attn": lambda: ops.sparse_attn(q, k, v, index, count),
    }
    return calls, (ops.sparse_attn(q, k, v, index, count), index, count)


def eager_us(function: Callable[[], Any]) -> dict[str, float]:
    from triton import testing

    median, low, high = testing.do_bench(function, warmup=15, rep=70, quantiles=[0.5, 0.2, 0.8])
    return {"us": 1e3 * median, "low_us": 1e3 * low, "high_us": 1e3 * high}


def graph_us(function: Callable[[], Any]) -> dict[str, float]:
    from triton import testing

    median, low, high = testing.do_bench_cudagraph(function, rep=12, quantiles=[0.5, 0.2, 0.8])
    return {"us": 1e3 * median, "low_us": 1e3 * low, "high_us": 1e3 * high}


def host_us(function: Callable[[], Any], rounds: int) -> float:
    """The host's time for a call whose launches nothing holds up: the least of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS_UNSEEN):
            function()
        best = min(best, (time.perf_counter() - begin) / CALLS_UNSEEN)
        torch.cuda.synchronize()
    return 1e6 * best


def measure(case: Case, parts: bool) -> dict[str, Any]:
    q, k, v = make_inputs(case)

    def layer() -> tuple[Tensor, Tensor, Tensor]:
        return ops.zipvl_attn(q, k, v, **case.keywords)

    with torch.inference_mode(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        step_calls, expected = steps(case, q, k, v)
        for got, want in zip(layer(), expected, strict=True):
            assert torch.equal(got, want), f"{case}: the layer is not its steps"
        kept = int(expected[2][0])
        del expected
        eager = {"zipvl": eager_us(layer), "dense": eager_us(lambda: dense(q, k, v))}
        short = eager["dense"]["us"] < GRAPHED_US
        graph = {"zipvl": graph_us(layer), "dense": graph_us(lambda: dense(q, k, v))} if short else eager
        rounds = 8 if eager["dense"]["us"] < 1000 else 1
        host = {"zipvl": host_us(layer, rounds), "dense": host_us(lambda: dense(q, k, v), rounds)}
        of_steps = {name: graph_us(call)["us"] for name, call in step_calls.items()} if parts else {}
    return {"kept": kept, "eager": eager, "graph": graph, "host_us": host, "steps_us": of_steps}


def row_of(case: Case, times: dict[str, Any]) -> list[str]:
    def speedup(kind: str) -> float:
        return times[kind]["dense"]["us"] / times[kind]["zipvl"]["us"]

    goal = "" if case.goal is None else f" ({case.goal:.1f}x)"
    slower = times["graph"]["zipvl"]["us"] - (1.03 * times["graph"]["dense"]["us"] + 10)
    return [
        f"{case.N:,}",
        case.label,
        f"{times['kept'] / case.N:.3f}",
        f"{times['graph']['zipvl']['us']:.1f}",
        f"{times['graph']['dense']['us']:.1f}",
        f"{speedup('graph'):.2f}x{goal}",
        f"{times['eager']['zipvl']['us']:.1f}",
        f"{times['eager']['dense']['us']:.1f}",
        f"{speedup('eager'):.2f}x",
        f"{times['host_us']['zipvl']:.1f}",
        f"{times['host_us']['dense']:.1f}",
        " ".join(f"{us:.1f}" for us in times["steps_us"].values()),
        "" if slower <= 0 else f"+{slower:.0f}",
    ]


def main(
    part: Annotated[list[Part] | None, typer.Option(help="Which rows; may be repeated. [all]")] = None,
    max_tokens: Annotated[int, typer.Option(help="Leave out longer sequences.")] = LENGTHS[-1],
    record: Annotated[bool, typer.Option(help="Append to benchmarks/results/layer.jsonl.")] = True,
) -> None:
    """Times one layer on this machine's GPU; goals in brackets, the last column what is over 1.03 x dense + 10 us."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    table = Table(title=f"{torch.cuda.get_device_name()}, bfloat16, {HEADS}/{KV_HEADS} heads, D {HEAD_DIM}; us")
    for column in ("N", "", "kept", "zipvl_attn", "cuDNN", "speed-up (goal)", "eager", "cuDNN", "speed-up", "host",
                   "cuDNN", "draw, scores, select, pack, attend", "over"):  # fmt: skip
        table.add_column(column, justify="left" if column == "" else "right")
    for chosen in part or list(Part):
        rows = []
        for case in CASES[chosen]:
            if case.N > max_tokens:
                continue
            times = measure(case, parts=chosen is not Part.model)
            table.add_row(*row_of(case, times))
            rows.append({"case": asdict(case), **times})
        table.add_section()
        if record and rows:
            shape = {"B": 1, "Hq": HEADS, "Hkv": KV_HEADS, "D": HEAD_DIM, "dtype": "bfloat16"}
            _record.append("layer", {"part": chosen.value, "shape": shape, "rows": rows}, device="cuda")
    Console(width=170).print(table)


if __name__ == "__main__":
    typer.run(main)
