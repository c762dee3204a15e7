"""Statistics: they prove that sparsity is active, and cost no read-back until asked for."""

from __future__ import annotations

import json

import pytest
import torch

import zipvl
from tests.models.tiny_models import PAPER, make_gemma3_text, make_llama, pad_left, text_inputs


def test_counts_are_those_of_the_selection() -> None:
    model = make_llama()
    inputs = pad_left([text_inputs(400, 1), text_inputs(300, 2)])
    with zipvl.sparse(model, PAPER, ratio=0.25, record_index=True) as stats:
        model.generate(**inputs, max_new_tokens=3)
    layer = stats.layers[1]
    assert (layer.mode, layer.reason, layer.prompt) == ("sparse", None, 400)
    assert layer.tokens == [400, 300]
    assert layer.kept == [100, 75]
    assert layer.ratio == pytest.approx(0.25)
    assert layer.index is not None
    assert [len(row) for row in layer.index] == [100, 75]
    assert all(row.dtype == torch.int64 and bool((row.diff() > 0).all()) for row in layer.index)
    assert int(layer.index[1].min()) >= 100, "padding is never selected"
    assert all(int(row[-1]) == 399 for row in layer.index), "the last token is always kept"


def test_mean_ratio_runs_over_layers_rows_and_prefills() -> None:
    model = make_gemma3_text()  # layer 0 slides
    with zipvl.sparse(model, PAPER, ratio=0.25) as stats:
        assert (stats.mean_ratio, stats.prefills, stats.active) == (1.0, 0, False)
        assert stats.summary() == "zipvl: no prefill yet"
        model(**text_inputs(400))
        assert stats.mean_ratio == pytest.approx((1 + 0.25 + 0.25) / 3)
        model(**pad_left([text_inputs(100, 1), text_inputs(80, 2), text_inputs(60, 3)]))
        assert stats.mean_ratio == pytest.approx((1 + 0.25 + 0.25 + 9) / 12)
        assert stats.prefills == 2
        assert stats.layers[1].tokens == [100, 80, 60]
        assert stats.layers[0].tokens == [100, 80, 60]
        stats.reset()
        assert (stats.mean_ratio, stats.prefills, stats.active, stats.layers) == (1.0, 0, False, {})
        model(**text_inputs(400))
    assert stats.mean_ratio == pytest.approx(0.5)
    assert stats.active


def test_mean_ratio_holds_no_more_than_so_many_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipvl.stats.UNCOUNTED", 4)
    stats = zipvl.Stats()
    kept = torch.randint(1, 50, (11, 2))
    for prefill, counts in enumerate(kept):
        stats.add(prefill % 3, None, 50, torch.tensor([50, 0]), torch.zeros(2, 50, dtype=torch.int32), counts)
        assert len(stats._uncounted) < 4
        if prefill in (2, 9):
            expected = (kept[: prefill + 1, 0] / 50).sum() + (prefill + 1)  # a row without real tokens counts 1
            assert stats.mean_ratio == pytest.approx(float(expected) / (2 * (prefill + 1)))
    stats.add(0, "text", 50, torch.tensor([50, 50]))
    assert stats.mean_ratio == pytest.approx((float((kept[:, 0] / 50).sum()) + 11 + 2) / 24)


def test_decoding_is_not_a_prefill_but_moves_the_bytes() -> None:
    model = make_llama()
    with zipvl.sparse(model, PAPER, ratio=0.25) as stats:
        cache = model(**text_inputs(400)).past_key_values
        assert stats.cache_bytes == 3 * (2 * 2 * 100 * 16 * 4 + 4), "keys, values, one length"
        assert stats.full_cache_bytes == 3 * 2 * 2 * 400 * 16 * 4
        model(torch.tensor([[5]]), past_key_values=cache)
        assert stats.full_cache_bytes == 3 * 2 * 2 * 401 * 16 * 4
        assert stats.cache_bytes == cache.cache_bytes > 3 * 2 * 2 * 101 * 16 * 4
    assert stats.prefills == 1


def test_text_and_dict() -> None:
    model = make_gemma3_text()
    with zipvl.sparse(model, PAPER, ratio=0.25) as stats:
        model(**text_inputs(400))
    text = stats.summary()
    assert "sparse, 1 prefill(s), mean ratio 0.500" in text
    assert "layer   0 dense  kept [400] of [400] (sliding-window attention)" in text
    assert "layer   2 sparse kept [100] of [400]" in text
    found = json.loads(json.dumps(stats.to_dict()))
    assert found["active"] is True
    assert found["layers"][1]["kept"] == [100]
    assert found["layers"][0]["reason"] == "sliding-window attention"
    assert found["layers"][0]["cache_bytes"] is None
    assert "layers=3" in repr(stats)
    assert stats.layers[1].index is None, "not recorded unless asked"


def test_recording_reads_nothing_back() -> None:
    class NoReads(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func not in (torch.ops.aten._local_scalar_dense.default,), "a value was read back"
            return func(*args, **(kwargs or {}))

    stats = zipvl.Stats(record_index=True)
    real, index, count = torch.tensor([4, 3]), torch.zeros(2, 4, dtype=torch.int32), torch.tensor([2, 3])
    with NoReads():
        for _ in range(3):
            stats.add(0, None, 4, real, index, count)
            stats.add(1, "because", 4, real)
    assert stats.mean_ratio == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_a_row_without_real_tokens_counts_one() -> None:
    stats = zipvl.Stats()
    stats.add(0, None, 4, torch.tensor([0, 4]), None, torch.tensor([0, 1]))
    assert stats.layers[0].ratio == stats.mean_ratio == pytest.approx((1 + 0.25) / 2)
