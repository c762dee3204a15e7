"""Gemma 4: images whose tokens see each other both ways, and layers that attend to the keys and values of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.tiny_models import (
    IMAGE,
    PAPER,
    build,
    gemma4_inputs,
    gemma4_shared_text,
    gemma4_unified_inputs,
    ids,
    make_gemma4,
    make_gemma4_unified,
    pad_left,
    text_inputs,
)
from zipvl.lmms_eval.meter import full_cache_bytes
from zipvl.transformers import cache_names

NEW = 5
GENERATE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
LOGITS: dict[str, Any] = GENERATE | {"return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
WINDOW = PAPER.replace(local_window=32, num_sinks=4)
SHARING: dict[str, Any] = {"num_hidden_layers": 8, "num_kv_shared_layers": 4, "use_bidirectional_attention": None}
MODELS: dict[str, Any] = {
    "gemma4": (make_gemma4, gemma4_inputs),
    "unified": (make_gemma4_unified, gemma4_unified_inputs),
    "e2b": (lambda: make_gemma4(**SHARING), gemma4_inputs),
}


def modes(stats: zipvl.Stats) -> list[str]:
    return [layer.mode for _, layer in sorted(stats.layers.items())]


# Images


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [PAPER, WINDOW], ids=["paper", "window"])
def test_tau_1_is_sdpa_with_images(name: str, config: zipvl.ZipVLConfig) -> None:
    make, inputs = MODELS[name]
    model = make()
    for given in (inputs(300, 1), pad_left([inputs(320, 1), inputs(270, 2)])):
        logits, tokens = model(**given).logits, model.generate(**given, **GENERATE)
        real = given["attention_mask"].bool()
        for cache in ("drop", "full"):
            with zipvl.sparse(model, config, tau=1.0, cache=cache, dense_below=0) as stats:
                torch.testing.assert_close(model(**given).logits[real], logits[real], **TOLERANCE)
                assert torch.equal(model.generate(**given, **GENERATE), tokens)
            assert modes(stats) == ["dense", "sparse"] * (model.config.text_config.num_hidden_layers // 2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_images_are_what_the_masks_say(name: str, cache: Any) -> None:
    """The tokens of an image see each other in sliding layers of Gemma 4, in all of unified ones, in none of E2B."""
    make, make_inputs = MODELS[name]
    model, inputs = make(), make_inputs(300, 3)
    prompt = inputs["input_ids"].shape[1]
    tokens, image = prompt + NEW, (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    place = torch.arange(tokens)
    causal = both_ways = place <= place[:, None]
    both_ways = both_ways.clone()
    if name != "e2b":
        both_ways[image[0] : image[-1] + 1, image[0] : image[-1] + 1] = True
    with zipvl.sparse(model, PAPER, tau=0.9, cache=cache, record_index=True) as stats:
        output = model.generate(**inputs, **LOGITS)
    sliding = both_ways & (place > place[:, None] - 64), torch.ones(tokens, dtype=torch.bool)
    masks = dict.fromkeys(range(0, model.config.text_config.num_hidden_layers, 2), sliding)
    for i, layer in stats.layers.items():
        if layer.index is None:
            continue
        assert len(layer.index[0]) < 250
        alive = torch.ones(tokens, dtype=torch.bool)
        alive[:prompt] = False
        alive[layer.index[0]] = True
        may = (both_ways if name == "unified" else causal).clone()
        may[:prompt] &= alive
        if cache == "drop":
            may &= alive
        masks[i] = may, alive
    assert sorted(masks) == list(range(model.config.text_config.num_hidden_layers))
    whole = dict(inputs, input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences))
    whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW))
    with masked(model, masks):
        expected = model(**whole, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


def test_images_matter_and_the_default_is_sparse() -> None:
    """What the tests above hold equal is not equal without the blocks; images make an ordinary prompt sparse."""
    model, inputs = make_gemma4(), gemma4_inputs(300, 1)
    causal = dict(inputs, mm_token_type_ids=torch.zeros_like(inputs["mm_token_type_ids"]))
    with zipvl.sparse(model) as stats:
        assert (model(**inputs).logits - model(**causal).logits).abs().max() > 0.1
    assert modes(stats) == ["dense", "sparse"] * 2


# Layers that attend to the keys and values of others: 5 and 7 to those of 3, 4 and 6 to those of 2

FULL = [1, 3, 5, 7]


def make_shared(**changes: Any) -> Any:
    return build(tf.Gemma4ForCausalLM, tf.Gemma4TextConfig(**gemma4_shared_text(**changes)))


def make_gemma3n() -> Any:
    text = gemma4_shared_text(laurel_rank=8, activation_sparsity_pattern=[0.0] * 8)
    text = {name: value for name, value in text.items() if name not in ("global_head_dim", "intermediate_size")}
    return build(tf.Gemma3nForCausalLM, tf.Gemma3nTextConfig(**text, intermediate_size=96))


@pytest.mark.parametrize("make", [make_shared, make_gemma3n])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_shared_keys_and_values_at_tau_1(make: Any, cache: Any) -> None:
    """transformers gives such layers the last tokens of a prompt alone where no other logits are asked for."""
    model = make()
    for given in (text_inputs(300), pad_left([text_inputs(300, 1), text_inputs(250, 2)])):
        real = given["attention_mask"].bool()
        logits, tokens = model(**given).logits, model.generate(**given, **GENERATE)
        for config in (PAPER, WINDOW):
            with zipvl.sparse(model, config, tau=1.0, cache=cache, dense_below=0) as stats:
                torch.testing.assert_close(model(**given).logits[real], logits[real], **TOLERANCE)
                assert modes(stats) == ["dense", "sparse"] * 4
                assert torch.equal(model.generate(**given, **GENERATE), tokens)
                for keep in (3, 200):
                    last = model(**given, logits_to_keep=keep).logits
                    torch.testing.assert_close(last[real[:, -keep:]], logits[:, -keep:][real[:, -keep:]], **TOLERANCE)
        with zipvl.sparse(model, PAPER, dense_below=1000) as stats:
            assert torch.equal(model.generate(**given, **GENERATE), tokens)
        assert not stats.active


@pytest.mark.parametrize("make", [make_shared, make_gemma3n])
@pytest.mark.parametrize("config", [PAPER, WINDOW, PAPER.replace(all_queries=True)], ids=["paper", "window", "all"])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_shared_keys_and_values_are_what_the_masks_say(make: Any, config: zipvl.ZipVLConfig, cache: Any) -> None:
    model, inputs = make(), text_inputs(300, 3)
    with zipvl.sparse(model, config, tau=0.9, cache=cache, record_index=True) as stats:
        output = model.generate(**inputs, **LOGITS)
        kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
        assert sorted(kept) == FULL and all(len(index) < 250 for index in kept.values())
        assert torch.equal(kept[5], kept[3]) and torch.equal(kept[7], kept[3]) and not torch.equal(kept[1], kept[3])
        assert stats.layers[7].cache_bytes is None, "it has none of its own"
    place = torch.arange(300 + NEW)
    near = (place <= place[:, None]) & (place > place[:, None] - 64)
    masks = dict.fromkeys(range(0, 8, 2), (near, torch.ones_like(place, dtype=torch.bool)))
    given: dict[str, Any] = {"window": config.local_window, "sinks": config.sinks, "all_queries": config.all_queries}
    for i, index in kept.items():
        masks[i] = chunk_masks(300 + NEW, [(300, index)], drop=cache == "drop", **given)
    with masked(model, masks):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected[0, 299:-1], **TOLERANCE)


def test_a_batch_of_shared_layers_is_single() -> None:
    model, rows = make_shared(), [text_inputs(300, 1), text_inputs(270, 2)]
    with zipvl.sparse(model, PAPER, tau=0.9) as stats:
        together = model.generate(**pad_left(rows), **LOGITS)
        kept = [stats.layers[i].kept for i in FULL]
        for b, row in enumerate(rows):
            alone = model.generate(**row, **LOGITS)
            assert [stats.layers[i].kept[0] for i in FULL] == [of[b] for of in kept]
            torch.testing.assert_close(torch.stack(together.logits, 1)[b], torch.stack(alone.logits, 1)[0], **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("more", [5, 200])
def test_turns_behind_shared_layers(cache: Any, more: int) -> None:
    """A short turn attends to what is stored, a long one selects for itself; so does the cut one of ``generate``."""
    model = make_shared()
    name, mask = cache_names.name_for(type(model).forward), torch.ones(2, 300 + more, dtype=torch.long)
    mask[0, 300:302] = 0
    real = mask[:, 300:].bool()

    def turns(**keep: Any) -> torch.Tensor:
        past = cache_names.of_output(model(ids(300, 1).repeat(2, 1), use_cache=True))
        step = ids(more, 5).repeat(2, 1)
        logits: torch.Tensor = model(step, attention_mask=mask, **{name: past}, **keep).logits
        return logits

    expected = turns()
    with zipvl.sparse(model, PAPER, tau=1.0, cache=cache, dense_below=0) as stats:
        found, last = turns(), turns(logits_to_keep=2)
    assert modes(stats)[1::2] == ["sparse"] * 4
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE)
    torch.testing.assert_close(last, found[:, -2:], **TOLERANCE)


def test_a_turn_behind_quantised_shared_layers() -> None:
    """In one forward it is what it is token by token."""
    model, step = make_shared(), ids(9, 5)
    name = cache_names.name_for(type(model).forward)
    with zipvl.sparse(model, PAPER, tau=0.9, cache="quantize", dense_below=0) as stats:
        past = cache_names.of_output(model(ids(300, 1), use_cache=True))
        found = model(step, **{name: past}).logits
        past = cache_names.of_output(model(ids(300, 1), use_cache=True))
        singly = torch.cat([model(step[:, i : i + 1], **{name: past}).logits for i in range(9)], dim=1)
    assert modes(stats)[1::2] == ["sparse"] * 4
    torch.testing.assert_close(found, singly, **TOLERANCE)


def test_candidates_of_an_assistant_behind_shared_layers() -> None:
    window = {"sliding_window": 1024}  # transformers 5.17 fails with a shorter one, without zipvl too
    model, assistant = make_shared(**window), make_shared(**window, num_attention_heads=2)
    inputs = text_inputs(300, 1)
    for given in (PAPER.replace(tau=1.0), PAPER.replace(tau=0.9)):
        with zipvl.sparse(model, given, dense_below=0):
            expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            found = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert torch.equal(found, expected)
    with zipvl.sparse(model, PAPER), pytest.raises(ValueError, match="return_shared_kv_states=True"):
        model(**inputs, return_shared_kv_states=True)


def test_the_layers_that_share_are_named_together() -> None:
    model, inputs = make_shared(), text_inputs(300)
    with (
        pytest.raises(ValueError, match=r"names \[5\], which attend to the keys and values of \[3\]"),
        zipvl.sparse(model, PAPER, layers=(1, 5)),
    ):
        pass
    expected = model(**inputs).logits
    for layers, sparse in (((1, 3, 5), [1, 3, 5]), ((3,), [3]), ((1,), [1])):
        with zipvl.sparse(model, PAPER, layers=layers, tau=1.0) as stats:
            torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
            model.generate(**inputs, **GENERATE)
        assert [i for i, layer in stats.layers.items() if layer.mode == "sparse"] == sparse
    with zipvl.sparse(model, PAPER, dense_first_layers=4, tau=0.9) as stats:
        torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)
    assert {stats.layers[i].reason for i in FULL} == {"among the first dense_first_layers=4"}


def test_what_shared_layers_store_is_stored_once() -> None:
    config = tf.Gemma4TextConfig(**gemma4_shared_text())
    assert full_cache_bytes(config, 3, 300, 4) == 3 * 300 * 2 * (2 * 2 * 32 + 2 * 2 * 64) * 4
    model = make_shared()
    with zipvl.sparse(model, PAPER, cache_ratio=0.3) as stats:
        model(**text_inputs(300))
    assert stats.layers[7].stored == stats.layers[3].stored == [90] and stats.layers[7].cache_bytes is None
