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
    """Loaded in 8 or 4 bits; the products in 4 bits want sizes that are multiples of 64 on some CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        make_llama(intermediate_size=128).save_pretrained(folder)
        config = tf.BitsAndBytesConfig(**options)
        return tf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


KINDS = {
    "peft": adapted,
    "torchao weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes 8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}
ROUNDING = ("torchao activations", "bitsandbytes 8")
"""Kinds whose products round the activations that they are given."""


def noise_of(kind: str, model: Any, inputs: dict[str, torch.Tensor], dense: torch.Tensor) -> float:
    """How far logits of other dense attention are from ``dense``.

    Where activations are rounded, the last bit of one decides between two values, on some CPUs and not on others.
    Inputs that differ by a tenth of such a step tell what that does.
    """
    model.set_attn_implementation("eager")
    others = [model(**inputs).logits]
    model.set_attn_implementation("sdpa")
    if kind in ROUNDING:
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        for seed in range(3):
            changed = embedded * (1 + 1e-3 * torch.randn(embedded.shape, generator=torch.Generator().manual_seed(seed)))
            others.append(model(inputs_embeds=changed).logits)
    return max(float((other - dense).abs().max()) for other in others)


@torch.no_grad()
def answer(kind: str) -> None:
    """Prints what each setting gives at tau 1 and at tau 0.7, beside dense."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, inputs = KINDS[kind]().eval(), text_inputs(300)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    dense, tokens = model(**inputs).logits, model.generate(**inputs, **how)
    noise = noise_of(kind, model, inputs, dense)
    for setting in SETTINGS:
        config = zipvl.ZipVLConfig.paper(dense_below=256, **setting)
        with zipvl.sparse(model, config.replace(tau=1.0)) as stats:
            whole, generated = model(**inputs).logits, model.generate(**inputs, **how)
        with zipvl.sparse(model, config.replace(tau=0.7)) as fewer:
            kept = model(**inputs).logits
        found = {
            "kind": kind,
            "setting": setting,
            "noise": noise,
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
