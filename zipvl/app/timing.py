"""Times of what runs on a device, within a budget of seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Budget", "Times", "generate", "measure", "seconds"]


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What ``run`` takes on ``device``, which is idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def generate(model: Any, inputs: Mapping[str, torch.Tensor], new: int, **given: Any) -> torch.Tensor:
    """Exactly ``new`` tokens of greedy decoding behind a prompt.

    Args:
        model: of transformers; its generation configuration has no end token.
        inputs: of ``model.generate``.
        new: tokens.
        given: further arguments of ``model.generate``.
    """
    output: torch.Tensor = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **given)
    return output


class Budget:
    """Seconds from now on.

    Args:
        total: how many.
    """

    def __init__(self, total: float) -> None:
        self.total = total
        self._start = time.monotonic()

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the end; 0 after it."""
        return max(0.0, self.total - self.used)


@dataclass
class Times:
    """Times of one thing that was run several times.

    Attributes:
        cold: seconds of the first run, which pays for libraries and compilation; None before it.
        runs: seconds of each run after it.
        failed: why there is no first run, or none after it.
    """

    cold: float | None = None
    runs: list[float] = field(default_factory=list)
    failed: str | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the runs, or the first run's time where there are no others; None if it failed or did not
        run."""
        if self.failed is not None:
            return None
        return statistics.median(self.runs) if self.runs else self.cold

    @property
    def how(self) -> str:
        """How often it ran: ``median of 3``, ``once``, ``once, cold`` (no warm-up before), or why it did not."""
        if self.failed is not None:
            return f"not run: {self.failed}"
        if len(self.runs) > 1:
            return f"median of {len(self.runs)}"
        return "once" if self.runs else "not run" if self.cold is None else "once, cold"


def measure(
    sides: Mapping[str, Callable[[], Any]],
    times: Mapping[str, Times],
    budget: Budget,
    device: torch.device,
    *,
    repeats: int,
    span: float = 0.0,
    patience: float = 5.0,
) -> None:
    """Runs each side once as a warm-up, then all in turn, up to ``repeats`` rounds, as long as a round fits the budget.

    A side that runs out of memory is left out from then on. What is in ``times`` when an exception comes is whole.

    Args:
        sides: what to run.
        times: of each side; filled here.
        budget: no warm-up begins without any of it left.
        device: where the sides run.
        repeats: rounds after the warm-up.
        span: seconds that a run must last; shorter sides are called several times a run.
        patience: seconds after which no third or later round begins.
    """
    calls: dict[str, int] = {}
    for name, side in sides.items():
        if budget.left == 0:
            times[name].failed = "time"
            continue
        try:
            times[name].cold = estimate = seconds(side, device)
            if span and budget.left > estimate:
                estimate = seconds(side, device)  # without the libraries' start
            calls[name] = max(1, math.ceil(span / max(estimate, 1e-6)))
        except torch.OutOfMemoryError:
            times[name].failed = "out of memory"
            torch.cuda.empty_cache()
    needed = sum(times[name].cold or 0.0 for name in calls)  # an upper bound before the first round
    begun = budget.used
    for done in range(repeats):
        if not calls or needed > budget.left or (done >= 2 and budget.used - begun > patience):
            return
        start = budget.used
        for name, number in list(calls.items()):
            try:
                run = seconds(_repeated(sides[name], number), device)
            except torch.OutOfMemoryError:  # the allocator's pieces fit no more
                times[name].failed = "out of memory"
                del calls[name]
                torch.cuda.empty_cache()
                continue
            times[name].runs.append(run / number)
        needed = budget.used - start


def _repeated(side: Callable[[], Any], number: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(number):
            side()

    return run
