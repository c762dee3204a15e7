"""The hooks of a model that runs with ZipVL: one before the decoder's forward, which makes the ``Call`` that its
attention layers are handed, one after it, one before the whole model's, which hands the input ids on, and what
``generate()`` asks.

A model has them while a block or ``configure`` is in force, or for good once a ``ZipVLCache`` was made for it. They
are parts of the model: its deep copies, pickles and saved files have copies of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.utils.import_utils import is_tracing

from zipvl.config import ZipVLConfig
from zipvl.stats import Decoding
from zipvl.transformers import cache_names, projections, vision
from zipvl.transformers.cache import ZipVLCache, adopt
from zipvl.transformers.call import Call, Run
from zipvl.transformers.decode import Replaying, plan_decoding
from zipvl.transformers.methods import Method
from zipvl.transformers.mlp import MLPs
from zipvl.transformers.ranks import over_ranks
from zipvl.transformers.target import IDS, IMPLEMENTATION, IN_BLOCK, KEYWORD, Target, find, takes_keywords
from zipvl.transformers.vision import VISION
from zipvl.transformers.visual import Visual, VisualMask, is_visual, named, visual_ids

_Altered: TypeAlias = tuple[Any, str, Any]
"""An object, its attribute, and what the attribute was."""


class DecoderHook:
    """Forward pre-hook of a decoder, and its forward hook.

    Args:
        target: the language part of the model.

    Attributes:
        runs: in force, the innermost last.
        stays: without runs too.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.runs, self.stays = target, list[Run](), False
        self._configured: tuple[Run, list[_Altered]] | None = None
        self.cache_name = cache_names.name_for(type(target.decoder).forward)
        self.visual_ids = visual_ids(target.outer.config)
        self.mlps, self._mlps_of_caches = MLPs(target), set[int]()
        self._handles: list[Any] = []

    @classmethod
    def of(cls, target: Target) -> DecoderHook:
        """The hook of this model, or a new one that is not attached yet."""
        found = [hook for hook in target.decoder._forward_pre_hooks.values() if isinstance(hook, cls)]
        return found[0] if found else cls(target)

    def settled(self, config: ZipVLConfig, visual_mask: VisualMask | None) -> ZipVLConfig:
        """``config`` with the ``tau`` that it means for this model, some of whose tokens the caller may name visual."""
        return config.for_model(visual=visual_mask is not None or bool(self.visual_ids))

    def attach(self) -> None:
        """Installs everything, unless it is."""
        if self._handles:
            return
        target, add = self.target, self._handles.append
        try:
            add(target.decoder.register_forward_pre_hook(self, with_kwargs=True))
            add(target.decoder.register_forward_hook(_after_forward, with_kwargs=True))
            for model in target.around:
                hand_on = _HandIdsOn(self, model, outermost=model is target.around[0])
                add(model.register_forward_pre_hook(hand_on, with_kwargs=True))
            for generator in target.generators:
                add(generator.register_forward_pre_hook(_note_candidates, with_kwargs=True))
                _PrepareCache(generator, self).install()
            projections.install(target.attention)
            Replaying(target.decoder).install()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Removes what ``attach`` installed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for generator in self.target.generators:
            _PrepareCache.remove(generator)
        projections.remove(self.target.attention)
        self.mlps.keep(set())
        Replaying.remove(self.target.decoder)

    def _end(self, run: Run, before: list[_Altered]) -> None:
        """Undoes ``run``, and what ``_alter`` noted; detaches unless another is in force or the hook stays."""
        for owner, attribute, value in reversed(before):
            setattr(owner, attribute, value)
        self.runs = [other for other in self.runs if other is not run]
        self._keep_mlps()
        if not self.runs and not self.stays:
            self.detach()

    @contextmanager
    def block(self, run: Run) -> Iterator[None]:
        """Has ``run`` in force for the length of a block, in which the attention implementation is ours."""
        before: list[_Altered] = []
        try:
            self.attach()
            self.runs.append(run)
            self._keep_mlps()
            self._alter(run, IN_BLOCK, before)
            yield
        finally:
            self._end(run, before)

    def _keep_mlps(self) -> None:
        """Has the MLPs installed that the runs in force ask for, and those of caches."""
        asked = {layer for run in self.runs for layer in run.config.skip_mlp_layers}
        self.mlps.keep(asked | self._mlps_of_caches)

    def stay_for(self, config: ZipVLConfig) -> None:
        """Attaches for good, for a cache of ``config``.

        Raises:
            ValueError: as ``MLPs.check`` says.
        """
        self.mlps.check(config)
        self.stays = True
        self._mlps_of_caches.update(config.skip_mlp_layers)
        self.attach()
        self._keep_mlps()

    def _alter(self, run: Run, implementation: str, before: list[_Altered]) -> None:
        """Gives configurations their attention implementation, and blocks of vision towers their compiled call; appends
        what they had to ``before``."""
        outer = self.target.outer
        names = [(config, implementation) for config in self.target.configs]
        if run.config.vision_attention:
            names += [(config, VISION) for config in vision.configs_of(outer, self.target.configs)]
        for config, name in names:
            before.append((config, "_attn_implementation_internal", config._attn_implementation_internal))
            config._attn_implementation_internal = name
        for block in vision.blocks_of(outer, self.target.decoder) if run.config.vision_compile else ():
            before.append((block, vision.COMPILED, getattr(block, vision.COMPILED)))
            vision.compile_block(block)

    def compile_copies(self) -> None:
        """Compiles the blocks of a copied or loaded model's towers: copies of modules leave their compiled call."""
        for block, attribute, _ in self._configured[1] if self._configured is not None else ():
            if attribute == vision.COMPILED and getattr(block, attribute) is None:
                vision.compile_block(block)

    def configure(self, run: Run) -> None:
        """Has ``run`` in force from now on, outside of every block."""
        self.unconfigure()
        self.runs.insert(0, run)
        self.attach()
        self._keep_mlps()
        self._configured = run, []
        self._alter(run, IMPLEMENTATION, self._configured[1])

    def unconfigure(self) -> None:
        """Undoes ``configure``, if it was called."""
        if self._configured is not None:
            configured, self._configured = self._configured, None
            self._end(*configured)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hands on a ``Call``. In a run the decoder gets a ``ZipVLCache`` where it would make a dynamic cache."""
        config: Any = module.config
        noted = kwargs.get(IDS)
        if noted is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != IDS}
        if self.mlps.installed:
            self.mlps.passed.begin()
        cache = cache_names.given(kwargs)
        if not isinstance(cache, Cache):  # by position, or by another name
            cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, Cache)), None)
        if config._attn_implementation not in (IMPLEMENTATION, IN_BLOCK):
            if isinstance(cache, ZipVLCache):
                raise RuntimeError(
                    f"ZipVLCache: another attention implementation ran, {config._attn_implementation!r}, which cannot "
                    'read this cache; use zipvl.sparse(model) or attn_implementation="zipvl"'
                )
            return args, kwargs
        if not self.runs and not isinstance(cache, ZipVLCache):
            return args, kwargs
        if kwargs.get("return_shared_kv_states"):
            raise ValueError(
                f"zipvl: {type(module).__name__} was asked for its keys and values (return_shared_kv_states=True, as "
                "by an assistant that reads them), which a ZipVLCache does not hold as tensors; use plain generation, "
                "or another assistant"
            )
        if not self.runs:
            assert isinstance(cache, ZipVLCache)
            run, cache.handed_on = Run(cache.config, cost_key=cache.cost_key), True
            return args, kwargs | {KEYWORD: self._call(run, cache, noted, args, kwargs)}
        run = self.runs[-1]
        use_cache = kwargs.get("use_cache")
        if cache is not None:
            adopt(cache, config, run.config, run.cost_key)
        elif getattr(config, "use_cache", False) if use_cache is None else use_cache:
            cache = ZipVLCache(config, run.config, cost_key=run.cost_key)
            kwargs = cache_names.without(kwargs) | {self.cache_name: cache}
        elif is_tracing():
            kwargs = kwargs | _all_real(args, kwargs)
        if isinstance(cache, ZipVLCache):
            cache.handed_on = True
        return args, kwargs | {KEYWORD: self._call(run, cache, noted, args, kwargs)}

    def _call(
        self, run: Run, cache: Cache | None, noted: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        call = Call(run, cache, self._visual(run, cache, noted, args, kwargs), over_ranks(self.target.outer))
        if call.config.skip_mlp_layers:
            call.passed = self.mlps.admit(call.config)
        return call

    def _visual(
        self, run: Run, cache: Cache | None, noted: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Visual:
        """Which tokens of this forward of the decoder are visual, and of those before it; the cache remembers them.

        Args:
            noted: the input ids that the whole model was given; None: none.
        """
        ids, embeds = _first_given(args, kwargs), kwargs.get("inputs_embeds")
        tokens = ids if embeds is None else embeds
        if tokens is None or tokens.shape[1] <= 1:  # a decode step asks nothing of it
            return Visual()
        ours = cache if isinstance(cache, ZipVLCache) else None
        seen, before = (0, None) if ours is None else (ours.get_seq_length(), ours.visual)
        config = run.config if ours is None else ours.config
        if not config.keep_text and config.text_prompts != "dense":
            return Visual(None, before, seen)
        if ids is None and noted is not None and noted.shape == tokens.shape[:2]:
            ids = noted
        if run.visual_mask is not None:
            new = named(run.visual_mask, ids, embeds, seen)
        else:
            new = None if ids is None else is_visual(ids, self.visual_ids)
        visual = Visual(new, before, seen)
        if ours is not None and new is not None:
            ours.visual = visual.all()
        return visual


class _HandIdsOn:
    """Forward pre-hook of a model around the decoder: hands a prompt's input ids on. The outermost has the say.

    Args:
        hook: the decoder's.
        model: the module whose hook this is.
        outermost: whether it is.
    """

    def __init__(self, hook: DecoderHook, model: nn.Module, *, outermost: bool) -> None:
        self.hook, self.outermost, self.can = hook, outermost, takes_keywords(model)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.outermost:
            self.hook.compile_copies()
        ids = _first_given(args, kwargs)
        if not self.can or IDS in kwargs or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            return None
        return (args, kwargs | {IDS: ids}) if ids.shape[1] > 1 else None


def _first_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward is given as its input ids, by name or as its first argument; None: nothing."""
    ids = kwargs.get("input_ids")
    return args[0] if ids is None and args else ids


def hand_on(model: PreTrainedModel, config: ZipVLConfig) -> None:
    """Has ``model`` hand a ``ZipVLCache`` of ``config`` that it is given to its attention layers, from now on."""
    DecoderHook.of(find(model)).stay_for(config)


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


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder. Everything is launched by now, so the cache can be trimmed: the device still has the
    last layer to do. Then warns once if no layer was sparse for a prompt that is long enough.

    Raises:
        RuntimeError: the decoder's layers did not hand the call on to their attention, or an MLP that was to run for
            selected tokens alone was not called.
    """
    call = kwargs.get(KEYWORD)
    if call is None:
        return
    if isinstance(call.cache, ZipVLCache):
        call.cache.handed_on = False
    name = type(module).__name__
    if not call.reached:
        raise RuntimeError(
            f"zipvl: the layers of {name} do not hand keyword arguments on to their attention function, so this model "
            "is not supported and ran its ordinary attention"
        )
    if call.passed is not None and (left := call.passed.left()):
        raise RuntimeError(
            f"zipvl: ZipVLConfig.skip_mlp_layers names {left}, whose MLPs were not called behind their attention. "
            "Leave them out"
        )
    if call.saw_prefill:
        if isinstance(call.cache, ZipVLCache):
            call.cache.settle()
        reasons = call.idle_reasons()
        if reasons:
            call.run.warn_once(
                f"zipvl.sparse: no layer of {name} was sparse for a prompt that is long enough "
                f"(dense_below={call.config.dense_below}): {'; '.join(reasons)}"
            )


class _PrepareCache(Method):
    """``generate()``'s own way to make a cache, on the instance: in a run it is a ``ZipVLCache``.

    Args:
        owner: the model whose method this is.
        hook: has the run in force.
    """

    name = "_prepare_cache_for_generation"

    def __init__(self, owner: Any, hook: DecoderHook) -> None:
        super().__init__(owner)
        self.hook = hook

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        run, decoder = self.hook.runs[-1] if self.hook.runs else None, self.hook.target.decoder
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if assisted and (run is not None or isinstance(cache_names.given(model_kwargs), ZipVLCache)):
            _check_assisted(self.owner, generation_config)
        result = self.ordinary(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = cache_names.given(model_kwargs)
        if run is not None or isinstance(cache, ZipVLCache):
            _check_padding(model_kwargs.get("attention_mask"), run)
        if cache is not None and run is not None:
            adopt(cache, decoder.config, run.config, run.cost_key)
        if isinstance(cache, ZipVLCache):
            cache.assisted = assisted
            decoding = Decoding() if run is None or run.stats is None else run.stats.decodes()
            cache.plan = plan_decoding(decoder, cache, generation_config, generation_mode, max_cache_length, decoding)
        return result


def _check_padding(attention_mask: Any, run: Run | None) -> None:
    """Warns once a run if rows of a prompt end in padding, behind which ``generate()`` would go on."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] == 0:
        return
    rows = int((attention_mask[:, -1] == 0).sum())
    if rows:
        (Run(ZipVLConfig()) if run is None else run).warn_once(
            f"zipvl: {rows} of {attention_mask.shape[0]} rows of this batch end in padding. generate() goes on behind "
            "it, so the answers of those rows mean little, with zipvl and without. Pad on the left "
            '(tokenizer.padding_side = "left").'
        )


def _note_candidates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a generator: tells the cache of assisted generation how many candidates follow a prompt."""
    cache = cache_names.given(kwargs)
    if isinstance(cache, ZipVLCache) and cache.assisted and cache.get_seq_length() == 0:
        cache.candidates = int(kwargs["logits_to_keep"]) - 1


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
