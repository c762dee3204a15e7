"""Why a layer is dense: one answer, whose words are what statistics, warnings and errors say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from zipvl.config import ZipVLConfig
from zipvl.transformers.features import FEATURES, refusal
from zipvl.transformers.target import chunk_size, layer_index, layer_type

NOT_PLAIN_CAUSAL = "the mask is not plain causal"
TEXT = 'no visual tokens, and ZipVLConfig.text_prompts is "dense"'

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of queries, keys and values that a layer can be sparse with (docs/ops.md)."""

_REFUSED = frozenset({"output_attentions", *FEATURES})


class Dense(NamedTuple):
    """A layer is dense."""

    words: str
    """Why."""
    always: bool
    """Whatever the prompt: layers of this kind are never sparse."""


def reason_dense(
    module: nn.Module,
    config: ZipVLConfig,
    dense_below: int,
    tokens: int,
    attention_mask: torch.Tensor | None,
    *,
    sliding_window: int | None,
    is_causal: bool | None,
    same_head_dims: bool,
    dtype: torch.dtype = torch.float32,
) -> Dense | None:
    """Why a layer's prefill is dense; None: it is sparse.

    Args:
        module: the attention module.
        config: decides among layers that can be sparse.
        dense_below: the fewest tokens of a sparse prompt (``policy.dense_below``).
        tokens: of the prompt, padding included.
        attention_mask: what ``masks.mask_function`` made.
        sliding_window, is_causal: as the module passes them to its attention function.
        same_head_dims: whether keys and values have one head dimension.
        dtype: of the queries, keys and values.
    """
    kind = _kind(module, sliding_window, is_causal, same_head_dims, dtype)
    if kind is not None:
        return Dense(kind, always=True)
    if config.layers is not None and layer_index(module) not in config.layers:
        return Dense("not among ZipVLConfig.layers", always=False)
    index = layer_index(module)
    if index is not None and index < config.dense_first_layers:
        return Dense(f"among the first dense_first_layers={config.dense_first_layers}", always=False)
    size = chunk_size(module)
    if size is not None and tokens > size:
        return Dense(f"chunked attention, and the prompt is longer than attention_chunk_size={size}", always=False)
    if tokens < dense_below:
        return Dense(f"prompt shorter than dense_below={dense_below}", always=False)
    if attention_mask is not None and attention_mask.dim() != 2:
        return Dense(NOT_PLAIN_CAUSAL, always=False)
    return None


def _kind(
    module: nn.Module, sliding_window: int | None, is_causal: bool | None, same_head_dims: bool, dtype: torch.dtype
) -> str | None:
    """Why layers of this kind are never sparse; None if they can be."""
    if layer_index(module) is None:
        return "not a decoder layer"
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if not causal or getattr(getattr(module, "config", None), "is_causal", True) is False:
        return "attention is not causal"
    if getattr(module, "is_cross_attention", False):
        return "cross-attention"
    if sliding_window is not None:
        return "sliding-window attention"
    kind = layer_type(module)
    if kind not in (None, "full_attention") and chunk_size(module) is None:
        return f"layer type {kind}"
    if not same_head_dims:
        return "keys and values differ in head dimension"
    return (
        None if dtype in DTYPES else f"the ops take {', '.join(map(_name, DTYPES))}, and this model is {_name(dtype)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def asks_for_more(kwargs: dict[str, Any]) -> bool:
    """Whether an attention call is given something that ``refuse_unsupported`` refuses."""
    return not _REFUSED.isdisjoint(kwargs) and any(kwargs.get(name) is not None for name in _REFUSED)


def refuse_unsupported(module: nn.Module, kwargs: dict[str, Any], dropout: float = 0.0) -> None:
    """Raises for what neither sparse attention nor SDPA honours, so that no argument is lost.

    Args:
        kwargs: the arguments of the attention function that have no parameter.
        dropout: where the layer is to be sparse; SDPA honours it.

    Raises:
        ValueError: naming the feature, the layer and the remedy.
    """
    if dropout == 0.0 and _REFUSED.isdisjoint(kwargs):
        return
    found, remedy = None, "sdpa"
    if dropout > 0:
        found = f"dropout={dropout} (the model is in training mode: call model.eval())"
    elif kwargs.get("output_attentions"):
        found, remedy = "output_attentions=True (the probabilities are never formed)", "eager"
    else:
        name = next((name for name in FEATURES if kwargs.get(name) is not None), None)
        if name is not None:
            found, remedy = FEATURES[name].words.format(kwargs[name]), FEATURES[name].remedy
    if found is not None:
        where = f"{type(module).__name__}, layer {layer_index(module)}"
        raise ValueError(f"zipvl attention ({where}): {refusal(found, remedy)}")
