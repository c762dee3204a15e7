"""A model whose heads are spread over processes (transformers' tensor parallelism), and what it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from zipvl import ops

RANKS = 2
CONFIGS: dict[str, dict[str, Any]] = {
    "tau 1": {"tau": 1.0},
    "ratio": {"ratio": 0.5},
    "tau": {"tau": 0.8},
    "quantize": {"tau": 0.8, "cache": "quantize"},
}
NEW_TOKENS = 6
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def spread(model: Any, prompt: Tensor, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """What each rank finds with ``model`` and ``prompt [1, N]`` under each of ``CONFIGS``.

    Args:
        folder: for the model, the prompt and what is found.
        environment: further variables of the ranks.
    """
    model.save_pretrained(folder / "model")
    torch.save(prompt.cpu(), folder / "ids.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    arguments = [str(WORKER), str(folder / "model"), str(folder / "ids.pt"), str(folder / "found")]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([*launch, *arguments], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"found.{rank}.json").read_text()) for rank in range(RANKS)]


def in_groups(model: Any, prompt: Tensor, config: dict[str, Any]) -> Tensor:
    """The last token's logits where the heads select in as many groups as there are ranks, in one process."""

    def by_groups(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        parts = zip(*(x.chunk(RANKS, dim=1) for x in (q, k, v)), strict=True)
        outputs = [ops.zipvl_attn(*part, scale=scaling, **config)[0] for part in parts]
        return torch.cat(outputs, dim=1).transpose(1, 2), None

    tf.AttentionInterface.register("zipvl_test_groups", by_groups)
    model.set_attn_implementation("zipvl_test_groups")
    try:
        with torch.inference_mode():
            return model(prompt, logits_to_keep=1, use_cache=False).logits[0, -1]
    finally:
        model.set_attn_implementation("sdpa")
