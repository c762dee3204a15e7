"""The backend on NVIDIA's GPUs, over vLLM's FlashAttention or, where that is not there, its Triton kernels.

Nothing of a step waits for the device: how much a prompt keeps stays there, and lengths are computed from it there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available

from zipvl.vllm import paged, rows
from zipvl.vllm.backend import SparseBackend, SparseBuilder, SparseImpl, Step

if is_flash_attn_varlen_func_available():
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend as Backend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl as Impl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder as Builder
else:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend as Backend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl as Impl
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder as Builder

HEAD_DIMS = (64, 96, 128, 256)


class ZipVLBuilder(SparseBuilder, Builder):
    """vLLM's metadata, and what each layer needs beside it."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.zipvl is not None and self.zipvl.options.drops:
            self.aot_schedule = False  # FlashAttention 3 would plan for the lengths of tokens seen

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """No graph may hold a prompt, whose selection is no part of it. Under ``drop`` it holds one token a row."""
        found = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        budget = getattr(kv_cache_spec, "zipvl", None)
        if budget is None:
            return found
        single, uniform = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, AttentionCGSupport.UNIFORM_BATCH
        return min(found, single if budget.options.drops else uniform, key=lambda support: support.value)


class ZipVLImpl(SparseImpl, Impl):
    """vLLM's attention, and ZipVL's of prompts."""

    device_type = "cuda"

    def _gather(self, kv_cache: Tensor, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        return paged.gather(kv_cache, self.head_size, blocks, tokens)

    def _store(
        self,
        layer: Any,
        prompt: rows.Prompt,
        number: int,
        index: Tensor,
        count: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        step: Step,
    ) -> None:
        assert step.capacity is not None and self.lengths is not None
        tokens, table = slice(prompt.start, prompt.end), step.block_table[prompt.row : prompt.row + 1]
        capacity = step.capacity[number : number + 1]
        stored = paged.store(key[tokens], value[tokens], index, count, table, kv_cache, capacity)
        self.lengths.drop(self.number, table[0, :1], prompt.seen, stored)

    def _own_lengths(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step) -> Any:
        assert step.lengths is not None and step.places is not None
        of, places = step.others, step.places[self.number]
        paged.append(key, value, places, of.block_table, of.query_start_loc, of.max_query_len, kv_cache)
        return replace(of, seq_lens=step.lengths[self.number], scheduler_metadata=None)


class ZipVLBackend(SparseBackend, Backend):
    """vLLM's backend ``CUSTOM``."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return ZipVLImpl

    @staticmethod
    def get_builder_cls() -> type:
        return ZipVLBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in HEAD_DIMS and super().supports_head_size(head_size)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def _no(cls) -> bool:
        return False

    supports_kv_connector = supports_pcp = supports_dcp = _no
    supports_mm_prefix = supports_sink = supports_rswa = supports_non_causal = _no
