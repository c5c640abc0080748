"""The system's Chromium, headless, for pages; every word on its console is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Opened:
    """A page, and what was said on its console or thrown by its scripts."""

    page: Page
    said: list[str] = field(default_factory=list)

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true. (Playwright's own way needs eval, which the page forbids.)"""
        deadline = monotonic() + 20
        while not self.page.evaluate(expression):
            assert monotonic() < deadline, expression
            self.page.wait_for_timeout(10)


@contextmanager
def opened(url: str, **options: Any) -> Iterator[Opened]:
    """The page at ``url`` in a browser of its own. ``options``: those of a browser context."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_context(**options).new_page()
            found = Opened(page)
            page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: found.said.append(f"error: {error}"))
            page.goto(url)
            yield found
        finally:
            browser.close()
