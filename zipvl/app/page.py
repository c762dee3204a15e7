"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from zipvl.app.inspect import Inspection
from zipvl.app.patches import Grid

__all__ = ["render_html"]

_TEMPLATE = Path(__file__).with_name("page.html")
_LONGEST_SIDE = 1600  # pixels; a screen shows no more of the page
_LARGEST_PNG = 400_000  # bytes; a page that is larger goes in as JPEG,
_LARGEST_JPEG = 900_000  # bytes; and smaller until it is no larger than this
_JPEG_QUALITY, _SHRINK = 88, 0.75


def render_html(inspection: Inspection) -> str:
    """The page under a map of each layer's kept patches, a slider over the layers, the ratio of each layer, the kept
    tokens along the prompt and the text tokens. Nothing in it is fetched from elsewhere."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    grids = inspection.patches.grids
    layers: list[dict[str, Any]] = [
        {"layer": view.layer, "kept": view.count, "ratio": view.ratio, "reason": view.reason}
        for view in inspection.layers
    ]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        question=inspection.question,
        answer=inspection.answer.text,
        model=inspection.model,
        setting=inspection.setting,
        note=inspection.patches.note,
        active=inspection.answer.stats.active,
        tokens=inspection.answer.prompt_tokens,
        image_tokens=len(inspection.patches.image),
        mean=sum(view.ratio for view in inspection.layers) / len(layers),
        page=_picture(inspection.page),
        layers=layers,
        grids=[_place(grid) for grid in grids],
        texts=[text for _, text in inspection.text],
        data={
            "tokens": inspection.answer.prompt_tokens,
            "layers": layers,
            "kept": [_base64(np.packbits(view.kept.numpy())) for view in inspection.layers],
            "grids": [_place(grid) | {"positions": _base64(grid.positions.numpy().astype("<i4"))} for grid in grids],
            "text": [position for position, _ in inspection.text],
        },
    )


def _place(grid: Grid) -> dict[str, Any]:
    """A grid's name and size, and where it lies on the page."""
    rows, columns = grid.positions.shape
    left, top, right, bottom = grid.box
    style = f"left:{left:.4%};top:{top:.4%};width:{right - left:.4%};height:{bottom - top:.4%}"
    return {"name": grid.name, "rows": rows, "columns": columns, "style": style}


def _picture(page: Image.Image) -> str:
    """The page as a data URI of moderate size."""
    page = page.copy()
    page.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    content, kind = _encoded(page, format="PNG", optimize=True), "png"
    if len(content) > _LARGEST_PNG:
        kind = "jpeg"
        while len(content := _encoded(page, format="JPEG", quality=_JPEG_QUALITY)) > _LARGEST_JPEG:
            page = page.resize((round(_SHRINK * page.width), round(_SHRINK * page.height)), Image.Resampling.LANCZOS)
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
