"""examples/token_scores.py: scores of every layer beside the model's own attention, which they leave alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zipvl import ops

from .tiny_models import TEXT, VOCAB, build

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "token_scores.py"
TOKENS, PADDING = 200, 30


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("token_scores", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["token_scores"] = module
    spec.loader.exec_module(module)
    return module


def test_scores_are_the_probes_attention_and_outputs_are_the_models_own(example: ModuleType) -> None:
    """Two rows, one padded on the left; the probes' rows of eager attention, summed by hand."""
    model = build(LlamaForCausalLM, LlamaConfig(**TEXT))
    ids = torch.randint(2, VOCAB, (2, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with example.token_scores(model) as layers:
            logits = model(ids, attention_mask=mask).logits
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert torch.equal(logits[0], expected[0]) and torch.equal(logits[1, PADDING:], expected[1, PADDING:])
    assert len(layers) == 2 * len(weights)  # of both prompts, and of no decode step

    real = mask.bool()
    probes = ops.probe_index(torch.empty(2, 4, TOKENS, 16), token_mask=real)
    for found, attention in zip(layers, weights, strict=False):
        for row in range(2):
            rows = probes[row][probes[row] >= 0].long()
            summed = attention[row].mean(0)[rows].sum(0)
            visible = (rows[:, None] >= torch.arange(TOKENS)).sum(0).clamp(min=1)
            torch.testing.assert_close(found.accumulated[row], summed, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.normalized[row], summed / visible, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.accumulated[1, :PADDING], torch.zeros(PADDING))


def test_it_reads_a_page(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    folder = EXAMPLE.parents[1] / "models" / "tiny-llava-next"
    example.main(str(folder), str(folder / "pages" / "demo.png"), "EC")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7 and all("of 2,613 tokens hold 0.9 of the attention" in line for line in said[:6])
