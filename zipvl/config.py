"""The settings of one ZipVL run."""

from __future__ import annotations

import json
import math
import numbers
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

DecodeMode = Literal["auto", "graph", "eager"]
CacheMode = Literal["drop", "quantize", "full"]
TextPrompts = Literal["dense", "sparse"]
BITS = ((2, 2), (4, 2), (4, 4), (8, 8))
"""The values of ``high_bits`` and ``low_bits``: bits of keys, bits of values."""

TAU, TEXT_TAU, LOCAL_WINDOW, NUM_SINKS = 0.9, 0.97, 512, 4
"""The defaults of ``ZipVLConfig.tau``, with visual tokens and without, ``local_window`` and ``num_sinks``: with
``cache="full"`` the cheapest settings that lost at most one point on each model of docs/fidelity.md."""
PAPER_TAU = 0.975


@dataclass(frozen=True)
class ZipVLConfig:
    """ZipVL's settings: how much each layer keeps, what every token sees, what the cache stores (arXiv 2410.08584).

    Fields marked *ours* are not the paper's; ``ZipVLConfig.paper()`` is the paper's method without them.

    Args:
        tau: share of the probes' attention mass that a layer's kept tokens must hold, in ``(0, 1]``
            (Sec. 3, "layer-wise adaptive ratio"). 1 keeps every token. ``None``: 0.9 in a model whose visual tokens are
            known, 0.97 in every other, because text repeats itself less than pictures do.
        ratio: if given, replaces ``tau``: every layer keeps ``ceil(ratio * real tokens)``; in ``(0, 1]``.
        num_recent: most recent tokens used as probes (Sec. A).
        num_random: random earlier tokens used as probes, one from each of as many strata (Sec. A).
        seed: seed of that draw, below 2**63. The same seed probes the same tokens on every device and rank.
        keep_recent: last tokens of the prompt that are always kept.
        min_tokens: fewest tokens a layer keeps.
        max_ratio: largest share of the real tokens that ``tau`` or ``ratio`` may keep in a layer, in ``(0, 1]`` (ours).
            What is kept or added beside them (``keep_recent``, sinks, the window, text) comes on top.
        all_queries: compute every query against the kept keys instead of the kept queries alone (ours).
        local_window: every token sees this many tokens up to itself, itself among them, kept or not, so that no token's
            attention output is 0; 0: none (ours). The last ``local_window`` tokens of a prompt are kept too.
        num_sinks: every token sees this many first real tokens of its row, and a layer keeps them; without a window
            none (ours). A ``quantize`` cache never compresses them, window or not.
        cache: what ``ZipVLCache`` stores after the prompt: ``drop`` the kept tokens, ``quantize`` those at
            ``high_bits`` and the rest at ``low_bits``, ``full`` all as they are.
        cache_ratio: if given, ``cache="drop"`` stores this share of a row's real tokens in every layer, whatever the
            layer attended to: text that is kept, sinks, the last tokens, and then those that the ``num_recent`` last
            queries look at most; in ``(0, 1]`` (ours). ``None``: what the layer attended to.
        high_bits, low_bits: of ``cache="quantize"``: 2, 4 or 8, or ``(4, 2)``: 4 of keys and 2 of values; stored as
            such a pair. Keys at 2 bits lose more than dropping the tokens does (docs/cache.md). The paper's first
            version and ZipCache have 4 and 2, and no sinks.
        dense_below: prompts with fewer tokens than this use the model's ordinary attention. ``"auto"``: on a GPU, the
            length from which on ZipVL is no slower than dense attention, by a cost model fitted to measurements
            (``zipvl.policy``); 256 elsewhere.
        layers: indices of the layers that must be sparse. ``None``: every layer that can be. A layer named
            here that cannot be sparse is an error.
        dense_first_layers: that many first layers of the model stay dense (ours).
        keep_text: keep every text token of a row that has visual tokens, on top of what ``tau`` or ``ratio`` keep
            (ours). Visual are the image and video tokens; separators and audio are text.
        text_prompts: what becomes of a row without a visual token, those in the cache included: ``dense`` attention, or
            ``sparse``, as the paper's method would (ours).
        skip_projections: project queries and outputs of the tokens that need it alone, in attention modules where that
            is tested (docs/transformers.md). ``None``: where it pays; True: wherever it applies; False: nowhere.
        skip_mlp_layers: indices of layers whose MLP, during a sparse prefill, runs for the selected tokens alone; the
            others keep their residual there (ours). Layers that stay dense, and decoded tokens, run whole MLPs. Which
            layers bear it has to be measured (docs/transformers.md).
        decode: how ``generate()`` decodes. ``"auto"``: by replays of a step captured in a CUDA graph where that can be
            and enough tokens are to come; ``"graph"``: for few tokens too; ``"eager"``: step by step.
        vision_attention: on a GPU, vision towers that attend within windows make one call of exact attention for all
            windows of a layer, instead of one for each.
        vision_compile: the blocks of vision towers run by ``torch.compile``: the same to rounding, and the first
            forward waits for the compiler.
        decode_compile: the decode step that ``generate()`` captures is compiled by ``torch.compile`` first: the same to
            rounding, and the first answer waits for the compiler. Steps that are not captured are not compiled.

    Scalars of numpy are taken too. Values are stored as Python's own and layers as a tuple, so that a configuration
    can be hashed.

    Raises:
        ValueError: a value is of the wrong type or out of range; the message names it, what was expected and what came.
    """

    tau: float | None = None
    ratio: float | None = None
    num_recent: int = 64
    num_random: int = 64
    seed: int = 0
    keep_recent: int = 1
    min_tokens: int = 1
    max_ratio: float = 1.0
    all_queries: bool = False
    local_window: int = LOCAL_WINDOW
    num_sinks: int = NUM_SINKS
    cache: CacheMode = "full"
    cache_ratio: float | None = None
    high_bits: int | tuple[int, int] = (4, 4)
    low_bits: int | tuple[int, int] = (4, 2)
    dense_below: int | Literal["auto"] = "auto"
    layers: tuple[int, ...] | None = None
    dense_first_layers: int = 0
    keep_text: bool = True
    text_prompts: TextPrompts = "dense"
    skip_projections: bool | None = None
    skip_mlp_layers: tuple[int, ...] = ()
    decode: DecodeMode = "auto"
    vision_attention: bool = True
    vision_compile: bool = False
    decode_compile: bool = False

    def __post_init__(self) -> None:
        for name in ("tau", "ratio"):
            if getattr(self, name) is not None:
                self._store(name, _share(name, getattr(self, name)))
        self._store("max_ratio", _share("max_ratio", self.max_ratio))
        for name in ("num_recent", "num_random"):
            self._store(name, _integer(name, getattr(self, name), 31))
        for name in ("seed", "keep_recent", "min_tokens", "local_window", "num_sinks", "dense_first_layers"):
            self._store(name, _integer(name, getattr(self, name), 63))
        if not (isinstance(self.dense_below, str) and self.dense_below == "auto"):
            self._store("dense_below", _integer("dense_below", self.dense_below, 63, '"auto" or an integer'))
        probes = self.num_recent + self.num_random
        if probes == 0:
            raise ValueError("ZipVLConfig: num_recent + num_random must be at least 1, got 0")
        if probes >= 2**31:
            raise ValueError(f"ZipVLConfig: num_recent + num_random must be below 2**31, got {probes}")
        for name in ("all_queries", "keep_text", "vision_attention", "vision_compile", "decode_compile"):
            self._store(name, _flag(name, getattr(self, name), "True or False"))
        if self.skip_projections is not None:
            self._store("skip_projections", _flag("skip_projections", self.skip_projections, "None, True or False"))
        for name, modes in (("cache", CacheMode), ("decode", DecodeMode), ("text_prompts", TextPrompts)):
            mode = getattr(self, name)
            if not isinstance(mode, str) or mode not in get_args(modes):
                raise _error(name, f"one of {get_args(modes)}", mode)
        if self.cache_ratio is not None:
            self._store("cache_ratio", _share("cache_ratio", self.cache_ratio))
            if self.cache != "drop":
                raise _error("cache_ratio", f'None with cache="{self.cache}"', self.cache_ratio)
            if self.num_recent == 0:
                raise _error("cache_ratio", "None with num_recent=0", self.cache_ratio)
        for name in ("high_bits", "low_bits"):
            self._store(name, _bits(name, getattr(self, name)))
        self._store("skip_mlp_layers", _layers("skip_mlp_layers", self.skip_mlp_layers, "an"))
        if self.skip_mlp_layers and self.keep_recent == 0:  # the last token makes the first new one
            raise _error("skip_mlp_layers", "empty with keep_recent=0", self.skip_mlp_layers)
        if self.layers is not None:
            self._store("layers", _layers("layers", self.layers, "None or an"))
            if any(layer < self.dense_first_layers for layer in self.layers):
                expected = f"None or at least dense_first_layers={self.dense_first_layers}"
                raise _error("layers", expected, self.layers)

    def _store(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def paper(cls, **changes: Any) -> ZipVLConfig:
        """The paper's method alone: no window, no sinks, text kept no more than other tokens, text prompts sparse; a
        ``quantize`` cache is ZipCache's, 4 and 2 bits.

        Args:
            changes: further fields, as of a new configuration.

        Raises:
            TypeError, ValueError: as for a new one.
        """
        method: dict[str, Any] = {"tau": PAPER_TAU, "cache": "drop", "local_window": 0, "num_sinks": 0}
        method |= {"keep_text": False, "text_prompts": "sparse", "high_bits": 4, "low_bits": 2}
        return cls(**(method | changes))

    def replace(self, **changes: Any) -> ZipVLConfig:
        """A copy with ``changes``, checked like a new one.

        Raises:
            TypeError: there is no such field; the message names it.
            ValueError: as for a new one.
        """
        return replace(self, **changes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **changes: Any) -> ZipVLConfig:
        """The configuration that ``save`` or ``zipvl calibrate`` wrote to ``path``.

        Args:
            path: a JSON file whose entry ``config`` has fields of this class; those that it lacks have their defaults.
            changes: fields that replace the file's.

        Raises:
            ValueError: there is no such file, it is none of these, or as for a new configuration.
            TypeError: as for ``replace``.
        """
        return cls(**(read_fields(path) | changes))

    def save(self, path: str | os.PathLike[str], **about: Any) -> None:
        """Writes every field to ``path``, a JSON file that ``load`` reads, whole or not at all.

        Args:
            path: of the file, which is replaced.
            about: further entries of the file, which ``load`` leaves alone: where the configuration comes from.

        Raises:
            OSError: it cannot be written.
            ValueError: ``about`` has an entry ``config``.
        """
        if "config" in about:
            raise ValueError("ZipVLConfig: about must be entries beside config, got one of that name")
        partial = Path(path).with_name(f".zipvl-{os.getpid()}")
        try:
            partial.write_text(json.dumps({"config": asdict(self), **about}, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def attention_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of ``torch.ops.zipvl.zipvl_attn`` that this configuration decides. Without a ``tau``
        they are those of a model without visual tokens."""
        selection = ("tau", "ratio", "num_recent", "num_random", "seed", "keep_recent", "min_tokens", "max_ratio")
        settled = self.for_model(visual=False)
        given = {name: getattr(settled, name) for name in (*selection, "all_queries", "local_window")}
        return given | {"num_sinks": self.sinks}

    def for_model(self, *, visual: bool) -> ZipVLConfig:
        """This configuration with a number as its ``tau``.

        Args:
            visual: whether it is for a model whose visual tokens are known.
        """
        return self if self.tau is not None else self.replace(tau=TAU if visual else TEXT_TAU)

    @property
    def sinks(self) -> int:
        """``num_sinks`` as far as they take effect: with a window alone."""
        return self.num_sinks if self.local_window > 0 else 0


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of ``ZipVLConfig`` in a file that ``ZipVLConfig.save`` wrote.

    Raises:
        ValueError: there is no such file, or it is none of these; the message names it.
    """
    where = os.fspath(path)
    try:
        content = json.loads(Path(where).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"ZipVLConfig: path must be a file, got {where!r}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise ValueError(f"ZipVLConfig: path must be a JSON file, got {where!r}: {error}") from error
    found = content.get("config") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f'ZipVLConfig: path must be a JSON object with an object "config", got {where!r}')
    if unknown := sorted(found.keys() - {field.name for field in fields(ZipVLConfig)}):
        raise ValueError(f"ZipVLConfig: path must name fields of ZipVLConfig, got {', '.join(unknown)} in {where!r}")
    return found


def _error(name: str, expected: str, got: Any) -> ValueError:
    try:
        shown = repr(got)
    except ValueError:  # an integer of more digits than Python writes
        shown = f"a value of type {type(got).__name__}"
    return ValueError(f"ZipVLConfig: {name} must be {expected}, got {shown}")


def _plain(value: Any) -> Any:
    """The Python number of a scalar or 0-d array of numpy; every other value as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def _index(value: Any) -> int | None:
    """The int that ``value`` is, or None: bools are none."""
    value = _plain(value)
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _share(name: str, value: Any) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _error(name, "a number in (0, 1]", value)
    try:
        share = float(value)
    except OverflowError:
        share = math.inf
    if not 0.0 < share <= 1.0:
        raise _error(name, "in (0, 1]", value)
    return share


def _integer(name: str, value: Any, bits: int, kind: str = "an integer") -> int:
    number = _index(value)
    if number is None:
        raise _error(name, f"{kind} of at least 0", value)
    if number < 0:
        raise _error(name, "an integer of at least 0", number)
    if number >= 2**bits:
        raise _error(name, f"below 2**{bits}", number)
    return number


def _flag(name: str, value: Any, expected: str) -> bool:
    flag = _plain(value)
    if not isinstance(flag, bool):
        raise _error(name, expected, value)
    return flag


def _bits(name: str, value: Any) -> tuple[int, int]:
    given = value if isinstance(value, (tuple, list)) else (value, value)
    bits = tuple(_index(number) for number in given)
    for supported in BITS:
        if bits == supported:
            return supported
    raise _error(name, "2, 4 or 8, or (4, 2) of keys and values", value)


def _layers(name: str, value: Any, kind: str) -> tuple[int, ...]:
    expected = f"{kind} iterable of integers of at least 0"
    try:
        given = None if isinstance(value, (str, bytes, Mapping)) else [_index(layer) for layer in value]
    except TypeError:
        given = None
    if given is None:
        raise _error(name, expected, value)
    layers = tuple(layer for layer in given if layer is not None and layer >= 0)
    if len(layers) < len(given):
        raise _error(name, expected, value)
    return layers
