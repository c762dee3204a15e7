"""transformers' tensor parallelism: the processes that have some of a model's heads each."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from zipvl.ranks import OverRanks


def over_ranks(model: Any) -> OverRanks | None:
    """The mean over the processes that ``model``'s heads are spread over; None: they are all here.

    Args:
        model: as ``from_pretrained`` loaded it, with ``tp_plan`` or a ``distributed_config``.
    """
    size = getattr(model, "tp_size", None) or 1
    if size == 1:
        return None
    group = _group(model._device_mesh)

    def mean(scores: Tensor) -> Tensor:
        total: Tensor = collectives.all_reduce(scores, "sum", group)
        return total / size

    return mean


def _group(mesh: Any) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names or ()
    group: dist.ProcessGroup = mesh.get_group("tp" if "tp" in names else None)
    return group
