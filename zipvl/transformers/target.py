"""Finding the language part of a model, and what its attention layers are."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from zipvl.config import ZipVLConfig
from zipvl.transformers.features import problem_of
from zipvl.transformers.walk import modules_of

IMPLEMENTATION = "zipvl"
"""The attention implementation that a model is given for good."""

IN_BLOCK = "zipvl_block"
"""The one that configurations have inside ``zipvl.sparse``. A module under it that is handed no ``Call`` belongs to
another model, which only shares the configuration object, and is left alone."""

KEYWORD = "zipvl"
"""The keyword argument that hands a ``Call`` from a decoder's pre-hook to its attention function."""

IDS = "zipvl_input_ids"
"""The keyword argument that hands a prompt's input ids from the pre-hook of a whole model to its decoder's."""

_WITHOUT = "run this model without zipvl"
_NO_INTERFACE = f"does not use transformers' attention interface, so its attention cannot be replaced; {_WITHOUT}"


@dataclass
class Target:
    """The language part of a model.

    Args:
        outer: the outermost transformers model.
        decoder: the innermost model that holds the attention layers, and makes the cache if none is given.
        attention: its attention modules.
        configs: the configuration objects that decide their attention implementation.
        generators: the models around it that have ``generate``.
        around: the models that hold the decoder, the outermost first.
    """

    outer: PreTrainedModel
    decoder: PreTrainedModel
    attention: list[nn.Module]
    configs: list[PretrainedConfig]
    generators: list[Any]
    around: list[Any]


def find(model: nn.Module) -> Target:
    """The language part of ``model``, which may be wrapped in further modules.

    Raises:
        ValueError: there is none, or it is an encoder-decoder, of a kind that ``check_model`` refuses, without
            transformers' attention interface, with a cache of its own kind, or its attention asks for what is not
            supported. The message says which, and the remedy.
    """
    name = type(model).__name__
    outer: Any = model
    if not isinstance(model, PreTrainedModel):
        outer = next((m for m in modules_of(model) if isinstance(m, PreTrainedModel)), None)
    if outer is None:
        raise ValueError(f"zipvl.sparse: {name} holds no transformers model")
    if getattr(outer.config, "is_encoder_decoder", False):
        raise ValueError(f"zipvl.sparse: {name} is an encoder-decoder, which is not supported; use a decoder model")
    check_model(outer.config)
    text = outer.config.get_text_config(decoder=True)
    modules = modules_of(outer)
    generates = outer.can_generate()
    attention = [m for m in modules if layer_index(m) is not None and _decodes(m, text)]
    attention = [m for m in attention if generates or m.is_causal]
    if not attention:
        raise ValueError(f"zipvl.sparse: {name} {_why_none(outer, modules)}")
    models = [(m, set(modules if m is outer else modules_of(m))) for m in modules if isinstance(m, PreTrainedModel)]
    decoder, _ = min((pair for pair in models if pair[1].issuperset(attention)), key=lambda pair: len(pair[1]))
    problem = _why_not(decoder)
    if problem is not None:
        raise ValueError(f"zipvl.sparse: {type(decoder).__name__} {problem}")
    parents = {id(child): parent for parent in modules for child in parent._modules.values()}
    for module in attention:
        problem = problem_of(module, parents.get(id(module)), latents=caches_latents(text))
        if problem is not None:
            where = f"{type(module).__name__}, layer {layer_index(module)}"
            raise ValueError(f"zipvl attention ({where}): {problem}")
    configs: dict[int, Any] = {id(c): c for c in (text, decoder.config, *(m.config for m in attention))}
    generators = [m for m, _ in models if hasattr(m, "_prepare_cache_for_generation")]
    around = [m for m, parts in models if m is not decoder and decoder in parts]
    return Target(outer, decoder, attention, list(configs.values()), generators, around)


def _why_none(outer: PreTrainedModel, modules: list[nn.Module]) -> str:
    """Why none of ``modules`` is a causal attention module of a decoder's layer, and the remedy where there is one."""
    attention = [m for m in modules if "attention" in type(m).__name__.lower() and not isinstance(m, PreTrainedModel)]
    if not attention:
        return f"has no attention layers (a recurrent or state-space model) that could be sparse; {_WITHOUT}"
    if not all(m._can_set_attn_implementation() for m in modules if isinstance(m, PreTrainedModel)):
        return _NO_INTERFACE
    if any(getattr(m, "is_causal", None) is False for m in attention):
        encoder = getattr(outer.config, "is_decoder", None) is False
        remedy = "set is_decoder=True in its configuration to make a decoder of it" if encoder else _WITHOUT
        return f"has no causal attention layers: its attention looks both ways; {remedy}"
    lacks = "layer_idx" if all(layer_index(m) is None for m in attention) else "is_causal"
    return f"has attention modules without {lacks}, by which zipvl tells a decoder's layers; {_WITHOUT}"


def _why_not(decoder: PreTrainedModel) -> str | None:
    """Why this decoder cannot be given another attention or another cache; None if it can."""
    if not decoder._can_set_attn_implementation():
        return _NO_INTERFACE
    forward = inspect.unwrap(type(decoder).forward)
    if not takes_keywords(decoder):
        return f"takes no further keyword arguments, which is how zipvl reaches its attention; {_WITHOUT}"
    for name in forward.__code__.co_names:
        named = forward.__globals__.get(name)
        if isinstance(named, type) and issubclass(named, Cache) and named.__module__ == forward.__module__:
            return f"asks for a cache of its own, {name}, which ZipVLCache cannot replace; {_WITHOUT}"
    return None


def takes_keywords(model: Any) -> bool:
    """Whether the forward of ``model`` takes keyword arguments that it does not name."""
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def check_model(model_config: PretrainedConfig) -> None:
    """Raises if it cannot be told which layer of the cache holds the keys and values that a layer attends to.

    Raises:
        ValueError: naming the model's kind and the remedy.
    """
    text = model_config.get_text_config(decoder=True)
    modes = getattr(text, "kv_sharing_modes", None) or ()
    reused = getattr(text, "num_kv_shared_layers", None) or sum(str(mode).startswith("reuse") for mode in modes)
    if reused != len(sources(text)):
        raise ValueError(
            f"ZipVLCache: {text.model_type} shares keys and values between layers in a way of its own, which is not "
            'supported; use attn_implementation="sdpa"'
        )


def caches_latents(text: PretrainedConfig) -> bool:
    """Whether a text model's cache holds latents, of which it makes keys and values at every step (multi-head latent
    attention: DeepSeek-V3, Kimi-K2.5, Mistral 4)."""
    return any(getattr(layer, "kv_lora_rank", None) for layer in layer_configs(text))


def expands_latents(module: nn.Module) -> bool:
    """Whether an attention module makes its keys and values of such latents."""
    return bool(getattr(module, "kv_lora_rank", None))


def sources(text: PretrainedConfig) -> dict[int, int]:
    """Of each layer that attends to the keys and values of an earlier one (Gemma 4 E2B and E4B, Gemma 3n), the index of
    that one: the last of its type that has its own."""
    types: Any = getattr(text, "layer_types", None) or ()
    return _sources(tuple(types), getattr(text, "num_kv_shared_layers", None) or 0)


@functools.lru_cache(maxsize=64)
def _sources(types: tuple[str, ...], shared: int) -> dict[int, int]:
    own = types[: len(types) - shared]
    last = {kind: index for index, kind in enumerate(own)}
    return {index: last[types[index]] for index in range(len(own), len(types)) if types[index] in last}


def source_of(module: nn.Module) -> int | None:
    """The layer whose keys and values an attention module attends to; None: its own."""
    index = layer_index(module)
    if index is None or not getattr(module, "is_kv_shared_layer", False):
        return None
    return sources(cast(Any, module.config)).get(index)


def is_source(module: nn.Module) -> bool:
    """Whether later layers attend to an attention module's keys and values."""
    shared = getattr(getattr(module, "config", None), "num_kv_shared_layers", None)
    return bool(shared) and getattr(module, "store_full_length_kv", False) is True


def layer_configs(text: PretrainedConfig) -> list[Any]:
    """The configuration of each layer, where layers differ; else the text configuration alone."""
    layers: Any = getattr(text, "per_layer_config", None)
    return [layers[i] for i in range(text.num_hidden_layers)] if getattr(text, "is_heterogeneous", False) else [text]


def layer_index(module: nn.Module) -> int | None:
    """The index of an attention module's layer in its decoder; None if it is not part of one."""
    index = vars(module).get("layer_idx", getattr(type(module), "layer_idx", None))
    return index if isinstance(index, int) else None


def layer_type(module: nn.Module) -> str | None:
    """The configured type of a module's layer, such as ``sliding_attention``; None if the model does not say."""
    index, types = layer_index(module), getattr(getattr(module, "config", None), "layer_types", None)
    return types[index] if types and index is not None and index < len(types) else None


def chunk_size(module: nn.Module) -> int | None:
    """The tokens of a chunk, of a layer that attends within chunks (Llama 4) and is causal up to the first one's end;
    None: it is another."""
    if layer_type(module) != "chunked_attention":
        return None
    size = getattr(getattr(module, "config", None), "attention_chunk_size", None)
    return size if isinstance(size, int) else None


def _decodes(module: nn.Module, text: PretrainedConfig) -> bool:
    """Whether ``module`` is a causal attention module of the model configured by ``text``."""
    config = getattr(module, "config", None)
    same = config is text or getattr(config, "model_type", None) == text.model_type
    return same and (bool(getattr(module, "is_causal", False)) or is_prefix_lm(module))


def is_prefix_lm(module: nn.Module) -> bool:
    """Whether an attention module calls itself not causal because tokens of the prompt see each other, as masks say;
    it is causal behind that (PaliGemma)."""
    config = getattr(module, "config", None)
    return getattr(module, "is_causal", None) is False and getattr(config, "use_bidirectional_attention", None) is True


def check_layers(target: Target, config: ZipVLConfig) -> None:
    """Raises if ``config.layers`` names a layer that does not exist or is never sparse.

    Raises:
        ValueError: naming the layer and the legal ones.
    """
    if config.layers is None:
        return
    named, able = set(config.layers), layers_that_can(target)
    wrong = sorted(named - able)
    if wrong:
        raise ValueError(
            f"zipvl.sparse: ZipVLConfig.layers names {wrong}, which {type(target.decoder).__name__} does not have or "
            f"which cannot be sparse; those that can: {sorted(able)}"
        )
    found = {index: source_of(module) for module in target.attention if (index := layer_index(module)) in named}
    alone = {index: source for index, source in found.items() if source is not None and source not in named}
    if alone:
        raise ValueError(
            f"zipvl.sparse: ZipVLConfig.layers names {sorted(alone)}, which attend to the keys and values of "
            f"{sorted(set(alone.values()))} and take their selection; name those layers too"
        )


def layers_that_can(target: Target) -> set[int]:
    """The layers that can be sparse, as far as their type says."""
    able = [m for m in target.attention if layer_type(m) in (None, "full_attention") or chunk_size(m) is not None]
    return {index for module in able if (index := layer_index(module)) is not None}
