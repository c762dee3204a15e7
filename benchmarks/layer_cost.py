"""The constants of zipvl/policy.py, fitted to the newest ``model`` part of benchmarks/results/layer.jsonl.

``python -m benchmarks.layer --part model`` measures, ``python -m benchmarks.layer_cost`` prints the constants and how
far the fit is off. Times are ``constant + per token + per pair``, the sum of squared relative errors is least, and no
constant is negative: a term that would be is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import typer

RESULTS = Path(__file__).resolve().parent / "results" / "layer.jsonl"
FARTHEST = 65536  # longer runs throttle the clock by their own heat, and no decision is made there

Row = dict[str, Any]


def measured() -> tuple[dict[str, Any], list[Row]]:
    """The shape and the rows of the newest ``model`` part."""
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    newest = [run for run in runs if run["part"] == "model"][-1]
    return newest["shape"], [row for row in newest["rows"] if row["case"]["N"] <= FARTHEST]


def dense_work(shape: dict[str, Any], row: Row) -> list[float]:
    """What the constants of dense attention are multiplied with: a call, its numbers, their pairs."""
    tokens = row["case"]["N"]
    numbers = 1e-9 * shape["B"] * shape["Hq"] * shape["D"] * tokens
    return [1.0, numbers, numbers * tokens]


def zipvl_work(shape: dict[str, Any], row: Row) -> list[float]:
    """The same of ZipVL's, whose pairs are of selected tokens, and whether their number was found by tau."""
    call, numbers, pairs = dense_work(shape, row)
    share = row["kept"] / row["case"]["N"]
    return [call, numbers, pairs * share**2, float(row["case"]["ratio"] is None)]


def fit(terms: list[list[float]], times: list[float]) -> list[float]:
    """Least squares of relative errors, each constant at least 0."""
    matrix = np.array(terms) / np.array(times)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        solution = np.linalg.lstsq(matrix[:, used], np.ones(len(times)), rcond=None)[0]
        if (solution >= 0).all():
            constants = np.zeros(matrix.shape[1])
            constants[used] = solution
            return [float(c) for c in constants]
        used.pop(int(solution.argmin()))


def constants() -> dict[str, tuple[list[float], float]]:
    """For ``DENSE_US`` and ``ZIPVL_US`` of zipvl/policy.py: the constants and the largest relative error."""
    shape, rows = measured()
    result = {}
    for name, kind, work in (("DENSE_US", "dense", dense_work), ("ZIPVL_US", "zipvl", zipvl_work)):
        terms = [work(shape, row) for row in rows]
        times = [row["graph"][kind]["us"] for row in rows]
        fitted = fit(terms, times)
        error = max(abs(float(np.dot(t, fitted)) / us - 1) for t, us in zip(terms, times, strict=True))
        result[name] = (fitted, error)
    return result


def main() -> None:
    """Prints the constants as zipvl/policy.py has them."""
    for name, (values, error) in constants().items():
        print(f"{name} = ({', '.join(f'{value:.4g}' for value in values)})  # largest error {100 * error:.0f}%")


if __name__ == "__main__":
    typer.run(main)
