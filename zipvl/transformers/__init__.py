"""Registers ``attn_implementation="zipvl"`` with transformers when imported.

Public here: ``sparse`` (a context manager, also ``zipvl.sparse``), ``configure`` (the configuration of a model whose
attention implementation was set to ``"zipvl"`` for good) and ``DecodeGraph`` (decode steps as a CUDA graph).
"""

from __future__ import annotations

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from zipvl.config import ZipVLConfig
from zipvl.stats import Stats
from zipvl.transformers import projections, runs, targets
from zipvl.transformers.attention import attention_forward
from zipvl.transformers.cache import ZipVLCache
from zipvl.transformers.context import sparse
from zipvl.transformers.decode import DecodeGraph
from zipvl.transformers.eligibility import IMPLEMENTATION
from zipvl.transformers.masks import mask_function

__all__ = ["DecodeGraph", "ZipVLCache", "configure", "sparse"]

AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


def configure(model: nn.Module, config: ZipVLConfig | None, *, record_index: bool = False) -> Stats:
    """Sets what a model loaded with ``attn_implementation="zipvl"`` keeps, in place of the default configuration.

    It decides where no ``ZipVLCache`` does: with a ``ZipVLCache``, that cache's configuration counts.

    Args:
        model: a transformers model, or a module around one.
        config: what to keep; None goes back to the default configuration and stops recording.
        record_index: keep the positions of the selected tokens in the statistics.

    Returns:
        statistics of what runs from now on.

    Raises:
        ValueError: the model or ``config.layers`` is not supported.
    """
    target = targets.find(model)
    stats = Stats(record_index=record_index)
    if config is None:
        runs.restore(dict.fromkeys(target.attention))
        projections.remove(target.attention)
        return stats
    targets.check_layers(target, config)
    runs.install(target.attention, runs.Run(config, stats))
    projections.install(target.attention)
    return stats
