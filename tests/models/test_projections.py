"""Skipped projections: the same model, and only where it applies.

``projections`` is imported for what it says of modules that no model here has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import zipvl
from tests.models.tiny_models import PAPER, SPARSE, TEXT, build, make_gemma3, make_llama, text_inputs
from zipvl import ops
from zipvl.transformers import configure, projections

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32 through three layers of large weights


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of each layer that projected for itself: for how many rows it computed outputs."""
    calls: list[int] = []
    ordinary = ops.zipvl_layer

    def count(q: Any, *args: Any, **kwargs: Any) -> Any:
        results = ordinary(q, *args, **kwargs)
        if q is None:
            calls.append(int(results[2].sum()))
        return results

    with monkeypatch.context() as patch:
        patch.setattr(ops, "zipvl_layer", count)
        yield calls


def make(family: str, **changes: Any) -> Any:
    """A tiny text model of a family."""
    return build(getattr(tf, f"{family}ForCausalLM"), getattr(tf, f"{family}Config")(**(TEXT | changes)))


TEXT_MODELS = {
    "llama": make_llama,
    "qwen2": lambda: make("Qwen2"),
    "qwen3": lambda: make("Qwen3"),
    "mistral": lambda: make("Mistral", sliding_window=None),
}


@pytest.mark.parametrize("cache", ["drop", "full"])
@pytest.mark.parametrize("name", sorted(({*SPARSE} | {*TEXT_MODELS}) - {"gemma3_text"}))
def test_the_same_model(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SPARSE[name].make() if name in SPARSE else TEXT_MODELS[name]()
    inputs = SPARSE[name].inputs(300, 1) if name in SPARSE else text_inputs(300)
    found = {}
    for skip in (False, True):
        with (
            zipvl.sparse(model, PAPER, ratio=0.4, cache=cache, skip_projections=skip, record_index=True) as stats,
            counted(monkeypatch) as calls,
        ):
            output = model(**inputs)
            step = model(torch.tensor([[7]]), past_key_values=output.past_key_values).logits
        kept = [stats.layers[i].kept[0] for i in range(3)]
        assert calls == (kept if skip else [])
        found[skip] = (output.logits, step, [stats.layers[i].index[0] for i in range(3)], stats.cache_bytes)
    whole, skipped = found[False], found[True]
    assert all(torch.equal(a, b) for a, b in zip(whole[2], skipped[2], strict=True))
    assert whole[3] == skipped[3]
    torch.testing.assert_close(skipped[0], whole[0], **TOLERANCE)
    torch.testing.assert_close(skipped[1], whole[1], **TOLERANCE)


@pytest.mark.parametrize("kept", [{"ratio": 0.25}, {"tau": 0.9}], ids=str)
def test_what_is_not_finite_stays_so(kept: dict[str, float]) -> None:
    """Where scores are not finite every token is selected, whatever the ratio, and each needs its output."""
    model = make_llama()
    embedded = model.get_input_embeddings()(text_inputs(300)["input_ids"]).detach().clone()
    embedded[:, 10] = torch.nan
    with zipvl.sparse(model, PAPER, **kept, skip_projections=True) as stats:
        logits = model(inputs_embeds=embedded).logits
    assert stats.active and stats.layers[0].kept == [300]
    assert bool(logits[:, 10:].isnan().all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Qwen2")
    inputs = text_inputs(600)
    batch = {name: t.repeat(3, 1) for name, t in inputs.items()}
    for row, padding in ((1, 120), (2, 400)):  # the last row is short enough to be dense
        where = slice(0, padding) if side == "left" else slice(600 - padding, 600)
        batch["attention_mask"][row, where] = 0
    found = {}
    for skip in (False, True):
        with (
            zipvl.sparse(model, PAPER, tau=0.8, keep_recent=3, skip_projections=skip) as stats,
            counted(monkeypatch) as calls,
        ):
            logits = model(**batch).logits
        assert len(calls) == 3 * skip
        found[skip] = (logits[batch["attention_mask"].bool()], [stats.layers[i].kept for i in range(3)])
    assert found[True][1] == found[False][1] and found[True][1][0][2] == 200
    torch.testing.assert_close(found[True][0], found[False][0], **TOLERANCE)


class Wrapped(nn.Linear):
    """A linear layer that does more, as adapters do."""


def with_adapter() -> Any:
    model = make_llama()
    attention = model.model.layers[0].self_attn
    attention.o_proj = Wrapped(64, 64, bias=False)
    return model


def with_hook() -> Any:
    model = make_llama()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make_model", "settings", "layers"),
    [
        (make_llama, {}, [0, 1, 2]),
        (make_llama, {"skip_projections": None}, [0, 1, 2]),
        (make_llama, {"skip_projections": False}, []),
        (make_llama, {"all_queries": True}, []),
        (make_llama, {"layers": (1,)}, [1]),
        (make_llama, {"dense_below": 301}, []),
        (with_adapter, {}, [1, 2]),
        (with_hook, {}, [1, 2]),
        (lambda: make("Llama", attention_bias=True), {}, []),
        (lambda: make("Mistral", sliding_window=64), {}, []),
        (make_gemma3, {}, []),
    ],
)
def test_where_it_applies(
    make_model: Any, settings: dict[str, Any], layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with (
        zipvl.sparse(model, PAPER, **({"ratio": 0.5, "skip_projections": True} | settings)),
        counted(monkeypatch) as calls,
    ):
        model(**text_inputs(300))
    assert len(calls) == len(layers)


def test_chunks_after_the_first_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_llama(), text_inputs(300)
    with zipvl.sparse(model, PAPER, ratio=0.5), counted(monkeypatch) as calls:
        cache = model(**inputs).past_key_values
        model(inputs["input_ids"], past_key_values=cache)
        assert len(calls) == 3


def test_configure_installs_and_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_llama(), text_inputs(300)
    model.set_attn_implementation("zipvl")
    before = model(**inputs, use_cache=False).logits
    configure(model, zipvl.ZipVLConfig.paper(ratio=0.5))
    with counted(monkeypatch) as calls:
        model(**inputs)
        model.set_attn_implementation("sdpa")
        model(**inputs)
        assert len(calls) == 3
    model.set_attn_implementation("zipvl")
    configure(model, None)
    assert all("forward" not in vars(layer.self_attn) for layer in model.model.layers)
    assert torch.equal(model(**inputs, use_cache=False).logits, before)


def test_a_caches_own_configuration_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    model.set_attn_implementation("zipvl")
    configure(model, zipvl.ZipVLConfig.paper(ratio=0.5))
    with counted(monkeypatch) as calls:
        model(**text_inputs(300), past_key_values=zipvl.ZipVLCache(model, zipvl.ZipVLConfig.paper(ratio=0.2)))
    assert calls == [60, 60, 60]


def test_unknown_modules_are_left_alone() -> None:
    assert projections.static_reason(nn.Linear(2, 2)) == "Linear is not among the tested attention modules"
    model = make_llama()
    modules = [model.model.layers[0].self_attn, nn.Linear(2, 2)]
    projections.install(modules)
    assert "forward" in vars(model.model.layers[0].self_attn)
    projections.remove(modules)
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_the_setting_is_checked() -> None:
    with pytest.raises(ValueError, match="skip_projections must be None, True or False, got 'yes'"):
        zipvl.ZipVLConfig.paper(skip_projections="yes")  # type: ignore[arg-type]
