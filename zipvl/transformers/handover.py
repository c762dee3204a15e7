"""How an attention call finds the cache layer its keys came from.

transformers' modules call the cache's ``update()`` and then the attention function, which never sees the cache.
The cache layer therefore signs the key tensor it returns, and the attention function reads the signature off the very
tensor object it is given. A module that alters the keys in between, or another attention implementation, leaves the
offer unanswered, and the cache layer reports that at its next update. While a graph is traced, where a tensor cannot be
signed, the latest offer stands in ``_offer`` instead.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zipvl.transformers.cache_layer import ZipVLCacheLayer

_SIGNATURE = "_zipvl_cache_layer"


class _Offer:
    """The keys last signed in a graph that is being traced, and the layer that did; nothing once it was claimed."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.layer: ZipVLCacheLayer | None = None


_offer = _Offer()


def sign(keys: torch.Tensor, layer: ZipVLCacheLayer) -> torch.Tensor:
    """Marks ``keys`` as the ones ``layer`` returned from its ``update``; returns the same tensor."""
    if torch.compiler.is_compiling():
        _offer.keys, _offer.layer = keys, layer
        return keys
    setattr(keys, _SIGNATURE, weakref.ref(layer))
    return keys


def claim(keys: torch.Tensor) -> ZipVLCacheLayer | None:
    """The cache layer that returned ``keys``, once: the signature is removed."""
    if torch.compiler.is_compiling():
        layer = _offer.layer if _offer.keys is keys else None
        _offer.keys = _offer.layer = None
        return layer
    reference = keys.__dict__.pop(_SIGNATURE, None)
    return None if reference is None else reference()


def placeholder(keys: torch.Tensor, length: int) -> torch.Tensor:
    """Stands for ``length`` cached tokens of packed ``keys [B, Hkv, n, D]``: the shape, on the meta device, no data.

    An attention function that does not know the packed layout fails on it at once instead of computing something.
    """
    batch, heads, _, dim = keys.shape
    return torch.empty((batch, heads, length, dim), dtype=keys.dtype, device="meta")
