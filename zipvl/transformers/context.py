"""``zipvl.sparse``: ZipVL on one model, for the length of a ``with`` block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMode
from transformers.utils.import_utils import is_tracing

from zipvl.config import ZipVLConfig
from zipvl.stats import Stats
from zipvl.transformers import cache_names, projections, runs, targets
from zipvl.transformers.cache import ZipVLCache, check_bits, expect_candidates, is_ready, make_sparse, settle
from zipvl.transformers.eligibility import IMPLEMENTATION


@contextmanager
def sparse(
    model: nn.Module, config: ZipVLConfig | None = None, *, record_index: bool = False, **overrides: Any
) -> Iterator[Stats]:
    """Runs the language part of ``model`` with ZipVL inside the ``with`` block, and leaves no trace after it.

    Vision towers and other submodels keep their attention. ``generate()`` and plain forwards get a ``ZipVLCache``
    where they would have made an ordinary dynamic cache. Blocks may be nested: the innermost one counts.

    Args:
        model: a transformers model, or a module around one.
        config: what to keep; the default configuration if None.
        record_index: keep the positions of the selected tokens in the statistics (``LayerStats.index``).
        overrides: fields of ``config`` to change, such as ``tau=0.9``.

    Yields:
        the statistics of the block, which stay readable after it.

    Raises:
        ValueError: the model or ``config.layers`` is not supported; inside the block, a cache that is.
    """
    config = (config or ZipVLConfig()).replace(**overrides)
    target = targets.find(model)
    targets.check_layers(target, config)
    check_bits(config, target.decoder.config)
    run = runs.Run(config, Stats(record_index=record_index))
    with ExitStack() as undo:
        undo.callback(runs.restore, runs.install(target.attention, run))
        undo.callback(projections.install(target.attention))
        _switch(target.configs, undo)
        for generator in target.generators:
            _give_generate_a_cache(generator, target, run, undo)
        before = target.decoder.register_forward_pre_hook(_CacheGiver(target, run), with_kwargs=True)
        undo.callback(before.remove)
        after = target.decoder.register_forward_hook(_AfterForward(run), with_kwargs=True)
        undo.callback(after.remove)
        yield run.stats


def _switch(configs: list[PretrainedConfig], undo: ExitStack) -> None:
    """Sets the attention implementation of exactly these configurations."""
    borrowed = [c for c in configs if c._attn_implementation_internal != IMPLEMENTATION]
    runs.borrow(borrowed)
    undo.callback(runs.give_back, borrowed)
    for config in configs:
        undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
        config._attn_implementation_internal = IMPLEMENTATION


def _give_generate_a_cache(generator: Any, target: targets.Target, run: runs.Run, undo: ExitStack) -> None:
    """Makes ``generate()`` of ``generator`` start from a ``ZipVLCache``, by a method on the instance."""
    ordinary: Callable[..., Any] = generator._prepare_cache_for_generation
    name = "_prepare_cache_for_generation"
    before = generator.__dict__.get(name)

    def prepare(
        generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if runs.run_of(target.attention[0]) is not run:  # a block inside this one is in force
            return ordinary(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if assisted:
            _check_assisted(generator, generation_config)
        given = cache_names.given(model_kwargs) is not None
        result = ordinary(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        cache = cache_names.given(model_kwargs)
        if not given and type(cache) is DynamicCache and not cache.offloading:
            name = next(name for name in cache_names.NAMES if model_kwargs.get(name) is cache)
            cache = model_kwargs[name] = ZipVLCache(target.decoder.config, run.config)
        elif cache is not None:
            _adopt(cache, target.decoder.config, run.config)
        run.assisted = weakref.ref(cache) if assisted else None
        return result

    undo.callback(generator.register_forward_pre_hook(_CandidateNote(run), with_kwargs=True).remove)
    generator.__dict__[name] = prepare
    if before is None:
        undo.callback(generator.__dict__.pop, name)
    else:
        undo.callback(generator.__dict__.__setitem__, name, before)


class _CandidateNote:
    """Forward pre-hook of a generator: tells the cache of assisted generation how many candidates follow a prompt."""

    def __init__(self, run: runs.Run) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_names.given(kwargs)
        assisted = None if self.run.assisted is None else self.run.assisted()
        if cache is assisted and isinstance(cache, Cache) and cache.get_seq_length() == 0:
            expect_candidates(cache, int(kwargs["logits_to_keep"]) - 1)


def _check_assisted(generator: Any, generation_config: Any) -> None:
    """Raises for assisted generation that could not give the tokens that plain generation gives.

    Raises:
        ValueError: naming what stands in the way, and the remedy.
    """
    problem = None
    if getattr(generation_config, "assistant_early_exit", None):
        problem = "assistant_early_exit runs this model's own layers as the assistant, on a cache of its own"
    elif not generator._supports_logits_to_keep():
        problem = f"{type(generator).__name__} takes no logits_to_keep, which says where the prompt ends"
    if problem is not None:
        raise ValueError(
            f"zipvl.sparse: this assisted generation is not supported: {problem}; use plain generation, or another "
            "assistant"
        )


class _CacheGiver:
    """Forward pre-hook of the decoder: gives it a ``ZipVLCache`` where it would make a dynamic cache."""

    def __init__(self, target: targets.Target, run: runs.Run) -> None:
        self.probe, self.run = target.attention[0], run
        self.model_config = target.decoder.config
        self.name = cache_names.name_for(type(target.decoder).forward)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if runs.run_of(self.probe) is not self.run:
            return None  # a block inside this one is in force
        self.run.start_forward()
        caches = [a for a in (*args, *kwargs.values()) if isinstance(a, Cache)]
        for cache in caches:
            _adopt(cache, self.model_config, self.run.config)
        use_cache = kwargs.get("use_cache")
        if not caches and (getattr(self.model_config, "use_cache", False) if use_cache is None else use_cache):
            kwargs = cache_names.without(kwargs) | {self.name: ZipVLCache(self.model_config, self.run.config)}
        elif not caches and is_tracing():
            kwargs = kwargs | _all_real(args, kwargs)
        return args, kwargs


def _all_real(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The mask ``[B, N]`` of real tokens alone, for a forward without mask, positions and cache; nothing for others.

    Such a forward could hold packed sequences, for all that transformers knows while a graph is traced or captured
    (eagerly it looks at the positions), and it would get a 4-D mask. But the positions are not the caller's, so it
    holds none.
    """
    if len(args) > 1 or kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
        return {}
    tokens = next((t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None)
    if tokens is None:
        return {}
    return {"attention_mask": torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)}


def _adopt(cache: Cache, model_config: PretrainedConfig, config: ZipVLConfig) -> None:
    """Makes a cache that the caller gave usable: an empty dynamic cache gets ZipVL's layers, in place.

    Raises:
        ValueError: it is another kind of cache, or was filled without ZipVL.
    """
    if is_ready(cache):
        return
    problem = None
    if type(cache) is not DynamicCache:
        problem = f"a {type(cache).__name__} cannot hold tokens that differ by layer"
    elif cache.offloading:
        problem = "an offloaded cache is not supported"
    elif cache.get_seq_length() > 0:
        problem = f"this DynamicCache already holds {cache.get_seq_length()} tokens"
    if problem is not None:
        raise ValueError(f"zipvl.sparse: {problem}; pass a new zipvl.ZipVLCache(model), or no cache at all")
    assert isinstance(cache, DynamicCache)
    make_sparse(cache, config, model_config)


class _AfterForward:
    """Forward hook of the decoder. Everything is launched by now, so the cache can be trimmed: the device still has the
    last layer to do. Then warns once if no layer was sparse for a prompt that is long enough."""

    def __init__(self, run: runs.Run) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_names.given(kwargs)
        settle(cache_names.of_output(output) if cache is None else cache)
        reasons = self.run.idle_reasons()
        if reasons:
            self.run.warn_once(
                f"zipvl.sparse: no layer of {type(module).__name__} was sparse for a prompt that is long "
                f"enough (dense_below={self.run.config.dense_below}): {'; '.join(reasons)}"
            )
