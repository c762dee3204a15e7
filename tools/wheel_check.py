"""Does the wheel work beside another Python and another torch than it was built by? ``python -m tools.wheel_check``.

In a new environment in ``build/wheel/check``: torch, then the wheel with its command line (timed), ``zipvl doctor``,
and ``zipvl run`` on the page of ``make demo``, away from the checkout. Model and page are the checkout's; no wheel has
them. Exit code 1 where anything is wrong, 2 where no other Python is to be had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "tiny-llava-next"
TAG = re.compile(r"zipvl-(?P<version>[^-+]+)(?P<label>\+\w+)?-py3-none-(?P<platform>manylinux_\d+_\d+_\w+)\.whl")
GOAL = 90  # seconds from `pip install` to the first answer, torch being there
FACTS = "import sys, zipvl; print(sys.version.split()[0], zipvl.__version__, zipvl.__file__, sep='\\n')"


class WrongError(Exception):
    """The wheel is not as it must be; the message says how."""


def label_problem(label: str | None, build: dict[str, str]) -> str | None:
    """Why a wheel of this label must not hold a library of this build (``build_info.json``); None where it may.

    A wheel without a label may hold either.
    """
    expected = "+cu" + "".join(build["cuda_compiler"].split(".")[:2]) if build["cuda_archs"] else "+cpu"
    return None if label in (None, expected) else f"the label is {label}, and this build's would be {expected}"


def examine(wheel: Path) -> dict[str, str]:
    """The record of the build in ``wheel``.

    Raises:
        WrongError: the name says anything but any Python and a manylinux platform, or the label is another build's, or
            a library is missing or one too many (an extension module needs one Python).
    """
    named = TAG.fullmatch(wheel.name)
    if named is None:
        raise WrongError(f"{wheel.name}: expected zipvl-<version>-py3-none-manylinux_<glibc>_<machine>.whl")
    with zipfile.ZipFile(wheel) as archive:
        build: dict[str, str] = json.loads(archive.read("zipvl/lib/build_info.json"))
        libraries = {name for name in archive.namelist() if ".so" in name}
    expected = {"zipvl/lib/libzipvl_ops.so", *(["zipvl/lib/libzipvl_cuda.so"] if build["cuda_archs"] else [])}
    if libraries != expected:
        raise WrongError(f"{wheel.name}: expected the libraries {sorted(expected)}, got {sorted(libraries)}")
    if problem := label_problem(named["label"], build):
        raise WrongError(f"{wheel.name}: {problem}")
    return build


def pythons() -> Iterator[str]:
    """Pythons to look at: those of PATH, those of pyenv, and last one that uv installs."""
    for minor in range(10, 20):
        if found := shutil.which(f"python3.{minor}"):
            yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob("versions/3.*/bin/python3")))
    if shutil.which("uv"):
        other = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"
        if subprocess.run(["uv", "python", "install", other], check=False).returncode == 0:
            yield subprocess.run(
                ["uv", "python", "find", other], capture_output=True, text=True, check=True
            ).stdout.strip()


def version_of(python: str) -> tuple[int, int] | None:
    """Version of an interpreter that runs and can make environments; None of any other."""
    code = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, ran.stdout.split())) if ran.returncode == 0 else None  # type: ignore[return-value]


def another_python() -> str | None:
    """A Python of another minor version than this one, 3.10 or later; None where there is none."""
    for python in pythons():
        version = version_of(python)
        if version is not None and version >= (3, 10) and version != sys.version_info[:2]:
            return python
    return None


def run(*command: str | Path, cwd: Path) -> tuple[str, float]:
    """What a command prints, and its seconds.

    Raises:
        WrongError: it failed; with all that it printed.
    """
    inherited = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    begin = time.perf_counter()
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise WrongError(f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}")
    return ran.stdout, time.perf_counter() - begin


def check(wheel: Path, environment: Path, folder: Path) -> None:
    """Installs ``wheel`` into ``environment``, which has torch, and tries it from the empty ``folder``.

    Raises:
        WrongError: something did not work.
    """
    build, python = examine(wheel), environment / "bin" / "python"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, built against torch {build['built_against_torch']}")
    torch, _ = run(python, "-c", "import torch; print(torch.__version__)", cwd=folder)
    _, installing = run(python, "-m", "pip", "install", "-q", f"{wheel}[cli]", cwd=folder)
    facts, _ = run(python, "-c", FACTS, cwd=folder)
    interpreter, version, file = facts.splitlines()
    print(f"Python {interpreter}, torch {torch.strip()}")
    if not Path(file).is_relative_to(environment):
        raise WrongError(f"zipvl is {file}, not that of {environment}")
    if f"zipvl-{version}-" not in wheel.name:
        raise WrongError(f"zipvl.__version__ is {version}")
    print(f"pip install           {installing:6.1f} s")

    said, seconds = run(environment / "bin" / "zipvl", "doctor", "--json", cwd=folder)
    doctor: dict[str, Any] = json.loads(said)
    if not doctor["healthy"]:
        raise WrongError(f"zipvl doctor: {said}")
    right = sum(row["check"] == "ok" for row in doctor["ops"])
    print(f"zipvl doctor          {seconds:6.1f} s  healthy: {right} ops as the reference")

    page = json.loads((MODEL / "pages" / "demo.json").read_text())
    asked = ["--model", MODEL, "--image", MODEL / "pages" / "demo.png", "--question", page["question"]]
    said, answering = run(environment / "bin" / "zipvl", "run", "--json", *asked, cwd=folder)
    answer = json.loads(said)
    if not answer["dense"]["answer"] == answer["zipvl"]["answer"] == page["answer"] or not answer["zipvl"]["active"]:
        raise WrongError(f"zipvl run: expected the answer {page['answer']}, dense and sparse; got {said}")
    print(f"zipvl run             {answering:6.1f} s  {page['question']} = {page['answer']}, dense and sparse")
    print(f"install, first answer {installing + answering:6.1f} s  of {GOAL}")


def newest_wheel() -> Path:
    """The wheel that `make wheel` made last."""
    made = sorted((ROOT / "dist").glob("zipvl-*.whl"), key=lambda path: path.stat().st_mtime)
    if not made:
        raise WrongError("dist/ has no wheel: run 'make wheel'")
    return made[-1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="wheel_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="by default the newest of dist/")
    parser.add_argument("--python", help="by default one of another minor version: of PATH, of pyenv, or from uv")
    parser.add_argument("--torch", default="2.10.0", help="its release, by default the oldest that zipvl takes")
    parser.add_argument("--environment", type=Path, help="one that is there and has a torch, instead of a new one")
    given = parser.parse_args()
    environment = given.environment or ROOT / "build" / "wheel" / "check"
    python = given.python or (None if given.environment else another_python())
    if python is None and given.environment is None:
        ours = ".".join(map(str, sys.version_info[:2]))
        print(
            f"wheel-check: NOT RUN. There is no Python but {ours}: PATH has no other python3.10 or later, pyenv has "
            "none, and uv, which would install one, is not there or cannot. Name one: "
            "make wheel-check WHEEL_CHECK_ARGS='--python PATH'",
            file=sys.stderr,
        )
        return 2
    try:
        wheel = (given.wheel or newest_wheel()).resolve()
        with tempfile.TemporaryDirectory() as folder:
            if python is not None:
                run(python, "-m", "venv", "--clear", environment, cwd=Path(folder))
                run(environment / "bin" / "pip", "install", "-q", "numpy", f"torch=={given.torch}", cwd=Path(folder))
            check(wheel, environment.resolve(), Path(folder))
    except WrongError as error:
        print(f"wheel-check: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
