"""The tokens that a ``drop`` cache stores under a budget of its own (``ZipVLConfig.cache_ratio``), whatever prefill
attends to.

Decoded tokens look where the prompt's last tokens look, more than where tokens drawn from all of it do. So those are
stored that the most recent queries look at, the same number in every layer (docs/ops.md, step 6b).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from zipvl import ops
from zipvl.config import ZipVLConfig
from zipvl.ranks import OverRanks

WINDOW_SHARE = 0.75
"""The share of a budget that the last tokens of a window may take."""


class Tokens(Protocol):
    """Keys ``[B, Hkv, S, D]``, and which of them are real, ``[B, S]``, or None: all."""

    @property
    def keys(self) -> Tensor: ...

    @property
    def token_mask(self) -> Tensor | None: ...


def first_stored(
    config: ZipVLConfig,
    like: Tensor,
    new: int | None,
    token_mask: Tensor | None,
    whole: Tensor | None,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The tokens that are stored before any score is looked at, and those that there are to choose from.

    Args:
        like: ``[B, H, S, D]``, gives sizes and the device.
        new: how many last tokens there are to choose from, those before them being stored already; None: all.
        token_mask: ``[B, S]`` or None: all real.
        whole: ``[B, S]``, the tokens of rows that keep them all, or None.
        extra: ``[B, S]``, text that is kept, or None.

    Returns:
        ``[B, S]`` bool: sinks, the last tokens (those of the window within ``WINDOW_SHARE`` of the budget, and
        ``keep_recent``), ``whole`` and ``extra``. And ``[B, S]`` bool: the real tokens to choose from; None: all.
    """
    assert config.cache_ratio is not None
    batch, _, tokens, _ = like.shape
    real = like.new_ones(batch, tokens, dtype=torch.bool) if token_mask is None else token_mask
    own = real if new is None else real & (torch.arange(tokens, device=like.device) >= tokens - new)
    behind = own.flip(1).cumsum(1).flip(1)
    room = own.sum(1, keepdim=True).double() * (config.cache_ratio * WINDOW_SHARE)
    last = (behind <= config.local_window) & (behind <= room) | (behind <= config.keep_recent)
    keep = own & (last | (real.cumsum(1) <= config.sinks))
    for more in (whole, extra):
        if more is not None:
            keep = keep | more
    return keep, None if token_mask is None and new is None else own


def select(
    config: ZipVLConfig,
    query: Tensor | None,
    tokens: Tokens,
    keep: Tensor,
    own: Tensor | None,
    scaling: float | None,
    over_ranks: OverRanks | None = None,
    last_key: Tensor | None = None,
    **projections: Any,
) -> tuple[Tensor, Tensor]:
    """The tokens to store: those of ``keep``, then by the score that the ``num_recent`` last queries give.

    Args:
        query: ``[B, Hq, n, D]``, of the last ``n`` tokens, or None: ``projections`` (keywords of ``ops.zipvl_layer``)
            hold hidden states and the query projection.
        keep, own: what ``first_stored`` gave.
        scaling: factor of the scores; None: ``D ** -0.5``.
        last_key: ``[B, n]``, the last token that each query sees; None: itself.
        over_ranks: where processes have some of the heads each; None: there is one.

    Returns:
        ``index [B, S]`` and ``count [B]``, as of ``ops.select_tokens``.
    """
    keys, mask = tokens.keys, tokens.token_mask
    recent: dict[str, Any] = {"num_recent": config.num_recent, "num_random": 0, "token_mask": mask}
    if query is None:  # a prompt, never a chunk: as many queries as keys
        probes = ops.probe_index(keys, **recent)
        query = ops.project_queries(
            projections["hidden"],
            projections["q_weight"],
            projections["q_bias"],
            projections["cos"],
            projections["sin"],
            probes,
            norm_weight=projections.get("q_norm_weight"),
            norm_eps=projections.get("q_norm_eps", 1e-6),
        )
    else:
        probes = ops.probe_index(query, k=keys, **recent)
    _, score = ops.probe_scores(query, keys, probes, scale=scaling, token_mask=mask, last_key=last_key)
    score = score if over_ranks is None else over_ranks(score)
    return ops.select_tokens(
        score, score, ratio=config.cache_ratio, min_tokens=config.min_tokens, keep_mask=keep, token_mask=own
    )


def before(tokens: Tokens, new: int) -> Tensor | int:
    """How many tokens of each row stand before the last ``new``: ``[B]``, or one number for all."""
    mask, earlier = tokens.token_mask, tokens.keys.shape[2] - new
    return earlier if mask is None else mask[:, :earlier].sum(-1)
