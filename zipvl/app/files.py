"""Files that commands write: checked before the work, and whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from zipvl.errors import InputError, first_line, shortened

__all__ = ["check_file", "write_file"]


def check_file(option: str, path: Path) -> None:
    """Raises ``InputError`` of ``--option`` unless a file can be written to ``path``."""
    shown = shortened(path)
    if os.path.isdir(path):
        raise InputError(option, f"expected a file name, but {shown} is a directory")
    if not os.path.isdir(path.parent):
        raise InputError(option, f"expected a file in an existing directory, but {shortened(path.parent)} is none")
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InputError(option, f"expected a file name, but {shown} is not one: {why}") from error
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(option, f"expected a writable directory, but {path.parent}: {error.strerror}") from error


def write_file(option: str, path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path``, whole or not at all.

    Raises:
        InputError: of ``--option``, it cannot be written.
    """
    temporary = path.with_name(f".zipvl-{os.getpid()}")  # any name that fits has room for this one
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise InputError(option, f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
