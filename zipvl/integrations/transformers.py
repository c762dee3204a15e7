"""Registers ``attn_implementation="zipvl"`` with transformers when imported.

Public here: ``sparse`` (a context manager, also ``zipvl.sparse``), ``configure`` (the configuration of a model whose
attention implementation was set to ``"zipvl"`` for good) and ``DecodeGraph`` (decode steps as a CUDA graph).
"""

from __future__ import annotations

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from zipvl.config import ZipVLConfig
from zipvl.integrations import _projections, _runs, _targets
from zipvl.integrations._attention import attention_forward
from zipvl.integrations._context import sparse
from zipvl.integrations._decode_graph import DecodeGraph
from zipvl.integrations._eligibility import IMPLEMENTATION
from zipvl.integrations._masks import mask_function
from zipvl.stats import Stats

__all__ = ["DecodeGraph", "configure", "sparse"]

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
    target = _targets.find(model)
    stats = Stats(record_index=record_index)
    if config is None:
        _runs.restore(dict.fromkeys(target.attention))
        _projections.remove(target.attention)
        return stats
    _targets.check_layers(target, config)
    _runs.install(target.attention, _runs.Run(config, stats))
    _projections.install(target.attention)
    return stats
