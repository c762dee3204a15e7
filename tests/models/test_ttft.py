"""benchmarks.ttft on a tiny shape: its rows run, and its FLOPs are those of the products that are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _models, ttft


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    further: dict[str, Any] = {"skip_mlp": "half", "window": [16], "chunk": 128}
    ttft.main(length=[300], ratio=[0.25, 0.5], **further, eager=True, compiled=False, smoke=True, save=False)
    printed = capsys.readouterr().out
    for row in ("+ skipped MLPs", "sparse attention, window 16", "+ skipped MLPs, window 16"):
        assert row in printed
    for row in ("original", "+ approximate attention", "+ sort and cumsum", "+ sparse attention", "+ skipped projec"):
        assert row in printed
    assert "chunks of" in printed
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


def test_flops_of_skipped_mlps() -> None:
    shape, tokens = _models.QWEN2_7B, 131072
    rows = ttft.methods((0.25,), windows=(128,), skip_mlp=ttft.read_layers("half", shape.layers))
    flops = {row.name: row.flops(shape, tokens) for row in rows}
    saved = flops["+ skipped projections"] - flops["+ skipped MLPs"]
    assert saved == 14 * 6 * shape.hidden * shape.mlp * tokens * 0.75
    window = flops["sparse attention, window 128"] - flops["+ sparse attention"]
    assert 0 < window < 0.01 * flops["original"]
    within = flops["sparse attention, window 128"] - flops["+ skipped MLPs, window 128"]
    assert within == pytest.approx(saved, rel=0.01)


def test_layers_are_read() -> None:
    assert ttft.read_layers("half", 6) == (1, 3, 5) and ttft.read_layers("0, 5", 6) == (0, 5)
    for text in ("6", "1;3", "-1", "all", "1,"):
        with pytest.raises(typer.BadParameter, match="--skip-mlp takes"):
            ttft.read_layers(text, 6)


def test_a_method_leaves_the_model_as_it_was() -> None:
    model = _models.build(_models.SMOKE, 512, "cpu")
    tokens = torch.randint(0, 128, (1, 300))
    before = model(tokens).logits
    for method in ttft.methods((0.25,), windows=(16,), skip_mlp=(1,)):
        with ttft.applied(model, method), torch.no_grad():
            found = model(tokens, use_cache=False).logits
        assert torch.equal(found, before) == (method.ratio is None), method.name
    assert torch.equal(model(tokens).logits, before)
