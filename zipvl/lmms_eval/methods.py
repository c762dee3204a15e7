"""The methods that an evaluation can run: ZipVL, the model as it is, and what a checkout holds to compare them with.

That is the rivals of ``zipvl/baselines``, and ``variant``: ZipVL with other metrics or probes (``benchmarks/paper``).
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from zipvl.app.patches import patch_map
from zipvl.config import ZipVLConfig

__all__ = ["METHODS", "PADDED", "Kept", "Method", "load", "options_of"]

RIVALS = ("fastv", "pyramiddrop", "visionzip", "aim")
METHODS = ("zipvl", "dense", *RIVALS, "variant")
PADDED = ("zipvl", "dense")
"""Those that take a padded batch."""

_CHOICES = {"budget": ("accumulated", "normalized"), "rank": ("accumulated", "normalized")}
_CHOICES["probes"] = ("stratified", "uniform")


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
    """The names of the arguments that a rival or ``variant`` has of its own; none for ``zipvl`` and ``dense``.

    Raises:
        ValueError: it is not there.
    """
    if method == "variant":
        return {field.name for field in fields(_variant()[0])}
    if method not in RIVALS:
        return set()
    parameters = set(inspect.signature(getattr(_rivals(method), method)).parameters)
    return parameters - {"model", "tower"} | {"budget"}


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
    return _with_rival(method, options)


def _zipvl(config: ZipVLConfig) -> Method:
    import zipvl
    from zipvl.app.run import reasons_for_dense

    @contextmanager
    def method(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
        with warnings.catch_warnings(), zipvl.sparse(model, config) as stats:
            warnings.filterwarnings("ignore", message="zipvl", category=UserWarning)  # the reasons are reported
            yield lambda: Kept(stats.mean_ratio, stats.active, reasons_for_dense(stats))

    return method


@contextmanager
def _dense(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
    yield lambda: Kept(1.0, False)


def _with_rival(name: str, options: dict[str, Any]) -> Method:
    """A rival; ``budget`` stands for the arguments that give it this share of each prompt's tokens."""
    rivals, options = _rivals(name), dict(options)
    (cls,) = (value for value in vars(rivals).values() if inspect.isclass(value) and value.__name__.lower() == name)
    budget = options.pop("budget", None)
    if budget is None:
        cls(**options)  # out of range is an error now, not at the first question
    elif options:
        raise ValueError(f"zipvl: budget decides {', '.join(options)} of method={name}: give one or the other")
    elif isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"zipvl: budget must be in (0, 1], got {budget!r}")

    @contextmanager
    def method(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
        rival = cls(**options) if budget is None else _at_budget(rivals, cls, budget, model.config, inputs)
        with rivals.applied(model, rival) as record:
            yield lambda: Kept(record.budget, record.budget < 1)

    return method


def _at_budget(rivals: Any, cls: Any, budget: float, model_config: Any, inputs: Any) -> Any:
    """The rival ``cls`` whose layers see on average ``budget`` of the tokens of this prompt."""
    patches = patch_map(model_config, None, inputs, (1, 1))
    tokens, image = inputs["input_ids"].shape[1], len(patches.image)
    share = rivals.image_budget(budget, tokens, image) if image else 1.0
    if cls is rivals.VisionZip:
        return cls.for_budget(share, len(patches.separators) / max(image, 1))
    return cls.for_budget(share, model_config.get_text_config(decoder=True).num_hidden_layers)


def _with_variant(options: dict[str, Any]) -> Method:
    for name, allowed in _CHOICES.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ValueError(f"zipvl: {name} must be one of {', '.join(allowed)}, got {options[name]!r}")
    variant_class, variant = _variant()
    choice = variant_class(**options)

    @contextmanager
    def method(model: Any, inputs: Any) -> Iterator[Callable[[], Kept]]:
        with variant(model, choice) as record:
            yield lambda: Kept(record.mean_ratio, record.mean_ratio < 1)

    return method


def _rivals(method: str) -> Any:
    return _of_checkout("zipvl.baselines", method)


def _variant() -> tuple[Any, Any]:
    """Its settings, and its context manager."""
    module = _of_checkout("benchmarks.paper.variant", "variant")
    return module.Variant, module.variant


def _of_checkout(module: str, method: str) -> Any:
    """A module of the benchmarks, which a checkout has and a wheel has not.

    Raises:
        ValueError: it is not there.
    """
    root = Path(__file__).resolve().parents[2]
    if root.joinpath(*module.split(".")[:2]).is_dir() and str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"zipvl: method={method} needs {module} of a zipvl checkout (pip install -e . there), and {root} has "
            f"none: {error}"
        ) from error
