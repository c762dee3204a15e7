"""Models with a shape of their own: each is sparse and right, or an error that says why, never another number."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zipvl
import zipvl.transformers
from tests.models.tiny_models import PAPER, TEXT, build, ids, text_inputs
from zipvl.lmms_eval.meter import full_cache_bytes
from zipvl.transformers.features import FEATURES

GENERATE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def test_cross_attention_layers_beside_sparse_ones() -> None:
    """Llama 3.2 Vision asks each cache layer whether it is filled; as many image tokens as text ones are no prefill."""
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_output_dim": 192}
    vision |= {"intermediate_layers_indices": [0, 1], "max_num_tiles": 4}
    text = TEXT | {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]}
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=TEXT["vocab_size"])
    model = build(tf.MllamaForConditionalGeneration, config)
    tiles = torch.tensor([[[1, 1, 0, 0]]])
    for tokens in (300, 4 * 17):
        inputs = {
            **text_inputs(tokens),
            "pixel_values": torch.randn(1, 1, 4, 3, 56, 56),
            "aspect_ratio_ids": torch.tensor([[2]]),
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": tiles[:, None].expand(1, tokens, 1, 4),
        }
        expected = model.generate(**inputs, **GENERATE)
        with zipvl.sparse(model, PAPER, tau=1.0, dense_below=0) as stats:
            assert torch.equal(model.generate(**inputs, **GENERATE), expected)
        assert [stats.layers[i].mode for i in (0, 2, 4)] == ["sparse"] * 3
        assert all(stats.layers[i].mode == "dense" for i in (1, 3) if i in stats.layers)


def gemma4(**changes: Any) -> Any:
    """Gemma 4 without shared keys and values: head dimensions, and in the large models heads, differ by layer."""
    config = tf.Gemma4TextConfig(
        **(TEXT | {"num_hidden_layers": 4, "head_dim": 32}),
        global_head_dim=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        vocab_size_per_layer_input=TEXT["vocab_size"],
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
        **changes,
    )
    return build(tf.Gemma4ForCausalLM, config)


@pytest.mark.parametrize("changes", [{}, {"num_global_key_value_heads": 1, "attention_k_eq_v": True}])
@pytest.mark.parametrize("cache", ["drop", "full"])
def test_heads_and_their_dimensions_that_differ_by_layer(cache: Any, changes: dict[str, Any]) -> None:
    model, inputs = gemma4(**changes), text_inputs(300)
    expected = model.generate(**inputs, **GENERATE)
    with zipvl.sparse(model, PAPER, tau=1.0, cache=cache) as stats:
        assert torch.equal(model.generate(**inputs, **GENERATE), expected)
    assert [stats.layers[i].mode for i in range(4)] == ["dense", "sparse"] * 2
    global_heads = changes.get("num_global_key_value_heads", 2)
    assert full_cache_bytes(model.config, 3, 300, 4) == 3 * 300 * 2 * (2 * 2 * 32 + 2 * global_heads * 64) * 4


def test_bits_are_checked_layer_by_layer() -> None:
    config = tf.Gemma4TextConfig(
        **(TEXT | {"num_hidden_layers": 2, "head_dim": 16}),
        global_head_dim=64,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
    )
    with pytest.raises(ValueError, match="gemma4_text has 16, 64"):
        zipvl.ZipVLCache(config, zipvl.ZipVLConfig.paper(cache="quantize"))


ALTERED = "keys or values are altered between the cache and the attention function"


def jetmoe() -> Any:
    text = {name: value for name, value in TEXT.items() if name not in ("num_attention_heads", "head_dim")}
    config = tf.JetMoeConfig(**text, kv_channels=16, num_local_experts=2, num_experts_per_tok=1)
    return build(tf.JetMoeForCausalLM, config)


def diffllama() -> Any:
    return build(tf.DiffLlamaForCausalLM, tf.DiffLlamaConfig(**TEXT))


@pytest.mark.parametrize("make", [diffllama, jetmoe])
def test_a_model_that_alters_its_states_is_an_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DiffLlama calls its attention twice, with halves of the values; JetMoE repeats keys and values for its experts.
    The source tells at the start of a block; without it the first prefill does."""
    model = make()
    with pytest.raises(ValueError, match=rf"Attention, layer 0\): its {ALTERED}"), zipvl.sparse(model, PAPER):
        pass
    monkeypatch.setattr("zipvl.transformers.target.problem_of", lambda module, parent, **_: None)
    with zipvl.sparse(model, PAPER), pytest.raises(RuntimeError, match="keys or values of a ZipVLCache were altered"):
        model(**text_inputs(300))


@pytest.mark.parametrize("name", ["s_aux", "sinks", "position_bias", "softcap", "indices", "block_indices"])
def test_layers_that_stay_dense_lose_no_argument(name: str) -> None:
    """A sliding layer runs SDPA, which knows none of these."""
    model = build(tf.MistralForCausalLM, tf.MistralConfig(**TEXT, sliding_window=64))
    module, q, kv = model.model.layers[1].self_attn, torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    given: Any = {name: torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r'MistralAttention, layer 1\).*not supported. Use attn_implementation="eager"'
    ):
        ALL_ATTENTION_FUNCTIONS["zipvl"](module, q, kv, kv, None, sliding_window=64, **given)


def test_one_attention_module_for_several_layers() -> None:
    """Zamba 2's shared attention has the layer index -1, and a forward without a cache."""
    config = tf.Zamba2Config(
        vocab_size=TEXT["vocab_size"],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        n_mamba_heads=4,
        mamba_headdim=32,
        mamba_d_state=16,
        num_mem_blocks=1,
        layers_block_type=["mamba", "mamba", "hybrid"],
        pad_token_id=0,
    )
    model = build(tf.Zamba2ForCausalLM, config)
    expected = model(ids(300, 1), use_cache=False).logits
    with zipvl.sparse(model, PAPER, tau=0.5), pytest.warns(UserWarning, match="no layer of Zamba2Model was sparse"):
        assert torch.equal(model(ids(300, 1), use_cache=False).logits, expected)


HANDLED = {"query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "sliding_window"}
"""Keywords that our attention function and SDPA take, the window by the mask."""
OF_FLASH = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "deterministic"}
"""Keywords that only flash attention reads; the mask says the same to others."""


def test_every_keyword_of_transformers_attention_is_known() -> None:
    """What attention modules pass is honoured, refused, or of no meaning to SDPA: a new keyword fails here."""
    unknown: dict[str, list[str]] = {}
    known, calls = HANDLED | OF_FLASH | {"output_attentions"} | FEATURES.keys(), 0
    for path in sorted((Path(tf.__file__).parent / "models").glob("*/modeling_*.py")):
        for call in attention_calls(path.read_text(encoding="utf-8")):
            calls += 1
            for keyword in call.keywords:
                if keyword.arg is not None and keyword.arg not in known:
                    unknown.setdefault(keyword.arg, []).append(path.stem)
    assert not unknown and calls > 200


def attention_calls(source: str) -> Iterator[ast.Call]:
    """The calls of an attention function in a module of transformers: parsed alone, in a tenth of the whole's time."""
    for found in re.finditer(r"(?<![\w.])(?<!def )(?:attention_interface|attention_fn)\(", source):
        end, depth = found.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        call = ast.parse(source[found.start() : end], mode="eval").body
        assert isinstance(call, ast.Call)
        yield call
