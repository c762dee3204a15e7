"""Heads spread over two processes (transformers' tensor parallelism, on CPUs): both select what one process selects.
On GPUs: tests/kernels/test_multi_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from tests.models.tensor_parallel import CONFIGS, NEW_TOKENS, RANKS, alone, spread
from tests.models.tiny_models import TEXT, build, ids

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build(tf.LlamaForCausalLM, tf.LlamaConfig(**TEXT | {"head_dim": 32}))


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return ids(400, 1)


@pytest.fixture(scope="module")
def found(model: Any, prompt: Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    return spread(model, prompt, tmp_path_factory.mktemp("tensor_parallel"), CUDA_VISIBLE_DEVICES="")


def test_the_model_is_spread(model: Any, found: list[dict[str, Any]]) -> None:
    rows = model.model.layers[0].self_attn.q_proj.weight.shape[0]
    assert [rank["query_rows"] for rank in found] == [rows // RANKS] * RANKS


def test_everything_kept_is_the_model_in_one_process(model: Any, prompt: Tensor, found: list[dict[str, Any]]) -> None:
    with torch.inference_mode():
        logits = model(prompt, logits_to_keep=1).logits[0, -1]
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    for rank in found:
        torch.testing.assert_close(torch.tensor(rank["tau 1"]["logits"]), logits, rtol=1e-3, atol=1e-4)
        assert rank["tau 1"]["tokens"] == tokens.tolist()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tau 1"])
def test_ranks_select_the_tokens_of_one_process(
    name: str, model: Any, prompt: Tensor, found: list[dict[str, Any]]
) -> None:
    """Exactly, as long as no score stands so close to the cut that the order of a sum matters."""
    first, second = (rank[name] for rank in found)
    assert first["selected"] == second["selected"] and first["tokens"] == second["tokens"]
    torch.testing.assert_close(torch.tensor(first["logits"]), torch.tensor(second["logits"]), rtol=1e-5, atol=1e-6)
    logits, selected = alone(model, prompt, CONFIGS[name])
    assert first["selected"] == selected
    assert all(0.05 < len(tokens) / prompt.shape[1] < 0.95 for tokens in selected)
    torch.testing.assert_close(torch.tensor(first["logits"]), logits, rtol=1e-3, atol=1e-4)
