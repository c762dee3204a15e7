"""Models loaded with the implementation, in other dtypes, and under inference mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import zipvl
from tests.models.tiny_models import MULTIMODAL, make_llama, text_inputs


@pytest.mark.parametrize("given", ["zipvl", {"text_config": "zipvl", "vision_config": "eager"}])
def test_from_pretrained(given: Any, tmp_path: Path) -> None:
    family = MULTIMODAL["llava_next"]
    family.make().save_pretrained(tmp_path)
    inputs = family.inputs(300, 1)
    dense = tf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=given).eval()
    assert model.config.get_text_config()._attn_implementation == "zipvl"
    cache = zipvl.ZipVLCache(model, zipvl.ZipVLConfig(tau=1.0))
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(output, dense.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert [layer.packed is not None for layer in cache.layers] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_tau_1_is_close_to_sdpa(dtype: torch.dtype) -> None:
    model, inputs = make_llama().to(dtype), text_inputs(300)
    exact = make_llama()(**inputs).logits
    error = (model(**inputs).logits.float() - exact).abs().mean()
    with zipvl.sparse(model, tau=1.0) as stats:
        output = model(**inputs)
        model(torch.tensor([[5]]), past_key_values=output.past_key_values)
    assert stats.active
    assert output.past_key_values.layers[0].packed.keys.dtype == dtype
    assert (output.logits.float() - exact).abs().mean() < 2 * error + 1e-3


def test_inference_mode() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, tau=0.7):
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with torch.inference_mode():
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
