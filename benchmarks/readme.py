"""Writes the tables of README.md and of pages in docs/ (``PAGES``) from benchmarks/results:
``python -m benchmarks.readme`` (``--check`` only compares).

A table stands between ``<!-- table:NAME -->`` and ``<!-- end:NAME -->`` and shows the newest result of its kind.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.fidelity import show
from benchmarks.paper import equal_time as equal
from benchmarks.paper.records import lines_of, read_times
from zipvl.config import TAU, TEXT_TAU

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "fidelity", "paper", "vllm")))
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = ROOT / "models" / "tiny-llava-next" / "model.safetensors"

Result = dict[str, Any]


def results(name: str) -> list[Result]:
    """The lines of ``benchmarks/results/NAME.jsonl``, oldest first."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def source(result: Result) -> str:
    """Where a result was measured, as one line of text."""
    device = result["device"]
    threads = f", {device['threads']} thread{'s' * (device['threads'] > 1)}" if "threads" in device else ""
    return f"{device['name']}{threads}, torch {result['versions']['torch']}, {result['date'][:10]}"


def cpu_prefill() -> list[str]:
    """One layer on the CPU: stages against dense attention, the newest run at ratio 0.25."""
    run = [r for r in results("cpu_prefill") if r["ratio"] == 0.25][-1]
    shape, times = run["shape"], run["times"]
    labels = {
        "dense": "dense `scaled_dot_product_attention`",
        "zipvl_attn": "`zipvl_attn`",
        "probe": "its `probe_index`, `probe_scores`",
        "select": "its `select_tokens`",
        "attend": "its `sparse_attn`",
    }
    dense = times["dense"]["median_ms"]
    rows = [
        f"| {label} | {times[stage]['median_ms']:.1f} | {dense / times[stage]['median_ms']:.2f}x |"
        for stage, label in labels.items()
    ]
    title = (
        f"One layer, {shape['N']:,} tokens, {shape['Hq']}/{shape['Hkv']} heads, D {shape['D']}, float32, ratio "
        f"{run['ratio']} ({source(run)}):"
    )
    return [title, "", "| | median ms | dense / this |", "| --- | ---: | ---: |", *rows]


@dataclass(frozen=True)
class Setting:
    """A row of README.md's table.

    Attributes:
        name: what the row is called.
        timed: ``ratio`` and ``window`` in answer.jsonl. None under ``tau``: whole answers are timed with random
            weights, which do not show how many tokens hold it.
        judged: the setting's name in fidelity.jsonl.
        vision_compile: as in answer.jsonl.
    """

    name: str
    timed: tuple[float, int] | None
    judged: str
    vision_compile: bool = False


SETTINGS = (
    # Random weights do not show how many tokens tau keeps; of the trained model's pages it keeps 33%.
    Setting("`ZipVLConfig()`", (0.33, 512), "default tau, window 512, full, text kept"),
    Setting('`ZipVLConfig(tau=0.9, cache="quantize")`', None, "tau 0.9, window 512, quantize, text kept"),
    Setting(
        '`ZipVLConfig(tau=0.9, cache="drop", cache_ratio=0.35)`',
        None,
        "tau 0.9, window 512, drop, stored 0.35, text kept",
    ),
    Setting("`ZipVLConfig(ratio=0.25)`", (0.25, 512), "ratio 0.25, window 512, full, text kept"),
    Setting("the same, and `vision_compile=True`", (0.25, 512), "", vision_compile=True),
    Setting("`ZipVLConfig.paper()`", None, "tau 0.975, drop"),
)
WHOLE = {"text": 24, "key": 200, "page": 1000}
PAGES_OF = "Qwen2.5-VL-7B"
SHOWN = ("1 page + 128", "8 pages + 128")


def image_to_answer() -> list[str]:
    """What a user gets on which setting, and what it loses: of each setting the newest times and the newest losses.

    A setting without either has no row, but for the default. Compiled decode steps are in ``answer``'s tables alone."""
    runs = [run for run in results("answer") if not run.get("decode_compile")]
    rows = [row for run in results("fidelity") if run["split"] == "report" for row in run["rows"]]
    dense = {row["name"]: row for run in runs for row in run["rows"] if _shown(row)}
    source_of = next(run for run in reversed(runs) if any(_shown(row) for row in run["rows"]))
    original = {
        measure: next(row[measure] for row in reversed(rows) if row["setting"] == "dense" and _is_whole(row, measure))
        for measure in ("key", "page")
    }
    lines = [
        f"Time of `generate()` to the first token and to 128 tokens ({source(source_of)}), in {PAGES_OF}'s shape "
        "with random weights (in brackets: times as fast as dense in the same run, whose times differ from run to run "
        "with the host); a page has 4,096 visual tokens. KL to dense (nats a token) and pass keys: a trained text "
        "model of 135 M parameters. Pages right, and bytes of the cache: a trained vision-language model of 6.5 M. "
        "`-`: not measured. Times of `ZipVLConfig()` are those of a third of the tokens kept, as of the pages.",
        "",
        "| setting | 1 page | 8 pages | cache | KL to dense | pass keys found | pages right |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        f"| dense, as transformers runs it | {' | '.join(_answered(dense[name], 'default') for name in SHOWN)} | 100% "
        f"| 0 | {_found(original['key'])} | {100 * original['page']['right']:.1f}% |",
    ]
    for setting in SETTINGS:
        times = _timed(setting, runs)
        text, key, page = (_judged(setting, rows, measure) for measure in ("text", "key", "page"))
        if setting is SETTINGS[0] or times or text or key or page:
            cells = [_answered(times[name], "zipvl") if name in times else "-" for name in SHOWN]
            cells.append(f"{100 * page['cache_share']:.0f}%" if page else "-")
            cells.append(f"{text['kl']:.3f}" if text else "-")
            cells.append(_found(key) if key else "-")
            cells.append(f"{100 * page['right']:.1f}%" if page else "-")
            lines.append(f"| {setting.name} | {' | '.join(cells)} |")
    return lines


def _model(row: Result) -> str:
    """Whose shape a row of answer.jsonl was measured in."""
    return str(row.get("model", PAGES_OF if row["pages"] else "Qwen2-7B"))


def _shown(row: Result) -> bool:
    """Whether README.md's table shows a row of answer.jsonl: both methods ran in memory."""
    return row["name"] in SHOWN and _model(row) == PAGES_OF and not row.get("out_of_memory")


def _timed(setting: Setting, runs: list[Result]) -> dict[str, Result]:
    """The newest rows of a setting's times by name."""
    same = [
        run
        for run in runs
        if (run["ratio"], run.get("window", 0)) == setting.timed
        and bool(run.get("vision_compile")) == setting.vision_compile
    ]
    return {row["name"]: row for run in same for row in run["rows"] if _shown(row)}


def _judged(setting: Setting, rows: list[Result], measure: str) -> Result | None:
    """The newest of a setting's ``text``, ``key`` or ``page``. The default ``tau`` counts by its number too."""
    tau = f"tau {TAU if measure == 'page' else TEXT_TAU}"
    names = (setting.judged, setting.judged.replace("default tau", tau))
    found = [row[measure] for row in rows if row["setting"] in names and _is_whole(row, measure)]
    return found[-1] if found else None


def _is_whole(row: Result, measure: str) -> bool:
    """Whether a setting was measured on all reported samples, as by ``python -m benchmarks.fidelity --full``."""
    return bool(row.get(measure)) and row[measure]["samples"] >= WHOLE[measure]


def _found(key: Result) -> str:
    """Of the pass keys of both lengths."""
    groups = key["by_length"].values()
    return f"{sum(round(it['right'] * it['samples']) for it in groups)} of {sum(it['samples'] for it in groups)}"


def _answered(row: Result, method: str) -> str:
    """First token and whole answer of one row; against dense for zipvl."""
    said = f"{row[f'{method}_first'] / 1e3:.2f} s, {row[method] / 1e3:.2f} s"
    return said if method == "default" else f"{said} (**{row['default'] / row['zipvl']:.1f}x**)"


def answer() -> list[str]:
    """Whole answers on a GPU, a table a setting: the newest measurement of each model and prompt."""
    tables: dict[tuple[float, int, bool, bool], dict[tuple[str, str], tuple[Result, Result]]] = {}
    for run in results("answer"):
        compiled = (bool(run.get(f"{part}_compile")) for part in ("vision", "decode"))
        table = tables.setdefault((run["ratio"], run.get("window", 0), *compiled), {})
        table |= {(_model(row), row["name"]): (run, row) for row in run["rows"]}
    title = (
        "`generate()`, greedy, bfloat16, random weights in the shape of the named model; in Qwen2.5-VL's a page has "
        "4,096 visual tokens. Default: SDPA and a dynamic cache, as transformers runs it. Times are ms."
    )
    return [title, *(line for setting, table in sorted(tables.items()) for line in _answer_table(*setting, table))]


def _answer_table(
    ratio: float,
    window: int,
    vision_compile: bool,
    decode_compile: bool,
    newest: dict[tuple[str, str], tuple[Result, Result]],
) -> list[str]:
    """One setting's."""
    run = max((run for run, _ in newest.values()), key=lambda run: str(run["date"]))
    method = f"a window of {window}, a full cache" if window else "the paper's method"
    method += ", blocks of vision towers compiled (`vision_compile`)" if vision_compile else ""
    method += ", decode steps compiled (`decode_compile`)" if decode_compile else ""
    compiled = max(row.get("static_first", 0) for _, row in newest.values()) / 1e3
    after = f" Compiling the static cache took {compiled:.0f} s." if compiled else ""
    lines = [
        "",
        f"Ratio {ratio}, {method} ({source(run)}, transformers {run['versions']['transformers']}).{after}",
        "",
        "| model | prompt + new tokens | default | zipvl | times | first token | zipvl | vision tower | zipvl "
        "| compiled static cache |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = ("default", "zipvl", "default_first", "zipvl_first", "default_vision", "zipvl_vision", "static")
    for (model, name), (_, row) in newest.items():
        lost = row.get("out_of_memory", [])
        cells = [f"{row[n]:,.0f}" if n in row else "out of memory" if n.split("_")[0] in lost else "" for n in names]
        cells.insert(2, f"**{row['default'] / row['zipvl']:.2f}x**" if {"default", "zipvl"} <= row.keys() else "")
        lines.append(f"| {model} | {name} | " + " | ".join(cells) + " |")
    return lines


def serving() -> list[str]:
    """vLLM with the plug-in against the same vLLM without, on a GPU: the newest of each setting and load that both had,
    of engines that were driven in one process."""
    newest: dict[tuple[int, int, int, int], dict[str, Result]] = {}
    for line in results("serving"):
        # "alone": in that session the peer was not measured with these steps.
        if line["device"]["type"] == "cuda" and line["in_process"] and not line.get("alone"):
            load = (line["concurrency"], line["tokens"], line["max_model_len"], _step(line["flags"]))
            newest.setdefault(load, {})[line["setting"]] = line
    newest = {load: found for load, found in newest.items() if "vLLM" in found}
    last = max((line for found in newest.values() for line in found.values()), key=lambda line: str(line["date"]))
    options = {line["setting"]: line["options"] for found in newest.values() for line in found.values()}
    given = "; ".join(f"{name}: `{json.dumps(it)}`" for name, it in options.items() if it)
    backend = " and ".join(sorted({found["vLLM"]["backend"] for found in newest.values()}))
    lines = [
        f"vLLM {last['vllm']} with the plug-in (times as fast as the same vLLM without, whose backend is {backend}, "
        f"FlashAttention {last['flash_attention']}): Qwen2-7B's shape, dummy weights, bfloat16, {last['new']} new "
        "tokens, decode steps in full CUDA graphs, prefix caching off, engines driven in one process "
        f"({source(last)}). Options: {given}.",
        "",
        "| prompt | at a time | setting | first token, ms | requests/s | requests of the greatest length that fit |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for (concurrency, tokens, _, step), found in sorted(newest.items()):
        peer, prompt = found["vLLM"], f"{tokens:,} in steps of {step:,}" if step else f"{tokens:,}"
        for name, line in sorted(found.items(), key=lambda pair: pair[1] is not peer):
            pairs = {"ttft_ms": f"{line['ttft_ms']:,.0f}", "requests_per_second": f"{line['requests_per_second']:.2f}"}
            pairs["fits"] = f"{line['fits']:.0f}"
            if line is not peer:
                for key in pairs:
                    times = peer[key] / line[key] if key == "ttft_ms" else line[key] / peer[key]
                    pairs[key] += f" (**{times:.2f}x**)"
            lines.append(f"| {prompt} | {concurrency} | {name} | " + " | ".join(pairs.values()) + " |")
    return lines


def _step(flags: list[str]) -> int:
    """The tokens of one step, where a load's flags give them; 0: a step holds the prompt."""
    name = "--max-num-batched-tokens"
    return int(flags[flags.index(name) + 1]) if name in flags else 0


def tiny_llava_next() -> list[str]:
    """Exact match of the shipped weights against tau, the newest run of each setting over the most pages."""
    newest: dict[tuple[Any, ...], Result] = {}
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16]
    for run in results("tiny_llava_next"):
        if run["weights_sha256"] == digest and run["cache"] in (None, "drop") and run["entries"] is None:
            key = (run["method"], run["tau"])
            if key not in newest or run["pages"] >= newest[key]["pages"]:
                newest[key] = run
    ordered = sorted(newest.values(), key=lambda run: (run["method"] != "dense", -(run["tau"] or 2)))
    rows = [
        f"| {'dense' if run['method'] == 'dense' else 'tau ' + str(run['tau'])} | {100 * run['mean_ratio']:.1f}% "
        f"| {100 * run['exact_match']:.1f}% | {100 * run['interval95'][0]:.1f} - {100 * run['interval95'][1]:.1f} "
        f"| {run['pages']:,} |"
        for run in ordered
    ]
    title = f"`models/tiny-llava-next`, `drop` cache, held-out pages ({source(ordered[0])}):"
    head = ["| | tokens kept | exact match | 95% interval | pages |", "| --- | ---: | ---: | ---: | ---: |"]
    return [title, "", *head, *rows]


def gpu_tests() -> list[str]:
    """The newest whole run of tests/kernels, newer ones of parts, what compute-sanitizer's tools last found; each with
    the sources it ran."""
    recorded = results("gpu_tests")
    runs = [line for line in recorded if "tests" in line]
    whole = max(i for i, line in enumerate(runs) if "part" not in line)
    found = [(line.get("part", "all of `tests/kernels`"), tests_said(line), line) for line in runs[whole:]]
    newest = {tool: (verdict, line) for line in recorded for tool, verdict in line.get("sanitizers", {}).items()}
    found += [(f"compute-sanitizer's {tool}", sanitizer_verdict(it), line) for tool, (it, line) in newest.items()]
    rows = [
        f"| {what} | {said}{counted(line)} | {source(line)} | `{line['csrc_sha256'][:12]}` |"
        for what, said, line in found
    ]
    return ["| what ran | result | where | sha256 of `csrc/` |", "| --- | --- | --- | --- |", *rows]


def tests_said(line: dict[str, Any]) -> str:
    return f"{line['tests']['passed']:,} passed, {line['tests']['failed']} failed"


def counted(line: dict[str, Any]) -> str:
    """How the numbers were had, where not from the program that records them."""
    return f" ({line['counted']})" if "counted" in line else ""


def sanitizer_verdict(found: dict[str, Any]) -> str:
    """Of one tool, as tools/gpu_check.py records it."""
    if found["broken"]:
        return f"not complete ({found['broken']})"
    numbers = [
        f"{found[kind]} {kind}" if found[kind] > 1 else f"1 {kind[:-1]}"
        for kind in ("errors", "warnings")
        if found[kind]
    ]
    return " and ".join(numbers) or "clean"


def sparse_attn() -> list[str]:
    """sparse_attn, packing included, against dense attention at the number of selected tokens; the newest run."""
    newest = {(r["part"], *sorted(r["case"].items())): r for r in results("sparse_attn")}
    chosen = [r for r in newest.values() if r["part"] in ("goals", "all-queries")]
    rows = []
    for run in chosen:
        case, times = run["case"], run["times"]
        ours, cudnn, fa2 = (times[name]["median_ms"] for name in ("zipvl", "cudnn", "fa2"))
        label = " (all queries)" if case["all_queries"] else ""
        rows.append(
            f"| {case['N']:,} | {case['p']:,}{label} | {ours:.3f} | {run['tflops']:.0f} | {ours / cudnn:.2f} "
            f"| {ours / fa2:.2f} |"
        )
    heads = "/".join(map(str, chosen[0]["heads"]))
    title = (
        "`sparse_attn` among `p` of `N` tokens, packing included, against dense attention at `p` (at `N` for all "
        f"queries), {heads} heads, D 128, bfloat16, causal ({source(chosen[0])}):"
    )
    head = [
        "| N | p | ms | TFLOP/s | time / cuDNN | time / FlashAttention-2 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return [title, "", *head, *rows]


def probe_select() -> list[str]:
    """The estimate: probe scores, selection and packing against the same in PyTorch; the newest rows, main shapes."""
    run = results("probe_select")[-1]
    newest = {
        (row["op"], row["shape"]["N"]): row
        for line in results("probe_select")
        for row in line["rows"]
        if (row["shape"]["B"], row["shape"]["Hq"], row["shape"]["Hkv"]) == (1, 28, 4)
    }
    lengths = sorted({n for _, n in newest})
    rows = []
    for op in dict.fromkeys(op for op, _ in newest):
        cells = []
        for n in lengths:
            row = newest[op, n]
            peers = [f"{us / row['us']:.1f}x" for us in row["peers"].values()]
            cells.append(f"{row['us']:.1f}" + (f" ({', '.join(peers)})" if peers else ""))
        rows.append(f"| `{op}` | " + " | ".join(cells) + " |")
    title = (
        "The estimate, us, and how many times as long it takes elsewhere (scores in eager PyTorch, and column sums "
        "alone by flash-colreduce; PyTorch's sort, cumsum, top-k and sort; a contiguous copy of as many bytes), "
        "28/4 heads, D 128, bfloat16, 128 probes, "
        f"a quarter packed ({source(run)}):"
    )
    head = ["| | " + " | ".join(f"{n:,}" for n in lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    return [title, "", *head, *rows]


def layer() -> list[str]:
    """zipvl_attn against dense cuDNN attention, graph replays: on each device the newest runs at a ratio and by tau."""
    newest: dict[str, dict[str, Result]] = {}
    for run in results("layer"):
        newest.setdefault(run["device"]["name"], {})[run["part"]] = run
    tables = [table for parts in newest.values() if "goals" in parts for table in _layer_table(parts)]
    shape = results("layer")[-1]["shape"]
    title = (
        f"`zipvl_attn`, the whole layer, times as fast as dense cuDNN attention (and its own time): {shape['Hq']}/"
        f"{shape['Hkv']} heads, D {shape['D']}, {shape['dtype']}, causal, CUDA graph replays. "
        "Concentrated: a tenth of the tokens draws nearly all attention. Uniform: every token draws the same, and "
        "nearly all are kept, which is the worst that can happen."
    )
    return [title, *tables]


def _layer_table(parts: dict[str, Result]) -> list[str]:
    """One device's; ``parts`` by name."""
    runs = [parts[part] for part in ("goals", "distributions") if part in parts]
    rows = [row for run in runs for row in run["rows"]]
    lengths = sorted({row["case"]["N"] for row in rows})
    labels: dict[str, dict[int, Result]] = {}
    for row in rows:
        case = row["case"]
        by = f"ratio {case['ratio']}" if case["ratio"] is not None else f"tau {case['tau']}, {case['attention']}"
        labels.setdefault(by, {})[case["N"]] = row

    def cell(row: Result | None) -> str:
        if row is None:
            return "-"
        ours, dense = row["graph"]["zipvl"]["us"], row["graph"]["dense"]["us"]
        time = f"{ours:.0f} us" if ours < 10_000 else f"{ours / 1000:.1f} ms"
        return f"{dense / ours:.2f}x ({time})"

    table = [
        f"| {label} | " + " | ".join(cell(by_length.get(n)) for n in lengths) + " |"
        for label, by_length in labels.items()
    ]
    head = [
        f"| {source(runs[0])} | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "| --- |" + " ---: |" * len(lengths),
    ]
    return ["", *head, *table]


def ttft() -> list[str]:
    """Time to first token of a Qwen2-7B-shaped model, a column a length: on each device the newest run of each."""
    if not (RESULTS / "ttft.jsonl").exists():
        return ["Time to first token: no run of `python -m benchmarks.ttft` is recorded yet."]
    newest: dict[tuple[bool, str], dict[int, Result]] = {}
    for run in results("ttft"):
        if not _has_windows(run):
            newest.setdefault((run["compiled"], run["device"]["name"]), {})[run["tokens"]] = run
    title = (
        "Time to first token of a Qwen2-7B-shaped model in ms (times as fast as on dense cuDNN attention; peak GiB "
        "beyond the weights), bfloat16. The paper's model takes 3.28 s at 32,768 tokens on its hardware, and 0.45 s "
        "more for the estimate down to top-k."
    )
    tables = [
        line
        for compiled, device in sorted(newest, key=lambda key: key[0])
        for line in _ttft_table(dict(sorted(newest[compiled, device].items())), "compiled" if compiled else "eager")
    ]
    return [title, *tables]


def _has_windows(run: Result) -> bool:
    return any(row.get("window") for row in run["rows"])


def ttft_window() -> list[str]:
    """Time to first token with windows and in chunks, a column a length: the newest run of each."""
    runs = {run["tokens"]: run for run in results("ttft") if _has_windows(run)}
    if not runs:
        return ["Time to first token with windows: no run of `python -m benchmarks.ttft --window 128` is recorded yet."]
    title = (
        "The same with windows and 4 sinks, a `full` cache; in chunks each chunk selects for itself among all tokens "
        "so far:"
    )
    return [title, *_ttft_table(dict(sorted(runs.items())), "eager")]


def repeated(run: Result) -> bool:
    """Whether every row was timed at least twice. A single run has the cost of a length's first calls in it, except the
    original's, which comes last."""
    return all(len(row["runs"]) > 1 for row in run["rows"])


def _ttft_table(runs: dict[int, Result], how: str) -> list[str]:
    rows: dict[tuple[str, float | None], dict[int, Result]] = {}
    for tokens, run in runs.items():
        for row in run["rows"]:
            rows.setdefault((row["name"], row["ratio"]), {})[tokens] = row
    dense = rows["original", None]

    def cell(tokens: int, row: Result | None) -> str:
        if row is None:
            return ""
        speedup = dense[tokens]["seconds"] / row["seconds"]
        return f"{1e3 * row['seconds']:,.0f} ({speedup:.2f}x; {row['peak_bytes'] / 2**30:.1f})"

    once = " and ".join(f"{tokens:,}" for tokens, run in runs.items() if not repeated(run))
    dates = sorted({run["date"][:10] for run in runs.values()})
    first = f"{dates[0]} to " if len(dates) > 1 else ""
    newest = max(runs.values(), key=lambda run: run["date"])
    where, _, date = source(newest).rpartition(", ")
    title = f"{how}{f' ({once} tokens timed once)' if once else ''}, {where}, {first}{date}"
    head = [
        f"| {title} | ratio | " + " | ".join(f"{n:,}" for n in runs) + " |",
        "| --- | ---: |" + " ---: |" * len(runs),
    ]
    table = [
        f"| {name} | {ratio or ''} | " + " | ".join(cell(tokens, row.get(tokens)) for tokens in runs) + " |"
        for (name, ratio), row in rows.items()
    ]
    return ["", *head, *table]


def decode() -> list[str]:
    """A decoding step's attention against the copy of its bytes and its peers; the newest run of each shape."""
    newest = {(r["op"], r["shape"]["B"], r["shape"]["S"]): r for r in results("decode")}
    rows = []
    for (op, batch, slots), run in newest.items():
        rate = run["bytes"] / run["us"] * 1e6
        peers = [f"{run['peers'][name]:.1f}" if name in run["peers"] else "" for name in ("cudnn", "fa2")]
        rows.append(
            f"| `{op}` | {batch} x {slots:,} | {run['bytes'] / 1e6:.1f} | {run['us']:.1f} | {rate / 1e12:.2f} "
            f"| {100 * rate / run['copy_bytes_per_s']:.0f}% | {' | '.join(peers)} |"
        )
    shape, last = next(iter(newest.values()))["shape"], list(newest.values())[-1]
    title = (
        f"One new token against a cache, {shape['Hq']}/{shape['Hkv']} heads, D {shape['D']}, bfloat16; quantised: a "
        f"quarter of the tokens at 4 bits, the others at 2, and 100 recent ones in full ({source(last)}):"
    )
    head = [
        "| | rows x tokens | MB read | us | TB/s | of a copy's | cuDNN, us | FlashAttention-2, us |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return [title, "", *head, *rows]


def fidelity() -> list[str]:
    """What pretrained weights lose: the newest run over reported samples, and the newest of all settings."""
    if not (RESULTS / "fidelity.jsonl").exists():
        return ["No run of `python -m benchmarks.fidelity` is recorded yet."]
    newest: dict[tuple[bool, str, bool], Result] = {}
    for run in results("fidelity"):
        if run["split"] == "report" and "text" in run["samples"]:
            newest[run["full"], run["device"]["name"], "page" not in run["samples"]] = run
    lines = []
    for (full, *_), run in sorted(newest.items(), key=lambda item: item[0]):
        samples = run["samples"]
        counted = (f"{samples[part]:,} {part}s" for part in ("text", "key", "page") if part in samples)
        lines += [
            *([""] if lines else []),
            f"{', '.join(counted)}, {run['dtype']}{', `--full`' if full else ''} ({source(run)}):",
            "",
            "| " + " | ".join(show.HEADER) + " |",
            "| --- |" + " ---: |" * (len(show.HEADER) - 1),
            *("| " + " | ".join(show.cells(row)) + " |" for row in run["rows"]),
        ]
    return lines


def equal_time() -> list[str]:
    """At which budgets ZipVL is worth its time and at which a pruner is the better choice, by the recorded times."""
    times = read_times(RESULTS / "paper_times.jsonl")
    line = lines_of(hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16], RESULTS / "paper.jsonl").get("A")
    if times is None or line is None:
        return [equal.NOT_MEASURED]
    return [equal.source(times), "", *(f"- {sentence}" for sentence in equal.summary(line, times))]


TABLES: dict[str, Callable[[], list[str]]] = {
    "equal_time": equal_time,
    "image_to_answer": image_to_answer,
    "cpu_prefill": cpu_prefill,
    "tiny_llava_next": tiny_llava_next,
    "gpu_tests": gpu_tests,
    "sparse_attn": sparse_attn,
    "probe_select": probe_select,
    "decode": decode,
    "layer": layer,
    "ttft": ttft,
    "ttft_window": ttft_window,
    "answer": answer,
    "serving": serving,
    "fidelity": fidelity,
}


def rendered(text: str) -> str:
    """``text`` with every marked table made anew.

    Raises:
        KeyError: a marker names no table.
    """

    def table(found: re.Match[str]) -> str:
        body = "\n".join(TABLES[found["name"]]())
        return f"<!-- table:{found['name']} -->\n{body}\n<!-- end:{found['name']} -->"

    return re.sub(r"<!-- table:(?P<name>\w+) -->.*?<!-- end:(?P=name) -->", table, text, flags=re.DOTALL)


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; exit 1 where a table is not current.")] = False,
) -> None:
    """Makes the tables of all pages from the recorded results."""
    for page in PAGES:
        before = page.read_text()
        after = rendered(before)
        if check and before != after:
            name = page.relative_to(ROOT)
            sys.exit(f"{name} is not what benchmarks/results say: run 'python -m benchmarks.readme'")
        if not check:
            page.write_text(after)


if __name__ == "__main__":
    typer.run(main)
