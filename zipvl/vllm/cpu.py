"""The backend on a CPU, over vLLM's ``CPU_ATTN``. Lengths and counts are in the host's memory, and are read."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops, envs
from vllm.v1.attention.backends import cpu_attn

from zipvl.vllm import compat, rows
from zipvl.vllm.backend import SparseBackend, SparseBuilder, SparseImpl, Step


class ZipVLBuilder(SparseBuilder, cpu_attn.CPUAttentionMetadataBuilder):
    """vLLM's metadata, and what each layer needs beside it."""


class ZipVLImpl(SparseImpl, cpu_attn.CPUAttentionBackendImpl):
    """vLLM's attention, and ZipVL's of prompts."""

    device_type = "cpu"

    def _gather(self, kv_cache: Tensor, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        size, dim = kv_cache.shape[2], self.head_size
        used = kv_cache[blocks[: -(-tokens // size)].long()]  # [blocks, Hkv, size, 2 * D], keys before values
        halves = used.reshape(*used.shape[:2], 2, size * dim).unbind(dim=2)
        orders = _orders(size, dim, kv_cache.dtype, self.kv_cache_dtype)
        found = (half[:, :, order].unflatten(-1, (size, dim)) for half, order in zip(halves, orders, strict=True))
        k, v = (t.transpose(0, 1).flatten(1, 2)[None, :, :tokens] for t in found)
        return k, v

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
        selected = int(count)
        stored = min(selected, int(step.capacity[number]))
        kept = index[0, selected - stored : selected].long() + prompt.start
        table, size = step.block_table[prompt.row], kv_cache.shape[2]
        slots = _slots(table, torch.arange(stored), size)
        self._write(layer, key[kept], value[kept], kv_cache, slots)
        self.lengths.drop(self.number, table[:1], prompt.seen, torch.tensor([stored], dtype=torch.int32))

    def _own_lengths(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step) -> Any:
        assert step.lengths is not None and step.places is not None
        metadata, lengths, places = step.others, step.lengths[self.number], step.places[self.number]
        begins = metadata.query_start_loc
        row_of = torch.repeat_interleave(torch.arange(len(lengths)), begins.diff().long())
        slots = _slots(metadata.block_table[row_of], places, kv_cache.shape[2])
        self._write(layer, key[: len(slots)], value[: len(slots)], kv_cache, slots)
        plan = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lengths.shape[0],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=lengths.contiguous(),
            dtype=key.dtype,
            query_start_loc=begins,
            causal=True,
            sliding_window_size=-1,
            isa=getattr(layer, "isa", None) or self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            **compat.accepted(_custom_ops.cpu_attn_get_scheduler_metadata, kv_cache_dtype=self.kv_cache_dtype),
        )
        own = {"seq_lens": lengths, "max_seq_len": int(lengths.max()), "scheduler_metadata": plan}
        return replace(metadata, **own, slot_mapping=slots.long())  # vLLM 0.26 writes once more as it attends

    def _write(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update(
            self, layer, key.contiguous(), value.contiguous(), kv_cache, slots.long()
        )


class ZipVLBackend(SparseBackend, cpu_attn.CPUAttentionBackend):
    """In place of vLLM's backend of CPUs, and the same where zipvl was not asked for."""

    @staticmethod
    def get_impl_cls() -> type:
        return ZipVLImpl

    @staticmethod
    def get_builder_cls() -> type:
        return ZipVLBuilder


def _slots(table: Tensor, place: Tensor, size: int) -> Tensor:
    """Slots of the cache. ``table``: of one row ``[blocks]``, or of each place's row ``[places, blocks]``."""
    block = (place // size).long()
    blocks = table[block] if table.dim() == 1 else table.gather(1, block[:, None])[:, 0]
    return blocks.long() * size + place % size


@lru_cache(maxsize=8)
def _orders(size: int, dim: int, dtype: torch.dtype, cache_dtype: str) -> tuple[Tensor, Tensor]:
    """Where a block of one head holds the numbers of its keys and of its values: ``[size * dim]`` each, token by token.

    vLLM stores keys in an order that its kernels choose by the processor. It is learnt by writing a block whose numbers
    say where they belong, and checked to be an order of the block.

    Raises:
        RuntimeError: the block does not hold each number once.
    """
    isa = cpu_attn._get_attn_isa(dtype, size, dim, cache_dtype)
    place = torch.arange(size * dim)
    digits = []
    for digit in (place % 16, place // 16 % 16, place // 256 % 16, place // 4096):  # exact in every dtype
        block = torch.zeros(1, 1, 2 * size, dim, dtype=dtype)
        k_cache, v_cache = block.chunk(2, dim=2)
        states = digit.view(size, 1, dim).to(dtype).contiguous()
        _custom_ops.cpu_attn_reshape_and_cache(
            states, states.clone(), k_cache, v_cache, torch.arange(size), isa, k_scale=1.0, v_scale=1.0,
            kv_cache_dtype=cache_dtype,
        )  # fmt: skip
        digits.append(block.view(2, size * dim).long())
    held = digits[0] + 16 * digits[1] + 256 * digits[2] + 4096 * digits[3]
    orders = held.argsort(dim=1)
    if not torch.equal(held.gather(1, orders), place.expand(2, -1)):
        raise RuntimeError(f"zipvl: vLLM's blocks on this processor ({isa}) do not hold each number of a key once")
    return orders[0], orders[1]
