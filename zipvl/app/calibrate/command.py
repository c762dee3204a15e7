"""``zipvl calibrate`` from its options to its exit code."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from zipvl.app.calibrate.candidates import ENGINES, GOALS, Engine, Goal, beside, candidates, full_name
from zipvl.app.calibrate.measure import Measurer
from zipvl.app.calibrate.outcome import Request, calibrate, write
from zipvl.app.calibrate.samples import QUESTION, Sample, read
from zipvl.app.calibrate.search import Aim
from zipvl.app.calibrate.settings import DENSE, config
from zipvl.app.calibrate.show import draw, print_outcome
from zipvl.app.loading import default_model, load, shipped_pages
from zipvl.errors import InputError, first_line, shortened
from zipvl.transformers.mlp import layers_whose_mlps_can_skip

__all__ = ["Options", "run_command"]

_PICTURES = (".png", ".svg", ".pdf")
_GPU_BATCH = 8


@dataclass(frozen=True)
class Options:
    """The command's options, as they were given."""

    model: str | None
    data: Path | None
    max_loss: str
    goal: str
    confidence: str
    output: Path
    plot: Path | None
    minutes: float
    settings: tuple[str, ...]
    engine: str
    question: str | None
    batch_size: int | None
    dense_below: int
    max_new_tokens: int
    seed: int
    work: Path | None
    device: str
    dtype: str
    as_json: bool


def run_command(options: Options, say: Callable[[str], None]) -> bool:
    """Calibrates, prints and writes; whether a setting was found.

    Raises:
        InputError: an option is not what was expected.
    """
    aim = Aim(_share("max_loss", options.max_loss), _share("confidence", options.confidence), _goal(options.goal))
    engine = _engine(options.engine)
    for name, least in (("minutes", 0), ("max_new_tokens", 1), ("batch_size", 1), ("dense_below", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and (not value >= least or math.isinf(value) or (name == "minutes" and value == 0)):
            raise InputError(name, f"must be {'above' if name == 'minutes' else 'at least'} {least}, got {value}")
    plot = options.plot or options.output.with_suffix(".png")
    if plot.suffix.lower() not in _PICTURES:
        raise InputError("plot", f"expected a file name ending in {', '.join(_PICTURES)}, got {shortened(plot)}")
    for name, path in (("output", options.output), ("plot", plot)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(name, f"expected a file in an existing directory, got {shortened(path)}")
    samples = _samples(options)
    pictures = any(sample.image is not None for sample in samples)
    fields = beside(engine, any(sample.image is None for sample in samples), options.dense_below)
    names = _given(options, engine, pictures, fields)

    source = options.model or default_model()
    say(f"loading {source}")
    loaded = load(source, device=options.device, dtype=options.dtype, text=not pictures)
    for note in loaded.notes:
        typer.echo(f"zipvl: note: {note}", err=True)
    try:
        mlps = layers_whose_mlps_can_skip(loaded.model)
    except ValueError as error:  # the model cannot be sparse at all
        raise InputError("model", str(error).removeprefix("zipvl.sparse: ")) from error
    names = names or candidates(aim.goal, engine, pictures, mlps)
    work = options.work or options.output.with_name(f"{options.output.stem}-calibration")
    with _progress(options.minutes) as (tick, stage):
        try:
            measurer = Measurer(
                loaded,
                samples,
                fields,
                work,
                max_new_tokens=options.max_new_tokens,
                batch=options.batch_size or (_GPU_BATCH if loaded.device.type == "cuda" else 1),
                seconds=60 * options.minutes,
                tick=tick,
            )
            request = Request(aim, options.data or shipped_pages(), tuple(names), options.seed)
            facts = calibrate(measurer, samples, request, stage)
            if facts["setting"] is not None:
                write(measurer, facts, options.output)
        except KeyboardInterrupt:
            typer.echo(f"zipvl: stopped; the same command goes on from {work}", err=True)
            raise typer.Exit(130) from None
        except OSError as error:
            raise InputError("work", f"results cannot be written: {error.strerror or first_line(error)}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        draw(facts, plot)
    if options.as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_outcome(facts, options.output, plot)
    return facts["setting"] is not None


def _share(name: str, text: str) -> float:
    """The share that ``1%`` or ``0.01`` says."""
    number, sign = text.strip(), 1.0
    if number.endswith("%"):
        number, sign = number[:-1], 100.0
    try:
        share = float(number) / sign
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise InputError(name, f"expected a share above 0% and below 100%, such as 1% or 0.01, got {text!r}")
    return share


def _goal(text: str) -> Goal:
    if text not in GOALS:
        raise InputError("goal", f"expected {', '.join(GOALS)}, got {text!r}")
    return cast(Goal, text)


def _engine(text: str) -> Engine:
    if text not in ENGINES:
        raise InputError("engine", f"expected {' or '.join(ENGINES)}, got {text!r}")
    return cast(Engine, text)


def _samples(options: Options) -> list[Sample]:
    if options.data is None and options.model is not None:
        raise InputError("data", "expected a folder or a JSONL file: the shipped pages are for the default model alone")
    if options.question is not None and not options.question.strip():
        raise InputError("question", "expected a question, got an empty text")
    return read(options.data or shipped_pages(), options.question or QUESTION)


def _given(options: Options, engine: Engine, pictures: bool, fields: dict[str, Any]) -> list[str]:
    """The candidates that were given, if any were."""
    names = list(dict.fromkeys(full_name(name, engine, pictures) for name in options.settings))
    for name in names:
        if DENSE in (part.strip() for part in name.split(",")):
            raise InputError("setting", f"expected a sparse setting, got {name!r}: dense attention is measured anyway")
        try:
            found = config(name, **fields)
        except ValueError as error:
            raise InputError("setting", str(error).removeprefix("ZipVLConfig: ")) from error
        if engine == "vllm" and found is not None:
            if found.keep_text or found.cache == "quantize" or found.skip_mlp_layers:
                can = "no text kept, no quantize, no MLPs skipped"
                raise InputError("setting", f"expected one that vLLM can follow ({can}), got {name!r}")
    return names


@contextmanager
def _progress(minutes: float) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar of the time that is allowed, where someone watches: what to call after samples, and at a new stage."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.fields[samples]} samples, {task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn(f"of {minutes:g} min"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        started, measured = time.monotonic(), 0
        task = bar.add_task("dense answers", total=60 * minutes, samples=0)

        def tick(samples: int) -> None:
            nonlocal measured
            measured += samples
            bar.update(task, completed=time.monotonic() - started, samples=measured)

        yield tick, lambda stage: bar.update(task, description=stage)
