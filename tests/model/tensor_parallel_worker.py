"""A process of test_tensor_parallel.py, started by torchrun: writes what its rank finds to OUTPUT.RANK.json."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.distributed import DistributedConfig

import zipvl

CONFIGS: dict[str, dict[str, Any]] = {
    "tau 1": {"tau": 1.0},
    "ratio": {"ratio": 0.5},
    "tau": {"tau": 0.8},
    "quantize": {"tau": 0.8, "cache": "quantize"},
}


def main(folder: str, inputs: str, output: str) -> None:
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        spread: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")}
    else:
        spread = {"tp_plan": "auto"}
    model = tf.AutoModelForCausalLM.from_pretrained(folder, **spread).eval()
    ids = torch.load(inputs)
    weight = model.model.layers[0].self_attn.q_proj.weight  # a DTensor, or in earlier versions this rank's rows
    found: dict[str, Any] = {"query_rows": getattr(weight, "to_local", lambda: weight)().shape[0]}
    for name, config in CONFIGS.items():
        with zipvl.sparse(model, zipvl.ZipVLConfig(dense_below=0, **config)) as stats:
            with torch.inference_mode():
                logits = model(ids, logits_to_keep=1).logits[0, -1]
            ratios = [layer.ratio for layer in stats.layers.values()]
            tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        found[name] = {"logits": logits.tolist(), "ratios": ratios, "tokens": tokens.tolist()}
    Path(f"{output}.{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
