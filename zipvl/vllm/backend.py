"""What the backends of all devices share: rows of a step, selections, and the lengths of what layers keep.

``SparseBuilder`` and ``SparseImpl`` make vLLM's own classes of a device sparse. Under ``full`` every token is in the
cache as vLLM puts it there, and only prompts are attended to otherwise. Under ``drop`` each layer has a length of its
own (``paged.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

import zipvl
from zipvl import budget, ops, policy, ranks
from zipvl.vllm import compat, paged, plugin, rows, startup
from zipvl.vllm.cache import ZipVLSpec
from zipvl.vllm.options import Budget, Options
from zipvl.vllm.report import Reporter, StepRecord

logger = init_logger("vllm.zipvl")

_last: list[Budget | None] = [None]
"""That of the layers made last in this process. vLLM asks for their specs next, where no configuration is at hand."""


@dataclass
class Step:
    """What a step's metadata carries for sparse layers."""

    prompts: list[rows.Prompt]
    others: Any
    """vLLM's metadata of the other rows alone; of all rows where no row is a prompt; None where there are none."""
    tokens: Tensor | slice | None
    """The other rows' tokens in the step."""
    block_table: Tensor
    record: StepRecord
    numbers: dict[int, int] = field(default_factory=dict)
    """Of each prompt's row its number in the record."""
    capacity: Tensor | None = None
    """Under ``drop`` int32, the slots that each prompt may fill."""
    lengths: Tensor | None = None
    """Under ``drop`` int32 ``[layers, rows]``, what each of the other rows holds in each layer, new tokens included."""
    places: Tensor | None = None
    """Under ``drop`` int32 ``[layers, tokens]``, the slot of each of the other rows' tokens within its row."""


class SparseBuilder:
    """Mixin before one of vLLM's metadata builders."""

    supports_update_block_table = False  # a step is of one group's blocks

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.zipvl: Budget | None = getattr(kv_cache_spec, "zipvl", None)
        self.lengths: paged.Lengths | None = None
        if self.zipvl is None:
            return
        startup.refuse(vllm_config, self.zipvl.options)
        self.impls = _impls(vllm_config, layer_names)
        _compare_ranks(self.zipvl)
        self.reporter = _reporter()
        if self.zipvl.options.drops:
            self.lengths = self._room_for_lengths(vllm_config, device)

    def _room_for_lengths(self, vllm_config: Any, device: Any) -> paged.Lengths:
        """Those of an earlier builder of the same layers, where there is one."""
        blocks, spec = vllm_config.cache_config.num_gpu_blocks, self.kv_cache_spec  # type: ignore[attr-defined]
        blocks *= max(1, vllm_config.cache_config.block_size // spec.block_size)  # blocks as the kernels count them
        made = self.impls[0].lengths
        if made is None or made.dropped.shape != (len(self.impls), blocks):
            made = paged.Lengths(len(self.impls), blocks, vllm_config.scheduler_config.max_num_seqs, device)
        for number, impl in enumerate(self.impls):
            impl.lengths, impl.number = made, number
        return made

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's metadata of all rows, with a ``Step`` as its ``zipvl``."""
        common = common_attn_metadata
        metadata = super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        if self.zipvl is None or common.causal is not True:
            return metadata
        count = common.num_reqs
        starts = common.query_start_loc_cpu[: count + 1].tolist()
        if common.is_prefilling is None or not bool(common.is_prefilling[:count].any()):
            self.reporter.start(None)
            metadata.zipvl = Step([], metadata, None, common.block_table_tensor, StepRecord())
            self._locate(metadata.zipvl)
            return metadata
        lengths = common.seq_lens_cpu_upper_bound[:count].tolist()
        prefilling = common.is_prefilling[:count].tolist()
        if self.zipvl.options.drops:
            self._forget(common, starts, lengths, prefilling)
        sparse = self.impls[0].is_sparse
        chunk = max(lengths) if self.zipvl.options.drops else self.zipvl.chunk
        prompts, others = rows.split(starts, lengths, prefilling, chunk, sparse)
        step = Step(prompts, metadata, None, common.block_table_tensor, StepRecord())
        if prompts:
            step.others, step.tokens = self._rest(common, starts, lengths, others)
            for prompt in prompts:
                step.numbers[prompt.row] = step.record.begin(prompt.end - prompt.start, prompt.seen)
            if self.zipvl.options.drops:
                slots = [self.zipvl.slots(prompt.seen) for prompt in prompts]
                step.capacity = torch.tensor(slots, dtype=torch.int32).to(self.device, non_blocking=True)  # type: ignore[attr-defined]
        self.reporter.start(step.record if prompts else None)
        self._locate(step)
        metadata.zipvl = step
        return metadata

    def _locate(self, step: Step) -> None:
        """Under ``drop``, for all layers at once: what the other rows hold, and where their new tokens go."""
        of = step.others
        if self.lengths is not None and of is not None:
            step.lengths, step.places = self.lengths.locate(
                of.block_table, of.seq_lens, of.query_start_loc, of.max_query_len, of.num_actual_tokens
            )

    def _forget(self, common: Any, starts: list[int], lengths: list[int], prefilling: list[bool]) -> None:
        """A request that begins has dropped nothing yet; its first block may have been another's."""
        fresh = []
        for row, begins in enumerate(prefilling):
            tokens = starts[row + 1] - starts[row]
            if not begins or tokens == 0:
                continue
            if tokens != lengths[row]:
                raise RuntimeError(
                    f"zipvl: a prompt came in pieces, the last {tokens} of {lengths[row]} tokens in this step, and "
                    'cache="drop" selects it whole: what cut it is not among the settings that zipvl refuses'
                )
            fresh.append(row)
        table = common.block_table_tensor
        if fresh:
            row_of = torch.tensor(fresh).to(table.device, non_blocking=True)
            assert self.lengths is not None
            self.lengths.forget(table[:, 0].index_select(0, row_of))

    def _rest(
        self, common: Any, starts: list[int], lengths: list[int], others: list[int]
    ) -> tuple[Any, Tensor | slice | None]:
        """vLLM's metadata of the rows ``others`` alone, and their tokens."""
        others = [row for row in others if starts[row + 1] > starts[row]]
        if not others:
            return None, None
        counts = [starts[row + 1] - starts[row] for row in others]
        device, total = common.seq_lens.device, sum(counts)
        if others == list(range(len(others))):  # rows that decode come first where vLLM orders them so
            tokens: Tensor | slice = slice(0, total)
            row_of: Tensor | slice = slice(0, len(others))
        else:
            tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in others])
            tokens, row_of = (t.to(device, non_blocking=True) for t in (tokens, torch.tensor(others)))
        begins = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        rest = compat.replaced(
            common,
            query_start_loc=begins.to(device, non_blocking=True),
            query_start_loc_cpu=begins,
            seq_lens=common.seq_lens[row_of],
            seq_lens_cpu_upper_bound=torch.tensor([lengths[row] for row in others], dtype=torch.int32),
            num_reqs=len(others),
            num_actual_tokens=total,
            max_query_len=max(counts),
            max_seq_len=max(lengths[row] for row in others),
            block_table_tensor=common.block_table_tensor[row_of],
            slot_mapping=common.slot_mapping[tokens],
            positions=None if common.positions is None else common.positions[tokens],
            is_prefilling=torch.tensor([bool(common.is_prefilling[row]) for row in others]),
            req_idx=None if getattr(common, "req_idx", None) is None else common.req_idx[others],
            _seq_lens_cpu=None,
            _num_computed_tokens_cpu=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        # A fast build makes no plan: FlashAttention has one room for plans, and dense layers read that of all rows.
        return super().build(0, rest, True), tokens  # type: ignore[misc]


class SparseImpl:
    """Mixin before one of vLLM's implementations of attention. The three methods at its end are a device's own."""

    device_type: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.zipvl: Budget | None = None
        self.lengths: paged.Lengths | None = None
        """Of its cache group, under ``drop``; the layer is ``number`` there."""
        self.number = 0
        self._layer: int | None = None
        vllm_config = get_current_vllm_config()
        options = plugin.asked(vllm_config)
        if options is not None and self.attn_type == AttentionType.DECODER:  # type: ignore[attr-defined]
            self._check_layer(options)
            if not self._has_window():
                dtype = vllm_config.model_config.dtype
                self._states = torch.empty(0, dtype=dtype, device=self.device_type)
                chunk = options.prefill_chunk_size or vllm_config.scheduler_config.max_num_batched_tokens
                self.zipvl = Budget(options, self._dense_below(options, None), chunk)
        _last[0] = self.zipvl

    def _has_window(self) -> bool:
        window = self.sliding_window  # type: ignore[attr-defined]
        return (window if isinstance(window, int) else window[0]) >= 0

    def _check_layer(self, options: Options) -> None:
        """Raises ValueError for a layer that is not what zipvl computes."""
        found = []
        if self.logits_soft_cap:  # type: ignore[attr-defined]
            found.append("soft-capped logits")
        if self.alibi_slopes is not None:  # type: ignore[attr-defined]
            found.append("ALiBi")
        if self.sinks is not None:  # type: ignore[attr-defined]
            found.append("attention sinks of its own")
        if self.kv_sharing_target_layer_name is not None:  # type: ignore[attr-defined]
            found.append("a cache that belongs to another layer")
        if options.drops and self._has_window():
            found.append('a sliding window, with cache="drop" (use "full")')
        if found:
            raise ValueError(f"zipvl cannot act in this server: a layer has {', '.join(found)}. Serve it without zipvl")
        some_dense = options.config.layers is not None or options.config.dense_first_layers > 0
        if some_dense and options.compact:
            raise ValueError(
                "zipvl: layers and dense_first_layers leave layers dense, which need blocks for all tokens, and ratio, "
                'max_ratio and cache_ratio with cache="drop" reserve blocks for kept tokens alone. Use cache="full", '
                "or tau alone"
            )

    def _dense_below(self, options: Options, queries: int | None) -> int:
        heads, size = self.num_heads, self.head_size  # type: ignore[attr-defined]
        return policy.dense_below(options.config, heads, size, self._states, queries=queries)

    def is_sparse(self, queries: int, seen: int) -> bool:
        """Whether ``queries`` tokens of a prompt, the last of ``seen``, are attended to by ZipVL."""
        assert self.zipvl is not None
        below = self.zipvl.dense_below
        return seen >= (below if queries == seen else self._dense_below(self.zipvl.options, queries))

    def takes(self, layer: Any) -> bool:
        """Whether this layer is one that the options make sparse."""
        if self.zipvl is None:
            return False
        if self._layer is None:
            self._layer = extract_layer_index(layer.layer_name)
        config = self.zipvl.options.config
        return self._layer >= config.dense_first_layers and (config.layers is None or self._layer in config.layers)

    def keeps_less(self, layer: Any) -> bool:
        """Whether this layer writes its cache itself, once it knows what it keeps."""
        return self.zipvl is not None and self.zipvl.options.drops and self.takes(layer)

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        if not self.keeps_less(layer):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's: ``query``, ``output [tokens, Hq, D]``, ``key``, ``value [tokens, Hkv, D]``."""
        step: Step | None = getattr(attn_metadata, "zipvl", None)
        scales = (output_scale, output_block_scale)
        if step is None or not self.takes(layer):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)  # type: ignore[misc]
        if any(scale is not None for scale in scales):
            raise NotImplementedError("zipvl: outputs cannot be quantised within attention")
        drops = self.keeps_less(layer)
        if not step.prompts and not drops:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)  # type: ignore[misc]
        for number, prompt in enumerate(step.prompts):
            index, count = self._prompt(layer, prompt, query, key, value, kv_cache, step, output)
            if drops:
                tokens = slice(prompt.start, prompt.end)
                index, count = self._stored(query[tokens], key[tokens], index, count)
                self._store(layer, prompt, number, index, count, key, value, kv_cache, step)
            step.record.add(step.numbers[prompt.row], count)
        if step.others is not None:
            self._others(layer, step, query, key, value, kv_cache, output, drops)
        return output

    def _others(
        self,
        layer: Any,
        step: Step,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        output: Tensor,
        drops: bool,
    ) -> None:
        """Rows that decode, and prompts that stay dense, by vLLM's own kernels."""
        tokens = step.tokens
        if tokens is None:
            tokens = slice(0, step.others.num_actual_tokens)
        q, k, v = query[tokens], key[tokens], value[tokens]
        out = output[tokens] if isinstance(tokens, slice) else torch.empty_like(output[: q.shape[0]])
        metadata = self._own_lengths(layer, k, v, kv_cache, step) if drops else step.others
        super().forward(layer, q, k, v, kv_cache, metadata, out)  # type: ignore[misc]
        if not isinstance(tokens, slice):
            output.index_copy_(0, tokens, out)

    def _prompt(
        self,
        layer: Any,
        prompt: rows.Prompt,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        step: Step,
        output: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A prompt's tokens of this step, piece by piece. Returns ``index`` and ``count`` of the last sparse one."""
        if prompt.whole:
            k, v = (_heads_first(t[prompt.start : prompt.end]) for t in (key, value))
        else:
            k, v = self._gather(kv_cache, step.block_table[prompt.row], prompt.seen)
        index = count = None
        for piece in prompt.pieces:
            q = _heads_first(query[piece.start : piece.end])
            seen_k, seen_v = k[:, :, : piece.seen], v[:, :, : piece.seen]
            if piece.sparse:
                out, index, count = self._select(q, seen_k, seen_v)
            else:
                all_tokens = torch.arange(piece.seen, dtype=torch.int32, device=q.device)[None]
                out = ops.sparse_attn(q, seen_k, seen_v, all_tokens, all_tokens[:, -1] + 1, scale=self.scale)  # type: ignore[attr-defined]
            output[piece.start : piece.end] = out[0].transpose(0, 1)
        assert index is not None and count is not None
        return index, count

    def _stored(self, query: Tensor, key: Tensor, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored where a layer attended to ``index``: the same, or what the cache's own budget takes."""
        assert self.zipvl is not None
        config = self.zipvl.options.config
        if config.cache_ratio is None:
            return index, count
        tokens = _Keys(_heads_first(key))
        keep, own = budget.first_stored(config, tokens.keys, None, None, None, None)
        mean = _mean if get_tp_group().world_size > 1 else None
        return budget.select(config, _heads_first(query), tokens, keep, own, self.scale, mean)  # type: ignore[attr-defined]

    def _select(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer's selection and attention. The ranks of a tensor-parallel group select by their mean scores."""
        assert self.zipvl is not None
        config, group = self.zipvl.options.config, get_tp_group()
        scale = self.scale  # type: ignore[attr-defined]
        given: dict[str, Any] = ranks.scores(config, q, k, _mean, scale) if group.world_size > 1 else {}
        out, index, count, _, _ = ops.zipvl_layer(q, k, v, **given, **config.attention_kwargs(), scale=scale)
        return out, index, count

    # ---- a device's own

    def _gather(self, kv_cache: Tensor, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, Hkv, tokens, D]`` of a request, out of its blocks."""
        raise NotImplementedError

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
        """Writes what a prompt keeps to the front of its blocks, and how much it dropped."""
        raise NotImplementedError

    def _own_lengths(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step) -> Any:
        """Writes the other rows' tokens behind what these hold. Returns their metadata with this layer's lengths."""
        raise NotImplementedError


class SparseBackend:
    """Mixin before one of vLLM's backends."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """As vLLM asks it for a layer's spec: with the layer's budget where it is sparse."""
        of_vllm = getattr(super(), "customize_spec", None)
        return _customized(spec if of_vllm is None else of_vllm(spec))


def _customized(spec: Any) -> Any:
    """The spec of a layer that was made in this process: with its budget where it is sparse."""
    last = _last[0]
    if last is None or type(spec) is not FullAttentionSpec:
        return spec
    blocks = max(last.chunk // spec.block_size, 1)
    return ZipVLSpec.of(spec, replace(last, chunk=blocks * spec.block_size))


class _Keys(NamedTuple):
    """Keys ``[1, Hkv, tokens, D]`` of real tokens."""

    keys: Tensor
    token_mask: Tensor | None = None


def _mean(scores: Tensor) -> Tensor:
    """Over the ranks of the tensor-parallel group, which have as many query heads each."""
    group = get_tp_group()
    return group.all_reduce(scores) / group.world_size


def _heads_first(states: Tensor) -> Tensor:
    """``[tokens, H, D]`` as ``[1, H, tokens, D]``, a view."""
    return states.transpose(0, 1).unsqueeze(0)


def _impls(vllm_config: Any, layer_names: list[str]) -> list[Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
    return [layer.impl for layer in layers.values()]


compat.let_backends_customize_specs()

_reporters: list[Reporter] = []


def _reporter() -> Reporter:
    """That of this worker. The first rank of a tensor-parallel group writes to the log."""
    if not _reporters:
        _reporters.append(Reporter(logger.info if get_tp_group().rank_in_group == 0 else logger.debug))
    return _reporters[0]


def _compare_ranks(own_budget: Budget) -> None:
    """Raises RuntimeError where the ranks of a tensor-parallel group are not alike: they must select alike."""
    group = get_tp_group()
    if group.world_size == 1:
        return
    own = (zipvl.__version__, repr(own_budget))
    every: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(every, own, group=group.cpu_group)
    if any(other != own for other in every):
        listed = "; ".join(f"rank {rank}: zipvl {found[0]}, {found[1]}" for rank, found in enumerate(every))
        raise RuntimeError(f"zipvl: the ranks are not set up alike: {listed}")
