"""The tables: which settings, on which task, matched to what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from benchmarks.paper.costs import costs
from benchmarks.paper.families import LARGER_BUDGETS, PAPER_BUDGETS, RIVALS, fields
from benchmarks.paper.settings import NOT_AT_HAND, Row, Runner, Setting, baseline, baselines_at, dense, ours, selecting
from zipvl.baselines import FastV
from zipvl.config import CacheMode

__all__ = ["TABLES", "Table"]

BESIDE = (
    ("ZipVL, window 512", 0.9),
    ("ZipVL, window 128", 0.9),
    ("ZipVL, window 128, skipped MLPs", 0.9),
    ("ZipVL, window 128, skipped MLPs", 0.95),
    ("ZipVL, skipped MLPs", 0.95),
    ("ZipVL, skipped MLPs", 0.975),
)
"""What Table A has beside the paper's method, each with its tau: the default, and what ``zipvl calibrate`` tries."""
ALL_TOKENS = 4096
"""As many recent probes as no page has tokens: every token is a probe."""
TAUS = (0.9, 0.94, 0.96, 0.975, 0.985, 0.995, 1.0)
OTHER_SEEDS = (1, 2)
MATCHED = (1.0, 0.5)
"""Tables C and D compare at the ratio of the reference and at half of it, where more pages tell settings apart."""


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Args:
        title: what it shows.
        paper: what of the paper stands beside it.
        rows: measures it.
        claims: pairs of labels within a group, the better one first, that the paper's ordering says.
    """

    title: str
    paper: str
    rows: Callable[[Runner], list[Row]]
    claims: tuple[tuple[str, str], ...] = ()


def table_a(run: Runner) -> list[Row]:
    """ZipVL against the baselines, at their budgets and at its own; then the baselines at larger ones, since at equal
    time a pruner keeps more tokens."""
    rows = [run.measure(dense(), timed=True), run.measure(_reference(run), timed=True)]
    for family, tau in BESIDE:
        setting = ours(family, tau=tau, seed=run.seed, **fields(family, run.subject.layers))
        rows.append(run.measure(setting, timed=True))
    for name, budget in PAPER_BUDGETS.items():
        group = f"{budget:.1%}"
        setting = run.matched(lambda tau, group=group: ours(group=group, tau=tau, seed=run.seed), budget)
        rows.append(run.measure(setting, timed=True))
        for other in RIVALS:
            paper = f"{budget:.1%} of the tokens" if other == name else NOT_AT_HAND
            rows += _baseline(run, other, budget, "mixed", group, paper)
    for budget in LARGER_BUDGETS:
        for other in RIVALS:
            rows += _baseline(run, other, budget, "mixed", f"{budget:.1%}")
    return rows


def table_b(run: Runner) -> list[Row]:
    """ZipVL against FastV on prompts of several frames."""
    task = "frames"
    rows = [run.measure(dense(), task, timed=True)]
    whole = run.measure(dense(), "two pages", min(run.pages, 50))
    rows.append(whole | {"label": "dense, two whole pages (a check, not the task)"})
    own = run.measure(_reference(run), task, timed=True)
    fast = run.measure(baseline("FastV", lambda _tower: FastV(), "K = 2, R = 50%", "K = 2, R = 50%"), task, timed=True)
    setting = run.matched(lambda tau: ours(group="K = 2, R = 50%", tau=tau, seed=run.seed), fast["ratio"], task)
    rows += [own, fast, run.measure(setting, task, timed=True)]
    for budget in (own["ratio"], 0.5):
        group = f"{budget:.1%}"
        if budget == own["ratio"]:
            rows.append(own | {"group": group})
        else:
            setting = run.matched(lambda tau, group=group: ours(group=group, tau=tau, seed=run.seed), budget, task)
            rows.append(run.measure(setting, task))
        for name in ("FastV", "FastV, K = 1"):
            rows += _baseline(run, name, budget, task, group)
    return rows


def table_c(run: Runner) -> list[Row]:
    """Which tokens are probes, at equal ratios."""
    probes = {
        "64 recent": {"num_recent": 64, "num_random": 0},
        "128 recent": {"num_recent": 128, "num_random": 0},
        "128 random": {"num_recent": 0, "num_random": 128},
        "64 recent + 64 random": {"num_recent": 64, "num_random": 64},
        "all tokens": {"num_recent": ALL_TOKENS, "num_random": 0},
    }
    return _at_equal_ratios(run, ours, probes)


def table_d(run: Runner) -> list[Row]:
    """Which metric sets the budget and which ranks, at equal ratios."""
    metrics = ("accumulated", "normalized")
    pairs = {
        f"budget {budget}, rank {rank}": {"budget": budget, "rank": rank} for budget in metrics for rank in metrics
    }
    return _at_equal_ratios(run, selecting, pairs)


def figure_a(run: Runner) -> list[Row]:
    """tau against ratio and exact match, on an easy and a hard task."""
    rows = []
    for task in ("easy", "hard"):
        rows.append(run.measure(dense(), task))
        for tau in TAUS:
            rows.append(run.measure(ours(f"tau {tau:g}", task, tau=tau, seed=run.seed), task))
    return rows


def own_choices(run: Runner) -> list[Row]:
    """What is ours beyond the paper, and the choices it leaves open."""
    same = {"tau": run.tau, "seed": run.seed}
    rows = [run.measure(dense()), run.measure(ours("drop", "cache", **same))]
    for cache in get_args(CacheMode):
        if cache != "drop":
            rows.append(run.measure(ours(cache, "cache", cache=cache, **same)))
    target = run.ratio(_reference(run))
    rows += [
        run.measure(ours("all queries", "queries", all_queries=True, **same)),
        run.measure(run.matched(_maker(run, ours, "all queries, matched", "queries", {"all_queries": True}), target)),
        run.measure(selecting("text always kept", "text", keep_text=True, **same)),
    ]
    for probes in ("stratified", "uniform"):
        for seed in (run.seed, *OTHER_SEEDS):
            make = selecting(f"{probes} random probes, seed {seed}", "probes", tau=run.tau, seed=seed, probes=probes)
            rows.append(run.measure(make))
    return rows


def profiles(run: Runner) -> list[Row]:
    """The ratio of each layer, task by task."""
    return [run.measure(_reference(run), task) for task in ("easy", "mixed", "hard", "frames")]


def _reference(run: Runner) -> Setting:
    return ours(f"ZipVL, tau {run.tau:g}", tau=run.tau, seed=run.seed)


def _at_equal_ratios(run: Runner, kind: Callable[..., Setting], choices: dict[str, dict[str, Any]]) -> list[Row]:
    """Each choice with the tau that gives it the ratio of the reference, then half of it."""
    reference, rows = run.ratio(_reference(run)), []
    for share in MATCHED:
        target = share * reference
        for label, choice in choices.items():
            setting = run.matched(_maker(run, kind, label, f"{target:.1%}", choice), target)
            rows.append(run.measure(setting))
    return rows


def _maker(
    run: Runner, kind: Callable[..., Setting], label: str, group: str, choice: dict[str, Any]
) -> Callable[[float], Setting]:
    return lambda tau: kind(label, group, tau=tau, seed=run.seed, **choice)


def _baseline(run: Runner, name: str, budget: float, task: str, group: str, paper: str = NOT_AT_HAND) -> list[Row]:
    """A baseline at a budget; nothing, and a note, where it cannot have it."""
    try:
        setting = baseline(name, baselines_at(budget, run.subject, task)[name], group, paper)
    except ValueError as error:
        run.notes.append(f"{name} at {budget:.1%}: {error}")
        return []
    return [run.measure(setting, task, timed=True)]


TABLES: dict[str, Table] = {
    "A": Table(
        "Table A: against VisionZip, AIM and PyramidDrop at equal budgets",
        "the baselines' token budgets: VisionZip 33.3%, AIM 6.4%, PyramidDrop 46.8%; the scores on the paper's "
        "benchmarks need its models",
        table_a,
        tuple(("ZipVL", other) for other in RIVALS),
    ),
    "B": Table(
        "Table B: against FastV on prompts of several frames",
        "FastV with K = 2, R = 50%; the scores on the paper's video benchmarks need its models",
        table_b,
        (
            ("ZipVL", "FastV"),
            ("ZipVL, tau 0.975", "FastV"),
            ("ZipVL, tau 0.975", "FastV, K = 1"),
            ("ZipVL", "FastV, K = 1"),
        ),
    ),
    "C": Table(
        "Table C: which tokens are probes",
        "the order: 64 recent + 64 random at least as good as recent ones alone, random ones alone collapse",
        table_c,
        (
            ("64 recent + 64 random", "64 recent"),
            ("64 recent + 64 random", "128 recent"),
            ("64 recent", "128 random"),
            ("128 recent", "128 random"),
        ),
    ),
    "D": Table(
        "Table D: which metric sets the budget, which ranks",
        "the order: accumulated scores for the budget and normalised ones for the ranking are best",
        table_d,
        tuple(
            ("budget accumulated, rank normalized", f"budget {budget}, rank {rank}")
            for budget, rank in (
                ("accumulated", "accumulated"),
                ("normalized", "normalized"),
                ("normalized", "accumulated"),
            )
        ),
    ),
    "figure-a": Table(
        "Figure A: tau, ratio and exact match on two tasks",
        "its figure's numbers are not at hand; the default of tau, 0.975, is from it",
        figure_a,
    ),
    "E": Table(
        "Table E: where the operations, the bytes and the time of a prompt go",
        "the estimate (approximate attention to top-k) costs 0.45 s of 3.28 s to the first token at 32K tokens, 14%",
        costs,
    ),
    "ours": Table(
        "Ours beyond the paper: queries, caches, text, probes",
        "nothing: these choices are not in it",
        own_choices,
        (("full", "drop"), ("quantize", "drop"), ("all queries, matched", "drop")),
    ),
    "profiles": Table(
        "Layer profiles by task",
        "its Figures 3 and 4 show ratios that differ between layers and between tasks",
        profiles,
    ),
}
