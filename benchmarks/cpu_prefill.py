"""Prefill attention of one layer on the CPU: zipvl_attn against dense attention, and where its time goes.

``python -m benchmarks.cpu_prefill``. Both run on the same inputs in the same process, in turns, so that a change of the
machine's speed meets both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import _record
from zipvl import ops, reference

Spread = dict[str, float]


def make_inputs(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal float32 q, k, v ``[1, H, N, D]`` as a model passes them: transposed views of ``[1, N, H, D]``."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, H, head_dim, generator=generator) for H in (heads, kv_heads, kv_heads))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def check_against_reference(heads: int, kv_heads: int, head_dim: int, ratio: float) -> None:
    """A small layer must come out as the float64 reference says, or nothing is timed."""
    q, k, v = make_inputs(200, heads, kv_heads, head_dim)
    out, index, count = ops.zipvl_attn(q, k, v, ratio=ratio)
    _, _, expected_count = reference.zipvl_attn(q, k, v, ratio=ratio)
    expected = reference.sparse_attn(q.double(), k.double(), v.double(), index, count)
    assert torch.equal(count, expected_count), f"count is {count.tolist()}, expected {expected_count.tolist()}"
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def measure_in_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Spread]:
    """Milliseconds of each function, after one warm-up each; every round runs all of them once."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: _spread([1e3 * s for s in taken]) for name, taken in seconds.items()}


def _spread(milliseconds: list[float]) -> Spread:
    low, _, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return {"median_ms": statistics.median(milliseconds), "low_quartile_ms": low, "high_quartile_ms": high}


def measure(q: Tensor, k: Tensor, v: Tensor, ratio: float, repeats: int) -> dict[str, Spread]:
    """Dense attention, the whole of zipvl_attn, and its stages one by one on what the stage before gave."""
    probes = ops.probe_index(q)
    scores = ops.probe_scores(q, k, probes)
    index, count = ops.select_tokens(*scores, ratio=ratio)
    return measure_in_turns(
        {
            "dense": lambda: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            ),
            "zipvl_attn": lambda: ops.zipvl_attn(q, k, v, ratio=ratio),
            "probe": lambda: ops.probe_scores(q, k, ops.probe_index(q)),
            "select": lambda: ops.select_tokens(*scores, ratio=ratio),
            "attend": lambda: ops.sparse_attn(q, k, v, index, count),
        },
        repeats,
    )


STAGES = {
    "dense": "dense scaled_dot_product_attention",
    "zipvl_attn": "zipvl_attn",
    "probe": "  probe_index + probe_scores",
    "select": "  select_tokens",
    "attend": "  sparse_attn",
}


def as_table(title: str, times: dict[str, Spread]) -> Table:
    table = Table("", "median ms", "quartiles ms", "of dense", title=title)
    for name, label in STAGES.items():
        spread = times[name]
        share = spread["median_ms"] / times["dense"]["median_ms"]
        quartiles = f"{spread['low_quartile_ms']:.1f} - {spread['high_quartile_ms']:.1f}"
        table.add_row(label, f"{spread['median_ms']:.1f}", quartiles, f"{share:.3f}")
    return table


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 28,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="Head dim.")] = 128,
    ratio: Annotated[list[float] | None, typer.Option(help="Share of tokens kept; may be repeated. [0.25]")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each function.")] = 7,
    record: Annotated[bool, typer.Option(help="Append to benchmarks/results/cpu_prefill.jsonl.")] = True,
) -> None:
    """Times one causal float32 attention layer, dense and with zipvl, on this machine's CPU."""
    console = Console()
    q, k, v = make_inputs(tokens, heads, kv_heads, head_dim)
    for share in ratio or [0.25]:
        check_against_reference(heads, kv_heads, head_dim, share)
        times = measure(q, k, v, share, repeats)
        speedup = times["dense"]["median_ms"] / times["zipvl_attn"]["median_ms"]
        console.print(as_table(f"{tokens} tokens, {heads}/{kv_heads} heads, D {head_dim}, ratio {share}", times))
        console.print(f"zipvl_attn is {speedup:.2f} times as fast as dense attention")
        if record:
            payload = {
                "shape": {"B": 1, "Hq": heads, "Hkv": kv_heads, "N": tokens, "D": head_dim},
                "dtype": "float32",
                "causal": True,
                "ratio": share,
                "repeats": repeats,
                "times": times,
                "speedup": speedup,
            }
            console.print(f"recorded in {_record.append('cpu_prefill', payload)}")


if __name__ == "__main__":
    typer.run(main)
