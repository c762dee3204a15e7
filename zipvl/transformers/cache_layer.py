"""One layer of a ``ZipVLCache``."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from zipvl.config import ZipVLConfig
from zipvl.stats import LayerStats
from zipvl.transformers.quantized import QuantizedKV
from zipvl.transformers.storage import RaggedKV, Tokens, Trimmer, can_wait, is_exact


class ZipVLCacheLayer(DynamicLayer):
    """One full-attention layer of a ``ZipVLCache``.

    After a sparse prefill it is *packed*: ``packed`` holds the kept tokens (``drop``), all real ones at few bits
    (``quantize``) or as they are (``full``), each row at its own length; ``keys`` and ``values`` are placeholders on
    the meta device, and only zipvl's attention function can read it.
    After a dense prefill it is an ordinary ``DynamicLayer`` in every respect.

    Args:
        config: what a prefill through this layer keeps.
        trimmer: shared by the layers of a cache; trims their storage where counts are on a GPU.
        shared: layers of the model without keys and values of their own attend to this one's.
    """

    def __init__(self, config: ZipVLConfig, trimmer: Trimmer | None = None, *, shared: bool = False) -> None:
        super().__init__()
        self.config, self.shared = config, shared
        self.trimmer = trimmer or Trimmer()
        self.packed: RaggedKV | QuantizedKV | None = None
        self.returned: tuple[torch.Tensor, torch.Tensor] | None = None
        """The keys and values that the last update returned, until the attention function has answered for it."""
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._record: LayerStats | None = None
        self._untrimmed = False
        """A compiled prefill left buffers of the prompt's length."""
        self._awaited = False
        """The counts of what was packed are on their way to the host."""
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
        seen = self._seen
        self._seen = seen + key_states.shape[2]
        if self.packed is None:
            self.trimmer.advance()
            if seen > 0:
                return super().update(key_states, value_states)
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self._pending = self.returned = (key_states, value_states)
            return key_states, value_states
        if self._awaited or self._untrimmed:
            self.settle()
        if self.trimmer.waiting:
            self.trimmer.advance()
        cached = self._placeholder(key_states)
        if not torch.compiler.is_compiling():  # where it would be a result of the graph
            self.keys = self.values = cached
            self.packed.thaw()
        self._pending, self.returned = (key_states, value_states), (cached, cached)
        return cached, cached

    def get_seq_length(self) -> int:
        """Tokens seen, padding positions included, whatever was kept."""
        return self._seen

    # What the attention function calls

    def keep_all(self) -> None:
        """The prefill was dense: this is an ordinary layer from here on."""
        key_states, value_states = self._take()
        self.lazy_initialization(key_states, value_states)
        super().update(key_states, value_states)

    def keep_whole(self, token_mask: torch.Tensor | None, visual: torch.Tensor | None = None) -> None:
        """The prefill was dense, and is packed whole for a captured step; ``token_mask [B, N]`` or None: all real;
        ``visual [B, N]`` or None: none."""
        keys, values = self.pending()
        self._take_prompt(candidates=0)
        self.packed = RaggedKV.real(keys, values, token_mask, visual)

    def keep_packed(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        count: torch.Tensor,
        max_kept: int | None = None,
        candidates: int = 0,
        visual: torch.Tensor | None = None,
    ) -> None:
        """The prefill was sparse and this is what it attended to, which becomes a ``drop`` cache.

        Args:
            keys, values: ``[B, Hkv, N, D]``, of which the first ``count [B]`` tokens are kept; taken, not copied.
            max_kept: no count is known to be larger (``policy.max_kept``).
            candidates: as many last tokens of the update are no part of the prompt, and stay pending.
            visual: ``[B, N]``, which of the packed tokens are visual; None: none.
        """
        self._take_prompt(candidates)
        if max_kept is None or is_exact(count) or count.numel() == 0 or can_wait(count.device):
            self._keep(RaggedKV.packed(keys, values, count, visual))
        else:
            self.packed = RaggedKV.cut(keys, values, count, max_kept, visual)

    def keep_selected(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor,
        count: torch.Tensor,
        token_mask: torch.Tensor | None,
        query_heads: int,
        candidates: int = 0,
        visual: torch.Tensor | None = None,
    ) -> None:
        """The prefill was sparse: a ``quantize`` or ``full`` cache keeps what the configuration says.

        Args:
            keys, values: ``[B, Hkv, N, D]``, the prompt's.
            index, count: ``[B, N]`` and ``[B]``, the selected tokens.
            token_mask: ``[B, N]``, the real ones, or None: all.
            query_heads: ``Hq``.
            candidates: as many last tokens of the update are no part of the prompt, and stay pending.
            visual: ``[B, N]``, which tokens of the prompt are visual; None: none.
        """
        self._take_prompt(candidates)
        if self.config.cache == "quantize":
            self._keep(QuantizedKV(keys, values, index, count, token_mask, query_heads, self.config))
        else:
            self.packed = RaggedKV.real(keys, values, token_mask, visual)

    def with_new(self, token_mask: torch.Tensor | None, visual: torch.Tensor | None) -> Tokens:
        """Keys and values for a chunk behind packed tokens: those, and the tokens of the last update at the end. A
        ``full`` cache stores the new ones; in a ``drop`` cache they stay pending, until ``keep_chunk``.

        Args:
            token_mask: ``[B, n]`` or None: all real.
            visual: ``[B, n]`` or None: none.
        """
        assert isinstance(self.packed, RaggedKV)
        drops = self.config.cache == "drop"
        keys, values = (states.to(self.packed.dtype) for states in (self.pending() if drops else self._take()))
        return self.packed.with_new(keys, values, token_mask, visual, store=not drops)

    def keep_chunk(self, index: torch.Tensor, visual: torch.Tensor | None) -> None:
        """A ``drop`` cache stores the selected tokens of a chunk, behind the packed tokens that it holds already.

        Args:
            index: ``[B, S]``, the selected ones among all ``S`` tokens, ``S`` where there is none.
            visual: ``[B, n]`` or None: none.
        """
        assert isinstance(self.packed, RaggedKV)
        keys, values = (states.to(self.packed.dtype) for states in self._take())
        self.packed.append(keys, values, _chosen(index)[:, -keys.shape[2] :], visual)
        if is_exact(keys) and keys.shape[0]:
            self.packed.trim(int(self.packed.lengths.max()))
        self._keep(self.packed)

    def pack(
        self,
        index: torch.Tensor,
        new: int,
        token_mask: torch.Tensor | None,
        visual: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """A chunk behind dense ones, which are stored as they came, was sparse: this is a packed layer from here on. A
        ``drop`` cache stores what it held, and of the ``new`` tokens those that were selected; a ``full`` one all.

        Args:
            index: ``[B, S]``, the selected ones among all ``S`` tokens, ``S`` where there is none.
            token_mask, visual: ``[B, S]`` of all tokens, or None: all real, none visual.
            dtype: of the chunk's queries.
        """
        assert self.keys is not None and self.values is not None
        keys, values = self.keys.to(dtype), self.values.to(dtype)
        if not torch.compiler.is_compiling():
            self.keys = self.values = self._placeholder(keys)
        if self.config.cache == "drop":
            chosen = _chosen(index)
            chosen[:, : chosen.shape[1] - new] = True if token_mask is None else token_mask[:, : chosen.shape[1] - new]
            self._keep(RaggedKV.real(keys, values, chosen, visual))
        else:
            self.packed = RaggedKV.real(keys, values, token_mask, visual, copy=False)

    def _keep(self, packed: RaggedKV | QuantizedKV) -> None:
        """Takes ``packed`` and sees to it that it is trimmed."""
        self.packed = packed
        counts = packed.counts()
        if not is_exact(counts[0]) and counts[0].numel():
            if can_wait(counts[0].device):
                self.trimmer.add(counts, self._trim)
                self._awaited = True
            else:
                packed.clear()
                self._untrimmed = torch.compiler.is_compiling()

    def settle(self) -> None:
        """Trims all that is not yet, waiting for it; the counts of a compiled prefill are read here, outside it."""
        if self.trimmer.waiting:
            self.trimmer.finish()
        if self._untrimmed and self.packed is not None and can_wait(self.packed.counts()[0].device):
            self._untrimmed = False
            self._trim(*(int(count.max()) for count in self.packed.counts()))

    def _placeholder(self, states: torch.Tensor) -> torch.Tensor:
        """The shape ``[B, Hkv, seen, D]`` of a packed layer's keys, without data: an attention function that does not
        know the packed layout fails on it at once. Models that look at ``keys`` find it there, and the layer filled.
        Where layers share it, models move it between devices, which no tensor on the meta device allows: it is one NaN
        there."""
        batch, heads, _, dim = states.shape
        shape = (batch, heads, self._seen, dim)
        if self.shared:
            return states.new_full((1, 1, 1, 1), torch.nan).expand(shape)
        return torch.empty(shape, dtype=states.dtype, device="meta")

    def _take_prompt(self, candidates: int) -> None:
        """Answers for the states of the prompt; those of candidates behind it stay pending."""
        keys, values = self._take()
        if not torch.compiler.is_compiling():
            self.keys = self.values = self._placeholder(keys)
        if candidates:
            self._pending = (keys[:, :, -candidates:], values[:, :, -candidates:])

    def _trim(self, *longest: int) -> None:
        self._awaited = False
        assert self.packed is not None
        self.packed.trim(*longest)

    def append(
        self,
        token_mask: torch.Tensor | None,
        query: torch.Tensor,
        scale: float | None,
        visual: torch.Tensor | None = None,
    ) -> RaggedKV | QuantizedKV:
        """Stores the tokens of the last update, ``token_mask [B, n]`` or None: all real; ``visual [B, n]`` or None:
        none; returns what is stored.

        ``query [B, Hq, n, D]`` are theirs, and ``scale`` the factor of their scores: what a quantised cache needs to
        tell later which of them matter."""
        packed = self.packed
        assert packed is not None
        keys, values = self._take()
        if not keys.dtype == values.dtype == query.dtype:
            keys, values = keys.to(query.dtype), values.to(query.dtype)
        if isinstance(packed, QuantizedKV):
            packed.append(keys, values, token_mask, query, scale)
        else:
            packed.append(keys, values, token_mask, visual)
        return packed

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more, so that steps may be captured in a CUDA graph.

        Raises:
            ValueError: the prefill was dense, and the storage grows by concatenation.
        """
        self.settle()
        if self.packed is None:
            raise ValueError("ZipVLCache: room can be reserved behind a sparse prefill alone; this layer's was dense")
        self.packed.thaw()
        self.packed.reserve(tokens)

    def make_room(self, tokens: int) -> None:
        """Does the work that a captured step cannot do: compresses the new tokens of a quantised layer if ``tokens``
        more do not fit among those at full precision."""
        if isinstance(self.packed, QuantizedKV):
            self.packed.make_room(tokens)

    def counts(self) -> tuple[int, int]:
        """Counts of the host that a captured step changes: tokens seen, and those of the longest packed row."""
        return self._seen, 0 if self.packed is None else self.packed.longest

    def withdraw(self, seen: int, longest: int) -> None:
        """Takes back, on the host alone, what a step did that was captured and not run: ``counts`` was this."""
        self._pending = self.returned = None
        self._seen = seen
        if self.packed is not None:
            self.packed.advance(longest - self.packed.longest)

    def storage(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that a captured step reads or writes; none where nothing is packed."""
        return () if self.packed is None else self.packed.tensors()

    def advance(self, tokens: int) -> None:
        """Notes ``tokens`` that a replayed CUDA graph appended."""
        assert self.packed is not None
        self.packed.advance(tokens)
        self._seen += tokens

    def measured_by(self, record: LayerStats) -> None:
        """Lets ``record`` ask how many bytes the layer takes, and leaves it the last answer when the layer goes."""
        record.measures(self)
        self._record = record

    def __del__(self) -> None:
        record = self.__dict__.get("_record")  # not in an object that a failed constructor left
        if record is not None:
            record.cache_gone(self)

    def pending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of the last update, ``[B, Hkv, n, D]`` each, not yet stored."""
        assert self._pending is not None
        return self._pending

    def _take(self) -> tuple[torch.Tensor, torch.Tensor]:
        states, self._pending, self.returned = self._pending, None, None
        assert states is not None
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
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 says it by a tensor
        self.settle()
        if self.packed is None:
            super().crop(tokens_to_remove)
            self._seen = 0 if self.keys is None else self.keys.shape[-2]
            return
        tokens = max(self._seen - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if tokens > self.packed.tail:
            raise ValueError(
                f"ZipVLCache: cannot crop {tokens} tokens: only the last {self.packed.tail} were added after the "
                "prompt, and the prompt's tokens were packed or dropped"
            )
        self.packed.thaw()
        self.packed.crop(tokens)
        self._seen -= tokens

    def reset(self) -> None:
        """Empties the layer."""
        self.trimmer.forget()
        if self._record is not None:
            self._record.cache_gone(self)
        self.is_initialized = False  # the base class would zero its storage, which may be none
        super().reset()
        self.keys = self.values = None
        self.packed = self._pending = self.returned = self._record = None
        self._untrimmed = self._awaited = False
        self._seen = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times in place."""
        if self._seen > 0:
            self._take_rows(torch.arange(self.rows, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices``."""
        self._take_rows(indices)

    def _take_rows(self, rows: torch.Tensor) -> None:
        if self._seen == 0:
            return
        self.settle()
        if self.packed is not None:
            self.packed.take_rows(rows)
        else:
            self.keys, self.values = (states[rows.to(states.device)] for states in self._stored())

    def offload(self) -> None:
        raise NotImplementedError("ZipVLCache: offloading is not supported")

    # Sizes

    @property
    def nbytes(self) -> int:
        """Bytes of memory that everything stored takes, unused slots included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._stored())

    @property
    def full_nbytes(self) -> int:
        """Bytes that a cache of every token seen would take."""
        if self.packed is not None:
            states: tuple[torch.Tensor, ...] = self.packed.token_states()
        else:
            states = self._stored()
        return sum(s.shape[0] * s.shape[1] * self._seen * s.shape[3] * s.element_size() for s in states)

    @property
    def rows(self) -> int:
        """Batch rows stored."""
        return self._stored()[0].shape[0] if self._stored() else 0

    def _stored(self) -> tuple[torch.Tensor, ...]:
        """Every tensor in memory."""
        if self.packed is not None:
            return self.packed.tensors()
        return () if self.keys is None or self.values is None else (self.keys, self.values)


def _chosen(index: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` bool of ``index [B, S]``, which holds ``S`` where it holds nothing."""
    batch, tokens = index.shape
    chosen = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=index.device)
    return chosen.scatter_(1, index.to(torch.int64), True)[:, :tokens]
