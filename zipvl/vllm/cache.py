"""The scheduler's side: how many blocks a request gets, and how long a prefix may be taken from the prefix cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from zipvl.vllm.compat import Admissions
from zipvl.vllm.options import Budget
from zipvl.vllm.report import count_blocks

logger = init_logger("vllm.zipvl")  # vLLM's handlers are for its own loggers

NEVER_FITS = 1 << 30
"""More blocks than there are: a request that asks for them waits."""


@dataclass(frozen=True, kw_only=True)
class ZipVLSpec(FullAttentionSpec):
    """A layer's cache as vLLM describes it, and what zipvl makes of it."""

    zipvl: Budget

    @classmethod
    def of(cls, spec: FullAttentionSpec, budget: Budget) -> ZipVLSpec:
        """``spec`` with a budget."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)}, zipvl=budget)

    @classmethod
    def merge(cls, specs: list[Any]) -> ZipVLSpec:
        """That of a group of layers, which are all alike."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"zipvl: layers of one cache group differ: {sorted(set(map(str, specs)))}")
        return specs[0]

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of the largest prompt. A request that outgrows the pool is pre-empted, and then selected as a prompt is."""
        longest = vllm_config.model_config.max_model_len
        slots = max(self.zipvl.slots(longest), min(self.zipvl.dense_below - 1, longest))
        return -(-slots // self.block_size) * self.page_size_bytes


class ZipVLManager(FullAttentionManager):
    """Blocks for kept tokens, where the options say how many those are; prompts whole, where they must be."""

    def __init__(self, kv_cache_spec: ZipVLSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.budget = kv_cache_spec.zipvl
        self.prompts: dict[str, int] = {}
        """Tokens of each request's first step, which is its prompt, or what is recomputed after pre-emption."""
        self._admissions = Admissions()

    def slots(self, request_id: str, num_tokens: int) -> int:
        """Slots of a request that has computed ``num_tokens``."""
        prompt = self.prompts.get(request_id)
        if prompt is None or not self.budget.options.compact:
            return num_tokens
        return num_tokens - prompt + self.budget.slots(prompt)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Any,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """As vLLM asks it. A prompt that the scheduler cut does not fit under ``drop``: it waits to come whole."""
        if self.budget.options.drops and not self.req_to_blocks.get(request_id):
            if num_tokens_main_model < self._admissions.whole(request_id, num_tokens_main_model, kwargs):
                return NEVER_FITS
            self.prompts[request_id] = num_tokens_main_model
        return super().get_num_blocks_to_allocate(
            request_id,
            self.slots(request_id, num_tokens),
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            self.slots(request_id, num_tokens_main_model),
            *args,
            **kwargs,
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        first = not self.req_to_blocks.get(request_id)
        blocks = super().allocate_new_blocks(
            request_id, self.slots(request_id, num_tokens), self.slots(request_id, num_tokens_main_model)
        )
        if first and request_id in self.prompts:
            given = len(self.req_to_blocks[request_id])
            whole = -(-num_tokens // self.block_size)
            count_blocks(given, whole - given)
            logger.info(
                "zipvl: request %s: a prompt of %d tokens got %d blocks, %d less than without zipvl",
                request_id,
                self.prompts[request_id],
                given,
                whole - given,
            )
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> Any:
        self.prompts.pop(request_id, None)
        self._admissions.forget(request_id)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: ZipVLSpec,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM asks it, down to a multiple of the chunk: what a block in a chunk holds depends on all of that."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        length -= length % kv_cache_spec.zipvl.chunk
        for blocks in found:
            del blocks[length // kv_cache_spec.block_size :]
        return found, length


KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(ZipVLSpec, ZipVLManager, uniform_type_base_spec=FullAttentionSpec)
