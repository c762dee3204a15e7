"""Exact match and kept tokens of tiny-llava-next with the zipvl package, over held-out pages.

    python evaluate.py run --pages 1000                       # dense, then ten values of tau; one JSON line for each
    python evaluate.py run --pages 20 --taus 0.975 --batch 4  # a quick look on a CPU
    python evaluate.py plot                                   # a table, and curve.png, of the results so far

Answers are decoded by `model.generate`, batch by batch, inside `zipvl.sparse`. On a GPU the model runs in bfloat16, on
a CPU in float32 unless `--dtype` says otherwise. Each line is written as soon as it is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from network import BOS, IMAGE, VOCABULARY, pixel_values_from_pages, tile_side_of
from pages import ENTRY_COUNTS, FIRST_HELD_OUT_SEED, PAGE_SIDE, PATCH, Page, held_out_pages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer

import zipvl

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent.parent))
from benchmarks._record import RESULTS, append  # noqa: E402

TAUS = "0.999,0.995,0.99,0.985,0.98,0.975,0.97,0.96,0.95,0.9"


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% interval of a share."""
    z, share = 1.959964, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return round(middle - half, 4), round(middle + half, 4)


def model_inputs(model: torch.nn.Module, pages: list[Page]) -> dict[str, Any]:
    """What the processor and the chat template make of these pages and their questions (a test compares them)."""
    device, visual_tokens = model.device, visual_token_count(model)
    images = torch.stack([page.image for page in pages]).to(device)
    prompts = [[BOS, *[IMAGE] * visual_tokens, *(VOCABULARY[c] for c in f"?{page.label}=")] for page in pages]
    input_ids = torch.tensor(prompts, device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixel_values_from_pages(images, tile_side_of(model)).to(model.dtype),
        "image_sizes": torch.tensor([[PAGE_SIDE, PAGE_SIDE]] * len(pages), device=device),
    }


def weights_digest(folder: Path) -> str:
    """First 16 digits of the weights' SHA-256: which model a line of the results belongs to."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def visual_token_count(model: torch.nn.Module) -> int:
    """Visual tokens of a page of 672 px: base view, and the rows of all tiles with a newline after each."""
    base, page = tile_side_of(model) // PATCH, PAGE_SIDE // PATCH
    return base**2 + page * (page + 1)


@torch.inference_mode()
def answers(
    model: torch.nn.Module, tokenizer: Any, pages: list[Page], config: zipvl.ZipVLConfig | None, batch: int
) -> tuple[list[str], zipvl.Stats | None]:
    """The model's answer to each page's question, and the statistics of the run (None: dense)."""
    said: list[str] = []
    with zipvl.sparse(model, config) if config else nullcontext() as stats:
        for start in tqdm(range(0, len(pages), batch), desc=f"tau {config.tau}" if config else "dense", leave=False):
            inputs = model_inputs(model, pages[start : start + batch])
            tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            said += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said, stats


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def run(
    pages: int = 1000,
    taus: Annotated[str, typer.Option(help="Comma separated; dense is always run first.")] = TAUS,
    batch: int = 50,
    cache: Annotated[str, typer.Option(help="drop, quantize, full, or several of them, comma separated.")] = "drop",
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32; by default by device.")] = "",
    first: Annotated[int, typer.Option(help="Skip so many held-out pages.")] = 0,
    entries: Annotated[int | None, typer.Option(help="Entries on every page; by default 8 to 64 by seed.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the probe tokens.")] = 0,
    folder: Annotated[Path, typer.Option(help="Model folder.")] = FOLDER,
    name: Annotated[str, typer.Option(help="benchmarks/results/NAME.jsonl")] = "tiny_llava_next",
) -> None:
    """Measures dense and each tau, prints a line and appends it to the results."""
    target = torch.device(device)
    torch_dtype = getattr(torch, dtype or ("bfloat16" if target.type == "cuda" else "float32"))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch_dtype).to(target).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = held_out_pages(pages, tile_side_of(model), first, entries)
    settings: list[zipvl.ZipVLConfig | None] = [None]
    settings += [
        zipvl.ZipVLConfig.paper(tau=float(tau), cache=kind, seed=seed)
        for tau in taus.split(",")
        for kind in cache.split(",")
        if tau
    ]
    for config in settings:
        started = time.perf_counter()
        said, stats = answers(model, tokenizer, held_out, config, batch)
        right = [answer == page.answer for answer, page in zip(said, held_out, strict=True)]
        groups = {
            n: [ok for ok, page in zip(right, held_out, strict=True) if len(page.entries) == n] for n in ENTRY_COUNTS
        }
        measured = {
            "benchmark": "tiny_llava_next",
            "method": "zipvl" if config else "dense",
            "tau": config.tau if config else None,
            "cache": config.cache if config else None,
            "pages": pages,
            "exact_match": sum(right) / pages,
            "interval95": wilson(sum(right), pages),
            "mean_ratio": stats.mean_ratio if stats else 1.0,
            "by_entries": {n: round(sum(group) / len(group), 4) for n, group in groups.items() if group},
            "seconds": round(time.perf_counter() - started, 2),
            "dtype": str(torch_dtype).removeprefix("torch."),
            "batch": batch,
            "weights_sha256": weights_digest(folder),
            "first_page_seed": FIRST_HELD_OUT_SEED + first,
            "entries": entries,
            "probe_seed": seed,
        }
        append(name, measured, target)
        low, high = measured["interval95"]
        print(
            f"{measured['cache'] or 'dense':8s} tau {measured['tau'] or '-':>5} exact {measured['exact_match']:.4f} "
            f"[{low:.4f}, {high:.4f}] kept {measured['mean_ratio']:.3f} {measured['seconds']:.1f} s",
            flush=True,
        )


@app.command()
def plot(name: str = "tiny_llava_next", folder: Path = FOLDER) -> None:
    """Prints a table of the last result for each setting on the most pages, and draws curve.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    digest = weights_digest(folder)
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    lines = [x for x in lines if x["weights_sha256"] == digest and x["cache"] in (None, "drop") and not x["entries"]]
    most = max(line["pages"] for line in lines)
    last = {line["tau"]: line for line in lines if line["pages"] == most}
    dense, curve = last.pop(None), [last[tau] for tau in sorted(last, reverse=True)]
    print("| tau | tokens kept | exact match | 95% interval |\n| --- | --- | --- | --- |")
    for line in [dense, *curve]:
        low, high = (f"{100 * bound:.1f}" for bound in line["interval95"])
        print(f"| {line['tau'] or 'dense'} | {line['mean_ratio']:.1%} | {line['exact_match']:.1%} | {low} to {high} |")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    ratios, exact = [100 * x["mean_ratio"] for x in curve], [100 * x["exact_match"] for x in curve]
    below = [value - 100 * x["interval95"][0] for value, x in zip(exact, curve, strict=True)]
    above = [100 * x["interval95"][1] - value for value, x in zip(exact, curve, strict=True)]
    axes.errorbar(ratios, exact, [below, above], marker="o", capsize=3, label="ZipVL, dropped tokens forgotten")
    axes.axhline(100 * dense["exact_match"], color="grey", linestyle="--", label="dense")
    for line, ratio, value in zip(curve, ratios, exact, strict=True):
        axes.annotate(f"{line['tau']:g}", (ratio, value), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.set(xlabel="prompt tokens kept, %", ylabel=f"exact match on {most} held-out pages, %", ylim=(0, 102))
    axes.legend(loc="lower right")
    figure.savefig(folder / "curve.png", dpi=120)


if __name__ == "__main__":
    app()
