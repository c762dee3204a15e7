"""Whole answers, from pixels or tokens to the last new token: ``python -m benchmarks.answer``.

``generate()`` of models with random weights in the shape of real ones, greedy, by transformers' default (SDPA and a
dynamic cache), by its static cache compiled (``--static``; compiling is timed apart) and inside ``zipvl.sparse`` at
``--ratio``: by the paper's method or with the default window (``--window``), the blocks of vision towers compiled
(``--vision-compile``) or not. Runs of the methods are interleaved, and the median counts. The first token's time is
that of an answer of one token; the vision tower's is that of a forward of it alone. ``--smoke``: tiny shapes, on the
CPU too.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import zipvl
from benchmarks import _record
from benchmarks._models import QWEN2_7B, SMOKE, build

PAGE_TOKENS = 4096  # a page of 1,792 by 1,792 pixels in Qwen2.5-VL
IMAGE, VISION_START, VISION_END = 3, 1, 2


@dataclass(frozen=True)
class Case:
    """One row: text tokens or pages, rows of the batch, new tokens."""

    prompt: int
    new: int = 128
    batch: int = 1
    pages: int = 0
    repeats: int = 3

    @property
    def name(self) -> str:
        """As the table shows it."""
        what = f"{self.pages} page{'s' if self.pages > 1 else ''}" if self.pages else f"{self.prompt:,} tokens"
        return f"{self.batch} x {what} + {self.new}" if self.batch > 1 else f"{what} + {self.new}"


TEXT = (
    Case(512),
    Case(4096),
    Case(16384, repeats=2),
    Case(32768, repeats=2),
    Case(4096, new=32, batch=8),
    Case(4096, batch=8, repeats=2),
)
PAGES = (Case(0, pages=1), Case(0, pages=8, repeats=2))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def page_model(smoke: bool, device: str) -> Any:
    """Qwen2.5-VL-7B's shape with random weights."""
    text: dict[str, Any] = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 131072,
    }
    vision: dict[str, Any] = {"out_hidden_size": 3584, "hidden_size": 1280, "intermediate_size": 3420, "depth": 32}
    if smoke:
        text |= {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        }
        vision |= {"out_hidden_size": 128, "hidden_size": 64, "intermediate_size": 96, "depth": 8, "num_heads": 2}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32, attn_implementation="sdpa"
        )
    return model.eval()


def inputs_of(case: Case, vocabulary: int, device: str, side: int) -> dict[str, torch.Tensor]:
    """What ``generate()`` is given; ``side`` patches on a page's edge."""
    torch.manual_seed(0)
    if not case.pages:
        ids = torch.randint(10, vocabulary, (case.batch, case.prompt), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    page = [VISION_START] + [IMAGE] * (side * side // 4) + [VISION_END]
    ids = torch.tensor([[*page * case.pages, *range(10, 30)]] * case.batch, device=device)
    grid = torch.tensor([[1, side, side]] * (case.pages * case.batch), device=device)
    pixels = torch.randn(len(grid) * side * side, 3 * 2 * 14 * 14, device=device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid, "pixel_values": pixels}
    return given | {"mm_token_type_ids": (ids == IMAGE).int()}


def measure(model: Any, case: Case, config: zipvl.ZipVLConfig, static: bool, side: int) -> dict[str, Any]:
    """Times of one case: milliseconds by method."""
    device = str(model.device.type)
    inputs = inputs_of(case, model.config.get_text_config().vocab_size, device, side)
    found: dict[str, Any] = {}
    decoded: list[dict[str, Any]] = []

    def generate(new: int, **given: Any) -> torch.Tensor:
        output: torch.Tensor = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **given
        )
        return output

    def method(name: str, new: int) -> None:
        with nullcontext() if name != "zipvl" else zipvl.sparse(model, config) as stats:
            generate(new, **({"cache_implementation": "static"} if name == "static" else {}))
        if stats is not None and new > 1:
            decoded[:] = [stats.decodings[-1].to_dict() | {"active": stats.active, "ratio": stats.mean_ratio}]

    names = ["default", "zipvl", *(["static"] if static else [])]
    for name in names:
        compiling = timed(lambda name=name: method(name, case.new))  # libraries, allocator, compiler
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
    if case.pages:
        visual = model.model.visual
        pixels, grid = inputs["pixel_values"].to(model.dtype), inputs["image_grid_thw"]
        with torch.no_grad():
            for name in ("default", "zipvl"):
                with nullcontext() if name == "default" else zipvl.sparse(model, config):
                    timed(lambda: visual(pixels, grid_thw=grid))
                    found[f"{name}_vision"] = timed(lambda: visual(pixels, grid_thw=grid))
    return found | {"decoding": decoded[0] if decoded else None}


def main(
    ratio: Annotated[float, typer.Option(help="share of the tokens kept")] = 0.25,
    static: Annotated[bool, typer.Option(help="compare with transformers' compiled static cache too")] = False,
    only: Annotated[str, typer.Option(help="text, pages or all")] = "all",
    window: Annotated[bool, typer.Option(help="the default's window and sinks, not the paper's method")] = False,
    vision_compile: Annotated[bool, typer.Option(help="vision towers' blocks compiled")] = False,
    smoke: Annotated[bool, typer.Option(help="tiny shapes")] = False,
) -> None:
    """Times whole answers, and appends them to benchmarks/results/answer.jsonl unless they are smoke."""
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not smoke:
        raise typer.BadParameter("there is no GPU; --smoke runs tiny shapes on the CPU", param_hint="--smoke")
    config = zipvl.ZipVLConfig.paper(ratio=ratio, vision_compile=vision_compile)
    if window:
        config = zipvl.ZipVLConfig(ratio=ratio, text_prompts="sparse", vision_compile=vision_compile)
    rows = []
    for part, cases in (("text", TEXT), ("pages", PAGES)):
        if only not in (part, "all"):
            continue
        if part == "text":
            model: Any = build(SMOKE if smoke else QWEN2_7B, 65536, device)
        else:
            model = page_model(smoke, device)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        for case in cases[:1] if smoke else cases:
            row = asdict(case) | {"name": case.name}
            row |= measure(
                model, case, config, static and case.batch == 1 and case.prompt == 4096, 16 if smoke else 128
            )
            rows.append(row)
            Console().print(row)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    show(rows, ratio)
    if not smoke:
        setting = {"ratio": ratio, "window": config.local_window, "vision_compile": vision_compile}
        _record.append("answer", setting | {"rows": rows}, device="cuda")


def show(rows: list[dict[str, Any]], ratio: float) -> None:
    """Prints the table."""
    table = Table(title=f"whole answers, ms; ratio {ratio}")
    for column in (
        "prompt + new",
        "default",
        "zipvl",
        "times",
        "first token",
        "zipvl",
        "times",
        "vision",
        "zipvl",
        "static",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        pairs = [(row["default"], row["zipvl"]), (row["default_first"], row["zipvl_first"])]
        cells = [cell for a, b in pairs for cell in (f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.2f}x")]
        cells += [f"{row[name]:,.0f}" if name in row else "" for name in ("default_vision", "zipvl_vision", "static")]
        table.add_row(row["name"], *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
