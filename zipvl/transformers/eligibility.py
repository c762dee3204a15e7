"""Which attention calls can be sparse, and why the others are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

IMPLEMENTATION = "zipvl"
"""The name of the attention implementation."""

# Continuous batching hands these to attention functions: until transformers 5.23 its cache, since then places in it.
_PAGED = ("cache", "block_table", "read_index")
_REMEDY = 'Use attn_implementation="{other}" for this model, or turn the feature off.'


def kind_reason(
    module: nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
    is_causal: bool | None,
) -> str | None:
    """Why layers of this kind are never sparse; None if they can be.

    Args:
        module: the attention module.
        query: ``[B, Hq, N, D]``.
        value: ``[B, Hkv, S, Dv]``.
        sliding_window, is_causal: as the module passed them.
    """
    if layer_index(module) is None:
        return "not a decoder layer"
    config = getattr(module, "config", None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or getattr(config, "is_causal", True) is False:
        return "attention is not causal"
    if getattr(module, "is_cross_attention", False):
        return "cross-attention"
    if sliding_window is not None:
        return "sliding-window attention"
    layer_type = type_of_layer(config, layer_index(module))
    if layer_type not in (None, "full_attention"):
        return f"layer type {layer_type}"
    if query.shape[-1] != value.shape[-1]:
        return "keys and values differ in head dimension"
    return None


def layer_index(module: nn.Module) -> int | None:
    """The index of an attention module's layer in its decoder; None if it is not part of one."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


def type_of_layer(config: Any, index: int | None) -> str | None:
    """The configured type of layer ``index``, such as ``sliding_attention``; None if the model does not say."""
    types = getattr(config, "layer_types", None)
    return types[index] if types and index is not None and index < len(types) else None


def asks_for_more(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a module's forward is asked for something that ``refuse_unsupported`` may refuse."""
    names = ("output_attentions", "softcap", "s_aux", "position_bias", "head_mask", *_PAGED)
    return module.training or any(kwargs.get(name) is not None for name in names)


def refuse_unsupported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raises for what sparse attention cannot honour in a layer that could be sparse.

    Raises:
        ValueError: naming the feature, the layer and the remedy.
    """
    found = None
    other = "sdpa"
    if dropout > 0:
        found = f"dropout={dropout} (the model is in training mode: call model.eval())"
    elif kwargs.get("output_attentions"):
        found, other = "output_attentions=True (the probabilities are never formed)", "eager"
    elif kwargs.get("softcap") is not None:
        found, other = f"logit softcapping (softcap={kwargs['softcap']})", "eager"
    elif kwargs.get("s_aux") is not None:
        found, other = "attention sinks (s_aux)", "eager"
    elif kwargs.get("position_bias") is not None:
        found = "a position bias"
    elif kwargs.get("head_mask") is not None:
        found, other = "a head mask", "eager"
    elif any(kwargs.get(name) is not None for name in _PAGED):
        found = "a paged cache (continuous batching)"
    if found is not None:
        where = f"{type(module).__name__}, layer {layer_index(module)}"
        raise ValueError(f"zipvl attention ({where}): {found} is not supported. {_REMEDY.format(other=other)}")
