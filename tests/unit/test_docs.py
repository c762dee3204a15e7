"""docs/ops.md says what the ops do: its examples run, and its schemas are the ones registered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import zipvl

from .helpers import OPS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ops.md"


def test_examples_run(tmp_path: Path) -> None:
    """In order, in one namespace, as a reader would; from a file, because TorchScript reads source."""
    examples = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(examples) >= 7
    program = tmp_path / "examples.py"
    program.write_text("\n".join(examples))
    namespace = {"__name__": "examples"}
    exec(compile(program.read_text(), str(program), "exec"), namespace)
    assert namespace["zipvl"] is zipvl


@pytest.mark.parametrize("op", OPS)
def test_schemas_are_the_registered_ones(op: str) -> None:
    section = re.search(rf"^## {op}\n\n```\n(.*?)```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    documented = torch._C.parse_schema(" ".join(section.group(1).split()))
    registered = getattr(torch.ops.zipvl, op).default._schema
    assert str(documented) == str(registered).removeprefix("zipvl::")
