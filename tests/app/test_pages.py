"""The programs on README.md, docs/quickstart.md and docs/recipes.md run, with the tiny model, its page and question."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from zipvl.app.run import prepare

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-llava-next"
SAID_AS = {
    '"Qwen/Qwen2.5-VL-7B-Instruct"': repr(str(MODEL)),
    '"page.png"': repr(str(MODEL / "pages" / "demo.png")),
    "What was the net income in 2023?": "EC",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_programs_run(page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))
    for said, meant in SAID_AS.items():
        assert said in program
        program = program.replace(said, meant)
    namespace = {"__name__": "program"}
    exec(compile(program, page, "exec"), namespace)
    stats = namespace["stats"]
    assert stats.active and 0.2 < stats.mean_ratio < 0.6
    assert "013" in capsys.readouterr().out  # what stands beside EC


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    """What the recipes take as given: a model, its inputs, and the tensors of one layer."""
    processor, model = AutoProcessor.from_pretrained(MODEL), AutoModelForImageTextToText.from_pretrained(MODEL)
    inputs = prepare(processor, Image.open(MODEL / "pages" / "demo.png"), "EC", model)
    q, k, v = (torch.randn(1, heads, 600, 64) for heads in (4, 2, 2))
    return {"torch": torch, "model": model, "inputs": inputs, "q": q, "k": k, "v": v}


@pytest.mark.slow
def test_recipes_run(prompt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other. vLLM's and ``torch.compile``'s have tests of their own: tests/serving, test_compile.py."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL | re.MULTILINE)
    run = [block for block in blocks if "vllm" not in block and "torch.compile" not in block]
    assert len(run) == 6 and len(blocks) == 8
    namespace = {"__name__": "recipe"} | prompt
    for i, block in enumerate(run):
        file = tmp_path / f"recipe{i}.py"  # TorchScript reads the source
        file.write_text(block)
        exec(compile(block, str(file), "exec"), namespace)
    assert (tmp_path / "layer.pt").exists() and int(namespace["count"]) <= 600
