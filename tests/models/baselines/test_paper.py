"""``python -m benchmarks.paper``: its prompts are the processor's, its variants ZipVL's, its statistics right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("rich")
from PIL import Image
from transformers import AutoProcessor

import zipvl
from benchmarks.paper import equal_time, families, records, report, show, times
from benchmarks.paper.costs import attention_flops, peak_bytes
from benchmarks.paper.settings import Runner, baselines_at, dense, match_ratio, ours, ratio_of, selecting
from benchmarks.paper.statistics import bootstrap, bootstrap_difference, bootstrap_mean, verdict
from benchmarks.paper.subject import FOLDER, FRAMES, Subject, framed_item, pages
from benchmarks.paper.tables import TABLES
from zipvl.baselines import AIM, FastV, Variant, VisionZip, applied, variant
from zipvl.baselines.variant import uniform_probes


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(FOLDER, "cpu", batch=1)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


# Prompts


@pytest.mark.parametrize("task", ["easy", "frames"])
def test_prompts_are_the_processors(subject: Subject, processor: Any, task: str) -> None:
    item = subject.items(task, 2)[1]
    content = [{"type": "image", "image": Image.fromarray(picture.numpy())} for picture in item.pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": item.label}]}]
    expected = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    made = subject.inputs([item])
    assert torch.equal(made["input_ids"], expected["input_ids"])
    assert torch.equal(made["image_sizes"], expected["image_sizes"])
    grey = 1 / 255 / 0.25
    torch.testing.assert_close(made["pixel_values"], expected["pixel_values"], rtol=0, atol=1.01 * grey)


def test_shared_features_change_nothing(subject: Subject) -> None:
    items = subject.items("easy", 1)
    alone = subject.model(**subject.inputs(items)).logits[:, -1]
    shared: list[torch.Tensor] = []
    batches = [subject.encoded(items)]
    with subject._shared():
        subject._use(batches[0])
        shared.append(subject.model(**batches[0].inputs).logits[:, -1])
    torch.testing.assert_close(shared[0], alone, rtol=1e-5, atol=1e-5)


def test_framed_items(subject: Subject) -> None:
    for number in range(4):
        item, again = (framed_item(number, subject.tile_side) for _ in range(2))
        assert torch.equal(item.pictures[0], again.pictures[0]) and item.answer == again.answer
        shape = (subject.tile_side, pages.PAGE_SIDE)
        assert [tuple(picture.shape) for picture in item.pictures] == [shape] * FRAMES
        assert re.fullmatch("[A-Z]{2}", item.label) and re.fullmatch("[0-9]{3}", item.answer)
    with pytest.raises(ValueError, match=r"task must be one of .*got 'films'"):
        subject.items("films", 1)


# Settings


def small_prompt(subject: Subject) -> dict[str, torch.Tensor]:
    """A strip of a page: a short prompt with an image."""
    item = framed_item(0, subject.tile_side)
    return subject.inputs([type(item)(item.pictures[:1], item.label, item.answer)])


def test_variant_is_zipvl(subject: Subject) -> None:
    inputs, model = small_prompt(subject), subject.model
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    with zipvl.sparse(model, zipvl.ZipVLConfig.paper(), tau=0.97, seed=3, record_index=True) as stats:
        expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    with variant(model, Variant(tau=0.97, seed=3)) as record:
        found = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert stats.active and record.mean_ratio == pytest.approx(stats.mean_ratio)
    for layer, kept in record.kept.items():
        assert torch.equal(kept[0].nonzero()[:, 0], stats.layers[layer].index[0])
    assert torch.equal(found.sequences, expected.sequences)
    for ours_, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-3)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_variants_differ_as_they_say(subject: Subject) -> None:
    inputs, model = small_prompt(subject), subject.model
    text = inputs["input_ids"][0] != model.config.image_token_id
    kept = {}
    for name, choice in {
        "own": {},
        "rank": {"rank": "accumulated"},
        "budget": {"budget": "normalized"},
        "text": {"keep_text": True},
        "uniform": {"probes": "uniform"},
    }.items():
        with variant(model, Variant(tau=0.9, **choice)) as record:
            model(**inputs, use_cache=False, logits_to_keep=1)
        kept[name] = record.kept
    counts = {name: [int(layer.sum()) for layer in layers.values()] for name, layers in kept.items()}
    assert all(layer[0, text].all() for layer in kept["text"].values())
    assert not all(layer[0, text].all() for layer in kept["own"].values())
    assert counts["rank"][0] == counts["own"][0] and not torch.equal(kept["rank"][0], kept["own"][0])
    assert counts["budget"][0] != counts["own"][0]
    assert not torch.equal(kept["uniform"][0], kept["own"][0])


def test_uniform_probes() -> None:
    probes = uniform_probes(1000, 64, 64, 5)
    assert probes.tolist() == sorted(set(probes.tolist())) and len(probes) == 128
    assert probes[64:].tolist() == list(range(936, 1000)) and int(probes[63]) < 936
    assert not torch.equal(probes, uniform_probes(1000, 64, 64, 6))
    assert uniform_probes(70, 64, 64, 0).tolist() == list(range(70))


def test_baselines_reach_their_budget(subject: Subject) -> None:
    batches = subject.batches("frames", 1, 100_000)
    for name, make in baselines_at(0.5, subject, "frames").items():
        record = subject.prefills(batches, lambda make=make: applied(subject.model, make(subject.tower)))
        assert ratio_of(record) == pytest.approx(0.5, abs=0.01), name
    made = baselines_at(0.5, subject, "mixed")
    assert isinstance(made["AIM"](None), AIM) and isinstance(made["VisionZip"](None), VisionZip)
    with pytest.raises(ValueError, match=r"FastV: budget .* is out of reach"):
        baselines_at(0.064, subject, "mixed")["FastV"](None)
    assert ratio_of(None) == 1.0 and FastV().keep == 0.5


@pytest.mark.parametrize("target", [0.064, 0.3, 0.667, 0.95])
@pytest.mark.parametrize("steep", [0.5, 1.0, 3.0])
def test_match_ratio(target: float, steep: float) -> None:
    asked: list[float] = []

    def measure(tau: float) -> float:
        asked.append(tau)
        return tau ** (20 * steep)

    tau, found = match_ratio(measure, target)
    assert found == pytest.approx(target, abs=0.02) and measure(tau) == found
    assert len(asked) <= 10


# Statistics


def test_bootstrap() -> None:
    assert bootstrap([True] * 10) == (1.0, 1.0)
    low, high = bootstrap([True] * 300 + [False] * 100)
    assert (low, high) == pytest.approx((0.75 - 1.96 * 0.02165, 0.75 + 1.96 * 0.02165), abs=0.006)
    first, second = [True] * 80 + [False] * 20, [True] * 70 + [False] * 30
    low, high = bootstrap_difference(first, second)
    assert low > 0 and high == pytest.approx(0.1 + 1.96 * 0.03, abs=0.011)
    with pytest.raises(ValueError, match="expected the same pages, got 2 and 1"):
        bootstrap_difference([True, True], [True])


def test_bootstrap_mean() -> None:
    """Halves, as between two rows of a pruner: the mean's standard error is that of the values."""
    values = torch.tensor([1.0] * 30 + [0.5] * 40 + [0.0] * 20 + [-0.5] * 10)
    low, high = bootstrap_mean(values.numpy())
    error = 1.96 * float(values.std(correction=0)) / 10
    assert (low, high) == pytest.approx((0.45 - error, 0.45 + error), abs=0.01)
    assert bootstrap_mean(values[:30].numpy()) == (1.0, 1.0)


def test_verdict() -> None:
    good, bad = [True] * 90 + [False] * 10, [True] * 40 + [False] * 60
    assert verdict(good, bad).startswith("holds: the intervals do not overlap")
    assert verdict(bad, good).startswith("does NOT hold")
    assert verdict(good, good).startswith("not decided")
    slightly = [True] * 84 + [False] * 16
    assert verdict(good, slightly).startswith("holds page by page")
    assert verdict(slightly, good).startswith("does NOT hold: the other way round page by page")


def test_costs() -> None:
    assert attention_flops(3, 2, 5) == 4 * 6 * 2 * 5 and attention_flops(3, 2, 5, probes=True) == 2 * 6 * 2 * 5
    found = peak_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8).fill_(1), torch.device("cpu"))
    assert 1 << 20 <= found < (1 << 20) + 4096


# Tables and report


def test_a_row(subject: Subject) -> None:
    run = Runner(subject, pages=1, calibration=1, timed=1)
    row = run.measure(dense(), "frames", timed=True)
    assert (row["ratio"], row["pages"], len(row["right"])) == (1.0, 1, 1) and row["first_token_ms"] > 0
    row = run.measure(ours(tau=0.9), "frames")
    assert len(row["layers"]) == subject.layers
    assert row["ratio"] == pytest.approx(sum(row["layers"]) / len(row["layers"]), abs=1e-3)
    assert run.ratio(selecting("same", tau=0.9), "frames") == pytest.approx(run.ratio(ours(tau=0.9), "frames"))


def made_line(table: str, pages_: int = 40) -> dict[str, Any]:
    """A line of results with invented rows."""
    labels = {label for pair in TABLES[table].claims for label in pair} or {"tau 0.9", "tau 1"}
    rows: list[dict[str, Any]] = []
    for number, label in enumerate(["dense", *sorted(labels)]):
        right = [i % (number + 2) != 0 for i in range(pages_)]
        row = {"label": label, "group": "30.0%", "task": "easy", "paper": "not at hand", "ratio": 0.3, "pages": pages_}
        row |= {"parameters": {"method": "dense"} if label == "dense" else {"method": "zipvl", "tau": 0.9}}
        row |= {"exact_match": sum(right) / pages_, "interval95": bootstrap(right), "layers": [0.1, 0.2]}
        rows.append(row | {"right": "".join("01"[ok] for ok in right)})
    if table == "E":
        rows = [{"label": "dense", "tokens": 9, "ms": 2.0, "peak_bytes": 1024, "gflop": {"products": 1.0}}]
    line = {
        "table": table,
        "complete": True,
        "pages": pages_,
        "weights_sha256": "",
        "device": {"name": "a machine"},
        "notes": ["a note"],
    }
    return (
        line
        | {"date": "2026-01-01", "probe_seed": 0, "dtype": "float32", "tau": 0.975, "rows": rows}
        | {"calibration": {"pages": 8}}
    )


def test_report(tmp_path: Path) -> None:
    digest = report.hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:16]
    results = tmp_path / "paper.jsonl"
    lines = [made_line(table) for table in TABLES] + [made_line("A", 20), made_line("A", 60)]
    lines.append(made_line("A", 90) | {"complete": False})
    stale = made_line("C", 5000) | {"weights_sha256": "other"}
    results.write_text(
        "".join(json.dumps(x | {"weights_sha256": x["weights_sha256"] or digest}) + "\n" for x in [*lines, stale])
    )
    assert {name: line["pages"] for name, line in records.lines_of(digest, results).items()} == {
        name: 60 if name == "A" else 40 for name in TABLES
    }
    written = report.render(tmp_path / "out", results, tmp_path / "no times")
    page, text = written[0].read_text(), written[1].read_text()
    assert page.count("<img") == text.count("![") == len(written) - 2 >= 5
    assert page.count("src=") == page.count('src="data:image/png') and "<link" not in page
    for table in TABLES.values():
        assert table.title in text and f"## {table.title}" in text
    assert "## Does the paper's order hold?" in text and "60 pages a setting" in text and "5,000" not in text
    assert text.count("90 pages a setting") == 1 and "More pages, stopped before its last rows: Table A" in text
    assert equal_time.NOT_MEASURED in text
    for path in written[2:]:
        assert Image.open(path).size[0] > 300
    results.write_text("")
    nothing = report.render(tmp_path / "none", results, tmp_path / "no times")[1].read_text()
    assert "Not measured yet for these weights: A, B, C" in nothing


# Times


TIMED_AT = {"ZipVL": (0.2, 0.6), "ZipVL, skipped MLPs": (0.2, 0.6), "VisionZip": (0.2, 0.6), "FastV": (0.4,)}


def made_times(
    path: Path, run: str = "2026-01-02", dense: float = 1000.0, whole: bool = False, rounds: int = 3
) -> None:
    """Invented times: dense attention takes 1 s to the first token and 2 s to the last; ZipVL half a second and half of
    its budget's share, 0.2 s less with skipped MLPs; a pruner its budget's share. A first run takes 50 ms more, and so
    do two of nine steps. ``whole``: answers as a whole, in the first run."""
    device = {"type": "cuda", "name": "a GPU"}
    about = {"run": run, "date": run, "device": device, "versions": {"torch": "2"}, "shape": "A-7B", "tokens": 32228}
    about |= {"pictures": 11, "dtype": "bfloat16", "new_tokens": 32}
    lines: list[dict[str, Any]] = [about | {"method": "vision tower", "vision_ms": 99.0}]
    lines.append(about | {"method": "FastV", "budget": 0.06, "round": 0, "failed": "out of reach"})
    rows = [("dense", 1.0), *((name, at) for name, budgets in TIMED_AT.items() for at in budgets)]
    for number in range(rounds):
        for method, budget in rows:
            share = budget if "ZipVL" not in method else 0.5 + 0.5 * budget - 0.2 * ("MLP" in method)
            first = dense * share + 50 * (not number)
            answer: dict[str, Any] = {"steps_ms": [*[1000 / 31] * 7, 90.0, 80.0] if number == 1 else []}
            if whole:
                answer = {"answer_ms": None if number else first + 1000}
            at = {"method": method, "budget": budget, "ratio": budget, "round": number, "first_ms": first}
            lines.append(about | at | answer)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def timed_line(exact: dict[tuple[str, float], float], pages_: int = 100) -> dict[str, Any]:
    """A Table A of these rows: label and ratio, and the share of pages that are right, the same ones first."""
    rows = []
    for (label, ratio), share in exact.items():
        right = [i < share * pages_ for i in range(pages_)]
        method = "zipvl" if "ZipVL" in label else label
        row = {"label": label, "group": "", "task": "mixed", "paper": "not at hand", "ratio": ratio, "layers": []}
        row |= {"parameters": {"method": method, **({"tau": 0.9} if method == "zipvl" else {})}}
        row |= {"exact_match": sum(right) / pages_, "interval95": bootstrap(right), "pages": pages_}
        rows.append(row | {"right": "".join("01"[ok] for ok in right)})
    return made_line("A", pages_) | {"rows": rows}


def test_times_between_budgets(tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    assert records.read_times(path) is None
    made_times(path, "2026-01-01", dense=5000.0)
    made_times(path)
    found = records.read_times(path)
    assert found is not None and found.dense == pytest.approx((1000.0, 2000.0)) and found.vision_ms == 99.0
    assert found.by_steps and not found.once
    assert found.about["run"] == "2026-01-02" and found.failed == [("FastV", 0.06, "out of reach")]
    assert found.at("dense", 1.0) == (1.0, 1.0)
    assert found.at("ZipVL", 0.3) == pytest.approx((0.65, 0.825))
    assert found.at("ZipVL", 0.605) == found.at("ZipVL", 0.6) == pytest.approx((0.8, 0.9))
    assert found.at("ZipVL", 0.7) == found.at("ZipVL, window 128", 0.3) == (None, None)
    assert found.at("VisionZip", 0.8) == pytest.approx((0.8, 0.9)) and found.at("VisionZip", 0.1) == (None, None)
    # A run that was cut before dense attention was measured does not count.
    with path.open("a") as file:
        file.write(json.dumps({"run": "2026-01-03", "method": "vision tower", "vision_ms": 1.0}) + "\n")
    assert records.read_times(path) == found


def test_times_of_runs_that_were_cut(tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    made_times(path, rounds=1)
    found = records.read_times(path)
    assert found is not None and found.once and found.dense == (1050.0, None)
    assert found.at("ZipVL", 0.6) == (pytest.approx(850 / 1050), None)
    # AIM is slower than dense attention at its largest measured budget: nothing is known beyond.
    about = json.loads(path.read_text().splitlines()[0])
    slow = [about | {"method": "AIM", "budget": b, "ratio": b, "round": 0, "first_ms": 4200 * b} for b in (0.1, 0.5)]
    with path.open("a") as file:
        file.writelines(json.dumps(line | {"steps_ms": []}) + "\n" for line in slow)
    found = records.read_times(path)
    assert found is not None and found.at("AIM", 0.3) == (pytest.approx(1.2), None)
    assert found.at("AIM", 0.6) == (None, None)


def test_whole_answers_are_not_judged(tmp_path: Path) -> None:
    """Of one run each, by which no verdict is drawn: shown, marked."""
    path = tmp_path / "times.jsonl"
    made_times(path, whole=True)
    found = records.read_times(path)
    assert found is not None and not found.by_steps and found.dense == pytest.approx((1000.0, 2050.0 - 50.0))
    line = timed_line({("dense", 1.0): 1.0, ("ZipVL", 0.3): 0.97, ("VisionZip", 0.4): 0.5})
    (first,), (answer,) = (equal_time.compare(line, found, axis) for axis in (0, 1))
    assert (first.words, answer.words, answer.rival) == ("ahead", "not judged", "VisionZip")
    assert equal_time.cells(answer)[2] == "82.5% (one run)" and equal_time.cells(first)[2] == "65.0%"
    said = equal_time.summary(line, found)
    assert "worth its time with these: ZipVL, tau 0.9 (30%" in said[0] and "no verdict yet" in said[1]
    assert "worth" not in said[1] and "(one run)" in equal_time.source(found)
    assert show.cells(line, line["rows"][1], found)[-2:] == ["65%", "82% (one run)"]


def test_a_setting_that_loses_too_much_is_worth_nothing(tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    made_times(path)
    found = records.read_times(path)
    assert found is not None
    for right, words in ((0.07, "loses too much"), (0.94, "loses too much"), (0.95, "ahead"), (1.0, "ahead")):
        line = timed_line({("dense", 1.0): 1.0, ("ZipVL", 0.2): right})  # no pruner at all
        assert [one.words for one in equal_time.compare(line, found, 0)] == [words]
        said = equal_time.summary(line, found)[0]
        assert ("worth its time with these: ZipVL, tau 0.9 (20% of the tokens" in said) is (words == "ahead")
        assert ("These lose too much, whatever their time: ZipVL" in said) is (words != "ahead")
    # Where a pruner answers more in the same time, that is what is said.
    line = timed_line({("dense", 1.0): 1.0, ("ZipVL", 0.2): 0.08, ("VisionZip", 0.6): 0.9})
    assert [one.words for one in equal_time.compare(line, found, 0)] == ["behind"]
    line["rows"][1]["group"] = "6.4%"
    said = equal_time.summary(line, found)[0]
    assert "No setting of ZipVL here is worth its time. A pruner answers more pages in the time of these: " in said
    assert "ZipVL matched to 6.4%, tau 0.9 (20% of the tokens, 8.0% right, VisionZip 90.0%). Matched: its tau" in said


def test_equal_time(tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    made_times(path)
    found = records.read_times(path)
    assert found is not None
    exact = {
        ("dense", 1.0): 1.0,
        ("ZipVL", 0.2): 0.5,  # in 60% of the time: VisionZip at 60%
        ("ZipVL, skipped MLPs", 0.2): 0.96,  # in 40%: VisionZip at 40%, between its rows, and FastV at 40%
        ("ZipVL, window 128", 0.2): 1.0,  # of no known time
        ("VisionZip", 0.2): 0.4,
        ("VisionZip", 0.6): 0.8,
        ("FastV", 0.4): 0.5,
    }
    line = timed_line(exact)
    first, second = equal_time.compare(line, found, 0)
    assert (first.row["label"], first.rival, first.words) == ("ZipVL, skipped MLPs", "VisionZip", "ahead")
    assert (first.time, first.rival_ratio, first.rival_exact) == pytest.approx((0.4, 0.4, 0.6))
    assert first.interval[0] < 0.36 < first.interval[1]
    assert (second.row["label"], second.rival, second.words) == ("ZipVL", "VisionZip", "behind")
    assert (second.time, second.rival_ratio, second.rival_exact) == pytest.approx((0.6, 0.6, 0.8))
    # By the answer the same budgets cost (share + 1) / 2 of dense attention's time, on both sides.
    assert [one.time for one in equal_time.compare(line, found, 1)] == pytest.approx([0.7, 0.8])
    level = timed_line(exact | {("ZipVL", 0.2): 0.97, ("VisionZip", 0.6): 0.97})
    assert equal_time.compare(level, found, 0)[1].words == "level"
    alone = timed_line({key: share for key, share in exact.items() if "ZipVL" in key[0] or key[0] == "dense"})
    assert [(one.rival, one.words) for one in equal_time.compare(alone, found, 0)] == [
        (None, "ahead"), (None, "loses too much")
    ]  # fmt: skip
    said = equal_time.summary(line, found)
    assert len(said) == 2 and "2 settings of ZipVL whose time is known against the best pruner" in said[0]
    assert "with these: ZipVL, skipped MLPs, tau 0.9 (20% of the tokens, 96.0% right, VisionZip 60.0%)." in said[0]
    assert "A pruner answers more pages in the time of these: ZipVL, tau 0.9 (20% of the tokens, 50" in said[0]


def test_report_at_equal_time(tmp_path: Path) -> None:
    digest = report.hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:16]
    exact = {("dense", 1.0): 1.0, ("ZipVL", 0.3): 0.9, ("VisionZip", 0.4): 0.5, ("AIM", 0.4): 0.5}
    results, timed = tmp_path / "paper.jsonl", tmp_path / "times.jsonl"
    results.write_text(json.dumps(timed_line(exact) | {"weights_sha256": digest}) + "\n")
    made_times(timed)
    written = report.render(tmp_path / "out", results, timed)
    text = written[1].read_text()
    assert "## Who wins at equal time?" in text and equal_time.NOT_MEASURED not in text
    assert "11 pictures, bfloat16, a GPU" in text and "- Not timed: FastV at 6.0%: out of reach" in text
    row = next(line for line in text.splitlines() if line.startswith("| VisionZip |"))
    assert [cell.strip() for cell in row.split("|")][7:9] == ["40%", "70%"]
    row = next(line for line in text.splitlines() if line.startswith("| AIM |"))
    assert [cell.strip() for cell in row.split("|")][7:9] == ["", ""]
    wide, alone = (
        Image.open(path).size for path in (written[2], report.render(tmp_path / "b", results, tmp_path / "none")[2])
    )
    assert wide[0] > 2 * alone[0]


def test_a_plan_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny shape: every row has its budget or a reason, and is run in rounds with its method's others."""
    shape = times.shape(smoke=True)
    model = shape.make("cpu", smoke=True)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    inputs = shape.inputs(model, tokens=0, pages=1, frames=0, batch=1, smoke=True)
    plan = times.plan(model, inputs)
    assert {timing.method for timing in plan} == {"dense", *families.FAMILIES, *families.RIVALS}
    unreachable = {(timing.method, timing.budget) for timing in plan if timing.context is None}
    assert unreachable == {("FastV", times.LEAST), ("PyramidDrop", times.LEAST)}
    skipped = [timing.parameters.get("skip_mlp_layers") for timing in plan if timing.method == "ZipVL, skipped MLPs"]
    assert set(skipped) == {(1, 3, 5)}
    order = list(dict.fromkeys(timing.method for timing in plan))
    assert order == ["dense", *families.FAMILIES, "VisionZip", "FastV", "PyramidDrop", "AIM"]
    assert [timing.budget for timing in plan if timing.method == "VisionZip"][:4] == [0.333, 0.468, 0.6, 0.8]
    few = [timing for timing in plan if timing.budget in (1.0, times.LEAST) and timing.method in ("dense", "ZipVL")]
    few += [timing for timing in plan if (timing.method, timing.budget) in {("FastV", 0.468), ("FastV", times.LEAST)}]
    first = [("FastV", 0), ("dense", 0), ("ZipVL", 0), ("FastV", 0)]
    cut = list(times.measure(model, inputs, few, limit=0.0, steps=2))
    assert [(timing.method, row["round"]) for timing, row in cut] == first
    found = list(times.measure(model, inputs, few, limit=60.0, steps=2))
    rounds = [(name, number) for number in (1, 2) for name in ("dense", "ZipVL", "FastV")]
    assert [(timing.method, row["round"]) for timing, row in found] == first + rounds
    assert "out of reach" in found[0][1]["failed"]
    for timing, row in found[1:]:
        assert row["first_ms"] > 0 and row["ratio"] == pytest.approx(timing.budget, abs=0.01)
        assert len(row["steps_ms"]) == 2 * (row["round"] == 1) and all(step > 0 for step in row["steps_ms"])
    rows = [{"vision_ms": 1.0}, *({"method": t.method, "budget": t.budget} | row for t, row in found)]
    assert times._table(rows, 9).row_count == 4

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(times, "generate", no_memory)
    assert times.timed(model, inputs, few[0], 0) == {"failed": "out of memory"}
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        times.run("cpu")


def test_terminal_table() -> None:
    line = made_line("C")
    for row in line["rows"]:
        assert len(show.cells(line, row)) == len(show.header(line))
    assert {claim for _, claim, _, _ in show.claims(TABLES["C"], line)} == {f"{a} > {b}" for a, b in TABLES["C"].claims}
    assert show.rendered(TABLES["C"], line).renderables
    words = show.setting_words({"method": "zipvl", "tau": 0.97512, "num_recent": 64, "seed": 0})
    assert words == "tau 0.9751, num recent 64"


def test_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.paper import __main__ as command

    with pytest.raises(SystemExit, match=r"TABLE: expected A, B, C, D, .* got Z"):
        command.main("A,Z")
    added: list[dict[str, Any]] = []
    table = SimpleNamespace(title="T", paper="P", claims=(), rows=lambda run: [run.measure(dense(), "frames")])
    monkeypatch.setattr(command, "TABLES", {"A": table})
    monkeypatch.setattr(command, "append", lambda name, line, device: added.append(line))
    command.main(
        "A", pages=1, device="cpu", batch=1, full=False, calibration=1, dtype="", tau=0.975, seed=0, folder=FOLDER
    )
    assert added[0]["rows"][0]["label"] == "dense" and added[0]["pages"] == 1 and added[0]["complete"]

    def stopped(run: Runner) -> list[dict[str, Any]]:
        run.measure(dense(), "frames")
        raise SystemExit(143)

    table.rows = stopped
    with pytest.raises(SystemExit):
        command._measure("A", Runner(Subject(FOLDER, "cpu", batch=1), 1, 1))
    assert len(added[1]["rows"]) == 1 and not added[1]["complete"]
