"""Pages through an engine: the tokens and the selections of the transformers integration, in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.tiny import NAMES, PAPER, TEXT, TOKENS, WHOLE, answers, prompt, text_copy
from tests.serving.transformers_tokens import text_tokens_and_kept
from zipvl.vllm import cache

WINDOW = {"ratio": 0.4, "local_window": 64, "num_sinks": 4}


def test_without_options_and_with_every_token_an_engine_is_vllms_own(engine: Any, kept: Any) -> None:
    with engine(None, **WHOLE) as plain:
        dense = answers(plain, NAMES)
    with engine({"tau": 1.0, "local_window": 0, "num_sinks": 0}, **WHOLE) as sparse:
        assert answers(sparse, NAMES) == dense
    assert kept() == [(TOKENS, TOKENS, [TOKENS] * 6)] * 2
    with engine({"tau": 1.0, "cache": "drop"}, **WHOLE) as sparse:
        assert answers(sparse, NAMES) == dense


@pytest.mark.parametrize("options", [PAPER, {"tau": 0.95}], ids=["paper", "default"])
def test_full_is_the_transformers_integration(options: dict[str, Any], engine: Any, kept: Any, expected: Any) -> None:
    tokens, layers = expected(**options, cache="full")
    with engine(options, **WHOLE) as sparse:
        assert answers(sparse, NAMES) == tokens
    assert [found for _, _, found in kept()] == layers


def test_drop_is_the_transformers_integration_one_by_one_and_in_a_batch(engine: Any, kept: Any, expected: Any) -> None:
    """In the batch one page decodes while the other is prefilled: lengths differ by layer and by row."""
    tokens, layers = expected(**PAPER, cache="drop")
    with engine(PAPER | {"cache": "drop"}, **WHOLE) as sparse:
        assert answers(sparse, NAMES) == tokens
        assert [found for _, _, found in kept()] == layers
        assert answers(sparse, NAMES, one_by_one=False) == tokens
    assert [found for _, _, found in kept()] == layers


def test_blocks_for_kept_tokens_alone(engine: Any, kept: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 80 blocks of 32 vLLM itself refuses to start; two pages fit at a time."""
    lines: list[str] = []
    monkeypatch.setattr(cache.logger, "info", lambda text, *values, **_: lines.append(text % values))
    tokens, layers = expected(**WINDOW, cache="drop")
    few = {"block_size": 32, "num_gpu_blocks_override": 80}
    with pytest.raises(ValueError, match="KV cache"), engine(None, **WHOLE, **few):
        pass
    with engine(WINDOW | {"cache": "drop"}, **WHOLE, **few) as sparse:
        assert answers(sparse, NAMES, one_by_one=False) == tokens
    assert [found for _, _, found in kept()] == layers
    said = "a prompt of 2613 tokens got 35 blocks, 47 less than without zipvl"
    assert sum(line.endswith(said) for line in lines) == 2


def test_a_budget_of_the_caches_own(engine: Any, kept: Any, expected: Any) -> None:
    """Prefill attends to what tau keeps; every layer stores the same share, and blocks are reserved for it."""
    options = {"tau": 0.95, "local_window": 128, "cache": "drop", "cache_ratio": 0.3}
    tokens, _ = expected(**options)
    with engine(options, **WHOLE, block_size=32, num_gpu_blocks_override=64) as sparse:
        assert answers(sparse, NAMES, one_by_one=False) == tokens
    assert kept() == [(TOKENS, TOKENS, [784] * 6)] * 2, "the ceiling of 0.3 * 2613"


def test_pre_emption(engine: Any, kept: Any, expected: Any) -> None:
    """Two requests outgrow the pool: one is thrown out, and selected anew with what it has decoded."""
    options = WINDOW | {"cache": "drop"}
    tokens, _ = expected(**options)
    with engine(options, **WHOLE, block_size=32, num_gpu_blocks_override=73) as sparse:
        found = answers(sparse, NAMES, tokens=70, one_by_one=False)
    assert [len(one) for one in found] == [70, 70] and [one[:12] for one in found] == tokens
    resumed = [seen for step, seen, _ in kept() if seen > TOKENS]
    assert resumed and max(resumed) < TOKENS + 70


def test_chunks_and_prefixes(engine: Any, kept: Any) -> None:
    """Where the scheduler cuts at ends of chunks, and where a prefix comes out of the cache, nothing changes."""
    options = {"tau": 0.95, "prefill_chunk_size": 1024}
    name = ("demo",)
    with engine(options, **WHOLE) as whole:
        tokens = answers(whole, name)
    ((_, _, last_chunk),) = kept()
    with engine(options, enable_prefix_caching=True, max_num_batched_tokens=2048) as cut:
        assert answers(cut, name) == tokens
        first, second = kept()
        assert (first[:2], second) == ((2048, 2048), (565, TOKENS, last_chunk))
        assert answers(cut, name) == tokens  # from the prefix cache, down to the end of a chunk
        assert kept() == [(565, TOKENS, last_chunk)]
    with engine(options, enable_prefix_caching=True, max_num_batched_tokens=1000) as ragged:
        odd = answers(ragged, name)
    assert [step for step, _, _ in kept()] == [1000, 1000, 613]
    assert odd[0][:3] == tokens[0][:3]


def test_chunks_are_those_of_transformers(tmp_path: Path, kept: Any) -> None:
    """On a text, in steps of two chunks."""
    from vllm import LLM, SamplingParams

    options = {"tau": 0.9, "local_window": 32, "num_sinks": 2}
    folder = text_copy(tmp_path)
    tokens, layers = text_tokens_and_kept(folder, options, prefill_chunk_size=256)
    engine = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=512,
        skip_tokenizer_init=True,
        additional_config={"zipvl": options | {"prefill_chunk_size": 256}},
    )
    try:
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        (out,) = engine.generate([{"prompt_token_ids": TEXT}], sampling, use_tqdm=False)
        assert list(out.outputs[0].token_ids) == tokens
        assert kept()[-1] == (900 - 512, 900, layers)
    finally:
        engine.llm_engine.engine_core.shutdown()


def test_some_layers_stay_dense(engine: Any, kept: Any, expected: Any) -> None:
    options = PAPER | {"dense_first_layers": 2, "cache": "drop"}
    tokens, layers = expected(**options)
    with engine(options, **WHOLE) as sparse:
        assert answers(sparse, NAMES, one_by_one=False) == tokens
    assert [found for _, _, found in kept()] == [one[2:] for one in layers]


def test_short_prompts_stay_dense_beside_long_ones(engine: Any, kept: Any, expected: Any) -> None:
    """Prompts below dense_below, in one step with a sparse one and decoding after it."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    short = [
        {"prompt_token_ids": [1, 5, 9, 30, 31]},
        {"prompt_token_ids": list(range(1, 60)) * 2},
        {"prompt_token_ids": [7]},
    ]
    mixed = [short[0], prompt("demo"), short[1], short[2]]
    tokens, layers = expected(**PAPER, cache="drop")

    def generate(one: Any) -> list[list[int]]:
        with one as made:
            return [list(out.outputs[0].token_ids) for out in made.generate(mixed, sampling, use_tqdm=False)]

    dense = generate(engine(None, **WHOLE))
    for given in (PAPER | {"cache": "drop"}, PAPER | {"cache": "drop", "max_ratio": 0.8}):
        sparse = generate(engine(given, **WHOLE))
        assert [sparse[0], sparse[2], sparse[3]] == [dense[0], dense[2], dense[3]]
        assert sparse[1] == tokens[0]
        assert [found for _, _, found in kept()] == [layers[0]]
