"""FastV (arXiv 2403.06764): image tokens that the last token does not look at in an early layer go no further.

Schedule: layers 1 to `K` (2) see the whole prompt. After layer `K` the image tokens are ranked by the attention that
the prompt's last token pays them in that layer, mean over the heads, and a share `R` (50%) of them goes on to all later
layers. (The paper's `R` is the share that is filtered out; at its 50% the two are the same.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from zipvl.baselines.common import Baseline, Record, applied

__all__ = ["FastV", "fastv"]


class FastV(Baseline):
    """FastV's schedule.

    Args:
        layer: `K`, how many layers see everything; at least 1.
        keep: `R`, the share of the image tokens that later layers see, in ``[0, 1]``.
    """

    name = "FastV"

    def __init__(self, layer: int = 2, keep: float = 0.5) -> None:
        if layer < 1 or not 0.0 <= keep <= 1.0:
            raise ValueError(f"FastV: layer must be at least 1 and keep in [0, 1], got {layer} and {keep}")
        self.layer, self.keep = layer, keep

    @classmethod
    def for_budget(cls, share: float, layers: int, layer: int = 2) -> FastV:
        """The parameters with which the layers see on average ``share`` of the image tokens.

        Raises:
            ValueError: the layers up to ``layer`` alone see more.
        """
        keep = (share * layers - layer) / (layers - layer)
        if not 0.0 <= keep <= 1.0 + 1e-9:
            raise ValueError(
                f"FastV: budget {share:.3f} is out of reach: {layer} of {layers} layers see everything, so the least "
                f"is {layer / layers:.3f}"
            )
        return cls(layer, min(keep, 1.0))

    def schedule(self, layers: int) -> list[float]:
        return [1.0 if i < self.layer else self.keep for i in range(layers)]


@contextmanager
def fastv(model: nn.Module, layer: int = 2, keep: float = 0.5) -> Iterator[Record]:
    """FastV on ``model`` inside the ``with`` block; see the module's text and `FastV`."""
    with applied(model, FastV(layer, keep)) as record:
        yield record
