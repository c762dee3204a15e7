"""zipvl calibrate without a model: upper limits, splits, settings, and the search on losses that are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
from zipvl.app.calibrate import candidates, settings
from zipvl.app.calibrate.intervals import attainable, is_below, needed, upper
from zipvl.app.calibrate.samples import Split, split
from zipvl.app.calibrate.search import Aim, Found, plan, search

# ---------------------------------------------------------------------------------------------------------------------
# Upper limits
# ---------------------------------------------------------------------------------------------------------------------


def test_none_of_300_promises_one_percent() -> None:
    assert needed(0.01, 0.95) == 299 and needed(0.02, 0.95) == 149 and needed(0.5, 0.5) == 1
    assert is_below([0.0] * 299, 0.01, 0.95) and not is_below([0.0] * 298, 0.01, 0.95)
    assert not is_below([0.0] * 299 + [1.0], 0.01, 0.95)
    for samples in (1, 4, 150):
        assert is_below([0.0] * samples, attainable(samples, 0.95) + 1e-6, 0.95)
    assert attainable(0, 0.95) == 1.0 and not is_below([], 0.5, 0.95)


@pytest.mark.parametrize(
    ("lost", "samples", "limit"), [(0, 150, 0.0198), (1, 100, 0.0466), (5, 100, 0.1023), (2, 20, 0.2826), (10, 10, 1.0)]
)
def test_limits_of_lost_answers_are_clopper_and_pearsons(lost: int, samples: int, limit: float) -> None:
    """Against tables of the exact one-sided 95% limit."""
    assert upper([1.0] * lost + [0.0] * (samples - lost), 0.95) == pytest.approx(limit, abs=6e-5)


def test_limits_of_shares_hold_and_are_close_where_shares_vary_little() -> None:
    draw, missed, trials, mean = np.random.default_rng(0), 0, 300, 0.03
    limits = []
    for _ in range(trials):
        limits.append(upper((draw.beta(3, 97, 200)).tolist(), 0.95))
        missed += limits[-1] < mean
    assert missed <= trials * 0.05
    assert np.median(limits) < 0.05  # of 200 answers, 6 lost, the limit is 0.058
    assert upper([0.03] * 150 + [0.5], 0.95) > 0.03 and upper([], 0.95) == 1.0


def test_a_bound_is_shown_or_not_as_its_limit_says() -> None:
    losses = np.random.default_rng(1).random(60).tolist()
    limit = upper(losses, 0.95)
    assert is_below(losses, limit + 1e-6, 0.95) and not is_below(losses, limit - 1e-6, 0.95)


# ---------------------------------------------------------------------------------------------------------------------
# Splits, settings, candidates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10, 200, 330, 1000, 5000])
def test_no_sample_chooses_and_reports(count: int) -> None:
    found = split(count, 0.01, 0.95, 0)
    assert sorted((*found.tune, *found.report)) == list(range(count)) and found.tune and found.report
    assert len(found.tune) <= 200 and len(found.report) >= 0.5 * count
    assert found == split(count, 0.01, 0.95, 0) and (count < 4 or found != split(count, 0.01, 0.95, 1))


def test_as_many_report_as_the_bound_needs() -> None:
    assert len(split(200, 0.02, 0.95, 0).report) == 150 and len(split(340, 0.01, 0.95, 0).report) == 299


@pytest.mark.parametrize(
    ("name", "than", "harder"),
    [
        ("tau 0.8, window 512, full", "tau 0.9, window 512, full", True),
        ("tau 0.9, window 512, full", "tau 0.8, window 512, full", False),
        ("tau 0.9, window 512, full", "tau 0.9, window 512, full", False),
        ("tau 0.8, window 128, full", "tau 0.9, window 512, full", False),
        ("tau 0.9, drop, stored 0.25", "tau 0.95, drop, stored 0.5", True),
        ("tau 0.9, drop, stored 0.5", "tau 0.95, drop, stored 0.25", False),
        ("tau 0.9, drop", "tau 0.95, drop, stored 0.25", False),
    ],
)
def test_harder_is_less_of_the_same(name: str, than: str, harder: bool) -> None:
    assert settings.is_harder(name, than) is harder


@pytest.mark.parametrize("engine", candidates.ENGINES)
@pytest.mark.parametrize("goal", candidates.GOALS)
def test_every_candidate_is_a_configuration_and_the_safer_one_of_a_kind_comes_first(goal: Any, engine: Any) -> None:
    names = candidates.candidates(goal, engine, True, range(6))
    configs = [settings.config(name, **candidates.beside(engine, False, 300)) for name in names]
    assert len(set(configs)) == len(names) >= 6
    for config in configs:
        assert config is not None and config.dense_below == 300
        assert (config.keep_text, config.text_prompts) == ((False, "sparse") if engine == "vllm" else (True, "dense"))
        assert engine == "transformers" or (config.cache != "quantize" and not config.skip_mlp_layers)
    for place, name in enumerate(names):
        assert not any(settings.is_harder(earlier, name) for earlier in names[:place])


@pytest.mark.parametrize(("layers", "skipped"), [((), []), ((0, 1), []), (range(6), [(2, 5), (1, 3, 5)])])
def test_mlps_are_skipped_where_they_can_be_and_never_in_the_first_layer(
    layers: Sequence[int], skipped: list[tuple[int, ...]]
) -> None:
    configs = [settings.config(name) for name in candidates.candidates("ttft", "transformers", False, layers)]
    assert [c.skip_mlp_layers for c in configs if c is not None and c.skip_mlp_layers] == skipped


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


class MadeUp:
    """Losses ``[samples]`` and costs by setting, and what was asked for."""

    def __init__(self, losses: dict[str, Sequence[float]], costs: dict[str, float], seconds: float = 1e9) -> None:
        self.made, self.made_costs, self.seconds = losses, costs, seconds
        self.asked: dict[str, set[int]] = {}

    def losses(self, name: str, places: Sequence[int]) -> list[dict[str, Any]]:
        seen = self.asked.setdefault(name, set())
        self.seconds -= 0.1 * len(set(places) - seen)
        seen.update(places)
        lost = [0.0 if name == "dense" else float(self.made[name][place]) for place in places]
        kl = 0.0 if name == "dense" else float(np.mean(self.made[name]))
        return [{"loss": loss, "kl": kl, "seconds": 0.1} for loss in lost]

    def costs(self, names: Sequence[str], places: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        self.seconds -= 0.1 * len(places) * (1 + len(names))
        every = {"dense": 1.0} | {name: self.made_costs[name] for name in names}
        return {name: [{"first_s": cost}] * len(places) for name, cost in every.items()}

    def seconds_left(self) -> float:
        return self.seconds


def found_with(shares: dict[str, float], costs: dict[str, float], seed: int, bound: float = 0.02) -> Found:
    draw = np.random.default_rng(seed)
    measures = MadeUp({name: draw.random(200) < share for name, share in shares.items()}, costs)
    return search(measures, list(shares), split(200, bound, 0.95, seed), Aim(bound, 0.95, "ttft"))


def test_the_fastest_that_passes_is_chosen_and_tested_on_other_samples() -> None:
    names = ["tau 0.9, full", "tau 0.8, full", "tau 0.7, full", "tau 0.6, full"]
    lost = dict.fromkeys(names[:2], [0.0] * 200) | {names[2]: [1.0, 0.0] * 100, names[3]: [1.0] * 200}
    measures = MadeUp(lost, dict(zip(names, (0.9, 0.7, 0.5, 0.4), strict=True)))
    of_both = split(200, 0.02, 0.95, 3)
    found = search(measures, names, of_both, Aim(0.02, 0.95, "ttft"))
    assert found.chosen is not None and found.chosen.name == names[1] and found.bound == 0.02
    assert found.chosen.upper < 0.02 and len(found.chosen.lines) == 150
    assert [entry.dropped for entry in found.tries] == [
        f"no better than {names[1]}",
        None,
        "loses too much after 8 samples",
        "a safer one of its kind lost too much",
    ]
    assert measures.asked[names[2]] == set(of_both.tune[:8]) and names[3] not in measures.asked
    assert measures.asked[names[0]] == set(of_both.tune[:8]) and measures.asked[names[1]] == set(range(200))


def test_a_test_ends_where_it_cannot_be_passed_and_nothing_faster_is_tested() -> None:
    of_both = split(200, 0.02, 0.95, 0)
    names = ["window 512", "window 256", "window 128"]
    lost = {name: np.zeros(200) for name in names}
    lost["window 256"][of_both.report[3]] = 1  # one of 150 is too many
    measures = MadeUp(lost, {"window 512": 0.9, "window 256": 0.6, "window 128": 0.3})
    measures.losses = lambda name, places, whole=measures.losses: [  # type: ignore[method-assign]
        line | {"kl": {"dense": 0.0, "window 512": 0.1, "window 256": 0.2, "window 128": 0.3}[name]}
        for line in whole(name, places)
    ]
    found = search(measures, names, of_both, Aim(0.02, 0.95, "ttft"))
    assert [(test.name, test.passed, len(test.lines)) for test in found.tests] == [
        ("window 512", True, 150),
        ("window 256", False, 10),
    ]
    assert found.chosen is found.tests[0]
    assert not measures.asked["window 128"] & set(of_both.report)


def test_few_samples_are_held_to_what_they_can_show() -> None:
    found = search(
        MadeUp({"drop": [0.0] * 8}, {"drop": 0.5}), ["drop"], split(8, 0.01, 0.95, 0), Aim(0.01, 0.95, "ttft")
    )
    assert found.bound == math.ceil(1e4 * attainable(len(found.plan.split.report), 0.95)) / 1e4 > 0.3
    assert found.chosen is not None and 0.01 < found.chosen.upper <= found.bound


def test_nothing_is_chosen_where_everything_loses() -> None:
    found = found_with({"drop": 0.5, "full": 0.3}, {"drop": 0.5, "full": 0.6}, 0)
    assert found.chosen is None and not found.tests
    assert all(entry.dropped for entry in found.tries)


def test_a_setting_beyond_the_bound_is_promised_seldom() -> None:
    """Of 400 calibrations with settings on both sides of the bound at most one in twenty promises too much."""
    shares = {"a": 0.001, "b": 0.008, "c": 0.021, "d": 0.03, "e": 0.06, "f": 0.2}
    costs = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.5, "f": 0.4}
    chosen = [found_with(shares, costs, seed).chosen for seed in range(400)]
    beyond = sum(test is not None and shares[test.name] > 0.02 for test in chosen)
    assert beyond <= 0.05 * len(chosen) and sum(test is not None for test in chosen) > 0.5 * len(chosen)


def test_where_time_is_short_fewer_candidates_are_tried() -> None:
    of_both = split(200, 0.02, 0.95, 0)
    ample = plan(0.1, 1e9, 12, of_both)
    assert (ample.candidates, ample.split, ample.short) == (12, of_both, False)
    short = plan(2.4, 1790.0, 12, of_both)
    assert 2 <= short.candidates < 12 and short.short and len(short.split.report) == 150
    none = plan(30.0, 1790.0, 12, of_both)
    assert none.candidates == 2 and 1 <= len(none.split.report) < 30 and len(none.split.tune) == 16


def test_the_search_ends_in_time() -> None:
    names = [f"tau 0.{share}, full" for share in range(9, 1, -1)]
    draw = np.random.default_rng(0)
    for allowed in (20.0, 30.0, 45.0, 70.0):  # a sample takes 0.1
        measures = MadeUp({name: draw.random(200) < 0.001 for name in names}, dict.fromkeys(names, 0.5), allowed)
        found = search(measures, names, Split(tuple(range(50)), tuple(range(50, 200))), Aim(0.02, 0.95, "ttft"))
        assert measures.seconds > -1.0 and found.tests


RECORDED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fidelity.jsonl"


def test_on_recorded_answers_the_promise_holds_for_other_pages() -> None:
    """tiny-llava-next's answers to 1,000 pages under three settings: 200 calibrate, the others are asked."""
    runs = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    run = next(run for run in runs if run["samples"].get("page") == 1000)
    pages = {row["setting"]: row["page"] for row in run["rows"]}
    right = {name: np.array([answer == "1" for answer in page["answers"]]) for name, page in pages.items()}
    dense = right.pop("dense")
    lost = {name: dense & ~answers for name, answers in right.items()}
    assert len(lost) >= 3 and max(losses.mean() for losses in lost.values()) > 0.04
    within = 0
    for draw in range(20):
        order = np.random.default_rng(draw).permutation(1000)
        mine, others = order[:200], order[200:]
        measures = MadeUp({name: losses[mine] for name, losses in lost.items()}, {n: pages[n]["kept"] for n in lost})
        found = search(measures, list(lost), split(200, 0.02, 0.95, draw), Aim(0.02, 0.95, "ttft"))
        within += found.chosen is not None and lost[found.chosen.name][others].mean() <= 0.02
    assert within >= 19
