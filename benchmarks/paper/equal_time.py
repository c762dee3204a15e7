"""Who wins at equal measured time: each ZipVL of Table A against what a pruner answers in the time that it takes.

Answers are those of the tiny model, times those of the 7B shape at the same share of tokens. Between two of its rows a
pruner answers each page as on a line between the two: its rows lie at some budgets, and its time at any other is known.
A setting of ZipVL that loses more than ``MOST_LOST`` against the dense model is worth nothing, however fast it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.paper.families import FAMILIES, RIVALS, method_of
from benchmarks.paper.records import Line, Times
from benchmarks.paper.statistics import bootstrap_mean

__all__ = ["AXES", "MOST_LOST", "NOT_MEASURED", "Comparison", "compare", "source", "summary"]

AXES = ("first token", "answer of 32 tokens")
MOST_LOST = 0.05
"""Of the pages, against the dense model: what a setting may lose and still be called worth its time."""
ONE_RUN = "one run"
"""Stands beside the time of an answer from which nothing follows."""
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
        loss: how much smaller its exact match is than the dense model's.
        judged: whether the times allow a verdict.
        rival: the pruner that answers best in that time; None: none is that fast.
        rival_ratio: the share of tokens that it keeps in that time.
        rival_exact: its exact match there.
        interval: 95%, of how much larger ZipVL's exact match is, page by page.
    """

    row: Line
    time: float
    loss: float
    judged: bool
    rival: str | None = None
    rival_ratio: float = 0.0
    rival_exact: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)

    @property
    def words(self) -> str:
        """``behind`` the pruner; ``loses too much`` against the dense model; ``ahead``; ``level``: no difference beyond
        chance on these pages; ``not judged``."""
        if not self.judged:
            return "not judged"
        if self.rival is not None and self.interval[1] < 0:
            return "behind"
        if self.loss > MOST_LOST:
            return "loses too much"
        return "ahead" if self.rival is None or self.interval[0] > 0 else "level"


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
        time = times.at(method, row["ratio"])[axis] if method in FAMILIES else None
        if time is not None:
            loss = dense["exact_match"] - row["exact_match"]
            found.append(_best(Comparison(row, time, round(loss, 6), axis == 0 or times.by_steps), curves))
    return sorted(found, key=lambda one: one.time)


def _curve(line: Line, times: Times, axis: int, name: str, dense: Line) -> list[tuple[float, float, Any]]:
    """A pruner's rows by time, each with its ratio and its pages, and the dense model at the end of them; none that
    takes as long as that."""
    points = []
    for row in line["rows"]:
        time = times.at(name, row["ratio"])[axis] if method_of(row) == name else None
        if time is not None and time < 1.0:
            points.append((time, row["ratio"], _pages(row)))
    return [*sorted(points, key=lambda point: point[0]), (1.0, 1.0, _pages(dense))] if points else []


def _best(alone: Comparison, curves: dict[str, list[tuple[float, float, Any]]]) -> Comparison:
    """With the pruner that answers best in its time, if there is one."""
    best, against, time = alone, None, alone.time
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
            best = replace(
                alone,
                rival=name,
                rival_ratio=ratio,
                rival_exact=float(pages.mean()),
                interval=bootstrap_mean(_pages(alone.row) - pages),
            )
    return best


def _pages(row: Line) -> Any:
    """1 for each page that was right, 0 for each other one."""
    return np.array([character == "1" for character in row["right"]], dtype=float)


def source(times: Times) -> str:
    """Where the times come from."""
    about, (first, answer) = times.about, times.dense
    parts = [
        f"Times: {about['shape']}'s shape with random weights, {about['tokens']:,} tokens, most of {about['pictures']} "
        f"pictures, {about['dtype']}, {about['device']['name']}, torch {about['versions']['torch']}, "
        f"{about['date'][:10]}.",
        f"Dense attention takes {first:,.0f} ms to the first token.",
        f"The vision tower has {times.vision_ms:,.0f} of them.",
    ]
    if answer is not None:
        how = "" if times.by_steps else f" ({ONE_RUN})"
        parts.append(f"An answer of {about['new_tokens']} tokens takes {answer:,.0f} ms{how}.")
    parts += [
        "Every method decodes step by step.",
        "ZipVL has an imposed ratio there, equal in all layers.",
        "Times between measured budgets lie on a line.",
    ]
    if times.once:
        parts.append("Some first tokens are of a row's first run, which pays for plans of new lengths too.")
    return " ".join(parts)


def summary(line: Line, times: Times) -> list[str]:
    """Who wins at equal time, some sentences for each axis."""
    said = []
    for axis, name in enumerate(AXES):
        found = compare(line, times, axis)
        if not found:
            said.append(f"By the time to the {name}: no ZipVL of Table A has a known time.")
        elif not all(one.judged for one in found):
            said.append(
                f"By the time to the {name}: no verdict yet. Each answer was timed once, as a whole. In that time "
                "cuDNN planned anew for every new length of the cache, which says nothing of the methods."
            )
        else:
            said.append(_summary(name, found, line))
    return said


def _summary(axis: str, found: Sequence[Comparison], line: Line) -> str:
    words = {
        kind: [one for one in found if one.words == kind] for kind in ("ahead", "level", "behind", "loses too much")
    }
    dense = next(row for row in line["rows"] if method_of(row) == "dense")
    plural = "setting" if len(found) == 1 else "settings"
    parts = [
        f"By the time to the {axis}: {len(found)} {plural} of ZipVL whose time is known against the best pruner in "
        f"the same time, on {line['pages']:,} pages with the tiny model.",
        f"The dense model has {dense['exact_match']:.1%} right.",
        f"A setting may lose at most {100 * MOST_LOST:g} points of that.",
    ]
    if worth := [*words["ahead"], *words["level"]]:
        parts.append(f"ZipVL is worth its time with these: {_list(worth)}.")
    else:
        parts.append("No setting of ZipVL here is worth its time.")
    if words["behind"]:
        parts.append(f"A pruner answers more pages in the time of these: {_list(words['behind'])}.")
    if words["loses too much"]:
        parts.append(f"These lose too much, whatever their time: {_list(words['loses too much'])}.")
    if any(one.row["group"] for one in found):
        parts.append("Matched: its tau was chosen on other pages, so that it keeps that share of the tokens.")
    return " ".join(parts)


def _list(found: Sequence[Comparison]) -> str:
    """Settings with the share of tokens that they keep and their exact match, and the best pruner's."""
    parts = []
    for one in sorted(found, key=lambda one: one.time):
        against = f"{one.rival} {one.rival_exact:.1%}" if one.rival else "no pruner is that fast"
        exact = f"{one.row['exact_match']:.1%}"
        parts.append(f"{_name(one.row)} ({one.row['ratio']:.0%} of the tokens, {exact} right, {against})")
    return "; ".join(parts)


def _name(row: Line) -> str:
    label, tau = str(row["label"]), f"tau {row['parameters'].get('tau'):.4g}"
    if row["group"]:
        return f"{label} matched to {row['group']}, {tau}"
    return label if "tau" in label else f"{label}, {tau}"


HEADER = ("setting", "tokens in attention", "time, of dense", "exact match", "the best pruner in that time",
          "its tokens", "its exact match", "difference in points (95%)", "ZipVL is")  # fmt: skip


def cells(one: Comparison) -> list[str]:
    """One comparison, as many cells as ``HEADER`` has columns."""
    time = f"{one.time:.1%}" + ("" if one.judged else f" ({ONE_RUN})")
    shown = [_name(one.row), f"{one.row['ratio']:.1%}", time, f"{one.row['exact_match']:.1%}"]
    if one.rival is None:
        return [*shown, "none is that fast", "", "", "", one.words]
    low, high = (100 * bound for bound in one.interval)
    difference = round(100 * (one.row["exact_match"] - one.rival_exact), 1) + 0.0  # no negative zero
    points = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
    return [*shown, one.rival, f"{one.rival_ratio:.1%}", f"{one.rival_exact:.1%}", points, one.words]
