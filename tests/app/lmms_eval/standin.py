"""The parts of lmms-eval 0.7 that ``zipvl.lmms_eval.plugin`` builds on, for machines without it.

What each does is what lmms-eval documents of it. Where lmms-eval is installed, the tests run against it instead.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


class Model:
    """lmms_eval.api.model.lmms."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Numbers become numbers; ``None`` among the additional values is left out."""
        pairs = [pair.split("=", 1) for pair in arg_string.split(",") if pair]
        extra = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{name: _value(text) for name, text in pairs}, **extra)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def clean(self) -> None:
        """Drops the model's memory."""
        for name in [name for name, value in vars(self).items() if hasattr(value, "parameters")]:
            delattr(self, name)


class CacheHook:
    """lmms_eval.api.model.CacheHook."""

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Nothing is stored."""


@dataclass
class Instance:
    """lmms_eval.api.instance.Instance."""

    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)
    task_name: str | None = None

    def __post_init__(self) -> None:
        self.task_name = self.metadata["task"]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass
class TokenCounts:
    """lmms_eval.api.instance.TokenCounts."""

    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    """lmms_eval.api.instance.GenerationResult."""

    text: str
    token_counts: TokenCounts | None = None


@dataclass(frozen=True)
class ModelManifest:
    """lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


LOGGED: list[dict[str, Any]] = []


def log_metrics(**metrics: Any) -> None:
    """lmms_eval.models.model_utils.gen_metrics.log_metrics."""
    LOGGED.append(metrics | metrics.pop("additional_metrics", {}))


def get_logged_metrics_history() -> list[dict[str, Any]]:
    """lmms_eval.models.model_utils.gen_metrics.get_logged_metrics_history."""
    return list(LOGGED)


def install() -> None:
    """Puts the stand-ins where ``import lmms_eval...`` finds them."""
    contents = {
        "api.model": {"lmms": Model},
        "api.instance": {"Instance": Instance, "TokenCounts": TokenCounts, "GenerationResult": GenerationResult},
        "models.registry_v2": {"ModelManifest": ModelManifest},
        "models.model_utils.gen_metrics": {
            "log_metrics": log_metrics,
            "get_logged_metrics_history": get_logged_metrics_history,
        },
    }
    for name in ("", ".api", ".models", ".models.model_utils"):
        package = ModuleType("lmms_eval" + name)
        package.__path__ = []
        sys.modules["lmms_eval" + name] = package
    for name, values in contents.items():
        module = ModuleType(f"lmms_eval.{name}")
        vars(module).update(values)
        sys.modules[module.__name__] = module


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
