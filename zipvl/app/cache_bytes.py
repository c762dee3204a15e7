"""The memory of key/value caches, whatever their class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from zipvl.stats import LayerStats

__all__ = ["cache_bytes"]


def cache_bytes(cache: Any) -> int | None:
    """Bytes of the tensor storage that ``cache`` holds, each storage once; ``None`` for no cache."""
    if cache is None:
        return None
    storages: dict[tuple[str, int], int] = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor reachable from ``value`` through lists, tuples, dicts and the attributes of cache objects, but not
    those of statistics."""
    if id(value) in seen or isinstance(value, LayerStats):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if not value.is_meta:  # a shape without memory
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.split(".")[0] in ("transformers", "zipvl") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), seen)
