"""Llama 4: layers that attend within chunks are causal, and sparse, up to the first chunk's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.tiny_models import PAPER, ids, make_llama4, pad_left, text_inputs
from zipvl.transformers import cache_names
from zipvl.transformers.call import expand
from zipvl.transformers.masks import mask_function

CHUNK, NEW = 320, 30
"""New tokens behind a prompt of 300 cross a chunk's end."""
GENERATE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
LONGER = f"chunked attention, and the prompt is longer than attention_chunk_size={CHUNK}"


def modes(stats: zipvl.Stats) -> list[tuple[str, str | None]]:
    return [(layer.mode, layer.reason) for layer in stats.layers.values()]


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_tau_1_is_sdpa(cache: Any) -> None:
    model = make_llama4(attention_chunk_size=CHUNK)
    batch = pad_left([text_inputs(300, 1), text_inputs(250, 2)])
    for given, sparse in ((text_inputs(CHUNK), 4), (batch, 4), (text_inputs(CHUNK + 1), 1)):
        real = given["attention_mask"].bool()
        logits, tokens = model(**given).logits, model.generate(**given, **GENERATE)
        with zipvl.sparse(model, PAPER, tau=1.0, cache=cache, dense_below=0) as stats:
            torch.testing.assert_close(model(**given).logits[real], logits[real], **TOLERANCE)
            assert torch.equal(model.generate(**given, **GENERATE), tokens)
        assert modes(stats) == [("dense", LONGER)] * (4 - sparse) + [("sparse", None)] * sparse


@pytest.mark.parametrize("cache", ["drop", "full"])
def test_sparse_is_what_the_masks_say(cache: Any) -> None:
    """Decoded tokens see all of their chunk: such a layer's cache is transformers' own."""
    model, inputs = make_llama4(attention_chunk_size=CHUNK), text_inputs(300, 3)
    settings: dict[str, Any] = {"tau": 0.9, "cache": cache, "record_index": True}
    with zipvl.sparse(model, PAPER, layers=(0, 1, 2, 3), **settings) as stats:
        output = model.generate(**inputs, **GENERATE, return_dict_in_generate=True, output_logits=True)
    within = torch.arange(300 + NEW) // CHUNK
    masks = {}
    for i, layer in stats.layers.items():
        assert layer.index is not None and len(layer.index[0]) < 250
        may, computed = chunk_masks(300 + NEW, [(300, layer.index[0])], drop=cache == "drop" and i == 3)
        masks[i] = may if i == 3 else may & (within == within[:, None]), computed
    with masked(model, masks):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected[0, 299:-1], **TOLERANCE)


@pytest.mark.parametrize("more", [5, 150])
def test_a_second_turn(more: int) -> None:
    """A long one selects for itself as long as all tokens are within the chunk."""
    model, step = make_llama4(attention_chunk_size=CHUNK), ids(more, 5)
    name = cache_names.name_for(type(model).forward)
    for first, reason in ((CHUNK - 150, None), (CHUNK - 100, LONGER)):

        def turns(first: int = first) -> torch.Tensor:
            past = cache_names.of_output(model(ids(first, 1), use_cache=True))
            logits: torch.Tensor = model(step, **{name: past}).logits
            return logits

        expected = turns()
        with zipvl.sparse(model, PAPER, tau=1.0, dense_below=0) as stats:
            torch.testing.assert_close(turns(), expected, **TOLERANCE)
        assert modes(stats)[0] == ("sparse", None) if more == 5 or reason is None else ("dense", reason)


def test_the_mask_of_the_first_chunk_is_plain() -> None:
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    left = (~padded).sum(-1)
    for size in (8, 6, 3):
        for q, past in ((6, 0), (2, 4), (1, 5)):
            given: dict[str, Any] = {"batch_size": 2, "q_length": q, "kv_length": 6, "q_offset": past}
            given |= {"mask_function": chunked_causal_mask_function(size, left), "local_size": size}
            ours, theirs = (make(**given, attention_mask=padded) for make in (mask_function, sdpa_mask))
            assert ours is not None and theirs is not None and ours.dim() == (2 if size >= 6 else 4)
            real = padded[:, past:]
            found = expand(ours, q, ours.device) if size >= 6 else ours
            assert torch.equal(found[:, 0][real], theirs[:, 0][real])
            assert (mask_function(**given, attention_mask=None) is None) == (size >= 6)
