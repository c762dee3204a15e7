"""The report, from the results: docs/report/report.html, self-contained, and README.md there with its pictures."""

from __future__ import annotations

import base64
import hashlib
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, ROOT
from benchmarks.paper import equal_time, figures
from benchmarks.paper.records import Times, lines_of, read_times, stopped_lines
from benchmarks.paper.show import cells, claims, header
from benchmarks.paper.tables import TABLES

__all__ = ["OUTPUT", "render"]

OUTPUT = ROOT / "docs" / "report"
FOLDER = ROOT / "models" / "tiny-llava-next"
TITLE = "The paper's evidence, measured again"

METHOD = (
    "One model, `models/tiny-llava-next`, reads every page in every setting: the same held-out pages in the same "
    "order, the same probe seed. Exact match is greedy decoding of three digits. Budgets and ratios are the mean "
    "share of the prompt's tokens in attention, over layers and pages.",
    "Matched: where settings are compared at one ratio, `tau` was found by bisection on calibration pages (held-out "
    "pages from number 100,000 on, none of them a test page); the baselines' parameters follow from their "
    "schedules. The ratios in the tables are those on the test pages.",
    "Intervals are 95% percentile bootstrap intervals over pages, 10,000 resamples. Differences are in points of "
    "exact match, page by page (paired bootstrap). A claim *holds* where the two settings' own intervals do not "
    "overlap. Pages that are all right give an interval of no width: with few pages that is not certainty.",
    "The prompt of several frames (Table B): two strips of two pages, each a picture of its own in the prompt, as "
    "wide as a page and one tile high; the label stands in one of the frames, and the answer is its digits. The "
    "model was trained on single pages and answers with digits alone, so it cannot be asked *which* frame holds "
    "an entry; finding the right frame is what reading the digits takes. Two whole pages in one prompt, twice as "
    "long as anything it was trained on, are measured as a check.",
    "Equal time: the answers are the tiny model's, the times those of a 7B shape behind 32K tokens, where attention, "
    "MLPs and vision tower have the weight that they have in a model of use. A row's time is that of its method at its "
    "share of tokens. The best pruner in the time of a ZipVL is the one whose answers are best there, each page on the "
    "line between its two nearest rows; the dense model is the last row of each. A setting of ZipVL that loses more "
    f"than {100 * equal_time.MOST_LOST:g} points against the dense model is not called worth its time. An answer of 32 "
    "tokens takes the first one and 31 median decode steps. Windows are wide beside a page of 2,613 tokens, whose last "
    "ones ZipVL keeps too: a window of 512 is a fifth of the page, and 2% of 32K.",
    "The baselines are in `zipvl/baselines`, each with its schedule stated. A dropped token's later layers lack "
    "it, and later tokens keep their positions. A budget that a schedule cannot reach is named, not approximated: "
    "the layers that see everything are 2 of 6 here and 2 of 28 to 32 in the paper's models.",
    "The model is small and trained for this repository ([its card](../../models/tiny-llava-next/README.md)), and "
    "its last training stage selected tokens as ZipVL does, which the baselines had no part in: the comparison "
    "favours ZipVL and is no evidence of how far ahead it is on models trained without any of them. Absolute "
    "numbers say nothing about large models. Most of a page is blank paper, which a method that asks the vision "
    "tower has an easy time to leave out. Nothing was chosen by its result.",
)


@dataclass
class Text:
    """A paragraph, with Markdown's backquotes, asterisks and links."""

    text: str


@dataclass
class Grid:
    """A table."""

    header: list[str]
    rows: list[list[str]]


@dataclass
class Items:
    """A list."""

    items: list[str]


@dataclass
class Picture:
    """A figure: name of its PNG file, and the bytes."""

    name: str
    caption: str
    content: bytes


Block = Text | Grid | Items | Picture
Sections = list[tuple[str, list[Block]]]


def render(output: Path = OUTPUT, results: Path | None = None, times: Path | None = None) -> list[Path]:
    """Writes both forms; returns the files.

    Args:
        output: their folder.
        results: paper.jsonl; the recorded one by default.
        times: paper_times.jsonl, likewise.
    """
    weights = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:16]
    lines = lines_of(weights, results)
    sections = _sections(lines, weights, stopped_lines(weights, lines, results), read_times(times))
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "report.html", output / "README.md"]
    written[0].write_text(_html(sections))
    written[1].write_text(_markdown(sections))
    for _, blocks in sections:
        for block in blocks:
            if isinstance(block, Picture):
                written.append(output / f"{block.name}.png")
                written[-1].write_bytes(block.content)
    return written


def _sections(
    lines: dict[str, dict[str, Any]], weights: str, stopped: list[dict[str, Any]], times: Times | None
) -> Sections:
    """The report, top to bottom."""
    missing = [name for name in TABLES if name not in lines]
    summary: list[Block] = [Text(f"Weights `{weights}`. Made by `make paper` from `benchmarks/results/paper.jsonl`.")]
    if missing:
        names = ", ".join(missing)
        summary.append(Text(f"Not measured yet for these weights: {names} (`python -m benchmarks.paper all`)."))
    goals = [
        [TABLES[name].title.split(":")[0], where, claim, points, words]
        for name in ("A", "B", "C", "D", "ours")
        if name in lines
        for where, claim, points, words in claims(TABLES[name], lines[name])
    ]
    sections: Sections = [("", summary)]
    if "A" in lines:
        shares = "equal shares of tokens in attention" + ("" if times is None else ", and at equal times")
        caption = f"ZipVL and the baselines at {shares} (Table A)"
        summary.append(Picture("main", caption, figures.main(lines["A"], times)))
        sections.append(("Who wins at equal time?", _equal_time(lines["A"], times)))
    if goals:
        head = ["", "compared at", "the paper's order", "difference in points (95%)", "here"]
        sections.append(("Does the paper's order hold?", [Grid(head, goals)]))
    sections += [(TABLES[name].title, _table(name, lines[name], times)) for name in TABLES if name in lines]
    for line in stopped:
        title = f"More pages, stopped before its last rows: {TABLES[line['table']].title}"
        sections.append((title, _table(line["table"], line, times, figure=False)))
    sections.append(("How it was measured", [Items(list(METHOD))]))
    return sections


def _equal_time(line: dict[str, Any], times: Times | None) -> list[Block]:
    """Every ZipVL of Table A against the best pruner in its time, on both axes."""
    if times is None:
        return [Text(equal_time.NOT_MEASURED)]
    blocks: list[Block] = [Text(equal_time.source(times)), Items(equal_time.summary(line, times))]
    for axis, name in enumerate(equal_time.AXES):
        found = [equal_time.cells(one) for one in equal_time.compare(line, times, axis)]
        if found:
            blocks += [Text(f"By the time to the {name}:"), Grid(list(equal_time.HEADER), found)]
    if times.failed:
        blocks.append(Items([f"Not timed: {name} at {budget:.1%}: {why}" for name, budget, why in times.failed]))
    return blocks


def _table(name: str, line: dict[str, Any], times: Times | None, figure: bool = True) -> list[Block]:
    """One table with what belongs to it."""
    device = line["device"]
    where = device["name"] + (f", {device['threads']} thread(s)" if "threads" in device else "")
    calibration = line["calibration"]["pages"]
    pages = "one page" if name == "E" else f"{line['pages']:,} pages a setting, {calibration} calibration pages"
    blocks: list[Block] = [
        Text(f"{pages}, probe seed {line['probe_seed']}, {line['dtype']}, {where}, {line['date'][:10]}."),
        Text(f"Of the paper: {TABLES[name].paper}."),
    ]
    if figure and name in figures.FIGURES:
        blocks.append(Picture(name.lower(), TABLES[name].title, figures.FIGURES[name](line)))
    blocks.append(Grid(header(line, times), [cells(line, row, times) for row in line["rows"]]))
    if name == "E":
        blocks.append(Text(_costs_note(line)))
    notes = line["notes"] + ([] if line["complete"] else ["This run was stopped before its last rows."])
    blocks += [Items(notes)] if notes else []
    return blocks


def _costs_note(line: dict[str, Any]) -> str:
    rows = {row["label"]: row for row in line["rows"]}
    estimate = sum(row["ms"] for label, row in rows.items() if label.startswith(("approximate", "budget")))
    dense = next(row for label, row in rows.items() if label.startswith("dense"))
    note = (
        f"Of one prompt of {dense['tokens']:,} tokens, language model alone. Here the estimate is {estimate:.1f} ms "
        f"beside {dense['ms']:.1f} ms of the dense prefill."
    )
    if (RESULTS / "ttft.jsonl").exists():
        note += (
            " Time to first token of a model of LongVA-7B's size on a GPU: `python -m benchmarks.ttft`, "
            "results in `benchmarks/results/ttft.jsonl`."
        )
    return note


# ---- Markdown and HTML


def _markdown(sections: Sections) -> str:
    parts = [f"# {TITLE}"]
    for title, blocks in sections:
        parts += [f"## {title}"] if title else []
        for block in blocks:
            if isinstance(block, Text):
                parts.append(block.text)
            elif isinstance(block, Items):
                parts.append("\n".join(f"- {item}" for item in block.items))
            elif isinstance(block, Picture):
                parts.append(f"![{block.caption}]({block.name}.png)")
            else:
                rows = [block.header, ["---"] * len(block.header), *block.rows]
                parts.append(
                    "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
                )
    return "\n\n".join(parts) + "\n"


def _inline(text: str) -> str:
    """The few marks of Markdown that the texts here use."""
    parts = html.escape(text, quote=False).split("`")
    code = [f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts)]
    emphasised = "".join(code).split("*")
    joined = "".join(f"<em>{part}</em>" if number % 2 else part for number, part in enumerate(emphasised))
    while "](" in joined:
        before, after = joined.split("](", 1)
        start = before.rindex("[")
        address, rest = after.split(")", 1)
        joined = f'{before[:start]}<a href="{address}">{before[start + 1 :]}</a>{rest}'
    return joined


def _html(sections: Sections) -> str:
    parts = []
    for title, blocks in sections:
        parts += [f"<h2>{html.escape(title)}</h2>"] if title else []
        for block in blocks:
            if isinstance(block, Text):
                parts.append(f"<p>{_inline(block.text)}</p>")
            elif isinstance(block, Items):
                parts.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>")
            elif isinstance(block, Picture):
                data = base64.b64encode(block.content).decode()
                caption = html.escape(block.caption)
                image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
                parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
            else:
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
                body = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows
                )
                parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')
    return _PAGE.format(title=TITLE, body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.5rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }}
th, td {{ border: 1px solid #ddd; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }}
th {{ background: #f4f4f4; }} code {{ background: #f4f4f4; padding: 0 0.2em; }}
figure {{ margin: 1.5rem 0; }} img {{ max-width: 100%; }} figcaption {{ color: #666; font-size: 0.9rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
