"""The report's plots, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["FIGURES", "main"]

Line = dict[str, Any]
STYLES = {
    "ZipVL": ("#1b6ca8", "o"),
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


def main(lines: dict[str, Line]) -> bytes:
    """Exact match against the share of tokens in attention: ZipVL and the baselines of Table A."""
    line = lines["A"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, (colour, marker) in STYLES.items():
        rows = [
            row for row in line["rows"] if row["label"] == name or (name == "ZipVL" and row["label"].startswith(name))
        ]
        rows.sort(key=lambda row: row["ratio"])
        if rows:
            ratios, exact, errors = _errors(rows)
            axes.errorbar(
                ratios, exact, errors, marker=marker, markersize=8, alpha=0.8, capsize=3, color=colour, label=name
            )
    axes.axhline(100 * line["rows"][0]["exact_match"], color="grey", linestyle="--", label="dense")
    axes.set(
        xlabel="tokens in attention, mean over layers, %",
        ylabel=f"exact match on {line['pages']:,} pages, %",
        xlim=(0, 60),
        ylim=(-3, 103),
    )
    figure.legend(loc="outside right center", fontsize=9)
    return _png(figure)


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
