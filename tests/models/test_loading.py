"""Models loaded with the implementation, in other dtypes, under autocast and inference mode, copied and saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import zipvl
import zipvl.transformers
from tests.models.tiny_models import MULTIMODAL, PAPER, make_llama, text_inputs


@pytest.mark.parametrize("given", ["zipvl", {"text_config": "zipvl", "vision_config": "eager"}])
def test_from_pretrained(given: Any, tmp_path: Path) -> None:
    family = MULTIMODAL["llava_next"]
    family.make().save_pretrained(tmp_path)
    inputs = family.inputs(300, 1)
    dense = tf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=given).eval()
    assert model.config.get_text_config()._attn_implementation == "zipvl"
    cache = zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(tau=1.0))
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(output, dense.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert [layer.packed is not None for layer in cache.layers] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_tau_1_is_close_to_sdpa(dtype: torch.dtype) -> None:
    model, inputs = make_llama().to(dtype), text_inputs(300)
    exact = make_llama()(**inputs).logits
    error = (model(**inputs).logits.float() - exact).abs().mean()
    with zipvl.sparse(model, PAPER, tau=1.0) as stats:
        output = model(**inputs)
        model(torch.tensor([[5]]), past_key_values=output.past_key_values)
    assert stats.active
    assert output.past_key_values.layers[0].packed.keys.dtype == dtype
    assert (output.logits.float() - exact).abs().mean() < 2 * error + 1e-3


def test_inference_mode() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, tau=0.7):
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with torch.inference_mode():
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


@pytest.mark.parametrize("cache", ["drop", "full", "quantize"])
def test_a_prefix_of_inference_mode_is_continued_without(cache: Any) -> None:
    model, inputs = make_llama(head_dim=32), text_inputs(300)
    more = torch.cat([inputs["input_ids"], text_inputs(6, 1)["input_ids"]], dim=1)
    with zipvl.sparse(model, PAPER, tau=0.7, cache=cache):
        found = []
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                past = model(**inputs).past_key_values
            output = model.generate(more, past_key_values=past, max_new_tokens=4, do_sample=False)
            past.crop(-2)
            past.reorder_cache(torch.tensor([0]))
            found.append(torch.cat([output, model.generate(output, past_key_values=past, max_new_tokens=3)], dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize("cache", ["drop", "full", "quantize"])
@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_autocast(cache: Any, tau: float) -> None:
    """Rotary embeddings make queries and keys float32 again, and values stay bfloat16: SDPA casts them alike."""
    model, inputs = make_llama(head_dim=32), text_inputs(300)
    exact = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(**inputs).logits
    with zipvl.sparse(model, PAPER, tau=tau, cache=cache) as stats:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            logits = model(**inputs).logits
            turn = torch.cat([output.sequences, text_inputs(5, 2)["input_ids"]], dim=1)
            model.generate(turn, past_key_values=output.past_key_values, max_new_tokens=3)
        step = model(torch.tensor([[5]]), past_key_values=output.past_key_values)  # autocast has ended
    assert [layer.mode for layer in stats.layers.values()] == ["sparse"] * 3
    assert step.logits.dtype == torch.float32 and bool(step.logits.isfinite().all())
    if tau == 1.0:
        assert (logits - exact).abs().mean() < 1.5 * (dense - exact).abs().mean()


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "pickle, as spawned workers": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_configured_model_are_configured(how: str) -> None:
    model, inputs = make_llama(), text_inputs(300)
    plain = copy.deepcopy(model)
    stats = zipvl.configure(model, zipvl.ZipVLConfig.paper(ratio=0.1))
    twin = COPIES[how](model)
    expected, prefills = model(**inputs), stats.prefills
    found = twin(**inputs)
    assert stats.prefills == prefills == 1, "the copy has statistics of its own"
    assert torch.equal(found.logits, expected.logits)
    assert [layer.packed.lengths.tolist() for layer in found.past_key_values.layers] == [[30]] * 3
    twin_attention = twin.model.layers[0].self_attn
    assert twin_attention.forward.owner is twin_attention
    zipvl.configure(twin, None)
    assert torch.equal(twin(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model(**inputs).logits, expected.logits), "the original is still configured"


def test_statistics_are_pickled_and_copied_with_the_bytes_of_the_moment() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, ratio=0.5) as stats:
        cache = model(**inputs).past_key_values
        copies = [pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)]
        before = stats.to_dict()
        model(torch.tensor([[5]]), past_key_values=cache)
        assert stats.full_cache_bytes > before["full_cache_bytes"]
    for other in copies:
        assert other.to_dict() == before
        assert other.summary() != stats.summary()
        other.reset()
    now = stats.to_dict()
    del cache
    assert stats.to_dict() == now, "of a cache that is gone the last bytes stay"
