"""Methods on instances: what a block puts there and takes away again, beside those that others put there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zipvl
from tests.models.tiny_models import PAPER, make_llama, text_inputs
from zipvl.transformers.methods import Method


class Doubling(Method):
    """Twice what the module does."""

    def __call__(self, x: torch.Tensor) -> Any:
        return 2 * self.ordinary(x)


class Chaining(Doubling):
    chains = True


def replaced(model: nn.Module) -> dict[str, set[str]]:
    """The methods that modules of ``model`` have of their own."""
    found = {name: {n for n, x in vars(module).items() if callable(x)} for name, module in model.named_modules()}
    return {name: methods for name, methods in found.items() if methods}


def test_it_stands_before_the_class_and_goes_without_a_trace() -> None:
    module, x = nn.ReLU(), torch.tensor([-1.0, 3.0])
    before = dict(vars(module))
    Doubling(module).install()
    assert Doubling.is_on(module) and module(x).tolist() == [0, 6]
    Doubling.remove(module)
    Doubling.remove(module)
    assert vars(module) == before and not Doubling.is_on(module) and module(x).tolist() == [0, 3]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_their_own(make: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Threshold(1.0, 5.0)
    Doubling(module).install()
    twin: Any = make(module)
    twin.value = 7.0
    Doubling.remove(module)
    assert vars(twin)["forward"].owner is twin
    assert twin(torch.zeros(1)).tolist() == [14] and module(torch.zeros(1)).tolist() == [5]


def test_anothers_method_stays_and_is_asked_by_those_that_chain() -> None:
    module, x = nn.ReLU(), torch.tensor([-1.0, 3.0])
    module.forward = lambda x: x + 10  # type: ignore[method-assign]
    others = module.forward
    Doubling(module).install()
    assert vars(module)["forward"] is others
    Chaining(module).install()
    assert module(x).tolist() == [18, 26]
    Doubling.remove(module)  # Chaining is a Doubling
    assert vars(module)["forward"] is others


def test_what_another_put_on_top_is_left_alone() -> None:
    module = nn.ReLU()
    Doubling(module).install()
    inner = module.forward
    module.forward = lambda x: inner(x) + 1  # type: ignore[method-assign]
    others = module.forward
    Doubling.remove(module)
    assert vars(module)["forward"] is others and module(torch.ones(1)).tolist() == [3]


def test_the_methods_of_a_block() -> None:
    """Decoder, attention modules that skip projections, MLPs that are asked for, ``generate()``'s cache; no other."""
    model = make_llama()
    before = replaced(model)
    with zipvl.sparse(model, PAPER, skip_mlp_layers=(1,)):
        found = replaced(model)
        with zipvl.sparse(model, PAPER, skip_mlp_layers=(2,)):
            assert replaced(model).keys() == found.keys() | {"model.layers.2.mlp"}
        assert replaced(model) == found
    attention = {f"model.layers.{i}.self_attn" for i in range(3)}
    forwards = {name for name, methods in found.items() if methods - before.get(name, set()) == {"forward"}}
    assert forwards == {"model", "model.layers.1.mlp", *attention}
    assert "_prepare_cache_for_generation" in found[""] and replaced(model) == before


def test_a_forward_that_fails_leaves_no_ids_and_no_selection() -> None:
    model, inputs = make_llama(), text_inputs(300)
    model.config.image_token_id = 190
    as_image = {"input_ids": inputs["input_ids"].clone(), "attention_mask": inputs["attention_mask"]}
    as_image["input_ids"][:, 20:200] = 190
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    settings: dict[str, Any] = {"tau": 0.5, "local_window": 0, "num_sinks": 0, "skip_mlp_layers": (1,)}

    def fail(*_: Any) -> None:
        raise KeyError("a forward that fails")

    with zipvl.sparse(model, **settings) as stats, pytest.warns(UserWarning, match="no visual tokens"):
        for module in (model.model.embed_tokens, model.model.layers[1].post_attention_layernorm):
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(KeyError):
                model(**as_image)
            handle.remove()
        model(**embeds, attention_mask=inputs["attention_mask"])
        assert {layer.mode for layer in stats.layers.values()} == {"dense"}
        assert stats.layers[1].mlp_tokens is None
