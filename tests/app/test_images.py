"""Pictures of every kind become upright 8-bit RGB that shows what a viewer shows, or one line that says why not."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import Result

from zipvl.app.images import load_image, to_rgb
from zipvl.errors import InputError
from zipvl.lmms_eval.prompts import from_context, from_messages

PAPER, INK, GREY = 65535, 0, 20000
SIXTEEN_BITS = np.array([[PAPER, INK, GREY]], np.uint16)


def grey_levels(image: Image.Image) -> list[int]:
    """The grey values of the only row, the same in all channels."""
    row = np.asarray(to_rgb(image))[0]
    assert row.ndim == 2 and (row == row[:, :1]).all()
    return row[:, 0].tolist()


@pytest.mark.parametrize("name", ["page.png", "page.tif", "page.pgm", "page.jp2"])
def test_grey_of_16_bits_is_scaled(tmp_path: Path, name: str) -> None:
    try:
        Image.fromarray(SIXTEEN_BITS).save(tmp_path / name)
    except OSError:
        pytest.skip("this Pillow does not write the format")
    read = np.asarray(load_image(tmp_path / name))
    assert read[0, :, 0] == pytest.approx([255, 0, 78], abs=0 if name != "page.jp2" else 2)


def test_big_endian_grey_of_16_bits() -> None:
    assert grey_levels(Image.frombytes("I;16B", (3, 1), SIXTEEN_BITS.astype(">u2").tobytes())) == [255, 0, 78]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 0], [0, 255, 0]),
        ([0, 78, 255], [0, 78, 255]),
        ([0, 20000, 60000], [0, 78, 233]),
        ([0, 1 << 23, (1 << 24) - 1], [0, 128, 255]),
        ([-100, 0, 155], [0, 100, 255]),
    ],
)
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_of_32_bits_is_scaled_by_its_range(values: list[int], expected: list[int], kind: type) -> None:
    assert grey_levels(Image.fromarray(np.array([values], kind))) == expected


def test_an_integer_above_255_makes_a_picture_of_16_bits() -> None:
    assert grey_levels(Image.fromarray(np.array([[0, 256, 2570]], np.int32))) == [0, 1, 10]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.3, 1.0], [0, 76, 255]),
        ([0.0, 0.3, 1.04], [0, 76, 255]),
        ([0.0, 78.0, 258.0], [0, 78, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, np.nan, 1.0], [0, 255, 255]),
        ([-np.inf, 0.3, np.inf], [0, 76, 255]),
        ([np.nan, np.nan, np.nan], [255, 255, 255]),
        ([-3.0, -3.0, -3.0], [0, 0, 0]),
    ],
)
def test_grey_of_floats_is_scaled_by_its_range(values: list[float], expected: list[int]) -> None:
    """A value that overshoots a white a little is white; one that is not known is paper."""
    assert grey_levels(Image.fromarray(np.array([values], np.float32))) == pytest.approx(expected, abs=1)


def saved(image: Image.Image, kind: str, **options: object) -> Image.Image:
    """``image`` as it comes back from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def drawing(mode: str) -> Image.Image:
    """Black ink on nothing, black beneath."""
    image = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle([20, 20, 40, 40], fill=(0, 0, 0, 255))
    return image.convert(mode)


def ink_on_paper(image: Image.Image) -> bool:
    pixels = np.asarray(to_rgb(image))
    return bool((pixels[0, 0] == 255).all() and (pixels[30, 30] == 0).all())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_shows_white(mode: str, kind: str) -> None:
    assert ink_on_paper(saved(drawing(mode), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))


def test_transparent_colours_of_a_palette_show_white() -> None:
    image = Image.new("P", (60, 60), 0)
    image.putpalette([0] * 6 + [255] * 762)
    ImageDraw.Draw(image).rectangle([20, 20, 40, 40], fill=1)
    assert ink_on_paper(saved(image, "PNG", transparency=0))
    assert ink_on_paper(saved(image, "PNG", transparency=b"\0\xff"))
    assert ink_on_paper(saved(image, "GIF", transparency=0))


@pytest.mark.parametrize(("mode", "colour"), [("1", 0), ("L", 9), ("RGB", (9, 8, 7)), ("I;16", 9)])
def test_a_colour_that_a_file_calls_transparent_shows_white(mode: str, colour: object) -> None:
    assert (np.asarray(to_rgb(saved(Image.new(mode, (4, 4), colour), "PNG", transparency=colour))) == 255).all()


def test_half_transparent_ink_is_grey() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)
    for mode in ("RGBa", "La"):
        assert to_rgb(drawing("RGBA" if mode == "RGBa" else "LA").convert(mode)).getpixel((0, 0)) == (255, 255, 255)


def test_opaque_pictures_are_as_they_were() -> None:
    noise = Image.effect_noise((20, 10), 80)
    for image in (noise, noise.convert("RGB"), noise.convert("P"), noise.convert("CMYK"), noise.convert("RGBA")):
        assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned
    for name, image in (("g.png", Image.fromarray(SIXTEEN_BITS)), ("c.png", Image.new("RGBA", (3, 1)))):
        image.save(tmp_path / name, exif=exif)
        assert load_image(tmp_path / name).size == (1, 3)


def test_pictures_of_an_evaluation_are_read_alike(tmp_path: Path) -> None:
    (image,) = from_context("Q", [drawing("RGBA")], frames=1, as_video=False).images
    assert image.mode == "RGB" and ink_on_paper(image)
    Image.fromarray(SIXTEEN_BITS).save(tmp_path / "page.png")
    (image,) = from_context("Q", [Image.open(tmp_path / "page.png")], frames=1, as_video=False).images
    assert grey_levels(image) == [255, 0, 78]


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith("--image: expected a ") and "\n" not in message and len(message) < 500
    return message


def test_files_that_pillow_does_not_take(tmp_path: Path) -> None:
    page = Image.new("RGB", (60, 40), "white")
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    as_text = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")  # ImageWidth as text
    page.save(tmp_path / "exif.jpg", exif=as_text)
    assert "exif.jpg is not one" in refused(tmp_path / "exif.jpg")  # struct.error
    texture = io.BytesIO()
    page.save(texture, "DDS")
    content = bytearray(texture.getvalue())
    content[80:84] = bytes(4)
    (tmp_path / "flags.dds").write_bytes(content)
    assert "flags.dds is not one" in refused(tmp_path / "flags.dds")  # NotImplementedError


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), KeyError(3), MemoryError()])
def test_whatever_a_decoder_raises_is_one_line(page: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    assert f"{page} is not one" in refused(page)


def test_paths_that_the_file_system_does_not_take(tmp_path: Path, page: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(6000)).decode()
    assert "File name too long" in refused(Path(url)) and url not in refused(Path(url))
    assert "does not exist" in refused(page / "page.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "symbolic links" in refused(tmp_path / "loop.png")
    assert "null byte" in refused(Path("a\0b"))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_frames_behind_the_first_are_said(tmp_path: Path, kind: str) -> None:
    first, *others = (Image.new("RGB", (4, 4), colour) for colour in ("white", "red", "blue"))
    first.save(tmp_path / "pages", kind, save_all=True, append_images=others)
    with pytest.warns(UserWarning, match="pages has 3 frames; the first is read"):
        read = load_image(tmp_path / "pages")
    assert read.getpixel((0, 0)) == (255, 255, 255)


def test_frames_are_a_note_of_the_command_line(zipvl: Callable[..., Result], llava_next: Path, tmp_path: Path) -> None:
    frames = [Image.new("L", (60, 60), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "pages.gif", save_all=True, append_images=frames[1:])
    given = ("run", "--image", tmp_path / "pages.gif", "--question", "KQ", "--max-new-tokens", "1")
    result = zipvl(*given, "--model", llava_next)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"zipvl: note: {tmp_path / 'pages.gif'} has 2 frames; the first is read\n"


def test_open_pictures_are_turned_and_refused_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (3, 1)).save(tmp_path / "page.jpg", exif=exif)
    with Image.open(tmp_path / "page.jpg") as opened:
        (image,) = from_context("Q", [opened], frames=1, as_video=False).images
    assert image.size == (1, 3)
    Image.effect_noise((60, 60), 90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    item = {"type": "image", "url": str(tmp_path / "cut.png")}
    for source in (item, item | {"url": Image.open(tmp_path / "cut.png")}):
        with pytest.raises(InputError, match="expected a readable picture"):
            from_messages([{"role": "user", "content": [source]}], frames=1, as_video=False)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is a device, pipe or socket" in refused(tmp_path / "pipe.png")
    assert "is a device, pipe or socket" in refused(Path("/dev/zero"))


def test_a_thread_of_a_page_is_refused_in_a_line(
    zipvl: Callable[..., Result], llava_next: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (1, 2000), "white").save(tmp_path / "page.png")
    result = zipvl("run", "--image", tmp_path / "page.png", "--question", "KQ", "--model", llava_next)
    assert result.exit_code == 2 and result.stdout == ""
    expected = "expected a picture at most 1000 times as long as it is wide, got one of 1 x 2000"
    assert result.stderr == f"zipvl: --image: {expected}\n"
