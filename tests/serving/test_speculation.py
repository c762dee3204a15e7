"""N-gram speculation, behind the other files: numba, which its proposer imports, breaks engines made later."""

from __future__ import annotations

from typing import Any

from tests.serving.tiny import NAMES, PAPER, WHOLE, answers


def test_n_gram_speculation_behind_dropped_tokens(engine: Any, expected: Any) -> None:
    """Rows of several queries, and lengths that go back where candidates were refused."""
    tokens, _ = expected(**PAPER, cache="drop")
    guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(PAPER | {"cache": "drop"}, **WHOLE, speculative_config=guesses) as sparse:
        assert answers(sparse, NAMES, one_by_one=False) == tokens
