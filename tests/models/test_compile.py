"""Whole models under zipvl.sparse as one graph: torch.compile, torch.export, AOTInductor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache

import zipvl
from tests.models.tiny_models import PAPER, TEXT, build, make_llama, text_inputs
from zipvl import policy

pytestmark = pytest.mark.slow


def make_qwen2(num_hidden_layers: int = 2) -> Any:
    return build(tf.Qwen2ForCausalLM, tf.Qwen2Config(**(TEXT | {"num_hidden_layers": num_hidden_layers})))


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def masked(inputs: dict[str, torch.Tensor], padding: int) -> dict[str, torch.Tensor]:
    """The same prompt with ``padding`` of its first tokens padding."""
    mask = inputs["attention_mask"].clone()
    mask[:, :padding] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize(
    ("make", "dynamic", "use_cache", "skip"),
    [
        (make_llama, True, True, True),
        (make_qwen2, False, False, False),
    ],
)
def test_one_graph_is_the_eager_model(make: Any, dynamic: bool, use_cache: bool, skip: bool) -> None:
    """Traced and run as it stands (backend ``eager``), so that the results are the same bits."""
    model = make(num_hidden_layers=2)  # a layer and one that follows another: tracing takes as long as there are layers
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    with zipvl.sparse(model, PAPER, tau=0.8, skip_projections=skip) as stats:
        for number, tokens in enumerate((300, 417)):
            prompts = [
                text_inputs(tokens),
                masked(text_inputs(tokens), 30),
                {"input_ids": text_inputs(tokens)["input_ids"]},
            ]
            for inputs in prompts[: 3 if number == 0 else 1]:
                stats.reset()
                expected = model(**inputs, use_cache=use_cache)
                kept = [stats.layers[i].kept for i in range(2)]
                stats.reset()
                actual = compiled(**inputs, use_cache=use_cache)
                assert torch.equal(actual.logits, expected.logits)
                assert [stats.layers[i].kept for i in range(2)] == kept and stats.prefills == 1
                assert stats.layers[0].mode == "sparse"
                if use_cache:
                    token = torch.tensor([[5]])
                    new = [model(token, past_key_values=o.past_key_values).logits for o in (actual, expected)]
                    assert torch.equal(*new)


@pytest.mark.parametrize("use_cache", [True, False])
def test_lengths_share_a_graph_and_settings_do_not(use_cache: bool) -> None:
    model = make_qwen2()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for ratio in (0.5, 0.25):
        with zipvl.sparse(model, PAPER, ratio=ratio) as stats:
            compiled(**text_inputs(300), use_cache=use_cache)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for tokens in (300, 352, 512):
                    compiled(**text_inputs(tokens), use_cache=use_cache)
                    assert stats.layers[1].kept == [int(ratio * tokens)]
            assert stats.prefills == 3 and stats.mean_ratio == pytest.approx(ratio)
    dense = compiled(**text_inputs(300), use_cache=use_cache).logits
    assert torch.equal(dense, model(**text_inputs(300), use_cache=use_cache).logits)


@pytest.mark.parametrize("skip", [True, False])
def test_a_compiled_prefill_gives_out_nothing_uncut(skip: bool) -> None:
    """What a graph gives out is in memory until it ends, whatever becomes of it then."""
    shapes: list[tuple[int, ...]] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["example_value"] for node in output.args[0]]
        shapes.extend(tuple(value.shape) for value in values if isinstance(value, Tensor))
        return graph.forward

    model = make_qwen2()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with zipvl.sparse(model, PAPER, ratio=0.25, dense_below=50, skip_projections=skip):
        compiled(text_inputs(400)["input_ids"], logits_to_keep=1)
    states = [shape for shape in shapes if len(shape) == 4]
    assert len(states) == 2 * model.config.num_hidden_layers
    assert all(shape[2] <= 102 for shape in states), states


# Any two of the four together.
@pytest.mark.parametrize(
    ("dynamic", "kept", "padding", "skip"),
    [
        (True, {"ratio": 0.25}, 0, True),
        (True, {"tau": 0.6}, 30, False),
        (True, {"ratio": 0.25}, 30, False),
        (True, {"tau": 0.6}, 0, True),
        (False, {"ratio": 0.25}, 30, True),
        (False, {"tau": 0.6}, 0, False),
    ],
    ids=str,
)
def test_a_compiled_prefill_holds_what_is_kept(dynamic: bool, kept: dict[str, float], padding: int, skip: bool) -> None:
    """Under a ratio from the first on, under ``tau`` once its counts may be read."""
    model = make_qwen2()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="eager")
    config = zipvl.ZipVLConfig.paper(**kept, dense_below=50, skip_projections=skip)
    with zipvl.sparse(model, config):
        for tokens in (300, 417):
            inputs = masked(text_inputs(tokens), padding)
            expected = model(**inputs)
            with deterministic():  # memory that is not written is NaN
                actual = compiled(**inputs)
            most = policy.max_kept(config, tokens, 50, True)
            for layer in actual.past_key_values.layers:
                assert layer.packed.keys.shape[2] == layer.packed.longest == (most or tokens)
                assert all(states.isfinite().all() for states in layer.packed.token_states())
            if most:
                assert most <= tokens // 4 + 52
            step = {
                "input_ids": torch.full((inputs["input_ids"].shape[0], 1), 5),
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
            }
            logits = [model(**step, past_key_values=o.past_key_values).logits for o in (actual, expected)]
            torch.testing.assert_close(*logits)
            sizes = [o.past_key_values.cache_bytes for o in (actual, expected)]
            longest = max(layer.packed.longest for layer in expected.past_key_values.layers)
            assert sizes[0] <= sizes[1] * (1 + (64 + 50) / longest), "room for new tokens, and rows too short to skip"


def test_several_compiled_forwards_between_two_reads_count_once() -> None:
    model = make_llama()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with zipvl.sparse(model, PAPER, ratio=0.5) as stats:
        for tokens in (300, 400):
            compiled(**text_inputs(tokens))
    assert stats.prefills == 1 and stats.layers[0].kept == [200]
    stats.reset()
    assert stats.prefills == 0 and not stats.active


def test_inductor() -> None:
    model = make_qwen2(num_hidden_layers=1)  # the compiler's time grows with them
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with zipvl.sparse(model, PAPER, ratio=0.5) as stats:
        outputs, codes = run_and_get_code(compiled, **text_inputs(300))
        for tokens in (300, 417):
            actual = outputs.logits if tokens == 300 else compiled(**text_inputs(tokens)).logits
            torch.testing.assert_close(actual, model(**text_inputs(tokens)).logits, rtol=1e-3, atol=1e-3)
    assert stats.active
    calls = re.findall(r"torch\.ops\.zipvl\.(\w+)\.default\(", "\n".join(codes))
    assert calls == ["zipvl_layer"], "one call a layer, projections included"


class Prefill(nn.Module):
    """The logits of the last token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=self.model.config)
        return self.model(input_ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def test_exported_and_packaged(tmp_path: Path) -> None:
    model = make_qwen2(num_hidden_layers=1)  # the compiler's time grows with them
    tokens = torch.export.Dim("tokens", min=256, max=4096)
    with zipvl.sparse(model, PAPER, ratio=0.5) as stats:
        program = torch.export.export(Prefill(model), (text_inputs(300)["input_ids"],), dynamic_shapes=({1: tokens},))
        assert not stats.active, "an exported program runs without this process"
        expected = {n: model(text_inputs(n)["input_ids"], logits_to_keep=1).logits[:, -1] for n in (300, 701)}
    names = {str(node.target) for node in program.graph.nodes}
    assert {name for name in names if name.startswith("zipvl.")} == {"zipvl.zipvl_layer.default"}
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for length, logits in expected.items():
        inputs = text_inputs(length)["input_ids"]
        assert torch.equal(program.module()(inputs), logits)
        torch.testing.assert_close(package(inputs), logits, rtol=1e-3, atol=1e-3)
