"""The model and its pages: prompts whose picture features are computed once and shared by all settings."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer

from zipvl.baselines import TowerAttention, observed_tower
from zipvl.baselines.common import instance_attribute

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny-llava-next"
sys.path.insert(0, str(FOLDER))
try:
    import network
    import pages
finally:
    sys.path.remove(str(FOLDER))

__all__ = ["CALIBRATION", "TASKS", "Answers", "Batch", "Item", "Subject", "framed_item", "pixel_values"]

CALIBRATION = 100_000
"""Calibration takes held-out pages from this one on; measurements those from the first on."""
FRAME_SEEDS = 500_000_000
"""Multi-frame prompts are drawn from seeds this far above the first held-out one."""
TASKS = ("mixed", "easy", "hard", "frames", "two pages")
EASY, HARD, FRAME_ENTRIES, FRAMES = 8, 64, 24, 2
NEW_TOKENS = 5

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Item:
    """One prompt. pictures: uint8 ``[H, W]`` each, all of one size; label: what is asked for; answer: its digits."""

    pictures: list[Tensor]
    label: str
    answer: str


@dataclass
class Batch:
    """Prompts ready for the model. features: what ``get_image_features`` gives for them; tower: for VisionZip."""

    items: list[Item]
    inputs: dict[str, Tensor]
    features: Any
    tower: TowerAttention


@dataclass
class Answers:
    """Which items were answered rightly, and what the setting's context recorded."""

    right: list[bool]
    record: Any


def framed_item(number: int, tile_side: int) -> Item:
    """Several frames, one of which holds the entry that is asked for.

    A frame is a strip of a page, as wide as the page and one tile high, a picture of its own in the prompt; its rows
    of tokens are as long as those of the pages the model was trained on. All frames come from different pages with
    their own contrast and noise; the label stands in one of them alone.
    """
    generator = torch.Generator().manual_seed(pages.FIRST_HELD_OUT_SEED + FRAME_SEEDS + number)
    layout = pages.random_layout(FRAMES, FRAME_ENTRIES, pages.PAGE_SIDE, tile_side, generator)
    images = pages.draw(layout, generator)
    strips = pages.PAGE_SIDE // tile_side
    first = int(torch.randint(strips, (1,), generator=generator))
    for strip in (s % strips for s in range(first, first + strips)):
        words = [["".join((pages.CHARACTERS + " ")[i] for i in word) for word in page] for page in layout.text.tolist()]
        held = (layout.y // tile_side == strip).tolist()
        shown = [
            [w for w, here in zip(page, rows, strict=True) if here] for page, rows in zip(words, held, strict=True)
        ]
        asked = number % FRAMES  # the frame that holds the entry
        others = {word[:2] for frame, page in enumerate(shown) if frame != asked for word in page}
        candidates = [word for word in shown[asked] if word[:2] not in others]
        if candidates:
            word = candidates[int(torch.randint(len(candidates), (1,), generator=generator))]
            rows = slice(strip * tile_side, (strip + 1) * tile_side)
            return Item([image[rows] for image in images], word[:2], word[3:])
    raise RuntimeError(f"framed_item: no strip of prompt {number} holds an entry")


def pixel_values(pictures: Tensor, tile_side: int) -> Tensor:
    """What the processor makes of pictures whose sides are multiples of the tile's.

    Args:
        pictures: uint8 ``[B, H, W]``.

    Returns:
        float32 ``[B, 1 + tiles, 3, s, s]``: the whole picture shrunk to a tile, then the tiles in raster order.
    """
    batch, height, width = pictures.shape
    picture = pictures.float()
    tiles = picture.view(batch, height // tile_side, tile_side, width // tile_side, tile_side)
    tiles = tiles.transpose(2, 3).flatten(1, 2)
    small = F.interpolate(picture[:, None], size=(tile_side, tile_side), mode="bilinear", antialias=True)
    every = torch.cat([small.round().clamp(0, 255), tiles], 1)
    normalised = (every / 255 - network.IMAGE_MEAN) / network.IMAGE_STD
    return normalised[:, :, None].expand(-1, -1, 3, -1, -1)


class Subject:
    """A model folder on a device.

    Args:
        folder: of the model.
        device: where it runs.
        dtype: of the weights; float32 on a CPU and bfloat16 elsewhere by default.
        batch: prompts that run together; as many as fit by default.
    """

    def __init__(
        self, folder: Path = FOLDER, device: str = "cpu", dtype: torch.dtype | None = None, batch: int | None = None
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.dtype).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tile_side = network.tile_side_of(self.model)
        self.layers = len(self.model.model.language_model.layers)
        self.batch = batch or (4 if self.device.type == "cpu" else 50)
        self.weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
        self.tower = TowerAttention()
        self._batches: dict[tuple[str, int, int], list[Batch]] = {}
        self._current: Batch | None = None

    # Prompts

    def items(self, task: str, count: int, first: int = 0) -> list[Item]:
        """``count`` prompts of a task, from the ``first``-th on.

        Args:
            task: ``mixed`` (8 to 64 entries on a page), ``easy`` (8), ``hard`` (64), ``frames`` (see `framed_item`) or
                ``two pages`` (two whole pages in one prompt, on which the model was not trained).
        """
        makers: dict[str, Callable[[int], Item]] = {
            "mixed": lambda i: self._page(first + i, None),
            "easy": lambda i: self._page(first + i, EASY),
            "hard": lambda i: self._page(first + i, HARD),
            "frames": lambda i: framed_item(first + i, self.tile_side),
            "two pages": lambda i: self._two_pages(first + i),
        }
        if task not in makers:
            raise ValueError(f"task must be one of {TASKS}, got {task!r}")
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,))
        with pool:  # a page a thread: the operations of one page are too small to share
            drawn = list(pool.map(makers[task], range(count)))
        torch.set_num_threads(threads)
        return drawn

    def _page(self, number: int, entries: int | None) -> Item:
        page = pages.held_out_page(pages.FIRST_HELD_OUT_SEED + number, self.tile_side, entries)
        return Item([page.image], page.label, page.answer)

    def _two_pages(self, number: int) -> Item:
        asked, other = self._page(number, FRAME_ENTRIES), self._page(number + CALIBRATION, FRAME_ENTRIES)
        order = [asked.pictures[0], other.pictures[0]]
        return Item(order if number % 2 else order[::-1], asked.label, asked.answer)

    @torch.inference_mode()
    def batches(self, task: str, count: int, first: int = 0) -> list[Batch]:
        """The same prompts with their picture features, computed at the first call."""
        key = (task, count, first)
        if key not in self._batches:
            items = self.items(task, count, first)
            steps = tqdm(range(0, count, self.batch), desc=f"features, {task}", leave=False)
            self._batches[key] = [self.encoded(items[i : i + self.batch]) for i in steps]
        return self._batches[key]

    def inputs(self, items: list[Item]) -> dict[str, Tensor]:
        """What the processor and the chat template make of these prompts."""
        pictures = torch.stack([picture for item in items for picture in item.pictures]).to(self.device)
        height, width = pictures.shape[1:]
        grid = (height // pages.PATCH) * (width // pages.PATCH + 1)  # a row end after each row
        image = [network.IMAGE] * ((self.tile_side // pages.PATCH) ** 2 + grid) * len(items[0].pictures)
        text = [[network.VOCABULARY[c] for c in f"?{item.label}="] for item in items]
        ids = torch.tensor([[network.BOS, *image, *tail] for tail in text], device=self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixel_values(pictures, self.tile_side).to(self.dtype),
            "image_sizes": torch.tensor([[height, width]] * len(pictures), device=self.device),
        }

    @torch.inference_mode()
    def encoded(self, items: list[Item]) -> Batch:
        """These prompts with their picture features."""
        inputs, tower = self.inputs(items), TowerAttention()
        with observed_tower(self.model, tower):
            features = self.model.model.get_image_features(
                pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"], return_dict=True
            )
        for name in ("hidden_states", "last_hidden_state", "attentions"):
            if getattr(features, name, None) is not None:
                setattr(features, name, None)  # only the packed features are needed, and these are large
        inputs["pixel_values"] = inputs["pixel_values"].new_zeros(1)  # stands for the pictures, see `_shared`
        return Batch(items, inputs, features, tower)

    def row_ends(self, task: str) -> float:
        """The share of a prompt's image tokens that are row ends."""
        rows = (self.tile_side if task == "frames" else pages.PAGE_SIDE) // pages.PATCH
        return rows / ((self.tile_side // pages.PATCH) ** 2 + rows * (pages.PAGE_SIDE // pages.PATCH + 1))

    # Runs

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Inside the ``with`` block the model takes the features of the batch that `_use` named."""

        @functools.wraps(self.model.model.get_image_features)  # generate() reads its signature
        def features(*_: Any, **__: Any) -> Any:
            assert self._current is not None
            return self._current.features

        with instance_attribute(self.model.model, "get_image_features", features):
            yield

    def _use(self, batch: Batch) -> None:
        self._current = batch
        self.tower.score, self.tower.key = batch.tower.score, batch.tower.key

    @torch.inference_mode()
    def answers(
        self, batches: list[Batch], context: Context, title: str, each: Callable[[Any], None] | None = None
    ) -> Answers:
        """Greedy answers to all prompts inside ``context()``.

        Args:
            each: called with the context's record after each batch.
        """
        right: list[bool] = []
        with self._shared(), context() as record:
            for batch in tqdm(batches, desc=title, leave=False):
                self._use(batch)
                tokens = self.model.generate(**batch.inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                new = tokens[:, batch.inputs["input_ids"].shape[1] :]
                said = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                right += [text == item.answer for text, item in zip(said, batch.items, strict=True)]
                if each is not None:
                    each(record)
        return Answers(right, record)

    @torch.inference_mode()
    def prefills(self, batches: list[Batch], context: Context) -> Any:
        """The record of prefills alone inside ``context()``."""
        with self._shared(), context() as record:
            for batch in batches:
                self._use(batch)
                self.model(**batch.inputs, use_cache=False, logits_to_keep=1)
        return record

    @torch.inference_mode()
    def first_token_ms(self, items: list[Item], context: Context) -> float:
        """Median time to the first token in ms: one prompt at a time, vision tower included, after a warm-up."""
        prompts = [self.inputs([item]) for item in items]
        times = []
        self.tower.score = self.tower.key = None
        with context():
            for inputs in [prompts[0], *prompts]:
                self._synchronize()
                started = time.perf_counter()
                self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
                self._synchronize()
                times.append(1000 * (time.perf_counter() - started))
        return median(times[1:])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
