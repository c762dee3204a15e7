"""sparse_attn on a GPU against the best dense attention on a sequence of the selected length.

``python -m benchmarks.sparse_attn``. Peers run in the same process on the same number of heads: cuDNN's and
FlashAttention-2's dense ``scaled_dot_product_attention`` at ``p`` tokens (at ``N`` beside ``all_queries``), and
FlashAttention-4 when ``flash_attn.cute`` is installed. Every case is compared with float64 before it is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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

HEADS, KV_HEADS = 28, 4  # LongVA-7B's
BOUND_SIZE = 8192  # of the matrix product that gives the FLOP bound
LARGEST_GRAPHED = 2048  # up to so many selected tokens a call is shorter than its launch from Python


class Part(str, Enum):
    goals = "goals"
    dims = "dims"
    small = "small"
    all_queries = "all-queries"
    sm80 = "sm80"


@dataclass(frozen=True)
class Case:
    N: int
    p: int
    D: int = 128
    causal: bool = True
    all_queries: bool = False
    force_sm80: bool = False
    goal_ratio: float | None = None  # to cuDNN
    goal_tflops: float | None = None

    @property
    def keys_seen(self) -> float:
        """Pairs of a query and a key that it sees, one head."""
        queries = self.N if self.all_queries else self.p
        return queries * self.p / (2 if self.causal else 1)

    @property
    def flops(self) -> float:
        return 4.0 * self.D * HEADS * self.keys_seen

    @property
    def peer_tokens(self) -> int:
        return self.N if self.all_queries else self.p

    @property
    def label(self) -> str:
        notes = [] if self.D == 128 else [f"D {self.D}"]
        notes += [] if self.causal else ["not causal"]
        notes += ["all queries"] if self.all_queries else []
        notes += ["sm_80 kernel"] if self.force_sm80 else []
        return ", ".join(notes)


GOALS = [
    Case(8192, 4096, goal_ratio=0.90, goal_tflops=570),
    Case(32768, 8192, goal_ratio=0.88, goal_tflops=620),
    Case(32768, 16384, goal_ratio=0.90, goal_tflops=645),
    Case(131072, 32768, goal_ratio=0.90, goal_tflops=665),
]
CASES: dict[Part, list[Case]] = {
    Part.goals: GOALS,
    Part.dims: [
        Case(32768, 8192, D=D, causal=causal, goal_ratio=1.0) for D in (64, 96, 256) for causal in (True, False)
    ]
    + [Case(32768, 8192, causal=False, goal_ratio=1.0)],
    Part.small: [Case(N, p) for N in (2048, 4096, 8192) for p in (256, 512, 1024, 2048) if p < N],
    Part.all_queries: [Case(32768, 8192, all_queries=True, goal_ratio=1 / 3.3)],
    Part.sm80: [replace(c, force_sm80=True, goal_ratio=None, goal_tflops=None) for c in GOALS[:3]]
    + [Case(32768, 8192, D=D, force_sm80=True) for D in (64, 96, 256)]
    + [Case(32768, 8192, causal=False, force_sm80=True)],
}


@contextmanager
def kernel_family(force_sm80: bool) -> Iterator[None]:
    """The portable kernel inside, if asked for; the environment is as before afterwards."""
    before = os.environ.pop("ZIPVL_FORCE_SM80", None)
    if force_sm80:
        os.environ["ZIPVL_FORCE_SM80"] = "1"
    try:
        yield
    finally:
        os.environ.pop("ZIPVL_FORCE_SM80", None)
        if before is not None:
            os.environ["ZIPVL_FORCE_SM80"] = before


def make_inputs(tokens: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v ``[1, H, N, D]`` as a model passes them: transposed views of ``[1, N, H, D]``."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, H, head_dim, generator=generator, device="cuda").to(dtype).transpose(1, 2)
        for H in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def make_selection(tokens: int, selected: int) -> tuple[Tensor, Tensor]:
    """A random selection of so many tokens, ascending."""
    generator = torch.Generator("cuda").manual_seed(1)
    index = torch.full((1, tokens), tokens, dtype=torch.int32, device="cuda")
    index[0, :selected] = torch.randperm(tokens, generator=generator, device="cuda")[:selected].sort().values.int()
    return index, torch.tensor([selected], dtype=torch.int32, device="cuda")


def check_against_reference(out: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, case: Case) -> None:
    """Some rows of every head must be as close to float64 as PyTorch's 16-bit arithmetic is, or nothing is timed."""
    T = index[0, : case.p].long()
    candidates = torch.arange(case.N, device="cuda") if case.all_queries else T
    rows = candidates[torch.linspace(0, len(candidates) - 1, min(48, len(candidates)), device="cuda").long()]
    blocked = (
        T[None] > rows[:, None] if case.causal else torch.zeros(len(rows), case.p, dtype=torch.bool, device="cuda")
    )

    def attend(dtype: torch.dtype) -> Tensor:
        heads = []
        for h in range(HEADS):
            keys, values = (x[0, h * KV_HEADS // HEADS, T].to(dtype) for x in (k, v))
            logits = q[0, h, rows].to(dtype) @ keys.T * case.D**-0.5
            heads.append(logits.masked_fill(blocked, -torch.inf).softmax(dim=-1).masked_fill(blocked, 0) @ values)
        return torch.stack(heads).double()

    exact = attend(torch.float64)
    error, baseline = (float((x.double() - exact).abs().max()) for x in (out[0][:, rows], attend(out.dtype)))
    allowed = 2 * baseline + torch.finfo(out.dtype).eps * float(exact.abs().max())
    assert error <= allowed, f"{case}: largest error {error:.3e}, allowed {allowed:.3e}"
    if not case.all_queries:
        outside = torch.ones(case.N, dtype=torch.bool, device="cuda").index_fill(0, T, False)
        assert not bool(out[0][:, outside].any()), f"{case}: rows outside the selection are not 0"


def milliseconds(function: Callable[[], Any], graphed: bool) -> dict[str, float]:
    """Median and 20% and 80% quantiles; ``graphed`` replays a CUDA graph, without the launch from Python."""
    from triton import testing

    quantiles = [0.5, 0.2, 0.8]
    if graphed:
        median, low, high = testing.do_bench_cudagraph(function, rep=60, quantiles=quantiles)
    else:
        median, low, high = testing.do_bench(function, warmup=50, rep=200, quantiles=quantiles)
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def dense_peers(case: Case) -> dict[str, Callable[[], Any]]:
    """Dense attention of the same heads, by name, as far as this installation has it."""
    q, k, v = make_inputs(case.peer_tokens, case.D)

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True)

        return call

    peers = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "fa2": sdpa(SDPBackend.FLASH_ATTENTION)}
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return peers
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    return peers | {"fa4": lambda: flash_attn_func(*rows, causal=case.causal)}


def flop_bound() -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    a, b = torch.randn(2, BOUND_SIZE, BOUND_SIZE, device="cuda").bfloat16()
    return 2 * BOUND_SIZE**3 / milliseconds(lambda: a @ b, graphed=False)["median_ms"] / 1e9


def measure(case: Case) -> dict[str, dict[str, float]]:
    q, k, v = make_inputs(case.N, case.D)
    index, count = make_selection(case.N, case.p)

    def sparse() -> Tensor:
        return ops.sparse_attn(q, k, v, index, count, causal=case.causal, all_queries=case.all_queries)

    graphed = case.p <= LARGEST_GRAPHED
    with kernel_family(case.force_sm80), torch.inference_mode():
        check_against_reference(sparse(), q, k, v, index, case)
        times = {"zipvl": milliseconds(sparse, graphed)}
        for name, peer in dense_peers(case).items():
            try:
                times[name] = milliseconds(peer, graphed)
            except RuntimeError:
                continue  # this build of torch does not have the backend, or not for this head dim
    return times


def row_of(case: Case, times: dict[str, dict[str, float]], bound: float) -> list[str]:
    median = {name: time["median_ms"] for name, time in times.items()}

    def cell(value: float | None, digits: int, goal: float | None = None) -> str:
        text = "-" if value is None else f"{value:.{digits}f}"
        return text if goal is None else f"{text} ({goal:.{digits}f})"

    def ratio(name: str) -> float | None:
        return median["zipvl"] / median[name] if name in median else None

    tflops = case.flops / median["zipvl"] / 1e9
    return [
        f"{case.N:,}",
        f"{case.p / case.N:.3g}",
        f"{case.p:,}",
        case.label,
        cell(median["zipvl"], 3),
        *(cell(median.get(name), 3) for name in ("cudnn", "fa2", "fa4")),
        cell(ratio("cudnn"), 2, case.goal_ratio),
        cell(ratio("fa2"), 2),
        cell(tflops, 0, case.goal_tflops),
        cell(tflops / bound, 2),
    ]


def main(
    part: Annotated[list[Part] | None, typer.Option(help="Which rows; may be repeated. [all]")] = None,
    record: Annotated[bool, typer.Option(help="Append to benchmarks/results/sparse_attn.jsonl.")] = True,
) -> None:
    """Times sparse_attn in bfloat16 with 28 query and 4 key/value heads on this machine's GPU; goals in brackets."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    bound = flop_bound()
    table = Table(
        title=f"{torch.cuda.get_device_name()}, bfloat16, {HEADS}/{KV_HEADS} heads, bound {bound:.0f} TFLOP/s"
    )
    for column in ("N", "r", "p", "", "sparse_attn ms", "cuDNN ms", "FA2 ms", "FA4 ms", "/ cuDNN", "/ FA2", "TFLOP/s",
                   "of bound"):  # fmt: skip
        table.add_column(column, justify="left" if column == "" else "right")
    console = Console(width=160)
    for chosen in part or list(Part):
        for case in CASES[chosen]:
            times = measure(case)
            table.add_row(*row_of(case, times, bound))
            if record:
                payload = {
                    "part": chosen.value,
                    "case": asdict(case),
                    "heads": [HEADS, KV_HEADS],
                    "dtype": "bfloat16",
                    "times": times,
                    "tflops": case.flops / times["zipvl"]["median_ms"] / 1e9,
                    "bound_tflops": bound,
                }
                _record.append("sparse_attn", payload, device="cuda")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
