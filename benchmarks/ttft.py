"""Time to first token of a Qwen2-7B-shaped model on a GPU: Table E of the paper, extended.

``python -m benchmarks.ttft`` builds LongVA-7B's language model with random weights through transformers and adds
ZipVL's parts to dense attention one after the other: the estimate first, its result thrown away, then sparse attention
under imposed ratios, which uses it. ``--window`` adds rows in which every token attends to those right before it and to
the first four as well, ``--chunk`` the same prompts in chunks. Every row is the same model on the same tokens in one
process, runs interleaved; the last token's logits are computed, and a cache is kept, as ``generate()`` does.
``--smoke``: a tiny shape on the CPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import zipvl
from benchmarks import _record
from benchmarks._models import QWEN2_7B, SMOKE, Shape, build
from zipvl import ops

LENGTHS = (4096, 8192, 32768, 65536, 131072)
RATIOS = (0.25, 0.48, 0.5)
REPEATS = {4096: 5, 8192: 4, 32768: 2}  # beyond: once. A dense forward of 131,072 tokens takes ten seconds
PROBES = 128
PAPER_TOKENS = 32768  # what the paper's times here are of
# transformers, which must not look while a graph is traced, gives compiled SDPA a mask where nothing is padded:
# 2,247 ms to a first token behind 32,768 on an H200, 1,077 without.
NO_MASK = {"full_attention": None}
CUDNN = "aten::_scaled_dot_product_cudnn_attention"
SINKS = 4  # beside a window
TAU = 0.975  # of the estimate whose result is thrown away: with a ratio there is no budget to find


@dataclass(frozen=True)
class Method:
    """One row: what runs in the attention layers.

    Args:
        name: as the paper calls it.
        estimate: probe scores are computed.
        select: tokens are selected.
        ratio: attention runs among that share of the tokens; None: among all, and nothing uses the estimate.
        skip: projections of other tokens are not computed either.
        window: tokens right before each that it attends to whatever is selected, and with them the first four; 0: none.
        chunk: tokens of a forward, each selecting for itself among all so far; None: the prompt is one forward.
        skip_mlp: layers whose MLP runs for the selected tokens alone.
        paper_seconds: the paper's figure at 32,768 tokens on its own hardware, as far as it is known here.
    """

    name: str
    estimate: bool = False
    select: bool = False
    ratio: float | None = None
    skip: bool = False
    window: int = 0
    chunk: int | None = None
    skip_mlp: tuple[int, ...] = ()
    paper_seconds: float | None = None

    def flops(self, shape: Shape, tokens: int) -> float:
        """Of the products of one forward without chunks; selection has none."""
        rows = tokens if self.ratio is None else -int(-self.ratio * tokens // 1)
        rows = min(rows + self.window, tokens) if self.ratio is not None else rows
        projected = rows + PROBES if self.skip else tokens
        through_mlps = (shape.layers - len(self.skip_mlp)) * tokens + len(self.skip_mlp) * rows
        width = shape.heads * shape.head_dim
        keys_values = 2 * shape.kv_heads * shape.head_dim
        linear = tokens * shape.hidden * keys_values + 2 * projected * shape.hidden * width
        mlps = through_mlps * shape.hidden * 3 * shape.mlp
        attention = 2 * width * (rows * rows / 2 + (tokens - rows) * self.window)  # causal
        estimate = 2 * width * PROBES * tokens if self.estimate else 0  # two passes of scores alone
        return 2 * (shape.layers * (linear + attention + estimate) + mlps + shape.hidden * shape.vocab)


# The paper's estimate takes 0.45 s beside 3.28 s; its rows in between are not known here.
ORIGINAL = Method("original", paper_seconds=3.28)
ESTIMATES = (
    Method("+ approximate attention", estimate=True),
    # One kernel does the paper's two rows "+ sort and cumsum" and "+ normalise and top-k".
    Method("+ sort and cumsum, normalise and top-k", estimate=True, select=True, paper_seconds=3.28 + 0.45),
)


def methods(
    ratios: tuple[float, ...],
    windows: tuple[int, ...] = (),
    chunk: int | None = None,
    skip_mlp: tuple[int, ...] = (),
) -> list[Method]:
    """All rows: the estimates once, what uses them for each ratio.

    Args:
        ratios: imposed ones.
        windows: of further rows, after those without a window.
        chunk: tokens of the chunks of further rows with each window; None: no such rows.
        skip_mlp: layers of further rows, whose MLPs run for the selected tokens alone; none: no such rows.
    """
    sparse = (row for ratio in ratios for row in _sparse_rows(ratio, windows, chunk, skip_mlp))
    return [ORIGINAL, *ESTIMATES, *sparse]


def _sparse_rows(
    ratio: float, windows: tuple[int, ...], chunk: int | None, skip_mlp: tuple[int, ...]
) -> Iterator[Method]:
    plain = Method("+ sparse attention", estimate=True, select=True, ratio=ratio)
    yield plain
    yield replace(plain, name="+ skipped projections", skip=True)
    if skip_mlp:
        yield replace(plain, name="+ skipped MLPs", skip=True, skip_mlp=skip_mlp)
    for window in windows:
        name = f"sparse attention, window {window}"
        yield replace(plain, name=name, window=window)
        if chunk:
            yield replace(plain, name=f"{name}, chunks of {chunk:,}", window=window, chunk=chunk)
        if skip_mlp:
            yield replace(plain, name=f"+ skipped MLPs, window {window}", window=window, skip_mlp=skip_mlp)


def read_layers(text: str, layers: int) -> tuple[int, ...]:
    """Layers by number, ``1,3,5``; ``half``: every second one of ``layers``, the first not among them.

    Raises:
        typer.BadParameter: it is neither, or names a layer that is not there.
    """
    if text == "half":
        return tuple(range(1, layers, 2))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < layers for part in parts):
        raise typer.BadParameter(f'--skip-mlp takes "half" or layers below {layers} such as 1,3,5, got {text!r}')
    return tuple(map(int, parts))


def _dense_after(method: Method) -> Callable[..., Any]:
    """Dense attention after ``method``'s estimate, whose result is not used."""

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        accumulated, normalized = ops.probe_scores(q, k, ops.probe_index(q))
        if method.select:
            ops.select_tokens(accumulated, normalized, tau=TAU)
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    return attention


@contextmanager
def applied(model: Qwen2ForCausalLM, method: Method) -> Iterator[None]:
    """``method`` in force on ``model``; everything dense inside runs on cuDNN where there is a GPU."""
    with ExitStack() as stack:
        if model.device.type == "cuda":
            stack.enter_context(sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
        if method.ratio is not None:
            config = zipvl.ZipVLConfig.paper(
                ratio=method.ratio,
                skip_projections=method.skip,
                skip_mlp_layers=method.skip_mlp,
                local_window=method.window,
                num_sinks=SINKS if method.window else 0,
                cache="full" if method.window else "drop",
            )
            stack.enter_context(zipvl.sparse(model, config))
        elif method.estimate:
            name = f"zipvl_benchmark_{'select' if method.select else 'estimate'}"
            AttentionInterface.register(name, _dense_after(method))
            model.set_attn_implementation(name)
            stack.callback(model.set_attn_implementation, "sdpa")
        yield


@dataclass
class Run:
    """What one forward took."""

    seconds: float
    peak_bytes: int | None  # beyond the weights; None on the CPU


def run_once(model: Qwen2ForCausalLM, forward: Callable[..., Any], tokens: Tensor, method: Method) -> Run:
    """One forward of ``tokens [1, N]`` to the last token's logits and a cache."""
    on_gpu = tokens.is_cuda
    before = 0
    with applied(model, method), torch.inference_mode():
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        mask = NO_MASK if method.ratio is None else None
        cache = None
        for chunk in tokens.split(method.chunk or tokens.shape[1], dim=1):
            output = forward(chunk, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert bool(output.logits.isfinite().all()), f"{method.name}: logits are not finite"
    return Run(seconds, torch.cuda.max_memory_allocated() - before if on_gpu else None)


def attention_ops(run: Callable[[], Any]) -> list[str]:
    """PyTorch's dense attention operators that ``run`` calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return sorted({event.key for event in profiled.key_averages() if "::_scaled_dot_product_" in event.key})


def warm_up(model: Qwen2ForCausalLM, forward: Callable[..., Any], tokens: Tensor, rows: list[Method]) -> None:
    """Each row once, so that lengths which run once do not pay for libraries (a second, with cuDNN's) and compilation.

    Raises:
        RuntimeError: on a GPU the original did not run on cuDNN's attention.
    """
    for method in rows:
        run_once(model, forward, tokens, method)
    called = attention_ops(lambda: run_once(model, forward, tokens, ORIGINAL))
    if tokens.is_cuda and called != [CUDNN]:
        raise RuntimeError(f"benchmarks.ttft: expected the original to call {CUDNN} alone, it called {called}")


def measure(
    model: Qwen2ForCausalLM, forward: Callable[..., Any], tokens: Tensor, rows: list[Method]
) -> dict[Method, list[Run]]:
    """Runs of each row, interleaved, after one of each that is not counted where there are several.

    The original comes last: what else a first forward of a length costs falls on the others.

    Args:
        model: whose attention is exchanged.
        forward: ``model``, or what it was compiled to.
        tokens: ``[1, N]``.
        rows: what to run.
    """
    repeats = REPEATS.get(tokens.shape[1], 1)
    found: dict[Method, list[Run]] = {method: [] for method in rows}
    for number in range(repeats + (repeats > 1)):
        for method in reversed(rows):
            run = run_once(model, forward, tokens, method)
            if number or repeats == 1:
                found[method].append(run)
    return found


def table_of(title: str, lengths: dict[int, dict[Method, list[Run]]], shape: Shape) -> Table:
    """For each length its rows: time, how many times as fast as the original, FLOPs, memory, the paper's time."""
    table = Table(title=title)
    for head in ("tokens", "", "ratio", "ms", "original / this", "PFLOP", "peak GiB", "paper, 32,768 tokens"):
        table.add_column(head, justify="left" if head == "" else "right")
    for tokens, found in lengths.items():
        original = statistics.median(run.seconds for run in found[ORIGINAL])
        for method, runs in found.items():
            seconds, peak = statistics.median(run.seconds for run in runs), runs[-1].peak_bytes
            paper = method.paper_seconds if tokens == PAPER_TOKENS else None
            table.add_row(
                f"{tokens:,}",
                method.name,
                f"{method.ratio or ''}",
                f"{1e3 * seconds:,.1f}",
                f"{original / seconds:.3f}x",
                f"{method.flops(shape, tokens) / 1e15:.3f}",
                "-" if peak is None else f"{peak / 2**30:.2f}",
                "" if paper is None else f"{1e3 * paper:,.0f} ms",
            )
        table.add_section()
    return table


def record(shape: Shape, tokens: int, compiled: bool, found: dict[Method, list[Run]], device: str) -> None:
    """Appends one length's rows to benchmarks/results/ttft.jsonl."""
    rows = [
        asdict(method)
        | {
            "seconds": statistics.median(run.seconds for run in runs),
            "runs": [run.seconds for run in runs],
            "flops": method.flops(shape, tokens),
            "peak_bytes": runs[-1].peak_bytes,
        }
        for method, runs in found.items()
    ]
    payload = {"shape": asdict(shape), "tokens": tokens, "compiled": compiled, "dtype": "bfloat16", "rows": rows}
    _record.append("ttft", payload, device=device)


def main(
    length: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated. [4096 to 131072]")] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Imposed ratio; may be repeated. [0.25, 0.48, 0.5]")] = None,
    window: Annotated[list[int] | None, typer.Option(help="Rows with such a window and a full cache.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Those rows in chunks of so many tokens too.")] = None,
    skip_mlp: Annotated[
        str, typer.Option(help='Layers whose MLPs run for selected tokens alone, in further rows: "half" or "1,3,5".')
    ] = "",
    eager: Annotated[bool, typer.Option(help="Measure the model as it stands.")] = True,
    compiled: Annotated[bool, typer.Option(help="Measure torch.compile(fullgraph=True), the first ratio.")] = False,
    smoke: Annotated[bool, typer.Option(help="A tiny shape, on the CPU, not recorded.")] = False,
    save: Annotated[bool, typer.Option("--record/--no-record", help="Append to benchmarks/results/ttft.jsonl.")] = True,
) -> None:
    """Times the prefill of a Qwen2-7B-shaped model with random weights, bfloat16, against the same on cuDNN."""
    device = "cpu" if smoke else "cuda"
    if not smoke and not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs a CUDA device (or --smoke)")
    shape = SMOKE if smoke else QWEN2_7B
    skipped = read_layers(skip_mlp, shape.layers) if skip_mlp else ()
    lengths = sorted(length or ((512, 1024) if smoke else LENGTHS))
    ratios = tuple(ratio or RATIOS)
    model = build(shape, lengths[-1], device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, shape.vocab, (1, lengths[-1]), generator=generator).to(device)
    console = Console(width=130)
    for compile_it in (False,) * eager + (True,) * compiled:
        rows = methods(ratios[:1] if compile_it else ratios, tuple(window or ()), chunk, skipped)
        rows = [ORIGINAL, *rows[3:]] if compile_it else rows
        found = {}
        forward = torch.compile(model, fullgraph=True, dynamic=True) if compile_it else model
        warm_up(model, forward, prompt[:, : lengths[0]], rows)
        for tokens in lengths:
            found[tokens] = measure(model, forward, prompt[:, :tokens], rows)
            if save and not smoke:
                record(shape, tokens, compile_it, found[tokens], device)
            gc.collect()
        where = "CPU" if smoke else torch.cuda.get_device_name()
        how = "compiled" if compile_it else "eager"
        console.print(table_of(f"Time to first token, {how}, against cuDNN attention ({where})", found, shape))


if __name__ == "__main__":
    typer.run(main)
