"""Layers that attend to the keys and values of an earlier layer (Gemma 4 E2B and E4B, Gemma 3n).

Such a layer takes that layer's selection too, and reads its layer of the cache, which so serves both. transformers may
give it the last tokens of a prompt alone, those whose logits are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zipvl import ops
from zipvl.transformers.behind import attend_stored
from zipvl.transformers.call import Call, Selected
from zipvl.transformers.reasons import Dense


def attend(
    module: nn.Module,
    call: Call,
    source: int,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    ends: Tensor | None,
) -> Tensor | None:
    """Attention of a layer to the keys and values of layer ``source``, which had its turn in this forward.

    Args:
        query: ``[B, Hq, n, D]``, of the last tokens.
        key: ``[B, Hkv, S, D]``, or a placeholder of that shape where ``source`` was packed before.
        attention_mask: ``[B, S]`` or None: all real; of four dimensions if the mask is not plain causal.
        ends: ``[B, n]``, which of the ``n`` tokens is the last that each of them sees; None: itself.

    Returns:
        ``[B, n, Hq, D]``; None: the layer is dense, and its keys and values are no placeholders.
    """
    selected = call.selected.get(source)
    dense = _reason(module, call, source, query, selected)
    if selected is not None and dense is None:
        return _sparse(module, call, source, selected, query, attention_mask, scaling)
    cut = query.shape[2] < key.shape[2] and attention_mask is not None and attention_mask.dim() == 4
    if dense is not None and not cut:  # such a mask does not say how many tokens are real
        below = call.dense_below(query.shape[1], query.shape[3], query) if selected is None else selected.dense_below
        call.record(module, None, key, attention_mask, below, dense=dense)
    if source not in call.behind:
        return None
    layer = call.layer_at(source)
    assert layer is not None
    return attend_stored(module, call, layer, query, attention_mask, scaling, ends)


def _reason(module: nn.Module, call: Call, source: int, query: Tensor, selected: Selected | None) -> Dense | None:
    """Why a prefill is dense here; None: it is sparse, or this forward is none."""
    if selected is None:
        return call.answer_of(source)
    return call.reason_dense(
        module,
        selected.dense_below,
        selected.tokens.keys.shape[2],
        None,  # the selection was made under this mask
        sliding_window=None,
        is_causal=True,
        same_head_dims=True,
        dtype=query.dtype,
    )


def _sparse(
    module: nn.Module,
    call: Call,
    source: int,
    selected: Selected,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """The rows of ``query`` among the tokens that ``source`` selected; candidates of assisted decoding behind the
    prompt attend to what is kept of it."""
    tokens, config, layer = selected.tokens, call.config, call.layer_at(source)
    candidates = 0 if layer is None else call.candidates
    rows, parts = max(query.shape[2] - candidates, 0), []
    if rows:
        out = ops.sparse_attn(
            query[:, :, :rows].to(tokens.keys.dtype),
            tokens.keys,
            tokens.values,
            selected.index,
            selected.count,
            scale=scaling,
            all_queries=config.all_queries,
            token_mask=tokens.token_mask,
            local_window=config.local_window,
            num_sinks=config.sinks,
            last_key=None if selected.last_key is None else selected.last_key[:, -rows:],
        )
        parts.append(out.transpose(1, 2).to(query.dtype))
    if candidates:
        assert layer is not None
        parts.append(attend_stored(module, call, layer, query[:, :, rows:], attention_mask, scaling, None))
    index, count, masked = selected.index, selected.count, tokens.token_mask is not None
    length = tokens.keys.shape[2]
    mlp = call.leave_for_mlp(module, index, count, length, rows, candidates, selected.dense_below, masked)
    below, stored = selected.dense_below, selected.stored
    call.record(module, None, tokens.keys, tokens.token_mask, below, chosen=index, count=count, stored=stored, mlp=mlp)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
