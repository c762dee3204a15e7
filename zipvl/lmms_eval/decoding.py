"""lmms-eval's generation arguments as transformers', and the stop texts that transformers has no tokens for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

__all__ = ["Forced", "Until", "cut", "decoding"]

_MAX_NEW_TOKENS = 1024  # where a task names none
_LONGEST_STEP = 4  # tokens a character of a stop text can take: one for each byte of its UTF-8
_SAMPLING = ("temperature", "top_p", "top_k")
_TAKEN = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
_LEFT_OUT = ("image_aspect_ratio", "image_sizes", "max_length", "truncation")
"""What tasks carry for single models of lmms-eval; a processor of transformers decides it by itself."""

_told: set[str] = set()


def decoding(options: dict[str, Any] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``generate``'s arguments, and the texts at which an answer ends, from a task's ``generation_kwargs``.

    Greedy unless the task asks for a temperature above 0 and does not set ``do_sample`` to false. An argument that is
    not known here is left out with a warning, once.

    Raises:
        ValueError: a value is out of range; the message names the argument.
    """
    options = dict(options or {})
    until = options.pop("until", None) or ()
    stops = (until,) if isinstance(until, str) else tuple(str(stop) for stop in until if str(stop))
    longest = options.pop("max_new_tokens", None) or options.pop("max_gen_toks", None) or _MAX_NEW_TOKENS
    options.pop("max_gen_toks", None)
    if not isinstance(longest, int) or longest < 1:
        raise ValueError(f"zipvl: generation argument max_new_tokens must be an integer of at least 1, got {longest!r}")
    temperature = options.pop("temperature", None)
    asked = options.pop("do_sample", None)
    if temperature is not None and temperature < 0:
        raise ValueError(f"zipvl: generation argument temperature must be at least 0, got {temperature!r}")
    sampling = asked is not False and (bool(temperature) or (asked is True and temperature is None))
    arguments: dict[str, Any] = {"max_new_tokens": longest, "do_sample": sampling, "num_beams": 1}
    arguments["temperature"] = temperature if sampling else None
    for name in _SAMPLING[1:]:
        value = options.pop(name, None)
        arguments[name] = value if sampling else None
    for name in _TAKEN:
        if options.get(name) is not None:
            arguments[name] = options.pop(name)
    for name in options.keys() - set(_LEFT_OUT) - set(_TAKEN) - _told:
        _told.add(name)
        warnings.warn(f"zipvl: the task's generation argument {name!r} is not known and left out", stacklevel=2)
    return arguments, stops


def cut(text: str, stops: tuple[str, ...]) -> str:
    """``text`` up to the first of ``stops``, without surrounding blanks."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class Until(StoppingCriteria):
    """Ends a row once one of ``stops`` stands in its last tokens.

    The tokens looked at are as many as the longest stop text could take, so a stop text that ends an answer is seen in
    the step that completes it.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.window = _LONGEST_STEP * max((len(stop) for stop in stops), default=0)
        self.prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """``[B]`` bool, from ``input_ids [B, N]`` with the newest token last; first called with one new token."""
        if self.prompt is None:
            self.prompt = input_ids.shape[1] - 1
        new = input_ids[:, max(self.prompt, input_ids.shape[1] - self.window) :]
        texts = [self.tokenizer.decode(row, skip_special_tokens=False) for row in new]
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class Forced(LogitsProcessor):
    """Makes ``generate`` write ``tokens``, one a step, whatever the model would have written."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores [B, V]`` with all but the next of the tokens at minus infinity."""
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[self.step]] = 0
        self.step += 1
        return forced
