"""The common part of the baselines: hooks on a transformers model that let a prompt become shorter between its layers.

A baseline is a small class (`Baseline`); `applied` puts it on a model for the length of a ``with`` block and leaves no
trace. Between two layers of the prefill the hidden states are gathered, and with them the position embeddings: a token
that stays keeps its original position. A token that is dropped before layer `i` is neither computed nor cached from
layer `i` on, so layers' caches differ in length; decoded tokens go on at the position after the whole prompt, because
a cache layer counts the dropped tokens as seen.

Budget: the mean over the layers of the share of the prompt's tokens that take part in that layer's attention.

Limits, each an error that says so: every row of a batch has as many image tokens as the others and no padding, the
cache is a new `DynamicCache` (or none is given), decoder layers lie in one list.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from zipvl import ops
from zipvl.transformers import cache_names
from zipvl.transformers import target as targets

__all__ = [
    "Baseline",
    "Prompt",
    "PrunedLayer",
    "Record",
    "applied",
    "attention_replaced",
    "image_budget",
    "instance_attribute",
    "keep_best",
    "last_query_importance",
    "places_of",
    "solve",
    "steps_without_cudnn",
]

IMPLEMENTATION = "zipvl_baselines"
Attention = Callable[..., tuple[Tensor, Any]]

_functions: weakref.WeakKeyDictionary[nn.Module, Attention] = weakref.WeakKeyDictionary()


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    return _functions.get(module, sdpa_attention_forward)(module, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextmanager
def attention_replaced(
    modules: Iterable[nn.Module], configs: Iterable[PretrainedConfig], function: Attention
) -> Iterator[None]:
    """Attention of ``modules``, whose configurations are ``configs``, is ``function`` inside the ``with`` block.

    Args:
        function: as transformers' attention interface has it; modules of the same configuration that are not in
            ``modules`` get SDPA.
    """
    with ExitStack() as undo:
        for module in modules:
            before = _functions.get(module)
            if before is None:
                undo.callback(_functions.pop, module, None)
            else:
                undo.callback(_functions.__setitem__, module, before)
            _functions[module] = function
        for config in configs:
            undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
            config._attn_implementation_internal = IMPLEMENTATION
        yield


@contextmanager
def steps_without_cudnn(decoder: nn.Module) -> Iterator[None]:
    """Decode steps of ``decoder`` inside the ``with`` block use no cuDNN attention; prompts do.

    cuDNN plans anew for every length of the cache, and each decoded token makes a new length. A plan takes some 40 ms
    of host time, once for each length among the layers. PyTorch's other attention needs none.
    """
    undo: list[Callable[[], None]] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids", args[0] if args else None) if given is None else given
        if ids is not None and ids.shape[1] == 1:
            undo.append(
                functools.partial(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
            )
            torch.backends.cuda.enable_cudnn_sdp(False)

    def after(*_: Any) -> None:
        while undo:
            undo.pop()()

    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(decoder.register_forward_hook(after, prepend=True, always_call=True).remove)
        yield


@contextmanager
def instance_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the ``with`` block, by the instance's own dictionary."""
    missing = object()
    before = owner.__dict__.get(name, missing)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


class PrunedLayer(DynamicLayer):
    """A cache layer that lacks ``dropped`` tokens of the prompt and counts them as seen."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0

    def get_seq_length(self) -> int:
        """Tokens seen: those stored, and those dropped before this layer."""
        keys = self.keys if self.is_initialized else None
        return (0 if keys is None or not keys.numel() else keys.shape[-2]) + self.dropped

    def crop(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("zipvl.baselines: a cache that lacks tokens cannot be cropped; use plain generation")


@dataclass
class Prompt:
    """A prefill on its way through the layers. ``n`` tokens are left of ``total``.

    Args:
        image: bool ``[B, n]``, the image tokens (or what they were merged into) among those left.
        positions: int64 ``[B, n]``, their places in the whole prompt, ascending.
        total: length of the whole prompt.
        image_total: image tokens of each row in the beginning.
        image_left: image tokens of each row among those left.
        images: pictures in each row.
        layers: how many layers there are.
        image_sizes: height and width of every picture of the batch, as the model was given them.
        scores: float32 ``[B, n]``, importance found in the last layer that the baseline observed.
        kept: for each layer so far the ``positions`` in its attention.
    """

    image: Tensor
    positions: Tensor
    total: int
    image_total: int
    images: int
    layers: int
    image_sizes: Tensor | None = None
    scores: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)
    image_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.image_left = self.image_total

    def keep(self, index: Tensor, hidden: Tensor) -> Tensor:
        """Goes on with the tokens ``index [B, m]``, ascending places among those left, all of the text among them.

        Args:
            hidden: ``[B, n, d]``.

        Returns:
            their hidden states, ``[B, m, d]``.
        """
        self.image_left -= self.positions.shape[1] - index.shape[1]
        self.image, self.positions = self.image.gather(1, index), self.positions.gather(1, index)
        return _take(hidden, index)


class Baseline:
    """One method: how much of the image stays in each layer, and which tokens."""

    name = "baseline"

    def schedule(self, layers: int) -> list[float]:
        """The share of the image tokens in the attention of each of ``layers`` layers."""
        raise NotImplementedError

    def observes(self, layer: int, layers: int) -> bool:
        """Whether `importance` is wanted in this layer: by default where fewer tokens go on to the next one."""
        shares = self.schedule(layers)
        return layer + 1 < layers and shares[layer + 1] < shares[layer]

    def importance(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """float32 ``[B, n]`` of ``q [B, Hq, n, D]`` and ``k [B, Hkv, n, D]``, positions applied."""
        return last_query_importance(q, k, scale)

    def reduce(self, layer: int, hidden: Tensor, prompt: Prompt) -> Tensor:
        """The input of ``layer``, from ``hidden [B, n, d]``, the output of the one before. Updates ``prompt``."""
        share = self.schedule(prompt.layers)[layer]
        count = round(share * prompt.image_total)
        if prompt.scores is None or count >= prompt.image_left:
            return hidden
        text = hidden.shape[1] - prompt.image_left
        index = keep_best(prompt.scores, prompt.image, text + count)
        prompt.scores = None
        return prompt.keep(index, hidden)

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """A context that puts on the model whatever else the baseline needs; nothing by default."""
        yield


@dataclass
class Record:
    """The record of a ``with`` block.

    Args:
        kept: for each layer of the last prefill the positions in its attention, ``[B, n]``.
        prefills: how many rows were seen.
    """

    kept: list[Tensor] = field(default_factory=list)
    prefills: int = 0
    _shares: list[float] = field(default_factory=list)

    def add(self, prompt: Prompt) -> None:
        """Notes a prefill that is through."""
        rows = prompt.positions.shape[0]
        shares = [positions.shape[1] / prompt.total for positions in prompt.kept]
        before = self._shares or [0.0] * len(shares)
        self._shares = [old + rows * new for old, new in zip(before, shares, strict=True)]
        self.kept, self.prefills = prompt.kept, self.prefills + rows

    @property
    def shares(self) -> list[float]:
        """The mean share of tokens in each layer's attention."""
        return [total / self.prefills for total in self._shares]

    @property
    def budget(self) -> float:
        """The mean of ``shares``; 1 if nothing ran."""
        return sum(self.shares) / len(self._shares) if self._shares else 1.0


class _Run:
    """One baseline on one model."""

    def __init__(self, baseline: Baseline, image_token: int, layers: int) -> None:
        self.baseline, self.image_token, self.layers = baseline, image_token, layers
        self.record = Record()
        self.prompt: Prompt | None = None
        self.input_ids: Tensor | None = None
        self.image_sizes: Tensor | None = None

    def note_inputs(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the whole model, which alone is given the token ids."""
        given = kwargs.get("input_ids", args[0] if args else None)
        self.input_ids = given if isinstance(given, Tensor) else None

    @contextmanager
    def noting_pictures(self, model: Any) -> Iterator[None]:
        """Notes the sizes of the pictures whenever image features are computed, by ``generate`` or ``forward``."""
        before = getattr(model, "get_image_features", None)
        if before is None:
            yield
            return

        @functools.wraps(before)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.image_sizes = kwargs.get("image_sizes", args[1] if len(args) > 1 else None)
            return before(*args, **kwargs)

        with instance_attribute(model, "get_image_features", noted):
            yield

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder."""
        self.prompt = None
        cache = cache_names.given(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or not bool((mask != 0).all())):
            raise ValueError(f"{self.baseline.name}: prompts with padding or a mask of their own are not supported")
        use_cache = kwargs.get("use_cache")
        if cache is None and (getattr(module.config, "use_cache", False) if use_cache is None else use_cache):
            cache = DynamicCache(config=module.config)
            name = cache_names.name_for(type(module).forward)
            kwargs = cache_names.without(kwargs) | {name: cache}
        if cache is None or cache.get_seq_length() == 0:
            _prepare(self.baseline.name, cache, self.layers)
            self.prompt = self._prompt(kwargs.get("inputs_embeds"))
        return args, kwargs

    def _prompt(self, embeddings: Tensor | None) -> Prompt:
        ids = self.input_ids
        if ids is None or (embeddings is not None and ids.shape != embeddings.shape[:2]):
            raise ValueError(f"{self.baseline.name}: the model must be given input_ids, which say where the image is")
        image = ids == self.image_token
        counts = image.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"{self.baseline.name}: rows must have equally many image tokens, got {counts}")
        batch, total = ids.shape
        positions = torch.arange(total, device=ids.device).expand(batch, total)
        images = 1 if self.image_sizes is None else len(self.image_sizes) // batch
        return Prompt(image, positions, total, counts[0], images, self.layers, self.image_sizes)

    def before_layer(self, layer: int) -> Callable[..., Any]:
        """The pre-hook of decoder layer ``layer``."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = kwargs | {"attention_mask": None}
            prompt = self.prompt
            if prompt is None:
                return args, kwargs
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if prompt.image_total:
                hidden = self.baseline.reduce(layer, hidden, prompt)
            prompt.kept.append(prompt.positions)
            if prompt.positions.shape[1] < prompt.total:
                places = prompt.positions
                kwargs["position_embeddings"] = tuple(_take(t, places) for t in kwargs["position_embeddings"])
                if kwargs.get("position_ids") is not None:
                    ids = kwargs["position_ids"]
                    kwargs["position_ids"] = ids.expand(*ids.shape[:-2], *places.shape[:1], -1).gather(
                        -1, places.expand(*ids.shape[:-2], *places.shape)
                    )
                if (cache := cache_names.given(kwargs)) is not None:
                    cache.layers[layer].dropped = prompt.total - places.shape[1]
            return (hidden, *args[1:]), kwargs

        return hook

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """The attention function: causal among the tokens that are there."""
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        new, stored = q.shape[2], k.shape[2]
        if (
            self.prompt is not None
            and self.prompt.image_total
            and self.baseline.observes(module.layer_idx, self.layers)
        ):
            self.prompt.scores = self.baseline.importance(q, k, scale)
        mask = None
        if 1 < new < stored:
            mask = torch.ones(new, stored, dtype=torch.bool, device=q.device).tril(stored - new)
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scale)

    def end(self, *_: Any) -> None:
        """Forward hook of the decoder."""
        if self.prompt is not None:
            self.record.add(self.prompt)
            self.prompt = None


@contextmanager
def applied(model: nn.Module, baseline: Baseline) -> Iterator[Record]:
    """Runs ``model`` with ``baseline`` inside the ``with`` block. A prefill's logits cover the tokens that are left.

    Args:
        model: a transformers model that generates from pictures; it must be called with ``input_ids``.

    Yields:
        what was kept; it stays readable after the block.

    Raises:
        ValueError: the model, or inside the block a prompt or cache, is not supported.
    """
    target = targets.find(model)
    layers = getattr(target.decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{baseline.name}: {type(target.decoder).__name__} keeps its layers in no list called 'layers'"
        )
    config: Any = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if token is None:
        raise ValueError(f"{baseline.name}: the configuration of {type(model).__name__} names no image token")
    run = _Run(baseline, token, len(layers))
    baseline.schedule(len(layers))
    with ExitStack() as undo:
        undo.enter_context(attention_replaced(target.attention, target.configs, run.attend))
        undo.enter_context(steps_without_cudnn(target.decoder))
        hooks = [
            model.register_forward_pre_hook(run.note_inputs, with_kwargs=True),
            target.decoder.register_forward_pre_hook(run.begin, with_kwargs=True),
            target.decoder.register_forward_hook(run.end),
            *(
                layer.register_forward_pre_hook(run.before_layer(i), with_kwargs=True, prepend=False)
                for i, layer in enumerate(layers)
            ),
        ]
        for hook in hooks:
            undo.callback(hook.remove)
        undo.enter_context(run.noting_pictures(getattr(model, "model", model)))
        undo.enter_context(baseline.installed(model))
        yield run.record


def _prepare(name: str, cache: Cache | None, layers: int) -> None:
    """Gives an empty cache layers that may lack tokens."""
    if cache is None:
        return
    if type(cache) is not DynamicCache or cache.offloading:
        raise ValueError(f"{name}: expected a new DynamicCache or none, got a {type(cache).__name__}")
    cache.layers = [PrunedLayer() for _ in range(layers)]


def _take(states: Tensor, index: Tensor) -> Tensor:
    """``states [..., B or 1, N, d]`` at the places ``index [B, m]``, ``[..., B, m, d]``."""
    *outer, _, tokens, width = states.shape
    states = states.expand(*outer, index.shape[0], tokens, width)
    return states.gather(-2, index[..., None].expand(*outer, *index.shape, width))


# ---- pieces of the methods


def last_query_importance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The attention that the last token pays to each token, mean over the heads: ``probe_scores`` of one probe.

    Args:
        q: ``[B, Hq, n, D]``; k: ``[B, Hkv, n, D]``.

    Returns:
        float32 ``[B, n]``, rows sum to 1.
    """
    last = torch.full((q.shape[0], 1), q.shape[2] - 1, dtype=torch.int32, device=q.device)
    return ops.probe_scores(q, k, last, scale=scale)[0]


def keep_best(scores: Tensor, image: Tensor, count: int) -> Tensor:
    """``count`` tokens of each row: all of the text, then image tokens by their scores, ties to the lower position.

    Args:
        scores: float ``[B, n]``; image: bool ``[B, n]``; count: how many stay, at least those of the text.

    Returns:
        int64 ``[B, count]``, ascending.
    """
    ranked = scores.masked_fill(~image, torch.inf).argsort(dim=1, descending=True, stable=True)
    return ranked[:, :count].sort(dim=1).values


def places_of(mask: Tensor, count: int) -> Tensor:
    """Where ``mask`` is true, without a host read.

    Args:
        mask: bool ``[B, n]``, ``count`` true in each row.

    Returns:
        int64 ``[B, count]``, ascending.
    """
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def image_budget(budget: float, tokens: int, image_tokens: int) -> float:
    """The share of the image tokens that makes ``budget`` of all ``tokens``, when the text always stays.

    Raises:
        ValueError: the text alone is more, or ``budget`` is not in ``(0, 1]``.
    """
    share = (budget * tokens - (tokens - image_tokens)) / image_tokens
    if not 0.0 < budget <= 1.0 or share < 0.0:
        least = (tokens - image_tokens) / tokens
        raise ValueError(f"budget must be in ({least:.3g}, 1] for {tokens - image_tokens} text tokens, got {budget}")
    return share


def solve(mean_share: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where the growing function ``mean_share`` reaches ``target`` between ``low`` and ``high``, by bisection.

    Raises:
        ValueError: it does not reach it there; the message names what it does reach.
    """
    lowest, highest = mean_share(low), mean_share(high)
    if not lowest - 1e-9 <= target <= highest + 1e-9:
        raise ValueError(
            f"budget: {target:.3f} of the image tokens is out of reach; {lowest:.3f} to {highest:.3f} is within"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(middle) < target else (low, middle)
    return high
