"""Decoding by replaying one step that was captured in a CUDA graph.

A step of a 7B model takes the GPU a few milliseconds and Python a few tens: with a small cache the launches are what is
left to save. The cache's lengths live on the device and its storage is reserved beforehand, so one captured step serves
every later one. ``generate()`` does it by itself (``Replaying``); ``DecodeGraph`` is for loops of one's own.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMode

from zipvl.stats import Decoding
from zipvl.transformers import cache_names
from zipvl.transformers.cache import ZipVLCache
from zipvl.transformers.cache_layer import ZipVLCacheLayer
from zipvl.transformers.methods import Method, set_aside
from zipvl.transformers.target import KEYWORD
from zipvl.transformers.walk import modules_of

FEWEST_STEPS = 16
"""Fewer steps are decoded eagerly unless ``ZipVLConfig.decode`` is ``"graph"``: a capture takes as long as one."""

ROOM = 512
"""Steps that a graph has room for; then the next is captured."""

DEVICES = ("cuda",)
"""Types of devices whose steps can be captured."""

BACKEND = "inductor"
"""The compiler of steps."""

_PLAIN = (bool, int, float, str, Cache)  # values that a step may be given beside tensors, compared before a replay
_STATES = ("attentions", "hidden_states")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Captured:
    """One decode step behind a packed cache, captured in a CUDA graph.

    Args:
        layers: the cache's, all packed, on ``device``.
        device: one GPU.
        step: runs the step on tensors that stay where they are; its result is kept.
        steps: how many may be replayed.
        warm_up: run the step once before, outside the capture; what it appends is taken back.
    """

    def __init__(
        self,
        layers: list[ZipVLCacheLayer],
        device: torch.device,
        step: Callable[[], Any],
        steps: int,
        *,
        warm_up: bool = False,
    ) -> None:
        self._layers, self._device, self.left = layers, device, steps
        for layer in layers:
            layer.reserve(steps + 1)
            layer.make_room(2 if warm_up else 1)  # for the step that is taken back and the one that is captured
        before = [layer.counts() for layer in layers]
        try:
            self._replay, self.result = self._capture(step, warm_up)
        finally:
            for layer, counts in zip(layers, before, strict=True):
                layer.withdraw(*counts)  # captured, not run
        self._storage = [tensor for layer in layers for tensor in layer.storage()]

    def _capture(self, step: Callable[[], Any], warm_up: bool) -> tuple[Callable[[], None], Any]:
        """A function that runs ``step`` again, and the result of the run."""
        with _capturing, torch.cuda.device(self._device):  # a graph is captured on a stream of the current device
            graph, side, main = torch.cuda.CUDAGraph(), _capture_stream(self._device), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                if warm_up:
                    step()  # libraries set themselves up outside the capture
                    self._take_back()
                # torch.cuda.graph would collect garbage and empty the allocator's cache first, and its own stream is of
                # the device that captured first. Other threads may go on.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    result = step()
                finally:
                    graph.capture_end()
            main.wait_stream(side)

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay, result

    def _take_back(self) -> None:
        for layer in self._layers:
            layer.crop(-1)

    def is_current(self) -> bool:
        """Whether the cache's storage is still what was captured."""
        now = [tensor for layer in self._layers for tensor in layer.storage()]
        return len(now) == len(self._storage) and all(a is b for a, b in zip(now, self._storage, strict=True))

    def replay(self) -> Any:
        """The step again, on what its tensors hold now; the result is overwritten by the next replay."""
        self.left -= 1
        for layer in self._layers:
            layer.make_room(1)
        self._replay()
        for layer in self._layers:
            layer.advance(1)
        return self.result


_capturing = threading.Lock()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a GPU.

    cuBLAS keeps a workspace of 32 MB for each stream that it has seen. It is made here, because one made in a capture
    is part of that graph's memory.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        square = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
        torch.nn.functional.linear(square, square)
        torch.nn.functional.linear(square, square, square[0])
    stream.synchronize()
    return stream


class DecodeGraph:
    """One new token a row behind a filled ``ZipVLCache``, as often as room was reserved.

    Use it where the prefill was run: inside the ``zipvl.sparse`` block, or with ``attn_implementation="zipvl"``.
    Nothing else may change the cache as long as steps are taken.

    Args:
        model: the model that filled ``cache``.
        cache: a ``ZipVLCache`` whose layers all had a sparse prefill.
        positions: ``[B]`` or ``[B, 1]``, the position of each row's next token; by default the number of tokens seen.
        steps: how many steps may be taken.
        kwargs: further arguments of every step's forward.

    Raises:
        ValueError: a layer's prefill was dense or it is no full-attention layer, or the cache is not on one GPU.
    """

    def __init__(
        self, model: Any, cache: DynamicCache, *, steps: int, positions: Tensor | None = None, **kwargs: Any
    ) -> None:
        layers: list[Any] = list(cache.layers)
        for index, layer in enumerate(layers):
            if (problem := why_not_layer(layer)) is not None:
                raise ValueError(f"DecodeGraph: {problem.format(f'layer {index}')}")
        devices = sorted({str(layer.device) for layer in layers})
        if len(devices) > 1:
            raise ValueError(
                f"DecodeGraph: a CUDA graph is of one GPU, the layers of the cache are on {', '.join(devices)}"
            )
        device = layers[0].device
        self._ids = torch.zeros(layers[0].rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.full_like(self._ids, cache.get_seq_length())
        if positions is not None:
            self._positions.copy_(positions.reshape(self._ids.shape))
        name = cache_names.name_for(type(model).forward)

        def step() -> Tensor:
            inputs = {"input_ids": self._ids, "position_ids": self._positions, name: cache}
            logits: Tensor = model(**inputs, use_cache=True, **kwargs).logits
            return logits

        self._captured = Captured(layers, device, step, steps, warm_up=True)

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits ``[B, 1, vocabulary]`` after ``tokens [B, 1]``, overwritten by the next call.

        Raises:
            RuntimeError: no room is left.
        """
        if self._captured.left == 0:
            raise RuntimeError("DecodeGraph: all reserved steps were taken; make another with more steps")
        self._ids.copy_(tokens)
        logits: Tensor = self._captured.replay()
        self._positions.add_(1)
        return logits


def why_not_layer(layer: Any) -> str | None:
    """Why a step through this layer of a cache cannot be captured, with ``{}`` where its name goes; None if it can."""
    if not isinstance(layer, ZipVLCacheLayer):
        return "{} of the cache is a " + type(layer).__name__ + ", not a ZipVLCacheLayer"
    if layer.packed is None:
        return "the prefill of {} was dense, or there was none; its cache is not packed"
    if layer.device is None or layer.device.type not in DEVICES:
        return "the cache must be on a GPU, {} is on " + str(layer.device)
    return None


class Plan:
    """How one ``generate()`` decodes: made where ``generate()`` makes its cache, and carried by that.

    Args:
        decoding: what the statistics say of it; eager where it has a reason.
        generation_config: the copy that ``generate()`` made: when it is gone, so is the call, and with it the graph.
        longest: tokens that the cache will hold at most, seen ones.
        forced: by a graph however few steps there are.
    """

    def __init__(self, decoding: Decoding, generation_config: Any, longest: int, *, forced: bool) -> None:
        self.decoding, self.longest, self.forced = decoding, longest, forced
        self._generating = weakref.ref(generation_config, lambda _: self.drop())
        self.captured: Captured | None = None
        self.inputs: dict[str, Tensor] = {}
        self.others: dict[str, Any] = {}

    def __reduce__(self) -> Any:
        return _nothing, ()  # a copy of a cache decodes eagerly

    @property
    def captures(self) -> bool:
        """Whether steps are to be captured: the call of ``generate()`` goes on, and there is no reason against it."""
        return self.decoding.reason is None and self._generating() is not None

    def give_up(self, reason: str) -> None:
        """Decodes the rest eagerly."""
        self.decoding.reason = reason
        self.drop()

    def drop(self) -> None:
        """Forgets what was captured."""
        self.captured, self.inputs, self.others = None, {}, {}


def _nothing() -> None:
    return None


def plan_decoding(
    decoder: Any, cache: ZipVLCache, generation_config: Any, mode: Any, longest: int, decoding: Decoding
) -> Plan:
    """How ``generate()`` will decode behind ``cache``, as far as is known before the prompt has run."""
    decoding.reason = _why_not(decoder, cache, generation_config, mode)
    return Plan(decoding, generation_config, longest, forced=cache.config.decode == "graph")


def _why_not(decoder: Any, cache: ZipVLCache, generation_config: Any, mode: Any) -> str | None:
    """Why this ``generate()`` decodes eagerly; None if its steps can be captured for all that is known."""
    if cache.config.decode == "eager":
        return 'ZipVLConfig.decode is "eager"'
    if mode not in _MODES:
        return f"{mode.value.replace('_', ' ')} changes the cache between steps"
    if decoder.training:
        return "training mode"
    if any(getattr(c, f"output_{x}", False) for c in (generation_config, decoder.config) for x in _STATES):
        return "hidden states or attentions are asked for"
    if (problem := _why_not_decoder(decoder)) is not None:
        return problem
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, ZipVLCacheLayer):
            return f"layer {index}'s cache is a {type(layer).__name__}"
    return None


def _why_not_decoder(decoder: Any) -> str | None:
    """Why a step of this decoder cannot be captured; None if it can."""
    devices = set()
    for module in modules_of(decoder):
        if "_hf_hook" in module.__dict__:
            return "offloaded, or under accelerate's hooks"
        for parameter in module._parameters.values():
            if isinstance(parameter, DTensor):
                return "tensor parallelism"
            if parameter is not None:
                devices.add(parameter.device)
    if any(device.type not in DEVICES for device in devices):
        return "not on a GPU"
    if len(devices) > 1:
        return "layers on several GPUs"
    if not Replaying.is_on(decoder):
        return "the decoder's forward is another's"
    if "position_ids" not in inspect.signature(inspect.unwrap(type(decoder).forward)).parameters:
        return f"{type(decoder).__name__} takes no position_ids"
    return None


def _forward(decoder: Any, given: dict[str, Any]) -> Any:
    """A step as the decoder's class has it: one function, so that what was compiled serves later answers."""
    return type(decoder).forward(decoder, **given)


class Replaying(Method):
    """A decoder's forward, on the instance: inside ``generate()`` its steps are replays of one that was captured."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get(KEYWORD)
        if call is not None and call.captures and not torch.compiler.is_compiling():
            result = self._step(call.cache, call.cache.plan, args, kwargs)
            if result is not None:
                call.reached = True
                return result
        return self.ordinary(*args, **kwargs)

    def _step(self, cache: ZipVLCache, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one step; None: this forward is none, or has to run as it is."""
        tokens, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        tokens = kwargs.get("input_ids") if tokens is None else tokens
        seen = cache.get_seq_length()
        if args or tokens is None or tokens.shape[1] != 1 or seen == 0:
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            plan.give_up("the mask is not plain causal")
            return None
        # New tokens of generate() are real, so the mask says nothing; it would grow with every step.
        inputs = {name: x for name, x in kwargs.items() if isinstance(x, Tensor) and name != "attention_mask"}
        if "position_ids" not in inputs:  # the decoder would count them on the host
            inputs["position_ids"] = torch.full((tokens.shape[0], 1), seen, device=tokens.device)
        taken = (KEYWORD, "attention_mask", *inputs)
        others = {name: x for name, x in kwargs.items() if name not in taken}
        strange = [name for name, x in others.items() if x is not None and not isinstance(x, _PLAIN)]
        strange += [name for name, x in inputs.items() if x.device != tokens.device]
        if strange:
            plan.give_up(f"the decoder is given {', '.join(strange)}, which no captured step can follow")
            return None
        if not self._is_captured(plan, inputs, others):
            problem = self._capture(cache, plan, inputs, others, kwargs[KEYWORD], plan.longest - seen)
            if problem is not None:
                plan.give_up(problem)
                return None
            if plan.captured is None:
                return None
        for name, tensor in inputs.items():
            plan.inputs[name].copy_(tensor)
        assert plan.captured is not None
        plan.decoding.replayed += 1
        return plan.captured.replay()

    @staticmethod
    def _is_captured(plan: Plan, inputs: dict[str, Tensor], others: dict[str, Any]) -> bool:
        captured = plan.captured
        if captured is None or captured.left == 0 or not captured.is_current():
            return False
        same = plan.inputs.keys() == inputs.keys() and all(plan.inputs[n].shape == x.shape for n, x in inputs.items())
        return same and plan.others == others

    def _capture(
        self,
        cache: ZipVLCache,
        plan: Plan,
        inputs: dict[str, Tensor],
        others: dict[str, Any],
        call: Any,
        remaining: int,
    ) -> str | None:
        """Captures a step on copies of ``inputs``, unless it is the first, which runs as it is and sets libraries up.

        Returns:
            why the rest has to be decoded eagerly; None: captured, or the first step.
        """
        for index, layer in enumerate(cache.layers):
            if (problem := why_not_layer(layer)) is not None:
                return problem.format(f"layer {index}")
        if plan.captured is None and not plan.decoding.steps:
            plan.decoding.steps += 1
            few = remaining < FEWEST_STEPS and not plan.forced
            return f"{max(remaining, 0)} tokens to come do not pay for the capture" if few else None
        plan.captured, plan.inputs, plan.others = None, {n: x.clone() for n, x in inputs.items()}, others
        given = plan.inputs | others | {KEYWORD: call}
        steps = min(max(remaining, 1), ROOM)
        layers: Any = cache.layers
        compiles = cache.config.decode_compile
        forward = torch.compile(_forward, backend=BACKEND) if compiles else _forward

        def step() -> Any:
            # A block's methods end with it, and with them what was compiled; one token needs none of them.
            with set_aside(modules_of(self.owner)) if compiles else nullcontext():
                return forward(self.owner, given)

        try:
            plan.captured = Captured(layers, layers[0].device, step, steps, warm_up=compiles)
        except RuntimeError as error:  # what a model does between its layers may need the host
            first, second, *_ = [*str(error).splitlines(), "", ""]
            return f"the step could not be captured: {f'{first} {second}' if first.endswith(':') else first}"
        return None
