"""Models of transformers' auto mappings: sparse and right, dense with a reason, or refused at the start of the block.

A slice, one of each kind. ``ZIPVL_MODELS=all`` is every model; ``make models`` also writes docs/models.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models.matrix import Row, entries, examine, page, rows_of

SLICE = {
    "LlamaForCausalLM": "sparse",
    "Gemma3ForCausalLM": "sparse",
    "GPT2LMHeadModel": "sparse",
    "Qwen3NextForCausalLM": "sparse",
    "Qwen3MoeForCausalLM": "sparse",
    "MllamaForConditionalGeneration": "sparse",
    "Qwen2_5_VLForConditionalGeneration": "sparse",
    "LlavaOnevisionForConditionalGeneration": "sparse",
    "MistralForCausalLM": "dense",
    "BertLMHeadModel": "refused",
    "BloomForCausalLM": "refused",
    "DeepseekV3ForCausalLM": "sparse",
    "DiffLlamaForCausalLM": "refused",
    "Gemma2ForCausalLM": "refused",
    "GptOssForCausalLM": "refused",
    "MambaForCausalLM": "refused",
    "StableLmForCausalLM": "refused",
}
EVERY = os.environ.get("ZIPVL_MODELS") == "all"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in entries() if EVERY or name in SLICE])
def test_a_model_is_right_or_refused(name: str) -> None:
    row = examine(name)
    assert row.verdict in ("sparse", "dense", "refused", "not built"), (row.wrong, row.reason)
    if name in SLICE:
        assert row.verdict == SLICE[name], row.reason
    if row.verdict == "dense":
        assert row.reason and row.sparse == 0
    if row.verdict == "refused":
        assert any(
            remedy in row.reason.lower() for remedy in ("use attn_", "run this model", "set is_decoder", "use a ")
        )


def test_the_slice_is_there() -> None:
    assert set(SLICE) <= set(entries())


def test_the_page_is_of_these_models() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert "## Wrong" not in text
    for name, verdict in SLICE.items():
        assert f"\n| {name} |" in text.split(f"## {verdict.capitalize()}\n")[1].split("\n## ")[0]
    row = Row("A", "causal", "wrong", wrong=["tau 1", "a | b"])
    assert "## Wrong" in page([row]) and "| A |  | tau 1; a \\| b |" in page([row])


def test_a_page_can_be_read_again() -> None:
    rows = [
        Row("LlamaForCausalLM", "causal", "sparse", sparse=2, layers=4, reason="sliding-window attention"),
        Row("BloomForCausalLM", "causal", "refused", "zipvl: a | b, <c>"),
        Row("BertLMHeadModel", "causal", "wrong", wrong=["tau 1", "generate: a | b"]),
    ]
    assert sorted(rows_of(page(rows)).items()) == sorted((row.model, row) for row in rows)
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert len(rows_of(text)) == text.count("\n| ") - text.count("\n| model |")
