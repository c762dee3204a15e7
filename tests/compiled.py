"""Object files of the programs that tests build, kept in ``build/tests`` until what they were made of changes."""

from __future__ import annotations

import hashlib
import subprocess
import time
from functools import cache
from pathlib import Path

from filelock import FileLock

KEPT = Path(__file__).resolve().parents[1] / "build" / "tests"


def compiled(compiler: str, source: Path, flags: list[str]) -> Path:
    """The object file of the C++ file ``source``, made anew where it, what it includes, the flags or the compiler have
    changed."""
    made_by = hashlib.sha256(repr([str(source), flags, version(compiler)]).encode()).hexdigest()[:16]
    target = KEPT / f"{source.name}-{made_by}.o"
    stamp, dependencies = target.with_suffix(".stamp"), target.with_suffix(".d")
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not (target.exists() and stamp.exists() and stamp.read_text() == digest(dependencies)):
            command = [
                compiler,
                *flags,
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                str(target),
                "-MD",
                "-MF",
                str(dependencies),
            ]
            stamp.unlink(missing_ok=True)
            began = time.time()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            if all(file.stat().st_mtime < began for file in read_by(dependencies)):
                stamp.write_text(digest(dependencies))
    return target


def read_by(dependencies: Path) -> list[Path]:
    """The files that the compiler wrote down as read, without those that are gone."""
    files = map(Path, dependencies.read_text().replace("\\\n", " ").partition(":")[2].split())
    return [file for file in files if file.is_file()]


def digest(dependencies: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in read_by(dependencies))).hexdigest()


@cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
