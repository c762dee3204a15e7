"""ZipVLCache: what is kept, how rows move, further turns, and that nothing is ever kept silently in full.

``ZipVLCacheLayer`` and ``RaggedKV`` are asked themselves for what no model shows: how storage grows, and that an update
without an answer is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import zipvl
from tests.models.oracle import oracle
from tests.models.tiny_models import PAPER, SPARSE, ids, make_gemma3_text, make_llama, pad_left, text_inputs
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.storage import RaggedKV

GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}


def logits_of(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def states(batch: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, tokens, 8, generator=generator), torch.randn(batch, 2, tokens, 8, generator=generator)


def selection(rows: list[list[int]], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.full((len(rows), tokens), tokens, dtype=torch.int32)
    for b, row in enumerate(rows):
        index[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return index, torch.tensor([len(row) for row in rows], dtype=torch.int32)


def selected(k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> RaggedKV:
    return RaggedKV.packed(*zipvl.ops.pack_kv(k, v, index, count), count)


# Packing


def test_selected_tokens_are_packed_and_the_rest_is_gone() -> None:
    k, v = states(2, 10)
    rows = [[1, 4, 9], [0, 2, 3, 7, 9]]
    packed = selected(k, v, *selection(rows, 10))
    assert packed.lengths.tolist() == [3, 5]
    assert packed.longest == 5
    for b, row in enumerate(rows):
        assert torch.equal(packed.keys[b, :, : len(row)], k[b, :, row])
        assert torch.equal(packed.values[b, :, : len(row)], v[b, :, row])
    assert torch.equal(packed.keys[0, :, 3:], torch.zeros(2, 2, 8))
    assert sum(t.untyped_storage().nbytes() for t in packed.tensors()) == 2 * (2 * 2 * 5 * 8) * 4 + 2 * 4, (
        "keys, values, lengths"
    )


def test_garbage_behind_a_row_is_not_kept() -> None:
    keys, values = states(2, 10)
    keys[0, :, 1:] = values[0, :, 1:] = torch.nan  # tokens >= count are undefined
    packed = RaggedKV.packed(keys, values, torch.tensor([1, 3], dtype=torch.int32))
    assert packed.keys.shape[2] == 3
    assert packed.keys[0, :, 1:].isfinite().all()
    assert packed.values[0, :, 1:].isfinite().all()


def test_storage_is_cut_without_reading_a_length() -> None:
    keys, values = states(3, 10)
    keys[0, :, 1:] = values[0, :, 1:] = torch.nan  # tokens >= count are undefined
    packed = RaggedKV.cut(keys, values, torch.tensor([1, 4, 10], dtype=torch.int32), 4)
    assert packed.longest == 4 and packed.lengths.tolist() == [1, 4, 4]
    assert all(s.untyped_storage().nbytes() == 3 * 2 * 4 * 8 * 4 for s in packed.token_states())
    for b, count in enumerate((1, 4)):
        for now, before in zip(packed.token_states(), (keys, values), strict=True):
            assert torch.equal(now[b, :, :count], before[b, :, :count])
            assert torch.equal(now[b, :, count:], torch.zeros(2, 4 - count, 8))
    query = torch.randn(3, 2, 1, 8)
    assert packed.attend(query, None)[2].isnan().all(), "a row that was to be longer is not one that is shorter"
    assert packed.attend(query, None)[:2].isfinite().all()


@pytest.mark.parametrize("mask", [None, [[0, 0, 1, 1], [1, 0, 1, 1]]])
def test_real_tokens_are_packed_in_order(mask: list[list[int]] | None) -> None:
    k, v = states(2, 4)
    token_mask = None if mask is None else torch.tensor(mask).bool()
    packed = RaggedKV.real(k, v, token_mask)
    rows = [[0, 1, 2, 3]] * 2 if mask is None else [[2, 3], [0, 2, 3]]
    for b, row in enumerate(rows):
        assert packed.lengths[b] == len(row)
        assert torch.equal(packed.keys[b, :, : len(row)], k[b, :, row])
        assert torch.equal(packed.values[b, :, : len(row)], v[b, :, row])
    k.zero_()
    assert packed.keys.abs().sum() > 0, "the storage must be its own"


def test_append_is_ragged_and_grows() -> None:
    k, v = states(2, 10)
    packed = selected(k, v, *selection([[1, 4, 9], [0, 2, 3, 7, 9]], 10))
    kept = [[k[0, :, [1, 4, 9]]], [k[1, :, [0, 2, 3, 7, 9]]]]
    masks: list[list[list[int]] | None] = [
        None,
        [[1], [0]],
        [[0, 1, 1], [0, 0, 1]],
        [[1, 0, 1], [1, 1, 1]],
        *[None] * 70,
    ]
    for step, mask in enumerate(masks):
        tokens = 1 if mask is None else len(mask[0])
        new_k, new_v = states(2, tokens, step + 1)
        token_mask = None if mask is None else torch.tensor(mask).bool()
        packed.append(new_k, new_v, token_mask)
        for b in range(2):
            real = list(range(tokens)) if mask is None else [i for i in range(tokens) if mask[b][i]]
            kept[b].append(new_k[b][:, real])
    for b in range(2):
        expected = torch.cat(kept[b], dim=1)
        assert packed.lengths[b] == expected.shape[1]
        assert torch.equal(packed.keys[b, :, : expected.shape[1]], expected)
    assert packed.longest >= int(packed.lengths.max())
    assert packed.visible()[0].shape[2] == packed.longest
    assert packed.valid().sum(-1).tolist() == packed.lengths.tolist()


def test_growing_does_not_copy_every_step() -> None:
    packed = RaggedKV.real(*states(1, 1000), None)
    moves = 0
    for step in range(200):
        before = packed.keys.data_ptr()
        packed.append(*states(1, 1, step), None)
        moves += packed.keys.data_ptr() != before
    assert moves <= 3


# The layer's contract


def packed_layer(cache: str = "drop") -> tuple[ZipVLCacheLayer, torch.Tensor, torch.Tensor]:
    k, v = states(2, 10)
    layer = ZipVLCacheLayer(zipvl.ZipVLConfig.paper(cache=cache))  # type: ignore[arg-type]
    returned = layer.update(k, v)
    assert returned[0] is k and returned[1] is v
    index, count = selection([[1, 4, 9], [0, 2, 3, 7, 9]], 10)
    layer.keep_packed(*zipvl.ops.pack_kv(k, v, index, count), count)
    return layer, k, v


def test_a_selection_that_never_arrives_is_an_error() -> None:
    layer = ZipVLCacheLayer(zipvl.ZipVLConfig.paper())
    layer.update(*states(1, 300))
    with pytest.raises(RuntimeError, match="never selected"):
        layer.update(*states(1, 1))
    layer, _, _ = packed_layer()
    layer.update(*states(2, 1))
    with pytest.raises(RuntimeError, match="never selected"):
        layer.update(*states(2, 1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_implementation_is_an_error_never_a_full_cache(implementation: str) -> None:
    model, inputs = make_llama(), text_inputs(300)
    model.set_attn_implementation(implementation)
    with pytest.raises(RuntimeError, match="another attention implementation ran"):
        model.generate(**inputs, max_new_tokens=4, past_key_values=zipvl.ZipVLCache(model, PAPER))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_states_cannot_be_read_by_another_attention_implementation(implementation: str) -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER):
        cache = model(**inputs).past_key_values
    model.set_attn_implementation(implementation)
    with pytest.raises(RuntimeError, match=r"ZipVLCache: layer 0 is packed"):
        model(ids(1, 5), past_key_values=cache)


def test_altered_keys_are_an_error() -> None:
    model, inputs = make_llama(), text_inputs(300)
    cache = zipvl.ZipVLCache(model, PAPER)
    update = cache.update
    model.set_attn_implementation("zipvl")
    model(**inputs, past_key_values=cache)
    cache.update = lambda *a, **k: tuple(s.clone() for s in update(*a, **k))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="altered between the cache"):
        model(ids(1, 5), past_key_values=cache)
    fresh = zipvl.ZipVLCache(model, PAPER)
    change = fresh.update
    fresh.update = lambda *a, **k: tuple(s.clone() for s in change(*a, **k))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="altered between the cache"):
        model(**inputs, past_key_values=fresh)
    with pytest.raises(RuntimeError, match="never selected"):
        model(ids(1, 5), past_key_values=fresh)


def test_a_cache_that_the_model_does_not_hand_on_is_an_error() -> None:
    """Made from the configuration alone, outside of a block: nothing tells the attention function of it."""
    model, inputs = make_llama(), text_inputs(300)
    model.set_attn_implementation("zipvl")
    cache = zipvl.ZipVLCache(model.config, PAPER)
    model(**inputs, past_key_values=cache)
    with pytest.raises(RuntimeError, match="never selected"):
        model(ids(1, 5), past_key_values=cache)
    with zipvl.sparse(model, PAPER):
        packed = model(**inputs).past_key_values
    with pytest.raises(RuntimeError, match=r"make the cache from the model itself: zipvl.ZipVLCache\(model\)"):
        model(ids(1, 5), past_key_values=packed)


def test_seen_is_not_kept() -> None:
    layer, _, _ = packed_layer()
    assert layer.get_seq_length() == 10
    assert layer.get_mask_sizes(3) == (13, 0)
    returned, _ = layer.update(*states(2, 1))
    assert returned.is_meta
    layer.append(None, states(2, 1)[0], None)
    assert layer.get_seq_length() == 11
    assert layer.packed is not None and layer.packed.lengths.tolist() == [4, 6]


def test_rows_move_together() -> None:
    layer, k, _ = packed_layer()
    packed = layer.packed
    assert packed is not None
    layer.reorder_cache(torch.tensor([1, 0]))
    assert packed.lengths.tolist() == [5, 3]
    assert torch.equal(packed.keys[1, :, :3], k[0][:, [1, 4, 9]])
    layer.batch_repeat_interleave(2)
    assert packed.lengths.tolist() == [5, 5, 3, 3]
    layer.batch_select_indices(torch.tensor([False, True, False, True]))
    assert packed.lengths.tolist() == [5, 3]
    layer.batch_select_indices(torch.tensor([1]))
    assert packed.lengths.tolist() == [3]
    assert torch.equal(packed.keys[0, :, :3], k[0][:, [1, 4, 9]])


def test_rows_of_a_dense_layer_move_too() -> None:
    k, v = states(2, 10)
    layer = ZipVLCacheLayer(zipvl.ZipVLConfig.paper())
    layer.batch_repeat_interleave(3)
    layer.reorder_cache(torch.tensor([0]))
    layer.update(k, v)
    layer.keep_all()
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.keys, k[[1, 1, 0, 0]])
    layer.crop(-3)
    assert layer.get_seq_length() == 7
    assert layer.nbytes <= layer.full_nbytes * 10 // 7


def test_crop_removes_only_what_came_after_the_prompt() -> None:
    layer, _, _ = packed_layer()
    with pytest.raises(ValueError, match="cannot crop 1 tokens: only the last 0"):
        layer.crop(-1)
    for step in range(3):
        layer.update(*states(2, 1, step))
        layer.append(None, states(2, 1)[0], None)
    layer.crop(-2)
    assert layer.packed is not None
    assert layer.packed.lengths.tolist() == [4, 6]
    assert layer.get_seq_length() == 11
    layer.crop(0)
    with pytest.raises(ValueError, match="cannot crop 2 tokens: only the last 1"):
        layer.crop(-2)
    layer.update(*states(2, 2))
    layer.append(torch.tensor([[False, True], [True, True]]), states(2, 2)[0], None)
    with pytest.raises(ValueError, match="only the last 0"):
        layer.crop(-1)
    ZipVLCacheLayer(zipvl.ZipVLConfig.paper()).crop(-1)


def test_reset_makes_it_new() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, tau=0.7):
        cache = zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(tau=0.7))
        first = model.generate(**inputs, max_new_tokens=4, past_key_values=cache, **GENERATE)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.cache_bytes == 0
        second = model.generate(**inputs, max_new_tokens=4, past_key_values=cache, **GENERATE)
        cache.layers[0].update(*states(1, 300))
        cache.reset()
        model(**inputs, past_key_values=cache)
    assert torch.equal(first.sequences, second.sequences)


# Bytes


@pytest.mark.parametrize(("cache", "share"), [("drop", 0.5), ("full", 1.1)])
def test_bytes_are_those_of_the_storage(cache: str, share: float) -> None:
    model, inputs = make_llama(), text_inputs(900)
    config = zipvl.ZipVLConfig.paper(ratio=0.25, cache=cache)  # type: ignore[arg-type]
    with zipvl.sparse(model, config) as stats:
        output = model.generate(**inputs, max_new_tokens=8, **GENERATE)
    kept = output.past_key_values
    assert isinstance(kept, zipvl.ZipVLCache)
    stored = sum(
        t.untyped_storage().nbytes()
        for layer in kept.layers
        for t in (layer.packed.keys, layer.packed.values, layer.packed.lengths)
    )
    assert stats.cache_bytes == kept.cache_bytes == stored
    assert stats.full_cache_bytes == 3 * 2 * 2 * 16 * 907 * 4
    assert stored < share * stats.full_cache_bytes
    if cache == "full":
        assert stored >= stats.full_cache_bytes


def test_a_hybrid_model_keeps_its_own_sliding_layers() -> None:
    model = make_gemma3_text()
    cache = zipvl.ZipVLCache(model.config, PAPER)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "DynamicSlidingWindowLayer",
        "ZipVLCacheLayer",
        "ZipVLCacheLayer",
    ]
    assert cache.is_sliding == [True, False, False]
    with zipvl.sparse(model, PAPER, tau=0.7):
        model(**text_inputs(300), past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 63
    assert cache.cache_bytes > sum(layer.nbytes for layer in cache.layers[1:])


# Beams, further turns, other caches


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_beam_search_with_tau_1_is_sdpa(cache: str) -> None:
    model = make_llama()
    inputs = pad_left([text_inputs(300, 1), text_inputs(270, 2)])
    beams: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2}
    dense = model.generate(**inputs, **beams)
    with zipvl.sparse(model, PAPER, tau=1.0, cache=cache):
        assert torch.equal(model.generate(**inputs, **beams), dense)


def test_beam_search_scores_are_those_of_the_kept_tokens() -> None:
    model, inputs = make_llama(), text_inputs(300, 4)
    with zipvl.sparse(model, PAPER, tau=0.7, record_index=True) as stats:
        output = model.generate(
            **inputs,
            num_beams=3,
            max_new_tokens=6,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
    with oracle(model, kept, 300):
        logits = model(output.sequences, use_cache=False).logits[0, 299:-1]
    chosen = logits.log_softmax(-1).gather(1, output.sequences[0, 300:, None]).sum()
    torch.testing.assert_close(output.sequences_scores[0], chosen, **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_second_turn_attends_to_the_kept_tokens_and_itself(name: str, cache: str) -> None:
    model, inputs = SPARSE[name].make(), text_inputs(300, 3)
    with zipvl.sparse(model, PAPER, tau=0.7, cache=cache, record_index=True) as stats:
        first = model.generate(**inputs, max_new_tokens=4, **GENERATE)
        kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
        turn = torch.cat([first.sequences, ids(40, 9)], dim=1)
        second = model.generate(turn, max_new_tokens=4, past_key_values=first.past_key_values, **GENERATE)
        assert stats.prefills == 1
    assert second.past_key_values.get_seq_length() == second.sequences.shape[1] - 1
    with oracle(model, kept, 300, full=cache == "full"):
        expected = model(second.sequences, use_cache=False).logits
    torch.testing.assert_close(logits_of(second)[0], expected[0, turn.shape[1] - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_second_turn_of_a_padded_batch_is_single(cache: str) -> None:
    model, new = make_llama(), 4
    rows, turns = [text_inputs(330, 1), text_inputs(280, 2)], [ids(5, 7), ids(30, 8)]
    with zipvl.sparse(model, PAPER, tau=0.7, cache=cache):
        inputs = pad_left(rows)
        first = model.generate(**inputs, max_new_tokens=new, **GENERATE)
        added = pad_left([{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in turns])
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(2, new, dtype=torch.long), added["attention_mask"]], dim=1
        )
        turn = torch.cat([first.sequences, added["input_ids"]], dim=1)
        together = model.generate(
            turn, attention_mask=mask, max_new_tokens=new, past_key_values=first.past_key_values, **GENERATE
        )
        for b, row in enumerate(rows):
            alone = model.generate(**row, max_new_tokens=new, **GENERATE)
            whole = torch.cat([alone.sequences, turns[b]], dim=1)
            alone = model.generate(whole, max_new_tokens=new, past_key_values=alone.past_key_values, **GENERATE)
            torch.testing.assert_close(logits_of(together)[b], logits_of(alone)[0], **TOLERANCE)
            assert torch.equal(together.sequences[b, -new:], alone.sequences[0, -new:])


def test_a_short_turn_after_a_short_prompt_is_dense() -> None:
    model, inputs = make_llama(), text_inputs(100, 3)
    turn = torch.cat([inputs["input_ids"], ids(150, 9)], dim=1)
    dense = DynamicCache(config=model.config)
    model(**inputs, past_key_values=dense)
    expected = model.generate(turn, max_new_tokens=4, past_key_values=dense, **GENERATE)
    with zipvl.sparse(model, PAPER, tau=0.5):
        cache = model(**inputs).past_key_values
        output = model.generate(turn, max_new_tokens=4, past_key_values=cache, **GENERATE)
    assert torch.equal(logits_of(output), logits_of(expected))


def test_chunked_prefill_is_sparse_but_for_a_short_end() -> None:
    model, inputs = make_llama(), text_inputs(700, 3)
    dense = model.generate(**inputs, max_new_tokens=4)
    with zipvl.sparse(model, PAPER, tau=1.0) as stats:
        output = model.generate(**inputs, max_new_tokens=4, prefill_chunk_size=300)
    assert torch.equal(output, dense)
    assert stats.layers[0].prompt == 600 and stats.prefills == 2, "the last 100 tokens are fewer than probes would be"


def test_a_dynamic_cache_stays_full_while_the_prefill_is_sparse() -> None:
    model, inputs = make_llama(), text_inputs(300, 3)
    default = zipvl.ZipVLConfig(text_prompts="sparse", keep_text=False)
    with zipvl.sparse(model, default, record_index=True) as stats:
        model(**inputs, use_cache=False)
    assert stats.active and stats.cache_bytes == 0, "not a ZipVLCache"
    model.set_attn_implementation("zipvl")
    output = model.generate(**inputs, max_new_tokens=6, **GENERATE)
    assert type(output.past_key_values) is DynamicCache
    assert output.past_key_values.layers[0].keys.shape[2] == 305
    kept = {i: layer.index[0] for i, layer in stats.layers.items() if layer.index is not None}
    with oracle(model, kept, 300, full=True):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(logits_of(output)[0], expected[0, 299:-1], **TOLERANCE)


def test_a_padded_batch_with_a_dynamic_cache_is_single() -> None:
    model, rows = make_llama(), [text_inputs(330, 1), text_inputs(280, 2)]
    model.set_attn_implementation("zipvl")
    together = model.generate(**pad_left(rows), max_new_tokens=4, **GENERATE)
    for b, row in enumerate(rows):
        alone = model.generate(**row, max_new_tokens=4, **GENERATE)
        torch.testing.assert_close(logits_of(together)[b], logits_of(alone)[0], **TOLERANCE)


def test_the_cache_decides_the_configuration() -> None:
    model, inputs = make_llama(), text_inputs(300, 3)
    with zipvl.sparse(model, PAPER, tau=1.0) as stats:
        model(**inputs, past_key_values=zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(ratio=0.25)))
        assert stats.layers[1].kept == [75]
        model(**inputs)
        assert stats.layers[1].kept == [300]
    assert stats.mean_ratio == pytest.approx((0.25 + 1.0) / 2)


def test_positions_follow_what_was_seen() -> None:
    """mRoPE included: the rotary positions of decoded tokens are those of a full cache."""
    for name in ("qwen2_5_vl", "qwen3_vl", "llama"):
        model, inputs = SPARSE[name].make(), SPARSE[name].inputs(300, 1)
        rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb") and "visual" not in n)
        positions: list[torch.Tensor] = []
        handle = rotary.register_forward_pre_hook(
            lambda _, args, kwargs, to=positions: to.append(kwargs.get("position_ids", args[-1]).clone()),
            with_kwargs=True,
        )
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        dense, positions[:] = list(positions), []
        with zipvl.sparse(model, PAPER, ratio=0.3) as stats:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        handle.remove()
        assert stats.active
        assert len(positions) == len(dense) == 4
        assert all(torch.equal(a, b) for a, b in zip(positions, dense, strict=True))


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_reads_back_one_number_a_layer_in_the_prefill_and_none_in_a_decode_step(cache: str) -> None:
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model, inputs = make_llama(), text_inputs(300)
    steps = [inputs, {"input_ids": torch.tensor([[5]])}, {"input_ids": torch.tensor([[7]])}]

    def count(past: DynamicCache) -> list[int]:
        found = []
        for step in steps:
            with Reads() as reads:
                model(**step, past_key_values=past)
            found.append(reads.count)
        return found

    dense = count(DynamicCache(config=model.config))
    with zipvl.sparse(model, PAPER, ratio=0.25, cache=cache):
        sparse = count(zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(ratio=0.25, cache=cache)))  # type: ignore[arg-type]
    assert [ours - theirs for ours, theirs in zip(sparse, dense, strict=True)] == [3 if cache == "drop" else 0, 0, 0]
