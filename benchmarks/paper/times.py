"""Times of each method of Table A in a 7B shape behind 32K tokens of pictures: ``python -m benchmarks.paper times``.

The shape is LLaVA-NeXT's tower and tiles before Qwen2-7B's decoder, on which every method here runs (VisionZip needs
LLaVA-NeXT's packing); weights are random, in bfloat16. A prompt is eleven pictures of 672 x 672, 2,928 tokens each, and
a short question. ``generate()`` decodes step by step for every method. A run gives the time to the first token, vision
tower included, and in one round that of each of a few decode steps: an answer of 32 tokens takes the first token and 31
median steps. Random weights say nothing of ``tau``, so ZipVL has an imposed ratio; the baselines have the parameters of
that budget on this depth.

The first round is of first tokens alone. It warms up, since a first run of a length pays for libraries and plans, and a
run of the command that is cut after it has every row's first token. The second round is what counts, with the steps; a
third one, of first tokens, takes what time is left. Each run is a line of benchmarks/results/paper_times.jsonl at once:
the report takes medians of what the newest run of the command wrote (`benchmarks.paper.records`). Prompts run on
PyTorch's choice of attention, decode steps of every method on another than cuDNN's, which plans anew for every length.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import zipvl
from benchmarks import _record
from benchmarks._models import MODELS, Inputs, Model
from benchmarks.paper.families import FAMILIES, LARGER_BUDGETS, RIVALS, fields
from benchmarks.paper.records import answer_ms, first_ms
from benchmarks.ttft import attention_ops
from zipvl.app.timing import generate, seconds
from zipvl.baselines import AIM, Baseline, FastV, PyramidDrop, VisionZip, applied, image_budget
from zipvl.baselines.common import steps_without_cudnn

__all__ = ["NEW_TOKENS", "STEPS", "Timing", "measure", "plan", "run"]

SHAPE, PAGES, NEW_TOKENS = "LLaVA-NeXT-Qwen2-7B", 11, 32
ROW_ENDS = 48 / 2928  # of a picture's tokens
LEAST = 0.06  # a little below Table A's least, since times between measured budgets lie on a line
ZIPVL_BUDGETS = (0.15, 0.35, 0.6)
BUDGETS: dict[str, tuple[float, ...]] = {name: ZIPVL_BUDGETS for name in FAMILIES} | {
    "ZipVL": (LEAST, 0.35, 0.6),
    "VisionZip": (0.333, 0.468, *LARGER_BUDGETS, LEAST),
    "FastV": (0.468, LARGER_BUDGETS[-1], LEAST),
    "PyramidDrop": (0.468, LARGER_BUDGETS[-1], LEAST),
    "AIM": (LEAST, 0.333, 0.468),  # its PageRank grows with the square: beyond, it is slower than dense attention
}
"""Of each method, in the order in which rows run. A budget that a schedule cannot reach is a row that says so."""
ROUNDS, SECONDS = 3, 60.0
"""Beyond so many seconds no row of a second or third round begins."""
STEPS = 9
"""Decode steps that are timed one by one: of them the first few pay for libraries, and the median does not."""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Timing:
    """One method at one budget.

    Args:
        method: ``dense``, a name of ``FAMILIES`` or of ``RIVALS``.
        budget: the share of the prompt's tokens in attention, mean over layers, that it is given.
        context: to run in; None where the method cannot have this budget.
        parameters: what gives it this budget.
        failed: why there is no context.
    """

    method: str
    budget: float
    context: Context | None
    parameters: dict[str, Any]
    failed: str | None = None


class _Tokens(BaseStreamer):
    """Notes when each new token reached the host."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.at.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Nothing is left to do."""


def _rival(name: str, share: float, layers: int) -> Baseline:
    makers: dict[str, Callable[[], Baseline]] = {
        "VisionZip": lambda: VisionZip.for_budget(share, ROW_ENDS),
        "AIM": lambda: AIM.for_budget(share, layers),
        "PyramidDrop": lambda: PyramidDrop.for_budget(share, layers),
        "FastV": lambda: FastV.for_budget(share, layers),
    }
    return makers[name]()


def plan(model: Any, inputs: Inputs) -> list[Timing]:
    """Every row, in the order in which they run: dense attention, ZipVL's kinds, the pruners, AIM last."""
    ids = inputs["input_ids"][0]
    image = int((ids == model.config.image_token_id).sum())
    layers = len(model.model.language_model.layers)
    rows = [Timing("dense", 1.0, nullcontext, {})]
    for family in FAMILIES:
        for budget in BUDGETS[family]:
            # Every method decodes step by step: a captured step is no part of how tokens are chosen.
            given = {"ratio": budget, "dense_below": 0, "decode": "eager"} | fields(family, layers)
            config = zipvl.ZipVLConfig.paper(**given)
            rows.append(Timing(family, budget, partial(zipvl.sparse, model, config), given))
    for name in sorted(RIVALS, key=list(BUDGETS).index):
        for budget in BUDGETS[name]:
            try:
                made = _rival(name, image_budget(budget, len(ids), image), layers)
            except ValueError as error:
                rows.append(Timing(name, budget, None, {}, str(error)))
                continue
            kept = {key: x for key, x in vars(made).items() if isinstance(x, (int, float)) and key != "shared"}
            rows.append(Timing(name, budget, partial(applied, model, made), kept))
    return rows


def timed(model: Any, inputs: Inputs, timing: Timing, steps: int) -> dict[str, Any]:
    """One answer: milliseconds to the first token and of each of ``steps`` decode steps after it, the budget that was
    kept, and the peak of memory beyond the weights; or ``failed``."""
    assert timing.context is not None
    cuda = model.device.type == "cuda"
    streamer, record = _Tokens(), None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        with steps_without_cudnn(model.model.language_model), timing.context() as record:
            start = time.perf_counter()
            generate(model, inputs, 1 + steps, streamer=streamer)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"failed": "out of memory"}
    share = 1.0 if record is None else record.budget if hasattr(record, "budget") else record.mean_ratio
    return {
        "first_ms": 1e3 * (streamer.at[0] - start),
        "steps_ms": [1e3 * (later - earlier) for earlier, later in pairwise(streamer.at)],
        "ratio": float(share),
        "peak_bytes": torch.cuda.max_memory_allocated() - before if cuda else None,
    }


def measure(
    model: Any, inputs: Inputs, timings: list[Timing], limit: float, steps: int = STEPS
) -> Iterator[tuple[Timing, dict[str, Any]]]:
    """Runs of every row, in ``ROUNDS``: of first tokens, but for the second, which times decode steps too.

    A row that cannot be, or runs out of memory, comes once and then no more.

    Args:
        limit: seconds from now after which no row of a second or later round begins.
    """
    begun = time.monotonic()
    left = []
    for timing in timings:
        if timing.context is None:
            yield timing, {"round": 0, "failed": timing.failed}
        else:
            left.append(timing)
    for number in range(ROUNDS):
        for timing in list(left):
            if number and time.monotonic() - begun > limit:
                return
            found = timed(model, inputs, timing, steps if number == 1 else 0)
            if "failed" in found:
                left.remove(timing)
            yield timing, {"round": number} | found


def vision_ms(model: Any, inputs: Inputs, repeats: int = 3) -> float:
    """Milliseconds of the vision tower, the projector and the packing alone, a median."""

    @torch.inference_mode()
    def features() -> None:
        model.model.get_image_features(pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"])

    return 1e3 * statistics.median([seconds(features, model.device) for _ in range(repeats + 1)][1:])


def shape(smoke: bool) -> Model:
    """LLaVA-NeXT before Qwen2-7B's decoder, or a tiny one of six layers."""
    found = MODELS[SHAPE]
    if not smoke:
        return found
    return replace(found, smoke=found.smoke | {"text_config": found.smoke["text_config"] | {"num_hidden_layers": 6}})


def run(device: str, limit: float = SECONDS, smoke: bool = False) -> list[dict[str, Any]]:
    """Measures every row, prints them and appends each run to the results; ``smoke``: a tiny shape, not recorded."""
    if not smoke and device == "cpu":
        sys.exit("times: a 7B shape needs a CUDA device (--device cuda), or --smoke for a tiny one")
    model = shape(smoke).make(device, smoke=smoke)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    inputs = shape(smoke).inputs(model, tokens=0, pages=1 if smoke else PAGES, frames=0, batch=1, smoke=smoke)
    timings = plan(model, inputs)
    attention = attention_ops(lambda: timed(model, inputs, timings[0], 0))
    common = {
        "benchmark": "paper_times",
        "run": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": SHAPE,
        "tokens": inputs["input_ids"].shape[1],
        "pictures": len(inputs["image_sizes"]),
        "new_tokens": NEW_TOKENS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "dense_attention": attention,
    }

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        if not smoke:
            _record.append("paper_times", common | row, device)

    rows: list[dict[str, Any]] = []
    record({"method": "vision tower", "vision_ms": vision_ms(model, inputs)})
    for timing, found in measure(model, inputs, timings, limit):
        about = {"method": timing.method, "budget": timing.budget, "parameters": timing.parameters}
        record(about | found)
    Console(width=120).print(_table(rows, common["tokens"]))
    return rows


def _table(rows: list[dict[str, Any]], tokens: int) -> RichTable:
    """What was measured, a row a method and budget."""
    shown = RichTable(title=f"{SHAPE}, {tokens:,} tokens; vision tower {rows[0]['vision_ms']:,.0f} ms")
    for number, head in enumerate(("method", "budget", "first token, ms", "step, ms", "answer, ms", "runs")):
        shown.add_column(head, justify="left" if not number else "right")
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows[1:]:
        grouped.setdefault((row["method"], row["budget"]), []).append(row)
    for (method, budget), runs in grouped.items():
        found = [row for row in runs if "first_ms" in row]
        steps = [step for row in found for step in row["steps_ms"]]
        failed = [row["failed"] for row in runs if "failed" in row]
        words = failed or [f"{first_ms(found):,.0f}"]
        if steps and not failed:
            answer = answer_ms(first_ms(found), steps, NEW_TOKENS)
            words += [f"{statistics.median(steps):,.1f}", f"{answer:,.0f}"]
        shown.add_row(method, f"{budget:.1%}", *words, *[""] * (3 - len(words)), str(len(found)))
    return shown
