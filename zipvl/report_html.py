"""An inspection as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib import colormaps
from PIL import Image

from zipvl.report import Inspection

__all__ = ["render_html"]

_DROPPED = (41, 13, 77, 205)  # over the page; kept patches stay clear
_HEAT_ALPHA = 170
_KEPT_MARK, _DROPPED_MARK = (244, 196, 48, 255), (42, 15, 77, 255)


def render_html(inspection: Inspection) -> str:
    """The page under one overlay a layer, a slider over the layers, ratios, and the text tokens that were kept."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        inspection=inspection,
        mean=sum(view.ratio for view in inspection.layers) / len(inspection.layers),
        page=_data_uri(inspection.page),
        steps=[_heat(inspection), *_layers(inspection)],
        grids=[
            {
                "name": grid.name,
                "shape": f"{grid.positions.shape[0]} x {grid.positions.shape[1]}",
                "style": f"left:{grid.box[0]:.4%};top:{grid.box[1]:.4%};"
                f"width:{grid.box[2] - grid.box[0]:.4%};height:{grid.box[3] - grid.box[1]:.4%}",
            }
            for grid in inspection.patches.grids
        ],
        tokens=[text for _, text in inspection.text],
    )


def _layers(inspection: Inspection) -> list[dict[str, Any]]:
    total = inspection.answer.prompt_tokens
    steps = []
    for view in inspection.layers:
        kept = view.kept.numpy()
        steps.append(
            {
                "title": f"layer {view.layer}",
                "detail": f"{view.count:,} of {total:,} tokens kept ({view.ratio:.1%})"
                + (f"; dense: {view.reason}" if view.reason else ""),
                "ratio": view.ratio,
                "dense": view.reason is not None,
                "maps": [_marks(view.on(g).numpy(), (0, 0, 0, 0), _DROPPED) for g in inspection.patches.grids],
                "strip": _marks(kept[None], _KEPT_MARK, _DROPPED_MARK),
                "text": [float(kept[position]) for position, _ in inspection.text],
            }
        )
    return steps


def _heat(inspection: Inspection) -> dict[str, Any]:
    """The slider's first step: the share of layers that keep each token."""
    share = inspection.share.numpy()
    return {
        "title": "all layers",
        "detail": "share of layers that keep each patch, dark: none, bright: all",
        "maps": [_heat_map(share[g.positions.numpy()], _HEAT_ALPHA) for g in inspection.patches.grids],
        "strip": _heat_map(share[None], 255),
        "text": [float(share[position]) for position, _ in inspection.text],
    }


def _marks(kept: np.ndarray, on: tuple[int, ...], off: tuple[int, ...]) -> str:
    return _data_uri(Image.fromarray(np.where(kept[..., None], np.array(on, np.uint8), np.array(off, np.uint8))))


def _heat_map(share: np.ndarray, alpha: int) -> str:
    pixels = colormaps["inferno"](share, bytes=True).copy()
    pixels[..., 3] = alpha
    return _data_uri(Image.fromarray(pixels))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ZipVL: {{ inspection.question }}</title>
<style>
  :root { color-scheme: light; }
  body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1240px; padding: 20px; color: #1d1b26; }
  h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 22px 0 6px; }
  .quiet { color: #6a6577; } .row { display: flex; flex-wrap: wrap; gap: 28px; } .row > div { flex: 1 1 480px; }
  .page { position: relative; overflow: hidden; border: 1px solid #ccc; line-height: 0; }
  .page > img { width: 100%; }
  .page .map { position: absolute; image-rendering: pixelated; display: none; }
  .page .map.on { display: block; }
  #strip { width: 100%; height: 34px; image-rendering: pixelated; display: block; }
  input[type=range] { width: 100%; } label { margin-right: 14px; }
  .bars { display: flex; align-items: flex-end; height: 150px; gap: 3px; border-bottom: 1px solid #999; }
  .bar { flex: 1; background: #3b6fb6; cursor: pointer; min-width: 3px; border: 0; padding: 0; }
  .bar.dense { background: #b9b9b9; } .bar.on { background: #e08a1e; }
  .numbers { display: flex; gap: 3px; font-size: 11px; } .numbers span { flex: 1; text-align: center; }
  .token { display: inline-block; white-space: pre; border: 1px solid #d8d4e2; border-radius: 3px; margin: 1px;
           padding: 0 3px; min-width: 5px; font-family: ui-monospace, monospace; font-size: 13px; }
  .note { background: #fff4d6; border-left: 4px solid #e0a91e; padding: 8px 12px; }
</style>
</head>
<body>
<h1>{{ inspection.question }} → {{ inspection.answer.text or "(empty answer)" }}</h1>
<div class="quiet">{{ inspection.model }}, {{ inspection.setting }};
{{ "{:,}".format(inspection.answer.prompt_tokens) }} prompt tokens, {{ "{:,}".format(inspection.patches.image|length) }}
of them of the page; {{ "{:.1%}".format(mean) }} kept in the mean over layers</div>
{% if inspection.patches.note %}
<p class="note">{{ inspection.patches.note }}; the strip of token positions below takes the place of a map.</p>
{% endif %}
<p><input type="range" id="slider" min="0" max="{{ steps|length - 1 }}" value="1" aria-label="layer">
<b id="title"></b> <span id="detail" class="quiet"></span></p>
<div class="row">
<div>
  {% if grids|length > 1 %}
  <div>{% for grid in grids %}
  <label><input type="radio" name="grid" value="{{ loop.index0 }}"{{ " checked" if loop.last }}>
  {{ grid.name }}, {{ grid.shape }}</label>
  {% endfor %}<label><input type="radio" name="grid" value="-1"> page alone</label></div>
  {% endif %}
  <div class="page"><img src="{{ page }}" alt="the page">
  {% for grid in grids %}<img class="map" style="{{ grid.style }}" alt="">{% endfor %}
  </div>
  {% if grids %}<div class="quiet">Of one layer, dark patches were dropped and clear ones kept.</div>{% endif %}
</div>
<div>
  <h2>Tokens kept, layer by layer</h2>
  <div class="bars">{% for step in steps[1:] %}
    <button class="bar{{ " dense" if step.dense }}" style="height:{{ "%.2f"|format(100 * step.ratio) }}%"
      data-step="{{ loop.index }}" title="{{ step.title }}: {{ step.detail }}"></button>{% endfor %}
  </div>
  <div class="numbers">{% for step in steps[1:] %}<span>{{ "%.0f"|format(100 * step.ratio) }}%</span>{% endfor %}</div>
  <div class="numbers quiet">{% for step in steps[1:] %}<span>{{ step.title.split()[1] }}</span>{% endfor %}</div>
  <h2>Along the prompt</h2>
  <img id="strip" alt="kept tokens by position">
  <div class="quiet">Token 0 on the left; yellow: kept, dark: dropped.</div>
  <h2>Text tokens</h2>
  <div>{% for token in tokens %}<span class="token">{{ token }}</span>{% endfor %}</div>
  <div class="quiet">Yellow: kept.</div>
</div>
</div>
<script>
const steps = {{ steps|tojson }};
const maps = document.querySelectorAll(".map"), slider = document.getElementById("slider");
function show() {
  const at = Number(slider.value), step = steps[at];
  const radio = document.querySelector("input[name=grid]:checked"), grid = radio ? Number(radio.value) : 0;
  document.getElementById("title").textContent = step.title;
  document.getElementById("detail").textContent = step.detail;
  document.getElementById("strip").src = step.strip;
  maps.forEach((map, i) => { map.src = step.maps[i]; map.classList.toggle("on", i === grid); });
  document.querySelectorAll(".bar").forEach(bar => bar.classList.toggle("on", Number(bar.dataset.step) === at));
  document.querySelectorAll(".token").forEach((token, i) => {
    token.style.background = `rgba(244, 196, 48, ${step.text[i]})`;
  });
}
slider.addEventListener("input", show);
document.querySelectorAll("input[name=grid]").forEach(radio => radio.addEventListener("change", show));
document.querySelectorAll(".bar").forEach(bar => bar.addEventListener("click", () => {
  slider.value = bar.dataset.step; show();
}));
show();
</script>
</body>
</html>
"""
