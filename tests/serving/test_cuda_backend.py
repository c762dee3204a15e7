"""The backend of NVIDIA's GPUs in an engine on a CPU, over stand-ins in PyTorch for FlashAttention's kernels.

What is CUDA's own in it runs: lengths by layer, ``pack_paged``, metadata of a step's other rows, keys of a prefix from
blocks. What only a GPU can show (streams, graphs, FlashAttention itself) does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.serving.tiny import NAMES, PAPER, TOKENS, WHOLE, answers

Tensor = torch.Tensor


def attention(
    *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor, block_table: Tensor,
    softmax_scale: float, causal: bool, **_: Any,
) -> None:  # fmt: skip
    """``flash_attn_varlen_func`` of a paged cache ``k``, ``v [blocks, block_size, Hkv, D]``."""
    assert causal
    begins, size = cu_seqlens_q.tolist(), k.shape[1]
    for row, length in enumerate(seqused_k.tolist()):
        queries = q[begins[row] : begins[row + 1]]
        if len(queries) == 0:
            continue
        blocks = block_table[row, : -(-length // size)].long()
        keys, values = (t[blocks].flatten(0, 1)[:length].transpose(0, 1) for t in (k, v))
        seen = torch.ones(len(queries), length, dtype=torch.bool).tril(length - len(queries))
        out[begins[row] : begins[row + 1]] = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1), keys, values, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        ).transpose(0, 1)


def write(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *_: Any) -> None:
    """``reshape_and_cache_flash``: a token with a negative slot is passed over."""
    own = slots >= 0
    at = slots[own].long() // k_cache.shape[1], slots[own].long() % k_cache.shape[1]
    k_cache[at], v_cache[at] = key[: len(slots)][own], value[: len(slots)][own]


@pytest.fixture(scope="module")
def cuda_backend() -> Iterator[list[Any]]:
    """The layers that were made of CUDA's backend."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    from zipvl.vllm import plugin

    stand_ins = {"flash_attn_varlen_func": attention, "reshape_and_cache_flash": write, "get_scheduler_metadata": None}
    stand_ins |= {"compile_flash_attn_varlen_func_from_specs": None, "flash_attn_supports_sinks": lambda: False}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stand_ins.items():
            patch.setattr(fa_utils, name, value, raising=False)
        patch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
        patch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 2)
        for module in ("vllm.v1.attention.backends.flash_attn", "zipvl.vllm.cuda"):
            patch.delitem(sys.modules, module, raising=False)

        from vllm.v1.attention.backends import flash_attn

        from zipvl.vllm import cuda

        made, first = [], cuda.ZipVLImpl.__init__

        def make(self: Any, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            first(self, *args, **kwargs)

        patch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", attention, raising=False)
        patch.setattr(cuda.ZipVLImpl, "__init__", make)
        patch.setattr(cuda.ZipVLImpl, "device_type", "cpu")
        patch.setattr(cuda.ZipVLBackend, "supported_dtypes", [torch.float32])

        def register() -> None:
            register_backend(AttentionBackendEnum.CPU_ATTN, "zipvl.vllm.cuda.ZipVLBackend")

        patch.setattr(plugin, "_register_backend", register)
        plugin.register()
        _cached_get_attn_backend.cache_clear()
        yield made
    plugin.register()
    _cached_get_attn_backend.cache_clear()


@pytest.mark.parametrize("cache", ["full", "drop"])
def test_pages(cache: str, cuda_backend: list[Any], engine: Any, kept: Any, expected: Any) -> None:
    cuda_backend.clear()
    tokens, layers = expected(**PAPER, cache=cache)
    both = WHOLE | {"max_num_batched_tokens": 6000}  # two pages in a step
    with engine(PAPER | {"cache": cache}, **both, block_size=32) as sparse:
        assert answers(sparse, NAMES, one_by_one=False) == tokens
    assert [found for _, _, found in kept()] == layers
    assert len(cuda_backend) == 6


def test_few_blocks_and_chunks(cuda_backend: list[Any], engine: Any, kept: Any, expected: Any) -> None:
    options = {"ratio": 0.4, "local_window": 64, "num_sinks": 4, "cache": "drop"}
    cuda_backend.clear()
    tokens, layers = expected(**options)
    with engine(options, **WHOLE, block_size=32, num_gpu_blocks_override=80) as sparse:
        assert answers(sparse, NAMES, one_by_one=False) == tokens
    assert [found for _, _, found in kept()] == layers
    chunks = {"tau": 0.95, "prefill_chunk_size": 1024}
    with engine(chunks, **WHOLE, block_size=32) as whole:
        alone = answers(whole, ("demo",))
    ((_, _, last),) = kept()
    with engine(chunks, enable_prefix_caching=True, max_num_batched_tokens=2048, block_size=32) as cut:
        assert answers(cut, ("demo",)) == alone and answers(cut, ("demo",)) == alone
    assert [found[:2] for found in kept()] == [(2048, 2048), (565, TOKENS), (565, TOKENS)] and len(last) == 6
    assert len(cuda_backend) == 3 * 6
