"""Attention modules that project only the rows sparse attention uses.

Attention among selected tokens reads the queries of the probes and of the selected tokens, and its output is zero
everywhere else, which an output projection without bias maps to zero. So a prefill needs those rows of both projections
alone: up to the share ``1 - ratio`` of them is saved. How many rows there are is known to the device alone, and stays
there.

``forward`` takes the place of an attention module's own on the instance, for as long as a run is in force. Where it
does not apply it calls the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from zipvl import policy
from zipvl.config import ZipVLConfig
from zipvl.transformers import attention, cache_names, handover, runs
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.eligibility import IMPLEMENTATION, asks_for_more, kind_reason, layer_index

FAMILIES = frozenset(
    {
        "LlamaAttention",
        "MistralAttention",
        "Qwen2Attention",
        "Qwen2VLAttention",
        "Qwen2_5_VLAttention",
        "Qwen3Attention",
        "Qwen3VLTextAttention",
    }
)
"""transformers' attention modules that compute what ``_sparse_forward`` does, all tested. They are also those of
LLaVA-NeXT's and InternVL's language models."""

FEWEST_TOKENS = 2048
"""Shorter prompts on CUDA are projected whole unless ``skip_projections`` is True: the launches take what is saved."""


def install(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Gives those of ``modules`` that can skip a forward that does; returns what undoes it."""
    changed = [module for module in modules if static_reason(module) is None and "forward" not in module.__dict__]
    for module in changed:
        module.__dict__["forward"] = MethodType(forward, module)

    return partial(remove, changed)


def remove(modules: Iterable[nn.Module]) -> None:
    """Undoes ``install`` on ``modules``."""
    for module in modules:
        if getattr(module.__dict__.get("forward"), "__func__", None) is forward:
            del module.__dict__["forward"]


def static_reason(module: Any) -> str | None:
    """Why ``module`` cannot skip projections whatever the prompt; None if it can."""
    kind = type(module)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not among the tested attention modules"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        part = getattr(module, name)
        if type(part) is not nn.Linear or "forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks:
            return f"{name} is more than a linear layer"
    if module.o_proj.bias is not None:
        return "o_proj has a bias"
    if hasattr(module, "gate_proj"):
        return "the output is gated"
    return None


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention module's forward, with the signature decoder layers use (keywords alone).

    Args:
        hidden_states: ``[B, n, C]``.
        position_embeddings: cos and sin, ``[B or 1, n, D]`` each.
        attention_mask: what ``masks.mask_function`` made.
        kwargs: anything else the module takes, the cache among it.

    Returns:
        ``[B, n, C]``, and None.
    """
    run, cache = runs.run_of(self), cache_names.given(kwargs)
    if run is not None and _is_prefill(self, cache, hidden_states.shape[1]):
        config, others = _config(self, run, cache), cache_names.without(kwargs)
        if reason(self, config, hidden_states, position_embeddings, attention_mask, others) is None:
            assert position_embeddings is not None
            out = _sparse_forward(self, run, config, hidden_states, position_embeddings, attention_mask, cache)
            return out, None
    given = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, **kwargs}
    result: tuple[Tensor, None] = type(self).forward(self, hidden_states, **given)
    return result


def reason(
    module: Any,
    config: ZipVLConfig,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this forward computes whole projections; None if it does not."""
    tokens, index = hidden_states.shape[1], layer_index(module)
    if module.config._attn_implementation != IMPLEMENTATION:
        return "another attention implementation is in force"
    if config.skip_projections is False:
        return "switched off"
    if config.all_queries:
        return "every query is computed"
    if static_reason(module) is not None:
        return static_reason(module)
    weight = module.q_proj.weight
    if position_embeddings is None or position_embeddings[0].dim() != 3:
        return "no plain rotary embedding"
    if position_embeddings[0].shape[-1] != module.head_dim or position_embeddings[0].dtype != hidden_states.dtype:
        return "the rotary embedding is not of whole heads in the model's dtype"
    if weight.dtype != hidden_states.dtype or torch.is_autocast_enabled(hidden_states.device.type):
        return "mixed dtypes"
    if asks_for_more(module, kwargs):
        return "left to the attention function to refuse"
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    kind = kind_reason(module, hidden_states, hidden_states, window, kwargs.get("is_causal"))
    situation = kind or attention.situation(
        index, tokens, attention_mask, config, _dense_below(module, config, hidden_states)
    )
    if situation is None and config.skip_projections is None:
        return _does_not_pay(weight, tokens)
    return situation


def _does_not_pay(weight: Tensor, tokens: int) -> str | None:
    """Why whole projections are as fast; None if they are not."""
    if weight.device.type == "cpu":
        return None
    if tokens < FEWEST_TOKENS:
        return "a short prompt"
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16 or _compute_capability(weight.device) != 9:
        return "no matrix product here that counts its rows on the device"
    return None


@torch.compiler.assume_constant_result
def _compute_capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)[0]


def _config(module: Any, run: runs.Run, cache: Any) -> ZipVLConfig:
    """The configuration that decides: a ``ZipVLCache``'s own, or the run's."""
    layer = _cache_layer(module, cache)
    return run.config if layer is None else layer.config


def _dense_below(module: Any, config: ZipVLConfig, x: Tensor) -> int:
    """``policy.dense_below`` of ``module`` and its input."""
    return policy.dense_below(config, module.q_proj.weight.shape[0] // module.head_dim, module.head_dim, x)


def _cache_layer(module: Any, cache: Any) -> ZipVLCacheLayer | None:
    """The layer of a ``ZipVLCache`` that belongs to ``module``; None in another cache."""
    layers = [] if cache is None else cache.layers
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    return layer if isinstance(layer, ZipVLCacheLayer) else None


def _is_prefill(module: Any, cache: Any, tokens: int) -> bool:
    """Whether these tokens are the first that the layer sees, and all of the prompt."""
    if cache is None:
        return tokens > 1
    layer = _cache_layer(module, cache)
    if layer is not None and layer.candidates > 0:
        return False
    return tokens > 1 and isinstance(cache, DynamicCache) and cache.get_seq_length(module.layer_idx) == 0


def _sparse_forward(
    module: Any,
    run: runs.Run,
    config: ZipVLConfig,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    token_mask: Tensor | None,
    cache: Any,
) -> Tensor:
    """Attention of ``x [B, N, C]``, the projections of queries and outputs for the rows that matter; ``[B, N, C]``."""
    dense_below = _dense_below(module, config, x)
    cos, sin = (_in_memory(table) for table in position_embeddings)
    heads = (*x.shape[:-1], -1, module.head_dim)
    norms = hasattr(module, "q_norm")
    keys = module.k_proj(x).view(heads)
    keys = _rotated((module.k_norm(keys) if norms else keys).transpose(1, 2), cos[:, None], sin[:, None])
    values = module.v_proj(x).view(heads).transpose(1, 2)
    if cache is not None:
        keys, values = cache.update(keys, values, module.layer_idx)
    norm = {"q_norm_weight": module.q_norm.weight, "q_norm_eps": module.q_norm.variance_epsilon} if norms else {}
    return attention.run_layer(
        module,
        handover.claim(keys),
        run,
        config,
        dense_below,
        None,
        keys,
        values,
        token_mask,
        module.scaling,
        hidden=x,
        q_weight=module.q_proj.weight,
        q_bias=module.q_proj.bias,
        cos=cos,
        sin=sin,
        o_weight=module.o_proj.weight,
        **norm,
    )


def _in_memory(x: Tensor) -> Tensor:
    """``x``; in a compiled graph computed once and kept, where Inductor would compute it for every op that reads it.

    To Inductor a view of given strides is of something in memory.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, N, D]`` under the rotary embedding ``cos``, ``sin [B or 1, 1, N, D]``."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
