"""The programs on README.md and docs/quickstart.md run as they stand, with the tiny model, its page and question."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
