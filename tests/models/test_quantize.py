"""``cache="quantize"``: what is held, what it takes, and generation from it against the oracle.

The segments and the window are read where they are stored: what the quantised bytes stand for is what the oracle needs.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import transformers as tf

import zipvl
from tests.models.oracle import Compressed, oracle
from tests.models.tiny_models import PAPER, TEXT, build, ids, make_llama, pad_left, text_inputs
from zipvl import reference, reference_cache
from zipvl.transformers.quantized import PROBES, WINDOW, QuantizedKV, Segment

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
LAYERS, KV_HEADS, DIM = 3, 2, 32


def make(num_hidden_layers: int = LAYERS) -> Any:
    changes = {"head_dim": DIM, "num_hidden_layers": num_hidden_layers}
    return build(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT | changes))


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def kept_of(stats: Any) -> dict[int, torch.Tensor]:
    return {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}


FINE = {"high_bits": 8, "low_bits": 8}
"""Bits of the tests that compare two runs: their rounding differs, and a code that moves by one must not matter."""
COARSE: dict[str, Any] = {"atol": 5e-2, "rtol": 0}


def config(**changes: Any) -> zipvl.ZipVLConfig:
    return zipvl.ZipVLConfig.paper(tau=0.7, cache="quantize").replace(**changes)


def how(settings: zipvl.ZipVLConfig, appended: list[int], cache: Any) -> Compressed:
    return Compressed(settings, appended, [layer.packed for layer in cache.layers])


def prompt_cache(
    lengths: tuple[int, ...] = (70, 200), tokens: int = 200, **changes: Any
) -> tuple[QuantizedKV, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(len(lengths), heads, tokens, DIM, generator=generator) for heads in (KV_HEADS, KV_HEADS, 4))
    mask = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]  # padded on the left
    index, count = reference.select_tokens(*[mask * torch.rand(mask.shape, generator=generator)] * 2, token_mask=mask)
    return QuantizedKV(k, v, index, count, mask, 4, config(**changes)), [q, k, v, index, count, mask]


# Tokens


@pytest.mark.parametrize(("bits", "sinks"), [((4, 2), 0), ((4, (4, 2)), 4), ((8, 4), 3), (((4, 2), 8), 0)])
def test_generated_logits_are_those_of_the_quantised_tokens(bits: tuple[Any, Any], sinks: int) -> None:
    model, inputs, new = make(), text_inputs(300, 3), 230
    settings = config(high_bits=bits[0], low_bits=bits[1], num_sinks=sinks)
    with zipvl.sparse(model, settings, record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=new, **GENERATE)
    assert output.past_key_values.get_seq_length() == 300 + new - 1
    with oracle(model, kept_of(stats), 300, compressed=how(settings, [1] * (new - 1), output.past_key_values)):
        expected = model(output.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, 299:], **TOLERANCE)
    with oracle(model, kept_of(stats), 300, full=True):
        unquantised = model(output.sequences[:, :-1], use_cache=False).logits
    assert (unquantised - expected)[0, 299:].abs().max() > 10 * TOLERANCE["atol"], "the bits make a difference"


@pytest.mark.slow
def test_a_thousand_tokens_stay_right() -> None:
    model, inputs = make(num_hidden_layers=2), text_inputs(300, 4)
    with zipvl.sparse(model, config(), record_index=True) as stats:
        output = model.generate(**inputs, max_new_tokens=1000, **GENERATE)
    with oracle(model, kept_of(stats), 300, compressed=how(config(), [1] * 999, output.past_key_values)):
        expected = model(output.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, 299:], **TOLERANCE)


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_padded_batch_is_its_rows_alone(sinks: int) -> None:
    model, rows, new = make(), [text_inputs(330, 1), text_inputs(280, 2), text_inputs(100, 3)], 130
    with zipvl.sparse(model, config(num_sinks=sinks, **FINE)):
        together = model.generate(**pad_left(rows), max_new_tokens=new, **GENERATE)
        for b, row in enumerate(rows[:2]):
            alone = model.generate(**row, max_new_tokens=new, **GENERATE)
            torch.testing.assert_close(logits_of(together)[b], logits_of(alone)[0], **COARSE)
            assert torch.equal(together.sequences[b, -new:], alone.sequences[0, -new:])


@pytest.mark.parametrize(("turn", "sinks"), [(2, 0), (35, 4), (150, 4)])
def test_a_second_turn_attends_to_the_quantised_tokens_and_itself(turn: int, sinks: int) -> None:
    settings = config(num_sinks=sinks)
    model, inputs = make(), text_inputs(300, 3)
    with zipvl.sparse(model, settings, record_index=True) as stats:
        first = model.generate(**inputs, max_new_tokens=81, **GENERATE)
        tokens = torch.cat([first.sequences, ids(turn, 9)], dim=1)
        mask = torch.ones_like(tokens)  # a generated token may be the padding token
        second = model.generate(
            tokens, attention_mask=mask, max_new_tokens=30, past_key_values=first.past_key_values, **GENERATE
        )
    # The last token of the first turn comes with the second turn's.
    held = how(settings, [*[1] * 80, turn + 1, *[1] * 29], second.past_key_values)
    with oracle(model, kept_of(stats), 300, compressed=held):
        expected = model(second.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(logits_of(second)[0], expected[0, tokens.shape[1] - 1 :], **TOLERANCE)


def test_a_second_turn_of_a_padded_batch_is_single() -> None:
    model, new = make(), 70
    rows, turns = [text_inputs(330, 1), text_inputs(280, 2)], [ids(5, 7), ids(30, 8)]
    with zipvl.sparse(model, config(**FINE)):
        inputs = pad_left(rows)
        first = model.generate(**inputs, max_new_tokens=new, **GENERATE)
        added = pad_left([{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in turns])
        mask = [inputs["attention_mask"], torch.ones(2, new, dtype=torch.long), added["attention_mask"]]
        turn = torch.cat([first.sequences, added["input_ids"]], dim=1)
        together = model.generate(
            turn,
            attention_mask=torch.cat(mask, dim=1),
            max_new_tokens=20,
            past_key_values=first.past_key_values,
            **GENERATE,
        )
        for b, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=new, **GENERATE)
            whole = torch.cat([alone.sequences, turns[b]], dim=1)
            past, mask = alone.past_key_values, torch.ones_like(whole)
            alone = model.generate(whole, attention_mask=mask, max_new_tokens=20, past_key_values=past, **GENERATE)
            # A row's window is compressed when the batch's longest does not fit, so its last steps may differ.
            fits = 100 - new - 30
            torch.testing.assert_close(logits_of(together)[b, :fits], logits_of(alone)[0, :fits], **COARSE)


def test_beam_search_scores_are_those_of_its_tokens_alone() -> None:
    model, inputs, new = make(), text_inputs(300, 4), 110
    beams: dict[str, Any] = {"num_beams": 3, "length_penalty": 0.0, "output_scores": True}
    with zipvl.sparse(model, config(**FINE)):
        output = model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, **beams)
        cache = model(**inputs).past_key_values
        logits = [model(token, past_key_values=cache).logits for token in output.sequences[:, 300:-1].split(1, 1)]
        first = model(**inputs).logits[:, -1:]
    chosen = torch.cat([first, *logits], 1)[0].log_softmax(-1).gather(1, output.sequences[0, 300:, None]).sum()
    torch.testing.assert_close(output.sequences_scores[0], chosen, atol=0.1, rtol=1e-3)


def test_prompt_lookup_gives_the_tokens_of_greedy_decoding_within_a_window() -> None:
    model, inputs = make(), {"input_ids": ids(20, 3).repeat(1, 20)}
    with zipvl.sparse(model, config(**FINE)):
        plain = model.generate(**inputs, max_new_tokens=90, do_sample=False)
        assisted = model.generate(**inputs, max_new_tokens=90, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted, plain)


# What is held


def test_the_window_is_compressed_by_its_own_selection() -> None:
    cache, _ = prompt_cache(tau=0.6)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, WINDOW + 1, DIM, generator=generator) for heads in (4, KV_HEADS, KV_HEADS))
    before = cache.high.blocks.tolist(), cache.low.blocks.tolist()
    for step in range(WINDOW + 1):
        at = slice(step, step + 1)
        cache.append(k[:, :, at], v[:, :, at], None, q[:, :, at], None)
    assert cache.window.lengths.tolist() == [1, 1] and cache.tail == 1
    probes = torch.arange(WINDOW - PROBES, WINDOW, dtype=torch.int32).expand(2, -1)
    window = [s[:, :, :WINDOW] for s in (q, k, v)]
    scores = reference.probe_scores(window[0], window[1], probes)
    index, count = reference.select_tokens(*scores, tau=0.6)
    high, high_blocks, low, low_blocks, _ = reference_cache.quantize_kv(
        *window[1:], index, count, v_factor=cache.v_factor, **cache._bits
    )
    for segment, packed, blocks, first in (
        (cache.high, high, high_blocks, before[0]),
        (cache.low, low, low_blocks, before[1]),
    ):
        for b in range(2):
            used = slice(first[b], first[b] + int(blocks[b]))
            assert segment.blocks[b] == used.stop
            assert torch.equal(segment.packed[b, :, used], packed[b, :, : int(blocks[b])])


def fill(cache: QuantizedKV, tokens: int, seed: int = 1) -> list[torch.Tensor]:
    """Appends ``tokens`` tokens to both rows, one by one; returns their q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(2, heads, tokens, DIM, generator=generator) for heads in (4, KV_HEADS, KV_HEADS)]
    for step in range(tokens):
        q, k, v = (s[:, :, step : step + 1] for s in states)
        cache.append(k, v, None, q, None)
    return states


@pytest.mark.parametrize("padded", [True, False])
def test_sinks_of_the_prompt_stay_as_they_are(padded: bool) -> None:
    cache, (_, k, v, index, count, mask) = prompt_cache(num_sinks=4)
    if not padded:
        mask = torch.ones_like(mask)
        cache = QuantizedKV(k, v, index, count, None, 4, cache.config)
    places = [mask[b].nonzero()[:, 0] for b in range(2)]
    rest, selected = mask.clone(), torch.zeros_like(mask)
    for b in range(2):
        rest[b, places[b][:4]] = False
        selected[b, index[b, : int(count[b])].long()] = True
    assert (selected & mask & ~rest).any() and (~selected & mask & ~rest).any(), "sinks of both kinds"
    selected &= rest
    others = torch.argsort(selected, dim=-1, descending=True, stable=True).int(), selected.sum(-1, dtype=torch.int32)
    expected = reference_cache.quantize_kv(k, v, *others, token_mask=rest, **cache._bits)
    for _ in range(3):
        assert torch.equal(cache.v_factor, expected[4])
        for b in range(2):
            assert torch.equal(cache.window.keys[b, :, :4], k[b, :, places[b][:4]])
            assert torch.equal(cache.window.values[b, :, :4], v[b, :, places[b][:4]])
            for segment, packed, blocks in ((cache.high, *expected[:2]), (cache.low, *expected[2:4])):
                used = int(blocks[b])
                assert torch.equal(segment.packed[b, :, :used], packed[b, :, :used])
        fill(cache, 150)
    assert cache.window.lengths.tolist() == [4 + 50, 4 + 50] and cache.window.keys.shape[2] == 4 + WINDOW
    assert cache.tail == 50


def test_a_window_with_sinks_is_compressed_by_its_own_selection() -> None:
    cache, _ = prompt_cache(num_sinks=4, tau=0.6)
    before = cache.high.blocks.tolist(), cache.low.blocks.tolist()
    q, k, v = (states[:, :, :WINDOW] for states in fill(cache, WINDOW + 1))
    probes = torch.arange(WINDOW - PROBES, WINDOW, dtype=torch.int32).expand(2, -1)
    index, count = reference.select_tokens(*reference.probe_scores(q, k, probes), tau=0.6)
    made = reference_cache.quantize_kv(k, v, index, count, v_factor=cache.v_factor, **cache._bits)
    for segment, packed, blocks, first in ((cache.high, *made[:2], before[0]), (cache.low, *made[2:4], before[1])):
        for b in range(2):
            used = int(blocks[b])
            assert segment.blocks[b] == first[b] + used
            assert torch.equal(segment.packed[b, :, first[b] : first[b] + used], packed[b, :, :used])


def test_a_row_of_fewer_tokens_than_sinks_takes_the_next_ones() -> None:
    """Row 0 has two tokens, and its first two new ones are sinks; row 1 has four of them."""
    cache, (_, k, *_) = prompt_cache(lengths=(2, 200), num_sinks=4)
    assert cache.window.lengths.tolist() == [2, 4] and cache.high.blocks[0] == cache.low.blocks[0] == 0
    new = fill(cache, WINDOW + 1)
    assert cache.window.lengths.tolist() == [5, 5]
    assert torch.equal(cache.window.keys[0, :, :2], k[0, :, -2:])
    assert torch.equal(cache.window.keys[0, :, 2:4], new[1][0, :, :2])
    blocks = [s.packed[0, 0, : int(s.blocks[0]), :4].contiguous().view(torch.int32) for s in (cache.high, cache.low)]
    assert sum(int(tokens.sum()) for tokens in blocks) == WINDOW - 2
    assert torch.equal(cache.window.values[1, :, 4:5], new[2][1, :, -1:])
    out = cache.attend(new[0][:, :, -1:], None)
    assert out.isfinite().all()


@pytest.mark.parametrize("tokens", [2, 4])
def test_a_prompt_of_sinks_alone_is_exact(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(2, heads, tokens, DIM, generator=generator) for heads in (KV_HEADS, KV_HEADS, 4))
    index, count = reference.select_tokens(*[torch.rand(2, tokens, generator=generator)] * 2, tau=0.6)
    cache = QuantizedKV(k, v, index, count, None, 4, config(num_sinks=4))
    expected, _ = reference.decode_attn(q[:, :, :1], k, v, torch.full((2,), tokens, dtype=torch.int32))
    torch.testing.assert_close(cache.attend(q[:, :, :1], None), expected)
    cache.append(k, v, None, q, None)
    assert cache.tail == tokens


def test_more_sinks_than_a_row_ever_has_are_an_exact_cache() -> None:
    cache, (q, k, v, *_) = prompt_cache(lengths=(200, 200), num_sinks=2**40)
    assert cache.window.keys.shape[2] == 200 + WINDOW, "room for the tokens there are"
    cache.reserve(250)
    storage = cache.window.keys.data_ptr()
    new = fill(cache, 250)
    assert cache.window.keys.data_ptr() == storage and cache.high.blocks.tolist() == cache.low.blocks.tolist() == [0, 0]
    keys, values = (torch.cat(pair, dim=2) for pair in ((k, new[1]), (v, new[2])))
    expected, _ = reference.decode_attn(q[:, :, :1], keys, values, torch.tensor([450, 450], dtype=torch.int32))
    torch.testing.assert_close(cache.attend(q[:, :, :1], None), expected)


def test_rows_copies_and_crops_keep_sinks() -> None:
    cache, _ = prompt_cache(num_sinks=4)
    q, _, _ = fill(cache, WINDOW + 7)
    query = q[:, :, -1:]
    out, twin = cache.attend(query, None), copy.deepcopy(cache)
    cache.take_rows(torch.tensor([1, 0, 1]))
    assert torch.equal(cache.attend(query[[1, 0, 1]], None), out[[1, 0, 1]])
    cache.crop(cache.tail)
    assert cache.window.lengths.tolist() == [4, 4, 4]
    assert torch.equal(twin.attend(query, None), out)
    assert torch.equal(cache.window.keys[:, :, :4], twin.window.keys[[1, 0, 1], :, :4])
    cache.make_room(WINDOW)
    assert cache.window.lengths.tolist() == [4, 4, 4], "sinks alone are nothing to compress"


def test_a_turn_longer_than_the_window_leaves_its_room() -> None:
    cache, (q, k, v, *_) = prompt_cache(num_sinks=4)
    cache.append(k, v, None, q, None)
    assert cache.window.keys.shape[2] > 4 + WINDOW
    sinks = cache.window.keys[:, :, :4].clone()
    fill(cache, 1)
    assert cache.window.keys.shape[2] == 4 + WINDOW and cache.window.lengths.tolist() == [5, 5]
    assert torch.equal(cache.window.keys[:, :, :4], sinks)


def test_queries_of_padding_and_of_cropped_tokens_are_no_probes() -> None:
    cache, _ = prompt_cache()
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 40, DIM, generator=generator) for heads in (4, KV_HEADS, KV_HEADS))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :30] = False
    cache.append(k, v, mask, q, None)
    spread, probes = cache.recent.probes(cache.window.lengths, cache.window.longest)
    assert probes[0].tolist() == [*range(10), *[40] * (PROBES - 10)]
    assert probes[1].tolist() == list(range(40 - PROBES, 40))
    assert torch.equal(spread[0, :, :10], q[0, :, 30:])
    assert torch.equal(spread[1, :, 24:], q[1, :, 24:])
    more = [torch.randn(2, heads, 3, DIM, generator=generator) for heads in (KV_HEADS, KV_HEADS, 4)]
    cache.append(more[0], more[1], None, more[2], None)
    cache.crop(2)
    spread, probes = cache.recent.probes(cache.window.lengths, cache.window.longest)
    assert probes[0].tolist() == [*range(11), *[41] * (PROBES - 11)]
    assert torch.equal(spread[0, :, 10], more[2][0, :, 0])
    assert cache.tail == 1


def test_segments_grow_raggedly() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (2, 1, 4, 48), dtype=torch.uint8, generator=generator)
    segment = Segment(packed, torch.tensor([1, 3], dtype=torch.int32))
    assert segment.packed.shape[2] == 3
    expected = [packed[0, :, :1], packed[1, :, :3]]
    for counts in ([2, 0], [0, 1], [2, 2], [1, 0]):
        more = torch.randint(256, (2, 1, 2, 48), dtype=torch.uint8, generator=generator)
        segment.append(more, torch.tensor(counts, dtype=torch.int32))
        expected = [torch.cat([e, more[b, :, : counts[b]]], 1) for b, e in enumerate(expected)]
    for b in range(2):
        assert segment.blocks[b] == expected[b].shape[1]
        assert torch.equal(segment.packed[b, :, : expected[b].shape[1]], expected[b])
    assert segment.longest == 6


def test_rows_move_together() -> None:
    cache, _ = prompt_cache()
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 5, DIM, generator=generator) for heads in (4, KV_HEADS, KV_HEADS))
    cache.append(k, v, torch.tensor([[0, 1, 1, 1, 1], [1] * 5]).bool(), q, None)
    query = torch.randn(2, 4, 1, DIM, generator=generator)
    out = cache.attend(query, None)
    cache.take_rows(torch.tensor([1, 0, 1]))
    assert torch.equal(cache.attend(query[[1, 0, 1]], None), out[[1, 0, 1]])
    spread, probes = cache.recent.probes(cache.window.lengths, 5)
    assert probes[:, 4].tolist() == [4, 5, 4]
    assert torch.equal(spread[0], q[1]) and torch.equal(spread[2], q[1])


@pytest.mark.parametrize(("sinks", "layout"), [(0, (4, 2)), (4, (4, (4, 2)))])
def test_bytes_are_those_of_every_tensor(sinks: int, layout: tuple[Any, Any]) -> None:
    model, inputs = make(), text_inputs(1000)
    with zipvl.sparse(model, config(ratio=0.25, num_sinks=sinks, high_bits=layout[0], low_bits=layout[1])) as stats:
        output = model.generate(**inputs, max_new_tokens=4, **GENERATE)
    cache = output.past_key_values
    high, low = -(-250 // 64), -(-750 // 64)  # a few tokens less change no number of blocks
    bytes_of = [reference_cache.block_bytes(DIM, bits, torch.float32) for bits in layout]
    segments = KV_HEADS * (high * bytes_of[0] + low * bytes_of[1]) + 2 * 4
    window = 2 * KV_HEADS * (sinks + WINDOW) * DIM * 4 + 4
    queries = PROBES * (4 * DIM * 4 + 4)
    expected = LAYERS * (segments + KV_HEADS * DIM * 4 + window + queries)
    assert stats.cache_bytes == cache.cache_bytes == expected
    assert stats.full_cache_bytes == LAYERS * 2 * KV_HEADS * DIM * 4 * 1003
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(cache.layers[0].packed)}
    assert LAYERS * sum(held.values()) == expected


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in getattr(value, "__dict__", {}).values() for t in tensors_in(item)]


# Errors


def test_a_head_dimension_that_blocks_do_not_hold_is_an_error_before_anything_runs() -> None:
    model = make_llama()
    with (
        pytest.raises(ValueError, match="multiple of 32, and llama has 16"),
        zipvl.sparse(model, PAPER, cache="quantize"),
    ):
        raise AssertionError("the block must not be entered")
    with pytest.raises(ValueError, match="multiple of 32"):
        zipvl.ZipVLCache(model, config())


def test_crop_reaches_back_to_the_last_compression() -> None:
    model, inputs = make(), text_inputs(300)
    with zipvl.sparse(model, config()):
        cache = model.generate(**inputs, max_new_tokens=108, **GENERATE).past_key_values
    with pytest.raises(ValueError, match="cannot crop 8 tokens: only the last 7"):
        cache.crop(-8)
    cache.crop(-7)
    assert cache.get_seq_length() == 400


@pytest.mark.parametrize(("name", "value"), [("high_bits", 3), ("low_bits", (2, 4))])
def test_bits_are_checked(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be 2, 4 or 8, or .*, got {re.escape(str(value))}"):
        config(**{name: value})
