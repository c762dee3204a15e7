"""Heads spread over processes: each selects by the mean of all their probe scores, so all select the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from zipvl import ops
from zipvl.config import ZipVLConfig

OverRanks: TypeAlias = Callable[[Tensor], Tensor]
"""Gives the mean of a tensor of scores over the processes that have some of the heads each."""


def scores(
    config: ZipVLConfig,
    query: Tensor,
    key: Tensor,
    over_ranks: OverRanks,
    scale: float | None,
    token_mask: Tensor | None = None,
    last_key: Tensor | None = None,
) -> dict[str, Tensor]:
    """The scores of a layer whose heads are spread over processes, which have as many query heads each.

    Args:
        query: ``[B, Hq, n, D]``, this process's heads of the last ``n`` tokens.
        key: ``[B, Hkv, S, D]``, of this process's heads.
        over_ranks: makes one exchange, of ``[2, B, S]`` float32.
        scale: factor of the scores; None: ``D ** -0.5``.
        token_mask: ``[B, S]`` bool or None: all real.
        last_key: ``[B, n]`` int32, the last token that each query sees; None: itself.

    Returns:
        ``budget_score`` and ``rank_score``, ``[B, S]`` float32, keywords of ``ops.zipvl_layer``: the same in every
        process, and up to rounding those of one process with all heads.
    """
    draw = {"num_recent": config.num_recent, "num_random": config.num_random, "seed": config.seed}
    probes = ops.probe_index(query, k=key, token_mask=token_mask, **draw)
    both = ops.probe_scores(query, key, probes, scale=scale, token_mask=token_mask, last_key=last_key)
    budget_score, rank_score = over_ranks(torch.stack(both))
    return {"budget_score": budget_score, "rank_score": rank_score}
