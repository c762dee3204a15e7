"""What ``zipvl run`` and ``zipvl inspect`` print."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipvl.app.run import Answer, reasons_for_dense

if TYPE_CHECKING:
    from zipvl.app.inspect import Inspection
    from zipvl.app.loading import Loaded
    from zipvl.config import ZipVLConfig

__all__ = ["print_inspect", "print_run", "run_facts"]

_BAR_WIDTH = 24
_MARKS, _ASCII_MARKS = "█·", "#."  # of a bar: its filled part, its rest


def run_facts(
    loaded: Loaded,
    is_default: bool,
    image: Path,
    size: tuple[int, int],
    question: str,
    config: ZipVLConfig,
    dense: Answer,
    sparse: Answer,
) -> dict[str, Any]:
    """Everything ``zipvl run`` reports, ready for JSON."""
    stats = sparse.stats
    share = sparse.cache_bytes / dense.cache_bytes if sparse.cache_bytes is not None and dense.cache_bytes else None
    return {
        "model": loaded.name,
        "default_model": is_default,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "image": str(image),
        "image_size": list(size),
        "question": question,
        "prompt_tokens": dense.prompt_tokens,
        "config": asdict(config),
        "dense": _answer_facts(dense),
        "zipvl": {
            **_answer_facts(sparse),
            "active": stats.active,
            "reasons_for_dense": reasons_for_dense(stats),
            "mean_ratio": stats.mean_ratio,
            "layers": [_layer_facts(index, stats.layers[index], sparse, dense) for index in sorted(stats.layers)],
        },
        "cache_share": share,
        "same_answer": dense.text == sparse.text,
    }


def print_run(facts: dict[str, Any]) -> None:
    """Both answers side by side, times, cache sizes, and a bar for each layer."""
    console = Console(highlight=False)
    _print_model(console, facts["model"], facts["default_model"], f"{facts['dtype']} on {facts['device']}")
    width, height = facts["image_size"]
    console.print(
        f"[bold]Page[/]    {escape(facts['image'])}, {width} x {height}, "
        f"{facts['prompt_tokens']:,} prompt tokens with the question",
        soft_wrap=True,
    )
    console.print(f"[bold]Asked[/]   {escape(facts['question'])}\n", soft_wrap=True)
    dense, sparse = facts["dense"], facts["zipvl"]
    table = Table("", "dense", "ZipVL")
    table.add_row("answer", *(f"[bold]{escape(side['answer'])}[/]" for side in (dense, sparse)))
    table.add_row("time to first token", *(_seconds(side["first_token_s"]) for side in (dense, sparse)))
    table.add_row("time in all", *(_total(side) for side in (dense, sparse)))
    table.add_row("tokens per second after it", *(_rate(side["tokens_per_second"]) for side in (dense, sparse)))
    share = "" if facts["cache_share"] is None else f" ({facts['cache_share']:.1%})"
    table.add_row("cache after the prompt", _size(dense["cache_bytes"]), _size(sparse["cache_bytes"]) + share)
    table.add_row("cache after the answer", *(_size(side["final_cache_bytes"]) for side in (dense, sparse)))
    console.print(table)
    if not sparse["active"]:
        console.print("[bold yellow]ZipVL was not active: this run was dense throughout.[/]")
    for reason in sparse["reasons_for_dense"]:
        console.print(f"[yellow]dense: {escape(reason)}[/]")
    if sparse["layers"]:
        console.print(f"\n[bold]Tokens kept and cache, layer by layer[/] (mean {sparse['mean_ratio']:.1%})")
        for layer in sparse["layers"]:
            console.print(_bar(layer, _MARKS if console.encoding.startswith("utf") else _ASCII_MARKS), soft_wrap=True)


def print_inspect(loaded: Loaded, is_default: bool, inspection: Inspection, output: Path) -> None:
    """Where the report lies, and what it shows."""
    console = Console(highlight=False)
    _print_model(console, loaded.name, is_default, f"{str(loaded.dtype).removeprefix('torch.')} on {loaded.device}")
    console.print(f"[bold]Answer[/]  {escape(inspection.answer.text)}")
    if inspection.answer.stats.active:
        ratios = " ".join(f"{view.ratio:.0%}" for view in inspection.layers)
        console.print(f"[bold]Kept[/]    {ratios} of {inspection.answer.prompt_tokens:,} tokens, layer by layer")
    else:
        console.print("[bold yellow]ZipVL was not active: this run was dense throughout.[/]")
    for reason in reasons_for_dense(inspection.answer.stats):
        console.print(f"[yellow]dense: {escape(reason)}[/]")
    for grid in inspection.patches.grids:
        rows, columns = grid.positions.shape
        console.print(f"[bold]Map[/]     {grid.name}: {rows} x {columns} patches")
    if inspection.patches.note:
        console.print(f"[yellow]{escape(inspection.patches.note)}; a strip of token positions is shown instead[/]")
    console.print(f"[bold]Wrote[/]   {escape(str(output))}", soft_wrap=True)


def _answer_facts(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "new_tokens": answer.new_tokens,
        "first_token_s": answer.first_token_s,
        "total_s": answer.total_s,
        "tokens_per_second": answer.tokens_per_second,
        "cache_bytes": answer.cache_bytes,
        "final_cache_bytes": answer.final_cache_bytes,
    }


def _layer_facts(index: int, layer: Any, sparse: Answer, dense: Answer) -> dict[str, Any]:
    held = [None if s.layer_cache_bytes is None else s.layer_cache_bytes[index] for s in (sparse, dense)]
    return {
        "layer": index,
        "mode": layer.mode,
        "reason": layer.reason,
        "tokens": layer.tokens[0],
        "kept": layer.kept[0],
        "ratio": layer.ratio,
        "stored": None if layer.stored is None else layer.stored[0],
        "cache_bytes": held[0],
        "dense_cache_bytes": held[1],
    }


def _print_model(console: Console, name: str, is_default: bool, where: str) -> None:
    default = " [dim](the default; --model for another)[/]" if is_default else ""
    console.print(f"[bold]Model[/]   {escape(name)}{default}, {where}", soft_wrap=True)


def _bar(layer: dict[str, Any], marks: str) -> str:
    filled = round(layer["ratio"] * _BAR_WIDTH)
    color = "cyan" if layer["mode"] == "sparse" else "bright_black"
    bar = f"[{color}]{marks[0] * filled}[/][bright_black]{marks[1] * (_BAR_WIDTH - filled)}[/]"
    counts = f"{layer['kept']:>9,} of {layer['tokens']:,}"
    if layer["stored"] is not None:
        counts += f", {layer['stored']:,} stored"
    if layer["cache_bytes"] is not None:
        counts += f"  {_size(layer['cache_bytes']):>10}"
    counts += "" if layer["mode"] == "sparse" else "  dense"
    return f"  layer {layer['layer']:>3}  {bar}  {layer['ratio']:>6.1%}  {counts}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _total(side: dict[str, Any]) -> str:
    return f"{_seconds(side['total_s'])}, {side['new_tokens']} tokens"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown: the model hands no cache out"
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
