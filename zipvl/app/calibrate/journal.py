"""Every sample measured, a line each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import zipvl

__all__ = ["Journal", "Line", "code_digest"]

Line = dict[str, Any]


def code_digest() -> str:
    """Which code computes answers: 16 digits of the op libraries and of the Python that ``zipvl.sparse`` runs."""
    folder = Path(zipvl.__file__).parent
    files = [*folder.glob("*.py"), *(folder / "transformers").rglob("*.py"), *(folder / "lib").glob("*.so")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Journal:
    """The samples in a file that ``origin`` measured.

    Args:
        path: JSON lines; made where there is none. A line cut short by an interruption is skipped.
        origin: what a sample must have in common with this run (code, device, weights): others are left alone.
    """

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        self.path = path
        self.origin = json.loads(json.dumps(origin))
        self._lines: dict[tuple[str, str, str], Line] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        for text in content.splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line.get("origin") == self.origin:
                self._lines[line["measure"], line["setting"], line["sample"]] = line
        self._broken = bool(content) and not content.endswith("\n")

    def get(self, measure: str, setting: str, sample: str) -> Line | None:
        """The line of one sample, or None."""
        return self._lines.get((measure, setting, sample))

    def add(self, measure: str, setting: str, sample: str, **found: Any) -> None:
        """Writes one sample to the file at once."""
        line = {"measure": measure, "setting": setting, "sample": sample, **found, "origin": self.origin}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._broken + json.dumps(line) + "\n")
        self._broken = False
        self._lines[measure, setting, sample] = line

    def every(self) -> list[Line]:
        """All lines."""
        return list(self._lines.values())

    def lines(self, measure: str, setting: str, samples: list[str]) -> list[Line]:
        """The lines of these samples, those that are there, in their order."""
        found = (self.get(measure, setting, sample) for sample in samples)
        return [line for line in found if line is not None]
