"""Draws the pages that tiny-llava-next reads: grey entries such as ``KQ 482`` scattered over a square page.

One drawing function, `draw`, serves training (thousands of pages a second, batched on the GPU) and the PNG pages
shipped beside the model. Everything random comes from a `torch.Generator`, so a seed names a page.

Seeds: `training_generator` only takes seeds below `FIRST_HELD_OUT_SEED`, `held_out_page` only seeds from there on.
A page also depends on the side of the model's tiles, whose borders no entry crosses.

Run as a script to (re)write the pages shipped with a model folder: ``python pages.py``; or others, as samples of
`zipvl calibrate`: ``python pages.py --output DIR``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANK = len(CHARACTERS)
"""Index that stands for a space, and the label of a half patch without a character."""

PAGE_SIDE = 672
PATCH = 14
CELL_WIDTH, CELL_HEIGHT = 112, 33
ENTRY_LENGTH = 6
"""Two letters, a space, three digits."""
FONT_SIZE = 15
PAPER, INK, NOISE = 0.88, 0.8, 0.04
"""Grey of the paper, how much darker the blackest ink is, standard deviation of the noise."""

FIRST_HELD_OUT_SEED = 1_000_000_000
ENTRY_COUNTS = (8, 16, 24, 32, 48, 64)
"""How many entries a page may carry; more are harder."""


@dataclass
class Layout:
    """What stands where on a batch of pages.

    text: character indices, `[B, entries, 6]`; x, y: top left corner of each entry in pixels, `[B, entries]`;
    contrast: darkness of the ink in `[0.6, 1]`, `[B]`; side: width and height of the page in pixels.
    """

    text: Tensor
    x: Tensor
    y: Tensor
    contrast: Tensor
    side: int


@dataclass
class Page:
    """One held-out page. image: uint8 `[672, 672]`; entries: label to value; label: the entry that is asked for."""

    seed: int
    image: Tensor
    entries: dict[str, str]
    label: str

    @property
    def answer(self) -> str:
        """The three digits beside the label that is asked for."""
        return self.entries[self.label]


@cache
def glyphs(device: torch.device | str = "cpu") -> Tensor:
    """Bitmaps of `CHARACTERS` and of a space, float in `[0, 1]`, `[37, 19, 10]`, copied to a device once."""
    from matplotlib import font_manager  # slow to import, and loading the model does not need it

    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono", fallback_to_default=False), FONT_SIZE)
    width, height = int(font.getlength("M")) + 1, FONT_SIZE + 4
    bitmaps = []
    for character in CHARACTERS + " ":
        image = Image.new("L", (width, height), 0)
        ImageDraw.Draw(image).text((0, 0), character, font=font, fill=255)
        bitmaps.append(np.asarray(image, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(bitmaps)).to(device)


def _shuffled(batch: int, items: int, take: int, generator: torch.Generator) -> Tensor:
    """`take` different numbers below `items` for each of `batch` rows, `[batch, take]`."""
    return torch.rand(batch, items, generator=generator, device=generator.device).argsort(1)[:, :take]


def random_layout(batch: int, entries: int, side: int, tile_side: int, generator: torch.Generator) -> Layout:
    """Places `entries` entries with different labels in random cells, with jitter; no entry crosses a tile's border.

    The tensors live on the generator's device. A tile of 224 px has 12 cells, so a page of 672 px has 108; a tile of
    336 px has 30, the page 120. A page smaller than a tile is one tile: 168 px are 5 cells.
    """
    device = generator.device

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (batch, entries), generator=generator, device=device)

    tile_side = min(side, tile_side)
    tiles = side // tile_side
    columns, rows = max(1, tile_side // CELL_WIDTH), tile_side // CELL_HEIGHT
    cell_width = tile_side // columns
    _, glyph_height, glyph_width = glyphs().shape
    if entries > tiles * tiles * rows * columns:
        raise ValueError(f"a page of {side} px has {tiles * tiles * rows * columns} cells, fewer than {entries}")
    cell = _shuffled(batch, tiles * tiles * rows * columns, entries, generator)
    tile, cell = cell // (rows * columns), cell % (rows * columns)
    x = tile % tiles * tile_side + cell % columns * cell_width + integers(cell_width - ENTRY_LENGTH * glyph_width - 1)
    y = tile // tiles * tile_side + cell // columns * CELL_HEIGHT + integers(CELL_HEIGHT - glyph_height)
    label, value = _shuffled(batch, 26 * 26, entries, generator), integers(1000)
    characters = [10 + label // 26, 10 + label % 26, torch.full_like(label, BLANK)]
    characters += [value // 100, value // 10 % 10, value % 10]
    contrast = 0.6 + 0.4 * torch.rand(batch, generator=generator, device=device)
    return Layout(torch.stack(characters, -1), x, y, contrast, side)


def draw(layout: Layout, generator: torch.Generator) -> Tensor:
    """Pages of a layout with noise, uint8 `[B, side, side]`, on the layout's device."""
    batch, entries, _ = layout.text.shape
    device, side = layout.text.device, layout.side
    bitmaps = glyphs(device)
    _, height, width = bitmaps.shape
    words = bitmaps[layout.text].permute(0, 1, 3, 2, 4).reshape(batch, entries, height, ENTRY_LENGTH * width)
    rows = layout.y[..., None, None] + torch.arange(height, device=device)[:, None]
    columns = layout.x[..., None, None] + torch.arange(ENTRY_LENGTH * width, device=device)
    ink = torch.zeros(batch, side * side, device=device)
    ink.scatter_(1, (rows * side + columns).reshape(batch, -1), words.reshape(batch, -1))
    noise = torch.randn(batch, side, side, generator=generator, device=device)
    grey = PAPER - INK * layout.contrast[:, None, None] * ink.view(batch, side, side) + NOISE * noise
    return (grey * 255).round_().clamp_(0, 255).to(torch.uint8)


def patch_labels(layout: Layout) -> Tensor:
    """The character whose centre lies in each half (left, right) of each patch, or `BLANK`.

    `[B, patches, 2]`, patches in raster order over the whole page. Used for training the vision tower only.
    """
    batch = layout.text.shape[0]
    grid = layout.side // PATCH
    _, height, width = glyphs().shape
    centre_x = layout.x[..., None] + torch.arange(ENTRY_LENGTH, device=layout.x.device) * width + width // 2
    centre_y = (layout.y + height // 2)[..., None].expand_as(centre_x)
    half = (centre_y // PATCH * grid + centre_x // PATCH) * 2 + (centre_x % PATCH >= PATCH // 2).long()
    labels = torch.full((batch, grid * grid * 2), BLANK, device=layout.x.device)
    labels.scatter_(1, half.reshape(batch, -1), layout.text.reshape(batch, -1))
    return labels.view(batch, grid * grid, 2)


def choose_questions(layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """Character indices of `count` different entries of each page, `[B, count, 6]`."""
    batch, entries, _ = layout.text.shape
    chosen = _shuffled(batch, entries, count, generator)
    return layout.text.gather(1, chosen[..., None].expand(-1, -1, ENTRY_LENGTH))


def training_generator(seed: int, device: torch.device | str) -> torch.Generator:
    """The generator of one training batch; refuses the seeds of held-out pages."""
    if not 0 <= seed < FIRST_HELD_OUT_SEED:
        raise ValueError(f"training seeds are in [0, {FIRST_HELD_OUT_SEED}), got {seed}")
    return torch.Generator(device).manual_seed(seed)


def held_out_page(seed: int, tile_side: int, entries: int | None = None) -> Page:
    """The held-out page of a seed (at least `FIRST_HELD_OUT_SEED`), drawn on the CPU: the same on every machine.

    tile_side: of the model that will read it. entries: how many entries it carries; None draws one of `ENTRY_COUNTS`.
    """
    if seed < FIRST_HELD_OUT_SEED:
        raise ValueError(f"held-out seeds start at {FIRST_HELD_OUT_SEED}, got {seed}")
    generator = torch.Generator().manual_seed(seed)
    drawn = ENTRY_COUNTS[int(torch.randint(len(ENTRY_COUNTS), (1,), generator=generator))]
    layout = random_layout(1, entries or drawn, PAGE_SIDE, tile_side, generator)
    question = choose_questions(layout, 1, generator)[0, 0]
    image = draw(layout, generator)[0]
    words = ["".join((CHARACTERS + " ")[i] for i in word) for word in layout.text[0].tolist()]
    label = "".join(CHARACTERS[i] for i in question[:2].tolist())
    return Page(seed, image, dict(word.split() for word in words), label)


def held_out_pages(count: int, tile_side: int, first: int = 0, entries: int | None = None) -> list[Page]:
    """`count` held-out pages, from the `first`-th held-out seed on."""
    return [held_out_page(FIRST_HELD_OUT_SEED + first + i, tile_side, entries) for i in range(count)]


def save_page(page: Page, folder: Path, name: str) -> None:
    """Writes `name`.png and, with seed, question, answer and all entries, `name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page.image.numpy()).save(folder / f"{name}.png", optimize=True)
    facts = {"seed": page.seed, "question": page.label, "answer": page.answer, "entries": page.entries}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def main(folder: Path = Path(__file__).parent, output: Path | None = None, count: int = 200, first: int = 0) -> None:
    """Writes the pages shipped with a model folder: demo (24 entries), easy (8), dense (48) and full (64).

    With ``output`` writes ``count`` held-out pages there instead, from the ``first``-th on.
    """
    tile_side = json.loads((folder / "config.json").read_text())["vision_config"]["image_size"]
    if output is not None:
        for number in range(first, first + count):
            save_page(held_out_page(FIRST_HELD_OUT_SEED + number, tile_side), output, f"{number:06d}")
        return
    for offset, (name, entries) in enumerate([("demo", 24), ("easy", 8), ("dense", 48), ("full", 64)]):
        save_page(held_out_page(2 * FIRST_HELD_OUT_SEED + offset, tile_side, entries), folder / "pages", name)


if __name__ == "__main__":
    typer.run(main)
