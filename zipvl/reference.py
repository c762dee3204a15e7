"""docs/ops.md in plain PyTorch: the readable truth that the C++ and CUDA ops are held to.

The functions carry the ops' names, argument names and defaults, and run on any device and in any floating dtype.
float64 inputs are computed in float64 and give float64 scores, so that a float32 op can be compared with something
better than itself; everything else is computed in float32, as the ops do. Clarity comes before speed: batch rows and
heads are looped over, and attention weights are materialised.

Inputs are trusted here (shapes are asserted); the ops hold the checks that users meet.

Symbols, as in the paper (arXiv 2410.08584): ``B`` batch, ``Hq`` query heads, ``Hkv`` key/value heads, ``G = Hq / Hkv``,
``N`` tokens, ``D`` head dim, ``P`` probe tokens, ``S`` cache slots, ``T`` the important tokens of a batch row. Queries
may be those of the last ``n`` of the ``S`` tokens alone (docs/ops.md, step 5c): ``n = S = N`` otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "decode_attn",
    "hash32",
    "pack_kv",
    "pack_paged",
    "probe_index",
    "probe_scores",
    "project_outputs",
    "project_queries",
    "select_tokens",
    "sparse_attn",
    "zipvl_attn",
    "zipvl_layer",
    "zipvl_prefill",
]

_U32 = 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------------------
# Step 1: probe tokens (Sec. A)
# ---------------------------------------------------------------------------------------------------------------------


def _fmix32(x: int) -> int:
    """MurmurHash3's 32-bit finaliser: a bijection in which every input bit reaches every output bit."""
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & _U32
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & _U32
    x ^= x >> 16
    return x


def hash32(seed: int, i: int, R: int) -> int:
    """The 32 random bits of stratum ``i`` among ``R`` earlier real tokens: a pure function of its three arguments
    (docs/ops.md, "probe_index").

    ``seed`` is taken as 64 bits (two's complement where negative); ``i`` and ``R`` are below ``2**32``.
    """
    h = 0
    for word in (seed & _U32, (seed >> 32) & _U32, i, R):
        h = _fmix32(((h ^ word) + 0x9E3779B9) & _U32)
    return h


def _drawn_ranks(R: int, r: int, seed: int) -> list[int]:
    """Ranks, ascending, of the random probes among ``R`` earlier real tokens: one from each of ``r`` strata, or all."""
    if R <= r:
        return list(range(R))
    ranks = []
    for i in range(r):
        low, high = i * R // r, (i + 1) * R // r
        ranks.append(low + ((hash32(seed, i, R) * (high - low)) >> 32))
    return ranks


def probe_index(
    q: Tensor,
    *,
    num_recent: int = 64,
    num_random: int = 64,
    seed: int = 0,
    token_mask: Tensor | None = None,
    k: Tensor | None = None,
) -> Tensor:
    """Positions of the probe tokens: the most recent real tokens, and random earlier ones (docs/ops.md, step 1).

    Args:
        q: ``[B, Hq, n, D]``, any dtype; only its ``B``, ``n`` and device are used. Probes are drawn among these.
        num_recent: most recent real tokens to probe; all of them where a row has fewer.
        num_random: earlier real tokens to probe, one from each of so many strata; all of them where a row has fewer.
        seed: of the draw, see :func:`hash32`.
        token_mask: ``[B, S]`` bool, true for real tokens; None: all are real.
        k: ``[B, Hkv, S, D]``, of which only ``S`` is used; None: ``S = n``.

    Returns:
        ``[B, num_recent + num_random]`` int32 positions in ``[0, S)``, ascending, padded at the end with -1.
    """
    B, _, n, _ = q.shape
    S = n if k is None else k.shape[2]
    assert n <= S
    index = torch.full((B, num_recent + num_random), -1, dtype=torch.int32, device=q.device)
    for b in range(B):
        real = _real_tokens(token_mask, b, S, q.device)
        real = real[real >= S - n]
        R = max(len(real) - num_recent, 0)
        earlier, recent = real[:R], real[R:]
        drawn = earlier[torch.tensor(_drawn_ranks(R, num_random, seed), dtype=torch.int64, device=q.device)]
        probes = torch.cat([drawn, recent])
        index[b, : len(probes)] = probes.to(torch.int32)
    return index


# ---------------------------------------------------------------------------------------------------------------------
# Step 2: probe scores (Eq. A)
# ---------------------------------------------------------------------------------------------------------------------


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
    """Attention that the probe tokens pay to every token, summed and normalised (docs/ops.md, step 2).

    With ``A[h, i, :]`` the softmax of probe ``i`` and head ``h`` over the real tokens (under ``causal`` those at or
    before the probe): ``accumulated[j] = sum_hi A[h, i, j] / Hq``, and ``normalized[j]`` is that over the number of
    probes that may attend to ``j``. Tokens that no probe may attend to score 0.

    Args:
        q: ``[B, Hq, n, D]``, the queries of the last ``n`` tokens; ``n < S`` under ``causal`` alone.
        k: ``[B, Hkv, S, D]``, of q's dtype.
        probe_index: ``[B, P]`` int32 positions; entries outside ``[S - n, S)`` are no probes.
        scale: of the logits; None: ``D ** -0.5``.
        causal: probes attend to positions at or before their own.
        token_mask: ``[B, S]`` bool, true for real tokens; None: all are real.
        last_key: ``[B, n]`` int32, the last position that a probe at each query row attends to, under ``causal`` alone;
            None: its own.

    Returns:
        ``(accumulated, normalized)``, each ``[B, S]`` float32 (float64 for float64 inputs).
    """
    B, Hq, n, D = q.shape
    Hkv, N = k.shape[1:3]
    assert k.shape == (B, Hkv, N, D) and Hq % Hkv == 0 and probe_index.shape[0] == B
    assert n == N or (n < N and causal)
    ends = _row_ends(n, N, causal, last_key, B, q.device)
    dtype = _compute_dtype(q)
    scale = D**-0.5 if scale is None else scale
    accumulated = torch.zeros(B, N, dtype=dtype, device=q.device)
    normalized = torch.zeros(B, N, dtype=dtype, device=q.device)
    for b in range(B):
        rows = _valid_positions(probe_index[b] - (N - n), n)
        real = _real_tokens(token_mask, b, N, q.device)
        may_attend = real[None, :] <= ends[b, rows, None]
        total = torch.zeros(len(real), dtype=dtype, device=q.device)
        for h in range(Hq):
            q_probe = q[b, h, rows].to(dtype)
            k_real = k[b, h // (Hq // Hkv), real].to(dtype)
            total += _masked_softmax(scale * (q_probe @ k_real.T), may_attend).sum(dim=0)
        num_probes = may_attend.sum(dim=0)
        accumulated[b, real] = total / Hq
        normalized[b, real] = torch.where(num_probes > 0, total / Hq / num_probes, 0.0)
    return accumulated, normalized


# ---------------------------------------------------------------------------------------------------------------------
# Steps 3 and 4: how many tokens, and which (layer-wise adaptive ratio, token identification)
# ---------------------------------------------------------------------------------------------------------------------


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
    """The important tokens ``T`` of every batch row (docs/ops.md, steps 3 and 4).

    ``p`` is the smallest number of real tokens whose largest budget scores sum to at least ``tau`` times their total
    (every real token for ``tau = 1``), or ``ceil(ratio * real tokens)``. ``T`` is the real tokens of ``keep_mask``, and
    then real tokens by descending rank score, ties to the lower position, until it has
    ``max(p, |keep|, min_tokens)`` tokens, or all real ones. ``T`` is every real token where a score of a real token is
    not finite, where the budget or the rank scores of the row's real tokens sum to 0, and, unless ``ratio`` is given,
    where the budget scores sum to less: a share of that is no bound. Then ``T`` gains, on top of its count, the first
    ``num_sinks`` and the last ``local_window`` real tokens and the real tokens of ``extra_mask``.

    Args:
        budget_score: ``[B, N]`` floating (``accumulated`` in the paper); decides ``p``. Summed in float64.
        rank_score: ``[B, N]`` floating (``normalized`` in the paper); decides which.
        tau: in ``(0, 1]``.
        ratio: in ``(0, 1]``; if given, replaces ``tau``.
        min_tokens: least number of tokens to select.
        keep_mask: ``[B, N]`` bool, tokens to select whatever their scores; None: none.
        token_mask: ``[B, N]`` bool, true for real tokens; None: all are real.
        local_window, num_sinks: as in :func:`sparse_attn`: decoded tokens find their neighbourhood in ``T``.
        extra_mask: ``[B, N]`` bool, tokens to add to what was selected; None: none.
        max_ratio: in ``(0, 1]``: ``p`` is at most ``ceil(max_ratio * real tokens)``.

    Returns:
        ``index``: ``[B, N]`` int32, ``T`` ascending in the first ``count[b]`` places and ``N`` in the others;
        ``count``: ``[B]`` int32.
    """
    B, N = budget_score.shape
    assert rank_score.shape == (B, N)
    index = torch.full((B, N), N, dtype=torch.int32, device=budget_score.device)
    count = torch.zeros(B, dtype=torch.int32, device=budget_score.device)
    for b in range(B):
        real = _real_tokens(token_mask, b, N, budget_score.device)
        budget = budget_score[b, real].double()
        rank = rank_score[b, real].double()
        keep = torch.zeros_like(real, dtype=torch.bool) if keep_mask is None else keep_mask[b, real]
        if _scores_are_usable(budget) and _scores_are_usable(rank):
            p = min(_num_important(budget, tau, ratio), math.ceil(max_ratio * len(real)))
            size = min(max(p, int(keep.sum()), min_tokens), len(real))
            by_rank = torch.sort(rank, descending=True, stable=True).indices
            kept_first = torch.cat([by_rank[keep[by_rank]], by_rank[~keep[by_rank]]])
            T = real[kept_first[:size].sort().values]
        else:
            T = real
        chosen = torch.zeros(N, dtype=torch.bool, device=budget_score.device)
        chosen[T] = True
        chosen[real[:num_sinks]] = True
        chosen[real[max(len(real) - local_window, 0) :]] = True
        if extra_mask is not None:
            chosen[real[extra_mask[b, real]]] = True
        T = chosen.nonzero()[:, 0]
        index[b, : len(T)] = T.to(torch.int32)
        count[b] = len(T)
    return index, count


def _scores_are_usable(score: Tensor) -> bool:
    return bool(score.isfinite().all()) and float(score.sum()) != 0.0


def _num_important(budget: Tensor, tau: float, ratio: float | None) -> int:
    """``p`` of one row; ``budget`` ``[real tokens]`` float64 with a sum that is not 0."""
    if ratio is not None:
        return math.ceil(ratio * len(budget))
    if tau == 1.0 or float(budget.sum()) < 0.0:
        return len(budget)
    mass = budget.sort(descending=True).values.cumsum(dim=0)
    return int((mass < tau * mass[-1]).sum()) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Step 5: sparse attention (Sec. 3, Algorithm 1)
# ---------------------------------------------------------------------------------------------------------------------


def pack_kv(k: Tensor, v: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the selected tokens, moved to the front (docs/ops.md, "pack_kv").

    Args:
        k, v: ``[B, Hkv, N, D]``.
        index: ``[B, N]`` int32 positions; entries outside ``[0, N)`` are skipped: their packed rows stay 0.
        count: ``[B]`` int32, clamped to ``[0, N]``.

    Returns:
        ``(k_packed, v_packed)``, each contiguous ``[B, Hkv, N, D]`` of its input's dtype. Rows at and after
        ``count[b]`` are 0 here, and undefined in the ops.
    """
    B, _, N, _ = k.shape
    assert v.shape == k.shape and index.shape == (B, N) and count.shape == (B,)
    k_packed = torch.zeros(k.shape, dtype=k.dtype, device=k.device)
    v_packed = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    for b in range(B):
        selected = index[b, : _clamped(count[b], N)].long()
        slots = ((selected >= 0) & (selected < N)).nonzero()[:, 0]
        k_packed[b, :, slots] = k[b, :, selected[slots]]
        v_packed[b, :, slots] = v[b, :, selected[slots]]
    return k_packed, v_packed


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
    """Keys and values of the selected tokens, written into the blocks of a paged cache (docs/ops.md, "pack_paged").

    Args:
        k, v: ``[B, Hkv, N, D]``.
        index: ``[B, N]`` int32 positions; entries outside ``[0, N)`` are skipped: their slots keep what they held.
        count: ``[B]`` int32, clamped to ``[0, N]``.
        block_table: ``[B, M]`` int32, the blocks of each row in the order of its slots; one outside ``[0, blocks)`` is
            skipped.
        k_cache, v_cache: ``[blocks, block_size, Hkv, D]``, written to.
        capacity: ``[B]`` int32, the slots that a row may fill; None: as many as it has from ``first_slot`` on.
        first_slot: ``[B]`` int32, where a row begins; None: 0. A row that begins below 0 is not written.

    Returns:
        ``stored``: ``[B]`` int32, how many tokens each row was given slots for: of more than fit the last ones.
    """
    B, Hkv, N, D = k.shape
    blocks, block_size = k_cache.shape[:2]
    assert v.shape == k.shape and index.shape == (B, N) and count.shape == (B,) and block_table.shape[0] == B
    assert k_cache.shape == v_cache.shape == (blocks, block_size, Hkv, D)
    stored = torch.zeros(B, dtype=torch.int32, device=k.device)
    for b in range(B):
        first = 0 if first_slot is None else int(first_slot[b])
        room = max(block_table.shape[1] * block_size - first, 0) if first >= 0 and blocks > 0 else 0
        room = room if capacity is None else _clamped(capacity[b], room)
        selected = index[b, : _clamped(count[b], N)].tolist()
        fitting = selected[max(len(selected) - room, 0) :]
        stored[b] = len(fitting)
        for slot, token in enumerate(fitting, start=first):
            block = int(block_table[b, slot // block_size])
            if 0 <= token < N and 0 <= block < blocks:
                k_cache[block, slot % block_size] = k[b, :, token]
                v_cache[block, slot % block_size] = v[b, :, token]
    return stored


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
    """Attention among the selected tokens ``T``; rows outside ``T`` are exactly 0 (docs/ops.md, step 5).

    Row ``t`` is ``softmax(scale * q[t] . k[T'])`` applied to ``v[T']``, with ``T'`` the tokens of ``T`` at or before
    the row's end ``e`` (all of ``T`` if not causal), and 0 where ``T'`` is empty. The end is ``t``, or what
    ``last_key`` says. Keys and values that no row attends to are not read.

    With ``local_window`` every real row attends to its neighbourhood as well: the real tokens ``s`` with
    ``t - local_window < s <= e`` and, as far as they are at or before ``e``, the first ``num_sinks`` real tokens
    (docs/ops.md, step 5b). Rows outside ``T`` attend to that alone.

    Args:
        q: ``[B, Hq, n, D]``, the queries of the last ``n`` tokens; ``n < S`` under ``causal`` alone.
        k, v: ``[B, Hkv, S, D]``, of q's dtype.
        index: ``[B, S]`` int32, ``T`` ascending in the first ``count[b]`` places; entries outside ``[0, S)`` are
            skipped.
        count: ``[B]`` int32, clamped to ``[0, S]``.
        scale: of the logits; None: ``D ** -0.5``.
        causal: tokens attend to positions at or before their own (original positions, not packed ones).
        all_queries: attend to ``T'`` in every row, not only in those of ``T``.
        token_mask: ``[B, S]`` bool, true for real tokens; rows of the others are 0; None: all are real.
        local_window, num_sinks: of the neighbourhood; 0: there is none, and no sinks without a window.
        last_key: ``[B, n]`` int32, the last position that each row sees, under ``causal`` alone; -1: none.

    Returns:
        ``[B, Hq, n, D]`` of q's dtype, a transposed view of a contiguous ``[B, n, Hq, D]``.
    """
    B, Hq, n, D = q.shape
    Hkv, S = k.shape[1:3]
    assert k.shape == v.shape == (B, Hkv, S, D) and Hq % Hkv == 0 and index.shape == (B, S) and count.shape == (B,)
    assert (n == S or (n < S and causal)) and (local_window > 0 or num_sinks == 0) and (local_window == 0 or causal)
    dtype = _compute_dtype(q)
    scale = D**-0.5 if scale is None else scale
    ends = _row_ends(n, S, causal, last_key, B, q.device)
    key = torch.arange(S, device=q.device)
    query = key[S - n :]
    out = torch.zeros(B, n, Hq, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    for b in range(B):
        in_T = torch.zeros(S, dtype=torch.bool, device=q.device)
        in_T[_valid_positions(index[b, : _clamped(count[b], S)], S)] = True
        real = torch.zeros_like(in_T)
        real[_real_tokens(token_mask, b, S, q.device)] = True
        may_attend = in_T[None, :] & (in_T[query, None] | all_queries)
        if local_window > 0:
            sink = real & (real.cumsum(dim=0) <= num_sinks)
            may_attend |= real[None, :] & (key[None, :] > query[:, None] - local_window) | sink[None, :]
        may_attend &= (key[None, :] <= ends[b, :, None]) & real[query, None]
        rows, keys = (may_attend.any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
        for h in range(Hq):
            q_rows = q[b, h, rows].to(dtype)
            k_seen = k[b, h // (Hq // Hkv), keys].to(dtype)
            v_seen = v[b, h // (Hq // Hkv), keys].to(dtype)
            attention = _masked_softmax(scale * (q_rows @ k_seen.T), may_attend[rows][:, keys])
            out[b, h, rows] = (attention @ v_seen).to(q.dtype)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 5 together
# ---------------------------------------------------------------------------------------------------------------------


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
    """ZipVL's prefill of one layer: probe, score, select, attend (docs/ops.md, steps 1 to 5 and "zipvl_layer").

    Args:
        q: ``[B, Hq, n, D]``, of the last ``n`` tokens (``n < S`` under ``causal`` alone); None where ``hidden`` is
            given.
        k, v: ``[B, Hkv, S, D]``, of q's dtype.
        hidden: ``[B, n, C]``, the attention layer's input. The queries that the layer reads are projected from it:
            those of the probes and of ``T``, with ``all_queries``, a window or ``n < S`` those of every row.
        q_weight, q_bias, cos, sin, q_norm_weight, q_norm_eps: as ``weight``, ``bias``, ``cos``, ``sin``,
            ``norm_weight`` and ``norm_eps`` of :func:`project_queries`; with ``hidden`` alone.
        o_weight: ``[O, Hq * D]``, of the output projection; None: none.
        budget_score, rank_score: ``[B, S]`` as in :func:`select_tokens`, both or neither; None: ``accumulated`` and
            ``normalized`` of :func:`probe_scores`. Given ones are used as they are, and no probes are drawn.
        tau, ratio, min_tokens, keep_mask, token_mask, extra_mask, max_ratio: as in :func:`select_tokens`.
        num_recent, num_random, seed: as in :func:`probe_index`.
        keep_recent: so many last real tokens are selected whatever their scores.
        scale, causal, last_key: of probe scores and attention alike.
        all_queries: attend to ``T`` in every real row (the others are 0), not only in those of ``T``.
        local_window, num_sinks: of :func:`select_tokens` and :func:`sparse_attn` alike.
        pack: return the keys and values of ``T`` too.

    Returns:
        ``out``: ``[B, Hq, n, D]`` as :func:`sparse_attn` returns it, or with ``o_weight`` ``[B, n, O]``, 0 for rows
        that are not computed; ``index`` and ``count`` as :func:`select_tokens`; ``k_packed``, ``v_packed`` as
        :func:`pack_kv`, or empty tensors of shape ``[0]`` without ``pack``.
    """
    B, _, N, _ = k.shape
    assert (q is None) != (hidden is None) and (budget_score is None) == (rank_score is None)
    n = N
    if q is not None:
        n = q.shape[2]
    elif hidden is not None:
        n = hidden.shape[1]
    every_row = all_queries or local_window > 0 or n < N

    def queries(index: Tensor, count: Tensor | None = None) -> Tensor:
        """``[B, Hq, n, D]``, in which these rows may be read."""
        if q is not None:
            return q
        assert hidden is not None and q_weight is not None and cos is not None and sin is not None
        return project_queries(
            hidden, q_weight, q_bias, cos, sin, index, count, norm_weight=q_norm_weight, norm_eps=q_norm_eps
        )

    if budget_score is None or rank_score is None:
        probes = probe_index(
            k[:, :, N - n :], num_recent=num_recent, num_random=num_random, seed=seed, token_mask=token_mask, k=k
        )
        budget_score, rank_score = probe_scores(
            queries(probes - (N - n)), k, probes, scale=scale, causal=causal, token_mask=token_mask, last_key=last_key
        )
    keep = torch.zeros(B, N, dtype=torch.bool, device=k.device) if keep_mask is None else keep_mask.clone()
    for b in range(B):
        real = _real_tokens(token_mask, b, N, k.device)
        keep[b, real[max(len(real) - keep_recent, 0) :]] = True
    index, count = select_tokens(
        budget_score,
        rank_score,
        tau=tau,
        ratio=ratio,
        min_tokens=min_tokens,
        keep_mask=keep,
        token_mask=token_mask,
        local_window=local_window,
        num_sinks=num_sinks,
        extra_mask=extra_mask,
        max_ratio=max_ratio,
    )
    rows, num_rows = index, count
    if every_row:
        rows = torch.arange(n, dtype=torch.int32, device=k.device).repeat(B, 1)
        num_rows = torch.full_like(count, n)
    out = sparse_attn(
        queries(rows, num_rows),
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
    if o_weight is not None:
        out = project_outputs(out.transpose(1, 2).flatten(2), o_weight, rows, num_rows)
    k_packed, v_packed = pack_kv(k, v, index, count) if pack else (k.new_empty(0), v.new_empty(0))
    return out, index, count, k_packed, v_packed


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
    """:func:`zipvl_layer` of queries, without packing (docs/ops.md, "zipvl_attn").

    Args:
        q: ``[B, Hq, n, D]``, of the last ``n`` tokens (``n < S`` under ``causal`` alone).
        k, v: ``[B, Hkv, S, D]``, of q's dtype.
        tau, ratio, min_tokens, keep_mask, token_mask, extra_mask, max_ratio: as in :func:`select_tokens`;
            ``accumulated`` is the budget score and ``normalized`` the rank score.
        num_recent, num_random, seed: as in :func:`probe_index`.
        keep_recent: so many last real tokens are selected whatever their scores.
        scale, causal, last_key: of probe scores and attention alike.
        all_queries: attend to ``T`` in every real row (the others are 0), not only in those of ``T``.
        local_window, num_sinks: of :func:`select_tokens` and :func:`sparse_attn` alike.

    Returns:
        ``out``: ``[B, Hq, n, D]`` as :func:`sparse_attn` returns it; ``index`` and ``count`` as :func:`select_tokens`.
    """
    out, index, count, _, _ = zipvl_layer(
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
    return out, index, count


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
    """:func:`zipvl_attn`, and the keys and values of ``T``: the ``drop`` cache (docs/ops.md, "zipvl_prefill").

    The arguments are :func:`zipvl_attn`'s.

    Returns:
        ``out``, ``index``, ``count`` as :func:`zipvl_attn`; ``k_packed``, ``v_packed`` as :func:`pack_kv`.
    """
    return zipvl_layer(
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
        pack=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def decode_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token to the first ``lengths[b]`` slots of each row's cache (docs/ops.md, "decode_attn").

    Args:
        q: ``[B, Hq, 1, D]``.
        k_cache, v_cache: ``[B, Hkv, S, D]``, of q's dtype; slots at and after ``lengths[b]`` are not read.
        lengths: ``[B]`` int32, clamped to ``[0, S]``.
        scale: of the logits; None: ``D ** -0.5``.

    Returns:
        ``out``: ``[B, Hq, 1, D]`` of q's dtype, 0 where the length is 0; ``lse``: ``[B, Hq, 1]`` float32 (float64 for
        float64 inputs), the natural logarithm of the softmax's denominator, ``-inf`` where the length is 0.
    """
    B, Hq, _, D = q.shape
    Hkv, S = k_cache.shape[1:3]
    assert q.shape[2] == 1 and k_cache.shape == v_cache.shape == (B, Hkv, S, D) and Hq % Hkv == 0
    assert lengths.shape == (B,)
    dtype = _compute_dtype(q)
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, 1, Hq, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.full((B, Hq, 1), -math.inf, dtype=dtype, device=q.device)
    for b in range(B):
        length = _clamped(lengths[b], S)
        if length == 0:
            continue
        for h in range(Hq):
            keys = k_cache[b, h // (Hq // Hkv), :length].to(dtype)
            values = v_cache[b, h // (Hq // Hkv), :length].to(dtype)
            logits = scale * (q[b, h].to(dtype) @ keys.T)
            out[b, h] = (logits.softmax(dim=-1) @ values).to(q.dtype)
            lse[b, h] = logits.logsumexp(dim=-1)
    return out, lse


# ---------------------------------------------------------------------------------------------------------------------
# The projections around the layer, for chosen tokens alone
# ---------------------------------------------------------------------------------------------------------------------


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
    """Queries of chosen tokens: linear layer, RMS norm of each head (Qwen3), rotary embedding.

    docs/ops.md, "project_queries".

    Args:
        x: ``[B, N, C]``.
        weight, bias: ``[Hq * D, C]``, ``[Hq * D]``.
        cos, sin: ``[B, N, D]`` or ``[1, N, D]``.
        index: ``[B, M]`` int32; entries outside ``[0, N)`` are skipped.
        count: ``[B]`` int32, clamped to ``[0, M]``: how many places of ``index`` count; None: all.
        norm_weight, norm_eps: ``[D]`` and the epsilon of the norm; None: no norm.

    Returns:
        ``[B, Hq, N, D]``; tokens that are not chosen are NaN here and anything in the op.
    """
    B, N, C = x.shape
    D = cos.shape[2]
    H = weight.shape[0] // D
    assert weight.shape == (H * D, C) and cos.shape == sin.shape and index.shape[0] == B
    q = x.new_full((B, N, H, D), math.nan)
    for b in range(B):
        places = index.shape[1] if count is None else _clamped(count[b], index.shape[1])
        T = _valid_positions(index[b, :places], N)
        rows = torch.nn.functional.linear(x[b, T], weight, bias).view(-1, H, D)
        if norm_weight is not None:
            wide = rows.to(_compute_dtype(x))
            rows = norm_weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + norm_eps).rsqrt()).to(x.dtype)
        c, s = (table[b % table.shape[0], T, None] for table in (cos, sin))
        low, high = rows.chunk(2, dim=-1)
        q[b, T] = rows * c + torch.cat((-high, low), dim=-1) * s
    return q.transpose(1, 2)


def project_outputs(x: Tensor, weight: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The output projection of chosen tokens (docs/ops.md, "project_outputs").

    Args:
        x: ``[B, N, C]``; rows that are not chosen are not looked at.
        weight: ``[O, C]``; there is no bias, which those rows would need.
        index, count: ``[B, M]``, ``[B]`` int32, as in :func:`project_queries`.

    Returns:
        ``[B, N, O]``, 0 for tokens that are not chosen.
    """
    B, N, C = x.shape
    assert weight.shape[1] == C and index.shape[0] == B
    out = x.new_zeros(B, N, weight.shape[0])
    for b in range(B):
        T = _valid_positions(index[b, : _clamped(count[b], index.shape[1])], N)
        out[b, T] = x[b, T] @ weight.T
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Shared
# ---------------------------------------------------------------------------------------------------------------------


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _real_tokens(token_mask: Tensor | None, b: int, N: int, device: torch.device) -> Tensor:
    """Positions, ascending, of row ``b``'s real tokens: ``[real tokens]`` int64."""
    if token_mask is None:
        return torch.arange(N, device=device)
    return token_mask[b].nonzero()[:, 0]


def _valid_positions(index: Tensor, N: int) -> Tensor:
    """``index`` without its entries outside ``[0, N)``: int64."""
    index = index.long()
    return index[(index >= 0) & (index < N)]


def _row_ends(n: int, S: int, causal: bool, last_key: Tensor | None, B: int, device: torch.device) -> Tensor:
    """``[B, n]`` int64: the last position that each query row sees, -1 where it sees none (docs/ops.md, step 5d)."""
    assert causal or last_key is None
    if last_key is not None:
        assert last_key.shape == (B, n)
        return last_key.long().clamp(-1, S - 1)
    if causal:
        return torch.arange(S - n, S, device=device).repeat(B, 1)
    return torch.full((B, n), S - 1, device=device)


def _clamped(count: Tensor, limit: int) -> int:
    """One device-side count as an int in ``[0, limit]``."""
    return min(max(int(count), 0), limit)


def _masked_softmax(logits: Tensor, may_attend: Tensor) -> Tensor:
    """Softmax over each row's allowed entries; the others, and rows that have none, are 0. Both ``[rows, keys]``."""
    weights = logits.masked_fill(~may_attend, -math.inf).softmax(dim=-1)
    return weights.masked_fill(~may_attend, 0.0)
