"""``torch.ops.zipvl`` with types and docstrings; the fakes that tracing uses; the check that nothing is differentiated.

The ops themselves are C++ (``csrc/ops``): argument checks, CPU and CUDA implementations. Calling a function of this
module and calling ``torch.ops.zipvl.<name>`` are the same thing. Everything is inference only. Shapes: ``B`` batch,
``Hq`` query heads, ``Hkv`` key/value heads, ``N`` tokens, ``D`` head dim, ``P`` probes, ``S`` cache slots. ``q``,
``k``, ``v`` are float16, bfloat16 or float32 of any strides with a unit last stride. ``token_mask`` is bool
``[B, N]``, true for real tokens; without it every token is real. All tensors of one call share a device. Queries may be
those of the last ``n`` tokens alone, row ``i`` at position ``N - n + i``, under ``causal``: a prompt in chunks.

Bad arguments are a ``RuntimeError`` before anything is launched. It names the op and the argument, what was expected
and what came. docs/ops.md says exactly what each op computes, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._ops import ops


def probe_index(
    q: Tensor,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    token_mask: Tensor | None = None,
    k: Tensor | None = None,
) -> Tensor:
    """The probe tokens of each row (ZipVL Sec. A): the most recent real tokens and random earlier ones.

    Args:
        q: ``[B, Hq, n, D]``; gives ``B``, ``n`` and the device. Probes are drawn among these ``n``.
        num_recent: how many of the most recent real tokens are probes.
        num_random: how many earlier real tokens are probes: one is drawn from each of this many strata, and all are
            taken where there are no more. The draw is a pure function of ``(seed, stratum, number of earlier real
            tokens)``, the same on every device and rank.
        seed: of that draw.
        token_mask: bool ``[B, N]``; padding is never a probe.
        k: ``[B, Hkv, N, D]``; gives ``N``. Without it ``N`` is ``n``.

    Returns:
        ``[B, num_recent + num_random]`` int32, ascending, padded at the end with -1.
    """
    return ops.probe_index(q, num_recent=num_recent, num_random=num_random, seed=seed, token_mask=token_mask, k=k)


def probe_scores(
    q: Tensor,
    k: Tensor,
    probe_index: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    token_mask: Tensor | None = None,
    last_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention mass that the probes give each token (ZipVL Eq. A).

    Args:
        q: ``[B, Hq, n, D]``, of the last ``n`` tokens.
        k: ``[B, Hkv, N, D]``.
        probe_index: ``[B, P]`` int32 from :func:`probe_index`; entries outside ``[N - n, N)`` are skipped.
        scale: factor of the logits; ``D ** -0.5`` by default.
        causal: a probe sees the tokens up to itself alone.
        token_mask: bool ``[B, N]``; padding is not seen.
        last_key: int32 ``[B, n]``, the last position that each row of ``q`` sees, its own by default; needs ``causal``.

    Returns:
        ``accumulated`` and ``normalized``, both float32 ``[B, N]``. ``accumulated`` is the mean over heads of the
        probes' softmax rows, summed over the probes; a row sums to its number of probes. ``normalized`` divides it by
        the number of probes that may attend to the token, and is 0 where none may.
    """
    return ops.probe_scores(q, k, probe_index, scale=scale, causal=causal, token_mask=token_mask, last_key=last_key)


def select_tokens(
    budget_score: Tensor,
    rank_score: Tensor,
    *,
    tau: float = 0.975,
    ratio: float | None = None,
    min_tokens: int = 1,
    keep_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    extra_mask: Tensor | None = None,
    max_ratio: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """How many tokens matter and which (ZipVL Sec. 3).

    Args:
        budget_score: float32 ``[B, N]``; says how many. The budget is the smallest number of real tokens whose largest
            scores sum to ``tau`` of the row's total (top-p over attention mass).
        rank_score: float32 ``[B, N]``; says which. Tokens are taken by descending score, ties to the lower position.
        tau: in ``(0, 1]``; 1 keeps every real token.
        ratio: in ``(0, 1]``; if given the budget is ``ceil(ratio * real tokens)`` instead.
        min_tokens: fewest tokens that are selected, as far as there are real ones.
        keep_mask: bool ``[B, N]``; real tokens set here are selected first, within the budget.
        token_mask: bool ``[B, N]``; padding is never selected.
        local_window, num_sinks: this many last and this many first real tokens are added to the selection, on top of
            the budget, so that decoded tokens find their neighbourhood. ``num_sinks`` needs a ``local_window``.
        extra_mask: bool ``[B, N]``; real tokens set here are added on top, too.
        max_ratio: in ``(0, 1]``; the budget is at most ``ceil(max_ratio * real tokens)``. Kept and added tokens come on
            top.

    Returns:
        ``index`` int32 ``[B, N]`` and ``count`` int32 ``[B]``. The first ``count[b]`` places of a row of ``index`` hold
        the selected positions, ascending; the others hold ``N``. A row selects every real token if one of its scores is
        not finite, if its scores sum to 0, or if, under ``tau``, its budget scores sum to less than 0.
    """
    return ops.select_tokens(
        budget_score,
        rank_score,
        tau=tau,
        ratio=ratio,
        min_tokens=min_tokens,
        keep_mask=keep_mask,
        token_mask=token_mask,
        local_window=local_window,
        num_sinks=num_sinks,
        extra_mask=extra_mask,
        max_ratio=max_ratio,
    )


def pack_kv(k: Tensor, v: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The selected rows of keys and values, moved to the front.

    Args:
        k, v: ``[B, Hkv, N, D]``.
        index, count: from :func:`select_tokens`.

    Returns:
        ``k_packed`` and ``v_packed``, ``[B, Hkv, N, D]``; rows from ``count[b]`` on are undefined.
    """
    return ops.pack_kv(k, v, index, count)


def pack_paged(
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    capacity: Tensor | None = None,
    first_slot: Tensor | None = None,
) -> Tensor:
    """The selected rows of keys and values, written into the blocks of a paged cache, in place.

    Slot ``s`` of row ``b`` is place ``s % block_size`` of block ``block_table[b, s // block_size]``.

    Args:
        k, v: ``[B, Hkv, N, D]``.
        index, count: from :func:`select_tokens`.
        block_table: int32 ``[B, M]``, the blocks of each row; a block outside the cache is skipped.
        k_cache, v_cache: ``[blocks, block_size, Hkv, D]`` of any strides with a unit last stride; written to.
        capacity: int32 ``[B]``, how many slots a row may fill; by default all that it has.
        first_slot: int32 ``[B]``, the slot where each row begins, 0 by default; a row that begins below 0 is skipped.

    Returns:
        int32 ``[B]``, how many tokens each row stored. Where not all fit, the last ones are stored.
    """
    return ops.pack_paged(k, v, index, count, block_table, k_cache, v_cache, capacity=capacity, first_slot=first_slot)


def sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    all_queries: bool = False,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    last_key: Tensor | None = None,
) -> Tensor:
    """Attention among the selected tokens, causal by original position (ZipVL Algorithm 1).

    Args:
        q: ``[B, Hq, n, D]``, of the last ``n`` tokens.
        k, v: ``[B, Hkv, N, D]``.
        index, count: from :func:`select_tokens`.
        scale: factor of the logits; ``D ** -0.5`` by default.
        causal: a row sees the selected tokens up to itself alone.
        all_queries: compute every row against the selected keys, not the selected rows alone.
        token_mask: bool ``[B, N]``; rows of padding are 0, and no row's neighbourhood has padding.
        local_window: ``w``; if above 0, every real row ``t`` also sees the real tokens at positions ``t - w < s <= t``,
            selected or not. Needs ``causal``.
        num_sinks: every real row also sees this many first real tokens. Needs a ``local_window``.
        last_key: int32 ``[B, n]``, the last position that each row sees, its own by default; -1 is none. Needs
            ``causal``.

    Returns:
        ``[B, Hq, n, D]``, the transposed view of a contiguous ``[B, n, Hq, D]``; rows not computed are 0.
    """
    return ops.sparse_attn(
        q,
        k,
        v,
        index,
        count,
        scale=scale,
        causal=causal,
        all_queries=all_queries,
        token_mask=token_mask,
        local_window=local_window,
        num_sinks=num_sinks,
        last_key=last_key,
    )


def zipvl_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float = 0.975,
    ratio: float | None = None,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    keep_recent: int = 1,
    min_tokens: int = 1,
    all_queries: bool = False,
    scale: float | None = None,
    causal: bool = True,
    keep_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    extra_mask: Tensor | None = None,
    last_key: Tensor | None = None,
    max_ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """ZipVL's attention of one layer: :func:`probe_index` to :func:`sparse_attn` in one call (ZipVL Algorithm 1).

    Args:
        q: ``[B, Hq, n, D]``, of the last ``n`` tokens.
        k, v: ``[B, Hkv, N, D]``.
        keep_recent: how many last real tokens are always selected, beside those of ``keep_mask``. The last token's
            output feeds the next-token logits.

    The other arguments are those of the steps.

    Returns:
        ``out`` ``[B, Hq, n, D]`` as :func:`sparse_attn` returns it; ``index`` and ``count`` as :func:`select_tokens`
        does.
    """
    return ops.zipvl_attn(
        q,
        k,
        v,
        tau=tau,
        ratio=ratio,
        num_recent=num_recent,
        num_random=num_random,
        seed=seed,
        keep_recent=keep_recent,
        min_tokens=min_tokens,
        all_queries=all_queries,
        scale=scale,
        causal=causal,
        keep_mask=keep_mask,
        token_mask=token_mask,
        local_window=local_window,
        num_sinks=num_sinks,
        extra_mask=extra_mask,
        last_key=last_key,
        max_ratio=max_ratio,
    )


def zipvl_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float = 0.975,
    ratio: float | None = None,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    keep_recent: int = 1,
    min_tokens: int = 1,
    all_queries: bool = False,
    scale: float | None = None,
    causal: bool = True,
    keep_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    extra_mask: Tensor | None = None,
    last_key: Tensor | None = None,
    max_ratio: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`zipvl_attn`, and the keys and values that it attended to, packed: the ``drop`` cache of the layer.

    The arguments are those of :func:`zipvl_attn`.

    Returns:
        ``out``, ``index`` and ``count`` as :func:`zipvl_attn` does; ``k_packed`` and ``v_packed`` as :func:`pack_kv`
        does.
    """
    return ops.zipvl_prefill(
        q,
        k,
        v,
        tau=tau,
        ratio=ratio,
        num_recent=num_recent,
        num_random=num_random,
        seed=seed,
        keep_recent=keep_recent,
        min_tokens=min_tokens,
        all_queries=all_queries,
        scale=scale,
        causal=causal,
        keep_mask=keep_mask,
        token_mask=token_mask,
        local_window=local_window,
        num_sinks=num_sinks,
        extra_mask=extra_mask,
        last_key=last_key,
        max_ratio=max_ratio,
    )


def zipvl_layer(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    hidden: Tensor | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    o_weight: Tensor | None = None,
    budget_score: Tensor | None = None,
    rank_score: Tensor | None = None,
    tau: float = 0.975,
    ratio: float | None = None,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    keep_recent: int = 1,
    min_tokens: int = 1,
    all_queries: bool = False,
    scale: float | None = None,
    causal: bool = True,
    keep_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    local_window: int = 0,
    num_sinks: int = 0,
    extra_mask: Tensor | None = None,
    last_key: Tensor | None = None,
    max_ratio: float = 1.0,
    pack: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The prefill of one layer in one call: :func:`probe_index` to :func:`sparse_attn`, with projections and packing.

    Models run this op. Queries are given as ``q``, or are projected from ``hidden``.

    Args:
        q: ``[B, Hq, n, D]``, of the last ``n`` tokens; None where ``hidden`` is given.
        k, v: ``[B, Hkv, N, D]``.
        hidden: ``[B, n, C]``, the input of the attention layer. Only queries that are read are projected from it: those
            of the probes and of the selected tokens, or all with ``all_queries``, a window or ``n < N``.
        q_weight, q_bias, q_norm_weight, q_norm_eps, cos, sin: of that projection, as in :func:`project_queries`.
        o_weight: ``[O, Hq * D]``, of the output projection; without it attention outputs are returned.
        budget_score, rank_score: float32 ``[B, N]``, both or neither. Given scores decide, and no probes are drawn.
            Under tensor parallelism they are the sums of all ranks' scores.
        keep_recent: how many last real tokens are always selected, beside those of ``keep_mask``.
        pack: return the packed keys and values too.

    The other arguments are those of the steps.

    Returns:
        ``out``, ``index``, ``count``, ``k_packed``, ``v_packed``. ``out`` is ``[B, Hq, n, D]`` as :func:`sparse_attn`
        returns it, or with ``o_weight`` ``[B, n, O]`` as :func:`project_outputs` does. Without ``pack`` the packed
        tensors are empty, of shape ``[0]``.
    """
    return ops.zipvl_layer(
        q,
        k,
        v,
        hidden=hidden,
        q_weight=q_weight,
        q_bias=q_bias,
        q_norm_weight=q_norm_weight,
        q_norm_eps=q_norm_eps,
        cos=cos,
        sin=sin,
        o_weight=o_weight,
        budget_score=budget_score,
        rank_score=rank_score,
        tau=tau,
        ratio=ratio,
        num_recent=num_recent,
        num_random=num_random,
        seed=seed,
        keep_recent=keep_recent,
        min_tokens=min_tokens,
        all_queries=all_queries,
        scale=scale,
        causal=causal,
        keep_mask=keep_mask,
        token_mask=token_mask,
        local_window=local_window,
        num_sinks=num_sinks,
        extra_mask=extra_mask,
        last_key=last_key,
        max_ratio=max_ratio,
        pack=pack,
    )


def decode_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One new query a row against the first ``lengths[b]`` slots of its cache.

    Args:
        q: ``[B, Hq, 1, D]``.
        k_cache, v_cache: ``[B, Hkv, S, D]``.
        lengths: int32 ``[B]``, how many slots of each row are filled.
        scale: factor of the logits; ``D ** -0.5`` by default.

    Returns:
        ``out`` ``[B, Hq, 1, D]`` and ``lse`` float32 ``[B, Hq, 1]``, the natural log-sum-exp of the scaled scores.
        A row of length 0 gives 0 and minus infinity.
    """
    return ops.decode_attn(q, k_cache, v_cache, lengths, scale=scale)


def project_queries(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """The queries of chosen tokens: linear layer, RMS norm of each head if there is one, rotary embedding.

    Args:
        x: ``[B, N, C]``, the attention layer's input.
        weight, bias: ``[Hq * D, C]`` and ``[Hq * D]``, of the query projection.
        cos, sin: ``[B, N, D]`` or ``[1, N, D]``; a head's first half is rotated with its second.
        index: ``[B, M]`` int32, the tokens; entries outside ``[0, N)`` are skipped.
        count: ``[B]`` int32, how many places of ``index`` count; all without it.
        norm_weight, norm_eps: ``[D]``, of the query norm.

    Returns:
        ``[B, Hq, N, D]``, the transposed view of a contiguous ``[B, N, Hq, D]``; tokens not chosen are undefined.
    """
    return ops.project_queries(x, weight, bias, cos, sin, index, count, norm_weight=norm_weight, norm_eps=norm_eps)


def project_outputs(x: Tensor, weight: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The output projection of chosen tokens alone.

    Args:
        x: ``[B, N, C]``, the attention output.
        weight: ``[O, C]``, of a projection without bias.
        index, count: int32 ``[B, M]`` and ``[B]``, from :func:`select_tokens`.

    Returns:
        ``[B, N, O]``; rows of tokens that were not chosen are 0, as the whole projection would make them.
    """
    return ops.project_outputs(x, weight, index, count)


Bits = int | Sequence[int]
"""Bits of a segment's keys and of its values, or one number for both."""


def _pair(bits: Bits) -> Sequence[int]:
    return (bits, bits) if isinstance(bits, int) else bits


def quantize_kv(
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    high_bits: Bits = (4, 4),
    low_bits: Bits = (4, 2),
    v_factor: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of the selected tokens at ``high_bits``, of the other real tokens at ``low_bits`` (ZipCache).

    Args:
        k, v: ``[B, Hkv, N, D]``, ``D`` a multiple of 32.
        index, count: from :func:`select_tokens`.
        high_bits, low_bits: 2, 4 or 8, or ``(4, 2)``, of keys and of values.
        v_factor: float32 ``[B, Hkv, D]``; each channel of ``v`` is divided by it first. By default it is the square
            root of the channel's largest absolute value, and 1 where that is 0. Pass an earlier call's to append to its
            blocks.
        token_mask: bool ``[B, N]``; padding is not stored.

    Returns:
        ``high`` uint8 ``[B, Hkv, ceil(N / 64) + 1, bytes]``, blocks of 64 tokens, and ``high_blocks`` int32 ``[B]``,
        how many of them each row uses (the others are 0); ``low`` and ``low_blocks`` likewise; ``v_factor``.
        docs/cache.md has the layout of a block.
    """
    return ops.quantize_kv(
        k,
        v,
        index,
        count,
        high_bits=_pair(high_bits),
        low_bits=_pair(low_bits),
        v_factor=v_factor,
        token_mask=token_mask,
    )


def decode_attn_quantized(
    q: Tensor,
    high: Tensor,
    high_blocks: Tensor,
    low: Tensor,
    low_blocks: Tensor,
    v_factor: Tensor,
    *,
    high_bits: Bits = (4, 4),
    low_bits: Bits = (4, 2),
    k_recent: Tensor | None = None,
    v_recent: Tensor | None = None,
    recent_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One new query a row against a quantised cache and the tokens since then: all of them in one softmax.

    Args:
        q: ``[B, Hq, 1, D]``.
        high, high_blocks, low, low_blocks, v_factor: from :func:`quantize_kv`; more blocks may be appended.
        high_bits, low_bits: as they were given to :func:`quantize_kv`.
        k_recent, v_recent: ``[B, Hkv, R, D]`` of q's dtype, tokens at full precision.
        recent_lengths: int32 ``[B]``, how many of the ``R`` each row attends to. All three or none.
        scale: factor of the logits; ``D ** -0.5`` by default.

    Returns:
        ``out`` ``[B, Hq, 1, D]`` and ``lse`` float32 ``[B, Hq, 1]``, as :func:`decode_attn` returns them.
    """
    return ops.decode_attn_quantized(
        q,
        high,
        high_blocks,
        low,
        low_blocks,
        v_factor,
        high_bits=_pair(high_bits),
        low_bits=_pair(low_bits),
        k_recent=k_recent,
        v_recent=v_recent,
        recent_lengths=recent_lengths,
        scale=scale,
    )


# ---- fakes: shapes, dtypes and strides of the results, for torch.compile and torch.export


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the fake of op ``name``. A call that mixes real and meta tensors arrives here too, so devices are
    checked as the op itself does."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        arguments = [argument.name for argument in getattr(ops, name).default._schema.arguments]

        def checked(*args: Any, **kwargs: Any) -> Any:
            given = (*zip(arguments, args, strict=False), *kwargs.items())
            tensors = [(argument, value) for argument, value in given if isinstance(value, Tensor)]
            expected = tensors[0][1].device
            for argument, tensor in tensors[1:]:
                if tensor.device != expected:
                    raise RuntimeError(
                        f"{name}: {argument} must be on {expected} like the other tensors, got {tensor.device}"
                    )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"{ops.name}::{name}", checked)
        return fake

    return register


def _attention_output(q: Tensor) -> Tensor:
    B, Hq, N, D = q.shape
    return q.new_empty((B, N, Hq, D)).transpose(1, 2)


@_fake("probe_index")
def _(q: Tensor, *, num_recent: int = 64, num_random: int = 64, **_: Any) -> Tensor:
    return q.new_empty((q.shape[0], num_recent + num_random), dtype=torch.int32)


@_fake("probe_scores")
def _(q: Tensor, k: Tensor, probe_index: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@_fake("select_tokens")
def _(budget_score: Tensor, rank_score: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    index = torch.empty_like(budget_score, dtype=torch.int32, memory_format=torch.contiguous_format)
    return index, index.new_empty((budget_score.shape[0],))


@_fake("pack_kv")
def _(k: Tensor, v: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@_fake("pack_paged")
def _(k: Tensor, v: Tensor, index: Tensor, count: Tensor, *_: Any, **__: Any) -> Tensor:
    return count.new_empty(count.shape)


@_fake("sparse_attn")
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, **_: Any) -> Tensor:
    return _attention_output(q)


@_fake("zipvl_attn")
def _(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, N = k.shape[0], k.shape[2]
    return _attention_output(q), q.new_empty((B, N), dtype=torch.int32), q.new_empty((B,), dtype=torch.int32)


@_fake("zipvl_prefill")
def _(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N = k.shape[0], k.shape[2]
    index, count = q.new_empty((B, N), dtype=torch.int32), q.new_empty((B,), dtype=torch.int32)
    return _attention_output(q), index, count, k.new_empty(k.shape), v.new_empty(v.shape)


@_fake("zipvl_layer")
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    hidden: Tensor | None = None,
    q_weight: Tensor | None = None,
    o_weight: Tensor | None = None,
    pack: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, D = k.shape[0], k.shape[2], k.shape[3]
    index, count = k.new_empty((B, N), dtype=torch.int32), k.new_empty((B,), dtype=torch.int32)
    if q is not None:
        n = q.shape[2]
    else:
        assert hidden is not None
        n = hidden.shape[1]
    if o_weight is not None:
        out = k.new_empty((B, n, o_weight.shape[0]))
    elif q is not None:
        out = _attention_output(q)
    else:
        assert q_weight is not None
        out = k.new_empty((B, n, q_weight.shape[0] // D, D)).transpose(1, 2)
    packed = (k.new_empty(k.shape), v.new_empty(v.shape)) if pack else (k.new_empty((0,)), v.new_empty((0,)))
    return out, index, count, *packed


@_fake("project_queries")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    **_: Any,
) -> Tensor:
    D = cos.shape[2]
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0] // D, D)).transpose(1, 2)


@_fake("project_outputs")
def _(x: Tensor, weight: Tensor, index: Tensor, count: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))


@_fake("decode_attn")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return _attention_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_fake("quantize_kv")
def _(
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    high_bits: Sequence[int] = (4, 4),
    low_bits: Sequence[int] = (4, 2),
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, Hkv, N, D = k.shape

    def packed(bits: Sequence[int]) -> Tensor:
        size = 16 + 2 * k.element_size() * (D + 64) + 8 * D * sum(bits)
        return k.new_empty((B, Hkv, (N + 63) // 64 + 1, size), dtype=torch.uint8)

    def blocks() -> Tensor:
        return k.new_empty((B,), dtype=torch.int32)

    return packed(high_bits), blocks(), packed(low_bits), blocks(), k.new_empty((B, Hkv, D), dtype=torch.float32)


@_fake("decode_attn_quantized")
def _(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _attention_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


# ---- inference only

NAMES = (
    "probe_index",
    "probe_scores",
    "select_tokens",
    "pack_kv",
    "pack_paged",
    "sparse_attn",
    "zipvl_attn",
    "zipvl_prefill",
    "zipvl_layer",
    "decode_attn",
    "project_queries",
    "project_outputs",
    "quantize_kv",
    "decode_attn_quantized",
)


def _inference_only(name: str) -> Callable[..., Any]:
    """An Autograd kernel of op ``name`` that refuses inputs which require grad or carry a tangent of forward-mode
    differentiation. It passes other calls on.

    The stable ABI cannot ask a tensor for either, so this check is the one that is made in Python, at each call outside
    of ``torch.inference_mode``. What gets past it is not differentiated, so that nothing is recorded below and no guard
    has to keep Autograd from the op's own calls.
    """
    op = getattr(ops, name).default
    redispatch = op._handle.redispatch_boxed  # op.redispatch without its frame
    below = torch._C._after_autograd_keyset
    is_grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() and any_requires_grad(*args, **kwargs):
            _refuse_reverse_mode(name, op, args, kwargs)
        if forward_ad._current_level >= 0:  # grad mode does not concern forward mode
            _refuse_forward_mode(name, op, args, kwargs)
        return redispatch(keyset & below, *args, **kwargs)

    return kernel


def _refuse_reverse_mode(name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError with the first argument that requires grad."""
    for argument, tensor in _tensors(op, args, kwargs):
        if tensor.requires_grad:
            raise RuntimeError(
                f"{name}: {argument} requires grad, and zipvl is inference only: expected no gradient, got "
                f"{argument}.requires_grad == True with grad mode on. Use torch.no_grad() or "
                "torch.inference_mode(), or detach it"
            )


def _refuse_forward_mode(name: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError with the first argument that has a tangent, if one has: torch has dual level 0 alone."""
    for argument, tensor in _tensors(op, args, kwargs):
        if forward_ad.unpack_dual(tensor, level=0).tangent is not None:
            raise RuntimeError(
                f"{name}: {argument} has a tangent, and zipvl is inference only: expected no forward-mode derivative "
                f"(torch.func.jvp, torch.autograd.forward_ad), got a dual tensor. Detach {argument}"
            )


def _tensors(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a call of ``op``, with their names."""
    positional = zip((argument.name for argument in op._schema.arguments), args, strict=False)
    for argument, value in (*positional, *kwargs.items()):
        if isinstance(value, Tensor):
            yield argument, value


_autograd = torch.library.Library(ops.name, "FRAGMENT")
for _name in NAMES:
    _autograd.impl(_name, _inference_only(_name), "Autograd", with_keyset=True)
