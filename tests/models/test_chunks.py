"""Prompts in chunks, further turns and further images: each selects for itself among all tokens so far."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.tiny_models import (
    IMAGE,
    PAPER,
    TEXT,
    build,
    ids,
    llava_next_inputs,
    make_gemma3_text,
    make_llama,
    make_llava_next,
    pad_left,
    text_inputs,
)
from zipvl.transformers import cache_names
from zipvl.transformers.reasons import TEXT as NO_VISUAL
from zipvl.transformers.storage import RaggedKV

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
CHUNKS = PAPER.replace(tau=0.7, num_recent=16, num_random=16, dense_below=0)


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def forward(model: Any, input_ids: torch.Tensor, cache: Any, **given: Any) -> torch.Tensor:
    """Logits of the next tokens of a prompt."""
    given[cache_names.name_for(type(model).forward)] = cache
    logits: torch.Tensor = model(input_ids=input_ids, **given).logits
    return logits


def step_by_step(
    model: Any, config: zipvl.ZipVLConfig, input_ids: torch.Tensor, ends: list[int]
) -> tuple[torch.Tensor, dict[int, list[tuple[int, torch.Tensor | None]]], Any]:
    """Forwards up to each of ``ends``, one row: logits, what each layer selected of each chunk, and the cache."""
    cache, logits, found, start = zipvl.ZipVLCache(model.config, config), [], dict[int, list[Any]](), 0
    with zipvl.sparse(model, config, record_index=True) as stats:
        for end in ends:
            stats.reset()
            logits.append(forward(model, input_ids[:, start:end], cache))
            for i in range(model.config.get_text_config().num_hidden_layers):
                layer = stats.layers.get(i)
                index = None if layer is None or layer.index is None else layer.index[0]
                found.setdefault(i, []).append((end, index))
            start = end
    return torch.cat(logits, dim=1), found, cache


# One row, against the masks


@pytest.mark.parametrize("window", [{}, {"local_window": 12, "num_sinks": 2}, {"all_queries": True}], ids=str)
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_chunks_are_what_the_masks_say(cache: Any, window: dict[str, Any]) -> None:
    model, input_ids, config = make_llama(), ids(330, 1), CHUNKS.replace(cache=cache, **window)
    ends = [100, 200, 300, 320, *range(321, 331)]  # two sparse chunks behind the first, one too short, decoded tokens
    logits, picked, held = step_by_step(model, config, input_ids, ends)
    masks = {}
    for i, chunks in picked.items():
        assert [index is None for _, index in chunks] == [False] * 3 + [True] * 11
        how: dict[str, Any] = {"all_queries": config.all_queries, "drop": cache == "drop"}
        masks[i] = chunk_masks(330, chunks[:4], window=config.local_window, sinks=config.num_sinks, **how)
        kept = held.layers[i].packed.lengths.item()
        assert kept == 330 if cache == "full" else kept == 30 + int(masks[i][0][-1, :300].sum()) < 330
    with masked(model, masks):
        expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_a_dense_chunk_is_followed_by_a_sparse_one(cache: Any) -> None:
    model, input_ids = make_llama(), ids(310, 1)
    config = CHUNKS.replace(cache=cache, dense_below=150, local_window=8)
    logits, picked, held = step_by_step(model, config, input_ids, [100, 200, 300, *range(301, 311)])
    masks = {}
    for i, chunks in picked.items():
        assert [index is None for _, index in chunks[:3]] == [True, False, False]
        masks[i] = chunk_masks(310, chunks[:3], window=8, drop=cache == "drop")
        assert isinstance(held.layers[i].packed, RaggedKV)
    with masked(model, masks):
        expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_an_ordinary_cache(tau: float) -> None:
    """``attn_implementation="zipvl"`` alone: chunks are sparse, the cache is transformers'. At ``tau=1`` of a
    ZipVLCache elsewhere it is dense attention."""
    model, input_ids = make_llama(), ids(600, 1)
    dense = model(input_ids).logits
    model.set_attn_implementation("zipvl")
    cache = tf.DynamicCache(config=model.config)
    found = [forward(model, part, cache) for part in input_ids.split(300, dim=1)]
    assert type(cache.layers[0]) is tf.cache_utils.DynamicLayer and cache.get_seq_length() == 600
    assert not torch.allclose(torch.cat(found, dim=1), dense, atol=1e-2)
    ours = zipvl.ZipVLCache(model, PAPER.replace(tau=1.0, cache="full"))
    found = [forward(model, part, ours) for part in input_ids.split(300, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), dense, **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full", "quantize"])
def test_tau_1_is_dense_attention_in_chunks(cache: Any) -> None:
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**(TEXT | {"head_dim": 32})))
    input_ids = ids(400, 3)
    expected = model.generate(input_ids, max_new_tokens=8, **GENERATE)
    with zipvl.sparse(model, CHUNKS, tau=1.0, cache=cache, high_bits=8, low_bits=8) as stats:
        output = model.generate(input_ids, max_new_tokens=8, prefill_chunk_size=150, **GENERATE)
    assert stats.layers[0].prompt == (400 if cache != "quantize" else 150), "behind a quantised cache as before"
    if cache != "quantize":
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(logits_of(output), logits_of(expected), **TOLERANCE)


def test_sliding_layers_beside_full_ones() -> None:
    model, input_ids = make_gemma3_text(), ids(400, 3)
    expected = model.generate(input_ids, max_new_tokens=8, **GENERATE)
    for cache in ("drop", "full"):
        with zipvl.sparse(model, CHUNKS, tau=1.0, cache=cache) as stats:
            output = model.generate(input_ids, max_new_tokens=8, prefill_chunk_size=150, **GENERATE)
        assert [layer.mode for _, layer in sorted(stats.layers.items())] == ["dense", "sparse", "sparse"]
        torch.testing.assert_close(logits_of(output), logits_of(expected), **TOLERANCE)


# What a prefix leaves


@pytest.mark.parametrize("dense_below", ["auto", 0, 250])
def test_a_prefix_leaves_the_same_bits_whatever_follows(dense_below: Any) -> None:
    """In a full cache, for prefixes that end where a chunk does."""
    model = make_llama()
    config = PAPER.replace(tau=0.7, cache="full", dense_below=dense_below, local_window=16, num_sinks=2)
    prefix, left = ids(600, 1), []
    for seed, length in ((2, 0), (3, 150), (4, 413), (5, 700)):
        whole = torch.cat([prefix, ids(length, seed)], dim=1)
        with zipvl.sparse(model, config):
            output = model.generate(whole, max_new_tokens=3, prefill_chunk_size=200, **GENERATE)
        layers = cache_names.of_output(output).layers
        left.append([layer.packed.keys[:, :, :600] for layer in layers] + [x.packed.values[:, :, :600] for x in layers])
    for other in left[1:]:
        assert all(torch.equal(a, b) for a, b in zip(left[0], other, strict=True))


# Batches


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_padded_batches_in_chunks(cache: Any, window: int) -> None:
    """Rows begin within a chunk, or several chunks later; at ``tau=1`` they are dense attention."""
    model, rows = make_llama(), [text_inputs(400, 1), text_inputs(310, 2), text_inputs(110, 3)]
    batch = pad_left(rows)
    expected = model.generate(**batch, max_new_tokens=6, **GENERATE)
    with zipvl.sparse(model, CHUNKS, tau=1.0, cache=cache, local_window=window) as stats:
        output = model.generate(**batch, max_new_tokens=6, prefill_chunk_size=100, **GENERATE)
    assert stats.layers[0].mode == "sparse" and stats.layers[0].tokens == [400, 310, 110]
    torch.testing.assert_close(logits_of(output), logits_of(expected), **TOLERANCE)
    with zipvl.sparse(model, CHUNKS, cache=cache, local_window=window) as stats:
        output = model.generate(**batch, max_new_tokens=6, prefill_chunk_size=100, **GENERATE)
        alone = model.generate(**rows[0], max_new_tokens=6, prefill_chunk_size=100, **GENERATE)
    torch.testing.assert_close(logits_of(output)[0], logits_of(alone)[0], **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_padding_between_turns(cache: Any) -> None:
    """A second turn that is padded on the left, behind rows of two lengths, against the rows alone. A window would
    count that padding."""
    model, config = make_llama(), CHUNKS.replace(cache=cache)
    first, second = [ids(200, 1), ids(150, 2)], [ids(100, 3), ids(70, 4)]
    with zipvl.sparse(model, config) as stats:
        alone = []
        for one, two in zip(first, second, strict=True):
            cache_of_row = zipvl.ZipVLCache(model.config, config)
            forward(model, one, cache_of_row)
            alone.append(forward(model, two, cache_of_row)[0, -1])
        kept = [layer.kept for layer in stats.layers.values()]
        together = zipvl.ZipVLCache(model.config, config)
        rows = pad_left([{"input_ids": x} for x in first])["input_ids"]
        mask = torch.ones(2, 300, dtype=torch.long)
        mask[1, :50] = mask[1, 200:230] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        forward(model, rows, together, attention_mask=mask[:, :200], position_ids=positions[:, :200])
        rows = pad_left([{"input_ids": x} for x in second])["input_ids"]
        found = forward(model, rows, together, attention_mask=mask, position_ids=positions[:, 200:])[:, -1]
    torch.testing.assert_close(found, torch.stack(alone), **TOLERANCE)
    assert [layer.kept[1] for layer in stats.layers.values()] == [row[0] for row in kept]


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_beams_behind_chunks(cache: Any) -> None:
    model, input_ids = make_llama(), ids(400, 3)
    beams: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    expected = model.generate(input_ids, **beams)
    with zipvl.sparse(model, CHUNKS, tau=1.0, cache=cache):
        assert torch.equal(model.generate(input_ids, prefill_chunk_size=150, **beams), expected)


# Turns


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_a_long_second_turn_selects_for_itself(cache: Any) -> None:
    model, config = make_llama(), CHUNKS.replace(cache=cache, local_window=12, num_sinks=2)
    first, turn = ids(300, 1), ids(120, 2)
    with zipvl.sparse(model, config, record_index=True) as stats:
        output = model.generate(first, max_new_tokens=5, **GENERATE)
        picks = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
        whole = torch.cat([output.sequences, turn], dim=1)
        again = model.generate(whole, max_new_tokens=5, past_key_values=output.past_key_values, **GENERATE)
    masks = {}
    for i, layer in stats.layers.items():
        assert layer.index is not None
        # decoded tokens, of which the last was not yet seen, attended to all that was held
        chunks: list[Any] = [(300, picks[i]), *((300 + n, None) for n in range(1, 5)), (425, layer.index[0])]
        masks[i] = chunk_masks(430, chunks, window=12, sinks=2, drop=cache == "drop")
    with masked(model, masks):
        expected = model(again.sequences, use_cache=False).logits
    torch.testing.assert_close(logits_of(again)[0], expected[0, 424:-1], **TOLERANCE)


def test_a_short_turn_is_dense_and_kept_whole() -> None:
    model = make_llama()
    with zipvl.sparse(model, CHUNKS) as stats:
        output = model.generate(ids(300, 1), max_new_tokens=5, **GENERATE)
        before, prefills = output.past_key_values.layers[0].packed.lengths.item(), stats.prefills
        whole = torch.cat([output.sequences, ids(31, 2)], dim=1)
        again = model.generate(whole, max_new_tokens=1, past_key_values=output.past_key_values, **GENERATE)
    assert again.past_key_values.layers[0].packed.lengths.item() == before + 32
    assert stats.prefills == prefills, "as decoded tokens are"


def test_candidates_behind_a_filled_cache_are_no_chunk() -> None:
    model, prompt = make_llama(), ids(20, 3).repeat(1, 20)
    with zipvl.sparse(model, CHUNKS, num_recent=1, num_random=1) as stats:
        plain = model.generate(prompt, max_new_tokens=30, do_sample=False)
        assisted = model.generate(prompt, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(plain, assisted) and stats.prefills == 2


# Visual tokens


def looking() -> Any:
    """A model of text that has an image token."""
    model = make_llama()
    model.config.image_token_id = IMAGE
    return model


def page(text: int, image: int, seed: int) -> torch.Tensor:
    return torch.cat([ids(text, seed), torch.full((1, image), IMAGE)], dim=1)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_text_so_far_is_dense_and_an_image_makes_a_chunk_sparse(cache: Any) -> None:
    """A first chunk of text, one with an image, one of text behind it: what was said before the image stays."""
    model, config = looking(), zipvl.ZipVLConfig(**vars(CHUNKS) | {"cache": cache, "tau": 0.3})
    config = config.replace(text_prompts="dense", keep_text=True)
    input_ids = torch.cat([ids(100, 1), page(20, 80, 2), ids(100, 3)], dim=1)
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits, picked, _ = step_by_step(model, config, input_ids, [100, 200, 300])
        with zipvl.sparse(model, config) as stats:
            held = zipvl.ZipVLCache(model.config, config)
            for part in input_ids.split(100, dim=1):
                forward(model, part, held)
                reasons.append(stats.layers[1].reason)
    assert reasons == [NO_VISUAL, None, None]
    text = set((input_ids[0] != IMAGE).nonzero()[:, 0].tolist())
    masks = {}
    for i, chunks in picked.items():
        (_, first), (_, second), (_, third) = chunks
        assert first is None and second is not None and third is not None
        kept = set(second.tolist())
        assert kept >= {t for t in text if t < 200} and len(kept) < 200
        if cache == "drop":
            places = [t for t in range(200) if t in kept] + list(range(200, 300))
            kept = {places[p] for p in third.tolist()}
        else:
            kept = set(third.tolist())
        assert kept >= text and len(kept) < 300
        masks[i] = chunk_masks(300, chunks, drop=cache == "drop")
    with masked(model, masks):
        expected = model(input_ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_rows_of_text_and_rows_with_images_in_chunks(cache: Any) -> None:
    model = looking()
    settings: dict[str, Any] = {"num_recent": 16, "num_random": 16, "dense_below": 0, "cache": cache, "tau": 0.3}
    settings["local_window"] = 0
    rows = [{"input_ids": torch.cat([page(150, 150, 1), ids(60, 2)], dim=1)}, {"input_ids": ids(300, 3)}]
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    dense = model.generate(**rows[1], max_new_tokens=4, **GENERATE)
    with warnings.catch_warnings(), zipvl.sparse(model, **settings) as stats:
        warnings.simplefilter("ignore")
        output = model.generate(**pad_left(rows), max_new_tokens=4, prefill_chunk_size=120, **GENERATE)
        kept = [layer.kept for layer in stats.layers.values()]
        alone = model.generate(**rows[0], max_new_tokens=4, prefill_chunk_size=120, **GENERATE)
    assert all(row[1] == 300 and 210 <= row[0] < 360 for row in kept)
    torch.testing.assert_close(logits_of(output)[1], logits_of(dense)[0], **TOLERANCE)
    torch.testing.assert_close(logits_of(output)[0], logits_of(alone)[0], **TOLERANCE)


def test_a_second_image() -> None:
    """A vision-language model, a turn with an image behind a turn with an image."""
    model = make_llava_next()
    one, two = llava_next_inputs(200, 1), llava_next_inputs(150, 2)
    config = CHUNKS.replace(keep_text=True, text_prompts="dense", tau=1.0)
    both = {key: torch.cat([one[key], two[key]]) for key in ("pixel_values", "image_sizes")}
    whole = torch.cat([one["input_ids"], two["input_ids"]], dim=1)
    expected = model(input_ids=whole, **both).logits[:, one["input_ids"].shape[1] :]
    for tau in (1.0, 0.5):
        with zipvl.sparse(model, config, tau=tau, record_index=True) as stats:
            cache = zipvl.ZipVLCache(model.config, config.replace(tau=tau))
            forward(model, one["input_ids"], cache, pixel_values=one["pixel_values"], image_sizes=one["image_sizes"])
            found = forward(
                model, two["input_ids"], cache, pixel_values=two["pixel_values"], image_sizes=two["image_sizes"]
            )
        assert all(layer.mode == "sparse" for layer in stats.layers.values()) and stats.prefills == 2
        if tau == 1.0:
            torch.testing.assert_close(found, expected, **TOLERANCE)
        else:
            assert all(150 + 200 < layer.kept[0] < whole.shape[1] for layer in stats.layers.values())


# The storage


def test_what_was_held_moves_up_to_the_new_tokens() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 1, 5, 4)[:2].unbind(0)
    held = RaggedKV(keys.clone(), values.clone(), torch.tensor([5, 2, 0], dtype=torch.int32), 5)
    held.visual = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0] * 5], dtype=torch.bool)
    new = torch.randn(3, 1, 3, 4)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    visual = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    tokens = held.with_new(new, new, mask, visual, store=True)
    assert tokens.token_mask is not None and tokens.visual is not None
    assert tokens.token_mask.int().tolist() == [[1, 1, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [0] * 7 + [1]]
    assert tokens.visual.int().tolist() == [[1, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0] * 7 + [1]]
    for row, (old, lead) in enumerate(((5, 1), (2, 0), (0, 2))):
        expected = torch.cat([keys[row, :, :old], new[row, :, lead:]], dim=1)
        assert torch.equal(tokens.keys[row][:, tokens.token_mask[row]], expected)
        assert torch.equal(held.keys[row][:, : old + 3 - lead], expected)
    assert held.lengths.tolist() == [7, 5, 1] and held.visual is not None
    assert held.visual.int().tolist() == [[1, 0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [1] + [0] * 7]
    held.take_rows(torch.tensor([2, 0]))
    assert held.visual[:, 0].tolist() == [True, True]


def test_what_is_cropped_is_no_longer_visual() -> None:
    states = torch.randn(1, 1, 4, 4)
    held = RaggedKV.real(states, states, None)
    held.append(states, states, None, torch.tensor([[False, True, True, False]]))
    assert held.even and held.visual is not None and held.visual.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 0]]
    held.crop(2)
    held.append(states[:, :, :2], states[:, :, :2], None)
    tokens = held.with_new(states, states, None, None, store=False)
    assert tokens.visual is not None and tokens.visual.int().tolist() == [[0, 0, 0, 0, 0, 1, *[0] * 6]]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_a_compiled_chunk(cache: Any) -> None:
    """One graph a chunk, behind what an eager prompt or another compiled chunk left."""
    model, parts = make_llama(num_hidden_layers=2), ids(420, 1).split(140, dim=1)
    config = CHUNKS.replace(cache=cache, local_window=12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with zipvl.sparse(model, config) as stats:
        expected_cache, found_cache = zipvl.ZipVLCache(model.config, config), zipvl.ZipVLCache(model.config, config)
        expected = [forward(model, part, expected_cache) for part in parts]
        kept = [layer.kept for layer in stats.layers.values()]
        found = [forward(model, parts[0], found_cache), *(forward(compiled, part, found_cache) for part in parts[1:])]
        assert [layer.kept for layer in stats.layers.values()] == kept
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, **TOLERANCE)
        step = torch.tensor([[5]])
        torch.testing.assert_close(forward(model, step, found_cache), forward(model, step, expected_cache), **TOLERANCE)
    lengths = [[layer.packed.lengths.tolist() for layer in c.layers] for c in (found_cache, expected_cache)]
    assert lengths[0] == lengths[1]
