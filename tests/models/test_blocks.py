"""Images whose tokens see each other both ways: sparse by the last position that each row sees (step 5d)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks, sdpa_mask

import zipvl
from tests.models.oracle import masked, neighbourhood
from tests.models.tiny_models import (
    IMAGE,
    PAPER,
    TEXT,
    build,
    gemma3_inputs,
    ids,
    make_gemma3,
    pad_left,
    pixels,
    text_inputs,
)
from zipvl.transformers import cache_names
from zipvl.transformers.call import Call, Run
from zipvl.transformers.masks import mask_function

NEW = 6
GENERATE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
WINDOW = PAPER.replace(local_window=32, num_sinks=4)


def paligemma() -> Any:
    """Its prompt is a prefix, all of whose tokens see each other; its attention calls itself not causal."""
    vision = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**TEXT),
        vision_config=vision,
        image_token_index=IMAGE,
        projection_dim=64,
        tie_word_embeddings=False,
    )
    return build(tf.PaliGemmaForConditionalGeneration, config)


def paligemma_inputs(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """64 tokens of an image, then text."""
    input_ids = torch.cat([torch.full((1, 64), IMAGE), ids(tokens, seed)], dim=1)
    given = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return given | {"token_type_ids": torch.zeros_like(input_ids), "pixel_values": pixels(seed, 1, 3, 32, 32)}


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_a_prefix_language_model(cache: Any) -> None:
    model, name = paligemma(), cache_names.name_for(tf.PaliGemmaForConditionalGeneration.forward)
    for given in (paligemma_inputs(300, 1), pad_left([paligemma_inputs(320, 1), paligemma_inputs(270, 2)])):
        logits, tokens = model(**given).logits, model.generate(**given, **GENERATE)
        real = given["attention_mask"].bool()
        with zipvl.sparse(model, PAPER, tau=1.0, cache=cache, dense_below=0) as stats:
            torch.testing.assert_close(model(**given).logits[real], logits[real], **TOLERANCE)
            assert torch.equal(model.generate(**given, **GENERATE), tokens)
        assert [layer.mode for layer in stats.layers.values()] == ["sparse"] * 3
    first, turns = paligemma_inputs(300, 1), []
    for dense_below in (None, 0, 1000):  # a second turn is causal
        for more in (2, 200):
            step = ids(more, 5)
            if dense_below is None:
                turns.append(model(step, **{name: cache_names.of_output(model(**first))}).logits)
                continue
            with zipvl.sparse(model, PAPER, tau=1.0, cache=cache, dense_below=dense_below):
                found = model(step, **{name: cache_names.of_output(model(**first))}).logits
            torch.testing.assert_close(found, turns[more == 200], **TOLERANCE)


def test_a_prefix_language_model_without_generate_is_no_decoder() -> None:
    """Such a model of embeddings sees both ways throughout."""
    model = tf.Gemma3TextModel(tf.Gemma3TextConfig(**TEXT, use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="its attention looks both ways"), zipvl.sparse(model, PAPER):
        pass


@pytest.mark.parametrize("config", [PAPER, WINDOW], ids=["paper", "window"])
def test_tau_1_is_sdpa(config: zipvl.ZipVLConfig) -> None:
    model = make_gemma3()
    for given in (gemma3_inputs(300, 1), pad_left([gemma3_inputs(320, 1), gemma3_inputs(270, 2)])):
        logits, tokens = model(**given).logits, model.generate(**given, **GENERATE)
        real = given["attention_mask"].bool()
        for cache in ("drop", "full"):
            with zipvl.sparse(model, config, tau=1.0, cache=cache, dense_below=0) as stats:
                torch.testing.assert_close(model(**given).logits[real], logits[real], **TOLERANCE)
                assert torch.equal(model.generate(**given, **GENERATE), tokens)
            assert [i for i, layer in stats.layers.items() if layer.mode == "sparse"] == [1, 2]
        with zipvl.sparse(model, config, dense_below=1000) as stats:  # by the same mask
            torch.testing.assert_close(model(**given).logits[real], logits[real], **TOLERANCE)
        assert not stats.active


@pytest.mark.parametrize("config", [PAPER, WINDOW, PAPER.replace(all_queries=True)], ids=["paper", "window", "all"])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_sparse_is_what_the_masks_say(cache: Any, config: zipvl.ZipVLConfig) -> None:
    model, inputs = make_gemma3(), gemma3_inputs(300, 3)
    prompt = inputs["input_ids"].shape[1]
    tokens, image = prompt + NEW, (inputs["token_type_ids"][0] == 1).nonzero()[:, 0]
    last = torch.arange(tokens)
    last[image] = image[-1]
    sees = torch.arange(tokens) <= last[:, None]
    with zipvl.sparse(model, config, tau=0.6, cache=cache, record_index=True) as stats:
        output = model.generate(**inputs, **GENERATE, return_dict_in_generate=True, output_logits=True)
    masks = {0: (sees & (torch.arange(tokens) > torch.arange(tokens)[:, None] - 64), torch.ones(tokens).bool())}
    for layer in (1, 2):
        index = stats.layers[layer].index
        assert index is not None and len(index[0]) < 250
        chosen = torch.zeros(tokens, dtype=torch.bool)
        chosen[index[0]] = True
        may, computed = sees & chosen, chosen | config.all_queries | (config.local_window > 0)
        may[:prompt] &= (chosen | config.all_queries)[:prompt, None]
        for row in range(prompt):
            places = list(range(int(last[row]) + 1))
            window = [*places[: config.sinks], *places[max(row + 1 - config.local_window, 0) :]]
            may[row, window if config.local_window else neighbourhood(places, 0, 0)] = True
        may[prompt:, :prompt] = True if cache == "full" else chosen[:prompt]
        may[prompt:, prompt:] = sees[prompt:, prompt:]
        computed[prompt:] = True
        masks[layer] = may, computed
    whole = dict(inputs, input_ids=output.sequences, attention_mask=torch.ones_like(output.sequences))
    whole["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, NEW))
    with masked(model, masks):
        expected = model(**whole, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, dim=1)[0], expected[0, prompt - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("text", [20, 250])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_an_image_in_a_second_turn(cache: Any, text: int) -> None:
    """Short, it attends to what is kept and to itself; longer, it selects for itself."""
    model = make_gemma3()
    expected = two_turns(model, text)
    with zipvl.sparse(model, PAPER, tau=1.0, dense_below=0, cache=cache) as stats:
        torch.testing.assert_close(two_turns(model, text), expected, **TOLERANCE)
    assert stats.layers[1].mode == "sparse"


def test_an_image_behind_a_quantised_cache_is_an_error() -> None:
    text = tf.Gemma3TextConfig(**(TEXT | {"head_dim": 32}), layer_types=["full_attention"] * 3)
    model = build(tf.Gemma3ForCausalLM, text)
    image = torch.tensor([[-1] * 300 + [-1, 0, 0, 0, -1]])
    function = or_masks(causal_mask_function, blockwise_overlay(image))
    ends = mask_function(batch_size=1, q_length=5, kv_length=305, q_offset=300, mask_function=function)
    with zipvl.sparse(model, PAPER, cache="quantize"):
        past = cache_names.of_output(model(**text_inputs(300)))
        turn = {"attention_mask": {"full_attention": ends}, cache_names.name_for(type(model.model).forward): past}
        with pytest.raises(
            ValueError, match="see each other both ways are not supported behind a quantised ZipVLCache"
        ):
            model.model(ids(5, 1), **turn)


def two_turns(model: Any, text: int) -> torch.Tensor:
    """The logits of a turn with an image behind one without."""
    first, second = text_inputs(300), gemma3_inputs(text, 2)
    past = cache_names.of_output(model(**first))
    mask = torch.ones(1, 300 + second["input_ids"].shape[1], dtype=torch.long)
    logits: torch.Tensor = model(
        **(second | {"attention_mask": mask, cache_names.name_for(type(model).forward): past})
    ).logits
    return logits


def test_blocks_are_the_ends_of_rows() -> None:
    """In every prompt of blocks side by side, padded or not; what it says is what SDPA gets."""
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    for blocks in ([-1, -1, 0, 0, 1, 1, 1], [-1, -1, 0, 0, -1, 3, 3], [0] * 7, [-1, -1, -1, 2, 2, 2, -1]):
        function = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([blocks, blocks])))
        for mask in (None, padded):
            for new in (7, 3):
                given: dict[str, Any] = {"batch_size": 2, "q_length": new, "kv_length": 7, "q_offset": 7 - new}
                given |= {"mask_function": function, "attention_mask": mask, "allow_is_causal_skip": False}
                ours, theirs = mask_function(**given), sdpa_mask(**given)
                assert ours is not None and ours.dtype == torch.int32 and theirs is not None
                call = Call(Run(PAPER), None)
                token_mask, ends = call.read_mask(ours, new)
                assert ends is not None
                real = torch.ones(2, new).bool() if mask is None else mask[:, -new:]
                seen = call.seen_by(ends, token_mask, 7)
                assert torch.equal(seen[:, 0][real], theirs[:, 0][real])


@pytest.mark.parametrize("blocks", [[0, 0, -1, 0, 0, 1], [0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
def test_blocks_that_lie_apart_are_what_sdpa_gets(blocks: list[int]) -> None:
    """No last position says what their tokens see; ids that fall could be such blocks."""
    function = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([blocks])))
    given: dict[str, Any] = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": function}
    ours, theirs = (make(**given, allow_is_causal_skip=False) for make in (mask_function, sdpa_mask))
    assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_the_image_matters() -> None:
    """What the tests above hold equal is not equal without the blocks."""
    model, inputs = make_gemma3(), gemma3_inputs(300, 1)
    causal = dict(inputs, token_type_ids=torch.zeros_like(inputs["token_type_ids"]))
    with zipvl.sparse(model, PAPER, tau=1.0, dense_below=0):
        assert (model(**inputs).logits - model(**causal).logits).abs().max() > 0.1
