"""Where image tokens lie on the page, held against the models' own code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from zipvl.app.loading import Loaded, load
from zipvl.app.patches import patch_map
from zipvl.app.run import prepare

from . import tiny


@pytest.fixture(scope="module")
def loaded(llava_next: Path) -> Loaded:
    return load(str(llava_next), device="cpu")


def mapped(loaded: Loaded, size: tuple[int, int]) -> tuple[Any, Any]:
    inputs = prepare(loaded.processor, Image.new("RGB", size), "KQ", loaded.model)
    return inputs, patch_map(loaded.model.config, loaded.processor, inputs, size)


@pytest.mark.parametrize("size", [(112, 112), (100, 130), (130, 100), (300, 50), (40, 200), (57, 31)])
def test_anyres_follows_the_models_own_packing(loaded: Loaded, size: tuple[int, int]) -> None:
    """The model packs features that carry their own tile, row and column; the map must find each in its place."""
    inputs, patches = mapped(loaded, size)
    assert patches.note is None
    base, tiles = patches.grids
    views, side = inputs["pixel_values"].shape[1], tiny.GRID
    wide = 2 if size[0] > size[1] or views == 5 else 1
    features = torch.full((views, side * side, 2), -1.0)
    features[0, :, 0] = torch.arange(side * side)
    for tile in range(views - 1):
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        features[tile + 1, :, 0] = (rows + side * (tile // wide)).flatten()
        features[tile + 1, :, 1] = (columns + side * (tile % wide)).flatten()
    newline = torch.tensor([-7.0, -7.0])
    packed = loaded.model.model.pack_image_features([features], inputs["image_sizes"], "default", newline)[0][0]
    assert len(packed) == len(patches.image)
    at = packed[patches.image.argsort()]
    first = int(patches.image[0])
    assert at[base.positions.flatten() - first][:, 0].tolist() == list(range(side * side))
    assert (at[patches.separators - first] == -7).all()
    found = at[tiles.positions - first]
    rows, columns = tiles.positions.shape
    assert (found[1:, :, 0] - found[:-1, :, 0] == 1).all() and (found[:, 1:, 1] - found[:, :-1, 1] == 1).all()

    # The box: patch edges in fractions of the page, from the padded picture that the tiles were cut from.
    full_rows, full_columns = side * (views - 1) // wide, side * wide
    scale = min(full_columns / size[0], full_rows / size[1])
    for start, end, low, count, full, length in (
        (tiles.box[0], tiles.box[2], float(found[0, 0, 1]), columns, full_columns, size[0]),
        (tiles.box[1], tiles.box[3], float(found[0, 0, 0]), rows, full_rows, size[1]),
    ):
        margin = (full - length * scale) / 2
        assert start == pytest.approx((low - margin) / (length * scale))
        assert end == pytest.approx((low + count - margin) / (length * scale))


def test_square_view_is_the_central_crop(llava: Path) -> None:
    inputs, patches = mapped(load(str(llava), device="cpu"), (120, 60))
    (grid,) = patches.grids
    assert grid.positions.tolist() == torch.arange(64).view(8, 8).tolist() and inputs["input_ids"].shape[1] == 66
    assert grid.box == (0.25, 0.0, 0.75, 1.0)


def qwen(grid: list[int], tokens: int) -> Any:
    config = SimpleNamespace(
        model_type="qwen2_vl", image_token_id=3, vision_config=SimpleNamespace(spatial_merge_size=2)
    )
    inputs = {
        "input_ids": torch.tensor([[9, 9] + [3] * tokens + [9]]),
        "image_grid_thw": torch.tensor([grid]),
    }
    return patch_map(config, SimpleNamespace(), inputs, (80, 60))


def test_qwen_grid() -> None:
    patches = qwen([1, 6, 8], 12)
    (grid,) = patches.grids
    assert grid.positions.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert grid.box == (0, 0, 1, 1)


def test_a_layout_that_does_not_account_for_every_token_is_not_trusted() -> None:
    patches = qwen([1, 6, 8], 13)
    assert patches.grids == () and "13 image tokens" in (patches.note or "")


def test_several_views_are_not_taken_for_one_square() -> None:
    config = SimpleNamespace(model_type="internvl", image_token_id=3)
    inputs = {"input_ids": torch.tensor([[3] * 64]), "pixel_values": torch.zeros(4, 3, 28, 28)}
    assert patch_map(config, SimpleNamespace(), inputs, (80, 60)).grids == ()
    inputs["pixel_values"] = torch.zeros(1, 3, 28, 28)
    assert patch_map(config, SimpleNamespace(), inputs, (80, 60)).grids[0].positions.shape == (8, 8)


def test_no_image_tokens() -> None:
    config = SimpleNamespace(model_type="fuyu")
    patches = patch_map(config, SimpleNamespace(), {"input_ids": torch.tensor([[1, 2]])}, (8, 8))
    assert patches.note == "the prompt has no image tokens"
