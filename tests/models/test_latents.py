"""Multi-head latent attention: sparse prefills beside a full cache of latents, which stays transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

import zipvl
from tests.models.oracle import chunk_masks, masked
from tests.models.tiny_models import PAPER, TEXT, build, ids, make_deepseek_v3, pad_left, text_inputs
from zipvl import support
from zipvl.lmms_eval.meter import full_cache_bytes
from zipvl.transformers import cache_names, latents
from zipvl.transformers.latents import in_one_head_dim

NEW = 5
GENERATE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
LOGITS: dict[str, Any] = GENERATE | {"return_dict_in_generate": True, "output_logits": True}
TOLERANCE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}
FULL = PAPER.replace(cache="full")
WINDOW = FULL.replace(local_window=32, num_sinks=4)


def make_mistral4() -> Any:
    text = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    return build(tf.Mistral4ForCausalLM, tf.Mistral4Config(**text, **sizes, first_k_dense_replace=3))


def is_sparse(stats: zipvl.Stats) -> bool:
    return [layer.mode for layer in stats.layers.values()] == ["sparse"] * 3


@pytest.mark.parametrize("make", [make_deepseek_v3, make_mistral4])
@pytest.mark.parametrize("config", [FULL, WINDOW], ids=["paper", "window"])
def test_tau_1_is_sdpa(make: Any, config: zipvl.ZipVLConfig) -> None:
    model = make()
    for given in (text_inputs(300), pad_left([text_inputs(300, 1), text_inputs(250, 2)])):
        real = given["attention_mask"].bool()
        logits, tokens = model(**given).logits, model.generate(**given, **GENERATE)
        with zipvl.sparse(model, config, tau=1.0, dense_below=0) as stats:
            for use_cache in (True, False):
                found = model(**given, use_cache=use_cache).logits
                torch.testing.assert_close(found[real], logits[real], **TOLERANCE)
            assert torch.equal(model.generate(**given, **GENERATE), tokens)
        assert is_sparse(stats)


@pytest.mark.parametrize("make", [make_deepseek_v3, make_mistral4])
@pytest.mark.parametrize("config", [FULL, WINDOW, FULL.replace(all_queries=True)], ids=["paper", "window", "all"])
def test_sparse_is_what_the_masks_say(make: Any, config: zipvl.ZipVLConfig) -> None:
    model, masks = make(), {}
    with zipvl.sparse(model, config, tau=0.8, record_index=True) as stats:
        output = model.generate(**text_inputs(300, 3), **LOGITS)
    given: dict[str, Any] = {"window": config.local_window, "sinks": config.sinks, "all_queries": config.all_queries}
    for i, layer in stats.layers.items():
        assert layer.index is not None and len(layer.index[0]) < 250
        masks[i] = chunk_masks(300 + NEW, [(300, layer.index[0])], **given)
    with masked(model, masks):
        expected = model(output.sequences, use_cache=False).logits
    torch.testing.assert_close(torch.stack(output.logits, 1)[0], expected[0, 299:-1], **TOLERANCE)


@pytest.mark.parametrize("more", [5, 200])
def test_a_second_turn_on_a_cache_of_either_kind(more: int) -> None:
    model, step = make_deepseek_v3(), ids(more, 5)
    name = cache_names.name_for(type(model).forward)

    def turns(cache: Any) -> torch.Tensor:
        model(ids(300, 1), **{name: cache})
        logits: torch.Tensor = model(step, **{name: cache}).logits
        return logits

    expected = turns(DynamicCache(config=model.config))
    with zipvl.sparse(model, FULL, tau=1.0, dense_below=0) as stats:
        caches = DynamicCache(config=model.config), zipvl.ZipVLCache(model.config, FULL.replace(tau=1.0, dense_below=0))
        for cache in caches:
            torch.testing.assert_close(turns(cache), expected, **TOLERANCE)
            assert isinstance(cache, zipvl.ZipVLCache) and is_sparse(stats)
            held = (300 + more) * (model.config.kv_lora_rank + model.config.qk_rope_head_dim) * 4 * 3
            assert full_cache_bytes(model.config, 1, 300 + more, 4) == held <= cache.cache_bytes


def test_one_head_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one that has a kernel; on a CPU the keys'."""
    q, k, v = torch.randn(1, 4, 3, 24), torch.randn(1, 4, 7, 24), torch.randn(1, 4, 7, 16)
    queries, keys, values = in_one_head_dim(q, k, v)
    assert torch.equal(queries, q) and torch.equal(keys, k)
    assert values.shape == k.shape and torch.equal(values[..., :16], v) and not values[..., 16:].any()
    monkeypatch.setattr(support, "why_not", lambda op, device, dtype, dim: None if dim in (64, 256) else "no kernel")
    found = [latents._remembered.__wrapped__(dim, "cuda", torch.bfloat16) for dim in (24, 64, 192, 600)]
    assert found == [64, 64, 256, 600]
