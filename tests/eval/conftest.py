"""lmms-eval, or its stand-in, and a tiny model in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.cli import tiny

from . import standin

HAS_LMMS_EVAL = find_spec("lmms_eval") is not None
if not HAS_LMMS_EVAL:
    standin.install()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more to the threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-NeXT."""
    folder = tmp_path_factory.mktemp("llava-next")
    tiny.save_llava_next(folder)
    return folder


@pytest.fixture(scope="session")
def pages() -> list[Image.Image]:
    """Pages that differ in what they say and in size."""
    pages = []
    for number, size in enumerate([(100, 130), (112, 112), (130, 100), (60, 112)]):
        page = Image.new("RGB", size, "white")
        ImageDraw.Draw(page).text((10 + 5 * number, 40), f"KQ {482 + number}", fill="black")
        pages.append(page)
    return pages
