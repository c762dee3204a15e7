"""Does ZipVL keep the answers of pretrained models? ``python -m benchmarks.fidelity`` (``--full`` on a GPU).

A pretrained text model (SmolLM2-135M-Instruct, fetched by pip) and models/tiny-llava-next, dense and under named
settings, through ``zipvl.sparse``: the next 128 tokens of code and prose against dense, keys hidden in a prompt,
questions about pages. Results go to benchmarks/results/fidelity.jsonl; docs/fidelity.md says how to read them.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

from benchmarks._record import ROOT, append
from benchmarks.fidelity import measure, show, smollm, texts
from benchmarks.fidelity.settings import DEFAULT, FULL
from zipvl.app.calibrate import settings
from zipvl.app.calibrate.journal import Journal, code_digest
from zipvl.app.machine import device_description

PARTS = ("text", "key", "page")
SIZES = {"text": (4, 24), "key": (12, 200), "page": (100, 1000)}
"""Samples of a measure, by default and with --full, which is the most."""
WORK = ROOT / "build" / "fidelity"


def main(
    full: Annotated[bool, typer.Option(help="All settings on all samples, for a GPU.")] = False,
    split: Annotated[str, typer.Option(help="tune or report: which samples; choose defaults on tune's alone.")] = (
        "report"
    ),
    only: Annotated[str, typer.Option(help="text, key, page, or several of them: text,key.")] = "text,key,page",
    setting: Annotated[
        list[str] | None, typer.Option(help="A setting such as 'tau 0.95, window 128, all queries, full'; repeatable.")
    ] = None,
    num_texts: Annotated[
        int | None, typer.Option("--texts", min=1, help="4 by default, 24 with --full, and at most.")
    ] = (None),
    num_keys: Annotated[int | None, typer.Option("--keys", min=1, help="12 by default, 200 with --full.")] = None,
    num_pages: Annotated[int | None, typer.Option("--pages", min=1, help="100 by default, 1,000 with --full.")] = None,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16; by default by device.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's, on a CPU.")] = None,
    cache_dir: Annotated[Path, typer.Option(help="Where the text model is, or is fetched to.")] = smollm.CACHE,
    work: Annotated[Path, typer.Option(help="Every sample measured, so that a run can be resumed.")] = WORK,
    record: Annotated[bool, typer.Option(help="Append the result to benchmarks/results.")] = True,
) -> None:
    """Measures settings, prints them and appends them to the results."""
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    parts = only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"--only: expected {', '.join(PARTS)}, got {', '.join(unknown)}")
    if split not in texts.SPLITS:
        sys.exit(f"--split: expected {' or '.join(texts.SPLITS)}, got {split}")
    if threads:
        torch.set_num_threads(threads)
    names = list(setting or (FULL if full else DEFAULT))
    try:
        for name in names:
            settings.config(name)
    except settings.SettingError as error:
        sys.exit(f"--setting: {error}")
    asked = {"text": num_texts, "key": num_keys, "page": num_pages}
    sizes = {part: min(asked[part] or SIZES[part][full], SIZES[part][1]) for part in parts}
    run = _Run(cast(texts.Split, split), names, sizes, torch.device(device), dtype, cache_dir, work)
    started = time.perf_counter()
    try:
        run.measure()
    except smollm.FetchError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {work}", file=sys.stderr)
        raise typer.Exit(130) from None
    line = run.line() | {"full": full, "seconds": round(time.perf_counter() - started, 1)}
    if record:
        append("fidelity", line, run.device)
    Console(width=None if sys.stdout.isatty() else 230).print(show.table(line))


class _Run:
    """One command's measures."""

    def __init__(
        self,
        split: texts.Split,
        names: list[str],
        sizes: dict[str, int],
        device: torch.device,
        dtype: str,
        cache_dir: Path,
        work: Path,
    ) -> None:
        self.split, self.names, self.sizes, self.device = split, names, sizes, device
        self.dtype = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        self.cache_dir = cache_dir
        self.samples: dict[str, list[str]] = {}
        self.facts: dict[str, Any] = {}
        self.journals: dict[str, Journal] = {}
        self.work = work

    def _journal(self, model: str, **facts: Any) -> Journal:
        origin = {
            "code": code_digest(),
            "device": device_description(self.device),
            "dtype": str(self.dtype),
            "torch": torch.__version__,
            "split": self.split,
        }
        return Journal(self.work / f"{model}.jsonl", origin | facts)

    def measure(self) -> None:
        """All samples that the journals do not have."""
        if self.sizes.keys() & {"text", "key"}:
            self._measure_text()
        if "page" in self.sizes:
            self._measure_pages()

    def _measure_text(self) -> None:
        model, tokenizer, digest = smollm.load(self.cache_dir, self.device, self.dtype)
        self.facts["text_model"] = {"name": "SmolLM2-135M-Instruct Q4_1", "sha256": digest}
        every: dict[str, Any] = {
            "text": texts.texts(tokenizer, self.split, SIZES["text"][1]),
            "key": texts.keys(tokenizer, self.split, SIZES["key"][1]),
        }
        runs: dict[str, Any] = {"text": measure.texts, "key": measure.keys}
        for part in [part for part in runs if part in self.sizes]:
            samples = every[part][: self.sizes[part]]
            self.facts[f"{part}_samples_sha256"] = texts.digest(samples)
            self.samples[part] = [sample.name for sample in samples]
            self.journals[part] = self._journal(part, weights=digest, samples=texts.digest(every[part]))
            runs[part](model, samples, self.names, self.journals[part])

    def _measure_pages(self) -> None:
        from benchmarks.paper.subject import Subject  # imports transformers, which must not be earlier than gguf

        subject = Subject(device=str(self.device), dtype=self.dtype)
        self.facts["page_model"] = {"name": "tiny-llava-next", "sha256": subject.weights, "batch": subject.batch}
        self.samples["page"] = measure.page_names(self.split, self.sizes["page"])
        self.journals["page"] = self._journal("page", weights=subject.weights, batch=subject.batch)
        measure.pages(subject, self.split, self.sizes["page"], self.names, self.journals["page"])

    def line(self) -> dict[str, Any]:
        """What is recorded."""
        rows = []
        for name in (settings.DENSE, *self.names):
            row: dict[str, Any] = {}
            for part, journal in self.journals.items():
                row |= measure.row(name, journal, {part: self.samples[part]})
            rows.append(row)
        facts = {"dtype": str(self.dtype).removeprefix("torch."), "split": self.split, "samples": self.sizes}
        return {"benchmark": "fidelity", **facts, **self.facts, "rows": rows}


if __name__ == "__main__":
    typer.run(main)
