"""Engines on a GPU: dense, `full` and `drop`, step by step and with decoding steps in CUDA graphs.

The peer is vLLM's own attention. Two kernels round differently, so where tokens part the peer's two best were close.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.tiny import random_copy, text_copy

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

EVERY = {"tau": 1.0, "local_window": 0, "num_sinks": 0, "dense_below": 256}
QUARTER = {"ratio": 0.25, "local_window": 64, "num_sinks": 4, "dense_below": 256}
LENGTHS = (1500, 2111, 200, 900)  # the third stays dense
NEW = 16
CLOSE = 0.15  # of log-probabilities, in bfloat16
Answer = list[tuple[int, dict[int, float]]]  # of each step the token, and log-probabilities of the best ones


@pytest.fixture(scope="module", params=["random", "text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head dim 128 with random weights, and 64 with trained ones."""
    make = {"random": random_copy, "text": text_copy}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(1, 60) for _ in range(length)] for length in LENGTHS]


@contextmanager
def engine(model: Path, options: dict[str, Any] | None, graphs: bool, **settings: Any) -> Iterator[Any]:
    from vllm import LLM

    given: dict[str, Any] = {
        "dtype": "bfloat16", "max_model_len": 4096, "max_num_batched_tokens": 8192, "max_num_seqs": 8,
        "enable_prefix_caching": False, "gpu_memory_utilization": 0.1, "skip_tokenizer_init": True,
        "disable_log_stats": True, "enforce_eager": not graphs, "kv_cache_memory_bytes": 1 << 29,
    }  # fmt: skip
    if graphs:
        sizes = [1, 2, 4, 8]
        given["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        }
    if options is not None:
        given["additional_config"] = {"zipvl": options}
    made = LLM(str(model), **(given | settings))
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made.llm_engine
        gc.collect()
        torch.cuda.empty_cache()


def answers(engine: Any, one_by_one: bool = False) -> list[Answer]:
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=5)
    given = [{"prompt_token_ids": ids} for ids in prompts()]
    batches = [[one] for one in given] if one_by_one else [given]
    done = [out.outputs[0] for batch in batches for out in engine.generate(batch, how, use_tqdm=False)]
    return [
        [
            (token, {at: found.logprob for at, found in best.items()})
            for token, best in zip(out.token_ids, out.logprobs, strict=True)
        ]
        for out in done
    ]


def agree(found: list[Answer], peer: list[Answer]) -> None:
    """The same tokens with the same log-probabilities, up to a step where the peer's two best are close."""
    for answer, other in zip(found, peer, strict=True):
        assert len(answer) == len(other) == NEW
        for (token, own), (expected, best) in zip(answer, other, strict=True):
            if token != expected:
                first, second = sorted(best.values(), reverse=True)[:2]
                assert first - second < CLOSE, (token, own, expected, best)
                break
            assert abs(own[token] - best[token]) < CLOSE, (own, best)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_with_every_token_answers_are_vllms_own(model: Path, graphs: bool, kept: Any) -> None:
    with engine(model, None, graphs) as plain:
        dense = answers(plain)
    sparse = [length for length in LENGTHS if length >= 256]
    for options in (EVERY, EVERY | {"cache": "drop"}):
        with engine(model, options, graphs) as whole:
            agree(answers(whole), dense)
        found = kept()
        assert sorted(seen for _, seen, _ in found) == sorted(sparse)
        assert all(set(layers) == {seen} for _, seen, layers in found)


@pytest.mark.parametrize("options", [QUARTER, QUARTER | {"cache": "drop"}], ids=["full", "drop"])
def test_graphs_and_batches_change_nothing(model: Path, options: dict[str, Any], kept: Any) -> None:
    with engine(model, options, graphs=False) as eager:
        alone = answers(eager, one_by_one=True)
        layers = sorted(kept())
        assert all(count < seen for _, seen, counts in layers for count in counts)
    with engine(model, options, graphs=True) as graphs:
        agree(answers(graphs), alone)
        assert [step[:2] for step in sorted(kept())] == [step[:2] for step in layers]


def test_chunks(model: Path, kept: Any) -> None:
    """Chunks of 512 tokens, in steps of 1,024 and in one."""
    options = QUARTER | {"prefill_chunk_size": 512}
    with engine(model, options, graphs=True) as whole:
        one = answers(whole, one_by_one=True)
        kept()
    with engine(model, options, graphs=True, max_num_batched_tokens=1024) as cut:
        agree(answers(cut, one_by_one=True), one)
        assert (1024, 1024) in [found[:2] for found in kept()]
