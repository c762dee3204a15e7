"""A measured table as text: on the terminal, and in the report as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table as RichTable

from benchmarks.paper.families import method_of
from benchmarks.paper.statistics import bootstrap_difference, verdict

if TYPE_CHECKING:
    from benchmarks.paper.records import Times
    from benchmarks.paper.tables import Table

__all__ = ["bits", "cells", "claims", "header", "rendered", "setting_words"]

Line = dict[str, Any]
TIMED = ["7B, 32K: first token, of dense", "32-token answer, of dense"]


def bits(row: dict[str, Any]) -> list[bool]:
    """Which pages a row got right."""
    return [character == "1" for character in row["right"]]


def setting_words(parameters: dict[str, Any]) -> str:
    """The parameters of a setting, without its name."""
    words = [
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in parameters.items()
        if name not in ("method", "seed")
    ]
    return ", ".join(words).replace("num recent 4096", "every token a probe").replace(", num random 0", "")


def header(line: Line, times: Times | None = None) -> list[str]:
    """The columns of a table; Table A has two more where ``times`` of the methods are known."""
    if line["table"] == "E":
        return ["", "GFLOP: products + estimate + attention", "ms", "cache, KiB", "peak memory, KiB"]
    names = ["", "compared at", "setting", "tokens in attention", "exact match", "95% interval"]
    if any("first_token_ms" in row for row in line["rows"]):
        names.append("first token, ms")
    if line["table"] == "A" and times is not None:
        names += TIMED
    if any(row["paper"] != "not at hand" for row in line["rows"]):
        names.append("paper")
    return names


def cells(line: Line, row: dict[str, Any], times: Times | None = None) -> list[str]:
    """One row, as many cells as `header` has columns."""
    if line["table"] == "E":
        flops = row.get("gflop")
        return [
            row["label"],
            " + ".join(f"{value:.2f}" for value in flops.values()) if flops else "",
            f"{row['ms']:.1f}",
            f"{row['cache_bytes'] / 1024:,.0f}" if "cache_bytes" in row else "",
            f"{row['peak_bytes'] / 1024:,.0f}",
        ]
    low, high = row["interval95"]
    columns = header(line, times)
    found = [
        row["label"],
        row["group"] or row["task"],
        setting_words(row["parameters"]),
        f"{row['ratio']:.1%}",
        f"{row['exact_match']:.1%}",
        f"{100 * low:.1f} - {100 * high:.1f}",
    ]
    if "first token, ms" in columns:
        found.append(f"{row['first_token_ms']:.0f}" if "first_token_ms" in row else "")
    if times is not None and TIMED[0] in columns:
        first, answer = times.at(method_of(row), row["ratio"])
        once = "" if times.by_steps or method_of(row) == "dense" else " (one run)"
        found += ["" if first is None else f"{first:.0%}", "" if answer is None else f"{answer:.0%}{once}"]
    if "paper" in columns:
        found.append(row["paper"])
    return found


def claims(table: Table, line: Line) -> list[tuple[str, str, str, str]]:
    """What the paper's order says of this table: where, the claim, our difference in points, and the verdict."""
    found = []
    rows = [row for row in line["rows"] if "right" in row and row["parameters"].get("method") != "dense"]
    for better, worse in table.claims:
        for first in (row for row in rows if row["label"] == better):
            for second in (row for row in rows if row["label"] == worse):
                together = first["group"] == second["group"] or line["table"] == "ours"
                if not together or first["task"] != second["task"]:
                    continue
                low, high = bootstrap_difference(bits(first), bits(second))
                difference = 100 * (first["exact_match"] - second["exact_match"])
                points = f"{difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
                found.append((first["group"], f"{better} > {worse}", points, verdict(bits(first), bits(second))))
    return found


def rendered(table: Table, line: Line) -> Group:
    """What ``python -m benchmarks.paper`` prints."""
    shown = RichTable(title=f"{table.title} ({line['pages']:,} pages)", caption=f"Of the paper: {table.paper}.")
    for number, name in enumerate(header(line)):
        shown.add_column(name, justify="left" if number < 3 and line["table"] != "E" else "right")
    for row in line["rows"]:
        shown.add_row(*cells(line, row))
    parts: list[Any] = [shown]
    for group, claim, points, words in claims(table, line):
        parts.append(f"{group}: {claim}: {points} points; {words}")
    return Group(*parts, *line["notes"])
