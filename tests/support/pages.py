"""Pages as a browser shows them: opened from a file, and what is wrong with them.

    with opened(browser, path, width=360, dark=True, scripts=False) as view:
        assert not view.findings() and not view.noise

The checks are in ``findings.js``: texts that are cut, overlap, are too small or too pale, headings, labels, ids.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKS = Path(__file__).with_name("findings.js").read_text(encoding="utf-8")
HEIGHT = 900
A4_WIDTH = 718
"""Pixels between margins of 1 cm; 96 are an inch."""


class View(NamedTuple):
    """A page on a screen."""

    page: Any
    """Playwright's."""
    noise: list[str]
    """What the page did besides being shown: messages, errors, dialogs, requests, new windows."""

    def findings(self) -> list[str]:
        """What is wrong with what is shown now, in sentences.

        Raises:
            AssertionError: nothing is shown, so nothing was checked.
        """
        found = self.page.evaluate(CHECKS)
        assert found["num_texts"] > 0
        return found["findings"]

    def unfold(self) -> None:
        """Open everything that can be opened."""
        self.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")

    def darken(self) -> None:
        """Show it to somebody who wants dark pages."""
        self.page.emulate_media(color_scheme="dark")

    def print_out(self) -> None:
        """Show it as it is printed on A4."""
        self.page.emulate_media(media="print")
        self.page.set_viewport_size({"width": A4_WIDTH, "height": HEIGHT})


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, width: int = 800, dark: bool = False, scripts: bool = True) -> Iterator[View]:
    """The page of a file, in a window of its own."""
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT},
        color_scheme="dark" if dark else "light",
        java_script_enabled=scripts,
    )
    noise: list[str] = []
    address = path.absolute().as_uri()

    def refuse(dialog: Any) -> None:
        noise.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    try:
        page = context.new_page()
        page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: noise.append(f"error: {error}"))
        page.on("dialog", refuse)
        context.on("page", lambda _: noise.append("a new window"))
        context.on("request", lambda one: one.url == address or noise.append(f"request: {one.url}"))
        page.goto(address)
        yield View(page, noise)
    finally:
        context.close()
