"""``zipvl run``: both answers, times, cache sizes and the ratio of each layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import zipvl.app.cli as zipvl_cli
from zipvl import reference_cache

from . import tiny

Zipvl = Callable[..., Result]
NEW = 4
# The page is 100 x 130: tiles of 16 x 12 patches and 16 row ends, a base view of 8 x 8, and the question's 2 tokens.
PROMPT = 16 * (12 + 1) + 8 * 8 + 2
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head dim, float32


def run(zipvl: Zipvl, page: Path, model: Path, *options: str) -> Result:
    given = ["run", "--image", page, "--question", "KQ", "--model", model, "--max-new-tokens", NEW, *options]
    result = zipvl(*given)
    assert result.exit_code == 0, result.output
    return result


def facts(zipvl: Zipvl, page: Path, model: Path, *options: str) -> dict[str, Any]:
    return json.loads(run(zipvl, page, model, "--json", *options).stdout)


def test_json(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    got = facts(zipvl, page, llava_next, *tiny.PAPER, "--ratio", "0.3", "--seed", "7")
    assert got["model"] == str(llava_next) and got["default_model"] is False
    assert (got["device"], got["dtype"]) == ("cpu", "float32")
    assert got["image_size"] == [100, 130] and got["prompt_tokens"] == PROMPT
    assert got["config"]["ratio"] == 0.3 and got["config"]["seed"] == 7
    kept = -(-3 * PROMPT // 10)
    sparse = got["zipvl"]
    assert sparse["active"] is True and sparse["reasons_for_dense"] == []
    assert [layer["layer"] for layer in sparse["layers"]] == [0, 1, 2]
    for layer in sparse["layers"]:
        assert (layer["mode"], layer["reason"], layer["tokens"], layer["kept"]) == ("sparse", None, PROMPT, kept)
        assert layer["ratio"] == pytest.approx(kept / PROMPT)
    assert sparse["mean_ratio"] == pytest.approx(kept / PROMPT)
    for side in (got["dense"], sparse):
        assert side["new_tokens"] == NEW
        assert 0 < side["first_token_s"] < side["total_s"]
        seconds = side["total_s"] - side["first_token_s"]
        assert side["tokens_per_second"] == pytest.approx((NEW - 1) / seconds)
    assert got["same_answer"] == (got["dense"]["answer"] == sparse["answer"])


def test_cache_sizes_are_those_of_the_tensors_held(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    dropped = facts(zipvl, page, llava_next, *tiny.PAPER, "--ratio", "0.3")
    assert dropped["dense"]["cache_bytes"] == PROMPT * TOKEN_BYTES
    assert dropped["dense"]["final_cache_bytes"] == (PROMPT + NEW - 1) * TOKEN_BYTES
    layers = dropped["zipvl"]["layers"]
    lengths = 4  # one int32 a row and layer
    assert [layer["cache_bytes"] for layer in layers] == [layers[0]["kept"] * TOKEN_BYTES // 3 + lengths] * 3
    assert [layer["dense_cache_bytes"] for layer in layers] == [PROMPT * TOKEN_BYTES // 3] * 3
    visual = PROMPT  # one bool a token
    assert dropped["zipvl"]["cache_bytes"] == sum(layer["cache_bytes"] for layer in layers) + visual
    assert dropped["cache_share"] == dropped["zipvl"]["cache_bytes"] / dropped["dense"]["cache_bytes"]
    full = facts(zipvl, page, llava_next, *tiny.PAPER, "--ratio", "0.3", "--cache", "full")
    assert full["zipvl"]["cache_bytes"] >= PROMPT * TOKEN_BYTES
    assert full["zipvl"]["layers"][0]["kept"] == dropped["zipvl"]["layers"][0]["kept"]


def test_tau_one_is_dense_attention(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    got = facts(zipvl, page, llava_next, "--tau", "1")
    assert got["same_answer"] and got["zipvl"]["active"] and got["zipvl"]["mean_ratio"] == 1.0


def test_text(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    out = run(zipvl, page, llava_next, *tiny.PAPER, "--ratio", "0.25").stdout
    for part in (
        "dense",
        "ZipVL",
        "time to first token",
        "cache after the prompt",
        "KiB",
        "layer   2",
        "█",
        "25.2%",
        "tokens per second",
    ):
        assert part in out
    assert "the default" not in out and "not active" not in out


def test_a_run_that_stays_dense_says_so(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    options = ["--local-window", "32", "--num-sinks", "2", "--max-ratio", "0.5", "--dense-first-layers", "1"]
    got = facts(zipvl, page, llava_next, *options, "--no-keep-text")["config"]
    assert (got["local_window"], got["num_sinks"], got["max_ratio"], got["dense_first_layers"]) == (32, 2, 0.5, 1)
    assert not got["keep_text"]
    result = run(zipvl, page, llava_next, "--dense-below", "5000")
    assert "ZipVL was not active" in result.stdout
    assert "layers 0-2: prompt shorter than dense_below=5000" in result.stdout
    got = facts(zipvl, page, llava_next, "--dense-below", "5000")
    assert got["zipvl"]["active"] is False
    assert got["zipvl"]["reasons_for_dense"] == ["layers 0-2: prompt shorter than dense_below=5000"]
    assert got["same_answer"]


def test_a_cache_with_a_budget_of_its_own(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    options = [*tiny.PAPER, "--ratio", "0.5", "--cache-ratio", "0.25"]
    got = facts(zipvl, page, llava_next, *options)
    assert got["config"]["cache_ratio"] == 0.25
    stored = -(-PROMPT // 4)
    for layer in got["zipvl"]["layers"]:
        assert (layer["kept"], layer["stored"]) == (PROMPT // 2, stored)
        assert layer["cache_bytes"] == stored * TOKEN_BYTES // 3 + 4, "and one int32, the row's length"
    assert f"{PROMPT // 2} of {PROMPT}, {stored} stored" in run(zipvl, page, llava_next, *options).stdout
    given = ["--image", page, "--question", "KQ", "--model", llava_next, "--cache", "full", "--cache-ratio", "0.25"]
    result = zipvl("run", *given)
    assert result.exit_code == 2 and '--cache-ratio: must be None with cache="full", got 0.25' in result.stderr


def test_bfloat16_and_another_architecture(zipvl: Zipvl, page: Path, llava: Path) -> None:
    got = facts(zipvl, page, llava, "--dtype", "bfloat16", "--dense-below", "16", *tiny.PAPER, "--ratio", "0.5")
    assert got["dtype"] == "bfloat16" and got["prompt_tokens"] == tiny.GRID**2 + 2
    assert got["dense"]["cache_bytes"] == got["prompt_tokens"] * TOKEN_BYTES // 2
    assert [layer["kept"] for layer in got["zipvl"]["layers"]] == [33, 33, 33]


def test_a_refusal_of_zipvl_is_one_line(
    zipvl: Zipvl, page: Path, llava_next: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("zipvl.sparse: this one is an encoder-decoder, which is not supported")

    monkeypatch.setattr("zipvl.sparse", refuse)
    result = zipvl("run", "--image", page, "--question", "KQ", "--model", llava_next)
    assert result.exit_code == 2 and result.stdout == ""
    expected = (
        "--model: ZipVL cannot run this model: zipvl.sparse: this one is an encoder-decoder, which is not supported"
    )
    assert result.stderr == f"zipvl: {expected}\n"


def test_a_quantised_cache_that_the_model_cannot_have_is_one_line(zipvl: Zipvl, page: Path, llava_next: Path) -> None:
    result = zipvl("run", "--image", page, "--question", "KQ", "--model", llava_next, "--cache", "quantize")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "needs a head dimension that is a multiple of 32" in result.stderr


def test_a_quantised_cache(zipvl: Zipvl, page: Path, tmp_path: Path) -> None:
    tiny.save_llava_next(tmp_path, head_dim=32)
    got = facts(zipvl, page, tmp_path, *tiny.PAPER, "--ratio", "0.3", "--cache", "quantize")
    kept = -(-3 * PROMPT // 10)
    layers = got["zipvl"]["layers"]
    assert [layer["kept"] for layer in layers] == [kept] * 3
    blocks = [2 * (-(-kept // 64)), 2 * (-(-(PROMPT - kept) // 64))]  # two heads each
    segments = sum(
        n * reference_cache.block_bytes(32, bits, torch.float32) for n, bits in zip(blocks, (4, (4, 2)), strict=True)
    )
    window, queries, factor, counts = 2 * 2 * 100 * 32 * 4, 16 * (4 * 32 * 4 + 4), 2 * 32 * 4, 3 * 4
    assert [layer["cache_bytes"] for layer in layers] == [segments + window + queries + factor + counts] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("command", "encoding"), [("run", "latin-1"), ("inspect", "ascii")])
def test_a_process_of_its_own_and_what_stdout_cannot_encode(
    page: Path, llava_next: Path, tmp_path: Path, command: str, encoding: str
) -> None:
    """A page whose name is not UTF-8, a model's answer and bars on a stdout of another encoding, which has some of it:
    the rest is escaped. The model of ``ZIPVL_MODEL`` is used and named as the default; stderr stays empty."""
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(page.read_bytes())
    arguments = [sys.executable, "-m", "zipvl", command, "--image", name, "--question", "K\u00fc\u2588"]
    environment = {**os.environ, "ZIPVL_MODEL": str(llava_next), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    environment |= {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*arguments, "--max-new-tokens", "2"], env=environment, cwd=tmp_path, capture_output=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    if command == "run":
        assert f"{llava_next} (the default; --model for another)".encode() in done.stdout
        assert b"caf\\udce9.png" in done.stdout and b"####" in done.stdout and b"| answer" in done.stdout
        assert b"K\xfc\\u2588" in done.stdout
    else:
        assert b"caf\\udce9-zipvl.html" in done.stdout
        assert "K\u00fc\u2588" in (tmp_path / os.fsdecode(b"caf\xe9-zipvl.html")).read_text(encoding="utf-8")


def test_the_default_model_is_the_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zipvl.app.loading import default_model

    monkeypatch.delenv("ZIPVL_MODEL", raising=False)
    monkeypatch.setattr("zipvl.app.loading.__file__", str(tmp_path / "zipvl" / "app" / "loading.py"))
    folder = tmp_path / "models" / "tiny-llava-next"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert default_model() == str(folder)
    monkeypatch.chdir(tmp_path)
    assert default_model() == "models/tiny-llava-next"
    monkeypatch.setenv("ZIPVL_MODEL", "some/other")
    assert default_model() == "some/other"


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    """Help and usage errors wait for no import of torch; the package around the module is left out here."""
    code = f"""
import sys, types
package = types.ModuleType("zipvl")
package.__path__ = [{str(Path(zipvl_cli.__file__).parents[1])!r}]
sys.modules["zipvl"] = package
import zipvl.app.cli
print(sorted({{"torch", "transformers", "matplotlib", "PIL"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_help_and_version(zipvl: Zipvl) -> None:
    from zipvl import __version__

    assert zipvl("--version").stdout == f"zipvl {__version__}\n"
    for args in ([], ["--help"], ["-h"]):
        result = zipvl(*args)
        assert result.exit_code == 0 and all(name in result.stdout for name in ("run", "inspect", "doctor"))
