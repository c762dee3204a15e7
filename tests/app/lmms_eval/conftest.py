"""lmms-eval, or its stand-in, and pages."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from PIL import Image, ImageDraw

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from . import standin

HAS_LMMS_EVAL = find_spec("lmms_eval") is not None
if not HAS_LMMS_EVAL:
    standin.install()


@pytest.fixture(scope="session")
def pages() -> list[Image.Image]:
    """Pages that differ in what they say and in size."""
    pages = []
    for number, size in enumerate([(100, 130), (112, 112), (130, 100), (60, 112)]):
        page = Image.new("RGB", size, "white")
        ImageDraw.Draw(page).text((10 + 5 * number, 40), f"KQ {482 + number}", fill="black")
        pages.append(page)
    return pages
