"""Which setting is chosen: candidates on the samples that tune, a few of them in turn on those that report.

No model is here: what is measured comes through ``Measures``, so that the search can be run on results that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Protocol

from zipvl.app.calibrate.candidates import Goal
from zipvl.app.calibrate.intervals import attainable, is_below, needed, upper
from zipvl.app.calibrate.journal import Line
from zipvl.app.calibrate.samples import Split
from zipvl.app.calibrate.settings import DENSE, is_harder

__all__ = ["COST", "Aim", "Found", "Measures", "Plan", "Test", "Try", "plan", "ratio", "search"]

LOOKS = (8, 24)
"""Samples that tune after which candidates are dropped; then all."""
TIMED = 8
CHUNK = 10
"""Samples that report between two questions whether the test can still be passed."""
HOPELESS = 0.9
"""Confidence at which a loss above the bound ends a candidate."""
GAIN = 0.98
"""Of another's cost: no more, and a candidate is worth a test of its own."""
MOST_TESTS = 4
FEWEST_TO_TUNE = 16
EXTRA = 1.25
"""How many times as long as dense a candidate's sample is taken to need, before any is measured."""
ROUGHLY = 1.1
"""So many times as many samples as there seems to be time for report where they are what the bound needs."""
COST = {"ttft": "first_s", "memory": "cache_bytes", "answer": "total_s"}


@dataclass(frozen=True)
class Aim:
    """What is asked for: of all settings whose loss is at most ``max_loss``, at this confidence, the one that is best
    at ``goal``."""

    max_loss: float
    confidence: float
    goal: Goal


class Measures(Protocol):
    """What the search asks for. Samples are named by their places."""

    def losses(self, name: str, places: Sequence[int]) -> list[Line]:
        """What a setting lost, sample by sample: ``loss`` in [0, 1], ``kl``, ``seconds``."""

    def costs(self, names: Sequence[str], places: Sequence[int]) -> dict[str, list[Line]]:
        """What dense attention and these settings took, one prompt at a time: ``first_s``, ``total_s``,
        ``cache_bytes``."""

    def seconds_left(self) -> float:
        """Until the search should have ended; what was measured in an earlier run adds what it took, until it is asked
        for."""


@dataclass(frozen=True)
class Plan:
    """What there is time for.

    Attributes:
        candidates: how many are tried at most.
        split: the samples, fewer than there are where time is short.
        tests: how many settings are tested on the samples that report, at most.
        short: whether more time would have allowed more.
    """

    candidates: int
    split: Split
    tests: int
    short: bool


@dataclass
class Try:
    """A candidate on the samples that tune.

    Attributes:
        dropped: why it went no further; None: it did.
        cost: share of dense attention's, of what the goal names; NaN: not measured.
    """

    name: str
    lines: list[Line] = field(default_factory=list)
    dropped: str | None = None
    cost: float = math.nan

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines]

    @property
    def loss(self) -> float:
        return fmean(self.losses) if self.lines else math.nan

    @property
    def kl(self) -> float:
        return fmean(line["kl"] for line in self.lines) if self.lines else math.nan


@dataclass(frozen=True)
class Test:
    """A setting on the samples that report.

    Attributes:
        lines: fewer than there are samples where it could not be passed any more.
        upper: the upper limit of the loss.
    """

    name: str
    lines: list[Line]
    upper: float
    passed: bool


@dataclass(frozen=True)
class Found:
    """The outcome.

    Attributes:
        bound: what was tested: ``max_loss``, or the least that so few samples can show.
        chosen: the best setting that passed; None: none did.
    """

    aim: Aim
    plan: Plan
    bound: float
    tries: list[Try]
    tests: list[Test]
    chosen: Test | None


def search(
    measures: Measures, names: Sequence[str], split: Split, aim: Aim, say: Callable[[str], None] = lambda _: None
) -> Found:
    """Finds the best setting.

    Candidates are compared on ``split.tune`` alone. Those that might do and of which none is both safer and better than
    another are then tested on ``split.report``, the safest first, until one fails. The order was fixed without the
    samples that report, and a setting is tested only after all before it have passed: so each test has the whole
    ``1 - confidence``, and the chance that any setting passes whose loss is above the bound is at most that (fixed
    sequence testing; Maurer, Hothorn and Lehmacher 1995, Angelopoulos and others, arXiv 2110.01052).

    Args:
        names: of candidates, the likely ones first.
        say: told what is done.
    """
    seconds = median(line["seconds"] for line in measures.losses(DENSE, split.tune[: LOOKS[0]]))
    planned = plan(seconds, measures.seconds_left(), len(names), split)
    split = planned.split
    bound = _bound(aim, len(split.report))
    reserve = (1 + EXTRA) * len(split.report) * seconds
    tries = _tune(measures, names[: planned.candidates], split.tune, replace(aim, max_loss=bound), reserve, say)
    sequence = _sequence(tries, bound)
    if sequence:  # how many can report is decided by time alone, before any of them is looked at
        each = median(line["seconds"] for line in measures.losses(DENSE, split.tune))
        each += median(line["seconds"] for line in sequence[0].lines)
        count, enough = int(measures.seconds_left() / each), needed(aim.max_loss, aim.confidence)
        report = split.report[: enough if count < enough <= ROUGHLY * count else max(1, count)]
        split = replace(split, report=report)
        short = planned.short or len(report) < len(planned.split.report)
        planned, bound = replace(planned, split=split, short=short), _bound(aim, len(report))
    tests: list[Test] = []
    for entry in sequence[: planned.tests]:
        if tests and measures.seconds_left() < len(split.report) * median(line["seconds"] for line in entry.lines):
            entry.dropped = "no time left to test it"
            break
        say(f"testing {entry.name}")
        tests.append(_test(measures, entry.name, split.report, bound, aim.confidence))
        if not tests[-1].passed:
            break
    passed = [test for test in tests if test.passed]
    return Found(aim, planned, bound, tries, tests, passed[-1] if passed else None)


def _bound(aim: Aim, samples: int) -> float:
    """What is tested: the loss that is allowed, or the least that so many samples can show."""
    return max(aim.max_loss, math.ceil(1e4 * attainable(samples, aim.confidence)) / 1e4)


def plan(seconds: float, left: float, candidates: int, split: Split) -> Plan:
    """What there is time for, if dense attention needs ``seconds`` a sample and ``left`` seconds are left."""
    samples = left / max(seconds, 1e-9)  # that dense attention could do
    tune, report = len(split.tune), len(split.report)
    first = min(LOOKS[0], tune)

    def of_candidate() -> float:
        return EXTRA * (first + min(TIMED, tune) + (tune - first) / 2)

    def rest(fewest: int) -> float:
        """Samples left over after dense attention, ``fewest`` candidates and one test."""
        return samples - tune - report * (1 + EXTRA) - fewest * of_candidate()

    if rest(3) < 0:
        tune = min(tune, FEWEST_TO_TUNE)
    if rest(2) < 0:
        report = max(1, min(report, int((samples - tune - 2 * of_candidate()) / (1 + EXTRA))))
    tried = min(candidates, max(2, 2 + int(rest(2) / of_candidate())))
    tests = min(MOST_TESTS, max(1, 1 + int(rest(tried) / (EXTRA * report))))
    short = tried < candidates or tune < len(split.tune) or report < len(split.report)
    return Plan(tried, Split(split.tune[:tune], split.report[:report]), max(tests, 2), short)


def ratio(dense: Sequence[Line], found: Sequence[Line], what: str) -> float:
    """The median share of dense attention's, sample by sample."""
    return median(line[what] / max(base[what], 1e-9) for base, line in zip(dense, found, strict=True))


def _tune(
    measures: Measures,
    names: Sequence[str],
    places: Sequence[int],
    aim: Aim,
    reserve: float,
    say: Callable[[str], None],
) -> list[Try]:
    tries = [Try(name) for name in names]
    for count in dict.fromkeys(min(look, len(places)) for look in (*LOOKS, len(places))):
        first = count == min(LOOKS[0], len(places))
        for entry in tries:
            hopeless = [other.name for other in tries if other.dropped and other.dropped.startswith("loses")]
            if entry.dropped is None and any(is_harder(entry.name, other) for other in hopeless):
                entry.dropped = "a safer one of its kind lost too much"
            if entry.dropped is not None:
                continue
            if measures.seconds_left() < reserve:
                entry.dropped = "no time left" if first else None
                continue
            say(f"{entry.name}, {count} samples")
            entry.lines = measures.losses(entry.name, places[:count])
            if is_below([1 - loss for loss in entry.losses], 1 - aim.max_loss, HOPELESS):
                entry.dropped = f"loses too much after {count} samples"
        alive = [entry for entry in tries if entry.dropped is None]
        if first and alive:
            say("times")
            lines = measures.costs([entry.name for entry in alive], places[: min(TIMED, len(places))])
            for entry in alive:
                entry.cost = ratio(lines[DENSE], lines[entry.name], COST[aim.goal])
        for entry in alive:
            better = [other for other in alive if other.dropped is None and _beats(other, entry)]
            if better:
                entry.dropped = f"no better than {better[0].name}"
    return tries


def _beats(other: Try, entry: Try) -> bool:
    """Whether a candidate costs less than another and was not less safe."""
    return other.cost < entry.cost and other.loss <= entry.loss and other.kl <= entry.kl


def _sequence(tries: Sequence[Try], bound: float) -> list[Try]:
    """What is to be tested: the safest first, then those that cost less, each less than the one before. Says of the
    others why they are not."""
    alive = [entry for entry in tries if entry.dropped is None]
    for entry in alive:
        if entry.loss > bound / 2:
            entry.dropped = "loses too much to be tested"
    found: list[Try] = []
    for entry in sorted((e for e in alive if e.dropped is None), key=lambda entry: (entry.loss, entry.kl)):
        if found and entry.cost > GAIN * found[-1].cost:
            entry.dropped = f"hardly better than {found[-1].name}"
        else:
            found.append(entry)
    return found if len(found) <= MOST_TESTS else [found[0], *found[1 - MOST_TESTS :]]


def _test(measures: Measures, name: str, places: Sequence[int], bound: float, confidence: float) -> Test:
    lines: list[Line] = []
    for start in range(0, len(places), CHUNK):
        lines += measures.losses(name, places[start : start + CHUNK])
        losses = [line["loss"] for line in lines]
        if not is_below(losses + [0.0] * (len(places) - len(losses)), bound, confidence):
            break
    losses = [line["loss"] for line in lines]
    passed = len(losses) == len(places) and is_below(losses, bound, confidence)
    return Test(name, lines, upper(losses, confidence), passed)
