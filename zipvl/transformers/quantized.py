"""Keys and values of one layer at few bits, and the newest at full precision."""

from __future__ import annotations

from typing import Any

import torch

from zipvl import ops
from zipvl.config import ZipVLConfig
from zipvl.transformers.storage import RaggedKV, gather_tokens, grown, is_exact, is_frozen, write_at

WINDOW = 100  # new tokens at full precision; when they are so many they are compressed (ZipCache's interval)
BLOCK_TOKENS = 64  # of ``csrc/common/quantized_block.h``
PROBES = 16  # latest of them whose queries are kept, to score them all when they are compressed
_QUERIES_AT_ONCE = 16  # of several new tokens, against the quantised cache: they stand in a query's heads


class Segment:
    """Blocks of up to 64 tokens at one number of bits, ``packed [B, Hkv, M, bytes]`` uint8 as ``quantize_kv`` makes
    them; row ``b`` has blocks in ``[0, blocks[b])``.

    Args:
        packed: the storage; not shared with anything else.
        blocks: ``[B]`` int32, changed in place, so that a CUDA graph sees it.
    """

    def __init__(self, packed: torch.Tensor, blocks: torch.Tensor) -> None:
        self.packed, self.blocks = packed, blocks
        self.longest = packed.shape[2]
        """A host number that no row's blocks exceed."""
        if is_exact(packed):
            self.trim(_most(blocks), room=0)

    def trim(self, longest: int, room: int | None = None) -> None:
        """Moves the blocks, ``longest`` in the longest row, to storage of that many places and ``room`` for more."""
        places = self.packed.shape[2]
        room = places // 64 if room is None else room
        self.longest = longest
        if longest + room < places:
            self.packed = self.packed[:, :, : longest + room].clone(memory_format=torch.contiguous_format)

    def reserve(self, blocks: int) -> None:
        """Makes room for ``blocks`` more."""
        if self.longest + blocks > self.packed.shape[2]:
            self.packed = grown(self.packed, self.longest + blocks)

    def append(self, packed: torch.Tensor, blocks: torch.Tensor) -> None:
        """Adds the first ``blocks [B]`` of ``packed [B, Hkv, m, bytes]`` behind each row."""
        more = packed.shape[2]
        if self.longest + more > self.packed.shape[2]:
            self.reserve(more + self.longest // 16)
        place = self.blocks[:, None].to(torch.int64) + torch.arange(more, device=packed.device)
        write_at(self.packed, place, packed)
        self.blocks.add_(blocks)
        self.longest = _most(self.blocks) if is_exact(packed) else self.longest + more

    def thaw(self) -> None:
        """As ``RaggedKV.thaw``."""
        if is_frozen(self.packed):
            self.packed, self.blocks = self.packed.clone(), self.blocks.clone()

    def take_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``i`` what row ``rows[i]`` was."""
        self.packed, self.blocks = self.packed.index_select(0, rows), self.blocks.index_select(0, rows)


def blocks_of(tokens: int) -> int:
    """How many blocks ``tokens`` tokens take at most."""
    return -(-tokens // BLOCK_TOKENS)


def _most(blocks: torch.Tensor) -> int:
    return int(blocks.max()) if blocks.numel() else 0


class RecentQueries:
    """The queries of each row's latest ``PROBES`` tokens in the window.

    ``queries [B, Hq, PROBES, D]``, and ``positions [B, PROBES]`` int32: the slot of the window that the token has. The
    token of slot ``s`` stands in place ``s % PROBES``, so a step needs nothing from the host.
    """

    def __init__(self, like: torch.Tensor) -> None:
        batch, heads, _, dim = like.shape
        self.queries = like.new_zeros(batch, heads, PROBES, dim)
        self.positions = torch.full((batch, PROBES), -1, dtype=torch.int32, device=like.device)

    def put(self, queries: torch.Tensor, slots: torch.Tensor, added: torch.Tensor | int) -> None:
        """Takes the latest of ``queries [B, Hq, n, D]``, which go to ``slots [B, n]``; the first ``added`` are real."""
        count = min(PROBES, queries.shape[2])
        if queries.shape[2] > 1:
            column = torch.arange(count, device=queries.device).expand(queries.shape[0], -1)
            if isinstance(added, int):
                column = column + max(added - count, 0)
            else:
                column = column + (added - count).clamp(min=0)[:, None]
            slots = slots.gather(1, column)
            queries = queries.gather(2, column[:, None, :, None].expand(*queries.shape[:2], count, queries.shape[3]))
        place = slots % PROBES
        write_at(self.queries, place, queries)
        self.positions.scatter_(1, place, slots.to(torch.int32))

    def probes(self, lengths: torch.Tensor, slots: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``probe_scores`` takes them, for ``slots`` slots of the window from slot ``first`` on. Of the window's
        slots those before ``lengths [B]`` are in use.

        Returns:
            ``q [B, Hq, slots, D]``, 0 where no query is known; ``probe_index [B, PROBES]``, ascending, ``slots`` (out
            of range: skipped) where there is none.
        """
        batch, heads, _, dim = self.queries.shape
        known = (self.positions >= first) & (self.positions < lengths[:, None])
        place = (self.positions - first).masked_fill(~known, slots).to(torch.int64)
        spread = self.queries.new_zeros(batch, heads, slots + 1, dim)
        spread.scatter_(2, place[:, None, :, None].expand(self.queries.shape), self.queries)
        return spread[:, :, :slots], place.sort(-1).values.to(torch.int32)

    def thaw(self) -> None:
        """As ``RaggedKV.thaw``."""
        if is_frozen(self.queries):
            self.queries, self.positions = self.queries.clone(), self.positions.clone()

    def take_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``i`` what row ``rows[i]`` was."""
        self.queries, self.positions = self.queries.index_select(0, rows), self.positions.index_select(0, rows)


class QuantizedKV:
    """The prompt's selected tokens at ``high_bits`` and its other ones at ``low_bits``, new tokens at full precision.

    When ``WINDOW`` new tokens are there they are compressed in the same way, by a selection of their own: the latest
    ``PROBES`` of them are the probes, ``tau`` or ``ratio`` is the prompt's, and attention mass is counted among them
    alone. Values keep the channel factors of the prompt.

    The first ``num_sinks`` real tokens of a row stand at full precision in the first slots of its window, and are never
    compressed.

    Args:
        k, v: ``[B, Hkv, N, D]``, the prompt.
        index, count: ``[B, N]`` and ``[B]``, its selected tokens.
        token_mask: ``[B, N]`` or None: all are real.
        query_heads: ``Hq``.
        config: bits, sinks, and the selection of new tokens.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        count: torch.Tensor,
        token_mask: torch.Tensor | None,
        query_heads: int,
        config: ZipVLConfig,
    ) -> None:
        self.config = config
        self.sinks = config.num_sinks
        self.window = self._empty_window(k, v)
        if self.sinks > 0 and k.shape[2] > 0:
            index, count, token_mask = self._take_sinks(k, v, index, count, token_mask)
        self._bits: dict[str, Any] = {"high_bits": config.high_bits, "low_bits": config.low_bits}
        high, high_blocks, low, low_blocks, self.v_factor = ops.quantize_kv(
            k, v, index, count, **self._bits, token_mask=token_mask
        )
        self.high, self.low = Segment(high, high_blocks), Segment(low, low_blocks)
        self.scale: float | None = None
        self.recent = RecentQueries(k.new_empty(k.shape[0], query_heads, 0, k.shape[3]))

    def _empty_window(self, k: torch.Tensor, v: torch.Tensor) -> RaggedKV:
        batch, heads, tokens, dim = k.shape
        lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
        slots = min(self.sinks, tokens) + WINDOW  # a longer window grows as it is filled
        return RaggedKV(k.new_zeros(batch, heads, slots, dim), v.new_zeros(batch, heads, slots, dim), lengths, 0)

    def _take_sinks(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        count: torch.Tensor,
        token_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Puts the prompt's sinks in the window, and returns ``index``, ``count`` and ``token_mask [B, N]`` without
        them."""
        batch, tokens = index.shape
        ordinals = torch.arange(min(self.sinks, tokens), device=k.device).expand(batch, -1)
        if token_mask is None:
            place = ordinals
        else:
            place = torch.searchsorted(token_mask.cumsum(-1), ordinals + 1)  # tokens: the row has fewer
        there = place < tokens
        source = place.clamp(max=tokens - 1)
        sinks = [gather_tokens(states, source).masked_fill(~there[:, None, :, None], 0) for states in (k, v)]
        self.window.append(sinks[0], sinks[1], there)
        last, position = place[:, -1:], torch.arange(tokens, device=k.device)
        real = position > last if token_mask is None else token_mask & (position > last)
        # The selection is ascending: the sinks in it are its first entries.
        taken = ((index <= last) & (position < count[:, None])).sum(-1, dtype=count.dtype)
        return index.gather(1, (position + taken[:, None]).clamp(max=tokens - 1)), count - taken, real

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of new keys, values and queries."""
        return self.window.dtype

    @property
    def longest(self) -> int:
        """A host number that no row's tokens at full precision exceed."""
        return self.window.longest

    @property
    def tail(self) -> int:
        """How many last tokens ``crop`` may remove: those added since the last compression."""
        return self.window.tail

    def counts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that have to reach the host before ``trim``."""
        return self.high.blocks, self.low.blocks

    def trim(self, high: int, low: int) -> None:
        """Moves the prompt's blocks to storage of their true size."""
        self.high.trim(high)
        self.low.trim(low)

    def clear(self) -> None:
        """Nothing: unused blocks are not read."""

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        token_mask: torch.Tensor | None,
        queries: torch.Tensor,
        scale: float | None,
    ) -> None:
        """Adds the real tokens of ``k``, ``v [B, Hkv, n, D]``, ``queries [B, Hq, n, D]``; ``token_mask [B, n]`` or
        None: all. ``scale`` is the factor of their scores."""
        self.scale = scale
        self.make_room(k.shape[2])
        if token_mask is not None:
            queries = RaggedKV.real_first(queries, token_mask)
        slots = self.window.lengths[:, None].to(torch.int64) + torch.arange(k.shape[2], device=k.device)
        self.recent.put(queries, slots, k.shape[2] if token_mask is None else token_mask.sum(-1))
        self.window.append(k, v, token_mask)

    def make_room(self, tokens: int) -> None:
        """Compresses the window if ``tokens`` more do not fit into it."""
        if self.window.longest > self.sinks and self.window.longest - self.sinks + tokens > WINDOW:
            self._compress()

    def _compress(self) -> None:
        k, v = (states[:, :, self.sinks :] for states in self.window.visible())
        valid = self.window.valid()[:, self.sinks :]
        q, probes = self.recent.probes(self.window.lengths, k.shape[2], self.sinks)
        accumulated, normalized = ops.probe_scores(q, k, probes, scale=self.scale, token_mask=valid)
        settings = self.config.attention_kwargs()
        kept = {name: settings[name] for name in ("tau", "ratio", "min_tokens")}
        index, count = ops.select_tokens(accumulated, normalized, **kept, token_mask=valid)
        high, high_blocks, low, low_blocks, _ = ops.quantize_kv(
            k, v, index, count, **self._bits, v_factor=self.v_factor, token_mask=valid
        )
        most = blocks_of(k.shape[2])
        self.high.append(high[:, :, :most], high_blocks)
        self.low.append(low[:, :, :most], low_blocks)
        self.window.keep_first(self.sinks)
        if self.window.keys.shape[2] > self.sinks + WINDOW:
            self.window.trim(self.sinks, room=WINDOW)
        self.recent.positions.fill_(-1)

    def attend(self, query: torch.Tensor, scale: float | None) -> torch.Tensor:
        """One new token, already appended, against everything: ``query [B, Hq, 1, D]``; returns the same shape."""
        window = self.window
        out, _ = ops.decode_attn_quantized(
            query,
            self.high.packed,
            self.high.blocks,
            self.low.packed,
            self.low.blocks,
            self.v_factor,
            **self._bits,
            k_recent=window.keys,
            v_recent=window.values,
            recent_lengths=window.lengths,
            scale=scale,
        )
        return out

    def attend_several(self, query: torch.Tensor, unseen: torch.Tensor, scale: float | None) -> torch.Tensor:
        """The last tokens, already appended without a compression in between, against everything kept.

        Args:
            query: ``[B, Hq, n, D]``.
            unseen: ``[B, n]``, how many of the last tokens of its row each of them does not see.

        Returns:
            ``[B, Hq, n, D]``.
        """
        factor = query.shape[3] ** -0.5 if scale is None else scale
        keys, values = (states.float() for states in self.window.visible())
        new, heads, groups = query.shape[2], keys.shape[1], query.shape[1] // keys.shape[1]
        seen = self.window.seen(unseen)
        outputs = []
        for start in range(0, new, _QUERIES_AT_ONCE):
            part = query[:, :, start : start + _QUERIES_AT_ONCE]
            past, past_lse = self._past(part, scale)
            may = seen[:, :, start : start + _QUERIES_AT_ONCE]
            grouped = part.float().unflatten(1, (heads, groups)).flatten(2, 3)
            scores = (grouped @ keys.mT * factor).unflatten(2, (groups, -1)).flatten(1, 2)
            scores = scores.masked_fill(~may, -torch.inf)
            lse = torch.logaddexp(past_lse, scores.logsumexp(-1))
            lse = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]  # a padding token behind nothing: all weights 0
            weights = (scores - lse).exp().unflatten(1, (heads, groups)).flatten(2, 3)
            own = (weights @ values).unflatten(2, (groups, -1)).flatten(1, 2)
            outputs.append(own + (past_lse[..., None] - lse).exp() * past)
        return torch.cat(outputs, dim=2).to(query.dtype)

    def _past(self, query: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``query [B, Hq, n, D]`` against the quantised tokens; ``out`` float32 of that shape and ``lse [B, Hq, n]``.

        Every one of the new tokens may attend to every one of these, so they can stand beside each other as heads.
        """
        batch, heads, new, dim = query.shape
        out, lse = ops.decode_attn_quantized(
            query.reshape(batch, heads * new, 1, dim),
            self.high.packed,
            self.high.blocks,
            self.low.packed,
            self.low.blocks,
            self.v_factor,
            **self._bits,
            scale=scale,
        )
        return out.reshape(batch, heads, new, dim).float(), lse.reshape(batch, heads, new)

    def thaw(self) -> None:
        """As ``RaggedKV.thaw``."""
        for part in (self.high, self.low, self.window, self.recent):
            part.thaw()

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more, compressed ones included, so that steps can be captured in a CUDA graph."""
        self.window.reserve(max(min(tokens, self.sinks + WINDOW - self.window.longest), 0))
        compressions = tokens // WINDOW + 1
        for segment in (self.high, self.low):
            segment.reserve(compressions * blocks_of(WINDOW))

    def advance(self, tokens: int) -> None:
        """Notes ``tokens`` that a replayed CUDA graph appended to every row; fewer than none: takes them back."""
        self.window.advance(tokens)

    def crop(self, tokens: int) -> None:
        """Forgets the last ``tokens`` tokens of every row; at most ``tail``."""
        self.window.crop(tokens)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``i`` what row ``rows[i]`` was; ``rows`` may repeat, reorder or leave out."""
        rows = rows.to(self.v_factor.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(-1)
        self.v_factor = self.v_factor.index_select(0, rows)
        for part in (self.high, self.low, self.window, self.recent):
            part.take_rows(rows)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything held."""
        segments = (self.high.packed, self.high.blocks, self.low.packed, self.low.blocks, self.v_factor)
        return (*segments, *self.window.tensors(), self.recent.queries, self.recent.positions)

    def token_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at full precision, whatever their number: what a token would take."""
        return self.window.token_states()
