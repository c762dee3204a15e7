"""The attention function behind ``attn_implementation="zipvl"``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zipvl import ops, policy
from zipvl.config import ZipVLConfig
from zipvl.transformers import handover, masks, runs
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.eligibility import kind_reason, layer_index, refuse_unsupported
from zipvl.transformers.quantized import QuantizedKV

NOT_PLAIN_CAUSAL = "the mask is not plain causal"


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sparse attention where it applies, the model's ordinary attention (SDPA) elsewhere.

    Args:
        module: the attention module.
        query: ``[B, Hq, n, D]``.
        key, value: ``[B, Hkv, S, D]``, or placeholders of that shape if they come from a packed ``ZipVLCache`` layer.
        attention_mask: what ``masks.mask_function`` made: ``[B, S]``, ``[B, 1, n, S]`` or None.
        scaling: factor of the scores, ``D ** -0.5`` if None.
        dropout, sliding_window, is_causal, kwargs: as the module passes them.

    Returns:
        ``[B, n, Hq, D]``, and None: the probabilities are never formed.
    """
    layer = handover.claim(key)
    if layer is None and key.is_meta and not query.is_meta:
        raise RuntimeError(
            f"zipvl attention ({type(module).__name__}): the keys of a packed ZipVLCache were altered between the "
            "cache and the attention function, so this model's attention is not supported with ZipVLCache"
        )
    common = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "is_causal": is_causal}
    if runs.is_bystander(module) and layer is None:
        return _dense(module, query, key, value, attention_mask, **common, **kwargs)
    if layer is not None and layer.packed is not None:  # a layer of a kind that can be sparse
        refuse_unsupported(module, dropout, kwargs)
        return _attend_packed(module, layer, query, attention_mask, scaling)
    kind = kind_reason(module, query, value, sliding_window, is_causal)
    if kind is None:
        refuse_unsupported(module, dropout, kwargs)

    run = runs.run_of(module)
    config = layer.config if layer is not None else run.config if run is not None else runs.DEFAULT_CONFIG
    is_prefill = key.shape[2] == query.shape[2] > 1
    tokens = query.shape[2] - (layer.candidates if layer is not None else 0)
    index = layer_index(module)
    dense_below = policy.dense_below(config, query.shape[1], query.shape[3], query)
    reason = kind or situation(index, tokens, attention_mask, config, dense_below)
    if reason is None and is_prefill:
        out = _prefill(module, layer, run, config, dense_below, query, key, value, attention_mask, scaling)
        return out.transpose(1, 2), None

    if is_prefill and reason is not None and index is not None:
        _tell(module, run, config, index, reason, kind is not None)
        record(run, layer, index, query, attention_mask, reason, None, None, dense_below)
    if layer is not None:
        layer.keep_all()
    return _dense(module, query, key, value, attention_mask, **common, **kwargs)


def _prefill(
    module: nn.Module,
    layer: ZipVLCacheLayer | None,
    run: runs.Run | None,
    config: ZipVLConfig,
    dense_below: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """A sparse prefill, and what becomes of it: the cache layer's content, the statistics.

    Candidates of assisted decoding behind the prompt (``layer.candidates``) attend to what is kept of it, as decoded
    tokens do.

    Returns:
        ``[B, Hq, N, D]``.
    """
    candidates = layer.candidates if layer is not None else 0
    tokens = query.shape[2] - candidates
    token_mask = None if attention_mask is None else attention_mask[:, :tokens]
    q, k, v = (s[:, :, :tokens] if candidates else s for s in (query, key, value))
    out = run_layer(module, layer, run, config, dense_below, q, k, v, token_mask, scaling)
    if layer is not None and candidates:
        guessed, _ = _attend_packed(module, layer, query[:, :, tokens:], attention_mask, scaling)
        out = torch.cat([out, guessed.transpose(1, 2)], dim=2)
        layer.candidates = 0
    return out


def run_layer(
    module: nn.Module,
    layer: ZipVLCacheLayer | None,
    run: runs.Run | None,
    config: ZipVLConfig,
    dense_below: int,
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    token_mask: torch.Tensor | None,
    scaling: float | None,
    **projections: Any,
) -> torch.Tensor:
    """``ops.zipvl_layer``, and what becomes of it: the cache layer's content, the statistics.

    Args:
        query: ``[B, Hq, N, D]``, or None: ``projections`` (keywords of the op) hold hidden states and weights.
        key, value: ``[B, Hkv, N, D]``.
        token_mask: ``[B, N]`` or None: all real.

    Returns:
        The op's ``out``.
    """
    packs = layer is not None and config.cache == "drop"
    out, chosen, count, keys, values = ops.zipvl_layer(
        query,
        key,
        value,
        **projections,
        **config.attention_kwargs(),
        scale=scaling,
        keep_mask=short_rows(token_mask, dense_below),
        token_mask=token_mask,
        pack=packs,
    )
    if layer is not None:
        if packs:
            max_kept = policy.max_kept(config, key.shape[2], dense_below, token_mask is not None)
            layer.keep_packed(keys, values, count, max_kept)
        else:
            query_heads = out.shape[1] if query is not None else projections["q_weight"].shape[0] // key.shape[3]
            layer.keep_selected(chosen, count, token_mask, query_heads)
    record(run, layer, layer_index(module), key, token_mask, None, chosen, count, dense_below)
    return out


def situation(
    index: int | None, tokens: int, attention_mask: torch.Tensor | None, config: ZipVLConfig, dense_below: int
) -> str | None:
    """Why this prefill of a layer that could be sparse is not; None if it is."""
    if config.layers is not None and index not in config.layers:
        return "not among ZipVLConfig.layers"
    if tokens < dense_below:
        return f"prompt shorter than dense_below={dense_below}"
    if attention_mask is not None and attention_mask.dim() != 2:
        return NOT_PLAIN_CAUSAL
    return None


def short_rows(token_mask: torch.Tensor | None, dense_below: int) -> torch.Tensor | None:
    """The keep mask ``[B, N]`` that makes rows with fewer than ``dense_below`` real tokens dense, as they are alone."""
    if token_mask is None:
        return None
    return token_mask & (token_mask.sum(-1, keepdim=True) < dense_below)


def _tell(module: nn.Module, run: runs.Run | None, config: ZipVLConfig, index: int, reason: str, kind: bool) -> None:
    """An error if a layer that has to be sparse is dense, a warning if only this prompt makes it so.

    Raises:
        ValueError: the layer is named in ``config.layers``.
    """
    surprising = reason == NOT_PLAIN_CAUSAL
    where = f"{type(module).__name__}, layer {index}"
    if config.layers is not None and index in config.layers and (kind or surprising):
        raise ValueError(
            f"zipvl attention ({where}): ZipVLConfig.layers names this layer, but it cannot be sparse: {reason}. "
            "Leave it out, or use layers=None for every layer that can be."
        )
    if surprising:
        text = (
            f"zipvl: layers of {type(module).__name__} are dense for this prompt: {reason} (image blocks that attend "
            "both ways, packed sequences or a custom 4-D mask)."
        )
        if run is not None:
            run.warn_once(text)
        else:
            warnings.warn(text, stacklevel=3)


def record(
    run: runs.Run | None,
    layer: ZipVLCacheLayer | None,
    index: int | None,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    reason: str | None,
    chosen: torch.Tensor | None,
    count: torch.Tensor | None,
    dense_below: int,
) -> None:
    """Writes one layer's prefill to the run's statistics."""
    if run is None or index is None:
        return
    batch, _, tokens, _ = states.shape
    run.saw_prefill(tokens, reason, dense_below)
    if attention_mask is None:
        real = torch.full((batch,), tokens, device=states.device)
    elif attention_mask.dim() == 2:
        real = attention_mask.sum(-1)
    else:  # [B, 1, N, N], boolean or additive: a real token attends to itself under every pattern
        itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)
        real = (itself if itself.dtype == torch.bool else itself >= 0).sum(-1).expand(batch)
    if torch.compiler.is_compiling():
        run.stats.traced.leave(index, reason, tokens, real, chosen, count)
        return
    entry = run.stats.add(index, reason, tokens, real, chosen, count)
    if layer is not None:
        layer.attach(entry)


def _attend_packed(
    module: nn.Module,
    layer: ZipVLCacheLayer,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
) -> tuple[torch.Tensor, None]:
    """New tokens against what the cache kept and, causally, themselves.

    Args:
        query: ``[B, Hq, n, D]``, the new tokens.
        attention_mask: ``[B, seen + n]`` or None: all real.

    Returns:
        ``[B, n, Hq, D]``, and None.

    Raises:
        ValueError: the mask is not plain causal, so it names columns that may have been dropped.
    """
    new = query.shape[2]
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"zipvl attention ({type(module).__name__}, layer {layer_index(module)}): a 4-D mask "
            f"{tuple(attention_mask.shape)} was given for tokens behind a packed ZipVLCache, whose dropped columns it "
            "names. Use a 2-D attention_mask, or a DynamicCache."
        )
    all_real = attention_mask is None or layer.candidates > 0 or masks.new_are_real(attention_mask)
    token_mask = None if all_real or attention_mask is None else attention_mask[:, -new:]
    if new == 1:
        out = layer.append(token_mask, query, scaling).attend(query, scaling)
        return out.transpose(1, 2), None
    packed, (new_keys, new_values) = layer.packed, layer.pending()
    if isinstance(packed, QuantizedKV):
        packed.make_room(new)
        out = packed.attend_several(query, new_keys, new_values, token_mask, scaling).transpose(1, 2)
    else:
        assert packed is not None
        keys, values = packed.visible()
        past = packed.valid()[:, None, None, :].expand(-1, 1, new, -1)
        own_mask = token_mask
        if own_mask is None:
            own_mask = torch.ones(query.shape[0], new, dtype=torch.bool, device=query.device)
        mask = torch.cat([past, masks.expand(own_mask, new, query.device)], dim=-1)
        keys, values = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
        out, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)
    layer.append(token_mask, query, scaling)
    return out, None


def _dense(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention with the mask it would have been given."""
    if attention_mask is not None and attention_mask.dim() == 2:
        if attention_mask.shape[1] != key.shape[2]:
            raise ValueError(
                f"zipvl attention ({type(module).__name__}): the mask covers {attention_mask.shape[1]} tokens, the "
                f"keys are {key.shape[2]}"
            )
        attention_mask = masks.expand(attention_mask, query.shape[2], query.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
