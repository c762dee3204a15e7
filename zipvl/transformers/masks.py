"""The mask function behind ``attn_implementation="zipvl"``.

A plain causal mask never becomes a 4-D tensor here (16 GiB at 128K tokens): what is handed to the attention function is
the 2-D padding mask, or None where nothing is padded. So it is with a causal mask within chunks, up to the end of the
first one. Models whose layers share keys and values cut their masks at the queries; for those the padding mask has four
dimensions, of uint8. A causal mask in which blocks of neighbouring tokens, such as an image's, see each other both ways
is as small: of int32, the last position that each token sees. It has four dimensions, so that models which make masks
of masks hand it on as it is. Every other mask is what transformers' SDPA would get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

_BOTH = and_masks(causal_mask_function).__qualname__
_IN_CHUNKS = chunked_overlay(1, torch.empty(0)).__qualname__


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
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for one kind of layer, once a forward (an ``AttentionMaskInterface`` function).

    Returns:
        For plain causal attention over everything seen so far: ``[B, kv_length]`` bool, true where a token is real, or
        None if all are; where layers share keys and values ``[B, 1, 1, kv_length]`` uint8. With blocks that attend both
        ways: ``[B, 1, 1, kv_length]`` int32, the last position that a token sees, its own or the end of its block, and
        -1 where a token is not real. Otherwise what ``sdpa_mask`` returns: ``[B, 1, q_length, kv_length]`` bool, or
        None where SDPA's own ``is_causal`` says it all.

    Raises:
        ValueError: there are more keys than tokens seen.
    """
    chunk = _chunk_size(mask_function) if allow_is_causal_skip and not torch.compiler.is_compiling() else None
    if chunk is not None and chunk == local_size and kv_offset == 0 and kv_length <= chunk:
        mask_function, local_size = causal_mask_function, None
    plain = local_size is None and _is_causal(mask_function, allow_is_causal_skip)
    blocks = _blocks(mask_function) if plain else None
    sized_by_tensor = isinstance(q_offset, torch.Tensor)
    if (
        plain
        and blocks is None
        and kv_offset == 0
        and q_length > 1
        and (sized_by_tensor or kv_length > q_offset + q_length)
    ):
        raise ValueError(
            f"zipvl attention: {q_length} tokens with {kv_length} keys: a cache of fixed size (StaticCache) or prefix "
            'tuning is not supported. Use a ZipVLCache or a DynamicCache, or attn_implementation="sdpa".'
        )
    ends = None
    if blocks is not None:
        ends = _ends(blocks) if q_length > 1 and blocks.shape == (batch_size, kv_length) else None
        plain = ends is not None
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
            config=config,
            **kwargs,
        )
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding_mask is not None:
        padding_mask = padding_mask[:, :kv_length]
    if ends is not None:
        return (ends if padding_mask is None else torch.where(padding_mask.bool(), ends, -1))[:, None, None]
    if padding_mask is not None:
        if is_tracing(padding_mask) or not bool(padding_mask.all()):
            shares = getattr(config, "num_kv_shared_layers", None)
            return padding_mask[:, None, None].to(torch.uint8) if shares else padding_mask
    return None


def _chunk_size(function: Callable[..., Any]) -> int | None:
    """The size of the chunks of a causal mask within chunks; None: ``function`` is another. Not for tracing, where
    functions do not say what they have captured."""
    if getattr(function, "__qualname__", "") != _BOTH:
        return None
    overlay, *others = _captured(function)["mask_functions"]
    if len(others) != 1 or others[0] is not causal_mask_function or getattr(overlay, "__qualname__", "") != _IN_CHUNKS:
        return None
    size: int = _captured(overlay)["chunk_size"]
    return size


def _is_causal(function: Callable[..., Any], allow_is_causal_skip: bool) -> bool:
    """Whether ``function`` is causal and nothing else, and nobody asked for the tensor; or causal *or* in the same
    block."""
    if function is causal_mask_function:
        return allow_is_causal_skip
    if getattr(function, "__qualname__", "") != or_masks(causal_mask_function).__qualname__:
        return False
    causal, *others = _captured(function)["mask_functions"]
    blocks = blockwise_overlay(torch.empty(0)).__qualname__
    return causal is causal_mask_function and all(getattr(other, "__qualname__", "") == blocks for other in others)


def _blocks(function: Callable[..., Any]) -> torch.Tensor | None:
    """Which block each token is in, ``[B, kv_length]``, negative where in none; None: there are no blocks.

    Gemma 3's processor marks images even in prompts that have none. Blocks of several kinds are an empty tensor.
    """
    if function is causal_mask_function:
        return None
    of_kinds = [_captured(other)["block_sequence_ids"] for other in _captured(function)["mask_functions"][1:]]
    found = [ids for ids in of_kinds if bool((ids >= 0).any())]
    if not found:
        return None
    return found[0] if len(found) == 1 else found[0].new_empty(0)


def _ends(blocks: torch.Tensor) -> torch.Tensor | None:
    """The last position that each token sees, ``[B, S]`` int32: the end of its block, or its own; None: the tokens of a
    block do not all stand side by side, so there is no such position.

    Args:
        blocks: ``[B, S]``, negative where a token is in none.
    """
    inside = blocks >= 0
    apart = torch.nn.functional.pad(
        blocks[:, 1:] != blocks[:, :-1], (1, 1), value=True
    )  # before each token, and behind
    highest = torch.nn.functional.pad(blocks.cummax(-1).values, (1, 0), value=-1)[:, :-1]
    if bool((inside & apart[:, :-1] & (blocks <= highest)).any()):  # it began before
        return None
    own = torch.arange(blocks.shape[1], dtype=torch.int32, device=blocks.device).expand_as(blocks)
    last = torch.where(apart[:, 1:], own, blocks.shape[1])
    return torch.where(inside, last.flip(-1).cummin(-1).values.flip(-1), own).to(torch.int32)


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a closure holds, by name."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
