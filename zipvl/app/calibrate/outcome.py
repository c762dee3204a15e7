"""A calibration from samples to its outcome, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

from zipvl.app.calibrate import settings
from zipvl.app.calibrate.intervals import mean_interval, needed, upper, wilson
from zipvl.app.calibrate.journal import Line
from zipvl.app.calibrate.measure import Measurer
from zipvl.app.calibrate.samples import Sample, digest, split
from zipvl.app.calibrate.search import TIMED, Aim, Found, Test, Try, ratio, search

__all__ = ["Request", "calibrate", "write"]

_COSTS = ("first_s", "total_s", "cache_bytes")


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        data: where the samples come from.
        names: of candidates.
        seed: of the split.
    """

    aim: Aim
    data: Path
    names: tuple[str, ...]
    seed: int


def calibrate(
    measurer: Measurer, samples: list[Sample], request: Request, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Searches, and returns all that is to be known: what was found, how, and where it comes from.

    Raises:
        InputError: as for ``Measurer.losses``.
    """
    allowed = measurer.seconds_left()
    aim = request.aim
    found = search(measurer, request.names, split(len(samples), aim.max_loss, aim.confidence, request.seed), aim, say)
    tune, report = found.plan.split.tune, found.plan.split.report
    return {
        "setting": None if found.chosen is None else found.chosen.name,
        "goal": aim.goal,
        "max_loss": aim.max_loss,
        "bound": found.bound,
        "confidence": aim.confidence,
        "needed_samples": needed(aim.max_loss, aim.confidence),
        "loss": "share of next tokens that differ" if measurer.by_tokens else "share of answers that are lost",
        "reported": None if found.chosen is None else _reported(measurer, found.chosen, report, aim),
        "tested": [_tested(test, len(report)) for test in found.tests],
        "candidates": [_tried(measurer, entry, tune, aim) for entry in found.tries],
        "candidates_known": len(request.names),
        "samples": {"all": len(samples), "tune": len(tune), "report": len(report), "seed": request.seed}
        | {"shortest": measurer.shortest(_measured(measurer, (*tune, *report)))},
        "short_of_time": found.plan.short or _ran_out(found),
        "minutes": {"allowed": allowed / 60, "taken": (allowed - measurer.seconds_left()) / 60},
        "data": {"path": str(request.data), "sha256": digest(samples)},
        "dense_right": _dense_right(measurer, (*tune, *report)),
        "model": {"name": measurer.loaded.name, "sha256": measurer.weights},
        **{name: measurer.origin[name] for name in ("device", "dtype", "versions", "code", "max_new_tokens", "batch")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(measurer: Measurer, facts: dict[str, Any], output: Path) -> None:
    """Writes the chosen setting, with ``facts``, to a file that ``ZipVLConfig.load`` reads. Prompts shorter than any
    that was measured are to stay dense: nothing is known of them."""
    config = measurer.config(facts["setting"])
    assert config is not None
    shortest = max(config.dense_below, facts["samples"]["shortest"])
    config.replace(dense_below=shortest).save(output, calibration=facts)


def _ran_out(found: Found) -> bool:
    return any(entry.dropped is not None and entry.dropped.startswith("no time") for entry in found.tries)


def _reported(measurer: Measurer, test: Test, report: Sequence[int], aim: Aim) -> dict[str, Any]:
    """The chosen setting on the samples that report, times too."""
    places = report[:TIMED]
    return _lost(test.lines, aim.confidence) | {"costs": _costs(measurer.costs([test.name], places), test.name)}


def _tested(test: Test, samples: int) -> dict[str, Any]:
    lost = sum(line["loss"] for line in test.lines)
    facts = {"lost": lost, "samples": len(test.lines), "of": samples, "upper": test.upper, "passed": test.passed}
    return {"setting": test.name} | facts


def _tried(measurer: Measurer, entry: Try, tune: Sequence[int], aim: Aim) -> dict[str, Any]:
    facts: dict[str, Any] = {"setting": entry.name, "dropped": entry.dropped}
    if entry.lines:
        facts |= _lost(entry.lines, aim.confidence)
    if not math.isnan(entry.cost):
        facts["costs"] = _costs(measurer.costs([entry.name], tune[: min(TIMED, len(tune))]), entry.name)
    return facts


def _lost(lines: Sequence[Line], confidence: float) -> dict[str, Any]:
    losses, kls = [line["loss"] for line in lines], [line["kl"] for line in lines]
    exact = sum(line["exact"] for line in lines)
    return {
        "samples": len(lines),
        "lost": sum(losses),
        "loss": fmean(losses),
        "upper": upper(losses, confidence),
        "exact": exact / len(lines),
        "exact_interval95": wilson(exact, len(lines)),
        "same": fmean(line["same"] for line in lines),
        "kl": fmean(kls),
        "kl_interval95": mean_interval(kls),
        "kept": fmean(line["kept"] for line in lines),
    }


def _costs(lines: dict[str, list[Line]], name: str) -> dict[str, Any]:
    """Medians of dense attention and of a setting, and of their shares sample by sample."""
    dense, own = lines[settings.DENSE], lines[name]
    return {"samples": len(own)} | {
        what: {
            "dense": median(line[what] for line in dense),
            "here": median(line[what] for line in own),
            "share": ratio(dense, own, what),
        }
        for what in _COSTS
    }


def _measured(measurer: Measurer, places: Sequence[int]) -> list[int]:
    """Those of the samples that dense attention has answered."""
    return [p for p in places if measurer.journal.get("loss", settings.DENSE, measurer.samples[p].digest) is not None]


def _dense_right(measurer: Measurer, places: Sequence[int]) -> dict[str, Any] | None:
    """How often dense attention was right, among samples that have answers and were measured; None: none has."""
    lines = measurer.losses(settings.DENSE, _measured(measurer, places))
    right = [line["right"] for line in lines if line["right"] is not None]
    return {"samples": len(right), "right": sum(right) / len(right)} if right else None
