"""What ``zipvl inspect`` shows: a page, and which of its patches each layer kept. One file, PNG or HTML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zipvl.app.files import check_file, write_file
from zipvl.app.loading import Loaded
from zipvl.app.patches import Grid, PatchMap, patch_map
from zipvl.app.run import Answer, ask, prepare
from zipvl.errors import InputError, shortened

__all__ = ["FORMATS", "Inspection", "LayerView", "check_output", "inspect_page", "write_report"]

FORMATS = (".html", ".png")


@dataclass(frozen=True)
class LayerView:
    """What one layer kept of the prompt.

    Attributes:
        layer: its index.
        kept: ``[N]`` bool, by token position; all true for a dense layer.
        reason: why it was dense; ``None`` if it was sparse.
    """

    layer: int
    kept: Tensor
    reason: str | None

    @property
    def count(self) -> int:
        """Kept tokens."""
        return int(self.kept.sum())

    @property
    def ratio(self) -> float:
        """Kept share of the prompt."""
        return self.count / max(len(self.kept), 1)

    def on(self, grid: Grid) -> Tensor:
        """``[rows, columns]`` bool: which patches of ``grid`` were kept."""
        return self.kept[grid.positions]


@dataclass(frozen=True)
class Inspection:
    """Everything a report needs.

    Attributes:
        page: the picture.
        question, answer, model: what was asked, what ZipVL answered, and which model.
        setting: the configuration in words.
        layers: in order of layer index.
        patches: where image tokens lie on the page.
        text: position and text of each token that is no image token.
    """

    page: Image.Image
    question: str
    answer: Answer
    model: str
    setting: str
    layers: list[LayerView]
    patches: PatchMap
    text: list[tuple[int, str]]

    @property
    def share(self) -> Tensor:
        """``[N]`` float: the share of layers that kept each token."""
        return torch.stack([view.kept for view in self.layers]).float().mean(dim=0)


def inspect_page(loaded: Loaded, image: Image.Image, question: str, config: Any, *, max_new_tokens: int) -> Inspection:
    """Ask the model with ZipVL and gather which tokens each layer kept; ``InputError`` where no layer took part."""
    answer = ask(
        loaded.model,
        loaded.processor,
        image,
        question,
        config,
        max_new_tokens=max_new_tokens,
        warm_up=False,
        record_index=True,
    )
    if not answer.stats.layers:
        raise InputError("model", f"no attention layer of {loaded.name} runs through ZipVL: nothing to show")
    inputs = prepare(loaded.processor, image, question, loaded.model)
    patches = patch_map(loaded.model.config, loaded.processor, inputs, image.size)
    tokens = inputs["input_ids"][0].tolist()
    of_image = set(patches.image.tolist())
    decode = getattr(loaded.processor, "tokenizer", loaded.processor).decode
    target = f"ratio {config.ratio:g}" if config.ratio is not None else f"tau {config.for_model(visual=True).tau:g}"
    return Inspection(
        page=image,
        question=question,
        answer=answer,
        model=Path(loaded.name).name.encode(errors="backslashreplace").decode(),  # names of files may be any bytes
        setting=f"{target}, {config.num_recent} recent and {config.num_random} random probes",
        layers=[_view(index, answer.stats.layers[index], len(tokens)) for index in sorted(answer.stats.layers)],
        patches=patches,
        text=[(position, decode([token])) for position, token in enumerate(tokens) if position not in of_image],
    )


def _view(index: int, layer: Any, tokens: int) -> LayerView:
    kept = torch.ones(tokens, dtype=torch.bool)
    if layer.mode == "sparse":
        kept = torch.zeros(tokens, dtype=torch.bool).index_fill(0, layer.index[0], True)
    return LayerView(index, kept, layer.reason)


def check_output(path: Path) -> None:
    """Raises ``InputError`` unless a report can be written to ``path``."""
    shown = shortened(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError("output", f"expected a file name ending in {' or '.join(FORMATS)}, got {shown}")
    check_file("output", path)


def write_report(inspection: Inspection, path: Path) -> None:
    """Write the report, HTML or PNG by the suffix of ``path``, whole or not at all."""
    from zipvl.app.page import render_html
    from zipvl.app.png import render_png

    check_output(path)
    content = render_png(inspection) if path.suffix.lower() == ".png" else render_html(inspection).encode()
    write_file("output", path, content)
