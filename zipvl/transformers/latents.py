"""Attention whose cache holds latents, as the ops take it: queries, keys and values of one head dimension.

The model makes ordinary keys and values of its latents before it calls its attention function; values have fewer
channels than keys. Channels of zeros change no score and no output.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from zipvl import support

_STEP = 32
_LARGEST = 512


def in_one_head_dim(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``query [B, Hq, n, D]``, ``key [B, Hkv, S, D]``, ``value [B, Hkv, S, Dv]`` with zeros behind their channels."""
    dim = _head_dim(query.shape[3], query.device.type, query.dtype)
    q, k, v = (torch.nn.functional.pad(states, (0, dim - states.shape[3])) for states in (query, key, value))
    return q, k, v


@torch.compiler.assume_constant_result
def _head_dim(dim: int, device: str, dtype: torch.dtype) -> int:
    return _remembered(dim, device, dtype)


@lru_cache(maxsize=64)
def _remembered(dim: int, device: str, dtype: torch.dtype) -> int:
    """The smallest head dimension from ``dim`` on that has a kernel; ``dim`` where none has."""
    larger = range(-(-dim // _STEP) * _STEP, _LARGEST + 1, _STEP)
    fit = (wide for wide in (dim, *larger) if support.why_not("zipvl_layer", device, dtype, wide) is None)
    return next(fit, dim)
