"""The report, from the results: docs/report/report.html, self-contained, and README.md there with its pictures."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._record import RESULTS, ROOT
from benchmarks.paper import figures
from benchmarks.paper.show import cells, claims, header
from benchmarks.paper.tables import TABLES

__all__ = ["OUTPUT", "lines_of", "render"]

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


def lines_of(weights: str, path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The results of each table for these weights: a complete run before a stopped one, then the most pages, then the
    newest."""
    path = path or RESULTS / "paper.jsonl"
    best: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["weights_sha256"] == weights and _merit(line) >= _merit(best.get(line["table"], line)):
            best[line["table"]] = line
    return best


def stopped_lines(weights: str, shown: dict[str, dict[str, Any]], path: Path | None = None) -> list[dict[str, Any]]:
    """Runs that were stopped, but over more pages than the one that is shown."""
    path = path or RESULTS / "paper.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    of_these = [line for line in lines if line["weights_sha256"] == weights and not line["complete"]]
    return [line for line in of_these if line["pages"] > shown.get(line["table"], line)["pages"]]


def _merit(line: dict[str, Any]) -> tuple[bool, int]:
    return line["complete"], line["pages"]


def render(output: Path = OUTPUT, results: Path | None = None) -> list[Path]:
    """Writes both forms; returns the files."""
    weights = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()[:16]
    lines = lines_of(weights, results)
    sections = _sections(lines, weights, stopped_lines(weights, lines, results))
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


def _sections(lines: dict[str, dict[str, Any]], weights: str, stopped: list[dict[str, Any]]) -> Sections:
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
        summary.append(
            Picture(
                "main", "ZipVL and the baselines at equal shares of tokens in attention (Table A)", figures.main(lines)
            )
        )
    if goals:
        head = ["", "compared at", "the paper's order", "difference in points (95%)", "here"]
        sections.append(("Does the paper's order hold?", [Grid(head, goals)]))
    sections += [(TABLES[name].title, _table(name, lines[name])) for name in TABLES if name in lines]
    for line in stopped:
        title = f"More pages, stopped before its last rows: {TABLES[line['table']].title}"
        sections.append((title, _table(line["table"], line, figure=False)))
    sections.append(("How it was measured", [Items(list(METHOD))]))
    return sections


def _table(name: str, line: dict[str, Any], figure: bool = True) -> list[Block]:
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
    blocks.append(Grid(header(line), [cells(line, row) for row in line["rows"]]))
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
