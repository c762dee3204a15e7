"""Texts that every machine has, and keys hidden in others.

Code: sources of Python's standard library. Prose: the topics of ``pydoc`` (the language reference), joined by name.
Both differ a little between versions of Python, so results carry a digest of them. What is measured to choose a
default (``tune``) and what is reported (``report``) come from different files, topics and seeds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

__all__ = ["KEY_LENGTHS", "NEW", "PROMPT", "SPLITS", "Key", "Split", "Text", "digest", "keys", "texts"]

Split = Literal["tune", "report"]
SPLITS: tuple[Split, ...] = ("tune", "report")
PROMPT, NEW = 2176, 128
"""Tokens of a prompt, and of what follows it."""
KEY_LENGTHS = (1357, 2713)
MOST_TEXTS = 24

MODULES: dict[Split, tuple[str, ...]] = {
    "tune": (
        *("argparse", "difflib", "ftplib", "mailbox", "inspect", "configparser"),
        *("doctest", "calendar", "heapq", "locale", "gettext", "asyncio.base_events"),
    ),
    "report": (
        *("subprocess", "tarfile", "optparse", "statistics", "pickle", "smtplib"),
        *("shutil", "plistlib", "random", "typing", "uuid", "asyncio.tasks"),
    ),
}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRODUCTION = (
    "There is an important piece of information hidden inside a lot of irrelevant text. Find it and memorize it."
)
QUESTION = " What is the pass key? The pass key is"
"""On the line of the filler: behind an empty line this model explains what a pass key is."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Text:
    """``PROMPT`` tokens and the ``NEW`` that follow them."""

    name: str
    kind: Literal["code", "prose"]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """A prompt that ends before ``answer``, ``digits`` in tokens."""

    name: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]


def _source(module: str) -> str:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, module
    return Path(found.origin).read_text(encoding="utf-8")


def _topics(split: Split) -> str:
    """Every second topic, so that the other split has the others."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[SPLITS.index(split) :: 2])


def texts(tokenizer: Tokenizer, split: Split, count: int) -> list[Text]:
    """``count`` texts, code and prose in turn, each cut at a place that its name alone decides.

    Raises:
        ValueError: ``count`` is not in [1, 24].
    """
    if not 1 <= count <= MOST_TEXTS:
        raise ValueError(f"texts: count must be in [1, {MOST_TEXTS}], got {count}")
    prose = _encoded(tokenizer, _topics(split)) if count > 1 else []
    found = []
    for number in range(count):
        place = number // 2
        if number % 2:
            share = len(prose) // (MOST_TEXTS // 2)  # one text from each twelfth: no two overlap
            name, ids = f"topics {place}", prose[place * share : (place + 1) * share]
        else:
            name = MODULES[split][place]
            ids = _encoded(tokenizer, _source(name))
        start = random.Random(f"{split} {name}").randrange(len(ids) - PROMPT - NEW + 1)
        found.append(Text(name, "prose" if number % 2 else "code", tuple(ids[start : start + PROMPT + NEW])))
    return found


def keys(tokenizer: Tokenizer, split: Split, count: int) -> list[Key]:
    """``count`` prompts, the two lengths in turn, with five digits at a depth between none and all of the filler."""
    head, tail = _encoded(tokenizer, INTRODUCTION), _encoded(tokenizer, QUESTION)
    filler = _encoded(tokenizer, f" {FILLER}")
    found = []
    for number in range(count):
        draw = random.Random(f"{split} key {number}")
        digits, depth, length = str(draw.randrange(10000, 100000)), draw.random(), KEY_LENGTHS[number % 2]
        hidden = _encoded(tokenizer, f" The pass key is {digits}. Remember it. {digits} is the pass key.")
        room = length - len(head) - len(hidden) - len(tail)
        sentences = [*filler * (room // len(filler)), *filler[: room % len(filler)]]
        cut = round(depth * (room // len(filler))) * len(filler)
        ids = [*head, *sentences[:cut], *hidden, *sentences[cut:], *tail]
        answer = _encoded(tokenizer, f" {digits}")
        found.append(Key(f"{length} {number // 2}", tuple(ids), tuple(answer)))
    return found


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def digest(samples: Sequence[Text | Key]) -> str:
    """16 digits that tell whether two machines measured the same tokens."""
    return hashlib.sha256(repr([sample.ids for sample in samples]).encode()).hexdigest()[:16]
