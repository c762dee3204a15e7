"""A decode step behind a ``ZipVLCache`` as one graph: ``torch.compile(model, fullgraph=True)``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers as tf

import zipvl
from tests.models.tiny_models import PAPER, TEXT, build, pad_left, text_inputs

pytestmark = pytest.mark.slow
SMALL = {"num_hidden_layers": 2, "head_dim": 32}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: Any, step: Any, inputs: dict[str, torch.Tensor], masked: bool, count: int) -> torch.Tensor:
    """Logits of ``count`` greedy steps behind a prompt, by ``step``."""
    output = model(**inputs)
    cache, mask, logits = output.past_key_values, inputs["attention_mask"], []
    for _ in range(count):
        token = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = step(token, past_key_values=cache, **({"attention_mask": mask} if masked else {}))
        logits.append(output.logits)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + count
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("cache", "backend", "count", "graphs"),
    [("drop", "aot_eager", 80, 4), ("full", "eager", 20, 3), ("quantize", "eager", 104, 5)],
)
def test_a_compiled_step_is_the_step(cache: str, backend: str, count: int, graphs: int) -> None:
    model, inputs = build(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT | SMALL)), text_inputs(300, 3)
    made = []

    def counting(graph: Any, example: Any) -> Any:
        made.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    with zipvl.sparse(model, PAPER, tau=0.7, cache=cache, num_sinks=4):
        expected = steps(model, model, inputs, False, count)
        found = steps(model, torch.compile(model, fullgraph=True, backend=counting), inputs, False, count)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(made) <= graphs, "one a step would be as slow as none"


def test_a_compiled_step_of_a_padded_batch() -> None:
    model = build(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT | SMALL))
    inputs = pad_left([text_inputs(330, 1), text_inputs(280, 2)])
    with zipvl.sparse(model, PAPER, tau=0.7):
        expected = steps(model, model, inputs, True, 6)
        found = steps(model, torch.compile(model, fullgraph=True, backend="eager"), inputs, True, 6)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
