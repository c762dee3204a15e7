"""Decoding behind a long prompt: tokens per second and memory, dense against ZipVL's caches.

``python -m benchmarks.generation`` builds LongVA-7B's language model with random weights, runs a prompt of 64K tokens
at an imposed ratio, and times decode steps at each batch size. ``dense`` is what transformers does: a ``DynamicCache``
and SDPA, cuDNN for the prompt and torch's own choice for the steps, because cuDNN plans anew for every length.
``full``, ``drop`` and ``quantize`` are a ``ZipVLCache``, step by step and as a ``DecodeGraph``; ``full`` holds every
token, so as a graph it is the best that dense decoding could be. The rows of a batch are copies of one prompt's cache,
which saves prefills and changes neither bytes nor time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import zipvl
from benchmarks import _record
from benchmarks._models import QWEN2_7B, SMOKE, build
from zipvl.transformers import DecodeGraph

METHODS = ("dense", "full", "drop", "quantize")
WARM_STEPS = 2
NEW_TOKENS = 512
PREFILL_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
MARGIN = 1.1  # between the batch computed and those tried: a step needs memory beside the cache


@contextmanager
def applied(model: Any, method: str, ratio: float) -> Iterator[None]:
    """``method`` in force on ``model``."""
    settings: Any = {"ratio": ratio, "cache": method}
    with nullcontext() if method == "dense" else zipvl.sparse(model, zipvl.ZipVLConfig.paper(**settings)):
        yield


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated(peak: bool = False) -> int:
    """Bytes of device memory in use, or the most since the last ``reset_peak_memory_stats``; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def prefill(model: Any, ids: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """The cache of one prompt, and its time and memory; an eighth of the prompt warms up."""
    with sdpa_kernel(PREFILL_KERNELS, set_priority=True):
        model(ids[:, : ids.shape[1] // 8], use_cache=True, logits_to_keep=1)
    gc.collect()
    before = allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = time.perf_counter()
    with sdpa_kernel(PREFILL_KERNELS, set_priority=True):
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    synchronize()
    return cache, {
        "prefill_s": time.perf_counter() - start,
        "bytes_after_prefill": allocated() - before,
        "peak_bytes": allocated(peak=True) - before,
    }


def time_steps(step: Any, batch: int, steps: int, device: str) -> float:
    """Seconds of one decode step, mean over ``steps`` after a few to warm up."""
    token = torch.full((batch, 1), 5, device=device)
    for _ in range(WARM_STEPS):
        step(token)
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step(token)
    synchronize()
    return (time.perf_counter() - start) / steps


def decode(model: Any, cache: Any, method: str, batch: int, steps: int, device: str) -> dict[str, float]:
    """Tokens per second of ``batch`` rows, by Python and, where that is possible, by a replayed graph."""
    seconds = time_steps(lambda token: model(token, past_key_values=cache, use_cache=True), batch, steps, device)
    found = {"step_ms": 1e3 * seconds, "tokens_per_s": batch / seconds}
    if method != "dense" and device == "cuda":
        graph = DecodeGraph(model, cache, steps=steps + WARM_STEPS)
        seconds = time_steps(graph, batch, steps, device)
        found |= {"graph_step_ms": 1e3 * seconds, "graph_tokens_per_s": batch / seconds}
    return found


def largest_batch(weights: int, row: int) -> int:
    """Rows of ``row`` bytes that fit beside ``weights``; ``row`` counts the cache and what a step needs beside it."""
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    return max(total - weights, 0) // max(row, 1)


def fits(model: Any, cache: Any, batch: int) -> bool:
    """Whether one step of ``batch`` rows fits, their cache being copies of ``cache``'s first row."""
    cache.batch_select_indices(torch.zeros(1, dtype=torch.int64, device="cuda"))
    torch.cuda.empty_cache()
    try:
        cache.batch_repeat_interleave(batch)
        model(torch.full((batch, 1), 5, device="cuda"), past_key_values=cache, use_cache=True)
        synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def verify(model: Any, cache: Any, batch: int) -> dict[str, Any]:
    """One step at a tenth less than the computed ``batch``, which must fit, and at a tenth more, which must not."""
    few, many = int(batch / MARGIN), int(batch * MARGIN) + 1
    return {
        "fits": few,
        "does": fits(model, cache, few),
        "does_not_fit": many,
        "does_not": not fits(model, cache, many),
    }


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
@torch.inference_mode()
def main(
    prompt: int = 65536,
    steps: Annotated[int, typer.Option(help="Decode steps timed, of the 512 that the memory is reckoned for.")] = 16,
    ratio: float = 0.25,
    batches: str = "1,8",
    methods: str = ",".join(METHODS),
    check_batch: Annotated[bool, typer.Option(help="Run dense at the largest batch and beyond it.")] = True,
    smoke: Annotated[bool, typer.Option(help="A tiny model, nothing recorded.")] = False,
) -> None:
    """Measures, prints a table, and on a GPU appends a line a method to benchmarks/results/generation.jsonl."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SMOKE if smoke else QWEN2_7B
    model = build(shape, prompt + NEW_TOKENS, device)
    weights = allocated()
    ids = torch.randint(shape.vocab, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * next(model.parameters()).element_size()
    rows: list[dict[str, Any]] = []
    for method in methods.split(","):
        with applied(model, method, ratio):
            cache, row = prefill(model, ids)
            row = {"method": method, **row, "share_of_full": row["bytes_after_prefill"] / (prompt * token_bytes)}
            sizes = [int(batch) for batch in batches.split(",")]
            for before, batch in zip([1, *sizes], sizes, strict=False):
                cache.batch_repeat_interleave(batch // before)
                row[f"batch_{batch}"] = decode(model, cache, method, batch, steps, device)
            row["largest_batch"] = largest_batch(weights, row["bytes_after_prefill"] + NEW_TOKENS * token_bytes)
            if method == "dense" and check_batch and device == "cuda":
                row["verified"] = verify(model, cache, row["largest_batch"])
            del cache
            gc.collect()
        rows.append(row)
        if device == "cuda" and not smoke:
            settings = {"prompt": prompt, "ratio": ratio, "steps": steps, "new_tokens": NEW_TOKENS, "weights": weights}
            _record.append("generation", {**settings, "shape": vars(shape), **row}, device)
    show(rows, batches.split(","))


def show(rows: list[dict[str, Any]], batches: list[str]) -> None:
    """The table, each figure beside dense's."""
    table = Table(
        "cache", "prefill", "bytes after it", "peak", *(f"tokens/s, batch {b}" for b in batches), "largest batch"
    )
    dense = next((row for row in rows if row["method"] == "dense"), None)
    for row in rows:
        cells = []
        for batch in batches:
            here = row[f"batch_{batch}"]
            text = f"{here['tokens_per_s']:.1f}"
            if "graph_tokens_per_s" in here:
                text += f", as a graph {here['graph_tokens_per_s']:.1f}"
            if dense is not None:
                best = here.get("graph_tokens_per_s", here["tokens_per_s"])
                text += f" ({best / dense[f'batch_{batch}']['tokens_per_s']:.2f}x)"
            cells.append(text)
        table.add_row(
            row["method"],
            f"{row['prefill_s']:.3f} s",
            f"{row['bytes_after_prefill'] / 2**20:,.0f} MiB ({row['share_of_full']:.1%})",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            *cells,
            str(row["largest_batch"]),
        )
    Console().print(table)


if __name__ == "__main__":
    app()
