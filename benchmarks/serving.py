"""vLLM with the plug-in and without: time to first token, requests per second, and how many requests fit.

``python -m benchmarks.serving`` serves a model of Qwen2-7B's shape with dummy weights by an unmodified vLLM, once as it
is and once for each setting of zipvl, with the same flags. The load is vLLM's own bench client (``vllm bench serve``,
random prompts). With ``--in-process`` each engine is driven directly, in a process of its own, without server, client
and tokenizer: as many requests at a time, a new one for each that ends. Each line of
``benchmarks/results/serving.jsonl`` names vLLM's version, its attention backend and its flags. ``--smoke``: a tiny
shape on the CPU.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import queue
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import _record
from benchmarks._models import QWEN2_7B, Shape
from zipvl.vllm import versions

PORT = 8741
SETTINGS: dict[str, dict[str, Any] | None] = {
    "vLLM": None,
    "full": {"ratio": 0.25},
    "drop": {"ratio": 0.25, "cache": "drop"},
}
SMOKE_SHAPE = Shape(layers=2, hidden=128, heads=2, kv_heads=2, head_dim=64, mlp=192, vocab=2000)
WORDS = 1000  # of the tokenizer, each a token
# As `vllm bench serve`, whose command line a CPU build of vLLM cannot start.
CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())\n"
)


@dataclass(frozen=True)
class Load:
    """Prompts of ``tokens`` tokens, ``concurrency`` at a time, ``requests`` in all, with ``new`` tokens each."""

    tokens: int
    concurrency: int
    requests: int
    new: int


def make_model(folder: Path, shape: Shape, longest: int) -> None:
    """A configuration of ``shape`` and a tokenizer of a thousand words in ``folder``; weights are vLLM's dummies."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = shape.config(longest)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "model_max_length": longest})
    )


def engine_flags(model: Path, options: dict[str, Any] | None, flags: list[str], longest: int) -> list[str]:
    """Of vLLM's engine. ``options``: of zipvl, None for vLLM as it is."""
    given = ["--model", str(model), "--load-format", "dummy"]
    # One step holds a prompt, for both: what `drop` needs, and what gives dense attention its best time to first token.
    given += ["--max-model-len", str(longest), "--max-num-batched-tokens", str(longest + 256)]
    given += ["--max-num-seqs", "64", "--no-enable-prefix-caching", *flags]
    if options is not None:
        given += ["--additional-config", json.dumps({"zipvl": options})]
    return given


@contextmanager
def server(model: Path, options: dict[str, Any] | None, flags: list[str], longest: int) -> Iterator[str]:
    """A running server; gives its log so far."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--served-model-name", "model", "--port", str(PORT), "--host", "127.0.0.1"]
    command += engine_flags(model, options, flags, longest)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(1200):
                if process.poll() is not None:
                    raise RuntimeError(f"the server ended:\n{Path(log.name).read_text()[-4000:]}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield Path(log.name).read_text()
        finally:
            process.terminate()
            process.wait(120)


def measure(model: Path, load: Load) -> dict[str, float]:
    """What the client measured, after one prompt to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CLIENT, "--backend", "openai", "--endpoint", "/v1/completions"]
        command += ["--host", "127.0.0.1", "--port", str(PORT), "--model", "model", "--tokenizer", str(model)]
        command += ["--dataset-name", "random", "--random-input-len", str(load.tokens)]
        command += ["--random-output-len", str(load.new), "--random-range-ratio", "0", "--ignore-eos", "--seed", "0"]
        command += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)]
        command += ["--num-warmups", "1", "--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the client failed:\n{(done.stdout + done.stderr)[-4000:]}")
        found = json.loads((Path(folder) / "result.json").read_text())
    if found["completed"] != load.requests:
        raise RuntimeError(f"{found['completed']} of {load.requests} requests were answered")
    return {
        "ttft_ms": found["median_ttft_ms"],
        "tpot_ms": found["median_tpot_ms"],
        "requests_per_second": found["request_throughput"],
    }


class Log(logging.Handler):
    """What vLLM logs in this process, as text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def engine(model: Path, options: dict[str, Any] | None, flags: list[str], longest: int) -> Iterator[tuple[Any, str]]:
    """An engine in this process, and its log so far."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.logger  # noqa: F401, configures the loggers
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    log = Log()
    logging.getLogger("vllm").addHandler(log)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(
        [*engine_flags(model, options, flags, longest), "--skip-tokenizer-init", "--disable-log-stats"]
    )
    made = LLMEngine.from_engine_args(EngineArgs.from_cli_args(given))
    try:
        yield made, "\n".join(log.lines)
    finally:
        made.engine_core.shutdown()


def drive(engine: Any, load: Load) -> dict[str, float]:
    """What a client of this process measures, after one prompt to warm up."""
    _drive(engine, Load(load.tokens, 1, 1, 4), "warm")
    return _drive(engine, load, f"{load.tokens}-{load.concurrency}")


def _drive(engine: Any, load: Load, name: str) -> dict[str, float]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    draw = random.Random(name)
    prompts = [[draw.randrange(WORDS) for _ in range(load.tokens)] for _ in range(load.requests)]
    how = SamplingParams(
        temperature=0, max_tokens=load.new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    done: dict[str, float] = {}
    begin = time.perf_counter()
    while len(done) < load.requests:
        while len(sent) < min(load.requests, len(done) + load.concurrency):
            number, now = f"{name}-{len(sent)}", time.perf_counter()
            engine.add_request(number, {"prompt_token_ids": prompts[len(sent)]}, how)
            sent[number] = now
        for out in engine.step():
            now = time.perf_counter()
            if any(one.token_ids for one in out.outputs):
                first.setdefault(out.request_id, now)
            if out.finished:
                done[out.request_id] = now
    end = time.perf_counter()
    return {
        "ttft_ms": 1e3 * statistics.median(first[number] - sent[number] for number in sent),
        "tpot_ms": 1e3 * statistics.median((done[number] - first[number]) / max(load.new - 1, 1) for number in sent),
        "requests_per_second": load.requests / (end - begin),
    }


def facts(log: str) -> dict[str, Any]:
    """What a server says of itself: its attention backend, and how many requests of the greatest length fit."""
    backend = re.findall(r"Using (?:\w+\.)?(\w+) (?:attention )?backend", log) or re.findall(
        r"backend[: ]+(\w+_ATTN)", log
    )
    version = re.findall(r"Using FlashAttention version (\d)", log)
    fits = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", log)
    return {
        "backend": backend[-1] if backend else None,
        "flash_attention": int(version[-1]) if version else None,
        "fits": float(fits[1]) if fits else None,
    }


@dataclass(frozen=True)
class Run:
    """One setting under all loads."""

    name: str
    loads: list[Load]
    shape: Shape
    flags: list[str]
    longest: int
    in_process: bool
    record: bool

    def lines(self) -> Iterator[dict[str, Any]]:
        """What each load measured, recorded as soon as it is there."""
        options = SETTINGS[self.name]
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder)
            make_model(model, self.shape, self.longest)
            with ExitStack() as stack:
                if self.in_process:
                    made, log = stack.enter_context(engine(model, options, self.flags, self.longest))
                else:
                    log = stack.enter_context(server(model, options, self.flags, self.longest))
                about = {"setting": self.name, "vllm": versions.installed(), "in_process": self.in_process}
                about |= {"max_model_len": self.longest, **facts(log)}
                for load in self.loads:
                    found = drive(made, load) if self.in_process else measure(model, load)
                    line = about | vars(load) | found
                    if self.record:
                        device = "cuda" if torch.cuda.is_available() else "cpu"
                        _record.append("serving", line | {"options": options, "flags": self.flags}, device)
                    yield line

    def send(self, lines: Any) -> None:
        """To a queue: for a process of its own, whose end is the one sure way to have the engine's memory back."""
        for line in self.lines():
            lines.put(line)


def apart(run: Run) -> Iterator[dict[str, Any]]:
    """The lines of a run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    process = context.Process(target=run.send, args=(lines,))
    process.start()
    for _ in run.loads:
        while True:
            try:
                yield lines.get(timeout=5)
                break
            except queue.Empty:
                if not process.is_alive():
                    raise RuntimeError(f"the process of {run.name} ended, with {process.exitcode}") from None
    process.join()


def show(lines: list[dict[str, Any]]) -> Table:
    """Times and rates, and how many times the peer's."""
    table = Table(
        "tokens", "at a time", "setting", "first token, ms", "token, ms", "requests/s", "fit", title="Serving"
    )
    peers = {(line["tokens"], line["concurrency"]): line for line in lines if line["setting"] == "vLLM"}
    for line in lines:
        peer = peers.get((line["tokens"], line["concurrency"]), line)
        fits = "-" if line["fits"] is None else f"{line['fits']:.1f} ({line['fits'] / peer['fits']:.2f}x)"
        table.add_row(
            f"{line['tokens']:,}",
            str(line["concurrency"]),
            line["setting"],
            f"{line['ttft_ms']:.0f} ({peer['ttft_ms'] / line['ttft_ms']:.2f}x)",
            f"{line['tpot_ms']:.1f}",
            f"{line['requests_per_second']:.3f} ({line['requests_per_second'] / peer['requests_per_second']:.2f}x)",
            fits,
        )
    return table


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt lengths at a concurrency of 1.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Concurrencies with prompts of 32,768 tokens.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SETTINGS)}. [all]")] = None,
    new: Annotated[int, typer.Option(help="New tokens of a request.")] = 128,
    rounds: Annotated[int, typer.Option(help="Requests one after another, of each that runs at a time.")] = 2,
    flag: Annotated[list[str] | None, typer.Option(help="Further flag of the server, for both.")] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="Without server and client.")] = False,
    smoke: Annotated[bool, typer.Option(help="A tiny shape on the CPU: whether it works.")] = False,
    record: Annotated[bool, typer.Option(help="Append to benchmarks/results/serving.jsonl.")] = True,
) -> None:
    """Serves with and without zipvl under the same load."""
    chosen = setting or list(SETTINGS)
    if unknown := set(chosen) - set(SETTINGS):
        raise typer.BadParameter(f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    lengths, at_once = tokens or [4096, 8192, 32768, 131072], concurrency or [1, 8, 32]
    if rounds < 1:
        raise typer.BadParameter(f"rounds must be at least 1, got {rounds}")
    shape, flags = QWEN2_7B, ["--dtype", "bfloat16", *(flag or [])]
    loads = [Load(n, 1, rounds * (2 if n > 32768 else 4), new) for n in lengths]
    loads += [Load(32768, c, max(rounds * c, 4 * rounds), new) for c in at_once if c > 1 or 32768 not in lengths]
    if smoke:
        shape, flags = SMOKE_SHAPE, ["--dtype", "float32", "--enforce-eager", *(flag or [])]
        loads = [Load(600, 1, 2, 8), Load(600, 2, 4, 8)]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    longest = max(load.tokens + load.new for load in loads) + 64
    lines: list[dict[str, Any]] = []
    for name in chosen:
        run = Run(name, loads, shape, flags, longest, in_process, record and not smoke)
        for line in apart(run) if in_process else run.lines():
            Console().print_json(json.dumps(line))
            lines.append(line)
    Console().print(show(lines))


if __name__ == "__main__":
    typer.run(main)
