"""What users do by mistake and could not tell from the answer: a warning, a reason or an error of ours."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import zipvl
from tests.models.tiny_models import PAD, PAPER, make_llama, make_qwen3_vl, qwen_inputs, text_inputs
from zipvl.transformers import cache_names

GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def padded(side: str) -> dict[str, torch.Tensor]:
    """Two prompts of unequal length in one batch."""
    rows = [text_inputs(300), text_inputs(280, seed=1)]
    pad = [
        (300 - row["input_ids"].shape[1], 0) if side == "left" else (0, 300 - row["input_ids"].shape[1]) for row in rows
    ]
    return {
        name: torch.cat([torch.nn.functional.pad(row[name], by, value=PAD) for row, by in zip(rows, pad, strict=True)])
        for name in rows[0]
    }


def test_a_batch_padded_on_the_right_is_warned_of() -> None:
    model = make_llama()
    with (
        zipvl.sparse(model, PAPER),
        pytest.warns(UserWarning, match=r"1 of 2 rows of this batch end in padding") as told,
    ):
        for _ in range(2):
            model.generate(**padded("right"), **GENERATE)
    assert len([w for w in told if "padding" in str(w.message)]) == 1  # once a block
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*padding")
        with zipvl.sparse(model, PAPER):
            model.generate(**padded("left"), **GENERATE)
            model(**padded("right"))  # logits of each token are right: nothing goes on behind the padding
        model.generate(**padded("right"), **GENERATE)  # not ours
    cache = zipvl.ZipVLCache(model, PAPER)
    model.set_attn_implementation("zipvl")
    with pytest.warns(UserWarning, match=r"zipvl: 1 of 2 rows"):
        model.generate(**padded("right"), **GENERATE, **{cache_names.name_for(type(model).forward): cache})


@pytest.mark.parametrize("kept", ["drop", "quantize", "full"])
def test_a_packed_cache_after_its_block(kept: Any) -> None:
    model, inputs = make_llama(head_dim=32), text_inputs(300)
    config = PAPER.replace(cache=kept)
    with zipvl.sparse(model, config):
        cache = cache_names.of_output(model(**inputs))
        before = copy.deepcopy(cache)
    step, name = torch.tensor([[5]]), cache_names.name_for(type(model).forward)
    with pytest.raises(RuntimeError, match=r"ZipVLCache: layer 0 is packed.*Its zipvl.sparse block has ended"):
        model(step, **{name: cache})
    longer = torch.cat([inputs["input_ids"], step], dim=1)
    with pytest.raises(RuntimeError, match=r"ZipVLCache: layer 0 is packed"):
        model.generate(longer, **GENERATE, **{name: cache})
    with zipvl.sparse(model, config):
        assert torch.equal(model(step, **{name: cache}).logits, model(step, **{name: before}).logits)


@pytest.mark.filterwarnings("ignore:zipvl.sparse. no layer")
def test_a_cache_of_dense_layers_goes_on_after_its_block() -> None:
    model, inputs, step = make_llama(), text_inputs(100), torch.tensor([[5]])
    name = cache_names.name_for(type(model).forward)
    expected = model(step, **{name: cache_names.of_output(model(**inputs))}).logits
    with zipvl.sparse(model, PAPER, dense_below=256):
        cache = cache_names.of_output(model(**inputs))
    for copied in (DynamicCache(cache), cache):
        assert torch.equal(model(step, **{name: copied}).logits, expected)


def test_a_packed_cache_is_not_copied_as_keys_and_values() -> None:
    model = make_llama()
    with zipvl.sparse(model, PAPER):
        cache = cache_names.of_output(model(**text_inputs(300)))
        for copied in (DynamicCache, list, lambda packed: DynamicCache(packed, config=model.config)):
            with pytest.raises(RuntimeError, match=r"ZipVLCache: layers \[0, 1, 2\] are packed.*use copy.deepcopy"):
                copied(cache)
    assert len(list(zipvl.ZipVLCache(model))) == 3


@pytest.mark.parametrize("skip", [None, False])
def test_a_model_in_double_precision_is_dense_with_the_reason(skip: bool | None) -> None:
    model, inputs = make_qwen3_vl().double(), qwen_inputs(200)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = model.generate(**inputs, **GENERATE)
    told = pytest.warns(UserWarning, match="no layer .* was sparse .*: the ops take float16, bfloat16, float32")
    with zipvl.sparse(model, PAPER, skip_projections=skip, dense_below=0) as stats, told:
        assert torch.equal(model.generate(**inputs, **GENERATE), expected)
    assert not stats.active
    assert stats.layers[0].reason == "the ops take float16, bfloat16, float32, and this model is float64"
    llama = make_llama().double()
    with (
        zipvl.sparse(llama, PAPER, layers=(1,), dense_below=0),
        pytest.raises(ValueError, match=r"layer 1.*names this layer, but it cannot be sparse: the ops take"),
    ):
        llama(**text_inputs(300))
