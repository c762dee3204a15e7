"""Which kinds of layers can be sparse.

Asks ``reason_dense``, the one decision, itself: no model of transformers has all of these kinds.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from zipvl import ZipVLConfig
from zipvl.transformers.call import Call, Run
from zipvl.transformers.reasons import reason_dense


def reason(same_head_dims: bool = True, passed: dict[str, Any] | None = None, **attributes: Any) -> str | None:
    """The words of ``reason_dense`` for a module with these attributes."""
    module = nn.Module()
    for name, value in ({"layer_idx": 1, "is_causal": True, "config": SimpleNamespace()} | attributes).items():
        setattr(module, name, value)
    given = {"sliding_window": None, "is_causal": None} | (passed or {})
    dense = reason_dense(module, ZipVLConfig.paper(), 256, 300, None, **given, same_head_dims=same_head_dims)
    assert dense is None or dense.always
    return None if dense is None else dense.words


TYPES = ["full_attention", "chunked_attention"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"is_causal": False, "passed": {"is_causal": True}}, None),
        ({"layer_idx": None}, "not a decoder layer"),
        ({"is_causal": False}, "attention is not causal"),
        ({"passed": {"is_causal": False}}, "attention is not causal"),
        ({"config": SimpleNamespace(is_causal=False)}, "attention is not causal"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"passed": {"sliding_window": 64}}, "sliding-window attention"),
        ({"config": SimpleNamespace(layer_types=TYPES)}, "layer type chunked_attention"),
        ({"config": SimpleNamespace(layer_types=TYPES), "layer_idx": 0}, None),
        ({"config": SimpleNamespace(layer_types=None)}, None),
        ({"same_head_dims": False}, "keys and values differ in head dimension"),
    ],
)
def test_kinds(given: dict[str, Any], expected: str | None) -> None:
    assert reason(**given) == expected


def test_situations() -> None:
    module = nn.Module()
    module.layer_idx, module.is_causal = 1, True  # type: ignore[assignment]
    facts: dict[str, Any] = {"sliding_window": None, "is_causal": None, "same_head_dims": True}
    for config, tokens, mask, expected in (
        (ZipVLConfig.paper(layers=(0,)), 300, None, "not among ZipVLConfig.layers"),
        (ZipVLConfig.paper(), 255, None, "prompt shorter than dense_below=256"),
        (ZipVLConfig.paper(), 300, torch.ones(1, 1, 300, 300), "the mask is not plain causal"),
    ):
        dense = reason_dense(module, config, 256, tokens, mask, **facts)
        assert dense is not None and (dense.words, dense.always) == (expected, False)
    assert reason_dense(module, ZipVLConfig.paper(layers=(1,)), 256, 256, torch.ones(1, 256), **facts) is None


def test_layers_of_one_index_are_asked_one_by_one() -> None:
    """A decoder's cross-attention may have the index of its self-attention."""
    call, facts = (
        Call(Run(ZipVLConfig.paper()), None),
        {"sliding_window": None, "is_causal": None, "same_head_dims": True},
    )
    found = []
    for causal in (True, False):
        module = nn.Module()
        module.layer_idx, module.is_causal = 1, causal  # type: ignore[assignment]
        found.append(call.reason_dense(module, 256, 300, None, **facts))
    assert found[0] is None and found[1] is not None and found[1].words == "attention is not causal"
