"""The name that transformers gives the cache, among a model's arguments and in its output: ``cache`` from 5.24 on,
``past_key_values`` before, and in models whose code does not come with transformers either of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.masking_utils import create_causal_mask

NAMES = ("cache", "past_key_values")


def name_for(forward: Callable[..., Any]) -> str:
    """The one of ``NAMES`` that ``forward`` takes; transformers' own where it names neither, as wrappers do not."""
    for function in (forward, create_causal_mask):
        parameters = inspect.signature(function).parameters
        if found := [name for name in NAMES if name in parameters]:
            return found[0]
    raise RuntimeError(
        f"transformers' create_causal_mask takes no cache by a name known to zipvl, {' or '.join(NAMES)}"
    )


def given(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments; None if there is none."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments but the cache."""
    return {name: value for name, value in kwargs.items() if name not in NAMES}


def of_output(output: Any) -> Any:
    """The cache in a model's or ``generate``'s output; None if it has none."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
