"""Where on the page the image tokens of a prompt lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Grid", "PatchMap", "patch_map"]

_ANYRES_MODELS = ("llava_next", "llava_next_video", "llava_onevision")


@dataclass(frozen=True)
class Grid:
    """One view of the page as rows and columns of image tokens.

    Attributes:
        name: what the view is.
        positions: ``[rows, columns]`` int64, each patch's token position in the prompt.
        box: left, top, right and bottom of the grid on the page, in fractions of its width and height; a grid that
            covers padding reaches beyond 0 or 1.
    """

    name: str
    positions: Tensor
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class PatchMap:
    """The image tokens of a prompt: those with a place on the page, and the others.

    Attributes:
        image: positions of all image tokens, ascending.
        grids: views of the page, finest last; empty where their layout is not known.
        separators: image tokens without a place, such as row ends.
        note: why there are no grids.
    """

    image: Tensor
    grids: tuple[Grid, ...] = ()
    separators: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    note: str | None = None


def patch_map(model_config: Any, processor: Any, inputs: Any, page_size: tuple[int, int]) -> PatchMap:
    """Map the image tokens of a prompt of one page to places on that page.

    Known layouts: LLaVA-NeXT's (a base view and the unpadded patches of the tiles, one row end after each row),
    Qwen-VL's (``image_grid_thw``) and a single square view (LLaVA, InternVL and Gemma 3 with one tile). A layout is
    only trusted if it accounts for every image token.

    Args:
        model_config: the model's configuration.
        processor: its processor.
        inputs: what the processor made of the page and the question; batch 1.
        page_size: width and height of the page in pixels.
    """
    image = _image_positions(model_config, processor, inputs["input_ids"][0].cpu())
    if len(image) == 0:
        return PatchMap(image, note="the prompt has no image tokens")
    if model_config.model_type in _ANYRES_MODELS and "image_sizes" in inputs:
        mapped = _anyres(model_config, inputs["image_sizes"][0].tolist(), image)
    elif "image_grid_thw" in inputs:
        mapped = _patch_grid(model_config, processor, inputs["image_grid_thw"].tolist(), image)
    else:
        mapped = _square(processor, inputs, image, page_size)
    return mapped or PatchMap(
        image, note=f"how {model_config.model_type} lays out {len(image)} image tokens on a page is not known here"
    )


def _image_positions(model_config: Any, processor: Any, input_ids: Tensor) -> Tensor:
    for owner, name in (
        (model_config, "image_token_id"),
        (model_config, "image_token_index"),
        (processor, "image_token_id"),
    ):
        token = getattr(owner, name, None)
        if isinstance(token, int):
            return (input_ids == token).nonzero()[:, 0]
    return torch.empty(0, dtype=torch.long)


def _anyres(model_config: Any, page: list[int], image: Tensor) -> PatchMap | None:
    """LLaVA-NeXT: the base view row by row, then each row of the unpadded tile grid and a row end."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    vision = model_config.vision_config
    side = vision.image_size // vision.patch_size
    tiles_high, tiles_wide = get_anyres_image_grid_shape(page, model_config.image_grid_pinpoints, vision.image_size)
    full_rows, full_columns = tiles_high * side, tiles_wide * side
    rows, columns = unpad_image(torch.empty(1, full_rows, full_columns), page).shape[1:]
    if len(image) != side * side + rows * (columns + 1):
        return None
    base = Grid("base view", image[: side * side].view(side, side))
    with_ends = image[side * side :].view(rows, columns + 1)
    scale = min(full_rows / page[0], full_columns / page[1])
    left, right = _span(full_columns, columns, page[1] * scale)
    top, bottom = _span(full_rows, rows, page[0] * scale)
    tiles = Grid("tiles", with_ends[:, :-1], (left, top, right, bottom))
    shown = (base, tiles) if tiles.positions.numel() else (base,)  # a thread of a page has no patch of its own left
    return PatchMap(image, shown, with_ends[:, -1])


def _span(full: int, kept: int, page: float) -> tuple[float, float]:
    """Start and end of the central ``kept`` of ``full`` patches, in fractions of a centred page of ``page`` patches."""
    first = (full - kept) // 2 - (full - page) / 2
    return first / page, (first + kept) / page


def _patch_grid(model_config: Any, processor: Any, grids: list[list[int]], image: Tensor) -> PatchMap | None:
    """Qwen-VL and its like: frames, rows and columns of patches, merged in squares."""
    from_processor: Any = getattr(getattr(processor, "image_processor", None), "merge_size", None)
    merge = int(from_processor or getattr(model_config.vision_config, "spatial_merge_size", 1))
    frames, rows, columns = grids[0]
    rows //= merge
    columns //= merge
    if len(grids) != 1 or frames != 1 or rows * columns != len(image):
        return None
    return PatchMap(image, (Grid("page", image.view(rows, columns)),))


def _square(processor: Any, inputs: Any, image: Tensor, page_size: tuple[int, int]) -> PatchMap | None:
    """One square view: a square number of tokens in one run, from one square picture."""
    side = round(len(image) ** 0.5)
    pixels = inputs.get("pixel_values")
    one_view = pixels is not None and pixels.shape[-1] == pixels.shape[-2] and pixels.shape[:-3].numel() == 1
    in_one_run = int(image[-1] - image[0]) == len(image) - 1
    if side * side != len(image) or not one_view or not in_one_run:
        return None
    return PatchMap(image, (Grid("page", image.view(side, side), _cropped_box(processor, page_size)),))


def _cropped_box(processor: Any, page_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What a processor that resizes the short edge and crops the centre shows of the page; else all of it."""
    image_processor = getattr(processor, "image_processor", None)
    size: Any = getattr(image_processor, "size", None)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else getattr(size, "shortest_edge", None)
    if not (getattr(image_processor, "do_center_crop", False) and shortest):
        return 0.0, 0.0, 1.0, 1.0
    width, height = page_size
    across, down = min(width, height) / width, min(width, height) / height
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2
