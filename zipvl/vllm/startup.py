"""What cannot work is refused when the server starts, by name and with the remedy."""

from __future__ import annotations

from typing import Any

from zipvl.vllm.options import Options


def problems(vllm_config: Any, options: Options) -> list[str]:
    """Why this engine cannot do what was asked for, a line each: what, why, and the remedy."""
    return [*_always(vllm_config), *(_under_drop(vllm_config) if options.drops else _under_full(vllm_config, options))]


def refuse(vllm_config: Any, options: Options) -> None:
    """Raises ValueError with every problem."""
    if found := problems(vllm_config, options):
        listed = "\n".join(f"  - {problem}" for problem in found)
        raise ValueError(f"zipvl cannot act in this server:\n{listed}")


def _always(vllm_config: Any) -> list[str]:
    cache, parallel, model = vllm_config.cache_config, vllm_config.parallel_config, vllm_config.model_config
    found = []
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        found.append(f"--kv-cache-dtype {cache.cache_dtype}: the kernels read 16 and 32 bits. Leave it at auto")
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if getattr(parallel, name, 1) > 1:
            found.append(f"{flag}: a selection needs all keys on one rank. Set it to 1")
    if getattr(parallel, "enable_dbo", False):
        found.append("--enable-dbo: a step's rows are split behind the backend's back. Leave it out")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        found.append(
            f"speculative decoding by {speculative.method!r}: a draft model's layers share the backend. Use n-gram"
        )
    if vllm_config.kv_transfer_config is not None:
        found.append("a KV connector: blocks are not what another server would make of the prompt. Leave it out")
    if model is not None:
        if model.runner_type == "pooling":
            found.append("a pooling model: its outputs are not those of a prompt's last token. Serve it without zipvl")
        if getattr(model, "is_mm_prefix_lm", False):
            found.append("a model whose image tokens see each other both ways. Serve it without zipvl")
        if getattr(model, "rswa_window", None) is not None:
            found.append("a model of reference sliding windows. Serve it without zipvl")
        if getattr(model, "use_mla", False):
            found.append(
                "a model of latent attention (MLA): its cache holds no keys and values. Serve it without zipvl"
            )
    return found


def _under_full(vllm_config: Any, options: Options) -> list[str]:
    chunk, block = options.prefill_chunk_size, getattr(vllm_config.cache_config, "block_size", None)
    if chunk is not None and block and chunk % block:
        return [f"prefill_chunk_size {chunk}: it must be a multiple of the block size, {block}"]
    return []


def _under_drop(vllm_config: Any) -> list[str]:
    cache, scheduler, model = vllm_config.cache_config, vllm_config.scheduler_config, vllm_config.model_config
    found = []
    if cache.enable_prefix_caching:
        found.append(
            'prefix caching with cache="drop": what a block holds depends on the whole prompt. Set '
            '--no-enable-prefix-caching, or use cache="full"'
        )
    if scheduler.long_prefill_token_threshold > 0:
        found.append(
            f'--long-prefill-token-threshold {scheduler.long_prefill_token_threshold} with cache="drop": it cuts '
            "prompts, which are selected whole. Set it to 0"
        )
    longest = model.max_model_len if model is not None else 0
    if scheduler.max_num_batched_tokens < longest:
        found.append(
            f'--max-num-batched-tokens {scheduler.max_num_batched_tokens} with cache="drop": a prompt is selected '
            f"whole and must fit a step. Set it to --max-model-len ({longest}) or more, or --max-model-len lower"
        )
    return found
