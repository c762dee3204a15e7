"""The kinds of ZipVL that Table A has, by name, on a model of any depth: what times and answers are matched by."""

from __future__ import annotations

from typing import Any

__all__ = ["FAMILIES", "LARGER_BUDGETS", "PAPER_BUDGETS", "RIVALS", "fields", "method_of"]

PAPER_BUDGETS = {"VisionZip": 0.333, "AIM": 0.064, "PyramidDrop": 0.468}
"""Table A's token budgets of the baselines, from the paper's supplementary material."""
LARGER_BUDGETS = (0.6, 0.8)
"""Of the baselines alone: a pruner may keep more tokens in the time that ZipVL takes."""
RIVALS = ("VisionZip", "AIM", "PyramidDrop", "FastV")

_KEPT = {"cache": "full", "keep_text": True}
_WINDOW = {"num_sinks": 4, **_KEPT}
HALF = "skip_mlp_layers"
FAMILIES: dict[str, dict[str, Any]] = {
    "ZipVL": {},
    "ZipVL, window 512": {"local_window": 512, **_WINDOW},
    "ZipVL, window 128": {"local_window": 128, **_WINDOW},
    "ZipVL, window 128, skipped MLPs": {"local_window": 128, **_WINDOW, HALF: True},
    "ZipVL, skipped MLPs": {**_KEPT, HALF: True},
}
"""What each changes of the paper's configuration, but for ``tau`` or ``ratio``; the second is the default
configuration. Skipped MLPs are those of every second layer, the first layer's not among them."""


def fields(family: str, layers: int) -> dict[str, Any]:
    """The fields of ``ZipVLConfig.paper`` that a family sets on a model of so many layers.

    Raises:
        KeyError: there is no such family.
    """
    found = dict(FAMILIES[family])
    if found.get(HALF):
        found[HALF] = tuple(range(1, layers, 2))
    return found


def method_of(row: dict[str, Any]) -> str:
    """Whose time a row of Table A takes: ``dense``, a family, or a baseline."""
    method = str(row["parameters"]["method"])
    if method != "zipvl":
        return method
    return row["label"] if row["label"] in FAMILIES else "ZipVL"
