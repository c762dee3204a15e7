"""Attention of tokens behind a packed layer of the cache to what it stores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.call import Call
from zipvl.transformers.quantized import QuantizedKV
from zipvl.transformers.target import layer_index


def attend_packed(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    ends: Tensor | None,
) -> Tensor:
    """New tokens, which the layer stores, against what it kept and, causally, themselves.

    Args:
        query: ``[B, Hq, n, D]``, the new tokens.
        attention_mask: ``[B, seen + n]`` or None: all real.
        ends: ``[B, n]``, which of the new tokens is the last that each of them sees; None: itself.

    Returns:
        ``[B, n, Hq, D]``.

    Raises:
        ValueError: the mask is not plain causal, so it names columns that may have been dropped; or tokens see later
            ones behind a quantised cache.
    """
    new, packed = query.shape[2], layer.packed
    assert packed is not None
    if new == 1:
        return attend_one(module, call, layer, query, attention_mask, scaling)
    if isinstance(packed, QuantizedKV) and ends is not None:
        raise ValueError(
            f"zipvl attention ({type(module).__name__}, layer {layer_index(module)}): images whose tokens see each "
            'other both ways are not supported behind a quantised ZipVLCache; use cache="drop" or "full"'
        )
    token_mask = _new_mask(module, call, attention_mask, new)
    layer.append(token_mask, query.to(packed.dtype), scaling, call.visual_of(new, query.device, new=True))
    return attend_stored(module, call, layer, query, attention_mask, scaling, ends)


def attend_one(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """A decode step: ``attend_packed`` of one new token."""
    assert layer.packed is not None
    token_mask = None if attention_mask is None else _new_mask(module, call, attention_mask, 1)
    same = query.dtype == layer.packed.dtype  # not under autocast; a cast that casts nothing is a call of torch
    q = query if same else query.to(layer.packed.dtype)
    out = layer.append(token_mask, q, scaling).attend(q, scaling).transpose(1, 2)
    return out if same else out.to(query.dtype)


def _new_mask(module: nn.Module, call: Call, attention_mask: Tensor | None, new: int) -> Tensor | None:
    """``Call.new_mask`` behind packed tokens.

    Raises:
        ValueError: the mask is not plain causal, so it names columns that may have been dropped.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"zipvl attention ({type(module).__name__}, layer {layer_index(module)}): a 4-D mask "
            f"{tuple(attention_mask.shape)} was given for tokens behind a packed ZipVLCache, whose dropped columns it "
            "names. Use a 2-D attention_mask, or a DynamicCache."
        )
    return call.new_mask(attention_mask, new)


def attend_stored(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    ends: Tensor | None,
) -> Tensor:
    """``attend_packed`` for the last ``n`` tokens that the layer has stored."""
    new, packed = query.shape[2], layer.packed
    assert packed is not None
    q = query.to(packed.dtype)
    if new == 1:
        return packed.attend(q, scaling).transpose(1, 2).to(query.dtype)
    unseen = _unseen(call.new_mask(attention_mask, new), ends, q)
    if isinstance(packed, QuantizedKV):
        out = packed.attend_several(q, unseen, scaling).transpose(1, 2)
    else:
        out, _ = sdpa_attention_forward(module, q, *packed.visible(), packed.seen(unseen), scaling=scaling)
    return out.to(query.dtype)


def _unseen(token_mask: Tensor | None, ends: Tensor | None, query: Tensor) -> Tensor:
    """``[B, n]``: how many real ones of the last ``n`` tokens stand behind the last that each of them sees.

    Args:
        token_mask: ``[B, m]``, which of the new tokens are real; None: all.
        ends: as ``attend_packed`` takes it.
        query: ``[B, Hq, n, D]``, gives sizes and the device.
    """
    batch, _, new, _ = query.shape
    if token_mask is None:
        last = torch.arange(new, device=query.device).expand(batch, -1) if ends is None else ends
        return new - 1 - last
    ranks = token_mask[:, -new:].cumsum(-1)
    return ranks[:, -1:] - (ranks if ends is None else ranks.gather(1, ends.to(torch.int64)))
