"""Where ZipVL pays: the cost model of ``csrc/plan/layer_cost.cpp``, asked for a configuration and a layer's shape."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import import_module

import torch

from zipvl.config import ZipVLConfig

__all__ = ["SHORTEST", "dense_below"]

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
