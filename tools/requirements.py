"""Prints pyproject.toml's requirements for the named groups, one a line: ``requirements.py build test lint``.

``build`` is the build system's; the others are optional dependencies, with ``zipvl[...]`` among them expanded.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def expand(project: dict[str, Any], group: str) -> list[str]:
    """The requirements of ``group``; a requirement ``zipvl[a]`` stands for group ``a``."""
    if group == "build":
        return list(project["build-system"]["requires"])
    found: list[str] = []
    for requirement in project["project"]["optional-dependencies"][group]:
        own = re.fullmatch(r"zipvl\[(\w+)\]", requirement)
        found += expand(project, own[1]) if own else [requirement]
    return found


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    print("\n".join(dict.fromkeys(line for group in sys.argv[1:] for line in expand(pyproject, group))))
