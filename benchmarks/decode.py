"""Attention of a decoding step on a GPU, full precision and quantised, against its bound and its peers.

``python -m benchmarks.decode``. Times are replays of a CUDA graph of many calls, whose caches are rotated so that they
do not stay in the second-level cache; peers (``scaled_dot_product_attention`` over cuDNN and FlashAttention-2) run in
the same process on the same inputs. The bound is the cache's bytes at the rate of a copy (read and written) of the same
run: a kernel that only reads can pass it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import _record
from benchmarks.probe_select import measure_ceilings, rotations, time_calls
from zipvl import ops, reference, reference_cache

RATIO = 0.25  # of the tokens at 4 bits, the others at 2
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """One layer's cache, bfloat16, 28/4 heads (LongVA-7B's)."""

    B: int
    S: int
    Hq: int = 28
    Hkv: int = 4
    D: int = 128

    @property
    def bytes(self) -> int:
        return self.B * self.Hkv * self.S * self.D * 4


SHAPES = [Shape(1, 8192), Shape(1, 32768), Shape(1, 131072), Shape(32, 8192)]
QUANTIZED = [Shape(1, 8192), Shape(1, 32768), Shape(1, 131072)]


def make(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(shape.B, H, N, shape.D, device="cuda", dtype=torch.bfloat16)
        for H, N in ((shape.Hq, 1), (shape.Hkv, shape.S), (shape.Hkv, shape.S))
    )
    return q, k, v


def lengths_of(shape: Shape) -> Tensor:
    return torch.full((shape.B,), shape.S, dtype=torch.int32, device="cuda")


def share_of_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The op's largest error against float64 over that of the same attention in PyTorch in q's dtype; row 0."""
    tokens = torch.tensor([k.shape[2]], dtype=torch.int32)
    exact, _ = reference.decode_attn(q[:1].double(), k[:1].double(), v[:1].double(), tokens)
    keys, values = (t[:1].to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    torchs = (q[:1] @ keys.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1) @ values
    ours, theirs = (float((x[:1].double() - exact).abs().max()) for x in (out, torchs))
    return ours / theirs


def full(shape: Shape) -> dict[str, Any]:
    """decode_attn and its peers over a cache in full precision."""
    caches = [make(shape) for _ in range(rotations(shape.bytes))]
    lengths = lengths_of(shape)
    calls: list[Callable[[], Any]] = [partial(ops.decode_attn, *cache, lengths) for cache in caches]
    out, _ = ops.decode_attn(*caches[0], lengths)
    peers = {}
    for name, backend in PEERS.items():
        with sdpa_kernel(backend):
            theirs = [partial(F.scaled_dot_product_attention, *cache, enable_gqa=True) for cache in caches]
            try:
                peers[name] = time_calls(theirs).median
            except RuntimeError:  # this backend does not take the shape
                continue
    return {
        "op": "decode_attn",
        "shape": asdict(shape),
        "bytes": shape.bytes,
        "us": time_calls(calls).median,
        "error": share_of_error(out, *caches[0]),
        "peers": peers,
    }


def quantized(shape: Shape) -> dict[str, Any]:
    """quantize_kv, and decode_attn_quantized with 100 recent tokens, a quarter of the tokens selected."""
    q, k, v = make(shape)
    scores = torch.rand(shape.B, shape.S, device="cuda")
    selection = ops.select_tokens(scores, scores, ratio=RATIO)
    made = ops.quantize_kv(k, v, *selection)
    recent: dict[str, Any] = {
        "k_recent": k[:, :, :100],
        "v_recent": v[:, :, :100],
        "recent_lengths": lengths_of(shape).clamp(max=100),
    }
    blocks = [int(made[i].sum()) for i in (1, 3)]
    stored = shape.Hkv * sum(
        n * reference_cache.block_bytes(shape.D, bits, k.dtype)
        for n, bits in zip(blocks, ((4, 4), (4, 2)), strict=True)
    )
    copies = [tuple(t.clone() for t in made) for _ in range(rotations(stored))]
    calls: list[Callable[[], Any]] = [partial(ops.decode_attn_quantized, q, *copy, **recent) for copy in copies]
    held = (
        [
            reference_cache.dequantize_kv(made[i].cpu(), made[i + 1].cpu(), made[4].cpu(), bits=bits, dtype=k.dtype)[0]
            for i, bits in ((0, (4, 4)), (2, (4, 2)))
        ]
        if shape.S <= 8192
        else []
    )
    error = None
    if held:
        keys, values = (
            torch.cat([*(h[part].cuda() for h in held), full_part[0, :, :100].float()], dim=1)[None]
            for part, full_part in ((0, k), (1, v))
        )
        error = share_of_error(calls[0]()[0], q, keys, values)
    return {
        "op": "decode_attn_quantized",
        "shape": asdict(shape),
        "bytes": stored,
        "share_of_full": stored / shape.bytes,
        "us": time_calls(calls).median,
        "error": error,
        "quantize_us": time_calls([partial(ops.quantize_kv, k, v, *selection)]).median,
        "peers": {},
    }


def show(console: Console, rows: list[dict[str, Any]], rate: float) -> None:
    table = Table(title=f"copy {rate / 1e12:.2f} TB/s")
    for head in ("op", "B", "S", "us", "bound us", "of copy", "error / PyTorch's", "peers us"):
        table.add_column(head, justify="right")
    for row in rows:
        bound = row["bytes"] / rate * 1e6
        error = "" if row["error"] is None else f"{row['error']:.2f}"
        peers = ", ".join(f"{name} {us:.1f}" for name, us in row["peers"].items())
        shape = row["shape"]
        table.add_row(
            row["op"],
            str(shape["B"]),
            f"{shape['S']:,}",
            f"{row['us']:.1f}",
            f"{bound:.1f}",
            f"{bound / row['us']:.0%}",
            error,
            peers,
        )
    console.print(table)


def main(record: Annotated[bool, typer.Option(help="Append each to benchmarks/results/decode.jsonl.")] = True) -> None:
    """Times every shape, records each as it is done, and prints the table."""
    torch.manual_seed(0)
    rate = measure_ceilings().bytes
    rows = []
    for run, shapes in ((full, SHAPES), (quantized, QUANTIZED)):
        for shape in shapes:
            rows.append(run(shape))
            if record:
                _record.append("decode", {"copy_bytes_per_s": rate, **rows[-1]}, device="cuda")
            torch.cuda.empty_cache()
    show(Console(width=120), rows, rate)


if __name__ == "__main__":
    typer.run(main)
