"""Table E on the tiny model: operations, bytes and time of one prompt's language model, dense and ZipVL."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import zipvl
from benchmarks.paper.settings import Row, Runner
from zipvl import ops
from zipvl.baselines.common import attention_replaced
from zipvl.transformers import target as targets

__all__ = ["attention_flops", "costs", "peak_bytes"]

REPEATS = 5


def attention_flops(queries: int, heads: int, dim: int, probes: bool = False) -> int:
    """Floating point operations of causal attention among ``queries`` tokens, a multiply-add being two.

    Args:
        probes: the scores alone, without the product with the values.
    """
    pairs = queries * (queries + 1) // 2
    return (2 if probes else 4) * pairs * heads * dim


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that ``function`` holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


def _milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - started))
    return round(median(times[1:]), 3)


@torch.inference_mode()
def costs(run: Runner) -> list[Row]:
    """Rows of one prompt: the language model's prefill whole, and its attention stage by stage, all layers together."""
    subject = run.subject
    batch = subject.batches("mixed", run.pages)[0]
    one = {name: value[:1] for name, value in batch.inputs.items() if name not in ("pixel_values", "image_sizes")}
    model, text = subject.model, subject.model.config.text_config
    embeddings = model.get_input_embeddings()(one["input_ids"])
    image = one["input_ids"] == model.config.image_token_id
    packed = batch.features if isinstance(batch.features, (list, tuple)) else batch.features.pooler_output
    embeddings[image] = packed[0].to(embeddings.dtype)
    tokens = embeddings.shape[1]
    decoder, caught = model.model.language_model, []

    def catch(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        caught.append((q, k, v))
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling)

    target = targets.find(model)
    with attention_replaced(target.attention, target.configs, catch), FlopCounterMode(display=False) as counter:
        decoder(inputs_embeds=embeddings, use_cache=False)
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))

    config = zipvl.ZipVLConfig.paper(tau=run.tau, seed=run.seed)
    rows = []
    whole: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [
        ("dense", nullcontext),
        (f"ZipVL, tau {run.tau:g}", lambda: zipvl.sparse(model, config)),
    ]
    heads, dim = text.num_attention_heads, text.head_dim
    kept: list[int] = [tokens] * len(caught)
    for label, context in whole:

        def prefill(context: Callable[[], AbstractContextManager[Any]] = context) -> Any:
            with context() as stats:
                return decoder(inputs_embeds=embeddings, use_cache=True), stats

        out, stats = prefill()
        estimate = 0
        if stats is not None:
            kept = [stats.layers[i].kept[0] for i in sorted(stats.layers)]
            index = ops.probe_index(caught[0][0], num_recent=config.num_recent, num_random=config.num_random)
            # Two passes over the probes' scores, as the ops do it; a probe sees the tokens up to itself.
            estimate = 2 * 2 * heads * dim * int((index[0] + 1).sum()) * len(caught)
        stored = [getattr(layer, "packed", None) or layer for layer in out.past_key_values.layers]
        cache = sum(s.untyped_storage().nbytes() for layer in stored for s in (layer.keys, layer.values))
        rows.append(
            {
                "label": label,
                "part": "prefill",
                "tokens": tokens,
                "kept": kept,
                "gflop": {
                    "products": round(products / 1e9, 3),
                    "estimate": round(estimate / 1e9, 3),
                    "attention": round(sum(attention_flops(n, heads, dim) for n in kept) / 1e9, 3),
                },
                "ms": _milliseconds(prefill, subject.device),
                "cache_bytes": cache,
                "peak_bytes": peak_bytes(prefill, subject.device),
            }
        )
        del out, stats
    return rows + _stages(run, caught, config)


def _stages(run: Runner, caught: list[tuple[Tensor, Tensor, Tensor]], config: zipvl.ZipVLConfig) -> list[Row]:
    """The attention of all layers, stage by stage: what the paper's table adds up."""
    device = run.subject.device
    probes = [ops.probe_index(q, seed=config.seed) for q, _, _ in caught]
    scores = [ops.probe_scores(q, k, p) for (q, k, _), p in zip(caught, probes, strict=True)]
    chosen = [ops.select_tokens(*pair, tau=config.tau) for pair in scores]
    group = caught[0][0].shape[1] // caught[0][1].shape[1]

    def dense_attention() -> None:
        for q, k, v in caught:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    stages: dict[str, Callable[[], Any]] = {
        "original: dense attention": dense_attention,
        "approximate attention (probe_index, probe_scores)": lambda: [
            ops.probe_scores(q, k, ops.probe_index(q, seed=config.seed)) for q, k, _ in caught
        ],
        "budget and top-k (select_tokens)": lambda: [ops.select_tokens(*pair, tau=config.tau) for pair in scores],
        "sparse attention (packing included)": lambda: [
            ops.sparse_attn(*states, *selection) for states, selection in zip(caught, chosen, strict=True)
        ],
        "zipvl_attn in one call": lambda: [ops.zipvl_attn(*states, **config.attention_kwargs()) for states in caught],
    }
    return [
        {
            "label": label,
            "part": "attention",
            "ms": _milliseconds(stage, device),
            "peak_bytes": peak_bytes(stage, device),
        }
        for label, stage in stages.items()
    ]
