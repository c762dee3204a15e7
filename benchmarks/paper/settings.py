"""What is compared: a setting is a context over the model, with its parameters in words that JSON can hold."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import zipvl
from benchmarks.paper.statistics import bootstrap
from benchmarks.paper.subject import CALIBRATION, Subject
from zipvl.baselines import (
    AIM,
    Baseline,
    FastV,
    PyramidDrop,
    TowerAttention,
    Variant,
    VisionZip,
    applied,
    image_budget,
    variant,
)
from zipvl.policy import SHORTEST

__all__ = [
    "NOT_AT_HAND",
    "Row",
    "Runner",
    "Setting",
    "baseline",
    "dense",
    "match_ratio",
    "ours",
    "ratio_of",
    "selecting",
]

NOT_AT_HAND = "not at hand"
TOLERANCE, MAX_STEPS = 0.004, 9
"""A matched ratio is this close on the calibration pages, or what so many evaluations find."""
LOG_RANGE = (-5.0, math.log10(0.7))
"""Where log10(1 - tau) is looked for: tau from 0.3 to 0.99999."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One line of a table.

    Args:
        label: in words.
        context: given the model, and what the tower said where features are shared, the context to run in.
        parameters: what makes it this setting.
        group: what it is compared within.
        paper: the paper's figure for it.
    """

    label: str
    context: Callable[[Any, TowerAttention | None], AbstractContextManager[Any]]
    parameters: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    paper: str = NOT_AT_HAND


def dense() -> Setting:
    """The model as it is."""
    return Setting("dense", lambda _model, _tower: nullcontext(), {"method": "dense"})


def ours(label: str = "ZipVL", group: str = "", paper: str = NOT_AT_HAND, **config: Any) -> Setting:
    """`zipvl.sparse` with the paper's method, under a configuration; pages are sparse on every device."""
    made = zipvl.ZipVLConfig.paper(**({"dense_below": SHORTEST} | config))
    return Setting(label, lambda model, _tower: zipvl.sparse(model, made), {"method": "zipvl", **config}, group, paper)


def selecting(label: str, group: str = "", paper: str = NOT_AT_HAND, **choice: Any) -> Setting:
    """ZipVL with a choice that its configuration does not offer."""
    made = Variant(**choice)
    return Setting(label, lambda model, _tower: variant(model, made), {"method": "variant", **choice}, group, paper)


def baseline(
    label: str, make: Callable[[TowerAttention | None], Baseline], group: str = "", paper: str = NOT_AT_HAND
) -> Setting:
    """A baseline; ``make`` is given what the tower said, where features are shared."""
    example = make(None)
    kept = {
        name: value for name, value in vars(example).items() if isinstance(value, (int, float)) and name != "shared"
    }
    return Setting(
        label, lambda model, tower: applied(model, make(tower)), {"method": example.name, **kept}, group, paper
    )


def baselines_at(budget: float, subject: Subject, task: str) -> dict[str, Callable[[TowerAttention | None], Baseline]]:
    """Each baseline by name, with the parameters that give it ``budget`` of all tokens.

    A baseline that cannot have this budget raises its ValueError when it is made.
    """
    batch = subject.batches(task, 1, CALIBRATION)[0]
    ids = batch.inputs["input_ids"][0]
    image = int((ids == subject.model.config.image_token_id).sum())
    share = image_budget(budget, len(ids), image)
    layers, ends = subject.layers, subject.row_ends(task)
    return {
        "VisionZip": lambda tower: VisionZip.for_budget(share, ends, tower),
        "AIM": lambda _tower: AIM.for_budget(share, layers),
        "PyramidDrop": lambda _tower: PyramidDrop.for_budget(share, layers),
        "FastV": lambda _tower: FastV.for_budget(share, layers),
        "FastV, K = 1": lambda _tower: FastV.for_budget(share, layers, 1),
    }


def ratio_of(record: Any) -> float:
    """The mean share of tokens in attention, of any context's record."""
    if record is None:
        return 1.0
    return record.budget if hasattr(record, "budget") else record.mean_ratio


def match_ratio(measure: Callable[[float], float], target: float) -> tuple[float, float]:
    """The tau at which ``measure(tau)``, a ratio that grows with tau, is ``target``.

    Bisection of log10(1 - tau), each step where a straight line between the two ends would have it, or in the middle if
    that has just not moved the same end.

    Returns:
        tau and the ratio there; an end of the range where that is as near as it gets.
    """
    (low, high), best = LOG_RANGE, (1.0, 1.0)
    ratios: dict[float, float] = {}

    def at(x: float) -> float:
        nonlocal best
        tau = 1 - 10**x
        ratios[x] = measure(tau)
        if abs(ratios[x] - target) < abs(best[1] - target) or len(ratios) == 1:
            best = (tau, ratios[x])
        return ratios[x]

    x, line = -1.6, True  # tau 0.975
    for _ in range(MAX_STEPS):
        if abs(at(x) - target) <= TOLERANCE:
            break
        low, high = (x, high) if ratios[x] > target else (low, x)
        if low in ratios and high in ratios and line:
            x = low + (high - low) * (ratios[low] - target) / (ratios[low] - ratios[high])
            x = min(max(x, low + 0.1 * (high - low)), high - 0.1 * (high - low))
        else:
            x = (low + high) / 2 if low in ratios and high in ratios else x + (0.5 if high not in ratios else -0.5)
            x = min(max(x, LOG_RANGE[0]), LOG_RANGE[1])
        line = not line
        if x in ratios:
            break
    return best


class Runner:
    """Measures settings of one table on the same pages.

    Args:
        subject: the model.
        pages: how many prompts a setting answers.
        calibration: how many others decide a matched tau.
        tau: of ZipVL where nothing is matched.
        seed: of the probes.
        timed: how many prompts are timed to the first token.
    """

    def __init__(
        self, subject: Subject, pages: int, calibration: int, tau: float = 0.975, seed: int = 0, timed: int = 3
    ) -> None:
        self.subject, self.pages, self.calibration = subject, pages, calibration
        self.tau, self.seed, self.timed = tau, seed, timed
        self.start()

    def start(self) -> None:
        """A new table begins."""
        self.notes: list[str] = []
        self.measured: list[Row] = []

    def measure(self, setting: Setting, task: str = "mixed", pages: int | None = None, timed: bool = False) -> Row:
        """One row: exact match with its interval, ratio, and if ``timed`` the time to the first token."""
        subject, started = self.subject, time.perf_counter()
        batches = subject.batches(task, pages or self.pages)
        profile: dict[int, list[float]] = {}

        def each(record: Any) -> None:
            for layer, entry in getattr(record, "layers", {}).items():
                profile.setdefault(layer, []).append(entry.ratio)

        found = subject.answers(
            batches, lambda: setting.context(subject.model, subject.tower), f"{setting.label}, {task}", each
        )
        layers = [sum(profile[i]) / len(profile[i]) for i in sorted(profile)] or getattr(found.record, "shares", [])
        row: Row = {
            "label": setting.label,
            "group": setting.group,
            "task": task,
            "parameters": setting.parameters,
            "paper": setting.paper,
            "ratio": round(ratio_of(found.record), 4),
            "exact_match": round(sum(found.right) / len(found.right), 4),
            "interval95": bootstrap(found.right),
            "pages": len(found.right),
            "layers": [round(value, 4) for value in layers],
            "seconds": round(time.perf_counter() - started, 2),
            "right": "".join("01"[ok] for ok in found.right),
        }
        if timed:
            items = [item for batch in batches for item in batch.items][: self.timed]
            row["first_token_ms"] = round(
                subject.first_token_ms(items, lambda: setting.context(subject.model, None)), 1
            )
        self.measured.append(row)
        return row

    def ratio(self, setting: Setting, task: str = "mixed") -> float:
        """The ratio on the calibration pages, from prefills alone."""
        subject = self.subject
        batches = subject.batches(task, self.calibration, CALIBRATION)
        return ratio_of(subject.prefills(batches, lambda: setting.context(subject.model, subject.tower)))

    def matched(self, make: Callable[[float], Setting], target: float, task: str = "mixed") -> Setting:
        """``make(tau)`` with the tau that gives ``target`` on the calibration pages."""
        tau, found = match_ratio(lambda tau: self.ratio(make(tau), task), target)
        if abs(found - target) > 2 * TOLERANCE:
            self.notes.append(f"{make(tau).label}: ratio {target:.3f} was not reached, the nearest is {found:.3f}")
        return make(round(tau, 6))
