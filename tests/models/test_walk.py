"""Walks over a model's modules."""

from __future__ import annotations

from torch import nn

from tests.models.tiny_models import MULTIMODAL
from zipvl.transformers.walk import modules_of


def test_the_modules_are_torchs_in_their_order() -> None:
    shared, model = nn.Linear(2, 2), nn.Module()
    model.first, model.none, model.last = nn.Sequential(shared, nn.Identity()), None, nn.ModuleList([shared, nn.ReLU()])
    model.register_module("empty", None)
    for each in (model, MULTIMODAL["qwen2_5_vl"].make()):
        found, expected = modules_of(each), list(each.modules())
        assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))
