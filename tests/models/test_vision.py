"""Vision towers whose blocks are compiled, with a stand-in for the compiler."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zipvl
from tests.models.tiny_models import MULTIMODAL, make_qwen2_5_vl
from zipvl.transformers import vision

TAU_ONE: dict[str, Any] = {"tau": 1.0, "local_window": 0, "num_sinks": 0, "dense_below": 0}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the graphs that were compiled."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(vision, "BACKEND", backend)
    torch.compiler.reset()
    return graphs


def blocks(model: nn.Module) -> list[nn.Module]:
    return vision.blocks_of(model, model.get_decoder())


@pytest.mark.parametrize("lengths", [[50], [16] * 4, [16, 16, 8], [1] * 5])
@pytest.mark.parametrize("longest", ["given", "not given"])
def test_windows_see_themselves_alone(lengths: list[int], longest: str) -> None:
    q, k, v = torch.randn(3, 1, 6, sum(lengths), 20).unbind()
    parts = [
        nn.functional.scaled_dot_product_attention(*window, scale=0.3)
        for window in zip(*(states.split(lengths, dim=2) for states in (q, k, v)), strict=True)
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    given: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "is_causal": False, "scaling": 0.3}
    if longest == "given":
        given |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    out, _ = vision.vision_attention(nn.Module(), q, k, v, None, **given)
    torch.testing.assert_close(out, torch.cat(parts, dim=2).transpose(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_blocks_of_towers_are_compiled_for_the_length_of_a_block(name: str, compiled: list[int]) -> None:
    model, inputs = MULTIMODAL[name].make(), MULTIMODAL[name].inputs(300, 1)
    assert blocks(model) and not set(blocks(model)) & set(model.get_decoder().modules())
    with torch.no_grad():
        before = model(**inputs).logits
        with zipvl.sparse(model, **TAU_ONE):
            model(**inputs)
        assert not compiled, "off unless it is asked for"
        with zipvl.sparse(model, **TAU_ONE, vision_compile=True):
            assert all(block._compiled_call_impl is not None for block in blocks(model))
            torch.testing.assert_close(model(**inputs).logits, before, atol=1e-4, rtol=1e-4)
        first = len(compiled)
        assert 0 < first <= 8, "blocks of one class share their graphs"
        with zipvl.sparse(model, **TAU_ONE, vision_compile=True):
            model(**inputs)
        assert len(compiled) == first, "a later block compiles nothing anew"
    assert all(block._compiled_call_impl is None for block in blocks(model))


def test_a_block_inside_a_block_leaves_the_outer_one_compiled(compiled: list[int]) -> None:
    model = make_qwen2_5_vl()
    with zipvl.sparse(model, vision_compile=True):
        outer = [block._compiled_call_impl for block in blocks(model)]
        with zipvl.sparse(model, vision_compile=True):
            pass
        assert [block._compiled_call_impl for block in blocks(model)] == outer
    assert not compiled


@pytest.mark.slow
def test_a_configured_model_and_its_copies(compiled: list[int]) -> None:
    model, inputs = make_qwen2_5_vl(), MULTIMODAL["qwen2_5_vl"].inputs(300, 1)
    zipvl.configure(model, zipvl.ZipVLConfig(**TAU_ONE, vision_compile=True))
    with torch.no_grad():
        should = model(**inputs).logits
        assert compiled
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(**inputs).logits, should, atol=1e-4, rtol=1e-4)
            assert all(block._compiled_call_impl is not None for block in blocks(other))
            zipvl.configure(other, None)
            assert all(block._compiled_call_impl is None for block in blocks(other))
    assert all(block._compiled_call_impl is not None for block in blocks(model))
    zipvl.configure(model, None)
    assert all(block._compiled_call_impl is None for block in blocks(model))
