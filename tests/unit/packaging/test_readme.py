"""README.md, docs/benchmarks.md, docs/fidelity.md say what the recorded results say. Links lead somewhere. README and
CHANGELOG are short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("models/*/*.md")]
)


def test_every_table_stands_on_a_page() -> None:
    text = "".join(page.read_text() for page in readme.PAGES)
    assert sorted(re.findall(r"<!-- table:(\w+) -->", text)) == sorted(readme.TABLES)


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert readme.rendered(text) == text, "run 'python -m benchmarks.readme'"


def test_a_setting_shows_its_newest_times_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one setting, one of another window, one on a CPU, one of samples that settings are chosen by."""
    device = {"type": "cuda", "name": "GPU"}
    about = {"device": device, "versions": {"torch": "2.11"}, "date": "2026-11-30T00:00:00"}

    def timed(window: int, seconds: float, **changes: Any) -> dict[str, Any]:
        rows = [
            {
                "name": name,
                "pages": 1,
                "default": 8e3,
                "default_first": 4e3,
                "zipvl": 1e3 * seconds,
                "zipvl_first": 500 * seconds,
            }
            for name in readme.SHOWN
        ]
        return about | {"ratio": 0.25, "window": window, "rows": rows} | changes

    def judged(kl: float, tau: str = "tau 0.97", texts: int = 24, pages: int = 1000, **changes: Any) -> dict[str, Any]:
        page = {"samples": pages, "right": 0.99, "cache_share": 1.06}
        by_length = {"1357": {"samples": 100, "right": 0.95}, "2713": {"samples": 100, "right": 1.0}}
        key = {"samples": 200, "by_length": by_length}
        measured = {"text": {"samples": texts, "kl": kl}, "key": key, "page": page}
        rows = [{"setting": "dense"} | measured, {"setting": f"{tau}, window 512, full, text kept"} | measured]
        return about | {"split": "report", "rows": rows} | changes

    recorded = {
        "answer": [timed(512, 3.0), timed(512, 2.0), timed(512, 1.0, vision_compile=True), timed(0, 0.5)],
        "fidelity": [
            judged(0.5, "default tau"),
            judged(0.007),
            judged(0.1, split="tune"),
            judged(0.2, texts=4),
            judged(0.3, "tau 0.9", pages=100),
        ],
    }
    monkeypatch.setattr(readme, "results", recorded.__getitem__)
    rows = {line.split(" | ")[0].strip("| ").lstrip("`"): line for line in readme.image_to_answer()[4:]}
    assert list(rows) == [
        "dense, as transformers runs it",
        "ZipVLConfig()`",
        "ZipVLConfig(ratio=0.25)`",
        "the same, and `vision_compile=True`",
    ]
    assert rows["ZipVLConfig()`"].endswith("| - | - | 106% | 0.007 | 195 of 200 | 99.0% |")
    assert "| 1.00 s, 2.00 s (**4.0x**) |" in rows["ZipVLConfig(ratio=0.25)`"]
    assert "| 0.50 s, 1.00 s (**8.0x**) |" in rows["the same, and `vision_compile=True`"]
    assert "| 4.00 s, 8.00 s |" in rows["dense, as transformers runs it"]


def test_the_readme_is_short_and_names_the_commands_of_a_clone() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 90
    assert all(f"`make {target}`" in text for target in ("demo", "check", "test"))
    assert not re.search(r"\b[0-9a-f]{12,}\b", text)  # digests belong in the tables of docs/benchmarks.md


def test_a_release_has_at_most_twenty_lines_one_an_entry() -> None:
    releases = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]
    assert releases
    for release in releases:
        lines = [line for line in release.splitlines()[1:] if line]
        assert len(lines) <= 20 and all(line.startswith("- ") for line in lines)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file that is there, and to a heading of it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for target, heading in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = page.parent / target if target else page
        if not file.exists() or (heading and file.suffix == ".md" and heading not in anchors(file)):
            wrong.append(f"{target}#{heading}" if heading else target)
    assert not wrong
