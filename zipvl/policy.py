"""Decisions of the host before anything runs on the device: from which length on ZipVL pays, by a cost model fitted to
measurements, and how many tokens a selection keeps at most."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from zipvl.config import ZipVLConfig

__all__ = ["SHORTEST", "LayerCost", "cost_key", "dense_below", "layer_cost", "max_kept", "max_selected", "pays_from"]

# us on an NVIDIA H200, bfloat16: of a call, of each 1e9 numbers of q, and of each 1e9 of those times the tokens. ZipVL
# multiplies with the selected tokens alone; its last constant is the time of finding their number by tau. ``python -m
# benchmarks.layer_cost`` fits them to benchmarks/results/layer.jsonl. A decision needs their ratio, which other GPUs
# change less than the times.
DENSE_US = (5.47, 2536.0, 3.398)
ZIPVL_US = (24.47, 1739.0, 3.377, 4.906)
# What a window adds: microseconds of a call; keys that count for a query beyond its window, for the rest of its tiles
# and its output; and what a pair of the window costs over a pair of the N * N of a causal prompt, of which half are
# computed. Fitted to the windows of 128 and 512 tokens in docs/notes/2026-11-30-windows.md, within 13%.
WINDOW_US, WINDOW_TILE, WINDOW_PAIR = 40.0, 200, 2.0

# What ZipVL may cost beyond dense attention where tau decides. At such lengths attention is a tenth of a layer's time,
# so the worst selection costs a prefill 1.5%, and the usual one saves several times that.
MAX_FACTOR, MAX_EXTRA_US = 1.15, 10.0
NEVER_PAYS = 2**21  # more tokens than the kernels take
_GRANULE, _MAX_TOKENS = 64, 2**17  # lengths that are asked about
_PARTS = 2**16  # a ratio is rounded up to as many parts, so that its share of a symbol is a product of integers
SHORTEST = 256  # tokens, where nothing was measured: twice the probes of the default configuration


def cost_key(config: ZipVLConfig) -> str:
    """The settings that a layer's cost depends on, ``[ratio, tau, all_queries, local_window]``, as JSON.

    Text, because ``torch.compile(dynamic=True)`` makes symbols of an object's floats.
    """
    tau = config.for_model(visual=False).tau
    ratio, tau = (None if x is None else min(x, config.max_ratio) for x in (config.ratio, tau))
    return json.dumps([ratio, tau, config.all_queries, config.local_window])


_key_of = cost_key  # where an argument has the name


def dense_below(
    config: ZipVLConfig,
    query_heads: int,
    head_dim: int,
    states: torch.Tensor,
    cost_key: str | None = None,
    queries: int | None = None,
) -> int:
    """The fewest tokens from which on a layer's prefill is sparse: ``config.dense_below``, or what "auto" means here.

    Args:
        config: gives ``dense_below``, and what the cost depends on: ``ratio`` or ``tau``, ``all_queries``, the window.
        query_heads, head_dim: of the layer, as far as they are on this device. The size of the batch does not matter,
            so that a row of it is dense or sparse as it is alone.
        states: a tensor of the layer's dtype on its device.
        cost_key: ``cost_key(config)``, made beforehand where a compiler traces this call; None: made here.
        queries: how many of the tokens are new, a chunk behind a filled cache; None: all.
    """
    if config.dense_below != "auto":
        return config.dense_below
    if states.device.type != "cuda" or states.dtype == torch.float32:
        return SHORTEST
    return _by_cost(query_heads, head_dim, _key_of(config) if cost_key is None else cost_key, queries)


def max_kept(config: ZipVLConfig, tokens: int, dense_below: int, masked: bool, added: bool = False) -> int | None:
    """The most tokens that a row of a ``drop`` cache keeps, as far as the host knows before the selection is made. A
    row whose scores are not finite may keep more.

    Args:
        config: decides what is kept.
        tokens: of the prompt, padding included; may be a symbol.
        dense_below: rows with fewer real tokens than this keep them all.
        masked: whether tokens may be padding, so that there may be such rows.
        added: whether tokens that the device alone knows are kept on top (text, rows that stay dense).

    Returns:
        Tokens, or None: as many as there are, because the device decides, or because the prompt is exported,
        where a storage of so many would not be one for every length.
    """
    stored = config.cache_ratio if config.cache == "drop" else None
    if stored is None:
        return max_selected(config, tokens, dense_below, masked, added)
    if added or _is_exported():
        return None
    kept = max(config.keep_recent, config.min_tokens, dense_below if masked else 0)
    return min(max(_share_of(tokens, stored), kept) + config.sinks, tokens)  # nothing comes on top


def max_selected(config: ZipVLConfig, tokens: int, dense_below: int, masked: bool, added: bool = False) -> int | None:
    """The same of what a layer selects, whatever the cache stores.

    Args:
        config, tokens, dense_below, masked, added: as for ``max_kept``.
    """
    if added or (config.ratio is None and config.max_ratio == 1.0) or _is_exported():
        return None
    kept = max(config.keep_recent, config.min_tokens, dense_below if masked else 0)
    share = _share_of(tokens, min(config.ratio or 1.0, config.max_ratio))
    return min(share + kept + config.sinks + config.local_window, tokens)


def _share_of(tokens: int, share: float) -> int:
    return (tokens * math.ceil(share * _PARTS) + _PARTS - 1) // _PARTS


@torch.compiler.assume_constant_result
def _is_exported() -> bool:
    """Whether ``torch.export`` traces. Read in the traced function itself it is true under ``torch.compile`` too, in
    torch 2.11."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _by_cost(query_heads: int, head_dim: int, cost_key: str, queries: int | None) -> int:
    return _remembered(query_heads, head_dim, cost_key, queries)


@lru_cache(maxsize=256)
def _remembered(query_heads: int, head_dim: int, cost_key: str, queries: int | None) -> int:
    ratio, tau, all_queries, window = json.loads(cost_key)
    settings = {"ratio": ratio, "tau": tau, "all_queries": all_queries, "window": window, "queries": queries}
    return max(SHORTEST, pays_from(query_heads, head_dim, **settings))


class LayerCost(NamedTuple):
    """The time of one layer's prefill, in microseconds."""

    dense_us: float
    """Causal dense attention."""
    zipvl_us: float
    """``zipvl_attn``."""


def layer_cost(
    query_heads: int,
    head_dim: int,
    tokens: int,
    *,
    batch: int = 1,
    share: float = 1.0,
    by_tau: bool = False,
    all_queries: bool = False,
    window: int = 0,
    queries: int | None = None,
) -> LayerCost:
    """The time of one layer's prefill, dense and by ZipVL, from shapes alone: the cost model.

    Args:
        query_heads, head_dim: of the layer.
        tokens: of the prompt so far.
        batch: rows.
        share: how many of the tokens are selected, in ``[0, 1]``; 1 is the worst case.
        by_tau: ``tau`` finds how many are selected, which takes longer than a ratio.
        all_queries: every query attends to the selected tokens, not the selected queries alone.
        window: ``local_window``, the tokens before it that every query attends to; 0: none.
        queries: how many of the tokens are new, a chunk; None: all.

    Returns:
        Both times in microseconds, as fitted to an H200.

    Raises:
        ValueError: a size or share is out of range.
    """
    if min(batch, tokens) < 0 or min(query_heads, head_dim) < 1:
        raise ValueError(
            "layer_cost: sizes must satisfy batch, tokens >= 0 and query_heads, head_dim >= 1, got "
            f"batch {batch}, tokens {tokens}, query_heads {query_heads}, head_dim {head_dim}"
        )
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"layer_cost: share must be in [0, 1], got {share}")
    new = tokens if queries is None else queries
    if not 0 <= new <= tokens or window < 0:
        raise ValueError(
            "layer_cost: queries must be at most the tokens and window at least 0, got "
            f"queries {queries}, tokens {tokens}, window {window}"
        )
    numbers = 1e-9 * (batch * query_heads * head_dim) * tokens
    new_numbers = 1e-9 * (batch * query_heads * head_dim) * new
    pairs = new_numbers * (2 * tokens - new)  # N * N where all are new
    attended = share * (1.0 if all_queries else share) * pairs
    if window > 0:
        attended += WINDOW_PAIR * new_numbers * min(window + WINDOW_TILE, tokens)
    dense, dense_per_token, dense_per_pair = DENSE_US
    zipvl, zipvl_per_token, zipvl_per_pair, zipvl_by_tau = ZIPVL_US
    return LayerCost(
        dense + dense_per_token * new_numbers + dense_per_pair * pairs,
        (zipvl_by_tau if by_tau else 0.0)
        + (WINDOW_US if window > 0 else 0.0)
        + zipvl
        + zipvl_per_token * numbers
        + zipvl_per_pair * attended,
    )


def pays_from(
    query_heads: int,
    head_dim: int,
    *,
    ratio: float | None = None,
    tau: float = 0.975,
    all_queries: bool = False,
    window: int = 0,
    queries: int | None = None,
) -> int:
    """The length in tokens from which on ZipVL pays for one batch row, or ``NEVER_PAYS``.

    With ``ratio`` it pays where it is faster than dense attention. With ``tau`` it pays where even the largest
    selection costs at most ``MAX_FACTOR`` times dense attention and ``MAX_EXTRA_US`` microseconds more. Equal scores
    give the largest selection, a share ``tau`` of the tokens: of other scores fewer tokens hold as much.

    Args:
        query_heads, head_dim, all_queries, window, queries: as for ``layer_cost``.
        ratio: share of the tokens that a layer keeps; None: ``tau`` decides.
        tau: share of the attention mass that a layer keeps.

    Raises:
        ValueError: ``ratio`` or ``tau`` is not in ``(0, 1]``.
    """
    by_tau, share = ratio is None, tau if ratio is None else ratio
    if not 0.0 < share <= 1.0:
        raise ValueError(f"pays_from: {'tau' if by_tau else 'ratio'} must be in (0, 1], got {share}")

    def pays(tokens: int) -> bool:
        new = tokens if queries is None else min(queries, tokens)
        cost = layer_cost(
            query_heads,
            head_dim,
            tokens,
            share=share,
            by_tau=by_tau,
            all_queries=all_queries,
            window=window,
            queries=new,
        )
        return cost.zipvl_us <= (MAX_FACTOR * cost.dense_us + MAX_EXTRA_US if by_tau else cost.dense_us)

    if not pays(_MAX_TOKENS):
        return NEVER_PAYS
    tokens = _MAX_TOKENS
    while tokens > _GRANULE and pays(tokens - _GRANULE):
        tokens -= _GRANULE
    return tokens
