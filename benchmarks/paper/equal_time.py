"""Who wins at equal measured time: each ZipVL of Table A against what a pruner answers in the time that it takes.

Answers are those of the tiny model, times those of the 7B shape at the same share of tokens. Between two of its rows a
pruner answers each page as on a line between the two: its rows lie at some budgets, and its time at any other is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.paper.families import FAMILIES, RIVALS, method_of
from benchmarks.paper.records import Line, Times
from benchmarks.paper.statistics import bootstrap_mean

__all__ = ["AXES", "NOT_MEASURED", "Comparison", "compare", "source", "summary"]

AXES = ("first token", "answer of 32 tokens")
NOT_MEASURED = (
    "Times of the methods in a 7B shape have not been measured yet (`python -m benchmarks.paper times` on a GPU): who "
    "wins at equal time is not known."
)


@dataclass(frozen=True)
class Comparison:
    """One ZipVL of Table A against the best pruner in its time.

    Attributes:
        row: of Table A.
        time: its share of dense attention's time.
        rival: the pruner that answers best in that time; None: none is that fast.
        rival_ratio: the share of tokens that it keeps in that time.
        rival_exact: its exact match there.
        interval: 95%, of how much larger ZipVL's exact match is, page by page.
    """

    row: Line
    time: float
    rival: str | None = None
    rival_ratio: float = 0.0
    rival_exact: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)

    @property
    def words(self) -> str:
        """``ahead``, ``behind``, ``level``: no difference beyond chance on these pages."""
        if self.rival is None or self.interval[0] > 0:
            return "ahead"
        return "behind" if self.interval[1] < 0 else "level"


def compare(line: Line, times: Times, axis: int) -> list[Comparison]:
    """Every ZipVL of a Table A whose time is known, the fastest first.

    Args:
        line: of Table A.
        axis: of ``AXES``.
    """
    dense = next(row for row in line["rows"] if method_of(row) == "dense")
    curves = {name: _curve(line, times, axis, name, dense) for name in RIVALS}
    found = []
    for row in line["rows"]:
        method = method_of(row)
        at = times.at(method, row["ratio"]) if method in FAMILIES else None
        if at is not None:
            found.append(_best(row, at[axis], curves))
    return sorted(found, key=lambda one: one.time)


def _curve(line: Line, times: Times, axis: int, name: str, dense: Line) -> list[tuple[float, float, Any]]:
    """A pruner's rows by time, each with its ratio and its pages, and the dense model at the end of them; none that
    takes as long as that."""
    points = []
    for row in line["rows"]:
        at = times.at(name, row["ratio"]) if method_of(row) == name else None
        if at is not None and at[axis] < 1.0:
            points.append((at[axis], row["ratio"], _pages(row)))
    return [*sorted(points, key=lambda point: point[0]), (1.0, 1.0, _pages(dense))] if points else []


def _best(row: Line, time: float, curves: dict[str, list[tuple[float, float, Any]]]) -> Comparison:
    best, against = Comparison(row, time), None
    for name, curve in curves.items():
        if not curve or time < curve[0][0]:
            continue
        upper = next((i for i, point in enumerate(curve) if point[0] >= time), len(curve) - 1)
        high, low = curve[upper], curve[max(upper - 1, 0)]
        part = min(1.0, (time - low[0]) / (high[0] - low[0])) if high[0] > low[0] else 1.0
        pages = (1 - part) * low[2] + part * high[2]
        if against is None or pages.mean() > against.mean():
            against = pages
            ratio = (1 - part) * low[1] + part * high[1]
            best = Comparison(row, time, name, ratio, float(pages.mean()), bootstrap_mean(_pages(row) - pages))
    return best


def _pages(row: Line) -> Any:
    """1 for each page that was right, 0 for each other one."""
    return np.array([character == "1" for character in row["right"]], dtype=float)


def source(times: Times) -> str:
    """Where the times come from."""
    about, (first, answer) = times.about, times.dense
    return (
        f"Times: {about['shape']}'s shape with random weights, {about['tokens']:,} tokens, most of {about['pictures']} "
        f"pictures, {about['dtype']}, {about['device']['name']}, torch {about['versions']['torch']}, "
        f"{about['date'][:10]}. Dense attention takes {first:,.0f} ms to the first token, {times.vision_ms:,.0f} of "
        f"them in the vision tower, and {answer:,.0f} ms to an answer of {about['new_tokens']} tokens; every method "
        "decodes step by step. ZipVL has an imposed ratio there, equal in all layers; times between measured budgets "
        "lie on a line."
    )


def summary(line: Line, times: Times) -> list[str]:
    """Who wins at equal time, a sentence or two for each axis."""
    return [_summary(name, compare(line, times, axis), line["pages"]) for axis, name in enumerate(AXES)]


def _summary(axis: str, found: Sequence[Comparison], pages: int) -> str:
    if not found:
        return f"At equal time to the {axis}: no ZipVL of Table A has a known time."
    words = {kind: [one for one in found if one.words == kind] for kind in ("ahead", "level", "behind")}
    counts = ", ".join(f"{kind} {len(those)}" for kind, those in words.items())
    text = (
        f"At equal time to the {axis}, {len(found)} settings of ZipVL and the best pruner on {pages:,} pages: {counts}."
    )
    if worth := [*words["ahead"], *words["level"]]:
        text += f" ZipVL is worth its time with {_list(worth)}."
    if words["behind"]:
        text += f" A pruner is the better choice in the time of {_list(words['behind'])}."
    return text


def _list(found: Sequence[Comparison]) -> str:
    """Settings with the share of tokens that they keep and their exact match, and the best pruner's."""
    parts = []
    for one in sorted(found, key=lambda one: one.time):
        against = f"{one.rival} {one.rival_exact:.1%}" if one.rival else "no pruner is that fast"
        exact = f"{one.row['exact_match']:.1%}"
        parts.append(f"{_name(one.row)}, at {one.row['ratio']:.0%} of the tokens ({exact} right, {against})")
    return "; ".join(parts)


def _name(row: Line) -> str:
    label, tau = str(row["label"]), row["parameters"].get("tau")
    return label if "tau" in label else f"{label}, tau {tau:.4g}"


HEADER = ("setting", "tokens in attention", "time, of dense", "exact match", "the best pruner in that time",
          "its tokens", "its exact match", "difference in points (95%)", "ZipVL is")  # fmt: skip


def cells(one: Comparison) -> list[str]:
    """One comparison, as many cells as ``HEADER`` has columns."""
    shown = [_name(one.row), f"{one.row['ratio']:.1%}", f"{one.time:.1%}", f"{one.row['exact_match']:.1%}"]
    if one.rival is None:
        return [*shown, "none is that fast", "", "", "", one.words]
    low, high = (100 * bound for bound in one.interval)
    difference = round(100 * (one.row["exact_match"] - one.rival_exact), 1) + 0.0  # no negative zero
    points = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
    return [*shown, one.rival, f"{one.rival_ratio:.1%}", f"{one.rival_exact:.1%}", points, one.words]
