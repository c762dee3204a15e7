"""A layer from hidden states: ``zipvl_layer`` in one call, against the ops one by one in Python.

The peer is the sequence that attention modules ran before there was the op: keep mask, draw, projection of the probes'
queries, scores, selection, projection of the selected queries, attention, packing for a ``drop`` cache, output
projection. Both run on the same inputs in the same process, and must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import _record
from benchmarks.layer import HEAD_DIM, HEADS, KV_HEADS, graph_us, host_us
from zipvl import ops

WIDTH = HEADS * HEAD_DIM
LENGTHS = (2048, 4096, 8192, 32768)


def make_inputs(tokens: int) -> dict[str, Tensor]:
    """The layer's input, weights and tables, and its keys and values, in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()

    angle = torch.randn(1, tokens, HEAD_DIM // 2, generator=generator, device="cuda").repeat(1, 1, 2)
    k, v = (normal(1, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2) for _ in range(2))
    return {
        "k": k,
        "v": v,
        "hidden": normal(1, tokens, WIDTH),
        "q_weight": normal(WIDTH, WIDTH, scale=WIDTH**-0.5),
        "q_bias": normal(WIDTH),
        "cos": angle.cos().bfloat16(),
        "sin": angle.sin().bfloat16(),
        "o_weight": normal(WIDTH, WIDTH, scale=WIDTH**-0.5),
    }


def in_one_call(given: dict[str, Tensor], ratio: float) -> tuple[Tensor, ...]:
    return ops.zipvl_layer(None, **given, ratio=ratio, pack=True)


def one_by_one(given: dict[str, Tensor], ratio: float) -> tuple[Tensor, ...]:
    k, v, x = given["k"], given["v"], given["hidden"]
    tokens = k.shape[2]

    def queries(index: Tensor, count: Tensor | None = None) -> Tensor:
        return ops.project_queries(x, given["q_weight"], given["q_bias"], given["cos"], given["sin"], index, count)

    keep = (torch.arange(tokens, device="cuda") >= tokens - 1).expand(1, tokens)
    probes = ops.probe_index(k)
    index, count = ops.select_tokens(*ops.probe_scores(queries(probes), k, probes), ratio=ratio, keep_mask=keep)
    out = ops.sparse_attn(queries(index, count), k, v, index, count)
    packed = ops.pack_kv(k, v, index, count)
    return ops.project_outputs(out.transpose(1, 2).flatten(2), given["o_weight"], index, count), index, count, *packed


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory at once beside what was there, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = function()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def measure(tokens: int, ratio: float) -> dict[str, Any]:
    given = make_inputs(tokens)
    with torch.inference_mode():
        kept = int(in_one_call(given, ratio)[2][0])
        for number, (ours, theirs) in enumerate(zip(in_one_call(given, ratio), one_by_one(given, ratio), strict=True)):
            rows = slice(None) if number < 3 else slice(kept)
            assert torch.equal(
                ours[..., rows, :] if number > 2 else ours, theirs[..., rows, :] if number > 2 else theirs
            )
        calls = {"zipvl_layer": lambda: in_one_call(given, ratio), "ops": lambda: one_by_one(given, ratio)}
        return {
            "tokens": tokens,
            "ratio": ratio,
            "graph": {name: graph_us(call) for name, call in calls.items()},
            "host_us": {name: host_us(call, 5) for name, call in calls.items()},
            "peak_bytes": {name: peak_bytes(call) for name, call in calls.items()},
        }


def main(
    ratio: Annotated[float, typer.Option(help="Share of the tokens that are kept.")] = 0.25,
    record: Annotated[bool, typer.Option(help="Append to benchmarks/results/hidden_layer.jsonl.")] = True,
) -> None:
    """Times a layer from hidden states on this machine's GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device")
    table = Table(title=f"{torch.cuda.get_device_name()}, bfloat16, {HEADS}/{KV_HEADS} heads, D {HEAD_DIM}, r {ratio}")
    for column in ("N", "zipvl_layer us", "ops us", "host us", "ops", "peak MiB", "ops"):
        table.add_column(column, justify="right")
    rows = [measure(tokens, ratio) for tokens in LENGTHS]
    for row in rows:
        times = [row["graph"][name]["us"] for name in ("zipvl_layer", "ops")]
        host = [row["host_us"][name] for name in ("zipvl_layer", "ops")]
        peak = [row["peak_bytes"][name] / 2**20 for name in ("zipvl_layer", "ops")]
        table.add_row(f"{row['tokens']:,}", *(f"{x:.1f}" for x in (*times, *host, *peak)))
    if record:
        shape = {"B": 1, "Hq": HEADS, "Hkv": KV_HEADS, "D": HEAD_DIM, "C": WIDTH, "dtype": "bfloat16"}
        _record.append("hidden_layer", {"shape": shape, "rows": rows}, device="cuda")
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
