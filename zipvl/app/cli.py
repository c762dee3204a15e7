"""``zipvl``: ask a model about a page, look at what was kept, choose a setting, time it, see what is installed.

torch and transformers are imported inside the commands, so that help and usage errors come at once. Every mistake of
the caller is one line on stderr and exit code 2.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from zipvl.errors import InputError, first_line

if TYPE_CHECKING:
    from PIL import Image

    from zipvl.app.loading import Loaded
    from zipvl.config import ZipVLConfig

__all__ = ["app"]


class _OneLineErrors(TyperGroup):
    """A command group whose errors are one line on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; usage errors and ``InputError`` end in a line and exit code 2, a missing import in a line and 1."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: what its encoding lacks is escaped
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except InputError as error:
            _fail(str(error), error.exit_code)
        except typer.TyperException as error:
            _fail(error.format_message(), error.exit_code)
        except ImportError as error:
            hint = " (pip install 'zipvl[cli]')" if isinstance(error, ModuleNotFoundError) else ""
            _fail(f"{str(error).removeprefix('zipvl: ')}{hint}", 1)
        except typer.Abort:
            _fail("aborted", 1)
        except OSError as error:  # the reader of a pipe is gone, a disk is full
            sys.stdout = None  # which Python would try to empty once more
            _fail(f"{error.strerror or first_line(error)}", 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    typer.echo("zipvl: " + " ".join(message.split()), err=True)
    sys.exit(code)


app = typer.Typer(
    name="zipvl",
    cls=_OneLineErrors,
    help="ZipVL: sparse attention for vision-language models.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from zipvl import __version__

        typer.echo(f"zipvl {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


ImageOption = Annotated[Path, typer.Option("--image", "-i", help="The page: any picture file that Pillow reads.")]
QuestionOption = Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of an image-text-to-text model. Default: the tiny model."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="File of zipvl calibrate or ZipVLConfig.save; options beside it replace its fields."),
]
TauOption = Annotated[
    float | None,
    typer.Option(help="Share of the attention mass that kept tokens must hold, in (0, 1].", show_default="0.9"),
]
RatioOption = Annotated[
    float | None, typer.Option(help="Keep this share of the tokens in every layer, in (0, 1]; replaces --tau.")
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        help="full: store all tokens as they are; drop: the kept ones; quantize: all at few bits.", show_default="full"
    ),
]
CacheRatioOption = Annotated[
    float | None, typer.Option(help="With drop: store this share of the tokens in every layer, in (0, 1].")
]
DenseBelowOption = Annotated[
    str | None,
    typer.Option(
        help="Prompts of fewer tokens stay dense; auto: those for which ZipVL would be slower.", show_default="auto"
    ),
]
MaxRatioOption = Annotated[
    float | None, typer.Option(help="Largest share of the tokens that a layer keeps of its own choice, in (0, 1].")
]
WindowOption = Annotated[
    int | None, typer.Option(help="Every token sees this many tokens up to itself, kept or not; 0: none.")
]
SinksOption = Annotated[int | None, typer.Option(help="First tokens that every token sees; needs a window.")]
DenseLayersOption = Annotated[int | None, typer.Option(help="This many first layers stay dense.")]
KeepTextOption = Annotated[
    bool | None, typer.Option("--keep-text/--no-keep-text", help="Keep all text beside a page, on top. On by default.")
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the random probe tokens.", show_default="0")]
NewTokensOption = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]


@app.command()
def run(
    image: ImageOption,
    question: QuestionOption,
    model: ModelOption = None,
    config: ConfigOption = None,
    tau: TauOption = None,
    ratio: RatioOption = None,
    cache: CacheOption = None,
    cache_ratio: CacheRatioOption = None,
    dense_below: DenseBelowOption = None,
    max_ratio: MaxRatioOption = None,
    local_window: WindowOption = None,
    num_sinks: SinksOption = None,
    dense_first_layers: DenseLayersOption = None,
    keep_text: KeepTextOption = None,
    seed: SeedOption = None,
    max_new_tokens: NewTokensOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a question about a page, densely and with ZipVL, and compare."""
    chosen = _config(
        config,
        tau=tau,
        ratio=ratio,
        cache=cache,
        cache_ratio=cache_ratio,
        dense_below=dense_below,
        max_ratio=max_ratio,
        local_window=local_window,
        num_sinks=num_sinks,
        dense_first_layers=dense_first_layers,
        keep_text=keep_text,
        seed=seed,
    )
    page, notes = _page(image, question, max_new_tokens)
    loaded = _model(model, device, dtype, notes)

    from zipvl.app.run import ask

    _say("asking, ZipVL")
    sparse = ask(loaded.model, loaded.processor, page, question, chosen, max_new_tokens=max_new_tokens)
    _say("asking, dense")
    dense = ask(loaded.model, loaded.processor, page, question, max_new_tokens=max_new_tokens)

    from zipvl.app.show_run import print_run, run_facts

    facts = run_facts(loaded, model is None, image, page.size, question, chosen, dense, sparse)
    _print_json(facts) if as_json else print_run(facts)


@app.command()
def inspect(
    image: ImageOption,
    question: QuestionOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Report to write: .html or .png. Default: IMAGE-zipvl.html.")
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    tau: TauOption = None,
    ratio: RatioOption = None,
    cache: CacheOption = None,
    cache_ratio: CacheRatioOption = None,
    dense_below: DenseBelowOption = None,
    max_ratio: MaxRatioOption = None,
    local_window: WindowOption = None,
    num_sinks: SinksOption = None,
    dense_first_layers: DenseLayersOption = None,
    keep_text: KeepTextOption = None,
    seed: SeedOption = None,
    max_new_tokens: NewTokensOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Write a picture or web page of the patches that each layer kept."""
    chosen = _config(
        config,
        tau=tau,
        ratio=ratio,
        cache=cache,
        cache_ratio=cache_ratio,
        dense_below=dense_below,
        max_ratio=max_ratio,
        local_window=local_window,
        num_sinks=num_sinks,
        dense_first_layers=dense_first_layers,
        keep_text=keep_text,
        seed=seed,
    )
    page, notes = _page(image, question, max_new_tokens)

    from zipvl.app.inspect import check_output, inspect_page, write_report
    from zipvl.app.show_run import print_inspect

    output = output or Path(f"{image.stem}-zipvl.html")
    check_output(output)
    loaded = _model(model, device, dtype, notes)
    _say("asking, ZipVL")
    inspection = inspect_page(loaded, page, question, chosen, max_new_tokens=max_new_tokens)
    write_report(inspection, output)

    print_inspect(loaded, model is None, inspection, output)


@app.command()
def calibrate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder or hub id of an image-text-to-text model; for text of any model, or a .gguf file. "
            "Default: the tiny model.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures, or JSONL of image, question and answer, or of prompt. Default: shipped pages."
        ),
    ] = None,
    max_loss: Annotated[str, typer.Option(help="Largest loss that is allowed, such as 1% or 0.01.")] = "1%",
    goal: Annotated[
        str, typer.Option(help="What to gain: ttft (time to first token), memory or answer (its time).")
    ] = "ttft",
    confidence: Annotated[str, typer.Option(help="Of the bound, such as 95% or 0.95.")] = "95%",
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the setting that is found.")] = Path(
        "zipvl.json"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="Picture of loss against the goal: .png, .svg or .pdf. Default: OUTPUT.png.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Time to measure in; where it is short, fewer candidates are tried.")
    ] = 30.0,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A candidate, such as 'tau 0.9, window 512, full', in place of the usual ones; repeatable."),
    ] = None,
    engine: Annotated[str, typer.Option(help="What the setting is for: transformers or vllm.")] = "transformers",
    question: Annotated[str | None, typer.Option("--question", "-q", help="Asked about pictures without one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts whose loss is measured together. Default: 1 on a CPU, 8 on a GPU.")
    ] = None,
    dense_below: Annotated[int, typer.Option(help="Prompts of fewer tokens stay dense.")] = 256,
    max_new_tokens: NewTokensOption = 32,
    seed: Annotated[int, typer.Option(help="Seed of which samples choose and which report.")] = 0,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of what was measured, so that a run can be resumed. Default: OUTPUT-calibration."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the fastest setting whose loss on your own samples is below a bound, and write it to a file."""
    from zipvl.app.calibrate.command import Options, run_command

    options = Options(
        model=model,
        data=data,
        max_loss=max_loss,
        goal=goal,
        confidence=confidence,
        output=output,
        plot=plot,
        minutes=minutes,
        settings=tuple(setting or ()),
        engine=engine,
        question=question,
        batch_size=batch_size,
        dense_below=dense_below,
        max_new_tokens=max_new_tokens,
        seed=seed,
        work=work,
        device=device,
        dtype=dtype,
        as_json=as_json,
    )
    _hush()
    found = run_command(options, _say)
    raise typer.Exit(0 if found else 1)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what is installed, which ops run natively, and why not otherwise; exit code 1 if an op is broken."""
    from zipvl.app.doctor import examine

    facts = examine()
    if as_json:
        _print_json(facts)
    else:
        from zipvl.app.show_doctor import print_doctor

        print_doctor(facts)
    raise typer.Exit(0 if facts["healthy"] else 1)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or hub id of your own model. Default: random weights."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", "-i", help="With --model: the page that it is asked about.")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Share of the tokens that every layer keeps, in (0, 1].")] = 0.25,
    budget_s: Annotated[float, typer.Option(help="Seconds; rows that do not fit are not run.")] = 120.0,
    device: DeviceOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Time one layer, the first token and an answer on this GPU, dense and with ZipVL; exit code 1 if nothing ran."""
    config = _checked(ratio=ratio, text_prompts="sparse")
    if not 0 < budget_s < float("inf"):
        raise InputError("budget_s", f"expected a number of seconds above 0, got {budget_s:g}")
    if (model is None) != (image is None):
        given, other = ("image", "--model") if model is None else ("model", "--image")
        raise InputError(given, f"expected {other} beside it: a model of your own is asked about a page of yours")
    if json_file is not None:
        from zipvl.app.files import check_file

        check_file("json", json_file)

    from zipvl.app.timing import Budget

    budget = Budget(budget_s)
    page, notes = (None, []) if image is None else _page(image, "?", 1)

    from zipvl.app import bench as benching
    from zipvl.app.loading import gpu_problem, resolve_device

    where = resolve_device(device)
    no_gpu = gpu_problem() if device == "auto" else None
    if no_gpu is not None and model is not None:
        raise InputError("device", f"{no_gpu}; --device cpu times {model} on the CPU")
    _hush()
    if no_gpu is not None:
        subject = benching.absent_subject()
    elif model is None or page is None:
        subject = benching.random_subject(where)
    else:
        subject = benching.loaded_subject(_model(model, device, "auto", notes), page, config)
    run = benching.Bench(subject, config, where, budget, _say, refused=None if no_gpu is None else "no GPU")
    run.run()

    from zipvl.app.show_bench import print_bench

    facts = run.facts() | {"no_gpu": no_gpu}
    print_bench(facts)
    if json_file is not None:
        from zipvl.app.files import write_file

        write_file("json", json_file, (json.dumps(facts, indent=2) + "\n").encode())
    if run.interrupted:
        raise typer.Exit(130)
    raise typer.Exit(0 if any(row.measured for row in run.rows) else 1)


def _config(file: Path | None, **values: Any) -> ZipVLConfig:
    """The configuration of ``file``, or ``ZipVLConfig()`` without one, with ``values``, of a model that is shown pages;
    an option that was not given, None, changes nothing."""
    from zipvl.config import ZipVLConfig, read_fields

    fields: dict[str, Any] = {}
    if file is not None:
        try:
            fields = read_fields(file)
            ZipVLConfig(**fields)
        except ValueError as error:
            raise InputError("config", str(error).removeprefix("ZipVLConfig: ")) from error
    fields |= {name: value for name, value in values.items() if value is not None}
    with suppress(KeyError, TypeError, ValueError):  # a word, such as auto
        fields["dense_below"] = int(fields["dense_below"])
    return _checked(**fields).for_model(visual=True)


def _checked(**fields: Any) -> ZipVLConfig:
    """A configuration; what is wrong with an option of it is said as of that option."""
    from zipvl.config import ZipVLConfig

    try:
        return ZipVLConfig(**fields)
    except ValueError as error:
        name, _, rest = str(error).removeprefix("ZipVLConfig: ").partition(" ")
        raise InputError(name, rest) from error


def _page(image: Path, question: str, max_new_tokens: int) -> tuple[Image.Image, list[str]]:
    """The picture and remarks about it, once the options beside it are checked."""
    if not question.strip():
        raise InputError("question", "expected a question, got an empty text")
    try:
        question.encode()
    except UnicodeEncodeError as error:  # Python hands over the bytes of an argument that it cannot decode
        raise InputError("question", f"expected a text in {sys.getfilesystemencoding()}, got {question!r}") from error
    if max_new_tokens < 1:
        raise InputError("max_new_tokens", f"must be at least 1, got {max_new_tokens}")

    from zipvl.app.images import load_image

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        page = load_image(image)
    return page, [str(warning.message) for warning in caught]


def _model(model: str | None, device: str, dtype: str, notes: Sequence[str]) -> Loaded:
    """The model of that name, or the default; then ``notes`` and its own are said."""
    from zipvl.app.loading import default_model, load

    _hush()
    name = default_model() if model is None else model
    _say(f"loading {name}")
    loaded = load(name, device=device, dtype=dtype)
    for note in (*notes, *loaded.notes):
        typer.echo(f"zipvl: note: {note}", err=True)
    return loaded


def _hush() -> None:
    """Keep transformers' and the hub's own progress bars and advice off the terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def _say(what: str) -> None:
    """Progress, where someone watches."""
    if sys.stderr.isatty():
        typer.echo(f"{what} ...", err=True)


def _print_json(facts: dict[str, Any]) -> None:
    typer.echo(json.dumps(facts, indent=2))
