"""A transformers cache that keeps what ZipVL selected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from zipvl import policy
from zipvl.config import ZipVLConfig
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.storage import Trimmer
from zipvl.transformers.target import caches_latents, check_model, layer_configs, sources
from zipvl.transformers.visual import visual_ids

CHANNEL_MULTIPLE = 32
"""A quantised block holds codes of so many channels in a word (``csrc/common/quantized_block.h``)."""


def check_cache(config: ZipVLConfig, model_config: PretrainedConfig) -> None:
    """Raises if the model cannot have the cache that ``config`` asks for.

    Raises:
        ValueError: it is to be quantised, and the head dimension does not allow it; or it holds latents, of which none
            can be dropped or quantised. The message names the remedy.
    """
    text = model_config.get_text_config(decoder=True)
    if config.cache != "full" and caches_latents(text):
        raise ValueError(
            f"ZipVLCache: {text.model_type} caches latents in place of keys and values (multi-head latent attention), "
            f'of which cache="{config.cache}" can keep no selection; use cache="full"'
        )
    if config.cache != "quantize":
        return
    dims = set()
    for layer in layer_configs(text):
        dims.add(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
    if any(dim % CHANNEL_MULTIPLE for dim in dims):
        raise ValueError(
            f'ZipVLCache: cache="quantize" needs a head dimension that is a multiple of {CHANNEL_MULTIPLE}, and '
            f'{text.model_type} has {", ".join(map(str, sorted(dims)))}; use cache="drop"'
        )


class ZipVLCache(DynamicCache):
    """Keeps in every full-attention layer what ZipVL selected there; other layers get transformers' own cache layers,
    and so do all layers of a model that caches latents.

    The number of tokens *seen* (``get_seq_length``, positions, masks) is that of a full cache; how many are *kept*
    differs by layer and row. In blocks of ``zipvl.sparse`` and after ``zipvl.configure`` a model makes one by itself.
    Elsewhere it needs ``attn_implementation="zipvl"`` and is made from the model itself, which then hands it to its
    attention layers by a forward pre-hook that stays.

    Args:
        model_config: the model, or inside a block its configuration (of the whole model or of its text part).
        config: what to keep; the default configuration if None.
        cost_key: ``policy.cost_key(config)``, where it was made beforehand.

    Attributes:
        candidates: how many last tokens of the coming prefill are guesses of assisted decoding, no part of the prompt.
        assisted: the cache is that of an assisted generation.
        plan: how the ``generate()`` that runs decodes (``decode.Plan``); None outside of one.
        visual: ``[B, m]`` bool, which of the tokens seen are visual, those beyond ``m`` being text; None: none.
        handed_on: the forward that is under way hands this cache to zipvl's attention function.
    """

    def __init__(
        self,
        model_config: PretrainedConfig | PreTrainedModel,
        config: ZipVLConfig | None = None,
        *,
        cost_key: str | None = None,
    ) -> None:
        model = model_config
        if isinstance(model_config, PreTrainedModel):
            model_config = model_config.config
        super().__init__(config=model_config)
        self._keep_selected(ZipVLConfig() if config is None else config, model_config, cost_key)
        if isinstance(model, PreTrainedModel):
            from zipvl.transformers.hooks import hand_on  # the hook makes caches itself

            hand_on(model, self.config)

    def _keep_selected(self, config: ZipVLConfig, model_config: PretrainedConfig, cost_key: str | None) -> None:
        """Replaces full-attention layers, which are empty.

        Raises:
            ValueError: the model is one that ``check_model`` or ``check_cache`` refuses.
        """
        check_model(model_config)
        check_cache(config, model_config)
        config = config.for_model(visual=bool(visual_ids(model_config)))
        layers, self.trimmer = self.layers or DynamicCache(config=model_config).layers, Trimmer()
        text = model_config.get_text_config(decoder=True)
        shared, latents = set(sources(text).values()), caches_latents(text)
        self.layers = [
            ZipVLCacheLayer(config, self.trimmer, shared=i in shared) if type(x) is DynamicLayer and not latents else x
            for i, x in enumerate(layers)
        ]
        self.layer_class_to_replicate = None
        self.config, self.cost_key = config, policy.cost_key(config) if cost_key is None else cost_key
        self.candidates, self.assisted = 0, False
        self.plan: Any = None
        self.visual: torch.Tensor | None = None
        self.handed_on = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``ZipVLCacheLayer.update`` of one layer.

        Raises:
            RuntimeError: the layer is packed, and the model was not told to read it.
        """
        layer: Any = self.layers[layer_idx]
        if not self.handed_on and isinstance(layer, ZipVLCacheLayer) and layer.packed is not None:
            raise RuntimeError(
                f"ZipVLCache: layer {layer_idx} is packed: its keys are placeholders on the meta device, which only "
                "zipvl's attention reads, and this model does not run it. Its zipvl.sparse block has ended, or the "
                "cache is another model's. Go on inside zipvl.sparse(model), or make the cache from the model itself: "
                "zipvl.ZipVLCache(model)"
            )
        # What the base class does besides is for layers that are made late or offloaded: there are none.
        states: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return states

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """Keys and values layer by layer, of which ``DynamicCache(cache)`` makes a copy.

        Raises:
            RuntimeError: a layer is packed, and has no tensors of all tokens seen.
        """
        packed = [i for i, x in enumerate(self.layers) if isinstance(x, ZipVLCacheLayer) and x.packed is not None]
        if packed:
            raise RuntimeError(
                f"ZipVLCache: layers {packed} are packed and do not hold every token seen, so they cannot be copied as "
                "keys and values (DynamicCache(cache)); use copy.deepcopy(cache)"
            )
        return super().__iter__()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times in place."""
        super().batch_repeat_interleave(repeats)
        if self.visual is not None:
            self.visual = self.visual.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices``."""
        super().batch_select_indices(indices)
        self._take_rows(indices)

    def _take_rows(self, rows: torch.Tensor) -> None:
        if self.visual is not None:
            self.visual = self.visual[rows.to(self.visual.device)]

    @property
    def cache_bytes(self) -> int:
        """Bytes of memory that the stored keys and values of all attention layers take, trimmed first."""
        self.settle()
        total = 0
        for layer in self.layers:
            if isinstance(layer, ZipVLCacheLayer):
                total += layer.nbytes
            else:
                states = (getattr(layer, "keys", None), getattr(layer, "values", None))
                total += sum(s.untyped_storage().nbytes() for s in states if s is not None)
        return total

    def settle(self) -> None:
        """Trims what a prefill left untrimmed: the host waits for the kernels that packed it."""
        for layer in self.layers:
            if isinstance(layer, ZipVLCacheLayer):
                layer.settle()


def adopt(cache: Cache, model_config: PretrainedConfig, config: ZipVLConfig, cost_key: str) -> None:
    """Makes a cache that the caller gave usable: an empty dynamic cache becomes a ``ZipVLCache``, in place.

    Raises:
        ValueError: it is another kind of cache, or was filled without ZipVL.
    """
    if isinstance(cache, ZipVLCache):
        return
    if isinstance(cache, DynamicCache) and len(cache) > 0 and all(type(x) is not DynamicLayer for x in cache.layers):
        return  # it has no ordinary full-attention layers
    problem = None
    if type(cache) is not DynamicCache:
        problem = f"a {type(cache).__name__} cannot hold tokens that differ by layer"
    elif cache.offloading:
        problem = "an offloaded cache is not supported"
    elif cache.get_seq_length() > 0:
        problem = f"this DynamicCache already holds {cache.get_seq_length()} tokens"
    if problem is not None:
        raise ValueError(f"zipvl.sparse: {problem}; pass a new zipvl.ZipVLCache(model), or no cache at all")
    cache.__class__ = ZipVLCache
    assert isinstance(cache, ZipVLCache)
    cache._keep_selected(config, model_config, cost_key)
