"""What a server refuses before it loads anything, and that one which does not ask for zipvl is left alone."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from tests.serving.tiny import WHOLE
from zipvl.vllm import plugin, versions
from zipvl.vllm.cache import ZipVLManager, ZipVLSpec

TELLS = "prefill_end" in inspect.signature(FullAttentionManager.get_num_blocks_to_allocate).parameters


def configuration(folder: Path, options: Any, **settings: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    given = {"max_model_len": 4096, "dtype": "float32"} | settings
    if options is not None:
        given["additional_config"] = {"zipvl": options}
    return EngineArgs(model=str(folder), **given).create_engine_config()


def test_the_entry_point_registers_the_plugin() -> None:
    from importlib.metadata import entry_points

    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "zipvl")
    assert found.load() is plugin.register
    load_general_plugins()
    plugin.register()  # vLLM does so more than once
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_path() == "zipvl.vllm.cpu.ZipVLBackend"


@pytest.mark.parametrize("options", [{}, {"cache": "drop"}, {"cache": "drop", "ratio": 0.21}, {"max_ratio": 0.5}])
def test_accepted(served: Path, options: dict[str, Any], caplog_vllm: pytest.LogCaptureFixture) -> None:
    made = configuration(served, options | {"tau": 0.913}, **WHOLE)  # no other test's: vLLM says a line once
    assert plugin.asked(made) is not None
    assert any("zipvl: sparse prefill of every prompt" in line for line in caplog_vllm.messages)


def test_a_server_that_does_not_ask_is_left_alone(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert plugin.asked(configuration(served, None)) is None


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"tau": 2}, {}, "tau must be in"),
        ({"keep_text": True}, {}, "keep_text cannot be had in vLLM"),
        ({"cache": "drop"}, {"max_num_batched_tokens": 4200, "enable_prefix_caching": True}, "prefix caching with"),
        ({"cache": "drop"}, {**WHOLE, "max_num_batched_tokens": 2048}, r"--max-num-batched-tokens 2048 .* \(4096\)"),
        ({"cache": "drop"}, {**WHOLE, "long_prefill_token_threshold": 1000}, "--long-prefill-token-threshold 1000"),
        pytest.param(
            {"cache": "drop"},
            {**WHOLE, "scheduler_reserve_full_isl": False},
            "--no-scheduler-reserve-full-isl",
            marks=pytest.mark.skipif(TELLS, reason="this vLLM says in every call how long a prompt is"),
        ),
        ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"prefill_chunk_size": 100}, {"block_size": 32}, "prefill_chunk_size 100.*block size, 32"),
    ],
)
def test_refused(served: Path, options: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration(served, options, **settings)


def test_a_version_outside_the_range(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(ValueError, match=f"tested with vLLM {versions.RANGE}.*this is vLLM 0.99.0"):
        configuration(served, {})


# ---------------------------------------------------------------------------------------------------------------------
# The manager of blocks, without an engine
# ---------------------------------------------------------------------------------------------------------------------


def manager(options: dict[str, Any], blocks: int = 100, dense_below: int = 100, chunk: int = 64) -> ZipVLManager:
    import torch
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from zipvl.vllm.options import Budget, Options

    plain = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = ZipVLSpec.of(plain, Budget(Options.read(options), dense_below, chunk))
    pool = BlockPool(num_gpu_blocks=blocks, enable_caching=False, hash_block_size=16)
    return ZipVLManager(spec, block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=16)


def ask(of: ZipVLManager, request: str, tokens: int, prefill_end: int, ahead: int = 0) -> int:
    """As this version's scheduler asks. vLLM 0.26 first asks for all of a request that begins."""
    arguments = (request, tokens + ahead, [], 0, 0, tokens)
    if TELLS:
        return of.get_num_blocks_to_allocate(*arguments, prefill_end=prefill_end)
    if not of.req_to_blocks.get(request):
        whole = max(tokens, prefill_end)
        of.get_num_blocks_to_allocate(request, whole, [], 0, 0, whole, apply_admission_cap=True)
    return of.get_num_blocks_to_allocate(*arguments)


COMPACT = {"cache": "drop", "ratio": 0.25, "local_window": 32, "num_sinks": 4}  # a prompt of 400 keeps at most 137


def test_blocks_for_kept_tokens_alone() -> None:
    one = manager(COMPACT)
    assert one.budget.slots(400) == 137
    assert ask(one, "a", 400, 400) == 9
    one.allocate_new_blocks("a", 400, 400)
    assert len(one.req_to_blocks["a"]) == 9
    assert [ask(one, "a", tokens, 400) for tokens in (401, 407, 408)] == [0, 0, 1], "slots 138 to 144, and then 145"
    assert ask(one, "a", 401, 400, ahead=7) == 1, "room for candidates"
    one.free("a")
    assert one.block_pool.get_num_free_blocks() == 99 and not one.prompts


def test_a_cut_prompt_waits_until_it_comes_whole() -> None:
    one = manager({"cache": "drop"})
    assert ask(one, "a", 300, 400) > one.block_pool.num_gpu_blocks
    assert ask(one, "a", 400, 400) == 25
    whole = manager({})
    assert ask(whole, "a", 300, 400) == 19, "under full every chunk selects for itself"


def test_after_pre_emption_what_was_decoded_is_selected_too() -> None:
    one = manager(COMPACT)
    ask(one, "a", 400, 400)
    one.allocate_new_blocks("a", 400, 400)
    one.free("a")
    assert ask(one, "a", 500, 499) == -(-one.budget.slots(500) // 16)
    assert one.prompts["a"] == 500


def test_short_prompts_keep_all_their_blocks(caplog_vllm: pytest.LogCaptureFixture) -> None:
    caplog_vllm.set_level(logging.INFO, "vllm.zipvl")
    one = manager(COMPACT)
    assert ask(one, "a", 99, 99) == 7
    one.allocate_new_blocks("a", 99, 99)
    assert ask(one, "a", 112, 99) == 0 and ask(one, "a", 113, 99) == 1
    assert caplog_vllm.messages[-1] == "zipvl: request a: a prompt of 99 tokens got 7 blocks, 0 less than without zipvl"


def test_memory_of_the_largest_prompt() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4000))
    spec = manager(COMPACT).kv_cache_spec
    assert spec.max_memory_usage_bytes(config) == -(-spec.zipvl.slots(4000) // 16) * spec.page_size_bytes
    assert manager({}).kv_cache_spec.max_memory_usage_bytes(config) == 250 * spec.page_size_bytes
    assert spec.merge([spec, spec]) == spec
    with pytest.raises(ValueError, match="layers of one cache group differ"):
        spec.merge([spec, manager({}).kv_cache_spec])
