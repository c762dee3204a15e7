"""A model whose heads are spread over processes (transformers' tensor parallelism), and what it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zipvl

RANKS = 2
CONFIGS: dict[str, dict[str, Any]] = {
    "tau 1": {"tau": 1.0},
    "ratio": {"ratio": 0.5},
    "tau": {"tau": 0.8},
    "quantize": {"tau": 0.8, "cache": "quantize"},
    "cache_ratio": {"tau": 0.8, "local_window": 16, "num_sinks": 2, "cache_ratio": 0.3},
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


def selected(stats: zipvl.Stats) -> list[list[int]]:
    """The tokens of a single row that each layer selected, and then those that its cache took, if that has a budget."""
    layers = stats.layers.values()
    return [x[0].tolist() for layer in layers for x in (layer.index, layer.stored_index) if x is not None]


def alone(model: Any, prompt: Tensor, config: dict[str, Any]) -> tuple[Tensor, list[list[int]]]:
    """In one process: the last token's logits, and what the layers selected."""
    config = zipvl.ZipVLConfig.paper(dense_below=0, **config)
    with zipvl.sparse(model, config, record_index=True) as stats, torch.inference_mode():
        logits = model(prompt, logits_to_keep=1).logits[0, -1]
    return logits, selected(stats)
