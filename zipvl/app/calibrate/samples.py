"""The samples of a calibration: pictures with questions, or prompts of text."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from zipvl.app.calibrate.intervals import needed
from zipvl.app.images import load_image
from zipvl.errors import InputError, shortened

__all__ = ["FEWEST", "Sample", "Split", "digest", "read", "split"]

QUESTION = "Describe this picture."
"""Where a picture comes without one."""
FEWEST = 2
SHARE_TO_REPORT, MOST_TO_TUNE = 0.75, 200
_PICTURES = frozenset(Image.registered_extensions())


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        name: where it stands.
        text: the question about the picture, or the whole prompt.
        image: the picture; None: a prompt of text.
        answers: texts that are right; empty: what dense attention answers is.
        digest: 16 digits of all of this but ``name``.
    """

    name: str
    text: str
    image: Path | None
    answers: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Split:
    """Places of the samples that a setting is chosen on, and of those that it is reported on."""

    tune: tuple[int, ...]
    report: tuple[int, ...]


def read(data: Path, question: str = QUESTION) -> list[Sample]:
    """The samples of a folder or of a JSONL file, in the order of their names or lines; equal ones once.

    Of a folder: every picture in it. ``page.json`` beside ``page.png`` may have its ``question`` and its ``answer``. Of
    a JSONL file: a line each with ``image``, a path from the file's folder on, ``question`` and ``answer``, or with
    ``prompt`` and ``answer``; ``answer`` is a text or a list of texts, and may be left out.

    Args:
        data: the folder or the file.
        question: asked about pictures that have none of their own.

    Raises:
        InputError: of ``--data``, naming the file and the line: there is none, it cannot be read, a picture cannot, a
            line is none of these, or there are fewer than two samples.
    """
    if data.is_dir():
        found = [_of_picture(path, question) for path in sorted(data.iterdir()) if path.suffix.lower() in _PICTURES]
        kind = "a folder of pictures"
    elif data.is_file():
        found = [
            _of_line(data, number, line, question)
            for number, line in enumerate(_text(data).splitlines(), 1)
            if line.strip()
        ]
        kind = "a JSONL file of samples"
    else:
        raise InputError("data", f"expected a folder of pictures or a JSONL file, but {shortened(data)} does not exist")
    samples = list({sample.digest: sample for sample in found}.values())
    if len(samples) < FEWEST:
        raise InputError(
            "data", f"expected {kind} with at least {FEWEST} different samples, got {len(samples)} in {shortened(data)}"
        )
    return samples


def split(count: int, max_loss: float, confidence: float, seed: int) -> Split:
    """Which of ``count`` samples choose and which report, drawn by ``seed``.

    Three quarters report, or more where the bound needs more and some are left to choose on. At most 200 choose.
    """
    report = max(round(SHARE_TO_REPORT * count), min(needed(max_loss, confidence), count - max(1, count // 10)))
    report = min(max(report, count - MOST_TO_TUNE, 1), count - 1)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return Split(tuple(order[report:]), tuple(order[:report]))


def digest(samples: list[Sample]) -> str:
    """16 digits that tell whether two calibrations had the same samples."""
    return hashlib.sha256("".join(sorted(sample.digest for sample in samples)).encode()).hexdigest()[:16]


def _of_picture(path: Path, question: str) -> Sample:
    beside = path.with_suffix(".json")
    facts = _object(_text(beside), str(beside)) if beside.is_file() else {}
    return _sample(path.name, path, facts, question)


def _of_line(data: Path, number: int, line: str, question: str) -> Sample:
    where = f"line {number} of {shortened(data)}"
    facts = _object(line, where)
    if "image" in facts:
        if not isinstance(facts["image"], str) or not facts["image"]:
            raise InputError("data", f'expected "image" to be a path in {where}, got {facts["image"]!r}')
        return _sample(where, data.parent / facts["image"], facts, question)
    if not isinstance(facts.get("prompt"), str) or not facts["prompt"].strip():
        raise InputError("data", f'expected "image" or "prompt" in {where}, got {_shown(facts)}')
    return _sample(where, None, facts | {"question": facts["prompt"]}, question)


def _sample(where: str, image: Path | None, facts: dict[str, Any], question: str) -> Sample:
    text = facts.get("question", question)
    if not isinstance(text, str) or not text.strip():
        raise InputError("data", f'expected "question" to be a text in {where}, got {text!r}')
    answer = facts.get("answer", [])
    answers = tuple(answer) if isinstance(answer, list) else (answer,)
    if not all(isinstance(one, str) and one.strip() for one in answers):
        raise InputError("data", f'expected "answer" to be a text or a list of texts in {where}, got {answer!r}')
    content = b""
    if image is not None:
        _check_picture(image, where)
        content = image.read_bytes()
    marks = [hashlib.sha256(content).hexdigest(), text, answers]
    return Sample(where, text, image, answers, hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16])


def _check_picture(image: Path, where: str) -> None:
    try:
        load_image(image)
    except InputError as error:
        raise InputError("data", f"{where}: {str(error).removeprefix('--image: ')}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("data", f"expected UTF-8, but {shortened(path)} has another byte at {error.start}") from error
    except OSError as error:
        raise InputError("data", f"{shortened(path)} cannot be read: {error.strerror}") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError("data", f"expected a JSON object in {where}, got none: {error}") from error
    if not isinstance(found, dict):
        raise InputError("data", f"expected a JSON object in {where}, got {type(found).__name__}")
    return found


def _shown(facts: dict[str, Any]) -> str:
    return ", ".join(map(repr, facts)) or "nothing"
