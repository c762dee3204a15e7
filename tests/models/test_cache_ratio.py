"""``ZipVLConfig.cache_ratio``: what a ``drop`` cache stores, apart from what its prefill attended to."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.test_chunks import forward, logits_of
from tests.models.tiny_models import PAPER, SPARSE, ids, make_llama, make_llava_next, pad_left, text_inputs
from zipvl import ZipVLConfig, budget, ops, policy, reference
from zipvl.transformers.storage import Tokens

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
OWN = PAPER.replace(tau=0.7, num_recent=16, num_random=16, dense_below=0, cache_ratio=0.3)
WINDOW = OWN.replace(local_window=24, num_sinks=3)


def expected_of_row(
    config: ZipVLConfig, score: list[float], places: list[int], own: list[int], always: set[int]
) -> list[int]:
    """The stored tokens of one row, by sorting: docs/ops.md, step 6.

    Args:
        score: of every place.
        places: the real ones.
        own: those of them that are new.
        always: text, or all of a row that keeps everything.
    """
    assert config.cache_ratio is not None
    room = math.ceil(config.cache_ratio * len(own))
    window = min(config.local_window, math.floor(config.cache_ratio * len(own) * budget.WINDOW_SHARE))
    first = always | (set(places[: config.sinks]) & set(own))
    for last in (window, config.keep_recent):
        first |= set(own[max(len(own) - last, 0) :])
    rest = sorted((place for place in own if place not in first), key=lambda place: (-score[place], place))
    return sorted([*(first & set(own)), *rest[: max(room - len(first & set(own)), 0)]])


class Checked:
    """``budget.select``, each call against ``expected_of_row`` and scores of ``reference``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, always: Any = lambda row, tokens: set()) -> None:
        self.calls, self.always, self.select = 0, always, budget.select
        monkeypatch.setattr(budget, "select", self)

    def __call__(
        self, config: Any, query: Any, tokens: Tokens, keep: Any, own: Any, scaling: Any, **projections: Any
    ) -> Any:
        index, count = self.select(config, query, tokens, keep, own, scaling, **projections)
        self.calls += 1
        if query is None:
            return index, count
        keys, mask = tokens.keys, tokens.token_mask
        size, new = keys.shape[2], query.shape[2]
        real = torch.ones(keys.shape[0], size, dtype=torch.bool) if mask is None else mask
        for row in range(keys.shape[0]):
            places = real[row].nonzero()[:, 0].tolist()
            mine = [place for place in places if place >= size - new]
            probes = torch.tensor([mine[-config.num_recent :]], dtype=torch.int32)
            at = slice(row, row + 1)
            _, score = reference.probe_scores(query[at], keys[at], probes, scale=scaling, token_mask=real[at])
            expected = expected_of_row(config, score[0].tolist(), places, mine, self.always(row, tokens))
            assert index[row, : int(count[row])].tolist() == expected
            assert (index[row, int(count[row]) :] == size).all()
        return index, count


@pytest.mark.parametrize("config", [OWN, WINDOW, WINDOW.replace(cache_ratio=0.05, keep_recent=30)], ids=str)
def test_which_tokens(config: ZipVLConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    checked, model = Checked(monkeypatch), make_llama()
    rows = [text_inputs(400, 1), text_inputs(300, 2)]
    with zipvl.sparse(model, config, skip_projections=False):
        model(**pad_left(rows))
        model.generate(**rows[0], max_new_tokens=3, prefill_chunk_size=150, **GENERATE)
    assert checked.calls == 3 * (1 + 3)


def test_a_row_that_stays_dense_is_stored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Checked(monkeypatch, lambda row, tokens: set(range(400)) if row == 1 else set())
    model = make_llama()
    with zipvl.sparse(model, WINDOW, dense_below=350) as stats:
        model(**pad_left([text_inputs(400, 1), text_inputs(300, 2)]))
    assert [layer.stored for layer in stats.layers.values()] == [[120, 300]] * 3


def test_text_beside_an_image_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(row: int, tokens: Tokens) -> set[int]:
        assert tokens.visual is not None
        return set((~tokens.visual[row]).nonzero()[:, 0].tolist())

    Checked(monkeypatch, text)
    family = SPARSE["llava_next"]
    model, inputs = family.make(), family.inputs(60, 1)
    with zipvl.sparse(model, WINDOW, keep_text=True, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=3, **GENERATE)
    prompt = inputs["input_ids"].shape[1]
    for layer in stats.layers.values():
        assert layer.stored == [math.ceil(0.3 * prompt)], "text counts within the budget"
    assert output.past_key_values.layers[0].packed.lengths.tolist() == [math.ceil(0.3 * prompt) + 2]


@pytest.mark.parametrize("window", [{}, {"local_window": 24, "num_sinks": 3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "llava_next", "qwen2_5_vl", "gemma3_text"])
def test_decoded_tokens_see_what_is_stored(name: str, window: dict[str, Any]) -> None:
    family = SPARSE[name]
    model, inputs = family.make(), family.inputs(300, 1)
    prompt = inputs["input_ids"].shape[1]
    with zipvl.sparse(model, OWN, **window, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=6, suppress_tokens=[190, 191, 192, 193], **GENERATE)
    masks = {}
    for i, layer in stats.layers.items():
        if layer.mode == "sparse":
            assert layer.index is not None and layer.stored_index is not None
            assert layer.stored == [len(layer.stored_index[0])] == [math.ceil(0.3 * prompt)]
            assert layer.index[0].tolist() != layer.stored_index[0].tolist()
            how: dict[str, Any] = {"window": window.get("local_window", 0), "sinks": window.get("num_sinks", 0)}
            chunks = [(prompt, layer.index[0])]
            masks[i] = chunk_masks(prompt + 6, chunks, drop=True, stored=[layer.stored_index[0]], **how)
    if name == "gemma3_text":
        assert set(masks) == {1, 2}
        return  # its sliding layer is none that the oracle's masks speak of
    whole = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 6))
    with masked(model, masks):
        expected = model(input_ids=output.sequences, **whole, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("window", [{}, {"local_window": 24, "num_sinks": 3}], ids=str)
def test_chunks_and_turns_are_what_the_masks_say(window: dict[str, Any]) -> None:
    model, input_ids, config = make_llama(), ids(330, 1), OWN.replace(dense_below=150, **window)
    cache, logits, start = zipvl.ZipVLCache(model.config, config), [], 0
    picked: dict[int, list[Any]] = {i: [] for i in range(3)}
    stored: dict[int, list[Any]] = {i: [] for i in range(3)}
    ends = [100, 200, 300, 320, *range(321, 331)]  # a dense one, two sparse ones, a short turn, decoded tokens
    with zipvl.sparse(model, config, record_index=True) as stats:
        for end in ends:
            stats.reset()
            logits.append(forward(model, input_ids[:, start:end], cache))
            start = end
            for i in range(3):
                layer = stats.layers.get(i)
                picked[i].append((end, None if layer is None or layer.index is None else layer.index[0]))
                stored[i].append(None if layer is None or layer.stored_index is None else layer.stored_index[0])
    masks = {}
    for i in range(3):
        assert [index is None for index in stored[i]] == [True, False, False] + [True] * 11
        assert [len(index) for index in stored[i][1:3]] == [30, 30]
        assert cache.layers[i].packed.lengths.tolist() == [100 + 30 + 30 + 20 + 10]
        how: dict[str, Any] = {"window": config.local_window, "sinks": config.sinks, "drop": True}
        masks[i] = chunk_masks(330, picked[i][:4], stored=stored[i][:4], **how)
    with masked(model, masks):
        expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **TOLERANCE)


def test_the_prefill_is_the_same_bit_for_bit() -> None:
    model, inputs = make_llama(), text_inputs(400)
    found = []
    for share in (None, 0.2):
        with zipvl.sparse(model, WINDOW, cache_ratio=share, record_index=True) as stats:
            logits = model(**inputs).logits
        found.append((logits, [layer.index[0] for layer in stats.layers.values() if layer.index is not None]))
        assert [layer.stored for layer in stats.layers.values()] == [None if share is None else [80]] * 3
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_share_of_all_is_a_full_cache() -> None:
    model, inputs = make_llama(), text_inputs(300)
    found = []
    for how in ({"cache_ratio": 1.0}, {"cache_ratio": None, "cache": "full"}):
        with zipvl.sparse(model, WINDOW, **how):
            found.append(logits_of(model.generate(**inputs, max_new_tokens=6, **GENERATE)))
    torch.testing.assert_close(found[0], found[1], **TOLERANCE)


def test_a_padded_batch_is_its_rows_alone() -> None:
    model, rows = make_llama(), [text_inputs(400, 1), text_inputs(300, 2)]
    with zipvl.sparse(model, WINDOW, record_index=True) as stats:
        together = model.generate(**pad_left(rows), max_new_tokens=6, **GENERATE)
        both = [layer.stored_index for layer in stats.layers.values()]
        for i, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=6, **GENERATE)
            torch.testing.assert_close(logits_of(together)[i], logits_of(alone)[0], **TOLERANCE)
            for layer, (first, second) in zip(stats.layers.values(), both, strict=True):  # type: ignore[misc]
                assert layer.stored_index is not None
                assert torch.equal(layer.stored_index[0], first if i == 0 else second - 100)


def test_skipped_projections_store_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, model, found = Checked(monkeypatch), make_llama(), []
    for skip in (False, True):
        with zipvl.sparse(model, OWN, skip_projections=skip, record_index=True) as stats:
            output = model.generate(**text_inputs(400), max_new_tokens=4, **GENERATE)
        found.append((logits_of(output), [layer.stored_index for layer in stats.layers.values()]))
    assert checked.calls == 6
    torch.testing.assert_close(found[0][0], found[1][0], **TOLERANCE)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        assert first is not None and second is not None and torch.equal(first[0], second[0])


def test_guesses_of_prompt_lookup_change_no_token() -> None:
    model, inputs = make_llama(), text_inputs(300)
    inputs["input_ids"][:, -20:] = inputs["input_ids"][:, 100:120]
    with zipvl.sparse(model, WINDOW):
        plain = model.generate(**inputs, max_new_tokens=12, **GENERATE)
        guessed = model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=4, **GENERATE)
    assert torch.equal(plain.sequences, guessed.sequences)


@pytest.mark.slow
def test_compiled() -> None:
    model, inputs = make_llama(num_hidden_layers=2), text_inputs(300)
    with zipvl.sparse(model, WINDOW, record_index=True) as stats:
        expected = model(**inputs)
        stored = [layer.stored_index for layer in stats.layers.values()]
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
        for before, layer in zip(stored, stats.layers.values(), strict=True):
            assert before is not None and layer.stored_index is not None and layer.stored == [90]
            assert torch.equal(before[0], layer.stored_index[0])
        torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
        assert found.past_key_values.layers[0].packed.longest <= 90 + 3 + 1, "known before the selection"


def test_statistics_and_bytes() -> None:
    model = make_llama()
    with zipvl.sparse(model, OWN) as stats:
        assert stats.stored_ratio is None
        model(**text_inputs(400))
        assert stats.cache_bytes == 3 * (2 * 2 * 120 * 16 * 4 + 4), "keys, values, one length"
        assert stats.stored_ratio == pytest.approx(0.3) and stats.mean_ratio != pytest.approx(0.3)
        found = json.loads(json.dumps(stats.to_dict()))
        assert found["stored_ratio"] == pytest.approx(0.3) and found["layers"][1]["stored"] == [120]
        assert "of [400], stored [120]" in stats.summary()
        assert stats.layers[0].stored_index is None, "not recorded unless asked"
    with zipvl.sparse(model, OWN, dense_first_layers=1) as stats:
        model(**text_inputs(400))
    assert [stats.layers[i].stored for i in range(3)] == [None, [120], [120]]
    assert stats.stored_ratio == pytest.approx((1 + 0.3 + 0.3) / 3)


def test_a_second_image_is_chosen_from_by_itself() -> None:
    model = make_llava_next()
    first, second = (SPARSE["llava_next"].inputs(60, seed) for seed in (1, 2))
    given = {"pixel_values", "image_sizes"}
    with zipvl.sparse(model, WINDOW, keep_text=True) as stats:
        output = model(**first)
        cache, seen = output.past_key_values, first["input_ids"].shape[1]
        extra = {name: value for name, value in second.items() if name in given}
        forward(model, second["input_ids"], cache, **extra)
        share = math.ceil(0.3 * seen)
        assert stats.layers[0].stored == [2 * share]
    assert cache.layers[0].packed.lengths.tolist() == [2 * share]


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.25, 1 / 3, 1.0])
@pytest.mark.parametrize("fewest", [{}, {"min_tokens": 30}, {"keep_recent": 17}], ids=str)
def test_what_a_cache_with_its_own_budget_stores_is_known_before(ratio: float, fewest: dict[str, Any]) -> None:
    how: dict[str, Any] = {"tau": 0.9, "cache_ratio": ratio, "local_window": 64, "num_sinks": 4} | fewest
    config = ZipVLConfig.paper(**how)
    for tokens in (1, 10, 99, 100, 1024, 4099):
        scores, keys = torch.rand(2, tokens) + 0.1, torch.empty(2, 1, tokens, 1)
        mask = (torch.arange(tokens) >= torch.tensor([[tokens - 39], [0]])).contiguous()
        for token_mask in (None, mask):
            whole = None if token_mask is None else mask & torch.tensor([[True], [False]])
            keep, own = budget.first_stored(config, keys, None, token_mask, whole, None)
            _, count = ops.select_tokens(
                scores, scores, ratio=ratio, min_tokens=config.min_tokens, keep_mask=keep, token_mask=own
            )
            most = policy.max_kept(config, tokens, 40, token_mask is not None)
            assert most is not None and int(count.max()) <= most <= tokens
    assert policy.max_kept(config.replace(cache_ratio=None), 1000, 256, False) is None
    assert policy.max_kept(config, 1000, 256, False, added=True) is None
    assert policy.max_kept(ZipVLConfig.paper(cache_ratio=0.25, local_window=64), 1000, 256, False) == 250
