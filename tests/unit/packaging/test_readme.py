"""The README says what the recorded results say, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[3]


def test_tables_are_those_of_the_results() -> None:
    text = readme.README.read_text()
    assert set(re.findall(r"<!-- table:(\w+) -->", text)) == set(readme.TABLES)
    assert readme.rendered(text) == text, "run 'python -m benchmarks.readme'"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
