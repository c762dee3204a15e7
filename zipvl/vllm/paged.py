"""Lengths that differ by layer inside one paged cache: arithmetic on tensors, the same eagerly and in a CUDA graph.

A request is known by its first block, which no other living request has. ``dropped[layer, first block]`` is how many of
the request's tokens the layer did not keep; so a layer holds ``seen - dropped`` tokens of a row, and a new token goes
to the slot behind them. Nothing here reads a value of the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipvl import ops


def views(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[blocks, block_size, Hkv, D]`` of a layer's cache ``[blocks, Hkv, block_size, 2 * D]``."""
    k_cache, v_cache = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return k_cache, v_cache


def gather(kv_cache: Tensor, head_size: int, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, Hkv, tokens, D]`` of the first ``tokens`` slots in ``blocks`` (int32)."""
    caches = views(kv_cache, head_size)
    used = blocks[: -(-tokens // caches[0].shape[1])].long()
    k, v = (cache.index_select(0, used).flatten(0, 1)[:tokens].transpose(0, 1)[None] for cache in caches)
    return k, v


class Lengths:
    """What the layers of one cache group dropped of each request.

    Args:
        layers, blocks: of the group.
        rows: the most that a step has. Steps of one token a row find lengths and places at fixed addresses, where
            captured graphs read them.
    """

    def __init__(self, layers: int, blocks: int, rows: int, device: torch.device | str) -> None:
        self.dropped = torch.zeros(layers, blocks, dtype=torch.int32, device=device)
        self._static = torch.zeros(2, layers, rows, dtype=torch.int32, device=device)

    def forget(self, first_blocks: Tensor) -> None:
        """Requests that begin have dropped nothing yet. ``first_blocks``: integers ``[requests]``."""
        self.dropped.index_fill_(1, first_blocks.long(), 0)

    def drop(self, layer: int, first_block: Tensor, seen: int, stored: Tensor) -> None:
        """A prompt of ``seen`` tokens stored ``stored`` (int32 ``[1]``) of them. ``first_block``: integer ``[1]``."""
        self.dropped[layer].index_copy_(0, first_block.long(), seen - stored)

    def locate(
        self, table: Tensor, seen: Tensor, begins: Tensor, max_query_len: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """For all layers at once what each row holds, and where its new tokens go.

        Args:
            table: int32 ``[rows, blocks of a row]``.
            seen: int32 ``[rows]``, tokens of each request, new ones included; 0 in rows of padding.
            begins: int32 ``[rows + 1]``, where each row's new tokens begin in the step.
            max_query_len, tokens: the most new tokens of a row, and those of all rows.

        Returns:
            ``lengths`` int32 ``[layers, rows]``, new tokens included, and ``places`` int32 ``[layers, tokens]``, the
            slot of each new token within its row; negative: none.
        """
        gone = self.dropped.index_select(1, table[:, 0].long())
        if max_query_len == 1 and len(seen) <= self._static.shape[2]:
            lengths, places = self._static[:, :, : len(seen)]
            torch.sub(seen, gone, out=lengths)
            torch.sub(lengths, 1, out=places)
            return lengths, places
        lengths = seen - gone
        counts = begins.diff()
        row_of = _row_of(counts, tokens)
        first = lengths - counts - begins[:-1]
        step = torch.arange(tokens, dtype=torch.int32, device=begins.device)
        return lengths, first.index_select(1, row_of) + step


def store(
    key: Tensor, value: Tensor, index: Tensor, count: Tensor, table: Tensor, kv_cache: Tensor, capacity: Tensor
) -> Tensor:
    """Writes the selected tokens of a prompt to the front of its blocks.

    Args:
        key, value: ``[tokens, Hkv, D]``; index, count: of their selection, ``[1, tokens]`` and ``[1]``.
        table: int32 ``[1, blocks of a row]``; capacity: int32 ``[1]``, the slots that it may fill.

    Returns:
        int32 ``[1]``, how many it stored.
    """
    k, v = (states.transpose(0, 1).unsqueeze(0) for states in (key, value))
    return ops.pack_paged(k, v, index, count, table, *views(kv_cache, key.shape[2]), capacity=capacity)


def append(
    key: Tensor, value: Tensor, places: Tensor, table: Tensor, begins: Tensor, max_query_len: int, kv_cache: Tensor
) -> None:
    """Writes new tokens of a step to their places.

    Args:
        key, value: ``[tokens, Hkv, D]``; places: int32 ``[tokens]``, one layer's of :meth:`Lengths.locate`.
        table, begins, max_query_len: as there.
    """
    tokens = len(places)
    if max_query_len > 1:
        table = table.index_select(0, _row_of(begins.diff(), tokens))
    k, v = key[:tokens].unsqueeze(2), value[:tokens].unsqueeze(2)  # each token is a row of one token
    here, one = places.new_zeros(tokens, 1), places.new_ones(tokens)
    ops.pack_paged(k, v, here, one, table, *views(kv_cache, key.shape[2]), first_slot=places)


def _row_of(counts: Tensor, tokens: int) -> Tensor:
    rows = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=tokens)
