"""Keys and values of one layer, each batch row packed at its own length, and storage that is longer than its rows until
the host learns how long they are.

On CUDA a selection's count is known to the device alone. The packed keys and values of a layer therefore begin in
buffers of the prompt's length, while their counts travel to pinned memory behind the kernels that wrote them. By the
time the host has launched ``LAYERS_BEHIND`` further layers those counts have usually arrived, and the buffers are
replaced by ones of the right size. The host waits only if they have not: it is then that many layers ahead of the
device, which has work left, and memory is what would run out. So no more than ``LAYERS_BEHIND`` layers of a forward are
ever untrimmed, which is what keeps the peak of a prefill at or below that of a full cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zipvl import ops

_SMALLEST_GROWTH = 64  # slots; small enough not to matter, large enough that a decode step seldom copies
_ROOM_SHARE = 64  # of the prompt's slots, one in so many may be room for new tokens: 1.6%


def _growth(longest: int) -> int:
    """Slots to add to a storage of ``longest`` that is full."""
    return max(_SMALLEST_GROWTH, longest // 16)


def is_exact(tensor: torch.Tensor) -> bool:
    """Whether lengths beside ``tensor`` may be read: on the CPU, outside a graph that is being traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` may be written in place, for all that can be asked while a graph is traced."""
    return torch.compiler.is_compiling() or not is_frozen(tensor)


def is_frozen(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` was made under ``torch.inference_mode``, which has ended: it cannot be written in place."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def grown(storage: torch.Tensor, slots: int) -> torch.Tensor:
    """``storage [B, H, C, D]`` copied into ``slots`` slots, the new ones zero."""
    batch, heads, used, dim = storage.shape
    larger = storage.new_zeros(batch, heads, slots, dim)
    larger[:, :, :used] = storage
    return larger


def _real_first(token_mask: torch.Tensor) -> torch.Tensor:
    """Positions of ``token_mask [B, N]``, the real ones first, each part in ascending order. ``[B, N]`` int64."""
    return torch.argsort(token_mask, dim=-1, descending=True, stable=True)


def gather_tokens(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``states [B, H, N, D]`` with the tokens of each row in ``order [B, M]``."""
    batch, heads, _, dim = states.shape
    return states.gather(2, order[:, None, :, None].expand(batch, heads, order.shape[1], dim))


def write_at(held: torch.Tensor, places: torch.Tensor, states: torch.Tensor) -> None:
    """Writes ``states [B, H, n, D]`` to ``places [B, n]`` (int64, none twice) of ``held [B, H, N, D]``, in place."""
    if torch.compiler.is_compiling():  # Inductor copies all of ``held`` for a scatter, and nothing for this
        held[torch.arange(held.shape[0], device=held.device)[:, None], :, places] = states.transpose(1, 2)
    else:
        held.scatter_(2, places[:, None, :, None].expand(states.shape), states)


def packed_mask(mask: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """``mask [B, N]`` at the tokens ``order [B, M]`` of each row, false from ``count [B]`` on; ``[B, M]`` bool."""
    places = order.clamp(max=max(mask.shape[1] - 1, 0)).to(torch.int64)
    return mask.gather(1, places) & (torch.arange(order.shape[1], device=mask.device) < count[:, None])


class Tokens(NamedTuple):
    """Keys and values that a chunk attends to: the stored ones, and its own at the end."""

    keys: torch.Tensor
    """``[B, Hkv, S, D]``."""
    values: torch.Tensor
    """``[B, Hkv, S, Dv]``."""
    token_mask: torch.Tensor | None
    """``[B, S]`` bool: which places hold a token; None: all."""
    visual: torch.Tensor | None
    """``[B, S]`` bool: which tokens are visual; None: none."""


class RaggedKV:
    """``keys [B, Hkv, C, D]`` and ``values [B, Hkv, C, Dv]``; row ``b`` holds tokens in slots ``[0, lengths[b])``.

    Slots beyond a row's length hold finite leftovers and are never attended to. ``longest`` is a host number that no
    length exceeds, so that nothing has to be read back from the device to grow or to slice the storage.

    Args:
        keys, values: the storage; not shared with anything else, and written to.
        lengths: ``[B]`` int32, on the device of ``keys``; changed in place, so that a CUDA graph sees it.
        longest: an upper bound of ``lengths``.
        even: whether the host knows that every row holds ``longest`` tokens.
        visual: ``[B, V]`` bool, which slots hold a visual token: none beyond ``V``, nor beyond a row's length. None:
        none.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
        *,
        even: bool = False,
        visual: torch.Tensor | None = None,
    ) -> None:
        self.keys, self.values, self.lengths, self.longest = keys, values, lengths, longest
        self.even, self.visual = even, visual
        self.tail = 0
        """How many last tokens every row holds, appended after the prompt: what ``crop`` may remove."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys, values and the queries that attend to them."""
        return self.keys.dtype

    @classmethod
    def packed(
        cls, keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor, visual: torch.Tensor | None = None
    ) -> RaggedKV:
        """``keys``, ``values [B, Hkv, N, D]`` whose first ``count [B]`` tokens are kept ones, the others undefined.

        On the CPU the storage is trimmed to the longest row. Elsewhere, and while a graph is traced, it is taken as it
        is, and ``trim`` or ``clear`` has to be called before anything else is.
        """
        made = cls(keys, values, count.to(torch.int32, copy=True), keys.shape[2], visual=visual)
        if is_exact(keys):
            made.trim(int(count.max()) if count.numel() else 0, room=0)
        return made

    def trim(self, longest: int, room: int | None = None) -> None:
        """Moves the tokens, ``longest`` in the longest row, to storage of that many slots and ``room`` for more; by
        default as much as ``append`` would add, within a 64th of the slots there were."""
        slots = self.keys.shape[2]
        if room is None:
            room = min(slots // _ROOM_SHARE, _growth(longest))
        self.longest, self.even = longest, self.keys.shape[0] == 1
        if self.visual is not None and self.visual.shape[1] > longest:
            self.visual = self.visual[:, :longest].clone()
        self.clear(min(longest + room, slots))

    def clear(self, slots: int | None = None) -> None:
        """Zeroes the slots that hold no token; with fewer ``slots`` than there are, in storage of that many."""
        slots = self.keys.shape[2] if slots is None else slots
        unused = (torch.arange(slots, device=self.keys.device) >= self.lengths[:, None])[:, None, :, None]
        if slots == self.keys.shape[2] and is_writable(self.keys):
            self.keys.masked_fill_(unused, 0)
            self.values.masked_fill_(unused, 0)
        else:
            self.keys, self.values = (s[:, :, :slots].masked_fill(unused, 0) for s in (self.keys, self.values))

    @classmethod
    def cut(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        count: torch.Tensor,
        slots: int,
        visual: torch.Tensor | None = None,
    ) -> RaggedKV:
        """``packed`` in storage of ``slots``, by what the host knew before the counts were: nothing is read.

        A row that holds more becomes NaN. Every token of a row is selected where its scores are not finite, and what
        attends to those is not finite either.

        Not a method of the uncut storage: in a compiled graph what a constructor was given is a result, and in memory
        to the end, whatever its attribute has become since."""
        too_long = (count > slots)[:, None, None, None]
        unused = (torch.arange(slots, device=keys.device) >= count[:, None])[:, None, :, None]
        keys, values = (
            states[:, :, :slots].masked_fill(unused, 0).masked_fill(too_long, torch.nan) for states in (keys, values)
        )
        lengths = count.to(torch.int32).clamp(max=slots)
        return cls(keys, values, lengths, slots, visual=None if visual is None else visual[:, :slots])

    @classmethod
    def real(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        token_mask: torch.Tensor | None,
        visual: torch.Tensor | None = None,
        *,
        copy: bool = True,
    ) -> RaggedKV:
        """Every real token of ``k``, ``v [B, Hkv, N, D]`` (what ``full`` keeps); ``token_mask [B, N]`` or None: all.

        ``visual [B, N]`` are the visual ones, or None: none. Without ``copy``, ``k`` and ``v`` themselves become the
        storage where all are real.

        On CUDA ``longest`` stays ``N``: a prompt is as long as the longest row of its batch, so nothing is gained."""
        batch, _, tokens, _ = k.shape
        if token_mask is None:
            lengths = torch.full((batch,), tokens, dtype=torch.int32, device=k.device)
            if copy:
                k, v = (states.clone(memory_format=torch.contiguous_format) for states in (k, v))
            return cls(k, v, lengths, tokens, even=True, visual=visual)
        lengths = token_mask.sum(-1, dtype=torch.int32)
        longest = int(lengths.max()) if batch and is_exact(k) else tokens
        order = _real_first(token_mask)[:, :longest]
        visual = None if visual is None else packed_mask(visual, order, lengths)
        even = batch == 1 and is_exact(k)
        return cls(gather_tokens(k, order), gather_tokens(v, order), lengths, longest, even=even, visual=visual)

    @staticmethod
    def real_first(states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """``states [B, H, n, D]`` with the real tokens of each row in front, ``token_mask [B, n]``."""
        return states if states.shape[2] == 1 else gather_tokens(states, _real_first(token_mask))

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        token_mask: torch.Tensor | None,
        visual: torch.Tensor | None = None,
    ) -> None:
        """Adds the real tokens of ``k``, ``v [B, Hkv, n, D]`` behind each row; ``token_mask [B, n]`` or None: all.
        ``visual [B, n]`` are the visual ones, or None: none."""
        new = k.shape[2]
        longest = self.longest + new
        if longest > self.keys.shape[2]:
            self.reserve(new + _growth(self.longest))
        if token_mask is None:
            added: torch.Tensor | int = new
            self.tail += new
        else:
            added = token_mask.sum(-1, dtype=torch.int32)
            self.tail, self.even = 0, False
            k, v = self.real_first(k, token_mask), self.real_first(v, token_mask)
            if visual is not None:
                visual = packed_mask(visual, _real_first(token_mask), added)
        slot = self.lengths.view(-1, 1).long()
        if new > 1:  # one token, a decoding step, is spared two launches
            slot = slot + torch.arange(new, device=k.device)
        write_at(self.keys, slot, k)
        write_at(self.values, slot, v)
        if visual is not None:
            before = visual.new_zeros(visual.shape[0], 0) if self.visual is None else self.visual
            before = torch.nn.functional.pad(before, (0, longest - before.shape[1]))
            self.visual = before.scatter(1, slot, visual)
        self.lengths.add_(added)
        self.longest = longest

    def with_new(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        token_mask: torch.Tensor | None,
        visual: torch.Tensor | None,
        *,
        store: bool,
    ) -> Tokens:
        """What is held, and ``k``, ``v [B, Hkv, n, D]`` behind it, right-aligned, and the new ones in
        the last ``n`` places.

        Args:
            token_mask: ``[B, n]`` or None: all real.
            visual: ``[B, n]`` or None: none.
            store: whether the real ones are appended too.
        """
        if store and self.even and token_mask is None:
            self.append(k, v, None, visual)
            return Tokens(*self.visible(), None, self._visual(self.longest))
        tokens = self._joined(k, v, token_mask, visual)
        if store:
            self.append(k, v, token_mask, visual)
        return tokens

    def _visual(self, slots: int) -> torch.Tensor | None:
        """``visual`` of the first ``slots`` slots."""
        if self.visual is None:
            return None
        return torch.nn.functional.pad(self.visual, (0, max(slots - self.visual.shape[1], 0)))[:, :slots]

    def _joined(
        self, k: torch.Tensor, v: torch.Tensor, token_mask: torch.Tensor | None, visual: torch.Tensor | None
    ) -> Tokens:
        held, new = self.longest, k.shape[2]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.visible(), (k, v), strict=True))
        known = self._visual(held)
        if known is not None or visual is not None:
            shape = self.lengths.shape[0]
            known = keys.new_zeros(shape, held, dtype=torch.bool) if known is None else known
            visual = keys.new_zeros(shape, new, dtype=torch.bool) if visual is None else visual
            visual = torch.cat([known, visual], dim=1)
        if self.even and token_mask is None:
            return Tokens(keys, values, None, visual)
        # What is held moves up to the new tokens. It stays behind padding in front of them: those places are queries.
        real = keys.new_ones(keys.shape[0], new, dtype=torch.bool) if token_mask is None else token_mask
        free, slot = held - self.lengths[:, None].to(torch.int64), torch.arange(held + new, device=k.device)
        source = torch.where(slot < held, (slot - free).clamp(min=0), slot)
        there = (slot >= free) & torch.nn.functional.pad(real, (held, 0), value=True)
        visual = None if visual is None else visual.gather(1, source) & there
        return Tokens(gather_tokens(keys, source), gather_tokens(values, source), there, visual)

    def thaw(self) -> None:
        """Copies what was made under ``torch.inference_mode`` where that has ended, so that it can be written in place.
        Not while a graph is traced."""
        if is_frozen(self.keys):
            self.keys, self.values, self.lengths = self.keys.clone(), self.values.clone(), self.lengths.clone()

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more."""
        slots = self.longest + tokens
        if slots > self.keys.shape[2]:
            self.keys, self.values = grown(self.keys, slots), grown(self.values, slots)

    def advance(self, tokens: int) -> None:
        """Notes ``tokens`` that a replayed CUDA graph appended to every row; fewer than none: takes them back."""
        self.longest += tokens
        self.tail += tokens

    def visible(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys`` and ``values`` up to the longest row, as views ``[B, Hkv, longest, D]``."""
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def valid(self) -> torch.Tensor:
        """``[B, longest]`` bool: which of the visible slots hold a token."""
        return torch.arange(self.longest, device=self.keys.device) < self.lengths[:, None]

    def seen(self, unseen: torch.Tensor) -> torch.Tensor:
        """``[B, 1, n, longest]`` bool: which visible slots the last tokens see, ``unseen [B, n]`` of the last tokens of
        its row each of them does not."""
        slots = torch.arange(self.longest, device=self.keys.device)
        return (slots < (self.lengths[:, None] - unseen)[..., None])[:, None]

    def crop(self, tokens: int) -> None:
        """Forgets the last ``tokens`` tokens of every row; at most ``tail``."""
        self.lengths.sub_(tokens)
        self.advance(-tokens)
        if self.visual is not None:
            visual = self.visual[:, : self.longest]
            self.visual = visual & (torch.arange(visual.shape[1], device=visual.device) < self.lengths[:, None])

    def take_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``i`` what row ``rows[i]`` was; ``rows`` may repeat, reorder or leave out."""
        rows = rows.to(self.keys.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(-1)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.visual = None if self.visual is None else self.visual.index_select(0, rows)

    def attend(self, query: torch.Tensor, scale: float | None) -> torch.Tensor:
        """One new token, already appended, against everything: ``query [B, Hq, 1, D]``; returns the same shape."""
        out, _ = ops.decode_attn(query, self.keys, self.values, self.lengths, scale=scale)
        return out

    def keep_first(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens of every row; the storage stays where it is."""
        self.lengths.clamp_(max=tokens)
        self.longest, self.tail = min(self.longest, tokens), 0
        self.visual = None if self.visual is None else self.visual[:, :tokens]

    def counts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that have to reach the host before ``trim``."""
        return (self.lengths,)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything held."""
        held = self.keys, self.values, self.lengths
        return held if self.visual is None else (*held, self.visual)

    def token_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys`` and ``values`` at full precision, whatever their number: what a token would take."""
        return self.keys, self.values


LAYERS_BEHIND = 3
"""Layers whose buffers may be untrimmed at once: enough that the device never waits for the host, few enough that their
unused ends do not add up."""


@dataclass
class _Waiting:
    longest: torch.Tensor  # one int32 a count, in pinned memory, valid once ``arrived``
    arrived: torch.cuda.Event
    trim: Callable[..., None]


class Trimmer:
    """The buffers of one cache that still have to be trimmed, oldest first."""

    def __init__(self) -> None:
        self.waiting: deque[_Waiting] = deque()

    def add(self, counts: Sequence[torch.Tensor], trim: Callable[..., None]) -> None:
        """Has ``trim`` called with the largest of each of ``counts``, each ``[B]`` int32 on a GPU, B not 0, once those
        have arrived."""
        longest = torch.empty(len(counts), dtype=torch.int32, pin_memory=True)
        longest.copy_(torch.stack(list(counts)).amax(1), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(counts[0].device))
        self.waiting.append(_Waiting(longest, arrived, trim))

    def advance(self) -> None:
        """Trims what has arrived, and waits for all but the ``LAYERS_BEHIND - 1`` latest: another is about to come."""
        while self.waiting and (len(self.waiting) >= LAYERS_BEHIND or self.waiting[0].arrived.query()):
            self._trim_first()

    def finish(self) -> None:
        """Trims everything, waiting for it."""
        while self.waiting:
            self._trim_first()

    def forget(self) -> None:
        """Trims nothing any more: the cache was emptied."""
        self.waiting.clear()

    def _trim_first(self) -> None:
        first = self.waiting.popleft()
        first.arrived.synchronize()
        first.trim(*first.longest.tolist())


def can_wait(device: torch.device) -> bool:
    """Whether counts on ``device`` can be sent to the host and waited for: not while a graph is captured or traced."""
    return not torch.compiler.is_compiling() and not (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )
