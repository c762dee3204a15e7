"""PyramidDrop (arXiv 2410.17247): the image shrinks in stages.

Schedule: four stages, which end after 1/4, 1/2 and 3/4 of the layers (8, 16 and 24 of 32; of 6, rounded to even: 2, 3
and 4). At the end of each stage the image tokens are ranked by the attention that the prompt's last token, the end of
the instruction, pays them in the stage's last layer, mean over the heads; half of them goes on: 1, 1/2, 1/4, 1/8 of the
image in the four stages, 46.9% on average where the stages are equally long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from zipvl.baselines.common import Baseline, Record, applied, solve

__all__ = ["PyramidDrop", "pyramiddrop"]


class PyramidDrop(Baseline):
    """PyramidDrop's schedule.

    Args:
        keep: the share of the image tokens that goes on at the end of each stage, in ``[0, 1]``.
    """

    name = "PyramidDrop"

    def __init__(self, keep: float = 0.5) -> None:
        if not 0.0 <= keep <= 1.0:
            raise ValueError(f"PyramidDrop: keep must be in [0, 1], got {keep}")
        self.keep = keep

    @classmethod
    def for_budget(cls, share: float, layers: int) -> PyramidDrop:
        """The parameters with which the layers see on average ``share`` of the image tokens.

        Raises:
            ValueError: the first stage alone sees more.
        """
        try:
            return cls(solve(lambda keep: sum(cls(keep).schedule(layers)) / layers, share, 0.0, 1.0))
        except ValueError as error:
            raise ValueError(f"PyramidDrop: {error}") from None

    @staticmethod
    def stages(layers: int) -> list[int]:
        """How many layers there are up to the end of each of the first three stages."""
        return [max(1, round(layers * quarter / 4)) for quarter in (1, 2, 3)]

    def schedule(self, layers: int) -> list[float]:
        ends = self.stages(layers)
        return [self.keep ** sum(i >= end for end in ends) for i in range(layers)]


@contextmanager
def pyramiddrop(model: nn.Module, keep: float = 0.5) -> Iterator[Record]:
    """PyramidDrop on ``model`` inside the ``with`` block; see the module's text and `PyramidDrop`."""
    with applied(model, PyramidDrop(keep)) as record:
        yield record
