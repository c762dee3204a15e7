"""zipvl.sparse: applies, undoes, nests, and stays with its model."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zipvl
from tests.models.tiny_models import (
    MULTIMODAL,
    PAPER,
    SPARSE,
    build,
    make_gemma3,
    make_llama,
    make_qwen3_vl,
    qwen_inputs,
    text_inputs,
)
from zipvl.transformers import configure


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything the context could leave behind."""
    found: dict[str, Any] = {
        "functions": sorted(ALL_ATTENTION_FUNCTIONS),
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules", "rope_deltas"):  # the last is the model's own memory
                continue
            if isinstance(value, dict):
                found[f"{name}.{key}"] = list(value)
            elif hasattr(value, "to_dict"):
                found[f"{name}.{key}"] = (id(value), copy.deepcopy(value.__dict__), value.to_dict())
            else:
                found[f"{name}.{key}"] = id(value)
    return found


@pytest.mark.parametrize("name", [*SPARSE, "gemma3"])
def test_leaves_no_trace(name: str) -> None:
    model = make_gemma3() if name == "gemma3" else SPARSE[name].make()
    inputs = text_inputs(300) if name == "gemma3" else SPARSE[name].inputs(300, 1)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = trace(model)
    with zipvl.sparse(model, PAPER, tau=0.7):
        assert trace(model) != before
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert trace(model) == before
    with pytest.raises(ZeroDivisionError), zipvl.sparse(model, PAPER, tau=0.7):
        model(**inputs)
        raise ZeroDivisionError
    assert trace(model) == before
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)


def test_an_error_on_entry_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    before = trace(model)
    with pytest.raises(ValueError, match=r"names \[7\].*\[0, 1, 2\]"), zipvl.sparse(model, PAPER, layers=(1, 7)):
        pass
    with pytest.raises(ValueError, match="tau must be in"), zipvl.sparse(model, PAPER, tau=2.0):
        pass
    assert trace(model) == before

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("hook")

    monkeypatch.setattr(model.model, "register_forward_hook", fail)
    before = trace(model)
    with pytest.raises(KeyError), zipvl.sparse(model, PAPER):
        pass
    assert trace(model) == before


@pytest.mark.parametrize("name", MULTIMODAL)
def test_vision_towers_keep_their_attention(name: str) -> None:
    model = MULTIMODAL[name].make()
    with zipvl.sparse(model, PAPER):
        assert model.config.get_text_config()._attn_implementation.startswith("zipvl")
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["eager", "zipvl"])
def test_goes_back_to_what_was_set(implementation: str) -> None:
    model, inputs = make_llama(), text_inputs(300)
    model.set_attn_implementation(implementation)
    expected = model(**inputs).logits
    with zipvl.sparse(model, PAPER, tau=0.5) as stats:
        model(**inputs)
    assert stats.active
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**inputs).logits, expected)


def test_blocks_nest() -> None:
    model, inputs = make_llama(), text_inputs(300)
    before = trace(model)
    with zipvl.sparse(model, PAPER, ratio=0.5) as outer:
        outside = trace(model)
        with zipvl.sparse(model, PAPER, ratio=0.25, cache="full") as inner:
            output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
            assert output.past_key_values.config.cache == "full"
            assert model(**inputs).past_key_values.config.cache == "full"
        assert outer.prefills == 0
        assert inner.layers[0].kept == [75]
        assert trace(model) == outside
        assert model(**inputs).past_key_values.layers[0].packed.lengths.tolist() == [150]
        assert (outer.prefills, inner.prefills) == (1, 2)
    assert trace(model) == before


def test_two_models_do_not_meet() -> None:
    first, second, inputs = make_llama(), make_llama(), text_inputs(300)
    with zipvl.sparse(first, PAPER, ratio=0.5) as one, zipvl.sparse(second, PAPER, ratio=0.25) as two:
        first(**inputs)
        second(**inputs)
    assert one.layers[0].kept == [150]
    assert two.layers[0].kept == [75]


def test_a_model_that_shares_the_configuration_object_is_left_alone() -> None:
    first = make_llama()
    second = build(LlamaForCausalLM, first.config, seed=1)
    assert second.config is first.config
    inputs = text_inputs(300)
    padded = dict(inputs, attention_mask=inputs["attention_mask"].clone())
    padded["attention_mask"][:, :20] = 0
    for given in (inputs, padded):
        expected = second(**given).logits
        with zipvl.sparse(first, PAPER, tau=0.5):
            assert torch.equal(second(**given).logits, expected)


def test_two_threads_with_a_model_each() -> None:
    models, inputs = [make_llama(), make_llama()], text_inputs(400)
    found: dict[float, list[int]] = {}
    barrier = threading.Barrier(2)

    def work(model: Any, ratio: float) -> None:
        with torch.no_grad(), zipvl.sparse(model, PAPER, ratio=ratio) as stats:
            barrier.wait()
            for _ in range(5):
                model.generate(**inputs, max_new_tokens=3)
            barrier.wait()
        found[ratio] = [*stats.layers[0].kept, stats.prefills]

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, (0.5, 0.25), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0.5: [200, 5], 0.25: [100, 5]}


def test_two_threads_with_one_model() -> None:
    model = make_llama()
    prompts = [text_inputs(300, 1), text_inputs(400, 2)]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[i] = model.generate(**prompts[i], max_new_tokens=4, do_sample=False)

    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stats.prefills == 10
        for i, prompt in enumerate(prompts):
            assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), found[i])


def test_nothing_keeps_a_model_or_a_cache_alive() -> None:
    model, inputs = make_llama(), text_inputs(300)
    configure(model, zipvl.ZipVLConfig.paper(tau=0.5))
    with zipvl.sparse(model, PAPER) as stats:
        cache = model(**inputs).past_key_values
    gone = [weakref.ref(model), weakref.ref(cache), weakref.ref(cache.layers[0])]
    assert stats.cache_bytes > 0
    del model, cache
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# Caches that the caller brings


def test_an_empty_dynamic_cache_of_the_caller_is_used_in_place() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, tau=0.7):
        own = zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(tau=0.7))
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            own.reset()
            for step in (inputs, {"input_ids": torch.tensor([[5]])}, {"input_ids": torch.tensor([[7]])}):
                logits = model(**step, past_key_values=cache).logits
                assert torch.equal(logits, model(**step, past_key_values=own).logits)
            assert cache.get_seq_length() == 302
            assert cache.layers[0].packed.longest < 300
        cache = DynamicCache()
        model.generate(**inputs, max_new_tokens=3, past_key_values=cache)
        assert cache.layers[0].packed is not None


def test_caches_that_cannot_work_are_errors() -> None:
    model, inputs = make_llama(), text_inputs(300)
    filled = model(**inputs).past_key_values
    with zipvl.sparse(model, PAPER):
        with pytest.raises(ValueError, match="already holds 300 tokens; pass a new"):
            model(torch.tensor([[5]]), past_key_values=filled)
        with pytest.raises(ValueError, match="already holds 300 tokens"):
            model.model(torch.tensor([[5]]), None, None, filled)
        with pytest.raises(ValueError, match="a StaticCache cannot hold"):
            model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=400))
        with pytest.raises(ValueError, match="a StaticCache cannot hold"):
            model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
        with pytest.raises(ValueError, match="offloaded"):
            model(**inputs, past_key_values=DynamicCache(offloading=True))
    assert not issubclass(QuantizedCache, DynamicCache)


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_plain_forwards_get_a_cache_when_the_model_would_make_one(use_cache: bool | None) -> None:
    model, inputs = make_qwen3_vl(), qwen_inputs(300)
    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        output = model(**inputs, use_cache=use_cache)
    assert stats.active
    if use_cache is False:
        assert output.past_key_values is None
        assert stats.layers[0].cache_bytes is None
    else:
        assert isinstance(output.past_key_values, zipvl.ZipVLCache)
    with zipvl.sparse(model, PAPER, tau=0.7) as stats:
        model.generate(**inputs, max_new_tokens=2, use_cache=False)
    assert stats.prefills == 2


def test_a_wrapped_model_is_found() -> None:
    model, inputs = make_llama(), text_inputs(300)
    wrapper = nn.ModuleDict({"inner": model})
    with zipvl.sparse(wrapper, PAPER, tau=0.7) as stats:
        model.generate(**inputs, max_new_tokens=2)
    assert stats.active


def test_only_the_named_layers_are_sparse() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, ratio=0.5, layers=(1,)) as stats:
        output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    assert [stats.layers[i].mode for i in range(3)] == ["dense", "sparse", "dense"]
    assert stats.layers[0].reason == "not among ZipVLConfig.layers"
    assert [layer.packed is None for layer in output.past_key_values.layers] == [True, False, True]
