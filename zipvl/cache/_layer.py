"""One layer of a ``ZipVLCache``."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from zipvl.cache._ragged import RaggedKV
from zipvl.cache._trim import Trimmer, can_wait
from zipvl.config import ZipVLConfig
from zipvl.integrations import _handover
from zipvl.stats import LayerStats


class ZipVLCacheLayer(DynamicLayer):
    """One full-attention layer of a ``ZipVLCache``.

    After a sparse prefill it is *packed*: ``packed`` holds the kept tokens (``drop``) or all real ones (``full``),
    each row at its own length, ``keys`` and ``values`` are None, and only zipvl's attention function can read it.
    After a dense prefill it is an ordinary ``DynamicLayer`` in every respect.

    Args:
        config: what a prefill through this layer keeps.
        trimmer: shared by the layers of a cache; trims their storage where counts are on a GPU.
    """

    def __init__(self, config: ZipVLConfig, trimmer: Trimmer | None = None) -> None:
        super().__init__()
        self.config = config
        self.trimmer = trimmer or Trimmer()
        self.packed: RaggedKV | None = None
        self.record: LayerStats | None = None
        self.candidates = 0
        """How many last tokens of the coming prefill are guesses of assisted decoding, no part of the prompt."""
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._seen = 0

    # What the model calls

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes new ``key_states``, ``value_states [B, Hkv, n, D]`` and returns what the attention function is given.

        In the prefill those are the states themselves, and what is kept is decided by the attention function. Once
        packed it is a placeholder of the cached length, and the attention function reads the packed states.

        Raises:
            RuntimeError: the attention function never answered for the previous update.
        """
        if self._pending is not None:
            raise RuntimeError(
                "ZipVLCache: the tokens of the previous forward were never selected, because the keys that the cache "
                "returned did not reach zipvl's attention function. Either another attention implementation ran "
                '(use attn_implementation="zipvl" or zipvl.sparse(model)), the forward failed half-way (use a new '
                "cache or reset() this one), or the model's attention alters its keys after the cache update (not "
                "supported with this cache)."
            )
        new = key_states.shape[-2]
        if self.packed is not None:
            self.trimmer.finish()
        else:
            self.trimmer.advance()
        if self.packed is None and self._seen > 0:
            self._seen += new
            states = super().update(key_states, value_states)
            self._report()
            return states
        self._pending = (key_states, value_states)
        self._seen += new
        if self.packed is None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            return _handover.sign(key_states, self), value_states
        length = self.packed.longest + new
        return _handover.sign(_handover.placeholder(key_states, length), self), _handover.placeholder(
            value_states, length
        )

    def get_seq_length(self) -> int:
        """Tokens seen, padding positions included, whatever was kept."""
        return self._seen

    # What the attention function calls

    def keep_all(self) -> None:
        """The prefill was dense: this is an ordinary layer from here on."""
        key_states, value_states = self._take()
        self.candidates = 0
        self.lazy_initialization(key_states, value_states)
        super().update(key_states, value_states)
        self._report()

    def keep_packed(self, keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor) -> None:
        """The prefill was sparse and this is what it attended to: ``keys``, ``values [B, Hkv, N, D]``, whose first
        ``count [B]`` tokens become the cache (``cache="drop"``); the tensors are taken, not copied."""
        self._take_prompt()
        self.packed = RaggedKV.packed(keys, values, count)
        if keys.device.type != "cpu" and count.numel():
            if can_wait(keys.device):
                self.trimmer.add(self.packed.lengths, self._trim)
            else:
                self.packed.clear()
        self._report()

    def keep_real(self, token_mask: torch.Tensor | None) -> None:
        """The prefill was sparse; keeps the real tokens, ``token_mask [B, N]`` or None: all (``cache="full"``)."""
        self.packed = RaggedKV.real(*self._take_prompt(), token_mask)
        self._report()

    def _take_prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of the prompt; those of candidates behind it stay pending."""
        keys, values = self._take()
        if self.candidates:
            self._pending = (keys[:, :, -self.candidates :], values[:, :, -self.candidates :])
            keys, values = keys[:, :, : -self.candidates], values[:, :, : -self.candidates]
        return keys, values

    def _trim(self, longest: int) -> None:
        assert self.packed is not None
        self.packed.trim(longest)
        self._report()

    def append(self, token_mask: torch.Tensor | None) -> RaggedKV:
        """Packs the tokens of the last update, ``token_mask [B, n]`` or None: all real; returns the packed states."""
        assert self.packed is not None
        self.packed.append(*self._take(), token_mask)
        self._report()
        return self.packed

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more, so that steps may be captured in a CUDA graph.

        Raises:
            ValueError: the prefill was dense, and the storage grows by concatenation.
        """
        self.trimmer.finish()
        if self.packed is None:
            raise ValueError("ZipVLCache: room can be reserved behind a sparse prefill alone; this layer's was dense")
        self.packed.reserve(tokens)
        self._report()

    def advance(self, tokens: int) -> None:
        """Notes ``tokens`` that a replayed CUDA graph appended."""
        assert self.packed is not None
        self.packed.advance(tokens)
        self._seen += tokens
        self._report()

    def attach(self, record: LayerStats) -> None:
        """Keeps the byte counts of ``record`` up to date from now on."""
        self.record = record
        self._report()

    def pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of the last update, ``[B, Hkv, n, D]`` each, not yet stored."""
        assert self._pending is not None
        return self._pending

    def _take(self) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.pending()
        self._pending = None
        return states

    # Rows and lengths

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: packed, and some of them belong to the prompt or to a chunk with padding: what was dropped
                cannot be brought back.
        """
        if self._seen == 0:
            return
        self.trimmer.finish()
        if self.packed is None:
            super().crop(tokens_to_remove)
            self._seen = self._stored()[0].shape[-2]
            self._report()
            return
        tokens = max(self._seen - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if tokens > self.packed.tail:
            raise ValueError(
                f"ZipVLCache: cannot crop {tokens} tokens: only the last {self.packed.tail} were added after the "
                "prompt, and the prompt's tokens were packed or dropped"
            )
        self.packed.crop(tokens)
        self._seen -= tokens
        self._report()

    def reset(self) -> None:
        """Empties the layer."""
        self.trimmer.forget()
        self.is_initialized = False  # the base class would zero its storage, which may be none
        super().reset()
        self.keys = self.values = None
        self.packed = self._pending = self.record = None
        self._seen = self.candidates = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times in place."""
        if self._seen > 0:
            keys = self._stored()[0]
            self._take_rows(torch.arange(keys.shape[0], device=keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices``."""
        self._take_rows(indices)

    def _take_rows(self, rows: torch.Tensor) -> None:
        if self._seen == 0:
            return
        self.trimmer.finish()
        if self.packed is not None:
            self.packed.take_rows(rows)
        else:
            self.keys, self.values = (states[rows.to(states.device)] for states in self._stored())
        self._report()

    def offload(self) -> None:
        raise NotImplementedError("ZipVLCache: offloading is not supported")

    # Sizes

    @property
    def nbytes(self) -> int:
        """Bytes of memory that everything stored takes, unused slots included."""
        if self.packed is not None:
            return self.packed.nbytes
        return sum(states.untyped_storage().nbytes() for states in self._stored())

    @property
    def full_nbytes(self) -> int:
        """Bytes that a cache of every token seen would take."""
        return sum(s.shape[0] * s.shape[1] * self._seen * s.shape[3] * s.element_size() for s in self._stored())

    def _stored(self) -> tuple[torch.Tensor, ...]:
        """The keys and the values in memory; nothing if there are none."""
        if self.packed is not None:
            return self.packed.keys, self.packed.values
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def _report(self) -> None:
        if self.record is not None and not torch.compiler.is_compiling():
            self.record.cache_bytes, self.record.full_cache_bytes = self.nbytes, self.full_nbytes
