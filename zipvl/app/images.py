"""Pictures as the models' processors take them: upright, RGB, 8 bits a channel."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zipvl.errors import InputError, first_line, shortened

__all__ = ["load_image", "to_rgb"]

_WHITES = (1, 255, 65535)
_OVERSHOOT = 1.1  # resampling a float picture leaves values a little above its white


def load_image(path: Path) -> Image.Image:
    """The picture at ``path`` as upright RGB. Raises ``InputError`` where there is none."""
    shown = shortened(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("image", f"expected a picture file, but {shown} does not exist") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InputError("image", f"expected a picture file, but {shown} is not one: {why}") from error
    if stat.S_ISDIR(mode):
        raise InputError("image", f"expected a picture file, but {shown} is a directory")
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file ends in whatever its format's decoder stumbles over
        raise InputError(
            "image", f"expected a readable picture, but {shown} is not one: {first_line(error)}"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB: grey values of more than 8 bits are scaled, and transparency shows white."""
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
