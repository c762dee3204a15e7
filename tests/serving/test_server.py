"""The OpenAI server, as a user starts it: processes of its own, a picture in the request, metrics."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.tiny import MODEL, page

PORT = 8731


def call(path: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


@pytest.fixture
def server(served: Path, tmp_path: Path) -> Iterator[Path]:
    """The log of a running server."""
    options = {"zipvl": {"ratio": 0.4, "local_window": 64, "cache": "drop"}}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served)]
    command += ["--port", str(PORT), "--host", "127.0.0.1", "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "4"]
    command += ["--no-enable-prefix-caching", "--max-num-batched-tokens", "4200", "--block-size", "32"]
    command += ["--additional-config", json.dumps(options)]
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    call("/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(1)
            yield log
        finally:
            process.terminate()
            process.wait(60)


def test_a_page_is_read(server: Path) -> None:
    _, label, answer = page("demo")
    picture = base64.b64encode((MODEL / "pages" / "demo.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": label},
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 5, "temperature": 0}
    said = json.loads(call("/v1/chat/completions", body))
    assert said["choices"][0]["message"]["content"].strip() == answer
    log = server.read_text()
    assert "zipvl: sparse prefill of every prompt (ratio 0.4, window 64 and 4 sinks)" in log
    assert "a prompt of 2613 tokens got 35 blocks, 47 less than without zipvl" in log
    assert "zipvl: a prompt of 2613 tokens: kept 40." in log
    metrics = call("/metrics")
    values = {line.split(" ")[0]: float(line.split(" ")[-1]) for line in metrics.splitlines() if line[:6] == "zipvl_"}
    assert values["zipvl_saved_blocks_total"] == 47 and values["zipvl_prompt_blocks_total"] == 35
    assert values["zipvl_prompt_tokens_total"] == 2613 and 1040 < values["zipvl_kept_tokens_total"] < 1120
