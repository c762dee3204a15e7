"""What an evaluation kept and stored, task by task, to stand beside its scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zipvl.app.cache_bytes import cache_bytes
from zipvl.transformers.target import layer_configs, sources

__all__ = ["Meter", "Tally", "full_cache_bytes", "held_cache_bytes"]


@dataclass
class Tally:
    """Sums over the questions of one task.

    Attributes:
        questions: how many the model was run for; answers from lmms-eval's response cache are not among them, and a
            question asked again to even out the processes of a multi-GPU run is.
        sparse: how many of them were answered with at least one sparse layer.
        prompt_tokens, new_tokens: tokens read, padding left out, and generated.
        ratio: kept share of the prompt, mean over layers, summed over questions.
        cache_bytes: memory that the key/value cache held after the answer, room set aside included.
        full_cache_bytes: what a cache of every token seen would have taken.
        unmeasured: questions whose cache the model did not hand out; they count in neither number of bytes.
        seconds: time in ``generate``.
        dense_because: reasons for dense layers, and for how many batches each was given.
    """

    questions: int = 0
    sparse: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    ratio: float = 0.0
    cache_bytes: float = 0.0
    full_cache_bytes: float = 0.0
    unmeasured: int = 0
    seconds: float = 0.0
    dense_because: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Adds what another process, or another batch, counted."""
        for name, value in vars(other).items():
            if name != "dense_because":
                setattr(self, name, getattr(self, name) + value)
        self.dense_because.update(other.dense_because)

    def facts(self) -> dict[str, Any]:
        """Means a question, ready for JSON."""
        count, measured = max(self.questions, 1), max(self.questions - self.unmeasured, 1)
        known = self.unmeasured < self.questions
        return {
            "questions": self.questions,
            "sparse_questions": self.sparse,
            "mean_ratio": self.ratio / count,
            "mean_prompt_tokens": self.prompt_tokens / count,
            "mean_new_tokens": self.new_tokens / count,
            "mean_cache_bytes": self.cache_bytes / measured if known else None,
            "mean_full_cache_bytes": self.full_cache_bytes / measured if known else None,
            "cache_share": self.cache_bytes / self.full_cache_bytes if self.full_cache_bytes else None,
            "seconds": self.seconds,
            "dense_because": dict(self.dense_because),
        }


class Meter:
    """One ``Tally`` a task.

    Args:
        method: name of what ran.
        settings: its arguments, for the record.
    """

    def __init__(self, method: str, settings: dict[str, Any]) -> None:
        self.method, self.settings = method, settings
        self.tasks: dict[str, Tally] = {}

    def add(self, task: str, tally: Tally) -> None:
        """Counts what one batch of ``task`` did."""
        self.tasks.setdefault(task, Tally()).add(tally)

    def merge(self, others: Iterable[dict[str, Tally]]) -> None:
        """Replaces what is counted here by the sum over the processes of a run, this one among them."""
        self.tasks = {}
        for tasks in others:
            for task, tally in tasks.items():
                self.add(task, tally)

    def facts(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        tasks = {task: tally.facts() for task, tally in sorted(self.tasks.items())}
        return {"method": self.method, "settings": self.settings, "tasks": tasks, "all": self.total().facts()}

    def total(self) -> Tally:
        """The sum over the tasks."""
        total = Tally()
        for tally in self.tasks.values():
            total.add(tally)
        return total

    def numbers(self) -> dict[str, float]:
        """The figures that go into lmms-eval's results file, under names of their own."""
        facts = self.facts()
        tasks = facts["tasks"] | ({"all": facts["all"]} if len(self.tasks) > 1 else {})
        numbers: dict[str, float] = {}
        for task, of_task in tasks.items():
            for name in ("mean_ratio", "mean_cache_bytes", "mean_full_cache_bytes", "sparse_questions", "questions"):
                if of_task[name] is not None:
                    numbers[f"{self.method}_{task}_{name}"] = of_task[name]
        return numbers

    def lines(self) -> list[str]:
        """The same for a reader: one line a task, and the reasons for dense layers."""
        if not self.tasks:
            return [f"{self.method}: no question reached the model (every answer came from the response cache)"]
        lines = []
        for task, tally in sorted(self.tasks.items()):
            facts = tally.facts()
            cache = "cache unknown"
            if facts["mean_cache_bytes"] is not None:
                cache = f"cache {_mib(facts['mean_cache_bytes'])} of {_mib(facts['mean_full_cache_bytes'])} a question"
            lines.append(
                f"{self.method}: {task}: {facts['mean_ratio']:.1%} of {facts['mean_prompt_tokens']:,.0f} tokens kept, "
                f"{cache}, {tally.sparse} of {tally.questions} questions sparse"
            )
            lines += [f"  dense layers: {reason}" for reason in tally.dense_because]
        return lines

    def write(self, path: str) -> None:
        """Writes ``facts`` as JSON."""
        Path(path).write_text(json.dumps(self.facts(), indent=2) + "\n")


def held_cache_bytes(cache: Any) -> int | None:
    """Bytes of the tensors that the layers of ``cache`` hold; ``None`` for no cache. Any method's layers count."""
    return None if cache is None else cache_bytes([vars(layer) for layer in cache.layers])


def full_cache_bytes(model_config: Any, rows: int, seen: int, itemsize: int) -> int:
    """Bytes of the keys and values, or latents, of ``seen`` tokens in every layer, for ``rows`` sequences."""
    text = model_config.get_text_config(decoder=True)
    layers = layer_configs(text)
    layers = layers * (text.num_hidden_layers // len(layers))
    shared = sources(text)  # layers without keys and values of their own
    numbers = sum(_numbers(layer) for i, layer in enumerate(layers) if i not in shared)
    return numbers * rows * seen * itemsize


def _numbers(layer: Any) -> int:
    """What a layer's cache holds of a token: keys and values, or latents."""
    rank: int | None = getattr(layer, "kv_lora_rank", None)
    return rank + layer.qk_rope_head_dim if rank else 2 * _heads(layer) * _head_dim(layer)


def _heads(layer: Any) -> int:
    return getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads


def _head_dim(layer: Any) -> int:
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
