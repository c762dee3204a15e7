"""What became of each prompt: a line of the log, and counters for Prometheus.

Counts of kept tokens are on the device. They are copied to the host behind the step that made them and read when a
later step is prepared, so that no step waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch


@dataclass
class StepRecord:
    """Selections of one step: one count a layer of each prompt, of its last sparse piece."""

    prompts: list[tuple[int, int]] = field(default_factory=list)
    """Tokens of the step and tokens seen, of each prompt."""
    counts: list[list[torch.Tensor]] = field(default_factory=list)
    """Of each prompt one int32 ``[1]`` a layer, in the order of the layers."""

    def add(self, prompt: int, count: torch.Tensor) -> None:
        self.counts[prompt].append(count)

    def begin(self, tokens: int, seen: int) -> int:
        """A prompt of this step. Returns its number."""
        self.prompts.append((tokens, seen))
        self.counts.append([])
        return len(self.prompts) - 1


class Reporter:
    """Reports the prompts of a worker, each once its counts have arrived on the host."""

    def __init__(self, log: Callable[..., None]) -> None:
        self._log = log
        self._open: StepRecord | None = None
        self._arriving: deque[tuple[StepRecord, torch.Tensor, Any]] = deque()
        self.last: list[dict[str, Any]] = []
        """Of the prompts reported last: ``tokens``, ``seen``, ``kept`` (tokens a layer, in the order of the layers)."""

    def start(self, record: StepRecord | None) -> None:
        """Begins the report of a step, None for one without prompts, and reports earlier ones that arrived."""
        if self._open is not None:
            self._send(self._open)
        self._open = record
        while self._arriving and (self._arriving[0][2] is None or self._arriving[0][2].query()):
            record_of, counts, _ = self._arriving.popleft()
            self._show(record_of, counts)

    def flush(self) -> None:
        """Reports everything, and waits for it: for tests and for the end."""
        self.start(None)
        while self._arriving:
            record, counts, event = self._arriving.popleft()
            if event is not None:
                event.synchronize()
            self._show(record, counts)

    def _send(self, record: StepRecord) -> None:
        counts = [count.reshape(1) for layers in record.counts for count in layers]
        if not counts:
            return
        whole, event = torch.cat(counts), None
        if whole.is_cuda:
            whole = torch.empty_like(whole, device="cpu", pin_memory=True).copy_(whole, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._arriving.append((record, whole, event))

    def _show(self, record: StepRecord, counts: torch.Tensor) -> None:
        values = iter(counts.tolist())
        for (tokens, seen), layers in zip(record.prompts, record.counts, strict=True):
            kept = [next(values) for _ in layers]
            if not kept:
                continue
            self.last = [*self.last[-255:], {"tokens": tokens, "seen": seen, "kept": kept}]
            mean = sum(kept) / len(kept)
            part = "" if tokens == seen else f", the last {tokens} of them in this step"
            self._log(
                "zipvl: a prompt of %d tokens%s: kept %.1f%% of them, %.1f%% to %.1f%% in %d layers",
                seen,
                part,
                100 * mean / seen,
                100 * min(kept) / seen,
                100 * max(kept) / seen,
                len(kept),
            )
            count_tokens(seen, mean)


@lru_cache(maxsize=1)
def _counters() -> dict[str, Any] | None:
    """Prometheus' counters of this process, or None where its client is not installed."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return None
    return {
        "prompt": Counter("zipvl_prompt_tokens", "Tokens that prompts selected from, one count a step of a prompt"),
        "kept": Counter("zipvl_kept_tokens", "Tokens that they kept, the mean over layers"),
        "blocks": Counter("zipvl_prompt_blocks", "Blocks that requests got for their prompts"),
        "saved": Counter("zipvl_saved_blocks", "Blocks that requests would have got without zipvl, less those"),
    }


def count_tokens(seen: int, kept: float) -> None:
    if (counters := _counters()) is not None:
        counters["prompt"].inc(seen)
        counters["kept"].inc(kept)


def count_blocks(given: int, saved: int) -> None:
    if (counters := _counters()) is not None:
        counters["blocks"].inc(given)
        counters["saved"].inc(saved)
