"""The invariants, on every family: tau=1 is SDPA, batch is single, sparse is what the masks say."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import zipvl
from tests.models.oracle import oracle
from tests.models.tiny_models import (
    MULTIMODAL,
    PAPER,
    SPARSE,
    Family,
    make_gemma3,
    make_mistral,
    pad_left,
    text_inputs,
)

NEW = 6
GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}  # logits reach 10; layers of random weights amplify rounding


@pytest.fixture(params=SPARSE)
def family(request: pytest.FixtureRequest) -> Family:
    return SPARSE[request.param]


def logits_of(output: Any) -> torch.Tensor:
    """``[B, new tokens, vocabulary]``."""
    return torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_tau_1_is_sdpa(family: Family, cache: str) -> None:
    model, inputs = family.make(), family.inputs(300, 1)
    dense = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    with zipvl.sparse(model, PAPER, tau=1.0, cache=cache) as stats:
        torch.testing.assert_close(model(**inputs).logits, dense, **TOLERANCE)
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    assert torch.equal(output.sequences, tokens.sequences)
    torch.testing.assert_close(logits_of(output), logits_of(tokens), **TOLERANCE)
    assert [i for i, layer in stats.layers.items() if layer.mode == "sparse"] == family.layers
    assert stats.mean_ratio == 1.0


def test_tau_1_is_sdpa_in_a_padded_batch(family: Family) -> None:
    model = family.make()
    inputs = pad_left([family.inputs(320, 1), family.inputs(270, 2)])
    tokens = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    with zipvl.sparse(model, PAPER, tau=1.0):
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    assert torch.equal(output.sequences, tokens.sequences)
    torch.testing.assert_close(logits_of(output), logits_of(tokens), **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_batch_is_single(family: Family, cache: str) -> None:
    # the last row is shorter than dense_below: dense alone, so dense in the batch
    model, lengths = family.make(), (330, 300, 40)
    rows = [family.inputs(length, seed) for seed, length in enumerate(lengths)]
    config = zipvl.ZipVLConfig.paper(tau=0.8, cache=cache, dense_below=256)
    with zipvl.sparse(model, config, record_index=True) as stats:
        together = model.generate(**pad_left(rows), max_new_tokens=NEW, **GENERATE)
        width = together.sequences.shape[1] - NEW
        layers = {i: layer for i, layer in stats.layers.items() if layer.mode == "sparse"}
        assert list(layers) == family.layers
        for b, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=NEW, **GENERATE)
            assert torch.equal(together.sequences[b, -NEW:], alone.sequences[0, -NEW:])
            torch.testing.assert_close(logits_of(together)[b], logits_of(alone)[0], **TOLERANCE)
            real = row["input_ids"].shape[1]
            for i, layer in layers.items():
                assert layer.tokens[b] == real
                assert layer.index is not None
                chosen = layer.index[b] - (width - real)
                if real < config.dense_below:
                    assert stats.layers[i].mode == "dense"
                    assert chosen.tolist() == list(range(real))
                else:
                    assert stats.layers[i].index is not None
                    assert torch.equal(chosen, stats.layers[i].index[0])


@pytest.mark.parametrize("all_queries", [False, True])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_sparse_is_what_the_masks_say(cache: str, all_queries: bool) -> None:
    for name in ("llama", "gemma3_text"):
        model, inputs = SPARSE[name].make(), SPARSE[name].inputs(300, 3)
        with zipvl.sparse(model, PAPER, tau=0.7, cache=cache, all_queries=all_queries, record_index=True) as stats:
            output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
        kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
        assert list(kept) == SPARSE[name].layers
        assert all(len(index) < 250 for index in kept.values())
        with oracle(model, kept, 300, full=cache == "full", all_queries=all_queries):
            expected = model(output.sequences, use_cache=False).logits
        torch.testing.assert_close(logits_of(output)[0], expected[0, 299:-1], **TOLERANCE)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_sparse_is_what_the_masks_say_with_images(name: str) -> None:
    model, inputs = MULTIMODAL[name].make(), MULTIMODAL[name].inputs(250, 3)
    prompt = inputs["input_ids"].shape[1]
    with zipvl.sparse(model, PAPER, tau=0.7, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
    whole = dict(inputs, input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences))
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW))
    with oracle(model, kept, prompt):
        expected = model(**whole, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_plain_implementation_for_the_whole_model(name: str) -> None:
    """set_attn_implementation("zipvl") reaches the vision tower too, which stays dense."""
    model, inputs = MULTIMODAL[name].make(), MULTIMODAL[name].inputs(300, 1)
    tokens = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    model.set_attn_implementation("zipvl")
    assert model.config.vision_config._attn_implementation == "zipvl"
    from zipvl.transformers import configure

    stats = configure(model, zipvl.ZipVLConfig.paper(tau=1.0))
    cache = zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(tau=1.0))
    output = model.generate(**inputs, max_new_tokens=NEW, past_key_values=cache, **GENERATE)
    assert torch.equal(output.sequences, tokens.sequences)
    assert [stats.layers[i].mode for i in range(3)] == ["sparse"] * 3
    configure(model, None)
    other = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)  # a DynamicCache, the default configuration
    assert other.sequences.shape == tokens.sequences.shape


@pytest.mark.parametrize("name", SPARSE)
def test_short_prompts_are_untouched(name: str) -> None:
    model, inputs = SPARSE[name].make(), SPARSE[name].inputs(60, 1)
    tokens = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    with zipvl.sparse(model, PAPER, tau=0.5, dense_below=1000) as stats:
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    assert torch.equal(logits_of(output), logits_of(tokens))
    assert not stats.active
    assert "dense_below=1000" in (stats.layers[2].reason or "")
    assert stats.cache_bytes == stats.full_cache_bytes


def test_a_mask_that_is_not_causal_is_dense_and_says_so_once() -> None:
    model, inputs = make_gemma3(), text_inputs(300, 1)
    mask = torch.ones(1, 1, 300, 300).tril().bool()
    mask[..., 200, 299] = True
    masks = {"full_attention": mask, "sliding_attention": mask}
    expected = model(inputs["input_ids"], attention_mask=masks).logits
    with pytest.warns(UserWarning) as caught, zipvl.sparse(model, PAPER, tau=0.5) as stats:
        for _ in range(2):
            assert torch.equal(model(inputs["input_ids"], attention_mask=masks).logits, expected)
    texts = [str(w.message) for w in caught if "zipvl" in str(w.message)]
    assert len(texts) == 2
    assert "a custom 4-D mask" in texts[0]
    assert "no layer of Gemma3TextModel was sparse" in texts[1]
    assert stats.layers[1].reason == "the mask is not plain causal"
    with (
        zipvl.sparse(model, PAPER, tau=0.5, layers=(1,)),
        pytest.raises(ValueError, match=r"layer 1\): ZipVLConfig.layers names this layer.*not plain causal"),
    ):
        model(inputs["input_ids"], attention_mask=masks)


@pytest.mark.parametrize("marked", [False, True])
def test_gemma3_without_images_is_sparse_in_its_global_layers(marked: bool) -> None:
    model, inputs = make_gemma3(), text_inputs(300, 1)
    if marked:  # as its processor does
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    tokens = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="zipvl")  # sliding layers are dense by design: nothing to warn about
        with zipvl.sparse(model, PAPER, tau=1.0) as stats:
            output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    assert torch.equal(output.sequences, tokens.sequences)
    assert {i: layer.mode for i, layer in stats.layers.items()} == {0: "dense", 1: "sparse", 2: "sparse"}
    assert stats.layers[0].reason == "sliding-window attention"


def test_a_model_of_sliding_windows_alone_is_dense_and_loud() -> None:
    model, inputs = make_mistral(), text_inputs(300, 1)
    tokens = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    with pytest.warns(UserWarning, match="no layer of MistralModel was sparse"), zipvl.sparse(model, PAPER) as stats:
        output = model.generate(**inputs, max_new_tokens=NEW, **GENERATE)
    assert torch.equal(logits_of(output), logits_of(tokens))
    assert not stats.active
    with (
        pytest.raises(ValueError, match=r"names \[0\].*cannot be sparse"),
        zipvl.sparse(SPARSE["gemma3_text"].make(), layers=(0,)),
    ):
        pass
