"""The site's pages (``make docs``): ``python tools/docs_site.py FOLDER`` copies the checkout's pages there as they lie.

README.md, docs/ and the pages that these link to keep their places, so that their links work on the site as they do in
the checkout. mkdocs.yml names this file as a hook, too.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.*", "examples/**/*.md", "models/**/*.md", "models/**/*.png", "LICENSE")


def copy_pages(folder: Path) -> int:
    """Makes ``folder`` anew with every page and picture. Returns how many there are."""
    shutil.rmtree(folder, ignore_errors=True)
    found = [file for pattern in PAGES for file in sorted(ROOT.glob(pattern)) if file.is_file()]
    for file in found:
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return len(found)


def on_page_content(html: str, **_: object) -> str:
    """A hook of mkdocs: the roles of docstrings, which are Sphinx's, are not shown."""
    return re.sub(r":(?:func|class|meth|mod):(?=<code>)", "", html)


if __name__ == "__main__":
    copy_pages(Path(sys.argv[1]))
