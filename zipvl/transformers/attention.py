"""The attention function behind ``attn_implementation="zipvl"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from zipvl import budget, ops, policy, ranks
from zipvl.transformers import sharing
from zipvl.transformers.behind import attend_one, attend_packed
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.call import DEFAULT_RUN, Call, Selected
from zipvl.transformers.latents import in_one_head_dim
from zipvl.transformers.reasons import refuse_unsupported
from zipvl.transformers.storage import RaggedKV, Tokens, packed_mask
from zipvl.transformers.target import IN_BLOCK, expands_latents, is_prefix_lm, layer_index, source_of


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
        attention_mask: what ``masks.mask_function`` made: ``[B, S]``, ``[B, 1, n, S]``, int32
            ``[B, 1, 1, S]`` or None.
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
    new, tokens = query.shape[2], key.shape[2]
    attention_mask, ends = call.read_mask(attention_mask, new)
    source = None if zipvl is None else source_of(module)
    layer = call.layer_of(module, key, value) if source is None else None
    packed = layer is not None and layer.packed is not None
    if layer is not None and packed:
        if layer.shared:
            call.note_behind(module)
        if new == 1:
            if dropout > 0:
                refuse_unsupported(module, kwargs, dropout)
            return attend_one(module, call, layer, query, attention_mask, scaling), None

    def dense_attention() -> tuple[Tensor, None]:
        seen = attention_mask if ends is None else call.seen_by(ends, attention_mask, tokens)
        given = kwargs | {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return _dense(module, call, query, key, value, seen, is_causal=is_causal, **given), None

    if source is not None:
        if source in call.behind or source in call.selected:
            refuse_unsupported(module, kwargs, dropout)
        out = sharing.attend(module, call, source, query, key, attention_mask, scaling, ends)
        return dense_attention() if out is None else (out, None)
    bystander = zipvl is None and _implementation(module) == IN_BLOCK
    prompt, chunk = new == tokens > 1 and not packed, call.is_chunk(new, tokens)
    if (prompt or chunk) and not bystander and layer_index(module) is not None:
        call.saw_prefill = True
        if packed and call.config.cache == "drop":  # what is there, not what was seen
            assert layer is not None and layer.packed is not None
            tokens = layer.packed.longest + new
        latents = layer is None and expands_latents(module)
        dense_below = call.dense_below(query.shape[1], query.shape[3], query, new if chunk else None)
        dense = call.reason_dense(
            module,
            dense_below,
            tokens - call.candidates if layer is not None else tokens,
            attention_mask,
            sliding_window=sliding_window,
            is_causal=is_causal if ends is None else True,  # the mask says what a row sees
            same_head_dims=latents or query.shape[-1] == value.shape[-1],
            dtype=query.dtype,
        )
        if dense is None:
            refuse_unsupported(module, kwargs, dropout)
            attend, dim = _chunk if chunk else _prefill, value.shape[-1]
            if latents:
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                query, key, value = in_one_head_dim(query, key, value)
            out = attend(module, call, layer, dense_below, query, key, value, attention_mask, scaling, ends)
            return out[..., :dim] if latents else out, None
        plain = attention_mask is None or attention_mask.dim() == 2
        if prompt or plain:
            call.record(module, layer, key, attention_mask, dense_below, dense=dense)
        if layer is not None and prompt and plain and not dense.always and call.captures:
            layer.keep_whole(attention_mask, call.visual_of(tokens, key.device))
            layer = None
    if packed:
        assert layer is not None
        if dropout > 0:
            refuse_unsupported(module, kwargs, dropout)
        return attend_packed(module, call, layer, query, attention_mask, scaling, ends), None
    if layer is not None:
        layer.keep_all()
    return dense_attention()


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
    ends: Tensor | None,
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
    last_key = None if ends is None else ends[:, :tokens]
    out = run_layer(module, call, layer, dense_below, q, k, v, token_mask, scaling, last_key=last_key)
    out = out.transpose(1, 2).to(query.dtype)
    if layer is not None and candidates:
        layer.settle()  # what lies behind a row's tokens is defined from here on
        guessed = attend_packed(module, call, layer, query[:, :, tokens:], attention_mask, scaling, None)
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
    **given: Any,
) -> Tensor:
    """``ops.zipvl_layer``, and what becomes of it: the cache layer's content, the statistics.

    Args:
        query: ``[B, Hq, N, D]``, or None: ``given`` holds hidden states and weights.
        key, value: ``[B, Hkv, N, D]``.
        token_mask: ``[B, N]`` or None: all real.
        given: further keywords of the op.

    Returns:
        The op's ``out``.
    """
    call.saw_prefill = True
    config = call.config
    drops = layer is not None and config.cache == "drop"
    budgeted = drops and config.cache_ratio is not None
    visual = call.visual_of(key.shape[2], key.device)
    tokens, packs = Tokens(key, value, token_mask, visual), drops and not budgeted
    out, chosen, count, keys, values = _select(call, dense_below, query, tokens, scaling, pack=packs, **given)
    stored = None
    if budgeted:
        first = call.first_stored(tokens, None, dense_below)
        stored = budget.select(config, query, tokens, *first, scaling, over_ranks=call.over_ranks, **given)
        keys, values = ops.pack_kv(key, value, *stored)
    if layer is not None and drops:
        index, held = stored or (chosen, count)
        max_kept = policy.max_kept(config, key.shape[2], dense_below, token_mask is not None, call.keeps_more())
        kept = None if visual is None else packed_mask(visual, index, held)
        layer.keep_packed(keys, values, held, max_kept, call.candidates, kept)
    elif layer is not None:
        query_heads = out.shape[1] if query is not None else given["q_weight"].shape[0] // key.shape[3]
        layer.keep_selected(key, value, chosen, count, token_mask, query_heads, call.candidates, visual)
    length, masked = key.shape[2], token_mask is not None
    candidates = 0 if layer is None else call.candidates
    mlp = call.leave_for_mlp(module, chosen, count, length, length, candidates, dense_below, masked)
    call.record(module, layer, key, token_mask, dense_below, chosen=chosen, count=count, stored=stored, mlp=mlp)
    call.leave_for_shared(module, Selected(tokens, chosen, count, stored, given.get("last_key"), dense_below))
    return out


def _select(
    call: Call, dense_below: int, query: Tensor | None, tokens: Tokens, scaling: float | None, **given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``ops.zipvl_layer`` of the last tokens among ``tokens``, under the call's configuration; what the op returns.

    Where heads are spread over processes, ``query`` is not None: those project all rows.
    """
    if call.over_ranks is not None:
        assert query is not None
        mask, last_key = tokens.token_mask, given.get("last_key")
        given |= ranks.scores(call.config, query, tokens.keys, call.over_ranks, scaling, mask, last_key)
    return ops.zipvl_layer(
        query,
        tokens.keys,
        tokens.values,
        **given,
        **call.config.attention_kwargs(),
        scale=scaling,
        keep_mask=call.keep_mask(tokens.token_mask, dense_below, tokens.keys),
        extra_mask=call.extra_mask(tokens.visual, tokens.keys),
        token_mask=tokens.token_mask,
    )


def _chunk(
    module: nn.Module,
    call: Call,
    layer: ZipVLCacheLayer | None,
    dense_below: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    ends: Tensor | None,
) -> Tensor:
    """Further tokens of a prompt, sparse among all so far; what becomes of them is up to the cache layer.

    Args:
        query: ``[B, Hq, n, D]``, of the chunk.
        key, value: ``[B, Hkv, S, D]``, all so far, or a placeholder where ``layer`` is packed.
        attention_mask: ``[B, S]`` or None: all real.
        ends: ``[B, n]``, which of the chunk's tokens is the last that each of them sees; None: itself.

    Returns:
        ``[B, n, Hq, D]``.
    """
    new = query.shape[2]

    if layer is None:  # earlier tokens are stored as they came: in a layer of ours or in an ordinary cache
        held = call.stored_in(key)
        q, k, v = _in_one_dtype(query, key, value)
        tokens = Tokens(k, v, attention_mask, call.visual_of(key.shape[2], key.device))
        visual = tokens.visual
    else:
        assert isinstance(layer.packed, RaggedKV)
        held, visual = layer, call.visual_of(new, query.device, new=True)
        tokens = layer.with_new(call.new_mask(attention_mask, new), visual)
        q = query.to(layer.packed.dtype)
    last_key = None if ends is None else ends + (tokens.keys.shape[2] - new)
    out, chosen, count, _, _ = _select(call, dense_below, q, tokens, scaling, last_key=last_key)
    stored, index = None, chosen
    if held is not None and call.config.cache == "drop" and call.config.cache_ratio is not None:
        first = call.first_stored(tokens, new, dense_below)
        index, added = budget.select(
            call.config, q, tokens, *first, scaling, over_ranks=call.over_ranks, last_key=last_key
        )
        stored = index, added + budget.before(tokens, new)
    if held is not None and layer is None:
        held.pack(index, new, attention_mask, visual, q.dtype)
    elif layer is not None and call.config.cache == "drop":
        layer.keep_chunk(index, visual)
    mask, length = tokens.token_mask, tokens.keys.shape[2]
    mlp = call.leave_for_mlp(module, chosen, count, length, new, 0, dense_below, mask is not None)
    call.record(module, held, tokens.keys, mask, dense_below, chosen=chosen, count=count, stored=stored, mlp=mlp)
    call.leave_for_shared(module, Selected(tokens, chosen, count, stored, last_key, dense_below))
    return out.transpose(1, 2).to(query.dtype)


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
    causal = getattr(module, "is_causal", False) or is_prefix_lm(module) if is_causal is None else is_causal
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
