"""The settings of one ZipVL run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

CacheMode = Literal["drop", "quantize", "full"]
BITS = (2, 4, 8)


@dataclass(frozen=True)
class ZipVLConfig:
    """What is kept, layer by layer, and what becomes of the rest (ZipVL, arXiv 2410.08584).

    Args:
        tau: share of the probes' attention mass that a layer's kept tokens must hold, in ``(0, 1]``
            (Sec. 3, "layer-wise adaptive ratio"). 1 keeps every token.
        ratio: if given, replaces ``tau``: every layer keeps ``ceil(ratio * real tokens)``; in ``(0, 1]``.
        num_recent: most recent tokens used as probes (Sec. A).
        num_random: random earlier tokens used as probes, one from each of as many strata (Sec. A).
        seed: seed of that draw. The same seed probes the same tokens on every device and rank.
        keep_recent: last tokens of the prompt that are always kept.
        min_tokens: fewest tokens a layer keeps.
        all_queries: compute every query against the kept keys instead of the kept queries alone.
        cache: what ``ZipVLCache`` stores after the prompt: ``drop`` the kept tokens, ``quantize`` those at
            ``high_bits`` and the rest at ``low_bits``, ``full`` all as they are.
        high_bits, low_bits: of ``cache="quantize"``; 2, 4 or 8 (the paper's first version and ZipCache: 4 and 2).
        dense_below: prompts with fewer tokens than this use the model's ordinary attention. ``"auto"``: on a GPU, fewer
            than those from which on ZipVL is no slower than dense attention, by a cost model fitted to measurements
            (``zipvl.policy``); 256 elsewhere.
        layers: indices of the layers that must be sparse. ``None``: every layer that can be. A layer named
            here that cannot be sparse is an error.
        skip_projections: project queries and outputs of the tokens that need it alone, in attention modules where that
            is tested (docs/transformers.md). ``None``: where it pays; True: wherever it applies; False: nowhere.

    Raises:
        ValueError: a value is out of range; the message names it, what was expected and what came.
    """

    tau: float = 0.975
    ratio: float | None = None
    num_recent: int = 64
    num_random: int = 64
    seed: int = 0
    keep_recent: int = 1
    min_tokens: int = 1
    all_queries: bool = False
    cache: CacheMode = "drop"
    high_bits: int = 4
    low_bits: int = 2
    dense_below: int | Literal["auto"] = "auto"
    layers: tuple[int, ...] | None = None
    skip_projections: bool | None = None

    def __post_init__(self) -> None:
        for name in ("tau", "ratio"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"ZipVLConfig: {name} must be in (0, 1], got {value}")
        if self.tau is None:
            raise ValueError("ZipVLConfig: tau must be in (0, 1], got None")
        for name in ("num_recent", "num_random", "seed", "keep_recent", "min_tokens", "dense_below"):
            value = getattr(self, name)
            if name == "dense_below" and isinstance(value, str):
                if value != "auto":
                    expected = 'must be "auto" or an integer of at least 0'
                    raise ValueError(f"ZipVLConfig: dense_below {expected}, got {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"ZipVLConfig: {name} must be an integer of at least 0, got {value!r}")
        if self.num_recent + self.num_random == 0:
            raise ValueError("ZipVLConfig: num_recent + num_random must be at least 1, got 0")
        if self.skip_projections not in (None, True, False):
            raise ValueError(
                f"ZipVLConfig: skip_projections must be None, True or False, got {self.skip_projections!r}"
            )
        if self.cache not in get_args(CacheMode):
            raise ValueError(f"ZipVLConfig: cache must be one of {get_args(CacheMode)}, got {self.cache!r}")
        for name in ("high_bits", "low_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(f"ZipVLConfig: {name} must be one of {BITS}, got {getattr(self, name)!r}")
        ratio = None if self.ratio is None else float(self.ratio)
        object.__setattr__(self, "cost_key", json.dumps([ratio, float(self.tau), bool(self.all_queries)]))

    # Each object's own; ClassVar keeps it from being a field. Text, because torch.compile(dynamic=True) makes symbols
    # of an object's floats.
    cost_key: ClassVar[str]
    """What a layer's cost depends on, ``[ratio, tau, all_queries]``, as JSON: for :mod:`zipvl.policy`."""

    def replace(self, **changes: Any) -> ZipVLConfig:
        """A copy with ``changes``, checked like a new one."""
        return replace(self, **changes)

    def attention_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of ``torch.ops.zipvl.zipvl_attn`` that this configuration decides."""
        names = ("tau", "ratio", "num_recent", "num_random", "seed", "keep_recent", "min_tokens", "all_queries")
        return {name: getattr(self, name) for name in names}
