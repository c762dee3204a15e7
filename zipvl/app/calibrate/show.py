"""What ``zipvl calibrate`` prints and draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipvl.app.calibrate.search import COST

__all__ = ["draw", "front", "print_outcome"]

_AXES = {
    "ttft": "time to the first token, share of dense",
    "memory": "bytes of the cache, share of dense",
    "answer": "time of the whole answer, share of dense",
}
_ONE, _ON_FRONT, _LIMIT = "#9aa5b1", "#3b6fb6", "#c0392b"


def print_outcome(facts: dict[str, Any], output: Path, plot: Path | None) -> None:
    """The candidates, the tests, and what is promised."""
    console = Console(highlight=False)
    samples = facts["samples"]
    console.print(
        f"[bold]Model[/]    {escape(facts['model']['name'])}, {facts['dtype']} on {facts['device']['name']}",
        soft_wrap=True,
    )
    console.print(
        f"[bold]Samples[/]  {samples['tune']} to choose on, {samples['report']} to report on, of {samples['all']} in "
        f"{escape(facts['data']['path'])} (seed {samples['seed']})",
        soft_wrap=True,
    )
    if (right := facts["dense_right"]) is not None:
        console.print(f"[bold]Dense[/]    {right['right']:.1%} of {right['samples']} answers are right")
    console.print(f"[bold]Loss[/]     {facts['loss']}\n")
    console.print(_candidates(facts))
    if facts["tested"]:
        console.print(_tests(facts))
    for line in conclusion(facts, output, plot):
        console.print(line, soft_wrap=True)


def conclusion(facts: dict[str, Any], output: Path, plot: Path | None) -> list[str]:
    """What was found, what is promised and what is not, a line each."""
    found = []
    asked, bound, samples = facts["max_loss"], facts["bound"], facts["samples"]
    if facts["short_of_time"]:
        found.append(
            f"[yellow]The time allows {len(facts['candidates'])} of "
            f"{facts['candidates_known']} candidates on "
            f"{samples['tune'] + samples['report']} of {samples['all']} samples: --minutes for more[/]"
        )
    if bound > asked:
        found.append(
            f"[yellow]{samples['report']} samples to report on show a loss of {_percent(bound)} at best; "
            f"{_percent(asked)} needs {facts['needed_samples']}, none of them lost[/]"
        )
    confidence = f"{facts['confidence']:.0%} confidence"
    if facts["setting"] is None:
        return [
            *found,
            f"[bold yellow]No setting was shown to lose at most {_percent(bound)} at {confidence}: stay dense[/], or "
            "allow more loss, or bring more samples",
        ]
    reported = facts["reported"]
    found.append(
        f"[bold green]{escape(facts['setting'])}[/] loses at most {_percent(reported['upper'])} at {confidence} "
        f"({_lost(facts, reported)} lost)"
    )
    costs = reported["costs"]
    found.append(
        f"first token {_seconds(costs['first_s'])}, answer {_seconds(costs['total_s'])}, cache "
        f"{costs['cache_bytes']['here'] / 2**20:,.1f} MiB ({costs['cache_bytes']['share']:.0%} of dense), "
        f"median of {costs['samples']} samples here"
    )
    if costs[COST[facts["goal"]]]["share"] >= 1:
        found.append(f"[bold yellow]No gain in {facts['goal']} on this machine: dense attention does as well[/]")
    found.append(f"[bold]Wrote[/]    {escape(str(output))}" + (f" and {escape(str(plot))}" if plot else ""))
    return found


def front(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates that were timed and than which none costs less and loses no more, the cheapest first."""
    what = COST[facts["goal"]]
    timed = sorted(
        (row for row in facts["candidates"] if "costs" in row),
        key=lambda row: (row["costs"][what]["share"], row["loss"], row["kl"]),
    )
    found: list[dict[str, Any]] = []
    for row in timed:
        if not found or (row["loss"], row["kl"]) < (found[-1]["loss"], found[-1]["kl"]):
            found.append(row)
    return found


def draw(facts: dict[str, Any], path: Path) -> None:
    """Loss against what the goal names, a point a candidate, to a file of the kind that its name says."""
    what = COST[facts["goal"]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    on_front = front(facts)
    axis.plot(
        [row["costs"][what]["share"] for row in on_front],
        [100 * row["loss"] for row in on_front],
        color=_ON_FRONT,
        linewidth=1,
        label="front: none is faster and loses less",
    )
    for row in facts["candidates"]:
        if "costs" in row:
            share, loss, marked = row["costs"][what]["share"], 100 * row["loss"], row in on_front
            reach = [[0], [max(0.0, 100 * row["upper"] - loss)]]
            color = _ON_FRONT if marked else _ONE
            axis.errorbar(
                [share], [loss], yerr=reach, fmt="o" if marked else "x", color=color, capsize=2, linewidth=0.6
            )
            axis.annotate(row["setting"], (share, loss), fontsize=6, xytext=(4, 4), textcoords="offset points")
    if facts["reported"] is not None:
        share = facts["reported"]["costs"][what]["share"]
        axis.plot(
            [share],
            [100 * facts["reported"]["loss"]],
            "*",
            color=_LIMIT,
            markersize=12,
            label="chosen, on other samples",
        )
    axis.axhline(
        100 * facts["bound"], color=_LIMIT, linestyle="--", linewidth=1, label=f"bound, {_percent(facts['bound'])}"
    )
    axis.axvline(1.0, color=_ONE, linestyle=":", linewidth=1, label="dense attention")
    axis.margins(x=0.2)
    axis.set_xlabel(_AXES[facts["goal"]])
    axis.set_ylabel(f"{facts['loss']}, % (to its upper limit)")
    axis.set_title(f"{facts['model']['name']} on {facts['device']['name']}", fontsize=9, parse_math=False)
    axis.legend(fontsize=7)
    figure.savefig(path)


def _candidates(facts: dict[str, Any]) -> Table:
    table = Table(title="Candidates, on the samples to choose on", box=SIMPLE_HEAD)
    table.add_column("setting", min_width=16)
    for name in ("lost", "same\ntoken", "KL", "kept", "first\ntoken", "answer", "cache"):
        table.add_column(name, justify="right")
    on_front = front(facts)
    for row in facts["candidates"]:
        cells = [""] * 7
        if "samples" in row:
            cells[:4] = [_lost(facts, row), f"{row['same']:.1%}", f"{row['kl']:.4f}", f"{row['kept']:.0%}"]
        if "costs" in row:
            cells[4:] = [f"{row['costs'][what]['share']:.2f}x" for what in ("first_s", "total_s", "cache_bytes")]
        note = row["dropped"] or ("front" if row in on_front else "")
        table.add_row(escape(row["setting"]) + (f"\n[dim]{escape(note)}[/]" if note else ""), *cells)
    return table


def _tests(facts: dict[str, Any]) -> Table:
    table = Table(title="Tests, on the samples to report on, the safest first", box=SIMPLE_HEAD)
    table.add_column("setting", min_width=16)
    for name in ("lost", "upper limit"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in facts["tested"]:
        outcome = "[green]passed[/]" if row["passed"] else "[yellow]not passed[/]"
        table.add_row(escape(row["setting"]), _lost(facts, row), _percent(row["upper"]), outcome)
    return table


def _lost(facts: dict[str, Any], row: dict[str, Any]) -> str:
    """How many samples, or of the tokens of how many, which share."""
    if facts["loss"].startswith("share of next tokens"):
        return f"{row['lost'] / row['samples']:.2%} of {row['samples']}"
    return f"{row['lost']:.0f} of {row['samples']}"


def _percent(share: float) -> str:
    """A limit, rounded up to hundredths of a percent."""
    return f"{math.ceil(1e4 * share - 1e-6) / 100:.4g}%"


def _seconds(cost: dict[str, float]) -> str:
    shown = [f"{value * 1e3:,.0f} ms" if value < 1 else f"{value:,.2f} s" for value in (cost["here"], cost["dense"])]
    return f"{shown[0]} (dense {shown[1]})"
