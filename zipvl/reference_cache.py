"""The quantised cache in plain PyTorch (ZipCache, arXiv 2405.14256): what ``quantize_kv`` and
``decode_attn_quantized`` compute, byte for byte. docs/cache.md draws the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zipvl.reference import _clamped, _compute_dtype, _real_tokens, _valid_positions, decode_attn

BLOCK_TOKENS = 64


Bits = int | Sequence[int]
"""Bits of a segment's keys and of its values; a number: of both."""


def key_and_value_bits(bits: Bits) -> tuple[int, int]:
    """``bits`` as two numbers."""
    keys, values = (bits, bits) if isinstance(bits, int) else bits
    return keys, values


def block_bytes(head_dim: int, bits: Bits, dtype: torch.dtype) -> int:
    """Bytes of one block: header, scales and zeros of keys and values in the model's ``dtype``, codes."""
    return 16 + 2 * dtype.itemsize * (head_dim + BLOCK_TOKENS) + 8 * head_dim * sum(key_and_value_bits(bits))


def quantize_kv(
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    high_bits: Bits = (4, 4),
    low_bits: Bits = (4, 2),
    v_factor: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of ``T`` at ``high_bits``, of the other real tokens at ``low_bits``, each in ascending position.

    Tokens go 64 to a block. In a block a channel of the keys is ``scale * code + zero``, with ``zero`` its least value
    and ``scale`` its range divided by ``2**bits - 1``; a token's values are first divided by ``v_factor``, channel by
    channel, and then ``scale * code + zero`` in the same way. Scales and zeros are rounded to k's dtype before the
    codes are taken.

    Args:
        k, v: ``[B, Hkv, N, D]`` float16, bfloat16 or float32; ``D`` a multiple of 32.
        index, count: ``[B, N]`` and ``[B]`` int32, ``T``; entries outside ``[0, N)`` are skipped.
        high_bits, low_bits: 2, 4 or 8, or ``(4, 2)`` of keys and values.
        v_factor: ``[B, Hkv, D]`` float32; None: ``sqrt(max |v|)`` of each channel over the real tokens, 1 where 0.
        token_mask: ``[B, N]`` bool, true for real tokens; None: all are real.

    Returns:
        ``high``: ``[B, Hkv, ceil(N / 64) + 1, block_bytes]`` uint8, ``high_blocks``: ``[B]`` int32, how many blocks of
        each row are used (the others are 0); ``low``, ``low_blocks`` likewise;
        ``v_factor``.
    """
    B, Hkv, N, D = k.shape
    assert k.shape == v.shape and D % 32 == 0
    capacity = -(-N // BLOCK_TOKENS) + 1
    factor = torch.ones(B, Hkv, D, dtype=torch.float32, device=k.device) if v_factor is None else v_factor.clone()
    segments = []
    for bits in (high_bits, low_bits):
        packed = torch.zeros(B, Hkv, capacity, block_bytes(D, bits, k.dtype), dtype=torch.uint8, device=k.device)
        segments.append((bits, packed, torch.zeros(B, dtype=torch.int32, device=k.device)))
    for b in range(B):
        T = _valid_positions(index[b, : _clamped(count[b], N)], N)
        real = _real_tokens(token_mask, b, N, k.device)
        rest = real[~torch.isin(real, T)]
        if v_factor is None and len(T) + len(rest) > 0:
            largest = v[b, :, torch.cat([T, rest])].float().abs().amax(dim=1)
            factor[b] = torch.where(largest > 0, largest.double().sqrt().float(), 1.0)
        for tokens, (bits, packed, blocks) in zip((T, rest), segments, strict=True):
            parts = tokens.split(BLOCK_TOKENS) if len(tokens) else ()
            blocks[b] = len(parts)
            for i, part in enumerate(parts):
                for h in range(Hkv):
                    packed[b, h, i] = _packed_block(k[b, h, part], v[b, h, part], factor[b, h], bits)
    (_, high, high_blocks), (_, low, low_blocks) = segments
    return high, high_blocks, low, low_blocks, factor


def dequantize_kv(
    packed: Tensor, blocks: Tensor, v_factor: Tensor, *, bits: Bits, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that the bytes of one segment stand for.

    Args:
        packed, blocks, v_factor: ``[B, Hkv, M, block_bytes]`` uint8, ``[B]`` int32, ``[B, Hkv, D]`` float32.
        bits: of the segment's codes.
        dtype: that of the quantised tensors.

    Returns:
        For each batch row ``k`` and ``v``, ``[Hkv, tokens, D]`` float32.
    """
    B, Hkv, M, _ = packed.shape
    D = v_factor.shape[2]
    rows = []
    for b in range(B):
        heads = []
        for h in range(Hkv):
            used = packed[b, h, : _clamped(blocks[b], M)]
            heads.append([_unpacked_block(block, v_factor[b, h], bits, dtype) for block in used])
        empty = torch.zeros(Hkv, 0, D, device=packed.device)
        columns = [torch.stack([head[i][part] for head in heads]) for part in (0, 1) for i in range(len(heads[0]))]
        half = len(columns) // 2
        rows.append((torch.cat([empty, *columns[:half]], dim=1), torch.cat([empty, *columns[half:]], dim=1)))
    return rows


def decode_attn_quantized(
    q: Tensor,
    high: Tensor,
    high_blocks: Tensor,
    low: Tensor,
    low_blocks: Tensor,
    v_factor: Tensor,
    *,
    high_bits: Bits = (4, 4),
    low_bits: Bits = (4, 2),
    k_recent: Tensor | None = None,
    v_recent: Tensor | None = None,
    recent_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`decode_attn` over both dequantised segments and the recent tokens.

    Args:
        q: ``[B, Hq, 1, D]``, of the quantised tensors' dtype.
        high, high_blocks, low, low_blocks, v_factor: as :func:`quantize_kv` returns them.
        k_recent, v_recent, recent_lengths: ``[B, Hkv, R, D]`` and ``[B]`` int32, clamped to ``[0, R]``; all or none.
        scale: of the logits; None: ``D ** -0.5``.

    Returns:
        ``out`` and ``lse`` as :func:`decode_attn`.
    """
    segments = [
        dequantize_kv(packed, blocks, v_factor, bits=bits, dtype=q.dtype)
        for packed, blocks, bits in ((high, high_blocks, high_bits), (low, low_blocks, low_bits))
    ]
    return attend(q, segments, k_recent, v_recent, recent_lengths, scale)


def attend(
    q: Tensor,
    segments: list[list[tuple[Tensor, Tensor]]],
    k_recent: Tensor | None = None,
    v_recent: Tensor | None = None,
    recent_lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`decode_attn` over segments that :func:`dequantize_kv` gave, and the recent tokens; q of any dtype."""
    compute = _compute_dtype(q)
    B, Hq, _, D = q.shape
    out = torch.zeros(B, 1, Hq, D, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.full((B, Hq, 1), -math.inf, dtype=compute, device=q.device)
    for b in range(B):
        keys, values = ([segment[b][part].to(compute) for segment in segments] for part in (0, 1))
        if k_recent is not None:
            assert v_recent is not None and recent_lengths is not None
            length = _clamped(recent_lengths[b], k_recent.shape[2])
            keys.append(k_recent[b, :, :length].to(compute))
            values.append(v_recent[b, :, :length].to(compute))
        k, v = torch.cat(keys, dim=1)[None], torch.cat(values, dim=1)[None]
        tokens = torch.tensor([k.shape[2]], dtype=torch.int32)
        row, row_lse = decode_attn(q[b : b + 1].to(compute), k, v, tokens, scale=scale)
        out[b], lse[b] = row[0].to(q.dtype), row_lse[0]
    return out, lse


def _parameter_place(D: int) -> Tensor:
    """Where each channel's key scale stands in its array: ``[D]``."""
    d = torch.arange(D)
    return d // 32 * 32 + d % 8 // 2 * 8 + d // 16 % 2 * 4 + d // 8 % 2 * 2 + d % 2


def _code_place(D: int, bits: int, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The word and the shift of each code ``[64, D]``, the lower half's at 8 bits; ``row`` and ``column`` say where a
    code stands in the 16 x 16 operand of a tensor core."""
    token, d = torch.arange(BLOCK_TOKENS)[:, None], torch.arange(D)[None]
    lane, register, half = row % 8 * 4 + column % 8 // 2, row // 8 + column // 8 * 2, column % 2
    if bits == 2:
        return (d // 32 * 32 + lane) * 4 + token // 16, 2 * (register + 4 * (d // 16 % 2)) + 16 * half
    return (d // 16 * (bits // 4) * 32 + lane) * 4 + token // 16, 4 * register + 16 * half


def _code_places(D: int, bits: tuple[int, int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Words and shifts of key codes and of value codes."""
    token, channel = torch.arange(BLOCK_TOKENS)[:, None] % 16, torch.arange(D)[None] % 16
    return _code_place(D, bits[0], token, channel), _code_place(D, bits[1], channel, token)


_UPPER_HALF = 128  # words from the lower four bits of a code of 8 to the upper four


def _packed_block(k: Tensor, v: Tensor, factor: Tensor, segment_bits: Bits) -> Tensor:
    """The bytes of a block of the tokens ``k``, ``v [tokens, D]``, ``tokens <= 64``."""
    tokens, D = k.shape
    both = key_and_value_bits(segment_bits)
    k_codes, k_scale, k_zero = _quantized(k.float(), both[0], 0, k.dtype)
    v_codes, v_scale, v_zero = _quantized(v.float() / factor, both[1], 1, k.dtype)
    header = torch.tensor([tokens, 0, 0, 0], dtype=torch.int32)
    parts = [header]
    for values in (k_scale[0], k_zero[0]):
        parts.append(torch.empty_like(values).index_copy_(0, _parameter_place(D), values))
    for values in (v_scale[:, 0], v_zero[:, 0]):
        parts.append(torch.cat([values, values.new_zeros(BLOCK_TOKENS - tokens)]))
    for bits, codes, (word, shift) in zip(both, (k_codes, v_codes), _code_places(D, both), strict=True):
        words = torch.zeros(BLOCK_TOKENS * D * bits // 32, dtype=torch.int64)
        for half in range(2 if bits == 8 else 1):
            code = codes >> 4 * half & 15 if bits == 8 else codes
            words.index_add_(0, (word + half * _UPPER_HALF)[:tokens].flatten(), (code << shift[:tokens]).flatten())
        parts.append(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts])


def _quantized(x: Tensor, bits: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int64), scales and zeros (``dtype``) of float32 ``x``, one range along ``dim``."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, zero = ((most - least) / (2**bits - 1)).to(dtype), least.to(dtype)
    steps = ((x - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return torch.where(scale.float() > 0, steps, 0.0).long(), scale, zero


def _unpacked_block(block: Tensor, factor: Tensor, segment_bits: Bits, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``[tokens, D]`` float32 of one block."""
    D, tokens = len(factor), _clamped(block[:4].clone().view(torch.int32)[0], BLOCK_TOKENS)
    element, both = dtype.itemsize, key_and_value_bits(segment_bits)
    sizes = [16, D * element, D * element, 64 * element, 64 * element, *(BLOCK_TOKENS * D * n // 8 for n in both)]
    _, *parameters, k_words, v_words = (part.clone() for part in block.split(sizes))
    k_scale, k_zero, v_scale, v_zero = (values.view(dtype).float() for values in parameters)
    codes = []
    for bits, words, (word, shift) in zip(both, (k_words, v_words), _code_places(D, both), strict=True):
        words = words.view(torch.int32).long()
        code = words[word] >> shift & (2 ** min(bits, 4) - 1)
        if bits == 8:
            code = code | (words[word + _UPPER_HALF] >> shift & 15) << 4
        codes.append(code[:tokens].float())
    place = _parameter_place(D)
    k = k_scale[place] * codes[0] + k_zero[place]
    return k, factor * (v_scale[:tokens, None] * codes[1] + v_zero[:tokens, None])
