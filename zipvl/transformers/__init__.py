"""Registers ``attn_implementation="zipvl"`` with transformers when imported.

Public here: ``sparse`` (a context manager), ``configure`` (the same for good), ``ZipVLCache``, and ``DecodeGraph``
(decode steps as a CUDA graph). The first three are also ``zipvl``'s.
"""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from zipvl.transformers.attention import attention_forward
from zipvl.transformers.cache import ZipVLCache
from zipvl.transformers.context import configure, sparse
from zipvl.transformers.decode import DecodeGraph
from zipvl.transformers.masks import mask_function
from zipvl.transformers.target import IMPLEMENTATION, IN_BLOCK
from zipvl.transformers.vision import VISION, vision_attention

__all__ = ["DecodeGraph", "ZipVLCache", "configure", "sparse"]

for _name in (IMPLEMENTATION, IN_BLOCK):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, mask_function)
AttentionInterface.register(VISION, vision_attention)
AttentionMaskInterface.register(VISION, sdpa_mask)
