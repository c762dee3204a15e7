"""The mask function: plain causal masks stay two-dimensional, every other is what SDPA gets.

``mask_function`` is what transformers is given, and ``expand`` makes of its masks what SDPA gets. Both are asked here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    sdpa_mask,
)

from tests.models.tiny_models import make_gemma3_text, make_llama
from zipvl.transformers.call import expand
from zipvl.transformers.masks import mask_function

PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()


def both(**kwargs: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return mask_function(**kwargs), sdpa_mask(**kwargs)


@pytest.mark.parametrize(("q", "past"), [(6, 0), (1, 5), (2, 4)])
def test_plain_causal_is_the_padding_mask(q: int, past: int) -> None:
    given: dict[str, Any] = {"batch_size": 2, "q_length": q, "kv_length": 6, "q_offset": past}
    ours, theirs = both(**given, attention_mask=PADDED)
    assert ours is not None and theirs is not None
    assert torch.equal(ours, PADDED)
    assert torch.equal(expand(ours, q, ours.device), theirs)


def test_the_expanded_mask_is_that_of_the_queries_asked_for() -> None:
    mask = PADDED.clone()
    whole = expand(mask, 6, mask.device)
    assert torch.equal(expand(mask, 2, mask.device), whole[:, :, 4:])
    assert torch.equal(expand(mask, 6, mask.device), whole)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 6, dtype=torch.bool)])
def test_nothing_padded_is_none(mask: torch.Tensor | None) -> None:
    for q, past in ((6, 0), (1, 5)):
        assert both(batch_size=2, q_length=q, kv_length=6, q_offset=past, attention_mask=mask) == (None, None)
    # a further chunk: to SDPA None would mean upper-left alignment, so dense layers make its mask of this
    ours, theirs = both(batch_size=2, q_length=2, kv_length=6, q_offset=4, attention_mask=mask)
    assert ours is None and theirs is not None
    assert torch.equal(expand(torch.ones(2, 6, dtype=torch.bool), 2, theirs.device), theirs)


def test_a_mask_longer_or_shorter_than_the_keys() -> None:
    longer = torch.cat([PADDED, torch.ones(2, 3, dtype=torch.bool)], 1)
    ours = mask_function(batch_size=2, q_length=6, kv_length=6, attention_mask=longer)
    assert ours is not None and torch.equal(ours, PADDED)
    ours = mask_function(batch_size=2, q_length=6, kv_length=6, attention_mask=PADDED[:, :4])
    assert ours is not None and ours.tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "given",
    [
        {"mask_function": bidirectional_mask_function, "allow_is_causal_skip": False},
        {
            "mask_function": bidirectional_mask_function,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": True,
        },
        {"allow_is_causal_skip": False},
        {"local_size": 3},
        {"kv_length": 9, "q_length": 1},
        {"kv_offset": 2, "q_offset": 2},
        {"mask_function": or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 0, 0]] * 2)))},
        {"mask_function": or_masks(causal_mask_function, lambda b, h, q, k: q >= 0)},
        {"mask_function": or_masks(bidirectional_mask_function, blockwise_overlay(torch.full((2, 6), -1)))},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_every_other_mask_is_what_sdpa_gets(given: dict[str, Any], padded: bool) -> None:
    given = {"batch_size": 2, "q_length": 6, "kv_length": 6, "attention_mask": PADDED if padded else None} | given
    ours, theirs = both(**given)
    assert (ours is None) == (theirs is None)
    assert theirs is None or (ours is not None and torch.equal(ours, theirs))
    assert ours is None or ours.dim() == 4


def test_blocks_of_nothing_are_plain_causal() -> None:
    function = or_masks(causal_mask_function, blockwise_overlay(torch.full((2, 6), -1)))
    given: dict[str, Any] = {"batch_size": 2, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False}
    assert mask_function(**given, mask_function=function) is None
    ours = mask_function(**given, mask_function=function, attention_mask=PADDED)
    assert ours is not None and torch.equal(ours, PADDED)


def test_through_transformers_own_entry_points() -> None:
    model = make_gemma3_text()
    embeds = torch.zeros(2, 100, 64)
    padding = torch.ones(2, 100, dtype=torch.long)
    padding[0, :30] = 0
    masks = {}
    for name in ("sdpa", "zipvl"):
        model.set_attn_implementation(name)
        masks[name] = [
            make(model.config, embeds, padding, DynamicCache(config=model.config))
            for make in (create_causal_mask, create_sliding_window_causal_mask)
        ]
    assert masks["zipvl"][0].shape == (2, 100)
    assert torch.equal(expand(masks["zipvl"][0], 100, embeds.device), masks["sdpa"][0])
    assert torch.equal(masks["zipvl"][1], masks["sdpa"][1])


def test_packed_sequences_stay_apart() -> None:
    """Positions that start again without a mask or a cache mean several sequences in a row."""
    model = make_llama()
    tokens = torch.randint(2, 180, (1, 600), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(300), torch.arange(300)])[None]
    expected = model(tokens, position_ids=positions, use_cache=False).logits
    model.set_attn_implementation("zipvl")
    with pytest.warns(UserWarning, match="packed sequences"):
        assert torch.equal(model(tokens, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize("tokens", [20, 300])
def test_a_static_cache_is_an_error(tokens: int) -> None:
    model = make_llama()
    model.set_attn_implementation("zipvl")
    inputs = torch.randint(2, 180, (2, tokens))
    with pytest.raises(ValueError, match=r"StaticCache\) or prefix tuning is not supported"):
        model.generate(inputs, max_new_tokens=4, cache_implementation="static", disable_compile=True)
