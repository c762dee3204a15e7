"""docs/ops.md says what the ops do: its examples run, and its schemas are the ones registered. No page that sources
name is missing."""

from __future__ import annotations

import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import torch

import zipvl

from .helpers import OPS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "ops.md"
SOURCES = {".md", ".py", ".h", ".cpp", ".cu", ".cuh", ".txt", ".toml", ".in", ".sh", ".html", ""}


def test_examples_run(tmp_path: Path) -> None:
    """In order, in one namespace, as a reader would; from a file, because TorchScript reads source."""
    examples = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(examples) >= 7
    program = tmp_path / "examples.py"
    program.write_text("\n".join(examples))
    namespace = {"__name__": "examples"}
    exec(compile(program.read_text(), str(program), "exec"), namespace)
    assert namespace["zipvl"] is zipvl


@pytest.mark.parametrize("op", [*OPS, "explain"])
def test_schemas_are_the_registered_ones(op: str) -> None:
    section = re.search(rf"^## {op}\n\n```\n(.*?)```", DOCS.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    documented = torch._C.parse_schema(" ".join(section.group(1).split()))
    registered = getattr(torch.ops.zipvl, op).default._schema
    assert str(documented) == str(registered).removeprefix("zipvl::")


def tracked() -> list[Path]:
    """The files of the checkout that git tracks, of kinds that name pages of docs."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in SOURCES]
    return [file for file in files if file.is_file()]


def test_every_page_that_is_named_exists() -> None:
    """``docs/<page>`` anywhere in a source, and links between pages."""
    missing, named = set(), 0
    for file in tracked():
        text = file.read_text(errors="ignore")
        pages = {ROOT / page for page in re.findall(r"\bdocs/[\w./-]*\w\.(?:md|png|html)\b", text)}
        if file.suffix == ".md":
            links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
            pages |= {file.parent / link for link in links}
        named += len(pages)
        missing |= {f"{file.relative_to(ROOT)} names {page}" for page in pages if not page.exists()}
    assert not missing and named > 50


def test_the_normative_text_is_docs_ops() -> None:
    """No source cites another specification, and the steps that ``zipvl/reference.py`` cites are there."""
    citing = {file for file in tracked() if re.search(r"\bspec\.md\b|\bspec \"", file.read_text(errors="ignore"))}
    assert citing <= {Path(__file__).resolve()}
    page = DOCS.read_text()
    cited = re.findall(r"docs/ops\.md, (?:steps? )?(\d)", (ROOT / "zipvl" / "reference.py").read_text())
    assert set(cited) == {"1", "2", "3", "5"} and all(f"**Step {step}: " in page for step in "123456")
    sections = re.findall(
        r'docs/ops\.md, (?:steps? [\w ]+ and )?"(\w+)"', (ROOT / "zipvl" / "reference.py").read_text()
    )
    assert len(sections) >= 7 and all(f"\n## {section}\n" in page for section in sections)


@pytest.mark.slow  # imports transformers
def test_the_reference_has_what_it_names_and_every_op() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    pytest.importorskip("transformers")
    named = re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)
    assert len(named) > 10 and all(pkgutil.resolve_name(name).__doc__ for name in named)
    ops = re.search(r"^::: zipvl\.ops$.*?members:\n(.*?)\n\n", page, flags=re.DOTALL | re.MULTILINE)
    assert ops is not None and re.findall(r"- (\w+)", ops[1]) == list(zipvl.ops.NAMES)


def test_every_page_is_in_the_sites_menu() -> None:
    menu = set(re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/kernels/*.md"), *ROOT.glob("examples/**/*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages} <= menu
    assert all((ROOT / page).is_file() for page in menu)
