"""The page of ``zipvl inspect`` in a real browser: it is opened, its slider is moved, and what it shows is read off."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zipvl import ZipVLConfig
from zipvl.app.images import load_image
from zipvl.app.inspect import Inspection, inspect_page, write_report
from zipvl.app.loading import load
from zipvl.app.page import render_html

from . import browser
from .browser import Browser

EXECUTABLE = browser.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium is installed (apt-get install chromium, or set CHROMIUM)"
)

HOME, LEFT, RIGHT, END = ("Home", 36), ("ArrowLeft", 37), ("ArrowRight", 39), ("End", 35)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with Browser(EXECUTABLE) as opened:
        yield opened


@pytest.fixture(scope="module")
def inspection(page: Path, llava_next: Path) -> Inspection:
    return inspect_page(
        load(str(llava_next), device="cpu"), load_image(page), "K<Q>&", ZipVLConfig.paper(tau=0.8), max_new_tokens=2
    )


@pytest.fixture(scope="module")
def html(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(inspection, path)
    return path


def shown(chromium: Browser) -> str:
    return str(chromium.run("document.querySelector('output').textContent"))


def layer_text(inspection: Inspection, step: int) -> str:
    view = inspection.layers[step]
    return f"Layer {view.layer}: {view.count:,} of {len(view.kept):,} tokens kept ({view.ratio:.1%})"


def pixels(chromium: Browser, selector: str) -> np.ndarray:
    """``[H, W, 4]`` of a canvas."""
    flat = chromium.run(
        f"(() => {{ const drawn = document.querySelector({selector!r}), size = [drawn.width, drawn.height];"
        "const copy = new OffscreenCanvas(...size).getContext('2d', {willReadFrequently: true});"
        "copy.drawImage(drawn, 0, 0); return [...copy.getImageData(0, 0, ...size).data, drawn.width]; })()"
    )
    return np.array(flat[:-1], np.uint8).reshape(-1, flat[-1], 4)


def test_every_layer_is_shown_as_the_statistics_have_it(chromium: Browser, html: Path, inspection: Inspection) -> None:
    """The slider is moved by the keyboard; count, map, marked bar and text tokens follow it."""
    chromium.open(html, width=1280)
    assert len({view.count for view in inspection.layers}) > 1  # so that a slider that does nothing is seen
    chromium.run("document.getElementById('slider').focus()")
    chromium.press(*HOME)
    assert shown(chromium) == "All layers: how many of the layers keep each token"
    for step, view in enumerate(inspection.layers):
        chromium.press(*RIGHT)
        assert shown(chromium) == layer_text(inspection, step)
        assert chromium.run("[...document.querySelectorAll('.bar.on')].map(bar => bar.dataset.step)") == [str(step + 1)]
        assert chromium.run("slider.getAttribute('aria-valuetext')") == shown(chromium)
        tiles = inspection.patches.grids[1]
        rows, columns = tiles.positions.shape
        drawn = pixels(chromium, "canvas.map.on")
        side = drawn.shape[0] // rows
        middles = drawn[side // 2 :: side, side // 2 :: side, 3]
        assert middles.shape == (rows, columns) and ((middles == 0) == view.on(tiles).numpy()).all()
        strip = pixels(chromium, "#strip")[0, :, 0] > 200
        assert (strip == view.kept.numpy()).all()
        on = chromium.run("[...document.querySelectorAll('.token')].map(token => token.classList.contains('on'))")
        assert on == [bool(view.kept[position]) for position, _ in inspection.text]
    chromium.press(*LEFT)
    assert shown(chromium) == layer_text(inspection, len(inspection.layers) - 2)
    assert chromium.errors == []


def test_the_mouse_does_what_the_keyboard_does(chromium: Browser, html: Path, inspection: Inspection) -> None:
    chromium.open(html, width=1280)
    chromium.click(".bar[data-step='3']")
    assert shown(chromium) == layer_text(inspection, 2)
    assert chromium.run("document.activeElement.id") == "slider"
    chromium.click("input[name=grid][value='0']")
    base = inspection.patches.grids[0]
    kept = inspection.layers[2].on(base).numpy()
    assert chromium.run("hint.textContent").startswith(f"{kept.sum()} of {kept.size} patches kept")
    row, column = 5, 2
    chromium.move_to("canvas.map.on", (column + 0.5) / 8, (row + 0.5) / 8)
    position = int(base.positions[row, column])
    by = [str(view.layer) for view in inspection.layers if view.kept[position]]
    assert chromium.run("patch.textContent") == (
        f"Row {row}, column {column} (token {position}): kept by {len(by)} of 3 layers"
        + (": " + ", ".join(by)) * bool(by)
    )
    chromium.click("input[name=grid][value='-1']")
    assert chromium.run("document.querySelectorAll('canvas.map.on').length") == 0


def test_all_layers_together_are_a_heat_map(chromium: Browser, html: Path, inspection: Inspection) -> None:
    chromium.open(html, width=1280)
    chromium.run("slider.focus()")
    chromium.press(*HOME)
    share = inspection.share.numpy()[inspection.patches.grids[1].positions.numpy()]
    drawn = pixels(chromium, "canvas.map.on")
    side = drawn.shape[0] // share.shape[0]
    middles = drawn[side // 2 :: side, side // 2 :: side]
    brightness = middles[..., :3].astype(int).sum(-1)
    assert len(np.unique(share)) > 2
    assert (np.diff([brightness[share == level].mean() for level in np.unique(share)]) > 20).all()
    assert (np.abs(middles[..., 3].astype(int) - 168) < 3).all()  # the page shows through everywhere


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_readable(chromium: Browser, html: Path, width: int, dark: bool) -> None:
    """Nothing sticks out sideways, the ground is light or dark, and text stands out from it (WCAG's 4.5 to 1)."""
    chromium.open(html, width=width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert (
        chromium.run(
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && "
            "!e.closest('.page')).map(e => e.outerHTML.slice(0, 80))"
        )
        == []
    )
    corner = np.asarray(Image.open(io.BytesIO(chromium.screenshot())).convert("L"))[2, 2]
    assert corner < 60 if dark else corner > 220
    for selector in ("h1 b", ".quiet", "#title", "legend", ".bar b", ".token.on", ".layers span.on"):
        assert contrast(chromium, selector) >= 4.5, selector


def contrast(chromium: Browser, selector: str) -> float:
    """The ratio of luminances of an element's text and of what lies behind it."""
    colors = chromium.run(
        f"(() => {{ const e = document.querySelector({selector!r}); let ground = e; "
        "while (/, 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;"
        "return [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor]; })()"
    )
    levels = []
    for color in colors:
        parts = np.array([float(v) for v in color[color.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        levels.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(levels) / min(levels)


def test_a_layer_can_be_linked_to(chromium: Browser, html: Path, inspection: Inspection) -> None:
    chromium.open(html, width=1280)
    for fragment, expected in (
        ("layer=2", layer_text(inspection, 2)),
        ("layer=9", layer_text(inspection, 2)),
        ("layer=all", "All layers: how many of the layers keep each token"),
        ("layer=0", layer_text(inspection, 0)),
    ):
        chromium.run(
            f"new Promise(done => {{ addEventListener('hashchange', done, {{once: true}}); "
            f"location.hash = '{fragment}'; }}).then(() => null)"
        )
        assert shown(chromium) == expected


def test_no_layout_no_map(chromium: Browser, inspection: Inspection, tmp_path: Path) -> None:
    from zipvl.app.patches import PatchMap

    unknown = PatchMap(inspection.patches.image, note="how foo lays out its tokens is not known here")
    path = tmp_path / "strip.html"
    path.write_text(render_html(Inspection(**{**vars(inspection), "patches": unknown})))
    chromium.open(path, width=420)
    chromium.run("slider.focus()")
    chromium.press(*END)
    assert shown(chromium) == layer_text(inspection, 2)
    assert "how foo lays out its tokens" in chromium.run("document.querySelector('.note').textContent")
    assert chromium.errors == []


def test_nothing_is_fetched_and_nothing_complains(chromium: Browser, html: Path) -> None:
    """Over all the tests of this file."""
    assert chromium.errors == []
    assert all(address.startswith("file://") and address.endswith(".html") for address in chromium.requests)
    assert chromium.requests
