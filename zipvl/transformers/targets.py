"""Finding the language part of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from zipvl.config import ZipVLConfig
from zipvl.transformers.cache import check_model
from zipvl.transformers.eligibility import layer_index, type_of_layer


@dataclass
class Target:
    """The language part of a model.

    Args:
        decoder: the innermost model that holds the attention layers, and makes the cache if none is given.
        attention: its attention modules.
        configs: the configuration objects that decide their attention implementation.
        generators: the models around it that have ``generate``.
    """

    decoder: PreTrainedModel
    attention: list[nn.Module]
    configs: list[PretrainedConfig]
    generators: list[Any]


def find(model: nn.Module) -> Target:
    """The language part of ``model``, which may be wrapped in further modules.

    Raises:
        ValueError: there is none, or it is an encoder-decoder, of a kind that ``check_model`` refuses, or without
            transformers' attention interface.
    """
    name = type(model).__name__
    outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if outer is None:
        raise ValueError(f"zipvl.sparse: {name} holds no transformers model")
    if getattr(outer.config, "is_encoder_decoder", False):
        raise ValueError(f"zipvl.sparse: {name} is an encoder-decoder, which is not supported; use a decoder model")
    check_model(outer.config)
    text = outer.config.get_text_config(decoder=True)
    attention = [m for m in outer.modules() if layer_index(m) is not None and _decodes(m, text)]
    if not attention:
        raise ValueError(f"zipvl.sparse: {name} has no causal attention layers")
    holders = [m for m in outer.modules() if isinstance(m, PreTrainedModel) and set(attention) <= set(m.modules())]
    decoder = min(holders, key=lambda m: sum(1 for _ in m.modules()))
    if not decoder._can_set_attn_implementation():
        raise ValueError(
            f"zipvl.sparse: {type(decoder).__name__} does not use transformers' attention interface, so its attention "
            "cannot be replaced"
        )
    configs: dict[int, Any] = {id(c): c for c in (text, decoder.config, *(m.config for m in attention))}
    generators = [m for m in outer.modules() if hasattr(m, "_prepare_cache_for_generation")]
    return Target(decoder, attention, list(configs.values()), generators)


def _decodes(module: nn.Module, text: PretrainedConfig) -> bool:
    """Whether ``module`` is a causal attention module of the model configured by ``text``."""
    config = getattr(module, "config", None)
    same = config is text or getattr(config, "model_type", None) == text.model_type
    return same and bool(getattr(module, "is_causal", False))


def check_layers(target: Target, config: ZipVLConfig) -> None:
    """Raises if ``config.layers`` names a layer that does not exist or is never sparse.

    Raises:
        ValueError: naming the layer and the legal ones.
    """
    if config.layers is None:
        return
    able = set()
    for module in target.attention:
        index = layer_index(module)
        if index is not None and type_of_layer(module.config, index) in (None, "full_attention"):
            able.add(index)
    wrong = sorted(set(config.layers) - able)
    if wrong:
        raise ValueError(
            f"zipvl.sparse: ZipVLConfig.layers names {wrong}, which {type(target.decoder).__name__} does not have or "
            f"which cannot be sparse; those that can: {sorted(able)}"
        )
