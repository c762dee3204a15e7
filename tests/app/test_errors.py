"""Every mistake of the caller: exit code 2, one line on stderr that names the option, nothing on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from zipvl.app.loading import resolve_device

from . import tiny

Zipvl = Callable[..., Result]
DATA_URL = "data:image/png;base64," + "A" * 6000


def refused(result: Result, *parts: str) -> None:
    """Asserts the one line, and that it holds each of ``parts``."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("zipvl: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", ["run", "inspect"])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tau", "0"], ["--tau: must be in (0, 1], got 0.0"]),
        (["--tau", "1.5"], ["--tau: must be in (0, 1], got 1.5"]),
        (["--tau", "nan"], ["--tau: must be in (0, 1], got nan"]),
        (["--tau", "much"], ["'--tau'", "number"]),
        (["--ratio", "-0.1"], ["--ratio: must be in (0, 1], got -0.1"]),
        (["--cache", "some"], ["--cache: must be one of ('drop', 'quantize', 'full'), got 'some'"]),
        (["--seed", "-1"], ["--seed: must be an integer of at least 0, got -1"]),
        (["--seed", "99999999999999999999"], ["--seed: must be below 2**63, got 99999999999999999999"]),
        (["--dense-below", "-1"], ["--dense-below: must be an integer of at least 0, got -1"]),
        (["--dense-below=--5"], ["--dense-below: must be \"auto\" or an integer of at least 0, got '--5'"]),
        (["--max-ratio", "0"], ["--max-ratio: must be in (0, 1], got 0.0"]),
        (["--local-window", "-1"], ["--local-window: must be an integer of at least 0, got -1"]),
        (["--num-sinks", "-4"], ["--num-sinks: must be an integer of at least 0, got -4"]),
        (["--dense-first-layers", "-1"], ["--dense-first-layers: must be an integer of at least 0, got -1"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens: must be at least 1, got 0"]),
        (["--dense-below", "--5"], ["--dense-below: must be"]),
        (["--question", " "], ["--question: expected a question, got an empty text"]),
        (["--question", "caf\udce9"], ["--question: expected a text in utf-8, got 'caf\\udce9'"]),
        (["--device", "abacus"], ["--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"]),
        (["--device", "meta"], ["--device: expected auto, cpu, cuda or cuda:N, got 'meta'"]),
        (["--device", "cuda:99"], ["--device: 'cuda:99' asked for, but"]),
        (["--dtype", "int8"], ["--dtype: expected auto, float32, bfloat16, float16, got 'int8'"]),
        (["--colour"], ["No such option: --colour"]),
    ],
    ids=lambda value: "=".join(value) if value and value[0].startswith("--") and len(value) < 3 else "",
)
def test_options(
    zipvl: Zipvl, page: Path, llava_next: Path, command: str, options: list[str], parts: list[str]
) -> None:
    given = [command, "--image", page, "--question", "KQ", "--model", llava_next, *options]
    refused(zipvl(*given), *parts)


def test_a_question_in_another_encoding_than_the_shells(page: Path) -> None:
    """The bytes as a process gets them."""
    command = [sys.executable, "-m", "zipvl", "run", "--image", page, "--question", b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONUTF8": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "zipvl: --question: expected a text in utf-8, got 'caf\\udce9'\n"


def test_missing_options_and_unknown_command(zipvl: Zipvl, page: Path) -> None:
    refused(zipvl("run", "--question", "KQ"), "--image")
    refused(zipvl("run", "--image", page), "--question")
    refused(zipvl("dance"), "dance")


def test_a_build_without_cuda_on_a_machine_with_a_gpu(
    zipvl: Zipvl, page: Path, llava_next: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, CUDA is refused with the reason; ``auto`` takes the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch._C._dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr("zipvl._library.cuda_library_error", lambda: "this build has no CUDA library")
    given = ["run", "--image", page, "--question", "KQ", "--model", llava_next]
    refused(zipvl(*given, "--device", "cuda"), "--device: 'cuda' asked for, but", "this build has no CUDA library")
    assert resolve_device("auto").type == "cpu"


def test_images(zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path) -> None:
    def ask(image: Path) -> Result:
        return zipvl("run", "--image", image, "--question", "KQ", "--model", llava_next)

    refused(ask(tmp_path / "none.png"), "--image: expected a picture file", "does not exist")
    refused(ask(tmp_path), "--image: expected a picture file", "is a directory")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refused(ask(text), "--image: expected a readable picture", "text.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(page.read_bytes()[:150])
    refused(ask(cut), "--image: expected a readable picture", "cut.png")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    refused(ask(empty), "--image: expected a readable picture", "empty.jpg")
    refused(ask(Path(DATA_URL)), "--image: expected a picture file", "data:image/png", "File name too long")
    refused(zipvl("inspect", "--image", DATA_URL, "--question", "KQ"), "--image: expected a picture file")


def test_models_that_are_not_there(zipvl: Zipvl, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(model: str | Path) -> Result:
        return zipvl("run", "--image", page, "--question", "KQ", "--model", model)

    refused(ask(tmp_path / "none"), "--model: expected a folder or a hub id", "neither")
    refused(ask("~nobody-of-that-name/model"), "--model: expected a folder or a hub id", "neither")
    refused(ask(DATA_URL), "--model: expected a folder or a hub id", "neither")
    refused(ask(page), "--model: expected a folder or a hub id", "is a file")
    refused(ask(tmp_path), "--model: expected a model folder", "has no config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(ask("nobody/no-model"), "--model: nobody/no-model is no folder here", "HF_HUB_OFFLINE")


def test_models_that_do_not_fit(zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path) -> None:
    def ask(model: Path) -> Result:
        return zipvl("run", "--image", page, "--question", "KQ", "--model", model)

    text = tmp_path / "text"
    tiny.text_config().save_pretrained(text)
    refused(ask(text), "--model: expected an image-text-to-text model", "'llama'")

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    refused(ask(broken), "--model:", "its configuration cannot be read")
    (broken / "config.json").write_text(json.dumps({"model_type": "never_heard_of"}))
    refused(ask(broken), "--model:", "its configuration cannot be read", "never_heard_of")

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((llava_next / "config.json").read_bytes())
    refused(ask(bare), "--model:", "its processor cannot be loaded")

    mute = tmp_path / "mute"
    tiny.save_llava_next(mute, chat_template=None)
    refused(ask(mute), "--model:", "has no chat template")

    damaged = tmp_path / "damaged"
    tiny.save_llava_next(damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    refused(ask(damaged), "--model:", "its weights cannot be loaded")
    (damaged / "model.safetensors").unlink()
    refused(ask(damaged), "--model:", "its weights cannot be loaded")


def test_no_default_model(zipvl: Zipvl, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIPVL_MODEL", raising=False)
    monkeypatch.setattr("zipvl.app.loading.__file__", str(tmp_path / "zipvl" / "app" / "loading.py"))
    refused(zipvl("run", "--image", page, "--question", "KQ"), "--model: there is no default model", "ZIPVL_MODEL")


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("out.pdf", "expected a file name ending in .html or .png"),
        ("folder.png", "is a directory"),
        ("none/out.png", "existing directory"),
        ("/proc/out.png", "expected a writable directory"),
        ("long" * 70 + ".png", "File name too long"),
    ],
)
def test_outputs(zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path, output: str, part: str) -> None:
    (tmp_path / "folder.png").mkdir()
    result = zipvl("inspect", "--image", page, "--question", "KQ", "--model", llava_next, "--output", tmp_path / output)
    refused(result, "--output: ", part)


def test_a_missing_package_is_a_line(
    zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "zipvl.app.png", raising=False)
    output = tmp_path / "out.png"
    result = zipvl("inspect", "--image", page, "--question", "KQ", "--model", llava_next, "--output", output)
    assert result.exit_code == 1 and result.stdout == "" and list(tmp_path.iterdir()) == []
    assert "matplotlib" in result.stderr and result.stderr.endswith("(pip install 'zipvl[cli]')\n")


@pytest.mark.slow
def test_unreachable_hub_is_a_quick_line(page: Path, tmp_path: Path) -> None:
    """A real process, its hub a closed port and its cache empty: one line, no traceback, no minute of retries."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "zipvl", "run", "--image", page, "--question", "KQ", "--model", "nobody/no-model"]
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("zipvl: --model: nobody/no-model is no folder here"), done.stderr
    assert "the hub is not reachable" in done.stderr and done.stderr.count("\n") == 1
    assert time.monotonic() - start < 90, "the hub's own retries take minutes"


@pytest.mark.slow
def test_an_output_that_takes_no_more_is_a_line(page: Path, llava_next: Path) -> None:
    """A full disk; a pipe whose reader is gone needs no word."""
    command = [sys.executable, "-m", "zipvl", "run", "--image", page, "--question", "KQ", "--model", llava_next]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr == "zipvl: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "zipvl", "doctor"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""
