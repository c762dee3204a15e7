"""The cache is called ``cache`` from transformers 5.24 on and ``past_key_values`` before: both are understood.

``cache_names`` is asked itself, because one installation has one of the names.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

import zipvl
from tests.models.tiny_models import PAPER, make_llama, text_inputs
from zipvl.transformers import cache_names


def old(hidden: Any, past_key_values: Any = None) -> None: ...
def new(hidden: Any, cache: Any = None) -> None: ...
def neither(hidden: Any, **kwargs: Any) -> None: ...


@pytest.fixture(scope="module")
def model() -> Any:
    return make_llama()


@pytest.fixture(scope="module")
def own_name(model: Any) -> str:
    """What this transformers calls the cache."""
    return cache_names.name_for(type(model).forward)


def test_the_name_is_the_forwards_own(model: Any, own_name: str) -> None:
    assert cache_names.name_for(old) == "past_key_values"
    assert cache_names.name_for(new) == "cache"
    assert cache_names.name_for(neither) == own_name == cache_names.name_for(type(model.model).forward)


def test_a_cache_is_found_under_either_name() -> None:
    assert cache_names.given({"cache": 1, "past_key_values": None}) == 1
    assert cache_names.given({"cache": None, "past_key_values": 2}) == 2
    assert cache_names.given({"mask": 3}) is None
    assert cache_names.without({"cache": 1, "past_key_values": 2, "mask": 3}) == {"mask": 3}
    assert cache_names.of_output(SimpleNamespace(cache=1)) == 1
    assert cache_names.of_output(SimpleNamespace(past_key_values=2)) == 2
    assert cache_names.of_output(SimpleNamespace(logits=3)) is None


def test_a_cache_given_under_either_name_is_filled(model: Any, own_name: str) -> None:
    for name in {own_name, "past_key_values"}:
        with zipvl.sparse(model, PAPER, ratio=0.5) as stats:
            cache = zipvl.ZipVLCache(model, PAPER)
            model(**text_inputs(300), **{name: cache}, logits_to_keep=1)
            assert stats.active and all(layer.packed is not None for layer in cache.layers)


def test_nothing_deprecated_is_used(model: Any) -> None:
    with warnings.catch_warnings(), zipvl.sparse(model, PAPER, ratio=0.5) as stats:
        warnings.simplefilter("error", FutureWarning)
        model(**text_inputs(300), logits_to_keep=1)
        model.generate(**text_inputs(300), max_new_tokens=3, do_sample=False)
        assert stats.active


def test_a_decoder_that_calls_it_otherwise_gets_its_cache(own_name: str) -> None:
    """Models whose code does not come with transformers may keep the old name."""
    model = make_llama()
    ordinary = type(model.model)

    class Elsewhere(ordinary):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **cache_names.without(kwargs) | {own_name: past_key_values})

    model.model.__class__ = Elsewhere
    with zipvl.sparse(model, PAPER, ratio=0.5) as stats:
        output = model(**text_inputs(300), logits_to_keep=1)
        assert stats.active and isinstance(cache_names.of_output(output), zipvl.ZipVLCache)
