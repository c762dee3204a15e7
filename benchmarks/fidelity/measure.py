"""Runs every sample of every setting once, through the journal, and makes a row of numbers of each setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import zipvl
from benchmarks.fidelity import text_measures
from benchmarks.fidelity.texts import KEY_LENGTHS, Key, Text
from zipvl.app.calibrate import settings
from zipvl.app.calibrate.intervals import mean_interval, paired_interval, wilson
from zipvl.app.calibrate.journal import Journal, Line

__all__ = ["PAGE_FIRST", "keys", "page_names", "pages", "row", "texts"]

PAGE_FIRST = {"report": 0, "tune": 300_000}
"""The first held-out page of each split; training and calibration have others."""


def texts(model: Any, samples: list[Text], names: list[str], journal: Journal) -> None:
    """Next tokens of each text under each setting, and dense."""
    for text in tqdm(samples, desc="texts", leave=False):
        missing = [name for name in (settings.DENSE, *names) if journal.get("text", name, text.name) is None]
        if not missing:
            continue
        dense, run = text_measures.next_tokens(model, text, None)
        for name in tqdm(missing, desc=text.name, leave=False):
            found: Tensor = dense
            if name != settings.DENSE:
                found, run = text_measures.next_tokens(model, text, settings.config(name))
            compared = text_measures.compare(dense, found, text)
            journal.add("text", name, text.name, **compared, **dataclasses.asdict(run))


def keys(model: Any, samples: list[Key], names: list[str], journal: Journal) -> None:
    """Each key under each setting, and dense."""
    for key in tqdm(samples, desc="keys", leave=False):
        for name in (settings.DENSE, *names):
            if journal.get("key", name, key.name) is None:
                right, run = text_measures.find_key(model, key, settings.config(name))
                journal.add("key", name, key.name, right=right, **dataclasses.asdict(run))


def page_names(split: str, count: int) -> list[str]:
    """The names of the pages of a split."""
    return [f"page {PAGE_FIRST[split] + number}" for number in range(count)]


def pages(subject: Any, split: str, count: int, names: list[str], journal: Journal) -> None:
    """Each page's question under each setting, and dense; a batch's mean share is that of each of its pages.

    Args:
        subject: a ``benchmarks.paper.subject.Subject``.
    """
    samples = page_names(split, count)
    wanted = (settings.DENSE, *names)
    starts = range(0, count, subject.batch)
    for start in tqdm(starts, desc="pages", leave=False):
        of_batch = samples[start : start + subject.batch]
        missing = [name for name in wanted if len(journal.lines("page", name, of_batch)) < len(of_batch)]
        if not missing:
            continue
        batches = [subject.encoded(subject.items("mixed", len(of_batch), PAGE_FIRST[split] + start))]
        for name in missing:
            config = settings.config(name)
            answers = subject.answers(batches, _context(subject.model, config), name)
            stats, kept, share = answers.record, 1.0, 1.0
            if stats is not None:
                if not stats.active:
                    raise RuntimeError(f"fidelity: {name}: no layer was sparse: {stats.layers[0].reason}")
                kept, share = stats.mean_ratio, stats.cache_bytes / stats.full_cache_bytes
            for sample, right in zip(of_batch, answers.right, strict=True):
                journal.add("page", name, sample, right=right, kept=kept, cache_share=share)


def _context(model: Any, config: zipvl.ZipVLConfig | None) -> Any:
    return lambda: nullcontext() if config is None else zipvl.sparse(model, config)


def row(name: str, journal: Journal, samples: dict[str, list[str]]) -> dict[str, Any]:
    """What one setting lost, by measure, with 95% intervals; samples not measured are left out.

    Args:
        samples: names of the ``text``, ``key`` and ``page`` samples.
    """
    config = settings.config(name)
    found: dict[str, Any] = {"setting": name, "config": None if config is None else settings.changes(name)}
    of = {measure: list(_pairs(journal, measure, name, wanted)) for measure, wanted in samples.items()}
    if pairs := of.get("text"):
        found["text"] = {"samples": len(pairs)} | _costs(pairs)
        for number in ("kl", "same", "nll"):
            values = [line[number] for _, line in pairs]
            found["text"][number] = sum(values) / len(values)
            found["text"][f"{number}_interval95"] = mean_interval(values)
        kinds = {
            kind: [line for text, line in pairs if text["sample"].startswith("topics") == (kind == "prose")]
            for kind in ("code", "prose")
        }
        found["text"]["kl_by_kind"] = {
            k: sum(x["kl"] for x in lines) / len(lines) for k, lines in kinds.items() if lines
        }
    if pairs := of.get("key"):
        groups = {str(n): [p for p in pairs if p[1]["sample"].startswith(f"{n} ")] for n in KEY_LENGTHS}
        found["key"] = _right(pairs) | _costs(pairs) | {"by_length": {n: _right(g) for n, g in groups.items() if g}}
    if pairs := of.get("page"):
        found["page"] = _right(pairs) | _costs(pairs)
    return found


def _pairs(journal: Journal, measure: str, name: str, samples: list[str]) -> Iterator[tuple[Line, Line]]:
    """The lines of dense and of a setting, sample by sample."""
    for sample in samples:
        dense, line = journal.get(measure, settings.DENSE, sample), journal.get(measure, name, sample)
        if dense is not None and line is not None:
            yield dense, line


def _right(pairs: list[tuple[Line, Line]]) -> dict[str, Any]:
    dense, right = [line["right"] for line, _ in pairs], [line["right"] for _, line in pairs]
    return {
        "samples": len(pairs),
        "right": sum(right) / len(right),
        "interval95": wilson(sum(right), len(right)),
        "against_dense": (sum(right) - sum(dense)) / len(right),
        "against_dense_interval95": paired_interval(right, dense),
        "answers": "".join("01"[answer] for answer in right),
    }


def _costs(pairs: list[tuple[Line, Line]]) -> dict[str, float]:
    """Means of what was kept, and medians of times and of dense's time over them."""
    found = {field: sum(line[field] for _, line in pairs) / len(pairs) for field in ("kept", "cache_share")}
    for field in ("layer_ms", "prefill_ms"):
        if field in pairs[0][1]:
            times = torch.tensor([[dense[field], line[field]] for dense, line in pairs], dtype=torch.float64)
            found[field] = float(times[:, 1].median())
            found[f"{field}_speedup"] = float((times[:, 0] / times[:, 1]).median())
    return found
