"""Attention modules that project only the rows sparse attention uses.

Attention among selected tokens reads the queries of the probes and of the selected tokens, and its output is zero
everywhere else, which an output projection without bias maps to zero. So a prefill needs those rows of both projections
alone: up to the share ``1 - ratio`` of them is saved. How many rows there are is known to the device alone, and stays
there.

``Skipping`` takes the place of an attention module's forward for as long as a run is in force. Where it does not apply
it calls the module's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from zipvl.config import ZipVLConfig
from zipvl.transformers import cache_names
from zipvl.transformers.attention import run_layer
from zipvl.transformers.call import Call
from zipvl.transformers.methods import Method
from zipvl.transformers.products import counts_rows, is_plain
from zipvl.transformers.reasons import asks_for_more
from zipvl.transformers.target import IMPLEMENTATION, IN_BLOCK, KEYWORD

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


def install(modules: Iterable[nn.Module]) -> None:
    """Gives those of ``modules`` that can skip a forward that does."""
    for module in modules:
        if static_reason(module) is None:
            Skipping(module).install()


def remove(modules: Iterable[nn.Module]) -> None:
    """Undoes ``install`` on ``modules``."""
    for module in modules:
        Skipping.remove(module)


def static_reason(module: Any) -> str | None:
    """Why ``module`` cannot skip projections whatever the prompt; None if it can."""
    kind = type(module)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not among the tested attention modules"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        if not is_plain(getattr(module, name)):
            return f"{name} is more than a linear layer"
    if module.o_proj.bias is not None:
        return "o_proj has a bias"
    if hasattr(module, "gate_proj"):
        return "the output is gated"
    return None


class Skipping(Method):
    """An attention module's forward, on the instance."""

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The module's forward, with the signature decoder layers use (keywords alone).

        Args:
            hidden_states: ``[B, n, C]``.
            position_embeddings: cos and sin, ``[B or 1, n, D]`` each.
            attention_mask: what ``masks.mask_function`` made.
            kwargs: anything else the module takes, the cache and the ``Call`` among it.

        Returns:
            ``[B, n, C]``, and None.
        """
        module = self.owner
        if hidden_states.shape[1] > 1 and (call := kwargs.get(KEYWORD)) is not None and _is_prefill(module, call):
            weight = module.q_proj.weight
            dense_below = call.dense_below(weight.shape[0] // module.head_dim, module.head_dim, hidden_states)
            if reason(module, call, dense_below, hidden_states, position_embeddings, attention_mask, kwargs) is None:
                assert position_embeddings is not None
                tables = position_embeddings
                return _sparse_forward(module, call, dense_below, hidden_states, tables, attention_mask), None
        # Not by ordinary(), a call less in every layer of a step: there is none before it.
        result: tuple[Tensor, None] = type(module).forward(
            module, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )
        return result


def reason(
    module: Any,
    call: Call,
    dense_below: int,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this prefill computes whole projections; None if it does not."""
    config: ZipVLConfig = call.config
    if module.config._attn_implementation not in (IMPLEMENTATION, IN_BLOCK):
        return "another attention implementation is in force"
    if config.skip_projections is False:
        return "switched off"
    if config.all_queries or config.local_window > 0:
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
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return "tokens see later ones"
    if module.training or asks_for_more(cache_names.without(kwargs)):
        return "left to the attention function to refuse"
    dense = call.reason_dense(
        module,
        dense_below,
        hidden_states.shape[1],
        attention_mask,
        sliding_window=getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)),
        is_causal=kwargs.get("is_causal"),
        same_head_dims=True,
        dtype=hidden_states.dtype,
    )
    if dense is not None:
        return dense.words
    return _does_not_pay(weight, hidden_states.shape[1]) if config.skip_projections is None else None


def _does_not_pay(weight: Tensor, tokens: int) -> str | None:
    """Why whole projections are as fast; None if they are not."""
    if weight.device.type == "cpu":
        return None
    if tokens < FEWEST_TOKENS:
        return "a short prompt"
    if not counts_rows(weight.device, weight.dtype):
        return "no matrix product here that counts its rows on the device"
    return None


def _is_prefill(module: Any, call: Call) -> bool:
    """Whether the tokens of a forward are the first that the layer sees, and all of the prompt."""
    if call.cache is None:
        return True
    first = isinstance(call.cache, DynamicCache) and call.cache.get_seq_length(module.layer_idx) == 0
    return first and call.candidates == 0


def _sparse_forward(
    module: Any,
    call: Call,
    dense_below: int,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    token_mask: Tensor | None,
) -> Tensor:
    """Attention of ``x [B, N, C]``, the projections of queries and outputs for the rows that matter; ``[B, N, C]``."""
    call.reached = True
    cos, sin = (_in_memory(table) for table in position_embeddings)
    heads = (*x.shape[:-1], -1, module.head_dim)
    norms = hasattr(module, "q_norm")
    keys = module.k_proj(x).view(heads)
    keys = _rotated((module.k_norm(keys) if norms else keys).transpose(1, 2), cos[:, None], sin[:, None])
    values = module.v_proj(x).view(heads).transpose(1, 2)
    if call.cache is not None:
        keys, values = call.cache.update(keys, values, module.layer_idx)
    norm = {"q_norm_weight": module.q_norm.weight, "q_norm_eps": module.q_norm.variance_epsilon} if norms else {}
    return run_layer(
        module,
        call,
        call.layer_of(module, keys, values),
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
