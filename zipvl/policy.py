"""What the host knows before the device has begun: where ZipVL pays, by the cost model of ``csrc/plan/layer_cost.cpp``,
and how much a selection keeps at most."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib import import_module

import torch

from zipvl.config import ZipVLConfig

__all__ = ["SHORTEST", "dense_below", "max_kept"]

_PARTS = 2**16  # a ratio is rounded up to as many parts, so that its share of a symbol is a product of integers
SHORTEST = 256  # tokens, where nothing was measured: twice the probes of the default configuration


def dense_below(config: ZipVLConfig, query_heads: int, head_dim: int, states: torch.Tensor) -> int:
    """The fewest tokens from which on a layer's prefill is sparse: ``config.dense_below``, or what "auto" means here.

    Args:
        config: gives ``dense_below``, and what the cost depends on: ``ratio`` or ``tau``, and ``all_queries``.
        query_heads, head_dim: of the layer, as far as they are on this device. The size of the batch does not matter,
            so that a row of it is dense or sparse as it is alone.
        states: a tensor of the layer's dtype on its device.
    """
    if config.dense_below != "auto":
        return config.dense_below
    if states.device.type != "cuda" or states.dtype == torch.float32:
        return SHORTEST
    return _by_cost(query_heads, head_dim, config.cost_key)


def max_kept(config: ZipVLConfig, tokens: int, dense_below: int, masked: bool) -> int | None:
    """What the host knows of a selection before it is made: no row keeps more tokens, unless its scores are not finite.

    Args:
        config: decides what is kept.
        tokens: of the prompt, padding included; may be a symbol.
        dense_below: rows with fewer real tokens than this keep them all.
        masked: whether tokens may be padding, so that there may be such rows.

    Returns:
        Tokens, or None: as many as there are, because ``tau`` decides on the device, or ``dense_above`` may, or because
        the prompt is exported, where a storage of so many would not be one for every length.
    """
    if config.ratio is None or config.dense_above < 1.0 or _is_exported():
        return None
    share = (tokens * math.ceil(config.ratio * _PARTS) + _PARTS - 1) // _PARTS
    return min(share + max(config.keep_recent, config.min_tokens, dense_below if masked else 0), tokens)


@torch.compiler.assume_constant_result
def _is_exported() -> bool:
    """Whether ``torch.export`` traces. Read in the traced function itself it is true under ``torch.compile`` too, in
    torch 2.11."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _by_cost(query_heads: int, head_dim: int, cost_key: str) -> int:
    return _remembered(query_heads, head_dim, cost_key)


@lru_cache(maxsize=256)
def _remembered(query_heads: int, head_dim: int, cost_key: str) -> int:
    try:
        plan = import_module("zipvl._plan")
    except ModuleNotFoundError:  # the op libraries beside a source tree, built for any Python: no plans for this one
        return SHORTEST
    ratio, tau, all_queries = json.loads(cost_key)
    shape = {"query_heads": query_heads, "head_dim": head_dim}
    tokens = plan.dense_below(**shape, ratio=ratio, tau=tau, all_queries=all_queries)
    return max(SHORTEST, int(tokens))
