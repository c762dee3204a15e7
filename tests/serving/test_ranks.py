"""Tensor parallelism: two processes with half of the heads each select what one process selects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.tiny import TEXT, text_copy


def selections(worker: Any) -> list[Any]:
    """In a worker: what its prompts kept."""
    from zipvl.vllm import backend

    for reporter in backend._reporters:
        reporter.flush()
    return [(one["tokens"], one["seen"], one["kept"]) for reporter in backend._reporters for one in reporter.last]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_copy(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("cache", ["full", "drop"])
def test_two_ranks_select_what_one_does(text_model: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each rank wants a NUMA node
    options = {"tau": 0.9, "local_window": 32, "num_sinks": 2, "cache": cache}
    found = {}
    for ranks in (1, 2):
        engine = LLM(
            str(text_model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            tensor_parallel_size=ranks,
            distributed_executor_backend="mp" if ranks > 1 else None,
            skip_tokenizer_init=True,
            additional_config={"zipvl": options},
        )
        try:
            sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
            (out,) = engine.generate([{"prompt_token_ids": TEXT}], sampling, use_tqdm=False)
            found[ranks] = list(out.outputs[0].token_ids), engine.collective_rpc(selections)
        finally:
            engine.llm_engine.engine_core.shutdown()
    (tokens, (alone,)), (same_tokens, (first, second)) = found[1], found[2]
    assert first[-1] == second[-1] == alone[-1], "ranks select alike, and as one process does"
    assert 0 < sum(alone[-1][2]) < 6 * 900
    assert same_tokens == tokens
