"""README.md and docs/fidelity.md say what the recorded results say, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[3]


def test_every_table_stands_on_a_page() -> None:
    text = "".join(page.read_text() for page in readme.PAGES)
    assert sorted(re.findall(r"<!-- table:(\w+) -->", text)) == sorted(readme.TABLES)


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert readme.rendered(text) == text, "run 'python -m benchmarks.readme'"


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/notes/*.md")], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
