"""What a sparse model computes, from one dense forward without a cache: a mask a layer, and of zipvl the
reference alone, beside the constants and the stored bytes of a quantised cache, whose tokens it dequantises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zipvl
from zipvl import reference, reference_cache
from zipvl.transformers.quantized import PROBES, WINDOW, QuantizedKV

NAME = "zipvl_test_oracle"


@dataclass
class Compressed:
    """How ``cache="quantize"`` held the tokens after the prompt.

    The oracle takes what few bits make of a token from the cache itself: a rounding error of the model can move a code
    by one, and a step between codes is large. It checks that each is within half a step of the token it stands for.

    Args:
        config: bits, ``tau``, ``ratio`` and ``num_sinks``, tokens of the prompt that stay as they came.
        appended: how many tokens each forward after the prompt brought.
        held: of each layer, after the last of them, one row.
    """

    config: zipvl.ZipVLConfig
    appended: list[int]
    held: list[QuantizedKV]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, may: torch.Tensor, computed: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention in float64 where ``may [n, S]``, 0 in rows that are not ``computed [n]``; ``[B, n, Hq, D]``."""
    groups = q.shape[1] // k.shape[1]
    scores = (q.double() @ k.double().repeat_interleave(groups, 1).mT) * scaling
    weights = scores.masked_fill(~may, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = weights @ v.double().repeat_interleave(groups, 1)
    return (out * computed[:, None]).to(q.dtype).transpose(1, 2)


class Blocks:
    """The blocks of one segment, read in the order in which they were written."""

    def __init__(self, packed: torch.Tensor, factor: torch.Tensor, bits: tuple[int, int]) -> None:
        self.packed, self.factor, self.bits, self.read = packed, factor, bits, 0

    def take(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held of the tokens ``k``, ``v [Hkv, n, D]``, which must be the next ones."""
        count = -(-k.shape[1] // reference_cache.BLOCK_TOKENS)
        blocks = self.packed[:, :, self.read : self.read + count]
        self.read += count
        ((keys, values),) = reference_cache.dequantize_kv(
            blocks, torch.tensor([count]), self.factor, bits=self.bits, dtype=k.dtype
        )
        assert keys.shape == k.shape
        normal = v / self.factor[0, :, None]
        for first in range(0, k.shape[1], reference_cache.BLOCK_TOKENS):
            part = slice(first, first + reference_cache.BLOCK_TOKENS)
            assert_close(keys[:, part], k[:, part], dim=1, bits=self.bits[0])
            assert_close((values / self.factor[0, :, None])[:, part], normal[:, part], dim=2, bits=self.bits[1])
        return keys.to(k.dtype), values.to(v.dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dim: int, bits: int) -> None:
    """Half a step of the range over ``dim``, and the rounding of the model."""
    step = (expected.amax(dim, keepdim=True) - expected.amin(dim, keepdim=True)) / (2**bits - 1)
    assert ((found - expected).abs() <= 0.51 * step + 1e-3 * expected.abs().max()).all()


def attend_compressed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    may: torch.Tensor,
    computed: torch.Tensor,
    kept: torch.Tensor,
    prompt: int,
    scaling: float,
    how: Compressed,
    layer: int,
) -> tuple[torch.Tensor, None]:
    """The prompt as sparse attention has it; each later token against what the cache held when it came."""
    packed = how.held[layer]
    high = Blocks(packed.high.packed, packed.v_factor, reference_cache.key_and_value_bits(how.config.high_bits))
    low = Blocks(packed.low.packed, packed.v_factor, reference_cache.key_and_value_bits(how.config.low_bits))
    held_k, held_v = k.clone(), v.clone()

    def compress(tokens: slice, chosen: torch.Tensor) -> None:
        rest = torch.ones(tokens.stop - tokens.start, dtype=torch.bool)
        rest[chosen] = False
        for blocks, where in ((high, chosen), (low, rest.nonzero()[:, 0])):
            at = where + tokens.start
            held_k[0, :, at], held_v[0, :, at] = blocks.take(k[0, :, at], v[0, :, at])

    sinks = how.config.num_sinks
    compress(slice(sinks, prompt), kept[kept >= sinks] - sinks)
    past = slice(0, prompt)
    outputs = [attend(q[:, :, past], k[:, :, past], v[:, :, past], may[past, past], computed[past], scaling)]
    first = end = prompt  # of the window, which is as it came
    for new in how.appended:
        if first < end and end - first + new > WINDOW:
            window = slice(first, end)
            probes = torch.arange(max(end - first - PROBES, 0), end - first, dtype=torch.int32)[None]
            scores = reference.probe_scores(q[:, :, window], k[:, :, window], probes, scale=scaling)
            index, count = reference.select_tokens(*scores, tau=how.config.tau, ratio=how.config.ratio)
            compress(window, index[0, : int(count)].long())
            first = end
        rows = slice(end, end + new)
        end += new
        args = (q[:, :, rows], held_k[:, :, :end], held_v[:, :, :end], may[rows, :end], computed[rows], scaling)
        outputs.append(attend(*args))
    assert high.read == packed.high.blocks[0] and low.read == packed.low.blocks[0]
    return torch.cat(outputs, dim=1), None


@contextmanager
def oracle(
    model: Any,
    kept: dict[int, torch.Tensor],
    prompt: int,
    full: bool = False,
    all_queries: bool = False,
    compressed: Compressed | None = None,
) -> Iterator[None]:
    """Makes ``model(whole sequence, use_cache=False)`` compute what prefill and decoding with ZipVL should.

    Args:
        kept: for each sparse layer the positions of the prompt that were kept, ``[n]``; other layers are dense.
        prompt: length of the prompt; later tokens are decoded ones.
        full: they attend to the whole prompt (``cache="full"``), not to the kept tokens alone.
        all_queries: the prompt's other tokens are computed too, against the kept ones.
        compressed: they attend to the whole prompt as ``cache="quantize"`` holds it, and to themselves so.
    """

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        tokens = q.shape[2]
        may = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        computed = torch.ones(tokens, dtype=torch.bool, device=q.device)
        window = getattr(module, "sliding_window", None)
        if window is not None:
            may &= torch.ones_like(may).triu(1 - window)
        elif module.layer_idx in kept:
            alive = torch.zeros(tokens, dtype=torch.bool, device=q.device)
            alive[kept[module.layer_idx].to(q.device)] = True
            alive[prompt:] = True
            computed = computed if all_queries else alive
            may[:prompt] &= alive
            if not full and compressed is None:
                may[prompt:] &= alive
            if compressed is not None:
                index = module.layer_idx
                return attend_compressed(q, k, v, may, computed, kept[index], prompt, scaling, compressed, index)
        return attend(q, k, v, may, computed, scaling), None

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    AttentionInterface.register(NAME, attention)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]


def neighbourhood(places: list[int], window: int, sinks: int) -> list[int]:
    """Of a row that sees ``places`` up to its own: its window, and the first ones. Nothing without a window."""
    return [] if window == 0 else [*places[:sinks], *places[max(len(places) - window, 0) :]]


def chunk_masks(
    tokens: int,
    chunks: list[tuple[int, torch.Tensor | None]],
    *,
    window: int = 0,
    sinks: int = 0,
    drop: bool = False,
    all_queries: bool = False,
    stored: list[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token sees of a layer whose prompt came in chunks, one row without padding.

    Args:
        tokens: in all, those behind the last chunk being decoded ones.
        chunks: end of each chunk, and its selected tokens among all that were there (places in the cache and then the
            chunk's own); None: it was dense.
        drop: of a chunk's tokens the cache holds the selected ones alone.
        stored: of each chunk, the places that a ``drop`` cache with a budget of its own holds instead; None: all.

    Returns:
        ``may [tokens, tokens]`` and ``computed [tokens]`` bool.
    """
    may, computed = torch.zeros(tokens, tokens, dtype=torch.bool), torch.ones(tokens, dtype=torch.bool)
    held: list[int] = []
    start = 0
    for number, (end, picked) in enumerate(chunks):
        own = list(range(start, end))
        places = held + own
        chosen = set(places) if picked is None else {places[i] for i in picked.tolist()}
        for t in own:
            seen = places[: len(held) + t - start + 1]
            whole = picked is None or all_queries or t in chosen
            row = [*neighbourhood(seen, window, sinks), *(s for s in seen if whole and s in chosen)]
            may[t, row] = True
            computed[t] = whole or window > 0
        if stored is not None:
            left = stored[number]
            chosen = set(places) if left is None else {places[i] for i in left.tolist()}
        held += [t for t in own if t in chosen or not drop]
        start = end
    for t in range(start, tokens):
        may[t, held + list(range(start, t + 1))] = True
    return may, computed


@contextmanager
def masked(model: Any, masks: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Makes ``model(whole sequence, use_cache=False)`` attend, in the layers of ``masks``, where ``may [N, N]``, and
    give 0 in rows that are not ``computed [N]``; other layers are dense."""

    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        tokens = q.shape[2]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        may, computed = masks.get(module.layer_idx, (causal, torch.ones(tokens, dtype=torch.bool)))
        return attend(q, k, v, may, computed, scaling), None

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    AttentionInterface.register(NAME, attention)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS._global_mapping[NAME]
