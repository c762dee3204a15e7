"""Damaged pictures and odd arguments end in an answer or in one line with exit code 2, never in a traceback.

``ZIPVL_MUTATIONS=20000`` (pictures) and ``ZIPVL_COMMAND_LINES=5000`` ask for as many examples as that.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from typer.testing import Result

from zipvl.app import loading
from zipvl.app.images import load_image
from zipvl.errors import InputError

PICTURES = int(os.environ.get("ZIPVL_MUTATIONS", "150"))
COMMAND_LINES = int(os.environ.get("ZIPVL_COMMAND_LINES", "25"))
KINDS = [
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"), ("JPEG", "RGB"),
    ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"), ("TIFF", "RGBA"), ("TIFF", "F"), ("TIFF", "I"), ("TIFF", "CMYK"),
    ("WEBP", "RGBA"), ("BMP", "RGB"), ("DDS", "RGBA"), ("ICO", "RGBA"), ("PPM", "RGB"), ("TGA", "RGBA"),
    ("JPEG2000", "RGBA"), ("PCX", "P"), ("SGI", "RGB"), ("ICNS", "RGBA"), ("MSP", "1"), ("XBM", "1"), ("AVIF", "RGB"),
    ("BLP", "P"), ("IM", "RGB"), ("SPIDER", "F"), ("QOI", "RGB"),
]  # fmt: skip


@cache
def written(kind: str, mode: str) -> bytes | None:
    """A file of that kind, with EXIF data and two frames where it may have them; None: this Pillow writes none."""
    page = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    ImageDraw.Draw(page).rectangle([8, 4, 30, 20], fill=(0, 0, 0, 255))
    image = Image.new(mode, page.size, 40000) if mode in ("I;16", "I", "F") else page.convert(mode)
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "WEBP", "AVIF"):
        options["exif"] = exif
    if kind in ("GIF", "TIFF"):
        options |= {"save_all": True, "append_images": [image.rotate(90)]}
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except (KeyError, OSError, ValueError):
        return None
    return buffer.getvalue()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture's file with bytes changed, mostly in its head, cut out, doubled or cut off."""
    content = bytearray(draw(st.sampled_from([w for kind in KINDS if (w := written(*kind)) is not None])))
    for _ in range(draw(st.integers(0, 6))):
        head = draw(st.booleans())
        place = draw(st.integers(0, min(len(content), 160) if head else len(content)))
        change = draw(st.sampled_from(("set", "set", "set", "cut", "double")))
        few = content[place : place + draw(st.integers(1, 8))]
        if change == "set":
            content[place : place + len(few)] = draw(st.binary(min_size=len(few), max_size=len(few)))
        else:
            content[place : place + len(few)] = b"" if change == "cut" else few * 2
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content)


@settings(max_examples=PICTURES, deadline=None)
@given(damaged())
def test_a_damaged_picture_is_read_or_refused_in_a_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".* frames; the first is read")
        path = Path(folder) / "page"
        path.write_bytes(content)
        try:
            picture = load_image(path)
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith("--image: expected a ")
        else:
            assert picture.mode == "RGB" and min(picture.size) > 0


_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12)
_NUMBER = st.one_of(
    st.integers(-3, 200).map(str),
    st.floats().map(str),
    st.sampled_from(["", "1e999", "0x10", "9" * 30, "9" * 5000, "--3", "½", "auto", "1_0", " 7"]),
    _TEXT,
)
_SMALL = st.one_of(st.integers(-2, 3).map(str), st.sampled_from(["", "1.5", "-" + "9" * 30, "0x2", "1_", "auto"]))
_BYTES = st.binary(max_size=8).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))
_ANY_OPTIONS = {
    "--tau": _NUMBER,
    "--ratio": _NUMBER,
    "--cache": st.one_of(st.sampled_from(["drop", "quantize", "full", "FULL", ""]), _TEXT),
    "--dense-below": _NUMBER,
    "--max-ratio": _NUMBER,
    "--local-window": _NUMBER,
    "--num-sinks": _NUMBER,
    "--dense-first-layers": _NUMBER,
    "--seed": _NUMBER,
    "--max-new-tokens": _SMALL,
    "--device": st.one_of(
        st.sampled_from(["cpu", "cpu:0", "cpu:1", "cuda:-1", "cuda:" + "9" * 40, "cpu:" + "9" * 40, "mps", "meta"]),
        _TEXT,
    ),
    "--dtype": st.one_of(
        st.sampled_from(["float32", "bfloat16", "float16", "auto", "float64", "torch.float32"]), _TEXT
    ),
    "--question": st.one_of(
        _TEXT, _BYTES, st.sampled_from(["<image>", "<image><image>", "<eos>", "a\nb", "[bold]", "\\"])
    ),
    "--keep-text": st.none(),
    "--no-keep-text": st.none(),
    "--json": st.none(),
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command and up to four options, most of them odd."""
    names = draw(st.lists(st.sampled_from(sorted(_ANY_OPTIONS)), max_size=4, unique=True))
    line = []
    for name in names:
        value = draw(_ANY_OPTIONS[name])
        line += [name] if value is None else [f"{name}={value}"]
    return [draw(st.sampled_from(["run", "run", "inspect"])), *line]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pages from a point to a thread."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = [(100, 130), (1, 1), (1, 300), (300, 1), (3, 2)]
    paths = [folder / f"{width}x{height}.png" for width, height in sizes]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, "white").save(path)
    return paths


def in_a_line(result: Result) -> None:
    """Asserts an answer, or exit code 2 and one line."""
    assert result.exit_code in (0, 2), (result.exception, result.output)
    if result.exit_code == 2:
        assert result.stdout == "" and result.stderr.startswith("zipvl: ") and result.stderr.count("\n") == 1, (
            result.stderr
        )


@settings(max_examples=COMMAND_LINES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(["inspect"], 2)
@example(["run", "--question=<image>"], 0)
@given(command_lines(), st.integers(0, 4))
def test_an_odd_command_line_is_answered_or_refused_in_a_line(
    zipvl: Callable[..., Result],
    llava_next: Path,
    shapes: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: list[str],
    shape: int,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(loading, "load", _loaded_once)
        command, *options = line
        if command == "inspect":
            options = [option for option in options if option != "--json"] + ["--output", str(tmp_path / "out.png")]
        if not any(option.startswith("--question") for option in options):
            options += ["--question", "KQ"]
        if not any(option.startswith("--max-new-tokens") for option in options):
            options += ["--max-new-tokens", "1"]
        in_a_line(zipvl(command, "--image", shapes[shape], "--model", llava_next, *options))


_load = loading.load


@cache
def _loaded_once(name: str, *, device: str, dtype: str) -> Any:
    return _load(name, device=device, dtype=dtype)
