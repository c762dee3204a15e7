"""Pictures as the models' processors take them: upright, RGB, 8 bits a channel."""

from __future__ import annotations

import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zipvl.errors import InputError, first_line, shortened

__all__ = ["load_image", "to_rgb"]

_WHITES = (1, 255, 65535)
_OVERSHOOT = 1.1  # resampling a float picture leaves values a little above its white


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """The picture at a path, or an open one, as upright RGB of 8 bits a channel; see ``to_rgb``.

    Of a file with several frames (GIF, TIFF, APNG, WebP, MPO) it is the first, and a ``UserWarning`` says so.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    shown = "this picture" if isinstance(source, Image.Image) else shortened(source)
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        path = Path(source)
        _check_file(path, shown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about metadata and sizes
            with Image.open(path) as image:
                picture, frames = to_rgb(image), _count_frames(image)
    except InputError:
        raise
    except Exception as error:  # a damaged file ends in whatever its format's decoder stumbles over
        raise InputError(
            "image", f"expected a readable picture, but {shown} is not one: {first_line(error)}"
        ) from error
    if frames > 1:
        warnings.warn(f"{shown} has {frames} frames; the first is read", stacklevel=2)
    return picture


def _check_file(path: Path, shown: str) -> None:
    """Raises ``InputError`` unless there is a file at ``path``."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("image", f"expected a picture file, but {shown} does not exist") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InputError("image", f"expected a picture file, but {shown} is not one: {why}") from error
    if not stat.S_ISREG(mode):
        kind = "directory" if stat.S_ISDIR(mode) else "device, pipe or socket"
        raise InputError("image", f"expected a picture file, but {shown} is a {kind}")


def _count_frames(image: Image.Image) -> int:
    """How many frames the file has, as far as that can be known: those behind the first may be damaged."""
    with suppress(Exception):
        return int(getattr(image, "n_frames", 1))
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB, turned as its EXIF data say.

    Grey values of more than 8 bits are scaled, and transparency shows white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_of_8_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    straight = image.convert("LA") if image.mode == "La" else image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, of 32 bits or of floats, in 8 bits.

    Black is 0, and white is 65535 in a picture of 16 bits. In the other kinds, white is the first of 1, 255 and 65535
    that no value exceeds; with higher or with negative values, black is the lowest value and white the highest.
    """
    values = np.asarray(image)
    transparent = np.isnan(values) | (values == image.info.get("transparency"))
    known = values[np.isfinite(values)]
    black, white = 0.0, 65535.0
    if not image.mode.startswith("I;16") and known.size:
        lowest, highest = float(known.min()), float(known.max())
        slack = _OVERSHOOT if image.mode == "F" else 1.0
        level = next((level for level in _WHITES if highest <= slack * level), None)
        black, white = (lowest, max(highest, lowest + 1)) if lowest < 0 or level is None else (0.0, float(level))
    grey = np.rint((values.astype(np.float64) - black) * (255 / (white - black)))
    return Image.fromarray(np.where(transparent, 255, grey.clip(0, 255)).astype(np.uint8))
