"""An inspection as one picture."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from zipvl.app.inspect import Inspection, LayerView
from zipvl.app.patches import Grid

__all__ = ["render_png"]

_COLUMNS = 3, 6  # fewest and most panels in a row
_PANEL = 3.0  # inches
_SHAPES = 0.2, 5.0  # height of a panel by its width, at least and at most; a longer page leaves the rest blank
_DPI, _LONGEST = 100.0, 60_000  # matplotlib draws pictures of fewer than 2**16 pixels a side
_PAGE_PIXELS = 900  # a panel shows no more
_DROPPED = (0.16, 0.05, 0.30, 0.80)  # over the page; kept patches stay clear
_BAR, _BAR_DENSE = "#3b6fb6", "#b9b9b9"
_STRIP = ListedColormap(["#2a0f4d", "#f4c430"])  # dropped, kept


def render_png(inspection: Inspection) -> bytes:
    """The page, the ratio of each layer, and for each view of the page one panel a layer."""
    page = inspection.page.copy()
    page.thumbnail((_PAGE_PIXELS, _PAGE_PIXELS), Image.Resampling.LANCZOS)
    layers, grids = inspection.layers, inspection.patches.grids[::-1]
    columns = min(max(_COLUMNS[0], len(layers)), _COLUMNS[1])
    panel_rows = math.ceil(len(layers) / columns)
    height = _PANEL * min(max(page.height / page.width, _SHAPES[0]), _SHAPES[1])
    heights = [max(height, _PANEL) + 0.4] + [height * panel_rows + 0.6] * len(grids) + ([] if grids else [3.0])
    dpi = min(_DPI, _LONGEST / sum(heights))
    figure = Figure(figsize=(_PANEL * columns, sum(heights)), dpi=dpi, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(
        f"{inspection.model}, {inspection.setting}: {inspection.question!r} → {inspection.answer.text!r}",
        parse_math=False,
    )
    _overview(parts[0], inspection, page)
    for part, grid in zip(parts[1:], grids, strict=False):
        part.suptitle(f"{grid.name}, {grid.positions.shape[0]} x {grid.positions.shape[1]} patches; dark: dropped")
        axes = list(part.subplots(panel_rows, columns, squeeze=False).flat)
        for view, axis in zip(layers, axes, strict=False):
            _panel(axis, page, grid, view)
        for axis in axes[len(layers) :]:
            axis.axis("off")
    if not grids:
        _strip(parts[1].subplots(), inspection)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _overview(part: Any, inspection: Inspection, page: Image.Image) -> None:
    """The page, and a bar for each layer."""
    left, right = part.subplots(1, 2, width_ratios=[1, 3])
    left.imshow(page)
    left.set_title(f"page, {inspection.page.width} x {inspection.page.height}")
    left.axis("off")
    layers = inspection.layers
    colors = [_BAR if view.reason is None else _BAR_DENSE for view in layers]
    bars = right.bar([view.layer for view in layers], [view.ratio for view in layers], color=colors)
    right.bar_label(bars, [f"{view.ratio:.0%}" for view in layers], padding=2)
    right.set(ylim=(0, 1.1), xticks=[view.layer for view in layers], xlabel="layer (grey: dense)", ylabel="kept")
    right.set_title(f"tokens kept of {inspection.answer.prompt_tokens:,}")
    right.spines[["top", "right"]].set_visible(False)


def _panel(axis: Any, page: Image.Image, grid: Grid, view: LayerView) -> None:
    """One layer's kept patches over the page."""
    width, height = page.size
    left, top, right, bottom = grid.box
    kept = view.on(grid).numpy()
    axis.imshow(page, extent=(0, width, height, 0))
    axis.imshow(
        np.where(kept[..., None], 0.0, _DROPPED),
        extent=(left * width, right * width, bottom * height, top * height),
        interpolation="nearest",
    )
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axis.set_title(f"layer {view.layer}: {kept.mean():.0%} of patches" + (" (dense)" if view.reason else ""))


def _strip(axis: Any, inspection: Inspection) -> None:
    """Layers by token positions, where the places of image tokens are not known."""
    kept = np.stack([view.kept.numpy() for view in inspection.layers])
    axis.imshow(kept, aspect="auto", interpolation="nearest", cmap=_STRIP, vmin=0, vmax=1)
    axis.set(xlabel="token position (yellow: kept)", ylabel="layer", yticks=range(len(inspection.layers)))
    axis.set_yticklabels([str(view.layer) for view in inspection.layers])
    axis.set_title(f"{inspection.patches.note}; token strip instead of a map")
