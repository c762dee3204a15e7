"""Keys and values of one layer, each batch row packed at its own length."""

from __future__ import annotations

import torch

from zipvl import ops

_SMALLEST_GROWTH = 64  # slots; small enough not to matter, large enough that a decode step seldom copies


def _longest(count: torch.Tensor) -> int:
    """The largest of ``count [B]`` as a host number: on CUDA this is the one host read of a layer's prefill."""
    return int(count.max()) if count.numel() else 0


def _grown(storage: torch.Tensor, slots: int) -> torch.Tensor:
    """``storage [B, H, C, D]`` copied into ``slots`` slots, the new ones zero."""
    batch, heads, used, dim = storage.shape
    grown = storage.new_zeros(batch, heads, slots, dim)
    grown[:, :, :used] = storage
    return grown


def _real_first(token_mask: torch.Tensor) -> torch.Tensor:
    """Positions of ``token_mask [B, N]``, the real ones first, each part in ascending order. ``[B, N]`` int64."""
    return torch.argsort(token_mask, dim=-1, descending=True, stable=True)


def _gather(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``states [B, H, N, D]`` with the tokens of each row in ``order [B, M]``."""
    batch, heads, _, dim = states.shape
    return states.gather(2, order[:, None, :, None].expand(batch, heads, order.shape[1], dim))


class RaggedKV:
    """``keys [B, Hkv, C, D]`` and ``values [B, Hkv, C, Dv]``; row ``b`` holds tokens in slots ``[0, lengths[b])``.

    Slots beyond a row's length hold finite leftovers and are never attended to. ``longest`` is a host number that no
    length exceeds, so that nothing has to be read back from the device to grow or to slice the storage.

    Args:
        keys, values: the storage; not shared with anything else.
        lengths: ``[B]`` int32, on the device of ``keys``.
        longest: an upper bound of ``lengths``.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, longest: int) -> None:
        self.keys, self.values, self.lengths, self.longest = keys, values, lengths, longest
        self.tail = 0
        """How many last tokens every row holds, appended after the prompt: what ``crop`` may remove."""

    @classmethod
    def selected(cls, k: torch.Tensor, v: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> RaggedKV:
        """The tokens of ``index [B, N]``, ``count [B]`` out of ``k``, ``v [B, Hkv, N, D]`` (what ``drop`` keeps)."""
        longest = _longest(count)
        packed = (states[:, :, :longest] for states in ops.pack_kv(k, v, index, count))
        unused = torch.arange(longest, device=k.device) >= count[:, None]
        keys, values = (states.masked_fill(unused[:, None, :, None], 0) for states in packed)
        return cls(keys, values, count.to(torch.int32), longest)

    @classmethod
    def real(cls, k: torch.Tensor, v: torch.Tensor, token_mask: torch.Tensor | None) -> RaggedKV:
        """Every real token of ``k``, ``v [B, Hkv, N, D]`` (what ``full`` keeps); ``token_mask [B, N]`` or None: all."""
        batch, _, tokens, _ = k.shape
        if token_mask is None:
            lengths = torch.full((batch,), tokens, dtype=torch.int32, device=k.device)
            keys, values = (states.clone(memory_format=torch.contiguous_format) for states in (k, v))
            return cls(keys, values, lengths, tokens)
        lengths = token_mask.sum(-1, dtype=torch.int32)
        longest = _longest(lengths)
        order = _real_first(token_mask)[:, :longest]
        return cls(_gather(k, order), _gather(v, order), lengths, longest)

    def append(self, k: torch.Tensor, v: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """Adds the real tokens of ``k``, ``v [B, Hkv, n, D]`` behind each row; ``token_mask [B, n]`` or None: all."""
        new = k.shape[2]
        if self.longest + new > self.keys.shape[2]:
            slots = self.longest + new + max(_SMALLEST_GROWTH, self.longest // 16)
            self.keys, self.values = _grown(self.keys, slots), _grown(self.values, slots)
        if token_mask is None:
            added: torch.Tensor | int = new
            self.tail += new
        else:
            added = token_mask.sum(-1, dtype=torch.int32)
            self.tail = 0
            if new > 1:
                order = _real_first(token_mask)
                k, v = _gather(k, order), _gather(v, order)
        slot = self.lengths[:, None].to(torch.int64) + torch.arange(new, device=k.device)
        for storage, states in ((self.keys, k), (self.values, v)):
            storage.scatter_(2, slot[:, None, :, None].expand(states.shape), states)
        self.lengths = self.lengths + added
        self.longest += new

    def visible(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys`` and ``values`` up to the longest row, as views ``[B, Hkv, longest, D]``."""
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def valid(self) -> torch.Tensor:
        """``[B, longest]`` bool: which of the visible slots hold a token."""
        return torch.arange(self.longest, device=self.keys.device) < self.lengths[:, None]

    def crop(self, tokens: int) -> None:
        """Forgets the last ``tokens`` tokens of every row; at most ``tail``."""
        self.lengths = self.lengths - tokens
        self.longest -= tokens
        self.tail -= tokens

    def take_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``i`` what row ``rows[i]`` was; ``rows`` may repeat, reorder or leave out."""
        rows = rows.to(self.keys.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(-1)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.lengths = self.lengths.index_select(0, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the storage takes, unused slots included."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()
