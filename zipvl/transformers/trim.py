"""Storage that is longer than its rows, until the host learns how long they are.

On CUDA a selection's count is known to the device alone. The packed keys and values of a layer therefore begin in
buffers of the prompt's length, while their counts travel to pinned memory behind the kernels that wrote them. By the
time the host has launched ``LAYERS_BEHIND`` further layers those counts have usually arrived, and the buffers are
replaced by ones of the right size. The host waits only if they have not: it is then that many layers ahead of the
device, which has work left, and memory is what would run out. So no more than ``LAYERS_BEHIND`` layers of a forward are
ever untrimmed, which is what keeps the peak of a prefill at or below that of a full cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LAYERS_BEHIND = 3
"""Layers whose buffers may be untrimmed at once: enough that the device never waits for the host, few enough that their
unused ends do not add up."""


@dataclass
class _Waiting:
    longest: torch.Tensor  # one int32 a count, in pinned memory, valid once ``arrived``
    arrived: torch.cuda.Event
    trim: Callable[..., None]


class Trimmer:
    """The buffers of one cache that still have to be trimmed, oldest first."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()

    def add(self, counts: Sequence[torch.Tensor], trim: Callable[..., None]) -> None:
        """Has ``trim`` called with the largest of each of ``counts``, each ``[B]`` int32 on a GPU, B not 0, once those
        have arrived."""
        longest = torch.empty(len(counts), dtype=torch.int32, pin_memory=True)
        longest.copy_(torch.stack(list(counts)).amax(1), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(counts[0].device))
        self._waiting.append(_Waiting(longest, arrived, trim))

    def advance(self) -> None:
        """Trims what has arrived, and waits for all but the ``LAYERS_BEHIND - 1`` latest: another is about to come."""
        while self._waiting and (len(self._waiting) >= LAYERS_BEHIND or self._waiting[0].arrived.query()):
            self._trim_first()

    def finish(self) -> None:
        """Trims everything, waiting for it."""
        while self._waiting:
            self._trim_first()

    def forget(self) -> None:
        """Trims nothing any more: the cache was emptied."""
        self._waiting.clear()

    def _trim_first(self) -> None:
        first = self._waiting.popleft()
        first.arrived.synchronize()
        first.trim(*first.longest.tolist())


def can_wait(device: torch.device) -> bool:
    """Whether counts on ``device`` can be sent to the host and waited for: not while a graph is captured or traced."""
    return not torch.compiler.is_compiling() and not (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    )
