"""Every token keeps its neighbourhood: a window and sinks, against a dense model under the mask that they mean."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.tiny_models import (
    IMAGE,
    PAPER,
    SPARSE,
    VIDEO,
    VISION_END,
    VISION_START,
    make_llama,
    pad_left,
    text_inputs,
)
from zipvl import ops, reference
from zipvl.transformers import attention

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
GENERATE |= {"suppress_tokens": [IMAGE, VISION_START, VISION_END, VIDEO]}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
WINDOW = PAPER.replace(tau=0.7, local_window=24, num_sinks=3)


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def masks_of(stats: zipvl.Stats, tokens: int, prompt: int, **how: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The masks of the layers whose prompt, the first row, was sparse."""
    found = {}
    for index, layer in stats.layers.items():
        if layer.index is not None and layer.mode == "sparse":
            found[index] = chunk_masks(tokens, [(prompt, layer.index[0])], **how)
    return found


@pytest.mark.parametrize("all_queries", [False, True], ids=["queries of T", "all queries"])
@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("name", ["llama", "llava_next", "qwen2_5_vl"])
def test_it_is_what_the_masks_say(name: str, cache: Any, all_queries: bool) -> None:
    family = SPARSE[name]
    model, inputs = family.make(), family.inputs(300, 1)
    config = WINDOW.replace(cache=cache, all_queries=all_queries)
    prompt = inputs["input_ids"].shape[1]
    with zipvl.sparse(model, config, record_index=True) as stats:
        logits = model(**inputs).logits
        output = model.generate(**inputs, max_new_tokens=6, **GENERATE)
    for layer in stats.layers.values():
        assert layer.index is not None
        kept = set(layer.index[0].tolist())
        assert kept >= {0, 1, 2, *range(prompt - 24, prompt)} and layer.ratio < 1
    how = {"window": 24, "sinks": 3, "all_queries": all_queries}
    whole = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 6))
    with masked(model, masks_of(stats, prompt + 6, prompt, drop=cache == "drop", **how)):
        expected = model(input_ids=output.sequences, **whole, use_cache=False).logits
    torch.testing.assert_close(logits[0], expected[0, :prompt], **TOLERANCE)
    torch.testing.assert_close(logits_of(output)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


def test_a_window_of_the_whole_prompt_is_dense_attention() -> None:
    model, inputs = make_llama(), text_inputs(300)
    dense = model(**inputs).logits
    with zipvl.sparse(model, PAPER, ratio=0.2, local_window=300) as stats:
        found = model(**inputs).logits
    assert stats.active and stats.layers[0].kept == [300], "the last so many tokens are kept too"
    torch.testing.assert_close(found, dense, **TOLERANCE)


def test_a_padded_batch_is_its_rows_alone() -> None:
    model, rows = make_llama(), [text_inputs(400, 1), text_inputs(300, 2)]
    with zipvl.sparse(model, WINDOW) as stats:
        together = model.generate(**pad_left(rows), max_new_tokens=6, **GENERATE)
        kept = [layer.kept for layer in stats.layers.values()]
        for i, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=6, **GENERATE)
            torch.testing.assert_close(logits_of(together)[i], logits_of(alone)[0], **TOLERANCE)
            assert [layer.kept[0] for layer in stats.layers.values()] == [both[i] for both in kept]


def test_what_the_op_is_given_is_what_the_reference_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the op under a mixed configuration, against the reference on the same arguments."""
    calls, op = [], ops.zipvl_layer

    def checked(*args: Any, **kwargs: Any) -> Any:
        out, index, count, *packed = op(*args, **kwargs)
        expected = reference.zipvl_layer(*args, **kwargs)
        assert torch.equal(count, expected[2]) and torch.equal(index, expected[1])
        torch.testing.assert_close(out, expected[0], **TOLERANCE)
        calls.append(kwargs)
        return (out, index, count, *packed)

    model, batch = make_llama(), pad_left([text_inputs(400, 1), text_inputs(300, 2)])
    monkeypatch.setattr(attention.ops, "zipvl_layer", checked)
    with zipvl.sparse(model, WINDOW, max_ratio=0.4, dense_below=350):
        model(**batch)
    assert len(calls) == 3
    assert {(c["local_window"], c["num_sinks"], c["max_ratio"]) for c in calls} == {(24, 3, 0.4)}
    assert calls[0]["extra_mask"] is None and calls[0]["keep_mask"].sum(-1).tolist() == [0, 300]


def test_a_ceiling() -> None:
    model, inputs = make_llama(), text_inputs(400)
    with zipvl.sparse(model, PAPER, tau=0.99, max_ratio=0.3) as stats:
        model(**inputs)
        assert all(layer.kept[0] <= 120 for layer in stats.layers.values())
    with zipvl.sparse(model, WINDOW, tau=0.99, max_ratio=0.3) as stats:
        model(**inputs)
        assert all(120 < layer.kept[0] <= math.ceil(0.3 * 400) + 24 + 3 for layer in stats.layers.values())


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_the_first_layers_stay_dense(cache: Any) -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, WINDOW, dense_first_layers=2, cache=cache, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=5, **GENERATE)
    words = "among the first dense_first_layers=2"
    assert [stats.layers[i].reason for i in range(3)] == [words, words, None]
    with masked(model, masks_of(stats, 305, 300, window=24, sinks=3, drop=cache == "drop")):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, 299:-1], **TOLERANCE)


def test_all_dense_first_layers_say_so() -> None:
    model = make_llama()
    with pytest.warns(UserWarning, match="among the first dense_first_layers=3"):
        with zipvl.sparse(model, PAPER, dense_first_layers=3) as stats:
            model(**text_inputs(300))
    assert not stats.active


def test_every_query_is_computed_so_none_is_left_unprojected() -> None:
    model, inputs = make_llama(), text_inputs(300)
    found = {}
    for skip in (False, True):
        with zipvl.sparse(model, WINDOW, skip_projections=skip) as stats:
            found[skip] = model(**inputs).logits
        assert stats.active
    assert torch.equal(found[False], found[True])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_compiled(cache: Any) -> None:
    model, inputs = make_llama(num_hidden_layers=2), text_inputs(300)
    with zipvl.sparse(model, WINDOW, cache=cache):
        expected = model(**inputs).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)
