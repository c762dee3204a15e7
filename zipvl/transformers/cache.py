"""A transformers cache that keeps what ZipVL selected."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from zipvl.config import ZipVLConfig
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.trim import Trimmer

CHANNEL_MULTIPLE = 32
"""A quantised block holds codes of so many channels in a word (``csrc/common/quantized_block.h``)."""


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


def check_bits(config: ZipVLConfig, model_config: PretrainedConfig) -> None:
    """Raises if ``config`` asks for a quantised cache and the model's head dimension does not allow it.

    Raises:
        ValueError: naming the head dimension and the remedy.
    """
    text = model_config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if config.cache == "quantize" and head_dim % CHANNEL_MULTIPLE:
        raise ValueError(
            f'ZipVLCache: cache="quantize" needs a head dimension that is a multiple of {CHANNEL_MULTIPLE}, and '
            f'{text.model_type} has {head_dim}; use cache="drop"'
        )


def make_sparse(cache: DynamicCache, config: ZipVLConfig, model_config: PretrainedConfig) -> None:
    """Gives an empty ``cache`` the layers of a ``ZipVLCache``: full-attention layers are replaced, others stay.

    Raises:
        ValueError: the model is one that ``check_model`` or ``check_bits`` refuses.
    """
    check_model(model_config)
    check_bits(config, model_config)
    layers = cache.layers or DynamicCache(config=model_config).layers
    trimmer = Trimmer()
    cache.layers = [ZipVLCacheLayer(config, trimmer) if type(layer) is DynamicLayer else layer for layer in layers]
    cache.layer_class_to_replicate = None


def expect_candidates(cache: Cache, candidates: int) -> None:
    """The last ``candidates`` tokens of the coming prefill of ``cache`` are guesses behind the prompt: they attend to
    what is kept of the prompt, as decoded tokens do, and ``crop`` can remove them."""
    for layer in cache.layers:
        if isinstance(layer, ZipVLCacheLayer):
            layer.candidates = candidates


def settle(cache: Cache | None) -> None:
    """Trims what a prefill left untrimmed in ``cache``: the host waits for the kernels that packed it."""
    for layer in cache.layers if isinstance(cache, DynamicCache) else ():
        if isinstance(layer, ZipVLCacheLayer):
            layer.settle()


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
        """Bytes of memory that the stored keys and values of all attention layers take, trimmed first."""
        settle(self)
        total = 0
        for layer in self.layers:
            if isinstance(layer, ZipVLCacheLayer):
                total += layer.nbytes
            else:
                states = (getattr(layer, "keys", None), getattr(layer, "values", None))
                total += sum(s.untyped_storage().nbytes() for s in states if s is not None)
        return total
