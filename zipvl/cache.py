"""A transformers cache that keeps what ZipVL selected."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from zipvl.config import ZipVLConfig
from zipvl.integrations import _handover
from zipvl.integrations._ragged import RaggedKV
from zipvl.stats import LayerStats


class ZipVLCacheLayer(DynamicLayer):
    """One full-attention layer of a ``ZipVLCache``.

    After a sparse prefill it is *packed*: ``packed`` holds the kept tokens (``drop``) or all real ones (``full``),
    each row at its own length, ``keys`` and ``values`` are None, and only zipvl's attention function can read it.
    After a dense prefill it is an ordinary ``DynamicLayer`` in every respect.

    Args:
        config: what a prefill through this layer keeps.
    """

    def __init__(self, config: ZipVLConfig) -> None:
        super().__init__()
        self.config = config
        self.packed: RaggedKV | None = None
        self.record: LayerStats | None = None
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
        self.lazy_initialization(key_states, value_states)
        super().update(key_states, value_states)
        self._report()

    def keep_selected(self, index: torch.Tensor, count: torch.Tensor, token_mask: torch.Tensor | None) -> None:
        """The prefill was sparse: packs the tokens of ``index [B, N]``, ``count [B]``, or with ``cache="full"`` the
        real ones, ``token_mask [B, N]`` or None: all."""
        key_states, value_states = self._take()
        if self.config.cache == "drop":
            self.packed = RaggedKV.selected(key_states, value_states, index, count)
        else:
            self.packed = RaggedKV.real(key_states, value_states, token_mask)
        self._report()

    def append(self, token_mask: torch.Tensor | None) -> RaggedKV:
        """Packs the tokens of the last update, ``token_mask [B, n]`` or None: all real; returns the packed states."""
        assert self.packed is not None
        self.packed.append(*self._take(), token_mask)
        self._report()
        return self.packed

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
        self.is_initialized = False  # the base class would zero its storage, which may be none
        super().reset()
        self.keys = self.values = None
        self.packed = self._pending = self.record = None
        self._seen = 0

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
        """Bytes of memory that the stored keys and values take, unused slots included."""
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
        if self.record is not None:
            self.record.cache_bytes, self.record.full_cache_bytes = self.nbytes, self.full_nbytes


def check_model(model_config: PretrainedConfig) -> None:
    """Raises if a layer's cache of this model does not hold that layer's own keys and values.

    Raises:
        ValueError: naming the model's kind and the remedy.
    """
    text = model_config.get_text_config(decoder=True)
    problem = None
    if getattr(text, "num_kv_shared_layers", None) or getattr(text, "kv_sharing_modes", None):
        problem = "shares keys and values between layers"
    elif getattr(text, "kv_lora_rank", None):
        problem = "caches latents in place of keys and values (multi-head latent attention)"
    if problem is not None:
        raise ValueError(
            f'ZipVLCache: {text.model_type} {problem}, which is not supported; use attn_implementation="sdpa"'
        )


def make_sparse(cache: DynamicCache, config: ZipVLConfig, model_config: PretrainedConfig) -> None:
    """Gives an empty ``cache`` the layers of a ``ZipVLCache``: full-attention layers are replaced, others stay.

    Raises:
        ValueError: the model is one that ``check_model`` refuses.
    """
    check_model(model_config)
    layers = cache.layers or DynamicCache(config=model_config).layers
    cache.layers = [ZipVLCacheLayer(config) if type(layer) is DynamicLayer else layer for layer in layers]
    cache.layer_class_to_replicate = None


def is_ready(cache: Cache) -> bool:
    """Whether ``cache`` is a ``ZipVLCache``, or a dynamic cache without ordinary full-attention layers."""
    return (
        isinstance(cache, DynamicCache)
        and len(cache) > 0
        and all(type(layer) is not DynamicLayer for layer in cache.layers)
    )


class ZipVLCache(DynamicCache):
    """Keeps in every full-attention layer what ZipVL selected there; other layers get transformers' own cache layers.

    Needs the attention implementation ``"zipvl"``. The number of tokens *seen* (``get_seq_length``, positions, masks)
    is that of a full cache; how many are *kept* differs by layer and row.

    Args:
        model_config: the model or its configuration (of the whole model or of its text part).
        config: what to keep; the default configuration if None.
    """

    def __init__(self, model_config: PretrainedConfig | PreTrainedModel, config: ZipVLConfig | None = None) -> None:
        if isinstance(model_config, PreTrainedModel):
            model_config = model_config.config
        super().__init__(config=model_config)
        self.config = ZipVLConfig() if config is None else config
        make_sparse(self, self.config, model_config)

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory that the stored keys and values of all attention layers take."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, ZipVLCacheLayer):
                total += layer.nbytes
            else:
                states = (getattr(layer, "keys", None), getattr(layer, "values", None))
                total += sum(s.untyped_storage().nbytes() for s in states if s is not None)
        return total
