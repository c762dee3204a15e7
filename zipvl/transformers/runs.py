"""Which configuration and statistics belong to which attention module."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PretrainedConfig

from zipvl.config import ZipVLConfig
from zipvl.stats import Stats

DEFAULT_CONFIG = ZipVLConfig()


class Run:
    """One configuration in force on one model, and what is recorded of it.

    Args:
        config: what to keep.
        stats: where prefills are recorded.
    """

    def __init__(self, config: ZipVLConfig, stats: Stats) -> None:
        self.config = config
        self.stats = stats
        self.assisted: weakref.ref[Any] | None = None
        """The cache of the assisted generation that runs."""
        self._warned: set[str] = set()
        self._forward = threading.local()

    def __reduce__(self) -> NoReturn:
        """Hooks of the model hold the run: a copy of them would stay behind after the block, and record here.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "zipvl.sparse: a model cannot be copied or pickled inside the block; do it before or after, and open a "
            "block on the copy (state_dict() works anywhere)"
        )

    def start_forward(self) -> None:
        """A forward of the decoder begins, on this thread."""
        self._forward.modes = []

    def saw_prefill(self, prompt: int, reason: str | None, dense_below: int) -> None:
        """A layer that may be sparse from ``dense_below`` tokens on ran a prefill: dense for ``reason``, or None."""
        if prompt >= dense_below:
            getattr(self._forward, "modes", []).append(reason)

    def idle_reasons(self) -> list[str]:
        """Why every layer of this forward's prefill was dense; empty if one was sparse or there was none."""
        modes: list[str | None] = getattr(self._forward, "modes", [])
        return [] if None in modes else sorted({reason for reason in modes if reason})

    def warn_once(self, text: str) -> None:
        """Warns, the first time in this run; not while a graph is traced, where a warning would end it."""
        if torch.compiler.is_compiling():
            return
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)


_lock = threading.Lock()
_runs: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_borrowed: dict[int, int] = {}  # id of a configuration object that a context switched to "zipvl" -> how many have


def run_of(module: nn.Module) -> Run | None:
    """The run in force on ``module``."""
    return _runs.get(module)


def is_bystander(module: nn.Module) -> bool:
    """Whether ``module`` is here only because its model shares its configuration object with one in a context."""
    return id(getattr(module, "config", None)) in _borrowed and module not in _runs


def install(modules: Iterable[nn.Module], run: Run) -> dict[nn.Module, Run | None]:
    """Puts ``run`` in force on ``modules``; returns what was before, for ``restore``."""
    with _lock:
        before = {module: _runs.get(module) for module in modules}
        for module in before:
            _runs[module] = run
    return before


def restore(before: dict[nn.Module, Run | None]) -> None:
    """Undoes ``install``."""
    with _lock:
        for module, run in before.items():
            if run is None:
                _runs.pop(module, None)
            else:
                _runs[module] = run


def borrow(configs: Iterable[PretrainedConfig]) -> None:
    """Notes that a context switched ``configs`` to zipvl for its own model only."""
    with _lock:
        for config in configs:
            _borrowed[id(config)] = _borrowed.get(id(config), 0) + 1


def give_back(configs: Iterable[PretrainedConfig]) -> None:
    """Undoes ``borrow``."""
    with _lock:
        for config in configs:
            _borrowed[id(config)] -= 1
            if not _borrowed[id(config)]:
                del _borrowed[id(config)]
