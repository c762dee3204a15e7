"""Unsupported use is a clear error, never a silent dense run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zipvl
import zipvl.transformers
from tests.models.tiny_models import (
    PAPER,
    TEXT,
    build,
    make_deepseek_v3,
    make_gemma3,
    make_llama,
    make_llava_next,
    text_inputs,
)
from zipvl.transformers.target import check_model


def test_dropout() -> None:
    model = make_llama().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with (
        zipvl.sparse(model, PAPER),
        pytest.raises(ValueError, match=r"LlamaAttention, layer 0\): dropout=0.1 .*model.eval\(\)"),
    ):
        model(**text_inputs(300))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_of_a_model_inside_the_block(copied: Callable[[Any], Any]) -> None:
    model = make_llama()
    with zipvl.sparse(model, PAPER), pytest.raises(TypeError, match="cannot be copied or pickled inside the block"):
        copied(model)
    copied(model)


@pytest.mark.parametrize("tokens", [40, 300])
def test_output_attentions(tokens: int) -> None:
    model = make_llama()
    with zipvl.sparse(model, PAPER):
        with pytest.raises(ValueError, match="output_attentions"):
            model(**text_inputs(tokens), output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions"):
            model.generate(
                **text_inputs(tokens), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True
            )


def test_softcap() -> None:
    config, off = (
        tf.Gemma2Config(**TEXT, query_pre_attn_scalar=16, sliding_window=64, attn_logit_softcapping=softcap)
        for softcap in (50.0, None)
    )
    model = build(tf.Gemma2ForCausalLM, config, attention="eager")
    with pytest.raises(ValueError, match=r"Gemma2Attention, layer 0\): logit softcapping"), zipvl.sparse(model, PAPER):
        pass
    model = build(tf.Gemma2ForCausalLM, off, attention="eager")
    with zipvl.sparse(model, PAPER, dense_below=0) as stats:
        model(**text_inputs(300))
    assert stats.layers[1].mode == "sparse"


def test_continuous_batching() -> None:
    """transformers itself refuses what it has no paged form of; where it hands on the arguments of one, we do."""
    model = make_llama()
    before = model.config._attn_implementation
    with zipvl.sparse(model, PAPER):
        with pytest.raises(ValueError, match=r"zipvl\w*\W* is not supported"):
            model.generate_batch(
                inputs=[[1] * 300], generation_config=tf.GenerationConfig(max_new_tokens=2), progress_bar=False
            )
        for argument in ("block_table", "read_index"):
            with pytest.raises(ValueError, match=r"a paged cache \(continuous batching\) is not supported"):
                model(**text_inputs(300), **{argument: torch.zeros(1, 4, dtype=torch.int32)})
    assert model.config._attn_implementation == before


def test_attention_sinks() -> None:
    config = tf.GptOssConfig(
        **TEXT, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 3, sliding_window=64
    )
    model = build(tf.GptOssForCausalLM, config, attention="eager")
    with pytest.raises(ValueError, match=r"GptOssAttention, layer 0\): attention sinks"), zipvl.sparse(model, PAPER):
        pass
    model.set_attn_implementation("zipvl")  # nobody asked find()
    with pytest.raises(ValueError, match=r"GptOssAttention, layer 0\): attention sinks"):
        model(**text_inputs(300))


@pytest.mark.parametrize("name", ["position_bias", "head_mask", "cache"])
def test_further_arguments(name: str) -> None:
    model = make_llama()
    module = model.model.layers[1].self_attn
    q, kv = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    given: Any = {name: torch.zeros(1)}
    with pytest.raises(ValueError, match=r"LlamaAttention, layer 1\).*is not supported\. Use attn_implementation="):
        ALL_ATTENTION_FUNCTIONS["zipvl"](module, q, kv, kv, None, **given)


def test_gradients() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with torch.enable_grad(), zipvl.sparse(model, PAPER), pytest.raises(RuntimeError, match="grad"):
        model(**inputs)


def test_a_sliding_layer_that_was_forced() -> None:
    model = make_gemma3()
    with (
        pytest.raises(ValueError, match=r"names \[0\].*those that can: \[1, 2\]"),
        zipvl.sparse(model, PAPER, layers=(0, 1)),
    ):
        pass
    model.set_attn_implementation("zipvl")
    cache = zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(layers=(0,)))
    with pytest.raises(ValueError, match=r"layer 0\): ZipVLConfig.layers names this layer.*sliding-window"):
        model(**text_inputs(300), past_key_values=cache)


def test_a_custom_mask_behind_a_packed_cache() -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER):
        cache = model(**inputs).past_key_values
        with pytest.raises(ValueError, match=r"a 4-D mask \(1, 1, 2, 302\).*dropped columns"):
            model(torch.tensor([[5, 6]]), past_key_values=cache, attention_mask=torch.zeros(1, 1, 2, 302))


@pytest.mark.filterwarnings("ignore:zipvl.sparse. no layer")
def test_a_custom_mask_in_the_prefill_is_dense_with_a_warning() -> None:
    model, inputs = make_llama(), text_inputs(300)
    mask = torch.ones(300, 300).tril().bool()[None, None]
    mask[..., 100:, :50] = False
    expected = model(inputs["input_ids"], attention_mask=mask).logits
    with pytest.warns(UserWarning, match="custom 4-D mask"), zipvl.sparse(model, PAPER, tau=0.5) as stats:
        assert torch.equal(model(inputs["input_ids"], attention_mask=mask).logits, expected)
    assert stats.layers[0].tokens == [300]
    assert stats.layers[0].reason == "the mask is not plain causal"


def test_models_without_a_decoder() -> None:
    with pytest.raises(ValueError, match="holds no transformers model"), zipvl.sparse(torch.nn.Linear(2, 2)):
        pass
    tower = make_llava_next().model.vision_tower
    with pytest.raises(ValueError, match=r"no causal attention layers: its .* both ways"), zipvl.sparse(tower, PAPER):
        pass
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(ValueError, match="encoder-decoder"), zipvl.sparse(tf.T5ForConditionalGeneration(config)):
        pass


def test_models_without_attention_that_could_be_sparse() -> None:
    """Each is refused for its own reason, and told what to do."""
    small = {"vocab_size": 50, "hidden_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for cls, config, reason in (
        (tf.BertLMHeadModel, tf.BertConfig(**small, **layers), "both ways; set is_decoder=True"),
        (tf.BloomForCausalLM, tf.BloomConfig(**small, n_layer=1, n_head=2), "does not use transformers' attention int"),
        (
            tf.MambaForCausalLM,
            tf.MambaConfig(**small, num_hidden_layers=1),
            r"no attention layers \(a recurrent or state",
        ),
        (tf.DogeForCausalLM, tf.DogeConfig(**small, **layers), "attention modules without is_causal"),
    ):
        with pytest.raises(ValueError, match=rf"zipvl.sparse: {cls.__name__} .*{reason}"), zipvl.sparse(cls(config)):
            pass


@pytest.mark.parametrize(
    "given",
    [
        {"num_kv_shared_layers": 3},
        {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        {"kv_sharing_modes": ["store", None, "reuse_but_indexer"]},
    ],
)
def test_shared_keys_and_values_whose_owner_is_not_known(given: dict[str, Any]) -> None:
    """All are another model's, as an assistant's; or of a type that no earlier layer has; or by another rule."""
    text = SimpleNamespace(model_type="odd", **({"layer_types": ["full_attention"] * 3} | given))
    config: Any = SimpleNamespace(get_text_config=lambda decoder: text)
    with pytest.raises(ValueError, match=r"odd shares keys and values between layers in a way of its own.*use attn_"):
        check_model(config)


@pytest.mark.parametrize("cache", ["drop", "quantize"])
def test_latents_cannot_be_dropped(cache: Any) -> None:
    model, config = make_deepseek_v3(), PAPER.replace(cache=cache)
    words = rf'deepseek_v3 caches latents .*, of which cache="{cache}" can keep no selection; use cache="full"'
    with pytest.raises(ValueError, match=words), zipvl.sparse(model, config):
        pass
    with pytest.raises(ValueError, match=words):
        zipvl.ZipVLCache(model, config)


def test_offloading() -> None:
    with pytest.raises(NotImplementedError, match="offloading"):
        zipvl.ZipVLCache(make_llama()).layers[0].offload()


def test_a_mask_of_the_wrong_length() -> None:
    model = make_llama()
    q, kv = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16)
    with pytest.raises(ValueError, match="the mask covers 19 tokens, the keys are 20"):
        module, mask = model.model.layers[0].self_attn, torch.ones(1, 19, dtype=torch.bool)
        ALL_ATTENTION_FUNCTIONS["zipvl"](module, q, kv, kv, mask)


def test_a_model_with_a_cache_of_its_own_kind_is_refused_at_the_start() -> None:
    model = build(tf.MiniMaxForCausalLM, tf.MiniMaxConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1))
    with (
        pytest.raises(ValueError, match="MiniMaxModel asks for a cache of its own, MiniMaxCache"),
        zipvl.sparse(model, PAPER),
    ):
        pass


def test_layers_that_do_not_hand_on_keywords_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tf.StableLmForCausalLM, tf.StableLmConfig(**TEXT))
    with pytest.raises(ValueError, match=r"StableLmAttention, layer 0\): keyword arguments are not handed on"):
        zipvl.configure(model, PAPER)
    monkeypatch.setattr("zipvl.transformers.target.problem_of", lambda module, parent, **_: None)  # no source at hand
    with (
        zipvl.sparse(model, PAPER),
        pytest.raises(RuntimeError, match="StableLmModel do not hand keyword arguments"),
    ):
        model(**text_inputs(300), use_cache=False)
