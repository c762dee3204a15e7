"""Which kinds of layers can be sparse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from zipvl.transformers.eligibility import kind_reason


def reason(values: int = 16, passed: dict[str, Any] | None = None, **attributes: Any) -> str | None:
    """``kind_reason`` of a module with these attributes, for heads of 16 and values of ``values``."""
    module = nn.Module()
    for name, value in ({"layer_idx": 1, "is_causal": True, "config": SimpleNamespace()} | attributes).items():
        setattr(module, name, value)
    given = {"sliding_window": None, "is_causal": None} | (passed or {})
    return kind_reason(module, torch.empty(1, 4, 300, 16), torch.empty(1, 2, 300, values), **given)


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
        ({"values": 8}, "keys and values differ in head dimension"),
    ],
)
def test_kinds(given: dict[str, Any], expected: str | None) -> None:
    assert reason(**given) == expected
