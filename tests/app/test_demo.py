"""What ``make demo`` runs: the trained model, a page it was not trained on, and the right answer from fewer tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zipvl import ZipVLConfig
from zipvl.app.cli import app

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-llava-next"


@pytest.mark.slow
def test_the_demo_answers_right_from_fewer_tokens() -> None:
    page = json.loads((MODEL / "pages" / "demo.json").read_text())
    arguments = ["run", "--image", str(MODEL / "pages" / "demo.png"), "--question", page["question"]]
    done = CliRunner().invoke(app, [*arguments, "--model", str(MODEL), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["prompt_tokens"] > 2600
    assert said["dense"]["answer"] == said["zipvl"]["answer"] == page["answer"]
    assert said["zipvl"]["active"] and 0.2 < said["zipvl"]["mean_ratio"] < 0.5
    assert ZipVLConfig(**said["config"]) == ZipVLConfig(tau=0.9)
