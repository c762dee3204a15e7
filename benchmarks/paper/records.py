"""What was recorded: the tables of benchmarks/results/paper.jsonl, and the times of paper_times.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._record import RESULTS
from benchmarks.paper.families import RIVALS

__all__ = ["Line", "Times", "answer_ms", "first_ms", "lines_of", "read_times", "stopped_lines"]

Line = dict[str, Any]
Curve = list[tuple[float, float]]
NEAR = 0.01
"""A budget this far outside the measured ones has the time of the nearest."""


def lines_of(weights: str, path: Path | None = None) -> dict[str, Line]:
    """The results of each table for these weights: a complete run before a stopped one, then the most pages, then the
    newest."""
    best: dict[str, Line] = {}
    for line in _read(path or RESULTS / "paper.jsonl"):
        if line["weights_sha256"] == weights and _merit(line) >= _merit(best.get(line["table"], line)):
            best[line["table"]] = line
    return best


def stopped_lines(weights: str, shown: dict[str, Line], path: Path | None = None) -> list[Line]:
    """Runs that were stopped, but over more pages than the one that is shown."""
    lines = _read(path or RESULTS / "paper.jsonl")
    of_these = [line for line in lines if line["weights_sha256"] == weights and not line["complete"]]
    return [line for line in of_these if line["pages"] > shown.get(line["table"], line)["pages"]]


def _read(path: Path) -> list[Line]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def _merit(line: Line) -> tuple[bool, int]:
    return line["complete"], line["pages"]


@dataclass(frozen=True)
class Times:
    """What each method takes in a 7B shape, by budget.

    Attributes:
        about: device, versions, date, shape, tokens: what all lines of the run share.
        vision_ms: the vision tower alone.
        dense: milliseconds of dense attention to the first token, and to the last of the answer; None: not measured.
        curves: of each method, for the first token and for the answer, its budgets, ascending, each with its time as a
            share of dense attention's.
        failed: method, budget and reason of what could not be measured.
        once: a first token is that of a row's first run, which pays for libraries and plans.
        by_steps: decode steps were timed one by one. Otherwise an answer's time is that of one whole answer, in which
            cuDNN planned for every new length of the cache: nothing follows from it.
    """

    about: Line
    vision_ms: float
    dense: tuple[float, float | None]
    curves: dict[str, tuple[Curve, Curve]]
    failed: list[tuple[str, float, str]]
    once: bool
    by_steps: bool

    def at(self, method: str, ratio: float) -> tuple[float | None, float | None]:
        """Both times at a share ``ratio`` of the tokens, each on a line between the two nearest budgets; as shares of
        dense attention's. None: the method was not measured around it."""
        if method == "dense":
            return 1.0, 1.0
        first, answer = self.curves.get(method, ([], []))
        return _between(first, ratio), _between(answer, ratio)


def _between(curve: Curve, ratio: float) -> float | None:
    if not curve or not curve[0][0] - NEAR <= ratio <= curve[-1][0] + NEAR:
        return None
    ratio = min(max(ratio, curve[0][0]), curve[-1][0])
    upper = next(i for i, point in enumerate(curve) if point[0] >= ratio)
    high, low = curve[upper], curve[max(upper - 1, 0)]
    part = (ratio - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
    return low[1] + part * (high[1] - low[1])


def read_times(path: Path | None = None) -> Times | None:
    """The times of the newest run in which dense attention was measured; None where there is none.

    A baseline that keeps everything is the dense model, and has its time there. One that is slower than dense attention
    at its largest measured budget gets no line from there to it.
    """
    runs: dict[str, list[Line]] = defaultdict(list)
    for line in _read(path or RESULTS / "paper_times.jsonl"):
        runs[line["run"]].append(line)
    measured = [run for run in sorted(runs) if any(x["method"] == "dense" and "first_ms" in x for x in runs[run])]
    if not measured:
        return None
    lines = runs[measured[-1]]
    rows: dict[tuple[str, float], list[Line]] = defaultdict(list)
    for line in lines:
        if "first_ms" in line:
            rows[line["method"], line["budget"]].append(line)
    once = any(all(line["round"] == 0 for line in found) for found in rows.values())
    dense = _times(rows.pop(("dense", 1.0)))
    curves: dict[str, tuple[Curve, Curve]] = defaultdict(lambda: ([], []))
    for (method, _), found in rows.items():
        for curve, time, whole in zip(curves[method], _times(found), dense, strict=True):
            if time is not None and whole is not None:
                curve.append((found[0]["ratio"], time / whole))
    for method, both in curves.items():
        for curve in both:
            curve.sort()
            if method in RIVALS and curve and curve[-1][1] < 1.0:
                curve.append((1.0, 1.0))
    failed = [(line["method"], line["budget"], line["failed"]) for line in lines if "failed" in line]
    vision = next(line["vision_ms"] for line in lines if "vision_ms" in line)
    by_steps = not any("answer_ms" in line for line in lines)
    return Times(lines[0], vision, dense, dict(curves), failed, once, by_steps)


def first_ms(runs: list[Line]) -> float:
    """Milliseconds to the first token: the median of the runs after a row's first, which pays for what a first run of a
    length costs, or that one where there are no others."""
    return float(median([line["first_ms"] for line in runs if line["round"]] or [line["first_ms"] for line in runs]))


def answer_ms(first: float, steps: list[float], new: int) -> float:
    """Milliseconds to the last of ``new`` tokens, from those to the first and those of some decode steps."""
    return first + (new - 1) * float(median(steps))


def _times(runs: list[Line]) -> tuple[float, float | None]:
    """Milliseconds to the first token and to the last of an answer; None: no step was timed."""
    first, new = first_ms(runs), runs[0]["new_tokens"]
    steps = [step for line in runs for step in line.get("steps_ms", ())]
    for line in runs:
        if line.get("answer_ms") is not None:  # of a whole answer
            steps.append((line["answer_ms"] - line["first_ms"]) / (new - 1))
    return first, answer_ms(first, steps, new) if steps else None
