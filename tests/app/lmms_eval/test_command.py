"""``lmms-eval --model zipvl`` as a user runs it, in a process of its own: a local task over pages of the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import HAS_LMMS_EVAL

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed (pip install 'zipvl[lmms]')"),
]

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models" / "tiny-llava-next"

TASK = """\
task: zipvl_pages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  until: ["\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
UTILS = """\
from PIL import Image


def picture(doc):
    return [Image.open(doc["picture"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task: two questions on each of two pages that the model was not trained on."""
    folder = tmp_path_factory.mktemp("task")
    lines = []
    for name in ("demo", "dense"):
        page = json.loads((MODEL / "pages" / f"{name}.json").read_text())
        for label, value in list(page["entries"].items())[:2]:
            picture = str(MODEL / "pages" / f"{name}.png")
            lines.append(json.dumps({"question": label, "answer": value, "picture": picture}))
    (folder / "pages.jsonl").write_text("\n".join(lines))
    (folder / "pages.yaml").write_text(TASK.format(data=folder / "pages.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Offline; this checkout and the entry point of its pyproject.toml come first, whatever zipvl is installed."""
    folder = tmp_path_factory.mktemp("entry_point")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["lmms_eval.models"]
    info = folder / "zipvl_checkout-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zipvl-checkout\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\n" + "".join(f"{name} = {where}\n" for name, where in points.items())
    )
    path = os.pathsep.join([str(ROOT), str(folder)])
    return os.environ | {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }


def evaluate(
    task: Path, environment: dict[str, str], output: Path, arguments: str, *options: str, launcher: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str]:
    """lmms-eval's results file, and what it printed."""
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "zipvl"]
    command += ["--model_args", f"pretrained={MODEL},dtype=float32,{arguments}", "--include_path", str(task)]
    command += ["--tasks", "zipvl_pages", "--output_path", str(output), *options]
    done = subprocess.run(command, env=environment, cwd=output, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = output.glob("**/*_results.json")
    return json.loads(results.read_text()), done.stdout


def test_two_processes_read_the_pages_from_a_part_of_the_tokens(
    task: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """As with one process a GPU; here on the CPU. Three questions make a padding request on the second process."""
    results, printed = evaluate(
        task,
        environment | {"ACCELERATE_USE_CPU": "1"},
        tmp_path,
        f"tau=0.99,local_window=0,cache=drop,stats={tmp_path / 'stats.json'}",
        *("--batch_size", "2", "--limit", "3"),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    )
    assert results["results"]["zipvl_pages"]["exact_match,none"] == 1
    assert results["n-samples"]["zipvl_pages"]["effective"] == 3
    beside = results["throughput"]
    assert 0.2 < beside["avg_zipvl_zipvl_pages_mean_ratio"] < 0.6
    share = beside["avg_zipvl_zipvl_pages_mean_cache_bytes"] / beside["avg_zipvl_zipvl_pages_mean_full_cache_bytes"]
    assert 0.2 < share < 0.65
    assert beside["avg_zipvl_zipvl_pages_questions"] == 4
    assert printed.count("of 2,613 tokens kept") == 1 and "avg_zipvl_zipvl_pages_mean_ratio" in printed
    written = json.loads((tmp_path / "stats.json").read_text())["tasks"]["zipvl_pages"]
    assert written["mean_ratio"] == beside["avg_zipvl_zipvl_pages_mean_ratio"]
