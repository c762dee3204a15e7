"""``zipvl inspect``: one self-contained file that shows what each layer kept."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from zipvl import ZipVLConfig
from zipvl.app.images import load_image
from zipvl.app.inspect import Inspection, LayerView, inspect_page, write_report
from zipvl.app.loading import load
from zipvl.errors import InputError

from . import tiny

Zipvl = Callable[..., Result]


def inspect(zipvl: Zipvl, page: Path, model: Path, output: Path, *options: str) -> Result:
    result = zipvl("inspect", "--image", page, "--question", "K<Q>", "--model", model, "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert str(output) in result.stdout.replace("\n", "")
    assert [p.name for p in output.parent.iterdir()] == [output.name]  # no temporary file is left
    return result


def data_of(html: str) -> dict[str, Any]:
    """What the page's script draws from."""
    found = re.search(r"const data = (.*);\n", html)
    assert found
    return json.loads(found[1])


def kept_in(data: dict[str, Any], step: int) -> np.ndarray:
    """``[N]`` bool of one layer."""
    return np.unpackbits(decoded(data["kept"][step], np.uint8))[: data["tokens"]].astype(bool)


def decoded(text: str, kind: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture(scope="module")
def inspection(page: Path, llava_next: Path) -> Inspection:
    return inspect_page(
        load(str(llava_next), device="cpu"), load_image(page), "KQ", ZipVLConfig.paper(ratio=0.3), max_new_tokens=2
    )


def test_layers_hold_what_the_statistics_hold(inspection: Inspection) -> None:
    for view in inspection.layers:
        positions = inspection.answer.stats.layers[view.layer].index[0]
        assert view.kept.nonzero()[:, 0].tolist() == positions.tolist()
    assert inspection.text[-2:] == [(272, "K"), (273, "Q")]
    assert {grid.name: tuple(grid.positions.shape) for grid in inspection.patches.grids} == {
        "base view": (8, 8),
        "tiles": (16, 12),
    }


def test_html(zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path) -> None:
    result = inspect(zipvl, page, llava_next, tmp_path / "out.html", *tiny.PAPER, "--ratio", "0.3")
    assert "tiles: 16 x 12 patches" in result.stdout
    html = (tmp_path / "out.html").read_text()
    assert "K&lt;Q&gt;" in html and "K<Q>" not in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "http" not in html  # nothing is fetched
    data = data_of(html)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2] and len(data["kept"]) == 3
    assert [(grid["rows"], grid["columns"]) for grid in data["grids"]] == [(8, 8), (16, 12)]


def test_html_holds_the_kept_tokens_and_the_patches_places(inspection: Inspection) -> None:
    from zipvl.app.page import render_html

    data = data_of(render_html(inspection))
    for step, view in enumerate(inspection.layers):
        kept = kept_in(data, step)
        assert (kept == view.kept.numpy()).all()
        assert data["layers"][step]["kept"] == view.count and data["layers"][step]["ratio"] == view.ratio
        for packed, grid in zip(data["grids"], inspection.patches.grids, strict=True):
            positions = decoded(packed["positions"], "<i4").reshape(packed["rows"], packed["columns"])
            assert (kept[positions] == view.on(grid).numpy()).all()
    assert data["text"] == [position for position, _ in inspection.text]


def test_a_large_page_makes_no_large_file(inspection: Inspection) -> None:
    """The worst there is for any encoder: noise, as large as a scan."""
    from zipvl.app.page import render_html

    noise = Image.effect_noise((2400, 3000), 90).convert("RGB")
    html = render_html(Inspection(**{**vars(inspection), "page": noise}))
    assert len(html) < 2_000_000
    found = re.search(r"data:image/jpeg;base64,([^\"]+)", html)
    assert found
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as picture:
        assert picture.height / picture.width == pytest.approx(3000 / 2400, rel=0.01) and picture.width > 500


def test_png(zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path) -> None:
    inspect(zipvl, page, llava_next, tmp_path / "out.PNG", "--tau", "0.8")
    with Image.open(tmp_path / "out.PNG") as picture:
        assert picture.format == "PNG" and picture.width >= 800 and len(picture.getcolors(1 << 24)) > 20


def test_png_darkens_dropped_patches(inspection: Inspection) -> None:
    from zipvl.app.png import render_png

    def darkness(ratio: float) -> float:
        views = [
            LayerView(view.layer, view.kept & False if ratio == 0 else view.kept | True, None)
            for view in inspection.layers
        ]
        changed = Inspection(**{**vars(inspection), "layers": views})
        return 255 - np.asarray(Image.open(io.BytesIO(render_png(changed))).convert("L")).mean()

    assert darkness(0) > 1.5 * darkness(1)


@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_unknown_layout_gets_a_strip(
    zipvl: Zipvl, page: Path, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("zipvl.app.patches._square", lambda *args: None)
    options = ["--dense-below", "16", *tiny.PAPER, "--ratio", "0.5"]
    result = inspect(zipvl, page, llava, tmp_path / f"strip{suffix}", *options)
    assert "how llava lays out 64 image tokens on a page is not known here" in result.stdout.replace("\n", " ")
    if suffix == ".html":
        data = data_of((tmp_path / "strip.html").read_text())
        assert data["grids"] == [] and data["tokens"] == 68 and kept_in(data, 0).sum() == 34


def test_dense_run_says_so(zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path) -> None:
    result = inspect(zipvl, page, llava_next, tmp_path / "dense.html", "--dense-below", "5000")
    assert "ZipVL was not active" in result.stdout and "prompt shorter than dense_below=5000" in result.stdout
    html = (tmp_path / "dense.html").read_text()
    assert "ZipVL was not active" in html
    assert all(layer["reason"] and layer["ratio"] == 1 for layer in data_of(html)["layers"])


def test_a_failed_write_leaves_the_old_file(
    inspection: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.html"
    output.write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"--output: .*No space left"):
        write_report(inspection, output)
    assert output.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.html"]


def test_default_output(
    zipvl: Zipvl, page: Path, llava_next: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert zipvl("inspect", "--image", page, "--question", "KQ", "--model", llava_next).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["page-zipvl.html"]
