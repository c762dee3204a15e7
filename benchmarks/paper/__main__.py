"""Measures a table of the paper: ``python -m benchmarks.paper A`` (``B``, ``C``, ``D``, ``E``, ``figure-a``, ``ours``,
``profiles``, ``all``), the methods' times in a 7B shape on a GPU (``times``), or renders the report from the results:
``python -m benchmarks.paper report``.

Every table is a line of benchmarks/results/paper.jsonl with the pages, seeds, intervals and the answers page by page;
times are lines of paper_times.jsonl.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks._record import append
from benchmarks.paper import show, times
from benchmarks.paper.settings import Runner
from benchmarks.paper.subject import CALIBRATION, FOLDER, Subject
from benchmarks.paper.tables import TABLES

PAGES, FULL_PAGES = 20, 1000
CALIBRATION_PAGES, FULL_CALIBRATION_PAGES = 5, 100


def main(
    table: Annotated[str, typer.Argument(help=f"{', '.join(TABLES)}, all (several: A,C), times, or report.")],
    pages: Annotated[
        int | None, typer.Option(min=1, help=f"Held-out pages for each setting; {PAGES} by default.")
    ] = None,
    full: Annotated[bool, typer.Option(help=f"At least {FULL_PAGES:,} pages, for a GPU.")] = False,
    calibration: Annotated[
        int | None, typer.Option(min=1, help="Other pages, on which a matched tau is found.")
    ] = None,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; by default by device.")] = "",
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts at once.")] = None,
    tau: Annotated[float, typer.Option(help="Of ZipVL where nothing is matched.")] = 0.975,
    seed: Annotated[int, typer.Option(help="Of the probe tokens.")] = 0,
    folder: Annotated[Path, typer.Option(help="Model folder; the report is of the shipped one.")] = FOLDER,
    seconds: Annotated[
        float, typer.Option(min=0, help="Of times: after so many no row of a second or third round begins.")
    ] = times.SECONDS,
    smoke: Annotated[bool, typer.Option(help="Of times: a tiny shape, not recorded; on the CPU too.")] = False,
) -> None:
    """Measures tables, prints them and appends them to the results."""
    if table == "report":
        from benchmarks.paper import report  # matplotlib, which a machine with a GPU may lack

        for path in report.render():
            print(path)
        return
    if table == "times":
        times.run(device, seconds, smoke)
        return
    names = list(TABLES) if table == "all" else table.split(",")
    if unknown := [name for name in names if name not in TABLES]:
        sys.exit(f"TABLE: expected {', '.join(TABLES)}, all, times or report, got {', '.join(unknown)}")
    subject = Subject(folder, device, getattr(torch, dtype) if dtype else None, batch)
    pages = max(pages or 0, FULL_PAGES) if full else pages or PAGES
    run = Runner(
        subject, pages, calibration or (FULL_CALIBRATION_PAGES if full else CALIBRATION_PAGES), tau=tau, seed=seed
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was measured by then is written
    for name in names:
        _measure(name, run)


def _measure(name: str, run: Runner) -> None:
    """Measures a table, appends it to the results and prints it; if it is stopped, the rows that it got to."""
    run.start()
    started, rows, subject = time.perf_counter(), None, run.subject
    try:
        rows = TABLES[name].rows(run)
    finally:
        if rows is not None or run.measured:
            line = {
                "benchmark": "paper",
                "table": name,
                "complete": rows is not None,
                "pages": run.pages,
                "first_page": 0,
                "calibration": {"pages": run.calibration, "first_page": CALIBRATION},
                "tau": run.tau,
                "probe_seed": run.seed,
                "dtype": str(subject.dtype).removeprefix("torch."),
                "batch": subject.batch,
                "tile_side": subject.tile_side,
                "weights_sha256": subject.weights,
                "seconds": round(time.perf_counter() - started, 1),
                "notes": list(run.notes),
                "rows": run.measured if rows is None else rows,
            }
            append("paper", line, subject.device)
            Console(width=None if sys.stdout.isatty() else 160).print(show.rendered(TABLES[name], line))


if __name__ == "__main__":
    typer.run(main)
