"""The same pages through the transformers integration: what the plugin's tokens are compared with."""

from __future__ import annotations

from typing import Any

import torch

from tests.serving.tiny import MODEL, PAGES, page


@torch.inference_mode()
def tokens_and_kept(options: dict[str, Any], tokens: int = 12, names: tuple[str, ...] = PAGES, **how: Any) -> list[Any]:
    """Of each page the tokens past the end of the answer too, and how many tokens each layer kept of the prompt.
    ``how``: further keywords of ``generate()``."""
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
            made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **how)
        kept = [int(layer.counts[0]) for layer in stats.layers.values()]
        found.append((made[0, inputs["input_ids"].shape[1] :].tolist(), kept))
    return found
