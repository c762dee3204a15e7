"""Heads spread over two processes (transformers' tensor parallelism, on CPUs): each selects with the heads it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensor_parallel_worker as worker
import torch
import transformers as tf
from tiny_models import TEXT, build, ids
from torch import Tensor, nn

from zipvl import ops

RANKS = 2
ROOT = Path(__file__).resolve().parents[2]


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
    folder = tmp_path_factory.mktemp("tensor_parallel")
    model.save_pretrained(folder / "model")
    torch.save(prompt, folder / "ids.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    arguments = [worker.__file__, str(folder / "model"), str(folder / "ids.pt"), str(folder / "found")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"found.{rank}.json").read_text()) for rank in range(RANKS)]


def test_the_model_is_spread(model: Any, found: list[dict[str, Any]]) -> None:
    rows = model.model.layers[0].self_attn.q_proj.weight.shape[0]
    assert [rank["query_rows"] for rank in found] == [rows // RANKS] * RANKS


def test_everything_kept_is_the_model_in_one_process(model: Any, prompt: Tensor, found: list[dict[str, Any]]) -> None:
    with torch.inference_mode():
        logits = model(prompt, logits_to_keep=1).logits[0, -1]
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    for rank in found:
        torch.testing.assert_close(torch.tensor(rank["tau 1"]["logits"]), logits, rtol=1e-3, atol=1e-4)
        assert rank["tau 1"]["tokens"] == tokens.tolist()


@pytest.mark.parametrize("name", ["ratio", "tau", "quantize"])
def test_ranks_agree_on_the_answer(name: str, found: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in found)
    assert first["tokens"] == second["tokens"]
    torch.testing.assert_close(torch.tensor(first["logits"]), torch.tensor(second["logits"]), rtol=1e-5, atol=1e-6)
    for rank in (first, second):
        assert len(rank["ratios"]) == 3 and all(0.05 < ratio < 0.95 for ratio in rank["ratios"])


@pytest.mark.parametrize("name", ["ratio", "tau"])
def test_each_rank_selects_with_its_own_heads(
    name: str, model: Any, prompt: Tensor, found: list[dict[str, Any]]
) -> None:
    config = worker.CONFIGS[name]

    def by_halves(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        parts = zip(*(x.chunk(RANKS, dim=1) for x in (q, k, v)), strict=True)
        outputs = [ops.zipvl_attn(*part, scale=scaling, **config)[0] for part in parts]
        return torch.cat(outputs, dim=1).transpose(1, 2), None

    tf.AttentionInterface.register("zipvl_test_halves", by_halves)
    model.set_attn_implementation("zipvl_test_halves")
    try:
        with torch.inference_mode():
            expected = model(prompt, logits_to_keep=1, use_cache=False).logits[0, -1]
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.tensor(found[0][name]["logits"]), expected, rtol=1e-3, atol=1e-4)
