"""The methods that an evaluation can run: ZipVL, the model as it is, and the rivals of ``benchmarks/rivals``."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from zipvl.config import ZipVLConfig

__all__ = ["METHODS", "RIVALS", "Kept", "Method", "load", "options_of"]

RIVALS = ("fastv", "pyramiddrop", "visionzip", "aim")
METHODS = ("zipvl", "dense", *RIVALS)


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


Method = Callable[[Any], AbstractContextManager[Callable[[], Kept]]]
"""From a model to a context in which the method is in force; it yields what to ask afterwards."""


def options_of(method: str) -> set[str]:
    """The names of a rival's own arguments; none for ``zipvl`` and ``dense``."""
    if method not in RIVALS:
        return set()
    parameters = inspect.signature(_rival(method)).parameters.values()
    return {p.name for p in parameters if p.default is None or isinstance(p.default, (int, float))} - {"tower"}


def load(method: str, options: dict[str, Any], config: ZipVLConfig) -> Method:
    """The method of that name: ``zipvl`` under ``config``, a rival with ``options``."""
    if method == "zipvl":
        return _zipvl(config)
    return _dense if method == "dense" else _with_rival(_rival(method), options)


def _zipvl(config: ZipVLConfig) -> Method:
    import zipvl
    from zipvl.runner import reasons_for_dense

    @contextmanager
    def method(model: Any) -> Iterator[Callable[[], Kept]]:
        with warnings.catch_warnings(), zipvl.sparse(model, config) as stats:
            warnings.filterwarnings("ignore", message="zipvl", category=UserWarning)  # the reasons are reported
            yield lambda: Kept(stats.mean_ratio, stats.active, reasons_for_dense(stats))

    return method


@contextmanager
def _dense(model: Any) -> Iterator[Callable[[], Kept]]:
    yield lambda: Kept(1.0, False)


def _with_rival(rival: Any, options: dict[str, Any]) -> Method:
    @contextmanager
    def method(model: Any) -> Iterator[Callable[[], Kept]]:
        with rival(model, **options) as record:
            yield lambda: Kept(record.budget, record.budget < 1)

    return method


def _rival(method: str) -> Any:
    """The context manager of that name in ``benchmarks.rivals``, which a checkout has and a wheel has not.

    Raises:
        ValueError: it is not there.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "benchmarks" / "rivals" / "__init__.py").is_file() and str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        return getattr(import_module("benchmarks.rivals"), method)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"zipvl: method={method} is one of the rivals that ZipVL is compared with, in benchmarks/rivals of a "
            f"checkout, and {root} has none (install with pip install -e . from a checkout): {error}"
        ) from error
