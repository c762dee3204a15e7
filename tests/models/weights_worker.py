"""Models with LoRA adapters or quantised weights, dense and sparse: a line of JSON for each kind and setting.

``python -m tests.models.weights_worker KIND...`` runs in a process of its own, because transformers imports what it
finds of peft, torchao and bitsandbytes. A kind that fails leaves its traceback and fewer lines.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from typing import Any

import torch
import transformers as tf

import zipvl
from tests.models.tiny_models import make_llama, text_inputs

SETTINGS: tuple[dict[str, Any], ...] = ({}, {"skip_projections": True}, {"skip_mlp_layers": (1,)}, {"cache": "full"})


def adapted() -> Any:
    """LoRA adapters on the projections and one product of the MLP, with weights that are not zero."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    return get_peft_model(make_llama(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def torchao(config: str) -> Any:
    """Weights quantised in place."""
    from torchao import quantization

    model = make_llama()
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def bitsandbytes(**options: Any) -> Any:
    """Loaded in 8 or 4 bits."""
    with tempfile.TemporaryDirectory() as folder:
        make_llama().save_pretrained(folder)
        config = tf.BitsAndBytesConfig(**options)
        return tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


KINDS = {
    "peft": adapted,
    "torchao weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes 8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}


@torch.no_grad()
def answer(kind: str) -> None:
    """Prints what each setting gives at tau 1 and at tau 0.7, beside dense."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, inputs = KINDS[kind]().eval(), text_inputs(300)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    dense, tokens = model(**inputs).logits, model.generate(**inputs, **how)
    model.set_attn_implementation("eager")
    noise = (model(**inputs).logits - dense).abs().max()  # of products that round what they are given
    model.set_attn_implementation("sdpa")
    for setting in SETTINGS:
        config = zipvl.ZipVLConfig.paper(dense_below=256, **setting)
        with zipvl.sparse(model, config.replace(tau=1.0)) as stats:
            whole, generated = model(**inputs).logits, model.generate(**inputs, **how)
        with zipvl.sparse(model, config.replace(tau=0.7)) as fewer:
            kept = model(**inputs).logits
        found = {
            "kind": kind,
            "setting": setting,
            "noise": float(noise),
            "error": float((whole - dense).abs().max()),
            "same_tokens": torch.equal(generated, tokens),
            "active": stats.active and fewer.active,
            "ratio": fewer.mean_ratio,
            "changed": float((kept - dense).abs().max()),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            answer(name)
        except Exception:
            traceback.print_exc()
