"""The same pages through the transformers integration: what the plugin's tokens are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.serving.tiny import MODEL, NAMES, TEXT, page


@torch.inference_mode()
def tokens_and_kept(options: dict[str, Any], tokens: int = 12, names: tuple[str, ...] = NAMES) -> list[Any]:
    """Of each page the tokens past the end of the answer too, and how many tokens each layer kept of the prompt."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import zipvl

    processor = AutoProcessor.from_pretrained(MODEL, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    config = zipvl.ZipVLConfig(**options, keep_text=False, text_prompts="sparse")
    found = []
    for name in names:
        image, label, _ = page(name)
        message = {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": label}],
        }
        inputs = processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with zipvl.sparse(model, config) as stats:
            made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        kept = [int(layer.counts[0]) for layer in stats.layers.values()]
        found.append((made[0, inputs["input_ids"].shape[1] :].tolist(), kept))
    return found


@torch.inference_mode()
def text_tokens_and_kept(folder: Path, options: dict[str, Any], tokens: int = 12, **how: Any) -> Any:
    """The same of ``TEXT`` through a text model. ``how``: further keywords of ``generate()``."""
    from transformers import AutoModelForCausalLM

    import zipvl

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([TEXT])
    with zipvl.sparse(model, zipvl.ZipVLConfig(**options, text_prompts="sparse")) as stats:
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **how)
    return made[0, len(TEXT) :].tolist(), [int(layer.counts[0]) for layer in stats.layers.values()]
