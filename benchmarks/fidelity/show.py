"""The table of a run, for a terminal and for a page."""

from __future__ import annotations

from typing import Any

from rich.table import Table

__all__ = ["HEADER", "cells", "table"]

HEADER = (
    *("setting", "kept", "KL (95%)", "same token", "keys, 1,357", "keys, 2,713", "a layer"),
    *("cache", "pages kept", "pages right (95%)", "against dense, points (95%)", "cache"),
)


def _share(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f}%"


def cells(row: dict[str, Any]) -> list[str]:
    """One setting's row; empty where it was not measured."""
    text, key, page = (row.get(measure) for measure in ("text", "key", "page"))
    found = [row["setting"]]
    if text:
        low, high = text["kl_interval95"]
        found += [_share(text["kept"]), f"{text['kl']:.4f} ({low:.4f} - {high:.4f})", _share(text["same"], 1)]
    else:
        found += [""] * 3
    for length in ("1357", "2713"):
        group = key["by_length"].get(length) if key else None
        found.append(f"{round(group['right'] * group['samples'])} / {group['samples']}" if group else "")
    found += [f"{text['layer_ms_speedup']:.2f}x", _share(text["cache_share"])] if text else [""] * 2
    if page:
        (low, high), (worst, best) = page["interval95"], page["against_dense_interval95"]
        found += [_share(page["kept"]), f"{_share(page['right'], 1)} ({100 * low:.1f} - {100 * high:.1f})"]
        found += [f"{100 * page['against_dense']:+.1f} ({100 * worst:+.1f} - {100 * best:+.1f})"]
        found += [_share(page["cache_share"])]
    else:
        found += [""] * 4
    return found


def table(line: dict[str, Any]) -> Table:
    """A run's, for a terminal."""
    shown = Table(title=f"{line['split']} samples, {line['dtype']}; times of a layer against dense")
    for name in HEADER:
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for row in line["rows"]:
        shown.add_row(*cells(row))
    return shown
