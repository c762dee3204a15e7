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

__all__ = ["Line", "Times", "lines_of", "read_times", "stopped_lines"]

Line = dict[str, Any]
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
        dense: milliseconds of dense attention to the first token, and to the last of the answer.
        curves: of each method its budgets, ascending, each with its two times as shares of dense attention's.
        failed: method, budget and reason of what could not be measured.
    """

    about: Line
    vision_ms: float
    dense: tuple[float, float]
    curves: dict[str, list[tuple[float, float, float]]]
    failed: list[tuple[str, float, str]]

    def at(self, method: str, ratio: float) -> tuple[float, float] | None:
        """Both times at a share ``ratio`` of the tokens, on a line between the two nearest budgets; as shares of dense
        attention's. None: the method was not measured around it."""
        if method == "dense":
            return 1.0, 1.0
        curve = self.curves.get(method, [])
        if not curve or not curve[0][0] - NEAR <= ratio <= curve[-1][0] + NEAR:
            return None
        ratio = min(max(ratio, curve[0][0]), curve[-1][0])
        upper = next(i for i, point in enumerate(curve) if point[0] >= ratio)
        high, low = curve[upper], curve[max(upper - 1, 0)]
        part = (ratio - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
        return low[1] + part * (high[1] - low[1]), low[2] + part * (high[2] - low[2])


def read_times(path: Path | None = None) -> Times | None:
    """The times of the newest run in which dense attention was measured; None where there is none.

    A row's first token takes the median of the runs after its first, which pays for what a first run of a length costs,
    or that one where there are no others; its answer takes that and the steps of the answers, a median too. A baseline
    that keeps everything is the dense model, and has its time there.
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
    dense = _times(rows.pop(("dense", 1.0)))
    curves: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for (method, _), found in rows.items():
        first, answer = _times(found)
        curves[method].append((found[0]["ratio"], first / dense[0], answer / dense[1]))
    for method in RIVALS:
        if method in curves:
            curves[method].append((1.0, 1.0, 1.0))
    failed = [(line["method"], line["budget"], line["failed"]) for line in lines if "failed" in line]
    vision = next(line["vision_ms"] for line in lines if "vision_ms" in line)
    return Times(lines[0], vision, dense, {name: sorted(curve) for name, curve in curves.items()}, failed)


def _times(runs: list[Line]) -> tuple[float, float]:
    """Milliseconds to the first token and to the last of an answer."""
    runs = sorted(runs, key=lambda line: line["round"])
    first = median(line["first_ms"] for line in runs[1:] or runs)
    return first, first + median(
        line["answer_ms"] - line["first_ms"] for line in runs if line.get("answer_ms") is not None
    )
