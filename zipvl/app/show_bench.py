"""What ``zipvl bench`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_bench"]

_PARTS = {"layer": "one layer", "first token": "first token", "answer": "answer"}


def print_bench(facts: dict[str, Any]) -> None:
    """Where it ran, one table, and what the numbers do not say."""
    console = Console(highlight=False)
    versions = facts["versions"]
    cuda = f", CUDA {versions['cuda']}" if versions["cuda"] else ""
    where = f"{facts['device_name']}, torch {versions['torch']}{cuda}, transformers {versions['transformers']}"
    console.print(f"[bold]Device[/]  {escape(where)}, zipvl {escape(versions['zipvl'])}", soft_wrap=True)
    chosen = f" ({facts['chosen']})" if facts["chosen"] else ""
    console.print(f"[bold]Model[/]   {escape(facts['model'])}, {facts['dtype']}{escape(chosen)}", soft_wrap=True)
    heads = facts["heads"]
    shape = f"{heads['query']}/{heads['key_value']} heads, head dim {heads['dim']}, one row, causal"
    console.print(f"[bold]Layer[/]   {shape}\n", soft_wrap=True)
    table = Table("", "", "dense", "ZipVL", "times as fast", "how")
    part = None
    for row in facts["rows"]:
        if part is not None and part != row["part"]:
            table.add_section()
        table.add_row("" if row["part"] == part else _PARTS[row["part"]], row["name"], *_cells(row))
        part = row["part"]
    console.print(table)
    for line in _remarks(facts):
        console.print(escape(line), soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    if row["not_run"] is not None:
        return ["-", "-", "-", f"[yellow]not run: {escape(row['not_run'])}[/]"]
    dense, sparse = row["dense"], row["zipvl"]
    speedup = "-" if row["speedup"] is None else f"[bold]{row['speedup']:.2f}x[/]"
    hows = dense["how"] if dense["how"] == sparse["how"] else f"dense {dense['how']}, ZipVL {sparse['how']}"
    by = [f"dense by {row['dense_by']}"] if row["dense_by"] else []
    return [_time(dense), _time(sparse), speedup, escape("; ".join([hows, *by, *row["notes"]]))]


def _time(side: dict[str, Any]) -> str:
    if side["seconds"] is None:
        return "-"
    milliseconds = 1e3 * side["seconds"]
    return f"{milliseconds:,.3f} ms" if milliseconds < 10 else f"{milliseconds:,.1f} ms"


def _remarks(facts: dict[str, Any]) -> list[str]:
    config = facts["config"]
    why = "random weights do not show what share tau would keep"
    if not facts["random_weights"]:
        why = "rows of one share compare, and zipvl run shows what share tau keeps"
    window = f"a window of {config['local_window']} tokens and {config['num_sinks']} sinks"
    lines = [
        f"The share kept is imposed (--ratio {config['ratio']:g}; with a window its last tokens on top): {why}.",
        f"ZipVL: {window} unless a row says otherwise, and a {config['cache']} cache. Dense: as transformers runs it.",
    ]
    if facts["device"] == "cpu" and any(row["not_run"] is None for row in facts["rows"]):
        lines.append("These are times of a CPU. They say nothing about a GPU.")
    if facts["no_gpu"] is not None:
        lines.append(f"No GPU: {facts['no_gpu']}. --device cpu runs a tiny shape on the CPU.")
    if facts["interrupted"]:
        lines.append("Interrupted: the table holds what was measured until then.")
    lines.append(f"Took {facts['used_s']:,.0f} s of --budget-s {facts['budget_s']:g}.")
    return lines
