"""benchmarks.ttft on a tiny shape: its rows run, and its FLOPs are those of the products that are made."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _models, ttft


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    ttft.main(length=[300], ratio=[0.25, 0.5], window=[64], chunk=128, smoke=True, save=False)
    printed = capsys.readouterr().out
    for row in ("original", "+ approximate attention", "+ sort and cumsum", "+ sparse attention", "+ skipped projec"):
        assert row in printed
    assert "window 64" in printed and "chunks of" in printed
    assert "0.25" in printed and "0.5" in printed


def test_flops_of_the_linear_layers_are_the_models() -> None:
    model, tokens, shape = _models.build(_models.SMOKE, 512, "cpu"), 300, _models.SMOKE
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, shape.vocab, (1, tokens)), logits_to_keep=1)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    linear = sum(flops for op, flops in counts.items() if "mm" in op)
    causal = 2 * shape.layers * shape.heads * shape.head_dim * tokens**2
    assert ttft.ORIGINAL.flops(shape, tokens) - causal == pytest.approx(linear, rel=0.01)


def test_flops_fall_row_by_row() -> None:
    rows = ttft.methods((0.5, 0.25))
    flops = [row.flops(_models.QWEN2_7B, 131072) for row in rows]
    assert [row.name for row in rows[:3]] == [ttft.ORIGINAL.name, *(row.name for row in ttft.ESTIMATES)]
    assert flops[0] < flops[1] == flops[2] and flops[2] > flops[3] > flops[4] > flops[5] > flops[6]
    assert (flops[2] - flops[0]) / flops[0] < 0.01, "the estimate is small"
    attention, layers = flops[0] - flops[3], _models.QWEN2_7B.layers
    assert attention == pytest.approx(2 * layers * 3584 * 131072**2 * 0.75, rel=0.02)


def test_a_method_leaves_the_model_as_it_was() -> None:
    model = _models.build(_models.SMOKE, 512, "cpu")
    tokens = torch.randint(0, 128, (1, 300))
    before = model(tokens).logits
    for method in ttft.methods((0.25,), windows=(64,)):
        with ttft.applied(model, method), torch.no_grad():
            found = model(tokens, use_cache=False).logits
        assert torch.equal(found, before) == (method.ratio is None), method.name
    assert torch.equal(model(tokens).logits, before)
