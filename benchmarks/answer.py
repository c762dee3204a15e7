"""Whole answers, from pixels or tokens to the last new token: ``python -m benchmarks.answer``.

``generate()`` of models with random weights in the shape of real ones, greedy, by transformers' default (SDPA and a
dynamic cache), by its static cache compiled (``--static``; compiling is timed apart) and inside ``zipvl.sparse`` at
``--ratio`` with the default's window and sinks, or by the paper's method (``--paper``), the blocks of vision towers
(``--vision-compile``) and decode steps (``--decode-compile``) compiled or not. Runs of the methods are interleaved, and
the median counts. The first token's time is that of an answer of one token; the vision tower's is that of a forward of
it alone. ``--model`` and ``--case`` choose rows. ``--smoke``: a tiny model of each kind, on the CPU too.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import zipvl
from benchmarks import _record
from benchmarks._models import MODELS, Inputs
from zipvl.app.timing import generate, seconds


@dataclass(frozen=True)
class Case:
    """One row: text tokens, pages or frames of a video; rows of the batch; new tokens."""

    prompt: int = 0
    new: int = 128
    batch: int = 1
    pages: int = 0
    frames: int = 0
    repeats: int = 3
    static_peer: bool = False
    """Compared with a compiled static cache, where that is asked for."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        what = f"{self.prompt:,} tokens"
        if self.pages:
            what = f"{self.pages} page{'s' if self.pages > 1 else ''}"
        elif self.frames:
            what = f"video of {self.frames} frames"
        return f"{self.batch} x {what} + {self.new}" if self.batch > 1 else f"{what} + {self.new}"


CASES = {
    "Qwen2-7B": (
        Case(512, static_peer=True),
        Case(4096, static_peer=True),
        Case(4096, new=32),
        Case(4096, new=512, repeats=1),
        Case(16384, repeats=2, static_peer=True),
        Case(32768, repeats=2, static_peer=True),
        Case(131072, repeats=1),
        Case(4096, new=32, batch=8),
        Case(4096, batch=8, repeats=2, static_peer=True),
    ),
    "Qwen2.5-VL-7B": (
        Case(pages=1, static_peer=True),
        Case(pages=4, repeats=2),
        Case(pages=8, repeats=2, static_peer=True),
        Case(pages=32, repeats=1),
        Case(frames=128, repeats=2),
    ),
    "Qwen3-VL-8B": (Case(pages=1, repeats=2), Case(pages=8, repeats=1)),
    "LLaVA-NeXT-7B": (Case(pages=1, repeats=2),),
    "LLaVA-NeXT-13B": (Case(pages=1, repeats=2),),
    "Qwen3-30B-A3B": (Case(32768, new=32, repeats=1), Case(131072, new=32, repeats=1)),
    "Qwen3.5-9B": (Case(32768, new=32, repeats=1),),
}


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    return 1e3 * seconds(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def measure(
    model: Any, inputs: Inputs, case: Case, config: zipvl.ZipVLConfig, static: bool, tower: Any
) -> dict[str, Any]:
    """Times of one case: milliseconds by method; ``out_of_memory``: the method that was."""
    found: dict[str, Any] = {}
    decoded: list[dict[str, Any]] = []

    def method(name: str, new: int) -> None:
        with nullcontext() if name != "zipvl" else zipvl.sparse(model, config) as stats:
            generate(model, inputs, new, **({"cache_implementation": "static"} if name == "static" else {}))
        if stats is not None and new > 1:
            decoded[:] = [stats.decodings[-1].to_dict() | {"active": stats.active, "ratio": stats.mean_ratio}]

    names = ["default", "zipvl", *(["static"] if static and case.static_peer else [])]
    for name in list(names):
        try:
            compiling = timed(lambda name=name: method(name, case.new))  # libraries, allocator, compiler
        except torch.OutOfMemoryError:
            found.setdefault("out_of_memory", []).append(name)
            names.remove(name)
            torch.cuda.empty_cache()
            continue
        if name == "static":
            found["static_first"] = compiling
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(case.repeats):
        for name in names:
            for new in (1, case.new):
                if (name, new) != ("static", 1):
                    times.setdefault((name, new), []).append(timed(lambda name=name, new=new: method(name, new)))
    for (name, new), values in times.items():
        found[f"{name}_first" if new == 1 else name] = statistics.median(values)
    if tower is not None:
        kind = "video" if "video_grid_thw" in inputs else "image"
        pixels = inputs["pixel_values_videos" if kind == "video" else "pixel_values"].to(model.dtype)
        with torch.no_grad():
            for name in ("default", "zipvl"):
                with nullcontext() if name == "default" else zipvl.sparse(model, config):
                    timed(lambda: tower(pixels, grid_thw=inputs[f"{kind}_grid_thw"]))
                    found[f"{name}_vision"] = timed(lambda: tower(pixels, grid_thw=inputs[f"{kind}_grid_thw"]))
    return found | {"decoding": decoded[0] if decoded else None}


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(CASES)}; may be repeated. [all]")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Rows by name, such as '8 pages + 128'. [all]")] = None,
    ratio: Annotated[float, typer.Option(help="share of the tokens kept")] = 0.25,
    static: Annotated[bool, typer.Option(help="compare with transformers' compiled static cache too")] = False,
    paper: Annotated[bool, typer.Option(help="the paper's method, without the default's window")] = False,
    vision_compile: Annotated[bool, typer.Option(help="vision towers' blocks compiled")] = False,
    decode_compile: Annotated[bool, typer.Option(help="captured decode steps compiled")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="of each method. [1 to 3, fewer of long rows]")] = None,
    smoke: Annotated[bool, typer.Option(help="tiny models, the first row of each")] = False,
) -> None:
    """Times whole answers, and appends each to benchmarks/results/answer.jsonl unless they are smoke."""
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not smoke:
        raise typer.BadParameter("there is no GPU; --smoke runs tiny shapes on the CPU", param_hint="--smoke")
    if unknown := sorted(set(model or ()) - CASES.keys()):
        raise typer.BadParameter(f"expected of {', '.join(CASES)}, got {unknown[0]}", param_hint="--model")
    names = {row.name for rows in CASES.values() for row in rows}
    if unknown := sorted(set(case or ()) - names):
        raise typer.BadParameter(f"expected of {', '.join(sorted(names))}, got {unknown[0]!r}", param_hint="--case")
    settings = {"ratio": ratio, "vision_compile": vision_compile, "decode_compile": decode_compile}
    config = zipvl.ZipVLConfig.paper(**settings) if paper else zipvl.ZipVLConfig(text_prompts="sparse", **settings)
    rows = []
    for name in model or CASES:
        wanted = [row for row in CASES[name] if not case or row.name in case][: 1 if smoke else None]
        if not wanted:
            continue
        shape = MODELS[name]
        try:
            built = shape.make(device, smoke=smoke)
        except torch.OutOfMemoryError:
            Console().print(f"{name}: its weights are more than the memory of this GPU")
            continue
        built.generation_config.eos_token_id = built.generation_config.pad_token_id = None
        for full in wanted:
            row = full if repeats is None else replace(full, repeats=repeats)
            row = replace(row, prompt=min(full.prompt, 300), new=4, repeats=1) if smoke else row
            inputs = shape.inputs(
                built, tokens=row.prompt, pages=row.pages, frames=row.frames, batch=row.batch, smoke=smoke
            )
            tower = built.model.visual if shape.patch else None
            found = {"model": name, "name": row.name, "tokens": inputs["input_ids"].shape[1]} | asdict(row)
            found |= measure(built, inputs, row, config, static, tower)
            rows.append(found)
            if not smoke:
                _record.append("answer", settings | {"window": config.local_window, "rows": [found]}, device=device)
        del built, inputs, tower
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    show(rows, ratio)


def show(rows: list[dict[str, Any]], ratio: float) -> None:
    """Prints the table."""
    table = Table(title=f"whole answers, ms; ratio {ratio}")
    for column in ("model", "prompt + new", "default", "zipvl", "times", "first token", "zipvl", "times", "vision",
                   "zipvl", "static"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for end in ("", "_first"):
            pair = [row.get(f"{name}{end}") for name in ("default", "zipvl")]
            cells += ["out of memory" if x is None else f"{x:,.0f}" for x in pair]
            cells.append("" if None in pair else f"{pair[0] / pair[1]:.2f}x")
        cells += [f"{row[name]:,.0f}" if name in row else "" for name in ("default_vision", "zipvl_vision", "static")]
        table.add_row(row["model"], row["name"], *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
