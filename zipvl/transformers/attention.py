"""The attention function behind ``attn_implementation="zipvl"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zipvl import ops, policy
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.call import DEFAULT_RUN, Call
from zipvl.transformers.quantized import QuantizedKV
from zipvl.transformers.reasons import refuse_unsupported
from zipvl.transformers.target import IN_BLOCK, layer_index


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    zipvl: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sparse attention where it applies, the model's ordinary attention (SDPA) elsewhere.

    Args:
        module: the attention module.
        query: ``[B, Hq, n, D]``.
        key, value: ``[B, Hkv, S, D]``, or placeholders of that shape if they come from a packed ``ZipVLCache`` layer.
        attention_mask: what ``masks.mask_function`` made: ``[B, S]``, ``[B, 1, n, S]`` or None.
        scaling: factor of the scores, ``D ** -0.5`` if None.
        dropout, sliding_window, is_causal, kwargs: as the module passes them.
        zipvl: what the decoder's pre-hook handed on. Without it the module is under the default configuration, or of a
            model that only shares its configuration object with one in a block.

    Returns:
        ``[B, n, Hq, D]``, and None: the probabilities are never formed.
    """
    refuse_unsupported(module, kwargs)
    call = zipvl
    if call is None:
        if key.is_meta and not query.is_meta:
            raise RuntimeError(
                f"zipvl attention ({type(module).__name__}): these keys are in a packed ZipVLCache that was not handed "
                "on with them; make the cache from the model itself: zipvl.ZipVLCache(model)"
            )
        call = Call(DEFAULT_RUN, None)
    call.reached = True
    layer = call.layer_of(module, key, value)
    if layer is not None and layer.packed is not None:
        if dropout > 0:
            refuse_unsupported(module, kwargs, dropout)
        return _attend_packed(module, call, layer, query, attention_mask, scaling), None

    tokens, bystander = query.shape[2], zipvl is None and _implementation(module) == IN_BLOCK
    if key.shape[2] == tokens > 1 and not bystander and layer_index(module) is not None:
        call.saw_prefill = True
        dense_below = call.dense_below(query.shape[1], query.shape[3], query)
        dense = call.reason_dense(
            module,
            dense_below,
            tokens - call.candidates if layer is not None else tokens,
            attention_mask,
            sliding_window=sliding_window,
            is_causal=is_causal,
            same_head_dims=query.shape[-1] == value.shape[-1],
        )
        if dense is None:
            refuse_unsupported(module, kwargs, dropout)
            return _prefill(module, call, layer, dense_below, query, key, value, attention_mask, scaling), None
        call.record(module, layer, query, attention_mask, dense_below, dense=dense)
        whole = layer is not None and not dense.always and (attention_mask is None or attention_mask.dim() == 2)
        if layer is not None and whole and call.captures:
            layer.keep_whole(attention_mask)
            layer = None
    if layer is not None:
        layer.keep_all()
    out = _dense(
        module,
        call,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        sliding_window=sliding_window,
        is_causal=is_causal,
        **kwargs,
    )
    return out, None


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _in_one_dtype(*states: Tensor) -> tuple[Tensor, ...]:
    """Under autocast in its dtype, as SDPA casts its inputs."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return states
    dtype = torch.get_autocast_dtype(device)
    return tuple(s.to(dtype) for s in states)


def _prefill(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer | None,
    dense_below: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """A sparse prefill, and what becomes of it: the cache layer's content, the statistics.

    Candidates of assisted decoding behind the prompt attend to what is kept of it, as decoded tokens do.

    Returns:
        ``[B, N, Hq, D]``.
    """
    candidates = call.candidates if layer is not None else 0
    tokens = query.shape[2] - candidates
    token_mask = None if attention_mask is None else attention_mask[:, :tokens]
    q, k, v = (s[:, :, :tokens] if candidates else s for s in _in_one_dtype(query, key, value))
    out = run_layer(module, call, layer, dense_below, q, k, v, token_mask, scaling).transpose(1, 2).to(query.dtype)
    if layer is not None and candidates:
        guessed = _attend_packed(module, call, layer, query[:, :, tokens:], attention_mask, scaling)
        out = torch.cat([out, guessed], dim=1)
    return out


def run_layer(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer | None,
    dense_below: int,
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    token_mask: Tensor | None,
    scaling: float | None,
    **projections: Any,
) -> Tensor:
    """``ops.zipvl_layer``, and what becomes of it: the cache layer's content, the statistics.

    Args:
        query: ``[B, Hq, N, D]``, or None: ``projections`` (keywords of the op) hold hidden states and weights.
        key, value: ``[B, Hkv, N, D]``.
        token_mask: ``[B, N]`` or None: all real.

    Returns:
        The op's ``out``.
    """
    call.saw_prefill = True
    config = call.config
    packs = layer is not None and config.cache == "drop"
    keep_mask = call.keep_mask(token_mask, dense_below, key)
    text = call.visual.text(key.shape[2], key.device) if config.keep_text else None
    added = {} if text is None else {"extra_mask": text}
    out, chosen, count, keys, values = ops.zipvl_layer(
        query,
        key,
        value,
        **projections,
        **config.attention_kwargs(),
        scale=scaling,
        **added,
        keep_mask=keep_mask,
        token_mask=token_mask,
        pack=packs,
    )
    if layer is not None and packs:
        max_kept = policy.max_kept(config, key.shape[2], dense_below, token_mask is not None, call.keeps_more())
        layer.keep_packed(keys, values, count, max_kept, call.candidates)
    elif layer is not None:
        query_heads = out.shape[1] if query is not None else projections["q_weight"].shape[0] // key.shape[3]
        layer.keep_selected(key, value, chosen, count, token_mask, query_heads, call.candidates)
    call.record(module, layer, key, token_mask, dense_below, chosen=chosen, count=count)
    return out


def _attend_packed(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """New tokens against what the cache kept and, causally, themselves.

    Args:
        query: ``[B, Hq, n, D]``, the new tokens.
        attention_mask: ``[B, seen + n]`` or None: all real.

    Returns:
        ``[B, n, Hq, D]``.

    Raises:
        ValueError: the mask is not plain causal, so it names columns that may have been dropped.
    """
    new, packed = query.shape[2], layer.packed
    assert packed is not None
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"zipvl attention ({type(module).__name__}, layer {layer_index(module)}): a 4-D mask "
            f"{tuple(attention_mask.shape)} was given for tokens behind a packed ZipVLCache, whose dropped columns it "
            "names. Use a 2-D attention_mask, or a DynamicCache."
        )
    token_mask, dtype = call.new_mask(attention_mask, new), packed.dtype
    q = query.to(dtype)
    if new == 1:
        return layer.append(token_mask, q, scaling).attend(q, scaling).transpose(1, 2).to(query.dtype)
    new_keys, new_values = (states.to(dtype) for states in layer.pending())
    if isinstance(packed, QuantizedKV):
        packed.make_room(new)
        out = packed.attend_several(q, new_keys, new_values, token_mask, scaling).transpose(1, 2)
    else:
        keys, values = packed.visible()
        past = packed.valid()[:, None, None, :].expand(-1, 1, new, -1)
        own = q.new_ones(q.shape[0], new, dtype=torch.bool) if token_mask is None else token_mask
        mask = torch.cat([past, call.expanded(own, new, q.device)], dim=-1)
        keys, values = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
        out, _ = sdpa_attention_forward(module, q, keys, values, mask, scaling=scaling)
    layer.append(token_mask, q, scaling)
    return out.to(query.dtype)


def _dense(
    module: nn.Module,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    **kwargs: Any,
) -> Tensor:
    """transformers' SDPA attention with the mask it would have been given; ``[B, n, Hq, D]``."""
    new, length = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if attention_mask is None and causal and 1 < new < length:  # all real; to SDPA None would mean the first columns
        attention_mask = query.new_ones(query.shape[0], length, dtype=torch.bool)
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape[1] != length:
            raise ValueError(
                f"zipvl attention ({type(module).__name__}): the mask covers {attention_mask.shape[1]} tokens, the "
                f"keys are {length}"
            )
        attention_mask = call.expanded(attention_mask, new, query.device)
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
    return out
