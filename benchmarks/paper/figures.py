"""The report's plots, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.paper.equal_time import AXES
from benchmarks.paper.families import FAMILIES, method_of
from benchmarks.paper.records import Line, Times

__all__ = ["FIGURES", "main"]

STYLES = {
    "ZipVL": ("#1b6ca8", "o"),
    "ZipVL, window 512": ("#1b6ca8", "*"),
    "ZipVL, window 128": ("#1b6ca8", "P"),
    "ZipVL, window 128, skipped MLPs": ("#0b3c5d", "X"),
    "ZipVL, skipped MLPs": ("#4ea5d9", "d"),
    "VisionZip": ("#d1495b", "s"),
    "AIM": ("#edae49", "D"),
    "PyramidDrop": ("#66a182", "^"),
    "FastV": ("#8d6a9f", "v"),
}


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return buffer.getvalue()


def _errors(rows: list[dict[str, Any]]) -> tuple[list[float], list[float], list[list[float]]]:
    """Ratios and exact match in percent, and how far the interval reaches below and above."""
    ratios, exact = [100 * row["ratio"] for row in rows], [100 * row["exact_match"] for row in rows]
    below = [value - 100 * row["interval95"][0] for value, row in zip(exact, rows, strict=True)]
    above = [100 * row["interval95"][1] - value for value, row in zip(exact, rows, strict=True)]
    return ratios, exact, [below, above]


def main(line: Line, times: Times | None) -> bytes:
    """Exact match of Table A against the share of tokens in attention, and where they are known against the times of a
    7B shape: to the first token, and to an answer of 32."""
    axes_shown = ["tokens in attention, mean over layers, %"]
    if times is not None:
        axes_shown += [f"time to the {name}, 7B at 32K, % of dense" for name in AXES]
        axes_shown[-1] += "" if times.by_steps else " (one run)"
    figure, panels = plt.subplots(
        1, len(axes_shown), figsize=(2.2 + 4.8 * len(axes_shown), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for number, (axes, words) in enumerate(zip(panels[0], axes_shown, strict=True)):
        for name, (colour, marker) in STYLES.items():
            places, exact, errors = _points(line, times, name, number)
            if places:
                axes.errorbar(
                    places,
                    exact,
                    errors,
                    marker=marker,
                    markersize=7,
                    alpha=0.8,
                    capsize=3,
                    color=colour,
                    linestyle="-" if name not in FAMILIES or name == "ZipVL" else ":",
                    label=name if number == 0 else None,
                )
        dense = 100 * line["rows"][0]["exact_match"]
        axes.axhline(dense, color="grey", linestyle="--", label=None if number else "dense")
        axes.set(xlabel=words, xlim=(0, 100), ylim=(-3, 103))
    panels[0][0].set_ylabel(f"exact match on {line['pages']:,} pages, %")
    figure.legend(loc="outside right center", fontsize=9)
    return _png(figure)


def _points(
    line: Line, times: Times | None, name: str, panel: int
) -> tuple[list[float], list[float], list[list[float]]]:
    """Places, exact match and its errors of one method's rows in a panel: 0 by tokens, then by each time."""
    placed = []
    for row in line["rows"]:
        if method_of(row) == name:
            place = row["ratio"] if panel == 0 or times is None else times.at(name, row["ratio"])[panel - 1]
            if place is not None:
                placed.append((100 * place, row))
    placed.sort(key=lambda pair: pair[0])
    _, exact, errors = _errors([row for _, row in placed])
    return [place for place, _ in placed], exact, errors


def curve(line: Line) -> bytes:
    """tau against ratio and exact match, two tasks."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    for task, colour, words in (("easy", "#66a182", "8 entries"), ("hard", "#d1495b", "64 entries")):
        rows = [row for row in line["rows"] if row["task"] == task and "tau" in row["parameters"]]
        rows.sort(key=lambda row: row["parameters"]["tau"])
        ratios, exact, errors = _errors(rows)
        taus = [row["parameters"]["tau"] for row in rows]
        axes[0].errorbar(taus, exact, errors, marker="o", capsize=3, color=colour, label=words)
        axes[1].plot(taus, ratios, marker="o", color=colour, label=words)
    axes[0].set(xlabel="tau", ylabel=f"exact match on {line['pages']:,} pages, %", ylim=(-2, 102))
    axes[1].set(xlabel="tau", ylabel="tokens in attention, %", ylim=(0, 102))
    axes[0].legend(title="on a page", loc="lower right")
    return _png(figure)


def bars(line: Line) -> bytes:
    """Exact match of each setting, with its interval."""
    rows = [row for row in line["rows"] if row["parameters"]["method"] != "dense"]
    ratios, exact, errors = _errors(rows)
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.42 * len(rows)), layout="constrained")
    places = list(range(len(rows)))[::-1]
    axes.barh(places, exact, xerr=errors, capsize=3, color="#1b6ca8")
    axes.set_yticks(
        places, [f"{row['label']} ({ratio:.1f}% kept)" for row, ratio in zip(rows, ratios, strict=True)], fontsize=9
    )
    axes.set(xlabel=f"exact match on {line['pages']:,} pages, %", xlim=(0, 102))
    return _png(figure)


def layer_profiles(line: Line) -> bytes:
    """The ratio of each layer, a line a task."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in line["rows"]:
        axes.plot(range(len(row["layers"])), [100 * value for value in row["layers"]], marker="o", label=row["task"])
    axes.set(xlabel="layer", ylabel=f"tokens kept at tau {line['tau']:g}, %", ylim=(0, 102))
    axes.set_xticks(range(len(line["rows"][0]["layers"])))
    axes.legend(title="task")
    return _png(figure)


FIGURES: dict[str, Callable[[Line], bytes]] = {
    "C": bars,
    "D": bars,
    "figure-a": curve,
    "ours": bars,
    "profiles": layer_profiles,
}
