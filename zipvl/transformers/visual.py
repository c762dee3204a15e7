"""Which tokens are visual: those whose input id is the model's image or video token, or those that the caller names.

The outer model sees input ids, its decoder often their embeddings alone. So the outer model's pre-hook hands the ids on
by a keyword, which models pass down to their decoder, whose pre-hook makes a ``Visual`` of them and of what the cache
remembers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.import_utils import is_tracing

_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

Kind = Literal["text", "visual", "mixed"]
VisualMask = Tensor | Callable[[Tensor | None, Tensor | None], Tensor | None]
"""How the caller names visual tokens: ``[B, N]`` bool, or a function that is asked once for each forward of more
than one token and is given its input ids ``[B, n]`` and embeddings ``[B, n, C]``, either None where the decoder has
none. It returns ``[B, n]`` bool, or None: the tokens are text."""


def visual_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """The ids of image and video tokens of a model; none where it looks at images by cross-attention, where such a
    token only says that there is an image.

    Args:
        config: of the whole model.
    """
    if getattr(config.get_text_config(decoder=True), "cross_attention_layers", None):
        return ()
    found = (getattr(config, name, None) for name in _IDS)
    return tuple(sorted({x for x in found if isinstance(x, int) and not isinstance(x, bool)}))


def is_visual(input_ids: Tensor, ids: tuple[int, ...]) -> Tensor | None:
    """``[B, n]`` bool of ``input_ids [B, n]``: which are among ``ids``; None if there are no ``ids``."""
    found: Tensor | None = None
    for number in ids:
        same = input_ids == number
        found = same if found is None else found | same
    return found


def check_visual_mask(given: Any) -> None:
    """Raises unless ``given`` is None, a bool tensor ``[B, N]`` or a function.

    Raises:
        ValueError: saying what was expected and what came.
    """
    if given is None or (isinstance(given, Tensor) and given.dim() == 2 and given.dtype == torch.bool):
        return
    if isinstance(given, Tensor) or not callable(given):
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"zipvl: visual_mask must be a bool tensor [B, N] or a function, got {got}")


def named(given: VisualMask, input_ids: Tensor | None, embeds: Tensor | None, seen: int) -> Tensor | None:
    """The caller's ``given``, for the tokens of one forward, behind ``seen`` ones; ``[B, n]`` bool or None.

    Raises:
        ValueError: it does not fit them.
    """
    tokens = input_ids if input_ids is not None else embeds
    assert tokens is not None
    batch, new = tokens.shape[:2]
    if isinstance(given, Tensor):
        mask: Any = given[:, seen : seen + new].to(tokens.device)
        mask = torch.nn.functional.pad(mask, (0, new - mask.shape[1]))
        if 0 < mask.shape[0] < batch and batch % mask.shape[0] == 0:  # as generate() expands a prompt
            mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)
    else:
        mask = given(input_ids, embeds)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (batch, new):
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"zipvl: visual_mask must give a bool tensor [{batch}, {new}] for these tokens, got {got}")
    return mask.to(tokens.device)


class Visual:
    """Which tokens of one forward, and of those before it, are visual.

    Args:
        new: ``[B, n]`` bool, of this forward; None: none.
        before: ``[B, m]`` bool, of those that the cache has seen; None: none, and none beyond ``m``.
        seen: how many the cache has seen.
    """

    def __init__(self, new: Tensor | None = None, before: Tensor | None = None, seen: int = 0) -> None:
        self.new, self.seen = new, seen
        self.before = before[:, :seen] if before is not None and seen > 0 else None
        self._kind: Kind | None = None
        self._rows: dict[torch.device, Tensor] = {}
        self._of: dict[tuple[int, torch.device, bool], Tensor | None] = {}

    def all(self) -> Tensor | None:
        """``[B, m]`` bool of all tokens so far, those beyond ``m`` being text; None: none is visual."""
        if self.new is None or self.seen == 0:
            return self.before if self.new is None else self.new
        before = self.new.new_zeros(self.new.shape[0], self.seen) if self.before is None else self.before
        return torch.cat([to_length(before, self.seen), self.new], dim=1)

    def kind(self) -> Kind:
        """Whether no row has visual tokens so far, every row has, or some have. The device is read once a forward; not
        while a graph is traced or captured, where it may be any of them: ``mixed``."""
        if self._kind is None:
            self._kind = self._read()
        return self._kind

    def _read(self) -> Kind:
        known = self.new if self.new is not None else self.before
        if known is None:
            return "text"
        if is_tracing(known):
            return "mixed"
        found = self.rows(known.device).tolist()
        return "mixed" if any(found) and not all(found) else "visual" if any(found) else "text"

    def rows(self, device: torch.device) -> Tensor:
        """``[B]`` bool: which rows have visual tokens so far. Asked where ``kind()`` may be more than ``text``."""
        if device not in self._rows:
            known = self.all()
            assert known is not None
            self._rows[device] = known.any(-1).to(device)
        return self._rows[device]

    def of(self, tokens: int, device: torch.device, *, new: bool = False) -> Tensor | None:
        """``[B, tokens]`` bool of the first ``tokens`` so far, with ``new`` of this forward alone; None: none is
        visual. Made once a forward."""
        key = tokens, device, new
        if key not in self._of:
            known = self.new if new else self.all()
            self._of[key] = None if known is None else to_length(known, tokens).to(device)
        return self._of[key]


def to_length(mask: Tensor, tokens: int) -> Tensor:
    """``mask [B, m]`` of ``tokens`` tokens, those beyond ``m`` being text."""
    missing = tokens - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, missing)) if missing > 0 else mask[:, :tokens]
