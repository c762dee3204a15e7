"""The methods that an evaluation can run: ZipVL, the model as it is, and what ZipVL is compared with.

That is the baselines of ``zipvl.baselines``, and ``variant``: ZipVL with other metrics or probes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from zipvl.app.patches import patch_map
from zipvl.app.run import reasons_for_dense
from zipvl.baselines import AIM, FastV, PyramidDrop, Variant, VisionZip, applied, image_budget, variant
from zipvl.baselines.variant import Metric, Probes
from zipvl.config import ZipVLConfig
from zipvl.transformers import sparse

__all__ = ["BASELINES", "METHODS", "PADDED", "Kept", "Method", "load", "options_of"]

BASELINES: dict[str, Any] = {"fastv": FastV, "pyramiddrop": PyramidDrop, "visionzip": VisionZip, "aim": AIM}
METHODS = ("zipvl", "dense", *BASELINES, "variant")
PADDED = ("zipvl", "dense")
"""Those that take a padded batch."""

_CHOICES = {"budget": get_args(Metric), "rank": get_args(Metric), "probes": get_args(Probes)}


@dataclass(frozen=True)
class Kept:
    """What a method did in one ``generate``.

    Attributes:
        ratio: kept share of the prompt, mean over layers and rows.
        active: whether anything was left out of any layer.
        dense_because: why layers were dense that could have been sparse.
    """

    ratio: float
    active: bool
    dense_because: list[str] = field(default_factory=list)


Method = Callable[[Any, Any], AbstractContextManager[Callable[[], Kept]]]
"""From a model and a prompt's inputs to a context in which the method is in force; it yields what to ask afterwards."""


def options_of(method: str) -> set[str]:
    """The names of the arguments that a baseline or ``variant`` has of its own; none for ``zipvl`` and ``dense``."""
    if method == "variant":
        return {field.name for field in fields(Variant)}
    if method not in BASELINES:
        return set()
    return set(inspect.signature(BASELINES[method]).parameters) - {"tower"} | {"budget"}


def load(method: str, options: dict[str, Any], config: ZipVLConfig) -> Method:
    """The method of that name: ``zipvl`` under ``config``, any other with ``options``.

    Raises:
        ValueError: the options are out of range, or contradict each other.
    """
    if method == "zipvl":
        return _zipvl(config)
    if method == "dense":
        return _dense
    if method == "variant":
        return _with_variant(options)
    return _with_baseline(method, options)


def _zipvl(config: ZipVLConfig) -> Method:
    @contextmanager
    def method(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
        with warnings.catch_warnings(), sparse(model, config) as stats:
            warnings.filterwarnings("ignore", message="zipvl", category=UserWarning)  # the reasons are reported
            yield lambda: Kept(stats.mean_ratio, stats.active, reasons_for_dense(stats))

    return method


@contextmanager
def _dense(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
    yield lambda: Kept(1.0, False)


def _with_baseline(name: str, options: dict[str, Any]) -> Method:
    """A baseline; ``budget`` stands for the arguments that give it this share of each prompt's tokens."""
    cls, options = BASELINES[name], dict(options)
    budget = options.pop("budget", None)
    if budget is None:
        cls(**options)  # out of range is an error now, not at the first question
    elif options:
        raise ValueError(f"zipvl: budget decides {', '.join(options)} of method={name}: give one or the other")
    elif isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"zipvl: budget must be in (0, 1], got {budget!r}")

    @contextmanager
    def method(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
        baseline = cls(**options) if budget is None else _at_budget(cls, budget, model.config, inputs)
        with applied(model, baseline) as record:
            yield lambda: Kept(record.budget, record.budget < 1)

    return method


def _at_budget(cls: Any, budget: float, model_config: Any, inputs: Any) -> Any:
    """The baseline ``cls`` whose layers see on average ``budget`` of the tokens of this prompt."""
    patches = patch_map(model_config, None, inputs, (1, 1))
    tokens, image = inputs["input_ids"].shape[1], len(patches.image)
    share = image_budget(budget, tokens, image) if image else 1.0
    if cls is VisionZip:
        return cls.for_budget(share, len(patches.separators) / max(image, 1))
    return cls.for_budget(share, model_config.get_text_config(decoder=True).num_hidden_layers)


def _with_variant(options: dict[str, Any]) -> Method:
    for name, allowed in _CHOICES.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ValueError(f"zipvl: {name} must be one of {', '.join(allowed)}, got {options[name]!r}")
    choice = Variant(**options)

    @contextmanager
    def method(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
        with variant(model, choice) as record:
            yield lambda: Kept(record.mean_ratio, record.mean_ratio < 1)

    return method
