"""zipvl.vllm without vLLM: options, rows of a step, versions, reports."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zipvl.config import ZipVLConfig
from zipvl.vllm import plugin, versions
from zipvl.vllm.options import DONE, OUT_OF_REACH, Budget, Options
from zipvl.vllm.report import Reporter, StepRecord
from zipvl.vllm.rows import cut, split
from zipvl.vllm.startup import problems


def test_imports_neither_transformers_nor_vllm() -> None:
    code = (
        "import sys, zipvl.vllm.plugin, zipvl.vllm.startup, zipvl.vllm.rows, zipvl.vllm.report\n"
        "print([name for name in ('transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def test_options_are_those_of_the_configuration() -> None:
    options = Options.read({"tau": 0.9, "local_window": 64, "layers": [3, 4], "dense_below": 100})
    assert options.config == ZipVLConfig(
        tau=0.9, local_window=64, layers=(3, 4), dense_below=100, keep_text=False, text_prompts="sparse"
    )
    assert options == Options.read({"tau": 0.9, "local_window": 64, "layers": (3, 4), "dense_below": 100})
    assert hash(options) and options.prefill_chunk_size is None
    assert Options.read({}).config == ZipVLConfig(keep_text=False, text_prompts="sparse")
    assert Options.read({"keep_text": False, "text_prompts": "sparse"}) == Options.read({})


def test_the_default_tau_is_the_model_s() -> None:
    def tau(options: dict[str, Any], multimodal: bool) -> float | None:
        model = SimpleNamespace(is_multimodal_model=multimodal)
        found = plugin.asked(SimpleNamespace(additional_config={"zipvl": options}, model_config=model))
        assert found is not None
        assert f"tau {found.config.tau:g}" in found.describe()
        return found.config.tau

    assert (tau({}, True), tau({}, False)) == (0.9, 0.97)
    assert tau({"tau": 0.5}, True) == tau({"tau": 0.5}, False) == 0.5


@pytest.mark.parametrize("name", sorted(OUT_OF_REACH))
def test_what_a_backend_cannot_see_is_an_error(name: str) -> None:
    assert name in {field.name for field in fields(ZipVLConfig)}
    value = {"keep_text": True, "text_prompts": "dense"}.get(name, True)
    with pytest.raises(ValueError, match=f"zipvl: {name} cannot be had in vLLM: .*Leave it out"):
        Options.read({name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "must be an object of options, got None"),
        (["tau"], r"must be an object of options, got \['tau'\]"),
        ({"tua": 0.9}, "there is no option tua; there are all_queries, cache.*tau"),
        ({"cache": "quantize"}, 'cache="quantize" cannot be had'),
        ({"cache": "none"}, "cache must be one of"),
        ({"tau": 1.5}, "tau must be in"),
        ({"cache_ratio": 0.5}, 'cache_ratio must be None with cache="full"'),
        ({"ratio": "a lot"}, "ratio must be a number"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be None or an integer of at least 1, got 0"),
        ({"prefill_chunk_size": True}, "prefill_chunk_size must be None.*got True"),
        ({"prefill_chunk_size": 64, "cache": "drop"}, 'prefill_chunk_size is for cache="full"'),
    ],
)
def test_wrong_options(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.read(given)


def test_a_file_gives_what_a_backend_can_follow(tmp_path: Path) -> None:
    path = str(tmp_path / "zipvl.json")
    followed = ZipVLConfig(tau=0.8, dense_below=300, low_bits=2, keep_text=False, text_prompts="sparse")
    followed.save(path)
    assert Options.read({"config": path}).config == followed.replace(low_bits=(4, 2))
    given = {"config": path, "tau": 0.7, "prefill_chunk_size": 512}
    assert Options.read(given) == Options(followed.replace(low_bits=(4, 2), tau=0.7), 512)
    ZipVLConfig(tau=0.8).save(path)
    beside = {"config": path, "keep_text": False, "text_prompts": "sparse"}
    assert Options.read(beside).config == ZipVLConfig(tau=0.8, **DONE)


@pytest.mark.parametrize("name", sorted(OUT_OF_REACH))
def test_a_field_of_a_file_that_a_backend_cannot_follow_is_named(tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = {"keep_text": True, "text_prompts": "dense", "skip_projections": True, "decode": "eager"}
    values |= {
        "vision_attention": False,
        "vision_compile": True,
        "decode_compile": True,
        "high_bits": 8,
        "low_bits": 4,
        "skip_mlp_layers": (1,),
    }
    config = ZipVLConfig(**DONE | {name: values[name]} | ({"cache": "quantize"} if name.endswith("bits") else {}))
    config.save(tmp_path / "zipvl.json")
    with pytest.raises(ValueError, match=rf"zipvl: {name}=.* of .*zipvl\.json cannot be had in vLLM: "):
        Options.read({"config": str(tmp_path / "zipvl.json")})


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zipvl: config must be the path of a file of zipvl calibrate, got 3"):
        Options.read({"config": 3})
    with pytest.raises(ValueError, match="path must be a file, got"):
        Options.read({"config": str(tmp_path / "none.json")})
    ZipVLConfig(cache="quantize", **DONE).save(tmp_path / "zipvl.json")
    with pytest.raises(ValueError, match='cache="quantize" cannot be had'):
        Options.read({"config": str(tmp_path / "zipvl.json")})


@pytest.mark.parametrize(
    ("given", "compact", "words"),
    [
        ({}, False, "tau 0.97, window 512 and 4 sinks.*holds all tokens"),
        ({"ratio": 0.25, "local_window": 0}, False, r"\(ratio 0.25\); the cache holds all tokens"),
        ({"cache": "drop"}, False, "blocks are reserved for all"),
        ({"cache": "drop", "ratio": 0.25}, True, "ratio 0.25.*blocks are reserved for these alone"),
        ({"cache": "drop", "max_ratio": 0.5}, True, "tau 0.97, at most 0.5.*these alone"),
        ({"cache": "drop", "ratio": 1.0}, False, "reserved for all"),
        ({"cache": "drop", "cache_ratio": 0.3}, True, "tau 0.97, 0.3 in the cache.*these alone"),
        ({"cache": "drop", "cache_ratio": 1.0, "ratio": 0.2}, False, "reserved for all"),
    ],
)
def test_what_is_said(given: dict[str, Any], compact: bool, words: str) -> None:
    options = Options.read(given)
    assert options.compact == compact
    assert re.search(words, options.describe())


@given(
    tokens=st.integers(1, 5000),
    ratio=st.floats(0.01, 1.0),
    window=st.integers(0, 300),
    sinks=st.integers(0, 9),
    below=st.integers(0, 2000),
)
def test_a_prompt_never_keeps_more_than_its_slots(
    tokens: int, ratio: float, window: int, sinks: int, below: int
) -> None:
    from zipvl import ops

    given: dict[str, Any] = {"ratio": ratio, "local_window": window, "cache": "drop", "keep_recent": 3}
    options = Options.read(given | {"num_sinks": sinks})
    slots = Budget(options, below, chunk=1).slots(tokens)
    assert slots <= tokens
    if tokens < below or not options.compact:
        assert slots == tokens
        return
    score = torch.rand(1, tokens)
    keep = torch.zeros(1, tokens, dtype=torch.bool)
    keep[:, -3:] = True
    neighbours = {"local_window": window, "num_sinks": options.config.sinks}
    _, count = ops.select_tokens(score, score, ratio=ratio, keep_mask=keep, **neighbours)
    assert int(count) <= slots


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@given(first=st.integers(0, 200), new=st.integers(1, 200), start=st.integers(0, 50), chunk=st.integers(1, 80))
def test_pieces_end_at_multiples_of_the_chunk_and_cover_the_tokens(
    first: int, new: int, start: int, chunk: int
) -> None:
    seen = first + new
    pieces = cut(start, start + new, seen, chunk, lambda queries, end: queries * 2 > end)
    assert [piece.start for piece in pieces] == [start, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == start + new and pieces[-1].seen == seen
    for piece in pieces:
        assert piece.seen - first == piece.end - start, "a piece sees the tokens up to its own end"
        assert piece.sparse == ((piece.end - piece.start) * 2 > piece.seen)
    assert all(piece.seen % chunk == 0 for piece in pieces[:-1])
    assert len(pieces) == -(-seen // chunk) - first // chunk


@given(cuts=st.lists(st.integers(1, 299), max_size=4), chunk=st.integers(1, 100))
def test_cuts_of_the_scheduler_at_ends_of_chunks_change_nothing(cuts: list[int], chunk: int) -> None:
    ends = sorted({cut_at - cut_at % chunk for cut_at in cuts} - {0} | {300})
    found, first = [], 0
    for end in ends:
        pieces = cut(0, end - first, end, chunk, lambda queries, seen: True)
        found += [(piece.end - piece.start, piece.seen) for piece in pieces]
        first = end
    assert found == [(p.end - p.start, p.seen) for p in cut(0, 300, 300, chunk, lambda queries, seen: True)]


def test_rows_of_a_step() -> None:
    """A decoding row, a whole prompt, a short one, a chunk, padding, a candidate's row, a chunk too small to pay."""
    starts = [0, 1, 301, 321, 421, 421, 425, 426]
    lengths = [900, 300, 20, 700, 0, 500, 400]
    prefilling = [False, True, True, True, False, False, True]
    prompts, others = split(starts, lengths, prefilling, 256, lambda queries, seen: seen >= 100 and queries > 1)
    assert [(p.row, p.start, p.end, p.seen, p.whole) for p in prompts] == [
        (1, 1, 301, 300, True),
        (3, 321, 421, 700, False),
    ]
    assert others == [0, 2, 4, 5, 6]
    assert [(p.start, p.end, p.seen) for p in prompts[0].pieces] == [(1, 257, 256), (257, 301, 300)]
    assert [(p.start, p.end, p.seen) for p in prompts[1].pieces] == [(321, 421, 700)]


def test_a_row_with_one_sparse_piece_is_a_prompt() -> None:
    prompts, others = split([0, 300], [300], [True], 100, lambda queries, seen: seen == 200)
    assert [piece.sparse for piece in prompts[0].pieces] == [False, True, False] and others == []


# ---------------------------------------------------------------------------------------------------------------------
# Versions, reports
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ("0.26.0", True), ("0.32.0", True), ("0.32.1+cpu", True), ("0.25.1", False), ("0.27.0", False),
        ("0.31.9", False), ("0.33.0", False), ("1.26.0", False), ("dev", False),
    ],
)  # fmt: skip
def test_versions(found: str, fits: bool) -> None:
    problem = versions.problem(found)
    assert (problem is None) == fits
    if problem is not None:
        assert versions.RANGE in problem and found in problem


def test_reports_come_with_a_later_step() -> None:
    lines: list[str] = []
    reporter = Reporter(lambda text, *values: lines.append(text % values))
    record = StepRecord()
    assert [record.begin(100, 100), record.begin(20, 200)] == [0, 1]
    reporter.start(record)
    for layer in range(2):
        record.add(0, torch.tensor([10 + 40 * layer], dtype=torch.int32))
        record.add(1, torch.tensor([200], dtype=torch.int32))
    assert lines == []
    reporter.start(None)
    assert lines == [
        "zipvl: a prompt of 100 tokens: kept 30.0% of them, 10.0% to 50.0% in 2 layers",
        "zipvl: a prompt of 200 tokens, the last 20 of them in this step: kept 100.0% of them, 100.0% to 100.0% in "
        "2 layers",
    ]
    assert [prompt["kept"] for prompt in reporter.last] == [[10, 50], [200, 200]]
    reporter.flush()
    assert len(lines) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


class Fake:
    """Attributes, and None for every other."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> None:
        return None


def configuration(**changes: Any) -> Any:
    parts = {
        "cache_config": {"cache_dtype": "auto", "enable_prefix_caching": False, "block_size": 16},
        "scheduler_config": {"long_prefill_token_threshold": 0, "max_num_batched_tokens": 8192},
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "model_config": {"max_model_len": 8192, "runner_type": "generate"},
    }
    whole: dict[str, Any] = {name: Fake(**(values | changes.pop(name, {}))) for name, values in parts.items()}
    return Fake(**whole, **changes)


def test_nothing_to_refuse() -> None:
    for options in ({}, {"cache": "drop"}, {"cache": "drop", "ratio": 0.5}, {"prefill_chunk_size": 32}):
        assert problems(configuration(), Options.read(options)) == []


def test_full_takes_prefix_caching_and_chunks() -> None:
    chunked = configuration(
        cache_config={"enable_prefix_caching": True},
        scheduler_config={"max_num_batched_tokens": 512, "long_prefill_token_threshold": 100},
    )
    assert problems(chunked, Options.read({})) == []
    found = problems(chunked, Options.read({"cache": "drop"}))
    assert [problem.split(" with")[0] for problem in found] == [
        "prefix caching",
        "--long-prefill-token-threshold 100",
        "--max-num-batched-tokens 512",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_config": {"cache_dtype": "fp8"}}, "--kv-cache-dtype fp8.*Leave it at auto"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "--decode-context-parallel-size.*Set it to 1"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "--prefill-context-parallel-size.*Set it to 1"),
        ({"parallel_config": {"enable_dbo": True}}, "--enable-dbo.*Leave it out"),
        ({"speculative_config": Fake(method="eagle")}, "'eagle'.*Use n-gram"),
        ({"kv_transfer_config": Fake()}, "KV connector.*Leave it out"),
        ({"model_config": {"runner_type": "pooling"}}, "pooling model"),
        ({"model_config": {"is_mm_prefix_lm": True}}, "both ways"),
        ({"model_config": {"rswa_window": 64}}, "reference sliding windows"),
        ({"model_config": {"use_mla": True}}, "latent attention"),
    ],
)
def test_refused_by_name_and_remedy(changes: dict[str, Any], words: str) -> None:
    for options in ({}, {"cache": "drop"}):
        found = problems(configuration(**changes), Options.read(options))
        assert len(found) == 1 and re.search(words, found[0])


def test_a_chunk_is_made_of_blocks() -> None:
    assert problems(configuration(), Options.read({"prefill_chunk_size": 40})) == [
        "prefill_chunk_size 40: it must be a multiple of the block size, 16"
    ]
