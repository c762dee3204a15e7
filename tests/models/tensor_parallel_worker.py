"""A rank of tensor_parallel.py, started by torchrun: writes what it finds to OUTPUT.RANK.json."""

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
from tests.models.tensor_parallel import CONFIGS, NEW_TOKENS, selected


def main(folder: str, inputs: str, output: str) -> None:
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        spread: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan="auto")}
    else:
        spread = {"tp_plan": "auto"}
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **spread).eval()
    ids = torch.load(inputs).to(model.device)
    weight = model.model.layers[0].self_attn.q_proj.weight  # a DTensor, or in earlier versions this rank's rows
    found: dict[str, Any] = {
        "device": str(ids.device),
        "query_rows": getattr(weight, "to_local", lambda: weight)().shape[0],
    }
    for name, config in CONFIGS.items():
        with zipvl.sparse(model, zipvl.ZipVLConfig.paper(dense_below=0, **config), record_index=True) as stats:
            with torch.inference_mode():
                logits = model(ids, logits_to_keep=1).logits[0, -1]
            found[name] = {"selected": selected(stats), "logits": logits.tolist()}
            tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        found[name]["tokens"] = tokens.tolist()
    Path(f"{output}.{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
