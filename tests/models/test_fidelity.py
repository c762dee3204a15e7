"""benchmarks/fidelity on a tiny random model: what it measures is what decoding one token after the other gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")
from benchmarks.fidelity import measure, text_measures
from benchmarks.fidelity.texts import Key, Text
from zipvl.app.calibrate import settings
from zipvl.app.calibrate.journal import Journal

from .tiny_models import make_llama

PROMPT, NEW = 300, 128
SETTINGS = ["tau 0.8, drop", "tau 0.8, window 32, 2 sinks, drop", "tau 0.8, full", "tau 0.8, all queries, quantize"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_llama(head_dim=32)


@pytest.fixture
def text(monkeypatch) -> Text:
    monkeypatch.setattr(text_measures, "PROMPT", PROMPT)
    ids = torch.randint(1, 190, (PROMPT + NEW,), generator=torch.Generator().manual_seed(0))
    return Text("text", "code", tuple(ids.tolist()))


@pytest.mark.parametrize("name", [settings.DENSE, *SETTINGS])
def test_chunks_are_tokens_one_by_one(model, text, name, monkeypatch) -> None:
    together, run = text_measures.next_tokens(model, text, settings.config(name))
    monkeypatch.setattr(text_measures, "CHUNK", 1)
    apart, _ = text_measures.next_tokens(model, text, settings.config(name))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
    assert together.shape == (NEW, 200) and run.layer_ms > 0
    assert run.kept == 1 if name == settings.DENSE else run.kept < 0.95


def test_dense_is_what_the_model_says(model, text) -> None:
    found, _ = text_measures.next_tokens(model, text, None)
    with torch.no_grad():
        expected = model(torch.tensor([text.ids])).logits[0, PROMPT - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    same = text_measures.compare(found, found, text)
    assert same["kl"] == pytest.approx(0.0, abs=1e-6) and same["same"] == 1.0
    other = text_measures.compare(found, (found / 2).log_softmax(-1), text)
    assert other["kl"] > 0.01 and other["same"] == 1.0 and other["nll"] != same["nll"]


@torch.no_grad()
def test_a_key_is_right_when_every_digit_is(model) -> None:
    ids = torch.randint(1, 190, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    said = model.generate(ids, max_new_tokens=5, do_sample=False)[0, PROMPT:].tolist()
    prompt = tuple(ids[0].tolist())
    assert text_measures.find_key(model, Key("a", prompt, tuple(said)), None)[0]
    assert not text_measures.find_key(model, Key("a", prompt, (*said[:-1], said[-1] + 1)), None)[0]
    assert not text_measures.find_key(model, Key("a", prompt, (said[0] + 1, *said[1:])), settings.config(SETTINGS[0]))[
        0
    ]


def test_a_setting_that_is_dense_is_an_error(model) -> None:
    with pytest.raises(RuntimeError, match="no layer was sparse: prompt shorter"):
        text_measures.find_key(model, Key("a", tuple(range(1, 101)), (1,)), settings.config(SETTINGS[0]))


def test_what_is_in_the_journal_is_not_measured_again(model, text, tmp_path, monkeypatch) -> None:
    path, names = tmp_path / "text.jsonl", SETTINGS[:2]
    measure.texts(model, [text], names[:1], Journal(path, {}))
    asked: list[Any] = []
    whole = text_measures.next_tokens
    monkeypatch.setattr(text_measures, "next_tokens", lambda *given: (asked.append(given[2]), whole(*given))[1])
    measure.texts(model, [text], names, journal := Journal(path, {}))
    assert asked == [None, settings.config(names[1])]
    measure.texts(model, [text], names, journal)
    assert len(asked) == 2 and measure.row(names[1], journal, {"text": ["text"]})["text"]["kl"] > 0
