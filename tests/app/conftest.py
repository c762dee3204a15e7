"""Models, pages and a way to run the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner, Result

pytest.importorskip("transformers")

from zipvl.app.cli import app

from . import tiny


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-NeXT."""
    folder = tmp_path_factory.mktemp("llava-next")
    tiny.save_llava_next(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA 1.5."""
    folder = tmp_path_factory.mktemp("llava")
    tiny.save_llava(folder)
    return folder


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page, taller than wide."""
    path = tmp_path_factory.mktemp("pages") / "page.png"
    image = Image.new("RGB", (100, 130), "white")
    ImageDraw.Draw(image).text((20, 50), "KQ 482", fill="black")
    image.save(path)
    return path


@pytest.fixture
def zipvl() -> Callable[..., Result]:
    """Runs the command line in this process: ``zipvl("run", "--image", ...)``."""
    runner = CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])
