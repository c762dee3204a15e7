"""The site that ``make docs`` builds, page by page in a real browser, from a server of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from . import browser
from .browser import Browser

SITE = Path(__file__).resolve().parents[2] / "build" / "docs" / "site"
EXECUTABLE = browser.find()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        EXECUTABLE is None, reason="no Chromium is installed (apt-get install chromium, or set CHROMIUM)"
    ),
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built (make docs)"),
]


class Handler(SimpleHTTPRequestHandler):
    """Says nothing of each request."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The site's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with Browser(EXECUTABLE) as opened:
        yield opened


def test_every_page_opens(chromium: Browser, site: str) -> None:
    """With a heading, its pictures and a menu, without an error, and fetching nothing from elsewhere."""
    pages = [
        page.relative_to(SITE) for page in sorted(SITE.rglob("*.html")) if page.name not in ("404.html", "report.html")
    ]
    assert len(pages) > 30
    broken = {}
    for page in pages:
        chromium.open(f"{site}/{page}", width=1280)
        seen = chromium.run(
            """({
                heading: document.querySelector('article h1')?.textContent ?? '',
                pictures: [...document.querySelectorAll('article img')].every(i => i.complete && i.naturalWidth > 0),
                roles: /:(func|class|meth|mod):/.test(document.querySelector('article').textContent),
                menu: document.querySelectorAll('nav a').length,
            })"""
        )
        if not (seen["heading"] and seen["pictures"] and seen["menu"] > 20 and not seen["roles"]):
            broken[str(page)] = seen
    assert not broken
    assert chromium.errors == []
    assert all(address.startswith(site) for address in chromium.requests)


def test_a_search_finds_an_op(chromium: Browser, site: str) -> None:
    chromium.open(f"{site}/index.html", width=1280)
    chromium.run(
        """(() => {
            const box = document.querySelector('input[name=query]');
            box.focus();
            box.value = 'probe_scores';
            box.dispatchEvent(new Event('input', {bubbles: true}));
            box.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}));
        })()"""
    )
    found: list[str] = []
    deadline = time.monotonic() + browser.TIMEOUT_S
    while not found and time.monotonic() < deadline:
        found = chromium.run("[...document.querySelectorAll('.md-search-result__link')].map(a => a.pathname)")
        time.sleep(0.1)
    assert any(path.endswith("/kernels/probe_scores.html") for path in found), json.dumps(found)
