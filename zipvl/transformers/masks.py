"""The mask function behind ``attn_implementation="zipvl"``.

A plain causal mask never becomes a 4-D tensor here (16 GiB at 128K tokens): what is handed to the attention function is
the 2-D padding mask, or None where nothing is padded. Every other mask is what transformers' SDPA would get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for one kind of layer, once a forward (an ``AttentionMaskInterface`` function).

    Returns:
        For plain causal attention over everything seen so far: ``[B, kv_length]`` bool, true where a token is real, or
        None if all are. Otherwise what ``sdpa_mask`` returns: ``[B, 1, q_length, kv_length]`` bool, or None where
        SDPA's own ``is_causal`` says it all.

    Raises:
        ValueError: there are more keys than tokens seen.
    """
    plain = local_size is None and _is_plain_causal(mask_function, allow_is_causal_skip)
    sized_by_tensor = isinstance(q_offset, torch.Tensor)
    if plain and kv_offset == 0 and q_length > 1 and (sized_by_tensor or kv_length > q_offset + q_length):
        raise ValueError(
            f"zipvl attention: {q_length} tokens with {kv_length} keys: a cache of fixed size (StaticCache) or prefix "
            'tuning is not supported. Use a ZipVLCache or a DynamicCache, or attn_implementation="sdpa".'
        )
    if not plain or kv_offset != 0 or sized_by_tensor or kv_length != q_offset + q_length:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding_mask is not None:
        padding_mask = padding_mask[:, :kv_length]
        if is_tracing(padding_mask) or not bool(padding_mask.all()):
            return padding_mask
    return None


def _is_plain_causal(function: Callable[..., Any], allow_is_causal_skip: bool) -> bool:
    """Whether ``function`` is causal and nothing else, and nobody asked for the tensor.

    Gemma 3's processor marks images even in prompts that have none: causal *or* in the same block, of no blocks.
    """
    if function is causal_mask_function:
        return allow_is_causal_skip
    if getattr(function, "__qualname__", "") != or_masks(causal_mask_function).__qualname__:
        return False
    causal, *others = _captured(function)["mask_functions"]
    blocks = blockwise_overlay(torch.empty(0)).__qualname__
    return causal is causal_mask_function and all(
        getattr(other, "__qualname__", "") == blocks and not bool((_captured(other)["block_sequence_ids"] >= 0).any())
        for other in others
    )


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
